"""Measures of a running optimizer, kept in its state, and the errors that storage makes."""

from adam_jax.analysis.diagnostics import (
    EDGES,
    RecordState,
    StorageError,
    StorageErrors,
    plot,
    read,
    record,
    storage_error,
)

__all__ = [
    "EDGES",
    "RecordState",
    "StorageError",
    "StorageErrors",
    "plot",
    "read",
    "record",
    "storage_error",
]
