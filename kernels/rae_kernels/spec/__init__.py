"""Every operation in plain PyTorch, forward and backward: the specification, and what runs without Triton."""
