"""The command line, `python -m adam_jax`: list, compare, train, and memory."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import math
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

import jax

from adam_jax import __version__
from adam_jax.analysis._table import text_table
from adam_jax.analysis.catalogue import constructors, markdown, table
from adam_jax.analysis.compare import compare
from adam_jax.analysis.memory import memory_report
from adam_jax.cli import tasks
from adam_jax.optimizers.adam import adamw
from adam_jax.transforms.master_weights import master_weights


class Parser(argparse.ArgumentParser):
    """A parser that doesn't print its usage in errors."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message in one line."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or print the help if none is given, and return the exit code."""
    parser = Parser(prog="python -m adam_jax", description="The Adam family for JAX.")
    parser.add_argument("--version", action="version", version=f"adam_jax {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=lambda _: parser.print_help(), parser=parser)
    for name, (run, add_options) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=str(run.__doc__).partition("\n")[0],
            description=run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_options(command.add_argument)
        command.set_defaults(run=run, parser=command)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the formulas aren't ASCII
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        args.parser.exit(2, f'{args.parser.prog} needs {package}: pip install "adam_jax[demo]"\n')
    return 0


def number(
    kind: type[int] | type[float], low: int, *, above: bool = False
) -> Callable[[str], float]:
    """Return an argument type for finite numbers >= low, or > low if `above`."""
    allowed = f"{'an integer' if kind is int else 'a number'} {'>' if above else '>='} {low}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value < math.inf and not (above and value == low):
                return value
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {text}")

    return parse


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """Return an argument type for these names."""

    def parse(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {name}")
        return name

    return parse


def picture(text: str) -> Path:
    """Return the path of a picture, checked before training starts."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf, or .svg, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in an existing directory, got {path.parent}")
    return path


COUNT = number(int, 1)
POSITIVE = number(float, 0, above=True)
AddArgument: TypeAlias = Callable[..., argparse.Action]


def list_options(add: AddArgument) -> None:
    """Declare the options of `list`."""
    add("--markdown", action="store_true", help="as a Markdown table")


def show_list(args: argparse.Namespace) -> None:
    """Show every optimizer: its formula, state, purpose, and paper."""
    print(markdown() if args.markdown else table())


def compare_options(add: AddArgument) -> None:
    """Declare the options of `compare`."""
    known = "; ".join(f"{name}: {task.about}" for name, task in tasks.TASKS.items())
    names = one_of(constructors())
    add("names", nargs="+", type=names, metavar="NAME", help="as shown by `list`")
    add("--task", choices=tasks.TASKS, default="digits", help=known)
    add("--steps", type=COUNT, metavar="N", help="steps per run; None: the task's default")
    add("--learning-rates", type=POSITIVE, nargs="+", metavar="X", help="None: the task's default")
    add("--seeds", type=COUNT, metavar="N", help="the number of seeds; None: task default")
    add("--plot", type=picture, default="adam_jax_compare.png", metavar="PATH", help="the picture")


def run_compare(args: argparse.Namespace) -> None:
    """Train with several optimizers on a small task.

    It tries several learning rates and seeds, prints a table, and draws the losses. The learning
    rate rises for a tenth of the steps and falls to 0. For your own problem: adam_jax.compare(…).
    """
    importlib.import_module("matplotlib")  # if it is missing, say so before training

    task = tasks.TASKS[args.task]
    steps = args.steps or task.steps
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


def train_options(add: AddArgument) -> None:
    """Declare the options of `train`, which needs a constructor with a decay mask."""
    names = [
        name
        for name, make in constructors().items()
        if "weight_decay_mask" in inspect.signature(make).parameters
    ]
    one = f"one of {', '.join(names)}"
    add("--optimizer", type=one_of(names), default="adamw", metavar="NAME", help=one)
    add("--storage", metavar="FORMAT", help="the format of the moments, such as bfloat16")
    add("--steps", type=COUNT, default=1000, metavar="N", help="steps per run")
    add("--learning-rate", type=POSITIVE, default=2e-3, metavar="X", help="peak value")
    add("--weight-decay", type=number(float, 0), default=1.0, metavar="X", help="on the kernels")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="for parameters and batches")
    add("--plot", type=picture, default="adam_jax_train.png", metavar="PATH", help="the picture")


def train(args: argparse.Namespace) -> None:
    """Train a small Flax NNX classifier on scikit-learn's digits.

    It trains first with optax.adamw and then with an adam_jax optimizer, and draws both in one
    picture.
    """
    importlib.import_module("matplotlib")  # if it is missing, say so before training

    from adam_jax.cli import demo

    parser: argparse.ArgumentParser = args.parser
    recipe = demo.Recipe(args.steps, args.learning_rate, args.weight_decay, args.seed)
    try:
        tx = recipe.ours(constructors()[args.optimizer], args.storage)
    except ValueError as error:  # the message names the storage formats
        parser.error(str(error))
    demo.run(recipe, f"adam_jax.{args.optimizer}", tx, args.plot)


def memory_options(add: AddArgument) -> None:
    """Declare the options of `memory`."""
    add("--params", type=number(float, 1), required=True, metavar="N", help="parameters, e.g. 7e9")
    add("--devices", type=COUNT, default=1, metavar="N", help="devices to shard the state over")
    add("--layers", type=COUNT, default=32, metavar="N", help="equal layers, for gradient release")


FLOAT32, BFLOAT16, INT8, COMPACT = (
    adamw(1e-3, storage=s) for s in ("float32", "bfloat16", "int8", "compact")
)
RELEASED = ", gradient release"
LARGEST_TRACED = 10**12
"""The largest number of parameters for which a step is traced; shapes must be below 2³¹."""

MODES = {
    "float32 AdamW": ("float32", FLOAT32),
    f"float32 AdamW{RELEASED}": ("float32", FLOAT32),
    "bfloat16 state": ("float32", BFLOAT16),
    "int8 state": ("float32", INT8),
    "compact state": ("float32", COMPACT),
    "bfloat16 parameters, master_weights(bits=32)": ("bfloat16", master_weights(FLOAT32)),
    "bfloat16 parameters, master_weights(bits=24), int8": (
        "bfloat16",
        master_weights(INT8, bits=24),
    ),
    "bfloat16 parameters, master_weights(bits=24), compact": (
        "bfloat16",
        master_weights(COMPACT, bits=24),
    ),
    f"bfloat16 parameters, master_weights(bits=24), compact{RELEASED}": (
        "bfloat16",
        master_weights(COMPACT, bits=24),
    ),
}
"""The parameters' dtype and the optimizer of each row of `memory`."""


def show_memory(args: argparse.Namespace) -> None:
    """Show the memory of parameters, gradients, and AdamW's state in each format.

    Activations and temporary buffers are extra. For your own model:
    adam_jax.memory_report(tx, params).
    """
    count, width = int(args.params), 4096
    columns = 4 if args.devices > 1 else 3
    rows = [("", "bytes/parameter", "total, GB", "GB per device")[:columns]]
    for name, (dtype, tx) in MODES.items():
        # only matrices: the leaves too small to quantize are negligible
        if name.endswith(RELEASED):
            rows_per_layer = -(-min(count, LARGEST_TRACED) // (width * args.layers))
            layers = jax.ShapeDtypeStruct((args.layers, rows_per_layer, width), dtype)
            params = {"outer": jax.ShapeDtypeStruct((1,), dtype), "layers": layers}
            report = memory_report(tx, params, gradient_release=True)
        else:
            params = jax.ShapeDtypeStruct((-(-count // width), width), dtype)
            report = memory_report(tx, params)
        total = report.total_bytes / report.parameters
        state = report.state_bytes / report.parameters
        local = total - state + state / args.devices
        sizes = f"{total:.2f}", f"{count * total / 1e9:,.1f}", f"{count * local / 1e9:,.1f}"
        rows.append((name, *sizes)[:columns])
    spread = f", state spread over {args.devices} devices (ZeRO-1)" if args.devices > 1 else ""
    print(f"{count:,} parameters, their gradients, and AdamW{spread}\n")
    print(text_table(rows, "<0" + " >15" * (columns - 1), "  "))


COMMANDS = {
    "list": (show_list, list_options),
    "compare": (run_compare, compare_options),
    "train": (train, train_options),
    "memory": (show_memory, memory_options),
}
"""The function that runs each command (its docstring is the help), and its options."""
