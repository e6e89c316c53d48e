"""The workflows are valid YAML that calls `.ci/run`, and `.ci/run` names what is missing.

Only GitHub shows whether the workflows work.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import says

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "run"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")


def run(*arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def load(path):
    return pytest.importorskip("yaml").safe_load(path.read_text())


def test_there_are_four_workflows():
    assert [path.stem for path in WORKFLOWS] == ["docs", "nightly", "release", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_the_script(path):
    workflow = load(path)
    assert {"name", "permissions", "jobs"} < workflow.keys()
    assert workflow.get("on", workflow.get(True))  # YAML 1.1 reads `on` as true
    first, *_ = workflow["jobs"].values()
    (command,) = [step["run"] for step in first["steps"] if ".ci/run" in step.get("run", "")]
    argument = command.removeprefix("bash .ci/run ")
    matrix = first.get("strategy", {}).get("matrix", {}).get("include", [])
    given = {row["run"] for row in matrix} if "matrix" in argument else {argument}
    known = set(re.findall(r"^#   (\w+) ", SCRIPT.read_text(), re.MULTILINE))
    assert given and given <= known


def test_the_matrix_has_every_python_and_the_oldest_and_newest_jax():
    test = load(ROOT / ".github/workflows/test.yml")["jobs"]["test"]
    rows = test["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows} == {"3.11", "3.12", "3.13"}
    assert {row["run"] for row in rows} == {"newest", "oldest", "tests"}


def test_a_release_has_no_token():
    publish = load(ROOT / ".github/workflows/release.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert "pypa/gh-action-pypi-publish" in publish["steps"][-1]["uses"]
    assert "with" not in publish["steps"][-1]


def test_the_script_names_a_missing_interpreter_and_an_unknown_argument(tmp_path):
    for name in ("bash", "dirname"):  # and no python3.13
        (tmp_path / name).symlink_to(shutil.which(name))
    done = run("newest", PATH=str(tmp_path))
    assert done.returncode == 1
    assert re.search(says(".ci/run", "Python 3.13", "PATH"), done.stderr)
    done = run("latest", PATH=os.environ["PATH"])
    assert done.returncode == 2
    assert re.search(says(".ci/run", "argument", "newest", "latest"), done.stderr)
