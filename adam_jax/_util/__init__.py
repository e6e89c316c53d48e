"""Shared utilities: numerics, declarations, errors, paths, and partition specs."""
