"""`compare` equals a plain loop, finds the best learning rate, and reports failures."""

from __future__ import annotations

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adam_jax
from adam_jax.analysis.compare import Comparison
from adam_jax.cli import tasks
from adam_jax.cli.main import main
from helpers import says, slowly

STEPS = 43  # not a multiple of the chunk size
RATES = (0.01, 0.1, 0.3)
SEEDS = (5, 7)


def init(key):
    first, second = jax.random.split(key)
    return {
        "a": jax.random.normal(first, (3, 8)) / 2,
        "b": [jax.random.normal(second, (8,)) / 3],
    }


def loss(params, batch):
    x, y = batch["x"], batch["y"]
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"][0] - y) ** 2)


def batches(steps=STEPS):
    x = np.random.default_rng(0).normal(size=(steps, 16, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=-1))}


def run(constructors, **changes):
    given = {
        "init": init,
        "loss": loss,
        "batches": batches(),
        "learning_rates": RATES,
        "seeds": SEEDS,
        "progress": False,
    }
    return adam_jax.compare(constructors, **{**given, **changes})


@functools.cache
def comparison():
    return run({"adamw": adam_jax.adamw, "sgd": functools.partial(adam_jax.sgd, momentum=0.9)})


def plain(tx, seed, data):
    params = init(jax.random.key(seed))
    state, losses = tx.init(params), []
    step = jax.jit(jax.value_and_grad(loss))
    for i in range(STEPS):
        value, gradients = step(params, jax.tree.map(lambda x, i=i: x[i], data))
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return losses


@pytest.mark.parametrize(
    "name, make",
    [slowly("adamw", adam_jax.adamw), ("sgd", None)],
)
def test_compare_equals_a_plain_training_loop(name, make):
    make = make or functools.partial(adam_jax.sgd, momentum=0.9)
    losses = comparison().losses[name]
    assert losses.shape == (len(RATES), len(SEEDS), STEPS)
    np.testing.assert_allclose(losses[1, 1], plain(make(RATES[1]), SEEDS[1], batches()), rtol=1e-4)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    "make",
    [
        slowly(optax.adamw),
        adam_jax.schedule_free_adamw,
        slowly(functools.partial(adam_jax.adamw, storage="bfloat16")),
        slowly(functools.partial(adam_jax.ademamix, warmup_steps=20)),
        slowly(lambda lr: optax.chain(optax.clip_by_global_norm(1.0), adam_jax.lion(lr))),
        lambda lr: adam_jax.adamw(lambda step: lr * optax.linear_schedule(1.0, 0.0, STEPS)(step)),
        slowly(lambda lr: optax.chain(optax.polyak_sgd(), optax.scale(lr))),  # takes the loss
    ],
)
def test_compare_takes_every_kind_of_constructor(make):
    losses = run({"it": make}, learning_rates=[0.01], seeds=2).losses["it"]
    assert np.isfinite(losses).all()
    assert losses[..., -5:].mean() < losses[..., :5].mean()


def test_state_bytes_count_one_run():
    params = jax.tree.leaves(init(jax.random.key(0)))
    floats = sum(x.nbytes for x in params)
    assert comparison().state_bytes == {"adamw": 2 * floats + 4, "sgd": floats}


def test_best_has_the_lowest_final_loss():
    best = comparison().best("adamw")
    final = comparison().losses["adamw"][..., -4:].mean(axis=-1)
    assert best.index == final.mean(axis=1).argmin()
    assert best.learning_rate == RATES[best.index]
    assert best.mean == pytest.approx(final[best.index].mean())
    assert best.deviation == pytest.approx(final[best.index].std(ddof=1))


def made(final, rates=(0.1, 1.0, 10.0), **changes):
    """Return a comparison with these final losses [learning rate, seed], falling from 2."""
    final = np.asarray(final, np.float32)[..., None]
    losses = final + np.linspace(2.0, 0.0, 40, dtype=np.float32)
    given = {
        "losses": {"it": losses, "that": losses + 0.1},
        "learning_rates": rates,
        "seeds": tuple(range(final.shape[1])),
        "state_bytes": {"it": 1234567, "that": 0},
        "seconds": {"it": 0.0021, "that": 3.1e-5},
    }
    return Comparison(**{**given, **changes})


