from __future__ import annotations

import sys
from pathlib import Path

# `toy_model` lives beside the distributed tests, whose ranks import it by that name.
sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
