"""Backends that run the step of one leaf: plain XLA, tiles, or a Pallas kernel, per shard."""
