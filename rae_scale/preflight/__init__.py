"""What would stop or slow a run, found before its first step: on each machine, and between them."""
