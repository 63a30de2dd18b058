"""Samples from tar files and JSON lines to MDS shards to batches, in an order that is a pure function of the step."""
