"""The command line: the output and the errors of `python -m adam_jax`."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adam_jax
from adam_jax import cli
from adam_jax.cli.main import COMMANDS, main
from helpers import Without, says


def train(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with warnings as errors."""
    command = [sys.executable, "-W", "error", "-m", "adam_jax", "train", *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line on stderr for a bad command line, which has exit code 2."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("python -m adam_jax")
    return err


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.mark.slow
def test_train_compares_our_adamw_with_optaxs(tmp_path):
    done = train("--plot", str(tmp_path / "p.png"))
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^(\S+adamw) +([\d.]+)% +([\d.]+) ms +([\d,]+) bytes", done.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["optax.adamw", "adam_jax.adamw"]
    reference, ours = ([float(x.replace(",", "")) for x in row[1:]] for row in rows)
    assert ours[0] >= 97
    assert abs(ours[0] - reference[0]) <= 1
    assert ours[2] == reference[2]  # bytes of state
    assert "1000/1000" in done.stderr and "loss=" in done.stderr and "accuracy=" in done.stderr
    assert str(tmp_path / "p.png") in done.stdout
    assert min(size_of_png(tmp_path / "p.png")) >= 600


@pytest.mark.slow
def test_train_takes_options(tmp_path):
    path = tmp_path / "p.png"
    options = "--optimizer nadam --storage bfloat16 --steps 7 --learning-rate 0.01 --seed 3"
    done = train(*options.split(), "--weight-decay", "0", "--plot", str(path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"adam_jax\.nadam .*\(4\.00/parameter\)", done.stdout)
    assert path.exists()


@pytest.mark.slow
def test_losses_of_the_demo_equal_optaxs():
    code = """if True:
        import numpy as np
        from adam_jax.cli import demo
        from adam_jax import adamw
        recipe = demo.Recipe(steps=200, learning_rate=2e-3, weight_decay=1.0, seed=1)
        pair = recipe.reference(), recipe.ours(adamw, None)
        reference, ours = (demo.train(recipe, tx, "run").losses for tx in pair)
        assert reference[-1] < 0.5 * reference[0]
        np.testing.assert_allclose(ours, reference, rtol=1e-3)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_memory_prints_bytes_per_parameter_and_per_device(capsys):
    """Print the memory of 7 billion parameters, 16 bytes each in float32, and of 8 devices."""
    main(["memory", "--params", "7e9", "--devices", "8"])
    title, _, heading, *rows = capsys.readouterr().out.splitlines()
    assert title == "7,000,000,000 parameters, their gradients, and AdamW, state spread over " + (
        "8 devices (ZeRO-1)"
    )
    figures = [re.findall(r" ([\d.]+)(?= |$)", row)[-3:] for row in rows]
    assert heading.split() == ["bytes/parameter", "total,", "GB", "GB", "per", "device"]
    assert figures == [
        ["16.00", "112.0", "63.0"],
        ["12.13", "84.9", "35.9"],
        ["12.00", "84.0", "59.5"],
        ["10.06", "70.4", "57.8"],
        ["9.03", "63.2", "56.9"],
        ["14.00", "98.0", "36.8"],
        ["7.06", "49.4", "30.7"],
        ["6.03", "42.2", "29.8"],
        ["4.09", "28.7", "16.2"],
    ]
    main(["memory", "--params", "1e6"])
    assert "per device" not in capsys.readouterr().out
    said = complaint(capsys, "memory", "--params", "many")
    assert re.search(says("python -m adam_jax memory", "--params", ">= 1", "many"), said)


@pytest.mark.parametrize("params", ["1", "7e9", "1e15", "1e30", "1e300"])
def test_the_columns_of_memory_are_aligned(capsys, params):
    main(["memory", "--params", params, "--devices", "8"])
    heading, *rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 9
    for row in rows:
        assert len(re.split(r"  +", row)) == 4
        assert len(row) == len(heading)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert not exit.value.code
    assert capsys.readouterr().out == f"adam_jax {adam_jax.__version__}\n"
    assert importlib.metadata.version("adam_jax") == adam_jax.__version__


def test_the_package_is_marked_as_typed():
    assert (importlib.resources.files("adam_jax") / "py.typed").is_file()


def test_an_unknown_optimizer_is_an_error_that_lists_the_names(capsys):
    err = complaint(capsys, "train", "--optimizer", "foo")
    assert "foo" in err
    assert all(name in err for name in ("adam,", "adamw,", "nadam,", "amsgrad,", "sgd,"))


def test_an_unknown_storage_is_an_error_that_lists_the_names(capsys):
    err = complaint(capsys, "train", "--storage", "foo")
    assert "storage" in err and "'bfloat16'" in err and "'foo'" in err


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--learning-rate", "-1", ("> 0", "-1")),
        ("--learning-rate", "nan", ("> 0", "nan")),
        ("--learning-rate", "fast", ("> 0", "fast")),
        ("--weight-decay", "-0.1", (">= 0", "-0.1")),
        ("--weight-decay", "inf", (">= 0", "inf")),
        ("--steps", "0", ("integer >= 1", "0")),
        ("--steps", "1.5", ("integer >= 1", "1.5")),
        ("--seed", "-1", ("integer >= 0", "-1")),
        ("--plot", "p.txt", (".png, .pdf, or .svg", "p.txt")),
        ("--plot", "nowhere/p.png", ("directory", "nowhere")),
    ],
)
def test_a_bad_value_is_an_error_that_says_what_is_allowed(capsys, option, value, parts):
    assert re.search(
        says("python -m adam_jax train", option, *parts), complaint(capsys, "train", option, value)
    )


def test_without_a_command_the_commands_are_shown(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in COMMANDS)


def test_an_unknown_command_or_option_is_an_error(capsys):
    assert "train" in complaint(capsys, "foo")
    assert "--bogus" in complaint(capsys, "train", "--bogus")


@pytest.mark.parametrize("package", ["flax", "sklearn", "matplotlib", "tqdm"])
def test_a_missing_package_is_named_with_its_install_command(capsys, monkeypatch, package):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "adam_jax.cli.demo", raising=False)
    monkeypatch.delattr(cli, "demo", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    err = complaint(capsys, "train")
    assert re.search(says("python -m adam_jax train", package, 'pip install "adam_jax[demo]"'), err)
