"""Statistics of a running optimizer, recorded in its state, and storage errors."""

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