def test_the_table_shows_loss_state_and_time():
    text = str(made([[0.5, 0.7], [0.2, 0.4], [3.0, np.nan]]))
    header, it, that, _, legend = text.splitlines()
    assert header.split() == ["best", "η", "final", "loss", "state", "step", "of", "6", "runs"]
    assert it.startswith("it ") and "0.3769 ± 0.1" in it and "  1 " in it
    assert "1,234,567 bytes" in it and "2.1 ms" in it and "31 µs" in that
    assert it.endswith("1 of 6 runs diverged") and "edge" not in it
    assert "last 4 of 40 steps" in legend and "2 seeds" in legend and "0.1 to 10" in legend


def test_the_table_warns_if_the_best_learning_rate_is_at_the_edge():
    assert "at the edge: widen learning_rates" in made([[0.1], [0.2], [0.3]]).table()
    assert "edge" in made([[0.3], [0.2], [0.1]], rates=(1.0, 10.0, 0.1)).table()
    assert "edge" not in made([[0.3], [0.1], [0.2]]).table()
    assert "edge" not in made([[0.3]], rates=(1.0,)).table()


def test_without_a_finite_run_there_is_no_best():
    result = made([[np.nan, 1.0], [np.inf, 1.0], [1.0, -np.inf]])
    assert result.best("it") is None
    row = result.table().splitlines()[1]
    assert "diverged" in row and "3 of 6 runs diverged" in row
    assert "it: diverged" in legends(result.plot())[1]


def legends(figure):
    return [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]


def test_divergence_is_found_in_a_real_run():
    result = run({"sgd": adam_jax.sgd}, learning_rates=[0.1, 1e30])
    assert np.isinf(result.final("sgd")[1]).all()
    assert result.best("sgd").learning_rate == pytest.approx(0.1)
    assert "2 of 4 runs diverged" in str(result)


@pytest.mark.parametrize(
    "result",
    [
        made([[0.5, 0.7], [0.2, 0.4], [3.0, np.nan]]),
        slowly(made([[0.5], [0.2], [1e20]])),
        slowly(made([[-0.5, 1.0], [-3.0, -2.0], [1.0, 1.0]])),
        made([[0.0]], rates=(1.0,)),
    ],
    ids=["diverged", "one seed", "negative", "one rate"],
)
def test_plot_is_a_labeled_figure(result, tmp_path):
    figure = result.plot()
    figure.savefig(tmp_path / "plot.png", dpi=20)
    left, right = figure.axes
    assert left.get_xlabel() == "learning rate η" and left.get_ylabel() == "final training loss"
    assert right.get_xlabel() == "step" and right.get_ylabel() == "training loss"
    assert legends(figure)[0] == ["it", "that"]
    assert figure.get_facecolor() == (1, 1, 1, 1)


def test_plot_is_readable_whatever_the_style(tmp_path):
    from matplotlib import style

    with style.context("dark_background"):
        figure = made([[0.5, 0.7], [0.2, 0.4], [0.4, 0.4]]).plot()
        figure.savefig(tmp_path / "plot.png", dpi=20)
    texts = [*figure.axes[0].get_xticklabels(), figure.axes[0].title, figure.axes[0].xaxis.label]
    assert {text.get_color() for text in texts} == {"black"}
    colors = [line.get_color() for line in figure.axes[0].get_lines()[::2]]
    assert colors == ["#0072B2", "#D55E00"]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"learning_rates": 0.1}, ("learning_rates", "sequence of numbers", "0.1")),
        ({"learning_rates": []}, ("learning_rates", "> 0", "[]")),
        ({"learning_rates": [0.1, -1]}, ("learning_rates", "> 0", "[0.1, -1]")),
        ({"seeds": 0}, ("seeds", ">= 1", "sequence of integers", "0")),
        ({"seeds": ["a"]}, ("seeds", "sequence of integers", "['a']")),
        ({"seeds": 1.5}, ("seeds", "sequence of integers", "1.5")),
        ({"batches": ()}, ("batches", "leading axis of steps", "none")),
        ({"batches": (np.ones((3, 2)), np.ones(4))}, ("batches", "(3, 2)", "(4,)")),
        ({"batches": 1.0}, ("batches", "()")),
        ({"loss": lambda params, batch: batch["y"]}, ("loss", "floating-point scalar", "(16,)")),
        ({"loss": lambda params, batch: (1.0, {})}, ("loss", "scalar", "leave out")),
    ],
)
def test_wrong_arguments_are_errors(changes, parts):
    with pytest.raises((ValueError, TypeError), match=says("compare", *parts)):
        run({"adam": adam_jax.adam}, **changes)


