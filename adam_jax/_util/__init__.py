"""What every other package builds on: numerics, declarations, errors, paths, partition specs."""
