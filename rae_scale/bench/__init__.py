"""Benchmarks: operators, attention, training steps. Nothing in the package depends on them.

What measures operators needs PyTorch and `rae_kernels` only, so that it runs wherever these do.
"""
