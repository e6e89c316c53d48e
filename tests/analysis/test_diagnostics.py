"""`record` measures correctly wherever it runs, and `storage_error` measures rounding."""

from __future__ import annotations

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import adam_jax
import helpers
from adam_jax import diagnostics
from helpers import Without, every_mode, says

standard = pytest.mark.standard_promotion
GROUPS = {"all": "", "kernels": "kernel"}
SHAPES = {"a": {"kernel": (64, 128), "bias": (128,)}, "b": {"kernel": (128, 64)}}
ONE_KERNEL = {"a": {"kernel": (64, 128), "bias": (128,)}}
SMALL = {"kernel": (2, 3), "bias": (3,)}
B1, B2 = 0.9, 0.99


def tree(seed, scale=1.0, shapes=SHAPES):
    return helpers.tree(seed, shapes=shapes, scale=scale)


def norm(leaves):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(leaves)))


def kernels(params):
    return [params["a"]["kernel"], params["b"]["kernel"]]


def optimizer(**kwargs):
    return adam_jax.chain(
        optax.clip_by_global_norm(1.0),
        adam_jax.adamw(lambda t: 0.01 / (t.astype(jnp.float32) + 1), B1, B2, **kwargs),
    )


def run(tx, steps, shapes=SHAPES, jit=jax.jit):
    """Return the parameters, the state, and the last step's updates."""
    params = tree(0, shapes=shapes)
    state, step, updates = tx.init(params), jit(tx.update), None
    for t in range(steps):
        updates, state = step(tree(t + 1, 2.0, shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params, state, updates


def test_recorded_values_equal_numpys():
    """Measure before clipping, with bias correction, in the bins of np.histogram."""
    params, state, _ = run(optimizer(), 2)
    updates, state = jax.jit(optimizer().update)(tree(3, 2.0), state, params)
    recorded = run(diagnostics.record(optimizer(), GROUPS, every=2), 3)[1]
    values = diagnostics.read(recorded)
    assert values["step"] == 3
    assert values["learning_rate/all"] == pytest.approx(0.01 / 3)
    for name, of in (("all", lambda x: x), ("kernels", kernels)):
        assert values[f"gradient_norm/{name}"] == pytest.approx(norm(of(tree(3, 2.0))), rel=1e-5)
        ratio = norm(of(updates)) / norm(of(params))
        assert values[f"update_ratio/{name}"] == pytest.approx(ratio, rel=1e-4)
        mu, nu = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(of(m))])
            for m in adam_jax.moments(state).values()
        )
        ratio = np.abs(mu / (1 - B1**3)) / np.sqrt(nu / (1 - B2**3))
        counts = np.histogram(ratio, [0, *diagnostics.EDGES, np.inf])[0]
        np.testing.assert_allclose(
            values[f"signal_to_noise/{name}"], counts / mu.size, atol=2 / mu.size
        )


def test_recording_changes_no_update_and_measures_every_nth_step():
    plain, wrapped = optimizer(), diagnostics.record(optimizer(), every=3)
    for x, y in zip(*(jax.tree.leaves(run(tx, 5)[0]) for tx in (plain, wrapped)), strict=True):
        np.testing.assert_array_equal(x, y)
    at = [diagnostics.read(run(wrapped, t)[1]) for t in (0, 1, 3, 4)]
    assert [row["step"] for row in at] == [0, 1, 1, 4]
    assert at[1]["gradient_norm/all"] == at[2]["gradient_norm/all"] != at[3]["gradient_norm/all"]


@pytest.mark.slow
def test_low_precision_moments_are_measured_as_they_are_used():
    exact, int8, bfloat16 = (
        diagnostics.read(run(diagnostics.record(optimizer(storage=s)), 11, ONE_KERNEL)[1])
        for s in ("float32", "int8", "bfloat16")
    )
    for rounded in (int8, bfloat16):
        distance = np.abs(exact["signal_to_noise/all"] - rounded["signal_to_noise/all"]).sum() / 2
        assert 0 < distance < 0.05


def one_step(tx):
    """Return the values after an eager step, which compiles less than a jitted one."""
    return diagnostics.read(run(diagnostics.record(tx), 1, SMALL, lambda f: f)[1])


@pytest.mark.slow
def test_learning_rates_are_found_in_every_kind_of_optimizer():
    settings = {"bias": {"learning_rate": 0.5}}
    inject = optax.inject_hyperparams(optax.adamw)
    for make, rates in [
        (lambda: adam_jax.groups(adam_jax.adamw, settings, learning_rate=0.25), (0.25, 0.5)),
        (lambda: adam_jax.groups(adam_jax.tunable(adam_jax.adamw), settings, learning_rate=0.25),
         (0.25, 0.5)),
        (lambda: adam_jax.tunable(adam_jax.adamw)(0.25), (0.25,)),
        (lambda: adam_jax.cautious(adam_jax.scale_by_adam()), ()),
        (lambda: adam_jax.schedule_free_adamw(0.5, warmup_steps=2), (0.25,)),
        (lambda: optax.MultiSteps(adam_jax.adamw(0.25), 2), ()),
        (lambda: optax.sgd(0.25), ()),
        (lambda: inject(learning_rate=0.25), (0.25,)),
    ]:  # fmt: skip
        with jax.numpy_dtype_promotion("standard"):
            values = one_step(make())
        found = {k: v for k, v in values.items() if k.startswith("learning_rate")}
        assert sorted(found.values()) == list(rates)
        assert rates[1:] == tuple(found[k] for k in found if k == "learning_rate/bias")
    assert "signal_to_noise/all" in values
    for no_signal in (adam_jax.lion, adam_jax.sgd):
        values = one_step(no_signal(0.1))
        assert "signal_to_noise/all" not in values


