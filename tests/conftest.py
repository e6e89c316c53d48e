"""Tests run on one device, with strict dtype promotion, no rank promotion, warnings as errors.

Parts of Optax (MultiSteps, schedules, apply_updates on mixed dtypes) break under strict promotion:
tests that go through them are marked `standard_promotion`. Tests of many devices are marked
`eight_devices`.
"""

from __future__ import annotations

import gc
import os
import sys

os.environ.pop("XLA_FLAGS", None)  # it could request virtual devices, as `Devices` does
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU

import hypothesis
import jax
import jax.extend
import pytest

if os.environ.get("WITHOUT_TRITON"):  # as in a JAX that has dropped it
    sys.modules["jax.experimental.pallas.triton"] = None  # pyright: ignore[reportArgumentType]

FULLY = bool(os.environ.get("FULLY_COMPILED"))  # as users compile
if jax.__version_info__ < (0, 11) and not FULLY:
    # Halves the compilation time. Newer versions always use fusion emitters.
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

hypothesis.settings.register_profile("unhurried", deadline=None)  # the first example compiles
hypothesis.settings.load_profile("unhurried")

gc.set_threshold(200_000, 50, 1000)  # traces are many small objects that live long
jax.config.update("jax_traceback_in_locations_limit", 0)  # lowering records them for each operation


def pytest_configure(config: pytest.Config):
    config.pluginmanager.register(Devices())  # hooks of this module miss doctests in adam_jax/


class Devices:
    """A plugin that gives each test the number of CPU devices that it needs.

    Changing the number restarts JAX. Tests that need eight devices run last, so that a worker of
    pytest-xdist seldom changes it.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]):
        items.sort(key=self.number)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item):
        if len(jax.devices("cpu")) != self.number(item):
            jax.extend.backend.clear_backends()  # drops all traced and compiled programs
            jax.config.update("jax_num_cpu_devices", self.number(item))

    @staticmethod
    def number(item: pytest.Item) -> int:
        return 8 if item.get_closest_marker("eight_devices") else 1


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest):
    """Leave out most of LLVM's passes, because tests spend most of their time in compilation.

    `slow` tests and `gpu` tests run all passes, and so do all tests with FULLY_COMPILED=1.
    """
    is_full = FULLY or any(request.node.get_closest_marker(name) for name in ("slow", "gpu"))
    jax.config.update("jax_disable_most_optimizations", not is_full)


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest):
    marked = request.node.get_closest_marker("standard_promotion")
    with (
        jax.numpy_dtype_promotion("standard" if marked else "strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
