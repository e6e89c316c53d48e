"""The training job behind `python -m adam_jax train`: digits, with optax.adamw and with ours."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from adam_jax._engine.transformation import Transformation
from adam_jax._util.paths import not_matching
from adam_jax.transforms.chain import chain

BATCH = 128
LONGEST_CHUNK = 25

# Okabe & Ito's colours, which the colour-blind can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the two runs have in common."""

    steps: int
    learning_rate: float
    weight_decay: float
    seed: int

    def schedule(self) -> optax.Schedule:
        """Up from 0 over the first tenth of the steps, then down to 0 along a cosine."""
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup_steps=self.steps // 10, decay_steps=self.steps
        )

    def ours(
        self, constructor: Callable[..., Transformation], storage: str | None
    ) -> Transformation:
        """An optimizer of adam_jax, as a user would write it."""
        return chain(
            optax.clip_by_global_norm(1.0),
            constructor(
                self.schedule(),
                weight_decay=self.weight_decay,
                weight_decay_mask=not_matching("bias", "norm"),
                storage=storage,
            ),
        )

    def reference(self) -> optax.GradientTransformation:
        """The same with Optax's AdamW."""
        mask = not_matching("bias", "norm")
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(self.schedule(), weight_decay=self.weight_decay, mask=mask),
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """What one training run measured."""

    losses: np.ndarray  # at every step
    steps: np.ndarray  # at which the accuracy was taken
    accuracies: np.ndarray  # on the test set
    milliseconds: float  # the median step
    state_bytes: int
    parameters: int


class Classifier(nnx.Module):
    """Two hidden layers with layer norm."""

    def __init__(self, rngs: nnx.Rngs, width: int = 256):
        self.dense1 = nnx.Linear(64, width, rngs=rngs)
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.dense2 = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: Any) -> jax.Array:
        x = nnx.gelu(self.norm1(self.dense1(x)))
        x = nnx.gelu(self.norm2(self.dense2(x)))
        return self.head(x)


def loss(model: Classifier, images: chex.Array, labels: chex.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_chunk(
    model: Classifier, optimizer: nnx.Optimizer, images: chex.Array, labels: chex.Array
) -> jax.Array:
    """Takes one step for each batch along the leading axis; returns their losses."""

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def step(carry, images, labels):
        model, optimizer = carry
        value, gradients = nnx.value_and_grad(loss)(model, images, labels)
        optimizer.update(model, gradients)
        return carry, value

    return step((model, optimizer), images, labels)[1]


@nnx.jit
def accuracy(model: Classifier, images: chex.Array, labels: chex.Array) -> jax.Array:
    """The share of images that are given their label."""
    return jnp.mean(model(images).argmax(axis=-1) == labels)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images, training labels, test labels: the same split every time."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = map(np.asarray, split)
    return images, test_images, labels, test_labels


def train(recipe: Recipe, tx: optax.GradientTransformation, label: str) -> Run:
    """Trains a new classifier; equal recipes see the same start and the same batches."""
    images, test_images, labels, test_labels = digits()
    model = Classifier(nnx.Rngs(recipe.seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(recipe.seed)
    # Equal chunks, so that one compilation serves them all.
    size = max(n for n in range(1, LONGEST_CHUNK + 1) if recipe.steps % n == 0)
    losses, accuracies, seconds = [], [], []
    with tqdm(total=recipe.steps, desc=label, unit="step") as bar:
        for _ in range(recipe.steps // size):
            batches = rng.integers(len(images), size=(size, BATCH))
            start = time.perf_counter()
            chunk = train_chunk(model, optimizer, images[batches], labels[batches])
            losses.append(np.asarray(chunk))
            seconds.append(time.perf_counter() - start)
            accuracies.append(float(accuracy(model, test_images, test_labels)))
            bar.set_postfix(loss=f"{losses[-1][-1]:.4f}", accuracy=f"{accuracies[-1]:.1%}")
            bar.update(size)
    return Run(
        losses=np.concatenate(losses),
        steps=np.arange(size, recipe.steps + 1, size),
        accuracies=np.array(accuracies),
        milliseconds=1e3 * float(np.median(seconds[1:] or seconds)) / size,  # the first compiles
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(nnx.as_pure(optimizer.opt_state))),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
    )


def plot(path: Path, recipe: Recipe, runs: dict[str, Run]) -> None:
    """Draws the losses, the learning rate and the test accuracies, one under the other."""
    figure = Figure(figsize=(8, 9), layout="constrained", facecolor="white")
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(3, 1.5, 2))
    # The second run lies dashed over the first, so that both show where they agree.
    looks = (dict(color=VERMILION, lw=3, alpha=0.6), dict(color=BLUE, lw=1.2, ls="--"))
    for (label, run), look in zip(runs.items(), looks, strict=True):
        top.semilogy(np.arange(1, recipe.steps + 1), run.losses, label=label, **look)
        bottom.plot(run.steps, 100 * run.accuracies, label=label, **look)
    rates = jax.vmap(recipe.schedule())(jnp.arange(recipe.steps))
    middle.plot(np.arange(1, recipe.steps + 1), rates, color=GREEN)
    top.set(title="A small classifier on digits", ylabel="training loss (nats per image)")
    middle.set(ylabel="learning rate")
    bottom.set(ylabel="test accuracy (%)", xlabel="step", ylim=(min(90, *bottom.get_ylim()), 100))
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
    top.legend()
    bottom.legend()
    figure.savefig(path, dpi=150)


def table(runs: dict[str, Run]) -> str:
    """What came of the runs, one line each."""
    lines = [f"{'':<20}{'test accuracy':>15}{'step time':>12}{'optimizer state':>33}"]
    for label, run in runs.items():
        state = f"{run.state_bytes:,} bytes ({run.state_bytes / run.parameters:.2f}/parameter)"
        lines.append(
            f"{label:<20}{run.accuracies[-1]:>15.2%}{run.milliseconds:>9.2f} ms{state:>33}"
        )
    return "\n".join(lines)


def run(recipe: Recipe, label: str, tx: optax.GradientTransformation, path: Path) -> None:
    """Trains with optax.adamw and with `tx`, prints what came of it and draws the picture."""
    runs = {
        name: train(recipe, transformation, name)
        for name, transformation in (("optax.adamw", recipe.reference()), (label, tx))
    }
    plot(path, recipe, runs)
    print(f"\n{table(runs)}\n\nlosses, learning rate and accuracy: {path}")