def test_record_works_with_scan_donation_checkpoints_and_odd_leaves(tmp_path):
    params = tree(0) | {"none": None, "number": jnp.float32(2), "empty": jnp.zeros((0, 3))}
    params["low"] = jnp.ones(3, jnp.bfloat16)
    tx = diagnostics.record(adam_jax.adamw(0.1), every=2)

    def step(carry, scale):
        grads = jax.tree.map(lambda p: p * scale.astype(p.dtype), carry[0])
        updates, state = tx.update(grads, carry[1], carry[0])
        return (jax.tree.map(jnp.add, carry[0], updates), state), None

    scan = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(1.0, 5)), donate_argnums=0)
    state = scan((params, tx.init(params)))[0][1]
    values = diagnostics.read(state)
    assert values["step"] == 3 and np.isfinite(values["gradient_norm/all"])

    saved = {k: v for k, v in state._asdict().items() if k != "inner_state"}  # Orbax: no empty leaf
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", saved)
    assert diagnostics.read(state._replace(**restored)).keys() == values.keys()


@pytest.mark.slow
def test_record_works_in_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = diagnostics.record(adam_jax.adamw(0.25), {"weights": "^kernel$"})
    opt = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt):
        opt.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model))

    step(model, opt)
    values = diagnostics.read(opt.opt_state)
    assert values["gradient_norm/weights"] == pytest.approx(np.sqrt(6))
    assert values["learning_rate/all"] == 0.25
    np.testing.assert_array_equal(np.nonzero(values["signal_to_noise/weights"])[0], [20])


@pytest.mark.slow
@pytest.mark.eight_devices
@every_mode
def test_sharded_values_are_the_same_and_no_leaf_is_gathered(axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    place = NamedSharding(mesh, P("model"))
    tx = diagnostics.record(adam_jax.adamw(0.1), GROUPS, every=1)
    params, grads = (tree(seed, shapes=ONE_KERNEL) for seed in (0, 1))
    expected = diagnostics.read(jax.jit(tx.update)(grads, tx.init(params), params)[1])
    with jax.set_mesh(mesh):
        params, grads = jax.device_put((params, grads), place)
        compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        values = diagnostics.read(compiled(grads, tx.init(params), params)[1])
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in gathered) <= 8  # one per device


def test_plot_shows_the_history():
    tx = diagnostics.record(optimizer(), GROUPS, every=1)
    history = [diagnostics.read(run(tx, t)[1]) for t in range(4)]
    figure = diagnostics.plot(history)
    axes = [a for part in figure.subfigs for a in part.axes]
    assert [a.get_xlabel() for a in axes] == ["step"] * 5 + [""]
    assert [a.get_title() for a in axes][3:5] == list(GROUPS)
    assert len(axes[1].lines) == 2 and len(axes[1].lines[0].get_xdata()) == 3
    with pytest.raises(ValueError, match=says("plot", "history", "no measurements")):
        diagnostics.plot(history[:1])


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    values = diagnostics.read(run(diagnostics.record(optimizer()), 1)[1])
    for module in [m for m in sys.modules if m.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without("matplotlib"), *sys.meta_path])
    with pytest.raises(
        ModuleNotFoundError, match=r'plot.*matplotlib.*pip install "adam_jax\[demo\]"'
    ):
        diagnostics.plot([values])


@pytest.mark.slow
def test_storage_error_measures_every_leaf():
    exact = run(optimizer(storage="float32"), 5, ONE_KERNEL)
    coded = run(optimizer(storage="int8"), 5, ONE_KERNEL)[1]
    rows = diagnostics.storage_error(coded, exact[1])
    assert [(r.moment, r.leaf) for r in rows[:2]] == [("mu", "a/bias"), ("mu", "a/kernel")]
    for row in rows:
        if row.leaf == "a/bias":  # too small to be coded
            assert (row.kept_in, row.error, row.saturated) == ("float32", 0, 0)
        else:
            assert 1e-4 < row.error < 2e-2
            assert 1 / 128 <= row.saturated < 3 / 128
    assert diagnostics.storage_error(coded)[0].error is None
    assert str(rows).splitlines()[1].startswith("mu       a/bias   float32     0.00e+00")
    converted = adam_jax.convert_state(exact[1], optimizer(storage="int8"), exact[0])
    assert diagnostics.storage_error(converted, exact[1])[1].error < 1e-2


def test_diagnostics_errors_say_what_to_do():
    with pytest.raises(ValueError, match=says("record", "every", "integer", ">= 1", "0")):
        diagnostics.record(optimizer(), every=0)
    with pytest.raises(ValueError, match=says("record", "'('", "regular expression")):
        diagnostics.record(optimizer(), {"a": "("})
    tx = diagnostics.record(optimizer(), {"heads": "head"})
    with pytest.raises(ValueError, match=says("record", "groups['heads']='head'", "no parameter")):
        tx.init(tree(0))
    tx = diagnostics.record(optimizer())
    with pytest.raises(ValueError, match=says("record", "weights", "update(grads, state, params)")):
        tx.update(tree(0), tx.init(tree(0)))
    with pytest.raises(ValueError, match=says("read", "state", "0")):
        diagnostics.read(optimizer().init(tree(0)))
    states = optimizer().init(tree(0)), optimizer().init(tree(0)["a"])
    with pytest.raises(ValueError, match=says("storage_error", "mu/a/bias")):
        diagnostics.storage_error(*states)
    with pytest.raises(ValueError, match=says("storage_error", "state", "no moments")):
        diagnostics.storage_error(optax.EmptyState())
