from __future__ import annotations

import sys
from pathlib import Path

# `harness` and `toy_model` are imported by the tests and, under the same names, by the ranks that they start.
sys.path.insert(0, str(Path(__file__).parent))
