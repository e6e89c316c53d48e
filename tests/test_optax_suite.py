"""Optax's own test suite, with our functions in the place of Optax's.

This module is also the pytest plugin of the run that it starts (`-p test_optax_suite`): before any
of Optax's tests is imported, `pytest_configure` puts adam_jax's function wherever an Optax module
holds its own function of the same name. By hand, with the ids of what ran:

    pytest tests/test_optax_suite.py -rP
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import optax
import optax.contrib
import pytest

HERE = Path(__file__).parent
OPTAX = Path(optax.__file__).parent
REPORT = "OPTAX_SUITE_REPORT"  # environment variable: where the plugin writes its outcomes

# Names of ours that Optax has for something else.
OTHER_MEANING = {"ema"}

PROMISED = """
adabelief adam adamax adamaxw adamw adan ademamix adopt amsgrad lamb lion nadam nadamw radam rmsprop
schedule_free_adamw schedule_free_eval_params sgd simplified_ademamix trace yogi
scale_by_adam scale_by_adamax scale_by_adan scale_by_ademamix scale_by_adopt scale_by_amsgrad
scale_by_belief scale_by_lion scale_by_radam scale_by_rms scale_by_simplified_ademamix
scale_by_stddev scale_by_yogi
""".split()

# What runs in one process. Left out is what never reaches an optimizer of ours, or only as the
# means to test something else for half a minute (line searches, Muon).
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
        "_src/lookahead_test.py",
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
    # On its own: it asks for eight devices when it is imported, before JAX has started.
    "sharding": ["_src/sharding_test.py"],
}

# Deliberate differences: {regular expression for a test's label: reason}. Each must fail.
KNOWN: dict[str, str] = {}

# Not run: {regular expression for a test's label: reason}.
NOT_RUN = {
    r"SelectiveTransformTest::test_selective_bad_structure": "expects an error message of older JAX",
    r"ContribTest::test_.*(state|schedule).*wrapper_name='": "the wrapper is not used: repeats others",
    r"ContribTest::test_optimizers_accept_extra.*wrap=False": "repeats AliasTest",
    r"mixed_precision1": "18 s; the first case has more to say",
}


def label(item) -> str:
    """A test's id followed by its parameters, which absl only numbers."""
    parameters = re.search(r"\(.*\)$", (item.function.__doc__ or "").partition("\n")[0])
    if not parameters:
        return item.nodeid
    return item.nodeid + re.sub(r" at 0x\w+", "", parameters[0])


# ---- The plugin ----


def pytest_configure(config):
    if REPORT not in os.environ:
        return
    adam_jax = importlib.import_module("adam_jax")
    theirs = {k: v for k, v in (vars(optax) | vars(optax.contrib)).items() if callable(v)}
    ours = {k: getattr(adam_jax, k) for k in adam_jax.__all__ if k in theirs.keys() - OTHER_MEANING}
    by_id = {id(theirs[name]): (name, value) for name, value in ours.items()}
    for module in [m for key, m in sys.modules.items() if re.match(r"optax(\.|$)", key)]:
        for key, value in list(vars(module).items()):
            name, function = by_id.get(id(value), (None, None))
            # Ours calls optax.chain: there it has to stay.
            if name and (module, name) != (optax, "chain"):
                setattr(module, key, function)
    config.optax_suite = {"substituted": sorted(ours), "outcomes": {}}
    config.optax_only = theirs.keys() - ours.keys()


def pytest_collection_modifyitems(config, items):
    if REPORT not in os.environ:
        return
    keep, drop = [], []
    for item in items:
        item.optax_label = label(item)
        optimizer = re.search(r"\bopt_name='(\w+)'", item.optax_label)
        not_ours = optimizer and optimizer[1] in config.optax_only
        not_run = any(re.search(pattern, item.optax_label) for pattern in NOT_RUN)
        (drop if not_ours or not_run else keep).append(item)
    items[:] = keep
    config.hook.pytest_deselected(items=drop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REPORT in os.environ and (report.when == "call" or not report.passed):
        outcomes = item.config.optax_suite["outcomes"]
        # A failed subtest reports before its test does, and the test must not hide it.
        if outcomes.get(item.optax_label) != "failed":
            outcomes[item.optax_label] = report.outcome
    return report


def pytest_sessionfinish(session):
    if REPORT in os.environ:
        Path(os.environ[REPORT]).write_text(json.dumps(session.config.optax_suite))


# ---- Our tests ----


@pytest.mark.parametrize("group", GROUPS)
def test_optax_suite(group, tmp_path):
    for package in ("absl", "flax", "scipy", "sklearn"):
        pytest.importorskip(package, reason=f"Optax's tests need {package}")
    tests = [str(OPTAX / path) for path in GROUPS[group] if (OPTAX / path.split("::")[0]).exists()]
    if not tests:
        pytest.skip(f"optax {optax.__version__} is installed without its tests")

    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("JAX_", "XLA_", "PYTEST_", "COV_"))
    }
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
        REPORT: str(tmp_path / "report.json"),
    }
    options = f"-q -p test_optax_suite -p no:cacheprovider -p no:xdist -c {os.devnull} --tb=short"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), f"--rootdir={OPTAX}", *tests],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = run.stdout[-20000:] + run.stderr[-5000:]
    print(output)
    assert run.returncode in (0, 1), output  # 1: some failed; anything else is not a test's verdict
    report = json.loads((tmp_path / "report.json").read_text())
    outcomes = report["outcomes"]
    passed = {label for label, outcome in outcomes.items() if outcome == "passed"}
    failed = {label for label, outcome in outcomes.items() if outcome == "failed"}
    known = {label for label in outcomes for pattern in KNOWN if re.search(pattern, label)}
    print(f"{group}: {len(passed)} passed, {len(failed)} failed, of {len(outcomes)}")

    assert set(PROMISED) <= set(report["substituted"])
    assert not failed - known, "\n".join(sorted(failed - known)) + "\n\n" + output
    assert not passed & known, f"no longer a difference: {sorted(passed & known)}"
    assert passed
    if group == "optimizers":
        for name in PROMISED:
            assert name.startswith("scale_by_") or any(f"'{name}'" in label for label in passed)
