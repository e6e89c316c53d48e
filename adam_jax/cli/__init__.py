"""The command line, `python -m adam_jax`, with its demo and tasks."""
