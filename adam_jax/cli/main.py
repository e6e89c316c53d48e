"""The command line, `python -m adam_jax`: list the family, compare some, train, plan memory."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from adam_jax import __version__
from adam_jax._engine.transformation import Transformation
from adam_jax.analysis.compare import compare
from adam_jax.analysis.memory import memory_report
from adam_jax.cli import tasks
from adam_jax.optimizers._catalogue import constructors, markdown, table
from adam_jax.optimizers._constructors import adamw
from adam_jax.transforms.master_weights import master_weights


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = Parser(prog="python -m adam_jax", description="The Adam family for JAX.")
    parser.add_argument("--version", action="version", version=f"adam_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_list(commands.add_parser("list", help="show the optimizers that there are"))
    add_compare(commands.add_parser("compare", help="train with several of them on a small task"))
    add_train(commands.add_parser("train", help="train a small Flax classifier on digits"))
    add_memory(commands.add_parser("memory", help="show what AdamW keeps in memory, by format"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the formulas are not ASCII
    args = parser.parse_args(argv)
    args.run(args)
    return 0


def add_list(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `list`."""
    parser.description = "Shows every optimizer: its formula, state, purpose and paper."
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.set_defaults(run=lambda args: print(markdown() if args.markdown else table()))


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `compare`."""
    parser.description = (
        "Trains with each optimizer on a small task, at several learning rates from several seeds, "
        "prints a table and draws the losses. The learning rate rises for a tenth of the steps and "
        "falls to 0. On your own problem: adam_jax.compare(…)."
    )
    known = "; ".join(f"{name}: {task.about}" for name, task in tasks.TASKS.items())
    positive = number(float, "> 0", lambda x: 0 < x < math.inf)
    at_least_one = number(int, ">= 1", lambda n: n >= 1)
    add = parser.add_argument
    add(
        "names",
        nargs="+",
        type=optimizer(constructors()),
        metavar="NAME",
        help="as `list` shows them",
    )
    add("--task", choices=tasks.TASKS, default="digits", help=f"{known} (default: digits)")
    add("--steps", type=at_least_one, metavar="N", help="of each run (default: the task's)")
    add("--learning-rates", type=positive, nargs="+", metavar="X", help="at their peak")
    add("--seeds", type=at_least_one, metavar="N", help="how many (default: the task's)")
    add("--plot", type=picture, default="adam_jax_compare.png", metavar="PATH", help="the picture")
    parser.set_defaults(run=run_compare, parser=parser)


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
    names = ", ".join(trainable())
    kind = optimizer(trainable())
    add("--optimizer", type=kind, default="adamw", metavar="NAME", help=f"one of {names}")
    add("--storage", metavar="FORMAT", help="how moments lie in memory, such as bfloat16")
    add("--steps", type=number(int, ">= 1", lambda n: n >= 1), default=1000, metavar="N")
    add("--learning-rate", type=positive, default=2e-3, metavar="X", help="at its peak")
    add("--weight-decay", type=from_zero, default=1.0, metavar="X", help="of the kernels")
    add("--seed", type=number(int, ">= 0", lambda n: n >= 0), default=0, metavar="N")
    add("--plot", type=picture, default="adam_jax_train.png", metavar="PATH", help="the picture")
    parser.set_defaults(run=train, parser=parser)


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `memory`."""
    parser.description = (
        "Shows the bytes of parameters, gradients and AdamW's state in each format. Activations "
        "and temporaries come on top. For your own model: adam_jax.memory_report(tx, params)."
    )
    at_least_one = number(float, ">= 1", lambda x: 1 <= x < math.inf)
    add = parser.add_argument
    add("--params", type=at_least_one, required=True, metavar="N", help="how many, such as 7e9")
    devices = number(int, ">= 1", lambda n: n >= 1)
    add("--devices", type=devices, default=1, metavar="N", help="over which ZeRO-1 spreads state")
    parser.set_defaults(run=lambda args: print(memory_table(int(args.params), args.devices)))


MODES = {
    "float32 AdamW": ("float32", lambda: adamw(1e-3)),
    "bfloat16 state": ("float32", lambda: adamw(1e-3, storage="bfloat16")),
    "int8 state": ("float32", lambda: adamw(1e-3, storage="int8")),
    "bfloat16 parameters, master_weights(bits=32)": (
        "bfloat16",
        lambda: master_weights(adamw(1e-3), bits=32),
    ),
    "bfloat16 parameters, master_weights(bits=24), int8": (
        "bfloat16",
        lambda: master_weights(adamw(1e-3, storage="int8"), bits=24),
    ),
}
"""The parameters' dtype, and the optimizer."""


def memory_table(count: int, devices: int) -> str:
    """What AdamW with so many parameters keeps in memory in each mode, as text.

    Bytes of the state are those of one matrix: small leaves, which stay uncoded, are left out.
    """
    width = 4096
    heading = ["", "bytes/parameter", "total, GB", *(["GB per device"] if devices > 1 else [])]
    rows = [heading]
    for mode, (dtype, make) in MODES.items():
        params: Any = jax.ShapeDtypeStruct((-(-count // width), width), jnp.dtype(dtype))
        report = memory_report(make(), params)
        state = report.state_bytes / report.parameters
        other = report.total_bytes / report.parameters - state
        sizes = [count * (other + state), count * (other + state / devices)]
        cells = [f"{size / 1e9:,.1f}" for size in sizes[: len(heading) - 2]]
        rows.append([mode, f"{other + state:.2f}", *cells])
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    widths = [max(17, width + 2) for width in rest]
    lines = [f"{name:<{first}}" + "".join(map(str.rjust, cells, widths)) for name, *cells in rows]
    spread = f", state spread over {devices} devices (ZeRO-1)" if devices > 1 else ""
    return "\n".join([f"{count:,} parameters, their gradients and AdamW{spread}", "", *lines])


def trainable() -> dict[str, Callable[..., Transformation]]:
    """The constructors that take a schedule and mask their weight decay, as `train` wants them."""
    return {
        name: make
        for name, make in constructors().items()
        if "weight_decay_mask" in inspect.signature(make).parameters
    }


def optimizer(known: Collection[str]) -> Callable[[str], str]:
    """A parser of the names of constructors."""

    def parse(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {name}")
        return name

    return parse


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


def run_compare(args: argparse.Namespace) -> None:
    """Runs `compare`."""
    task = tasks.TASKS[args.task]
    steps = args.steps or task.steps
    with needing_extra(args.parser):
        comparison = compare(
            {name: tasks.scheduled(constructors()[name], steps) for name in args.names},
            init=task.init,
            loss=task.loss,
            batches=task.batches(steps),
            learning_rates=args.learning_rates or task.learning_rates,
            seeds=args.seeds or task.seeds,
        )
        print(f"\n{task.about}\n\n{comparison}")
        comparison.plot().savefig(args.plot, dpi=150)
    print(f"\nlosses: {args.plot}")


def train(args: argparse.Namespace) -> None:
    """Runs `train`."""
    parser: argparse.ArgumentParser = args.parser
    with needing_extra(parser):
        from adam_jax.cli import demo
    recipe = demo.Recipe(args.steps, args.learning_rate, args.weight_decay, args.seed)
    try:
        tx = recipe.ours(constructors()[args.optimizer], args.storage)
    except ValueError as error:  # the library's own message, which says what there is
        parser.error(str(error))
    demo.run(recipe, f"adam_jax.{args.optimizer}", tx, args.plot)


@contextlib.contextmanager
def needing_extra(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A missing package ends the program with the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        parser.exit(2, f'{parser.prog} needs {package}: pip install "adam_jax[demo]"\n')