@pytest.mark.parametrize(
    "constructors, parts",
    [
        ({}, ("constructors", "dict", "{}")),
        ([adam_jax.adam], ("constructors", "dict")),
        ({"mine": adam_jax.adam(1e-3)}, ("constructors['mine']", "function", "finished optimizer")),
        ({"mine": lambda lr: lr}, ("constructors['mine']", "optax.GradientTransformation")),
    ],
)
def test_wrong_constructors_are_errors(constructors, parts):
    with pytest.raises(TypeError, match=says("compare", *parts)):
        run(constructors)


def test_branching_on_the_learning_rate_is_explained():
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        run({"mine": lambda lr: adam_jax.adam(lr if lr < 1 else 1.0)})
    assert any("'mine'" in note and "scale a schedule" in note for note in error.value.__notes__)


def test_the_progress_bar_counts_every_step(capsys):
    run({"adam": adam_jax.adam}, learning_rates=[0.1], seeds=1, progress=True)
    assert re.search(rf"adam: 100%.*{STEPS}/{STEPS}", capsys.readouterr().err)


@pytest.mark.parametrize("package, act", [("tqdm", "bar"), ("matplotlib", "plot")])
def test_a_missing_package_is_named(package, act, monkeypatch):
    result = made([[0.5], [0.2], [0.3]])
    for module in [package, *(m for m in sys.modules if m.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{act}.*pip install "adam_jax\[demo\]"'):
        if act == "plot":
            result.plot()
        else:
            run({"adam": adam_jax.adam}, progress=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_command_runs_every_task(task, tmp_path, capsys):
    path = tmp_path / "compare.png"
    names = {"digits": ["schedule_free_adamw"], "characters": ["nadamw"]}[task]
    options = ["--task", task, "--steps", "2", "--learning-rates", "0.001", "0.01", "--seeds", "1"]
    assert main(["compare", *names, *options, "--plot", str(path)]) == 0
    printed = capsys.readouterr().out
    assert tasks.TASKS[task].about in printed and str(path) in printed
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in names)
    assert path.stat().st_size > 10_000


def test_an_unknown_name_is_an_error_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "adamw", "adamm"])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "adamax, adamaxw, adamh, adamw," in printed and "adamm" in printed


def test_the_schedule_of_the_tasks_rises_and_falls():
    seen = []

    def make(schedule):
        seen.extend(float(schedule(jnp.asarray(step))) for step in range(50))
        return optax.identity()

    tasks.scheduled(make, 50)(2.0)
    assert seen[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert seen[4:] == sorted(seen[4:], reverse=True) and 0 < seen[-1] < 0.1


def test_the_characters_come_from_the_text():
    windows = tasks.characters_batches(5)
    assert windows.shape == (5, 8, tasks.CONTEXT + 1) and windows.dtype == np.uint8
    assert windows.max() <= tasks.LAST - tasks.FIRST
    text = "".join(chr(code + tasks.FIRST) if code else "\n" for code in windows[0, 0])
    from pydoc_data.topics import topics

    assert text.replace("\n", " ") in " ".join(topics.values()).replace("\n", " ")


@pytest.mark.slow
def test_the_transformer_is_causal():
    params = tasks.characters_init(jax.random.key(0))
    codes = tasks.characters_batches(1)[0, :1, :-1].astype(np.int32)
    changed = codes.copy()
    changed[0, 40:] = (codes[0, 40:] + 1) % 90
    before, after = map(
        jax.jit(functools.partial(tasks.characters_logits, params)), (codes, changed)
    )
    np.testing.assert_allclose(before[0, :40], after[0, :40], atol=1e-5)
    assert not np.allclose(before[0, 40:], after[0, 40:], atol=1e-2)
    assert 90_000 < sum(x.size for x in jax.tree.leaves(params)) < 130_000
