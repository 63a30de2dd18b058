from __future__ import annotations

import sys
from pathlib import Path

# The harness that starts ranks, under the name by which these import it, too.
sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
