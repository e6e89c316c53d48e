"""Tests run on one device, with strict dtype promotion, no rank promotion, warnings as errors.

Parts of Optax (MultiSteps, schedules, apply_updates on mixed dtypes) break under strict promotion:
tests that go through them are marked `standard_promotion`. Tests of many devices are marked
`eight_devices`.
"""

from __future__ import annotations

import gc
import os

os.environ.pop("XLA_FLAGS", None)  # it could ask for virtual devices, as `Devices` does

import hypothesis
import jax
import jax.extend
import pytest

hypothesis.settings.register_profile("unhurried", deadline=None)  # the first example compiles
hypothesis.settings.load_profile("unhurried")

gc.set_threshold(200_000, 50, 1000)  # traces are many small objects that live long


def pytest_configure(config: pytest.Config):
    config.pluginmanager.register(Devices())  # hooks of this module miss doctests in adam_jax/


class Devices:
    """Gives each test its number of CPU devices, which a process has to start JAX anew to change.

    Tests that need eight come last, so that a worker of pytest-xdist, which takes from either end
    of what is left, seldom changes it.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]):
        items.sort(key=self.number)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item):
        if len(jax.devices("cpu")) != self.number(item):
            jax.extend.backend.clear_backends()  # and all that was traced and compiled
            jax.config.update("jax_num_cpu_devices", self.number(item))

    @staticmethod
    def number(item: pytest.Item) -> int:
        return 8 if item.get_closest_marker("eight_devices") else 1


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
