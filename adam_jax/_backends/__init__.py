"""How the step of one leaf is executed: by XLA as it is, in tiles, in a kernel, per shard."""
