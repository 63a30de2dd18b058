"""rae-scale: train Scale-RAE text-to-image models on GPUs, from a laptop to a cluster."""

__version__ = "0.1.0"
