"""Every test runs with strict dtype promotion, no rank promotion, and warnings as errors.

Parts of Optax (MultiSteps, schedules, apply_updates on mixed dtypes) break under strict promotion:
tests that go through them are marked `standard_promotion`.
"""

from __future__ import annotations

import gc
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # for tests of sharding

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("unhurried", deadline=None)  # the first example compiles
hypothesis.settings.load_profile("unhurried")

gc.set_threshold(200_000, 50, 1000)  # traces are many small objects that live long


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest):
    """Most of the time XLA compiles; but for `slow` tests it leaves out most of LLVM's passes."""
    slow = request.node.get_closest_marker("slow") is not None
    jax.config.update("jax_disable_most_optimizations", not slow)


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest):
    marked = request.node.get_closest_marker("standard_promotion")
    with (
        jax.numpy_dtype_promotion("standard" if marked else "strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
