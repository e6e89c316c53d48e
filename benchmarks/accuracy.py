"""The error of Adam's first step in float32, in Optax and in adam_jax.

python -m benchmarks.accuracy
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax

import adam_jax
from benchmarks import report


def first_step_error(make, b2: float) -> float:
    """Return the relative error of Adam's first direction; the exact one is sign(g)."""
    tx = make(b2=b2, eps=0.0)
    g = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    direction = np.asarray(tx.update(g, tx.init(g))[0], np.float64)
    return float(np.abs(direction / np.sign(g) - 1).max())


def main() -> None:
    report.write(
        "accuracy",
        [
            {
                "error of Adam's first step, float32": f"b2 = {b2}",
                "optax": f"{first_step_error(optax.scale_by_adam, b2):.1e}",
                "ours": f"{first_step_error(adam_jax.scale_by_adam, b2):.1e}",
            }
            for b2 in (0.999, 0.9999, 0.99999, 0.999999)
        ],
    )


if __name__ == "__main__":
    main()
