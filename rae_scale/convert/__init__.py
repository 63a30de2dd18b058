"""Checkpoints from one format to another: `SOURCES` read, sinks write, and both speak of named tensors by boxes."""
