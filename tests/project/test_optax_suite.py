"""Optax's own test suite, with our functions in the place of Optax's.

This module is also the pytest plugin of the runs that it starts (`-p test_optax_suite`): before
any of Optax's tests is imported, `pytest_configure` replaces the functions in Optax's modules by
adam_jax's functions of the same names. To read what ran:

    pytest tests/project/test_optax_suite.py -rP
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import optax
import optax.contrib
import pytest

OPTAX = Path(optax.__file__).parent
REPORT = "OPTAX_SUITE_REPORT"  # the environment variable with the path of the plugin's report

# These names must be substituted. All other names that adam_jax shares with Optax are substituted,
# too, except OTHER_MEANING.
PROMISED = """
adabelief adam adamax adamaxw adamw adan ademamix adopt amsgrad lamb lion nadam nadamw radam rmsprop
schedule_free_adamw schedule_free_eval_params sgd simplified_ademamix yogi
scale_by_adam scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
scale_by_belief scale_by_lion scale_by_radam scale_by_rms scale_by_simplified_ademamix
scale_by_stddev scale_by_yogi
"""
OTHER_MEANING = {"ema"}

EVERYTHING = "OPTAX_SUITE_ALL" in os.environ  # also run slow tests

# Each group runs in a process of its own. Files that call no function of ours are left out.
GROUPS = {
    "optimizers": ["_src/alias_test.py::AliasTest"],
    "contrib": [
        "contrib/_common_test.py",
        "contrib/_complex_valued_test.py",
        "contrib/_sam_test.py",
        "contrib/_schedule_free_test.py",
    ],
    "transforms": [
        "_src/float64_test.py",
        "_src/linesearch_test.py::ZoomLinesearchTest::test_value_and_grad_from_state",
        "_src/transform_test.py",
        "experimental/_aggregating_test.py",
        "schedules/_inject_test.py",
        "schedules/_schedule_test.py::ScheduleAsLearningRateTest",
        "transforms/_accumulation_test.py",
        "transforms/_combining_test.py",
        "transforms/_conditionality_test.py",
        "transforms/_freezing_test.py::SelectiveTransformTest",
        "transforms/_layouts_test.py",
        "transforms/_masking_test.py",
        "transforms/_monitoring_test.py",
        "tree_utils/_state_utils_test.py",
    ],
    # On its own: it requests eight devices when it is imported, before JAX has started.
    "sharding": ["_src/sharding_test.py"],
    # These test something else at length, and only use our functions.
    "slow": [
        "_src/combine_test.py",
        "_src/linesearch_test.py",
        "contrib/_galore_test.py",
        "contrib/_muon_test.py",
    ],
}

# Deliberate differences: {regular expression for a test's label: reason}. Each has to fail.
KNOWN = {
    r"test_lion_invalid_mode_raises": "expects an error at the first update; ours comes at once",
}

# Not run: {regular expression for a test's label: reason}.
NOT_RUN = {
    r"test_selective_bad_structure": "fails in Optax too: expects a message of an older JAX",
    r"ContribTest.*schedule_if_type_annotated.*'schedule_free_adamw'": "has none, in Optax neither",
}
SLOW = {
    r"AliasTest.*complex128": "5 s; complex64 and float64 run",
    r"test_multi_steps_mixed_precision": "30 s; the contract suite has the nine pairs of dtypes",
    r"ContribTest::test_.*(state|schedule).*wrapper_name='": "repeats: the wrapper is not used",
    r"ContribTest::test_optimizers_accept_extra.*wrap=False": "repeats AliasTest",
    r"ContribTest.*wrapper_name='.*_setup_m": "repeats the parabola in another shape",
}

# Why Optax's tests may skip.
SKIPS = r"complex|reduce_on_plateau is not supported|TODO"


def label(item: pytest.Function) -> str:
    """Return a test's id and its parameters, which absl's ids only number."""
    parameters = re.search(r"\(.*\)$", (item.function.__doc__ or "").partition("\n")[0])
    return item.nodeid + re.sub(r" at 0x\w+", "", parameters[0] if parameters else "")


# ---- The plugin ----


def pytest_configure(config):
    if REPORT not in os.environ:
        return
    adam_jax = importlib.import_module("adam_jax")
    theirs = {k: v for k, v in (vars(optax) | vars(optax.contrib)).items() if callable(v)}
    ours = {k: getattr(adam_jax, k) for k in adam_jax.__all__ if k in theirs.keys() - OTHER_MEANING}
    names = {id(theirs[name]): name for name in ours}
    for module in [m for key, m in sys.modules.items() if re.match(r"optax(\.|$)", key)]:
        for key, value in list(vars(module).items()):
            name = names.get(id(value))
            if name and (module, name) != (optax, "chain"):  # ours calls optax.chain
                setattr(module, key, ours[name])
    assert optax.adam is adam_jax.adam and optax.contrib.adopt is adam_jax.adopt
    config.optax_suite = {"substituted": sorted(ours), "outcomes": {}}
    others = "|".join(theirs.keys() - ours.keys())
    config.optax_others = rf"opt_name='({others})'|<function ({others})>|_({others})\d?\("
    jax.__version__ = "9.9.9"  # sharding_test compares versions as strings: "0.10" < "0.7" skips


def pytest_collection_modifyitems(config, items):
    if REPORT not in os.environ:
        return
    keep, drop = [], []
    for item in items:
        item.optax_label = label(item)
        patterns = [config.optax_others, *NOT_RUN, *(() if EVERYTHING else SLOW)]
        dropped = any(re.search(pattern, item.optax_label) for pattern in patterns)
        (drop if dropped else keep).append(item)
    items[:] = keep
    config.hook.pytest_deselected(items=drop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REPORT in os.environ and (report.when == "call" or not report.passed):
        outcomes = item.config.optax_suite["outcomes"]
        skipped_for_good = report.skipped and re.search(SKIPS, str(report.longrepr))
        outcome = "failed" if report.skipped and not skipped_for_good else report.outcome
        if outcomes.get(item.optax_label) != "failed":  # one of several subtests has failed
            outcomes[item.optax_label] = outcome
    return report


def pytest_sessionfinish(session):
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(json.dumps(session.config.optax_suite))


# ---- Our tests ----


@pytest.mark.suite
@pytest.mark.parametrize("group", GROUPS)
def test_our_functions_pass_the_tests_of_optax(group, tmp_path):
    for package in ("absl", "flax", "scipy", "sklearn"):
        pytest.importorskip(package, reason=f"Optax's tests need {package}")
    if group == "slow" and not EVERYTHING:
        pytest.skip("two minutes; set OPTAX_SUITE_ALL=1 to run it")
    tests = [str(OPTAX / path) for path in GROUPS[group] if (OPTAX / path.split("::")[0]).exists()]
    if not tests:
        pytest.skip(f"optax {optax.__version__} is installed without its tests")

    options = "-q -rsf --tb=short -p test_optax_suite -p no:cacheprovider -p no:xdist"
    options += f" -c {os.devnull} --rootdir={OPTAX}"
    ours = ("JAX_", "XLA_", "PYTEST_", "COV_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        REPORT: str(tmp_path / "report.json"),
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), *tests],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = run.stdout[-20000:] + run.stderr[-5000:]
    print(output)
    assert run.returncode in (0, 1), output  # 1: a test failed; others: the tests did not run
    report = json.loads((tmp_path / "report.json").read_text())
    outcomes = report["outcomes"]
    passed = {label for label, outcome in outcomes.items() if outcome == "passed"}
    failed = {label for label, outcome in outcomes.items() if outcome == "failed"}
    known = {label for label in outcomes if any(re.search(known, label) for known in KNOWN)}
    print(f"{group}: {len(passed)} passed, {len(failed)} failed, of {len(outcomes)}")

    assert set(PROMISED.split()) <= set(report["substituted"])
    assert passed
    assert not failed - known, "\n".join(sorted(failed - known)) + "\n\n" + output
    assert not passed & known, f"no longer different: {sorted(passed & known)}"
    if group == "optimizers":
        tested = {name for label in passed for name in re.findall(r"opt_name='(\w+)'", label)}
        assert {"adam", "adamw", "nadam", "nadamw", "amsgrad", "adamax", "adamaxw"} <= tested
