"""What goes around an optimizer: chains, wrappers, groups, master weights, sharding."""
