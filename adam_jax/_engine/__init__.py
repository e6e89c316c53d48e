"""Lifts a rule for one array to an Optax transformation of pytrees."""
