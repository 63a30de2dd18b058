"""Looking at data: what is in it, whether it is whole, how it is distributed, what it looks like."""
