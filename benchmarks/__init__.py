"""Benchmarks: `python -m benchmarks.NAME` prints a table and writes its figures as JSON."""
