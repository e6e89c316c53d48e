"""Chains, wrappers, parameter groups, master weights, and state sharding."""
