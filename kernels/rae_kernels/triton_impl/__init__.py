"""Triton kernels and their launchers. Imported only where they run: Triton is not installed everywhere."""

import os

# Whether a product and a sum become one instruction with one rounding: stated, because Triton 3.10 changes its default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
