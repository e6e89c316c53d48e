"""The command line: `python -m adam_jax train` trains a small network and shows what came of it."""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from adam_jax import optimizers
from adam_jax.transformation import Transformation


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = Parser(prog="python -m adam_jax", description="The Adam family for JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_train(commands.add_parser("train", help="train a small Flax classifier on digits"))
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def constructors() -> dict[str, Callable[..., Transformation]]:
    """The optimizers by name: what takes a learning rate first."""
    return {
        name: make
        for name, make in vars(optimizers).items()
        if inspect.isfunction(make)
        and not name.startswith("_")
        and next(iter(inspect.signature(make).parameters), None) == "learning_rate"
    }


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `train`."""
    parser.description = (
        "Trains a small Flax NNX classifier on scikit-learn's digits, first with optax.adamw and "
        "then with an optimizer of adam_jax, and draws both in one picture."
    )
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    positive = number(float, "> 0", lambda x: 0 < x < math.inf)
    from_zero = number(float, ">= 0", lambda x: 0 <= x < math.inf)
    add = parser.add_argument
    names = ", ".join(constructors())
    add("--optimizer", type=optimizer, default="adamw", metavar="NAME", help=f"one of {names}")
    add("--storage", metavar="FORMAT", help="how moments lie in memory, such as bfloat16")
    add("--steps", type=number(int, ">= 1", lambda n: n >= 1), default=1000, metavar="N")
    add("--learning-rate", type=positive, default=5e-3, metavar="X", help="at its peak")
    add("--weight-decay", type=from_zero, default=0.5, metavar="X", help="of the kernels")
    add("--seed", type=number(int, ">= 0", lambda n: n >= 0), default=0, metavar="N")
    add("--plot", type=picture, default="adam_jax_train.png", metavar="PATH", help="the picture")
    parser.set_defaults(run=train, parser=parser)


def optimizer(name: str) -> str:
    """The name of a constructor."""
    if name not in constructors():
        listed = ", ".join(constructors())
        raise argparse.ArgumentTypeError(f"must be one of {listed}, got {name}")
    return name


def number(
    kind: type[int] | type[float], allowed: str, holds: Callable[[float], bool]
) -> Callable[[str], float]:
    """A parser of numbers for which `holds` is true, as `allowed` says in words."""
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {noun} {allowed}, got {text}")
        return value

    return parse


def picture(text: str) -> Path:
    """A path that a picture can be written to: better to know before training than after."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path


def train(args: argparse.Namespace) -> None:
    """Runs `train`."""
    parser: argparse.ArgumentParser = args.parser
    try:
        from adam_jax import demo
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        parser.exit(2, f'{parser.prog} needs {package}: pip install "adam_jax[demo]"\n')
    recipe = demo.Recipe(args.steps, args.learning_rate, args.weight_decay, args.seed)
    try:
        tx = recipe.ours(constructors()[args.optimizer], args.storage)
    except ValueError as error:  # the library's own message, which says what there is
        parser.error(str(error))
    demo.run(recipe, f"adam_jax.{args.optimizer}", tx, args.plot)


if __name__ == "__main__":
    sys.exit(main())
