"""What a run needs of memory, network and time, before it is launched. Imports neither transformers nor DeepSpeed."""
