"""The training runs of `python -m adam_jax train`: digits with optax.adamw and adam_jax."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from adam_jax._engine.transformation import Transformation
from adam_jax._util.paths import not_matching
from adam_jax.analysis import plotting
from adam_jax.analysis._table import text_table
from adam_jax.transforms.chain import chain
from adam_jax.transforms.clip import clip_by_global_norm

BATCH = 128
LONGEST_CHUNK = 25


class Recipe(NamedTuple):
    """The settings that both runs share."""

    steps: int
    learning_rate: float
    weight_decay: float
    seed: int

    def schedule(self) -> optax.Schedule:
        """Return a schedule that rises for a tenth of the steps, then falls to 0."""
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warmup_steps=self.steps // 10, decay_steps=self.steps
        )

    def ours(self, make: Callable[..., Transformation], storage: str | None) -> Transformation:
        """Return an adam_jax optimizer, as a user would write it."""
        mask = not_matching("bias", "norm")
        given = {"weight_decay": self.weight_decay, "weight_decay_mask": mask, "storage": storage}
        return chain(clip_by_global_norm(1.0), make(self.schedule(), **given))

    def reference(self) -> optax.GradientTransformation:
        """Return the same optimizer with Optax's AdamW."""
        mask = not_matching("bias", "norm")
        adamw = optax.adamw(self.schedule(), weight_decay=self.weight_decay, mask=mask)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class Run(NamedTuple):
    """The measurements of one training run."""

    losses: np.ndarray  # at every step
    accuracies: np.ndarray  # on the test set, after every chunk of steps
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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits of a batch of images."""
        x = nnx.gelu(self.norm1(self.dense1(x)))
        x = nnx.gelu(self.norm2(self.dense2(x)))
        return self.head(x)


def loss(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_chunk(
    model: Classifier, optimizer: nnx.Optimizer[Classifier], images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Take a step for each batch along the leading axis, and return the losses."""

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def step(
        carry: tuple[Classifier, nnx.Optimizer[Classifier]], images: jax.Array, labels: jax.Array
    ) -> tuple[tuple[Classifier, nnx.Optimizer[Classifier]], jax.Array]:
        model, optimizer = carry
        value, gradients = nnx.value_and_grad(loss)(model, images, labels)
        optimizer.update(model, gradients)
        return carry, value

    return step((model, optimizer), images, labels)[1]


@nnx.jit
def accuracy(model: Classifier, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of correctly classified images."""
    return jnp.mean(model(images).argmax(axis=-1) == labels)


def digits() -> list[np.ndarray]:
    """Return training images, test images, training labels, and test labels."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    return [np.asarray(x) for x in split]


def train(recipe: Recipe, tx: optax.GradientTransformation, label: str) -> Run:
    """Train a new classifier; equal recipes give equal initial parameters and batches."""
    images, test_images, labels, test_labels = map(jnp.asarray, digits())
    model = Classifier(nnx.Rngs(recipe.seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng = np.random.default_rng(recipe.seed)
    # chunks of equal size need a single compilation
    size = max(n for n in range(1, LONGEST_CHUNK + 1) if recipe.steps % n == 0)
    losses, accuracies, seconds = [], [], []
    with tqdm(total=recipe.steps, desc=label, unit="step") as bar:
        for _ in range(recipe.steps // size):
            drawn = rng.integers(len(images), size=(size, BATCH))
            batches = jax.block_until_ready((images[drawn], labels[drawn]))
            start = time.perf_counter()
            losses.append(np.asarray(train_chunk(model, optimizer, *batches)))
            seconds.append(time.perf_counter() - start)
            accuracies.append(float(accuracy(model, test_images, test_labels)))
            bar.set_postfix(loss=f"{losses[-1][-1]:.4f}", accuracy=f"{accuracies[-1]:.1%}")
            bar.update(size)
    return Run(
        losses=np.concatenate(losses),
        accuracies=np.array(accuracies),
        milliseconds=1e3 * float(np.median(seconds[1:] or seconds)) / size,  # the first compiles
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(nnx.as_pure(optimizer.opt_state))),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
    )


def run(recipe: Recipe, label: str, tx: optax.GradientTransformation, path: Path) -> None:
    """Train with optax.adamw and with `tx`, print a table of the results, and save the figure."""
    optimizers = {"optax.adamw": recipe.reference(), label: tx}
    runs = {name: train(recipe, optimizer, name) for name, optimizer in optimizers.items()}
    rows = [("", "test accuracy", "step time", "optimizer state")]
    for name, (_, accuracies, milliseconds, size, count) in runs.items():
        state = f"{size:,} bytes ({size / count:.2f}/parameter)"
        rows.append((name, f"{accuracies[-1]:.2%}", f"{milliseconds:.2f} ms", state))
    plotting.draw_training(
        {name: run.losses for name, run in runs.items()},
        {name: run.accuracies for name, run in runs.items()},
        np.asarray(jax.vmap(recipe.schedule())(jnp.arange(recipe.steps))),
    ).savefig(path, dpi=150)
    table = text_table(rows, "<20 >15 >12 >33", "")
    print(f"\n{table}\n\nlosses, learning rate, and accuracy: {path}")
