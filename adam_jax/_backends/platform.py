"""The platform that a program is traced for."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """Return the platform that the current program is traced for: "cpu", "gpu", "tpu", ….

    An abstract device in the current mesh decides, so that a program can be lowered for a machine
    that isn't there. Without one the answer is the platform of `jax.default_device`, else JAX's
    default backend. All of these are part of the key of `jax.jit`'s cache.

    The data may still be on another platform: an accelerator's host can run a program whose
    arguments are on its CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = device or jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    platform = device if isinstance(device, str) else device.platform
    # Devices and backends say "gpu"; lowering, and some abstract devices, say which vendor's.
    return "gpu" if platform in ("cuda", "rocm") else platform
