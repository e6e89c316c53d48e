"""The programs that a TPU v5e and an H100 would run for a step, compiled without either.

python -m benchmarks.aot            # every row
python -m benchmarks.aot tpu int8   # the rows whose names contain every word

Needs pip install -e ".[aot]". Nothing runs: the figures are bytes, instructions, and launches of
the compiled programs. Clock rates and bandwidths are nominal.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import math
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the plugin compiles without the libraries it runs on
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes load it, too
}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
    SingleDeviceSharding,
)
from tqdm import tqdm

import adam_jax
from benchmarks import report, trees

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
} platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3" """


class Chip(NamedTuple):
    """An accelerator that programs are compiled for."""

    lowering: str
    """The platform's name for lowering."""
    kind: str
    clock: float
    """Cycles per second."""
    bandwidth: float
    """Bytes of memory per second."""
    lanes: int
    """Elements for which the chip issues one instruction per cycle."""
    call: str
    """The custom call of a Pallas kernel."""

    def memory_cycles(self, bytes_per_element: float) -> float:
        """Return the instructions per element that take as long as the memory traffic."""
        return bytes_per_element / self.bandwidth * self.clock * self.lanes


TPU = Chip("tpu", "TPU v5 lite", 1.5e9, 819e9, 1024, "tpu_custom_call")
GPU = Chip("cuda", "NVIDIA H100 80GB HBM3", 1.755e9, 3.35e12, 132 * 4 * 32, "__gpu$xla.gpu.triton")
CHIPS = {"tpu": TPU, "gpu": GPU}
ELEMENTS_PER_THREAD = 16  # see adam_jax/_backends/triton.py


@functools.cache
def tpu_dump() -> str:
    """Set the flags that make libtpu write its bundles, and return their folder.

    Call it before libtpu is loaded.
    """
    folder = tempfile.mkdtemp(prefix="adam_jax_llo")
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    return folder


@functools.cache
def devices(chip: Chip) -> Sequence[Any]:
    """Return the devices of a described topology: 2×2 TPUs, or one GPU."""
    if chip is TPU:
        tpu_dump()
        return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    given = {"target_config": H100, "topology": "1x1x1"}
    return topologies.get_topology_desc("", platform="cuda", **given).devices


@contextlib.contextmanager
def there(chip: Chip) -> Iterator[None]:
    """Trace for a chip that this machine doesn't have."""
    device = AbstractDevice(chip.kind, num_cores=1, platform=chip.lowering)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


class Program(NamedTuple):
    """A compiled step of a leaf or a tree."""

    chip: Chip
    text: str
    temporaries: int
    """Bytes."""
    least: int
    """The bytes that the step has to read and write."""
    elements: int
    dump: str
    """The folder with the compiler's output."""


def compiled(chip: Chip, tx: Any, params: Any, way: str = "apply") -> Program:
    """Compile `apply`, donating parameters and state, or `update`, donating gradients and state."""
    place = functools.partial(
        jax.tree.map,
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=SingleDeviceSharding(devices(chip)[0])
        ),
    )
    with there(chip):
        given = place(params)
        state = place(jax.eval_shape(tx.init, given))
        step = _step(tx, way, donated=(0, 1))  # an update overwrites its gradient
        lowered = step.trace(given, state, given).lower(lowering_platforms=(chip.lowering,))
        return _program(chip, lowered, given, state)


def _step(tx: Any, way: str, donated: tuple[int, ...]) -> Any:
    def apply(params: Any, state: Any, grads: Any) -> Any:
        return adam_jax.apply(tx, grads, state, params)  # results in the order of donated operands

    return jax.jit(apply if way == "apply" else tx.update, donate_argnums=donated)


def _program(chip: Chip, lowered: Any, params: Any, state: Any) -> Program:
    options: dict[str, str] = {}
    if chip is TPU:
        dump = tpu_dump()
        for file in glob.glob(f"{dump}/*"):
            os.remove(file)
    else:
        dump = tempfile.mkdtemp()
        if len(jax.tree.leaves(params)) == 1:  # for many kernels, this takes most of the time
            options = {"xla_dump_to": dump, "xla_dump_emitter_re": ".*"}
    program = lowered.compile(options)
    size = functools.partial(sum_of, lambda x: math.prod(x.shape) * x.dtype.itemsize)
    read = size(params) + size(state) + size(params)
    written = size(state) + size(params)
    temporaries = program.memory_analysis().temp_size_in_bytes
    elements = int(sum_of(lambda x: math.prod(x.shape), params))
    return Program(chip, program.as_text(), temporaries, int(read + written), elements, dump)


def mesh(kind: AxisType) -> Mesh:
    """Return a mesh of four described TPUs."""
    return Mesh(np.array(devices(TPU)), ("data",), axis_types=(kind,))


def sharded(
    tx: Any,
    on: Mesh,
    spec: P,
    dtype: Any = jnp.bfloat16,
    way: str = "apply",
    shape: tuple[int, int] = (2048, 4096),
) -> Program:
    """Compile the step of a kernel with this spec, and of a bias, for a mesh of TPUs."""
    place = functools.partial(NamedSharding, on)
    params = {
        "kernel": jax.ShapeDtypeStruct(shape, dtype, sharding=place(spec)),
        "bias": jax.ShapeDtypeStruct((16,), dtype, sharding=place(P())),
    }
    with jax.sharding.use_abstract_mesh(on.abstract_mesh):
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            adam_jax.state_sharding(tx, params),
        )
        step = _step(tx, way, donated=(0, 1) if way == "apply" else (1,))
        lowered = step.trace(params, state, params).lower(lowering_platforms=(TPU.lowering,))
        return _program(TPU, lowered, params, state)


def stack(storage: str, kind: AxisType, way: str) -> Program:
    """Compile a full stack on a mesh: clipping, AdamW, a schedule, master weights, ZeRO-1."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 10_000)
    mask = adam_jax.not_matching("bias", "norm")
    tx = adam_jax.chain(
        adam_jax.clip_by_global_norm(1.0),
        adam_jax.adamw(schedule, weight_decay=0.1, weight_decay_mask=mask, storage=storage),
    )
    on = mesh(kind)
    return sharded(adam_jax.zero1(adam_jax.master_weights(tx, bits=24), on), on, P(), way=way)


def sum_of(f: Callable[[Any], float], tree: Any) -> float:
    return sum(map(f, jax.tree.leaves(tree)))


# Figures from a program's text

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_VMEM = "S(1)"
"""The memory space of arrays in a TPU's vector memory, which XLA prefetches."""
_FREE |= {"copy-done", "slice-done", "all-gather-done", "async-done"}


class Instruction(NamedTuple):
    """An instruction of a program's entry computation."""

    operation: str
    moved: int
    """The bytes of its operands and results."""


def instructions(program: Program) -> list[Instruction]:
    """Return the instructions that move memory or launch something."""
    entry = program.text[program.text.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    found = []
    for line in entry.splitlines():
        match = re.match(r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if not match:
            continue
        name, shape, operation, rest = match.groups()
        sizes[name] = _bytes(shape)
        if operation in _FREE or "ConcatBitcast" in rest:
            continue
        operands = re.findall(r"%[\w.\-]+", rest.partition(")")[0])
        moved = sizes[name] + sum(sizes.get(x, 0) for x in operands)
        if operation in ("slice-start", "copy-start") and _VMEM in shape:
            # a copy into vector memory or out of it moves its bytes once
            moved = _bytes(re.findall(rf"\w+\[[\d,]*\]\S*{re.escape(_VMEM)}", shape)[0], vmem=True)
        found.append(Instruction(operation, moved))
    return found


def _bytes(shape: str, *, vmem: bool = False) -> int:
    """Return the size of a shape's arrays, without those in a TPU's vector memory."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    return sum(
        _SIZES.get(dtype, 4) * _elements([int(n) for n in sizes.split(",") if n], layout)
        for dtype, sizes, layout in arrays
        if vmem or _VMEM not in layout
    )


def _elements(sizes: list[int], layout: str) -> int:
    """Return the number of elements, with those that fill up a TPU's tiles."""
    tile = re.match(r"([\d,]+):T\((\d+),(\d+)\)", layout)
    if tile:
        minor = [int(axis) for axis in tile[1].split(",")]  # axes, the fastest first
        for axis, n in zip(minor, (int(tile[3]), int(tile[2])), strict=False):
            sizes[axis] += -sizes[axis] % n
    return math.prod(sizes)


def moved(program: Program) -> float:
    """Return the bytes that a program moves, over the least."""
    return sum(x.moved for x in instructions(program)) / program.least


def kernels(program: Program) -> int:
    """Return the number of Pallas kernels."""
    return program.text.count(f'custom_call_target="{program.chip.call}"')


def launches(program: Program) -> int:
    """Return the number of launches of a GPU program, or of operations of a TPU program."""
    return len(instructions(program))


def all_gathers(program: Program) -> int:
    return len(re.findall(r"\ball-gather(?:-start)?\(", program.text))


# Figures from a kernel's instructions


class Sass(NamedTuple):
    """A GPU kernel's machine code."""

    per_element: float
    registers: int
    spilled: int
    """Bytes."""
    narrow: int
    """The accesses to global memory of less than 32 bits."""


def sass(program: Program) -> Sass:
    """Return the code of a GPU program's only kernel."""
    (ptx,) = [f for f in glob.glob(f"{program.dump}/*.ptx") if "adam_jax_step" in _read(f)]
    binary = f"{ptx}.cubin"
    log = _output("ptxas", "-v", "-arch=sm_90a", ptx, "-o", binary)
    code = _output("nvdisasm", "-c", binary)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", code)
    for label in re.findall(r"BRA `\((\.L_x_\d+)\)", code):
        start, end = code.index(f"{label}:"), code.rindex(f"BRA `({label})")
        if start < end and code.count("\n", start, end) > 2:  # a kernel ends with an empty loop
            raise ValueError("sass: the kernel must have no loop, whose iterations aren't counted")
    return Sass(
        sum(x != "NOP" for x in operations) / ELEMENTS_PER_THREAD,
        int(re.findall(r"Used (\d+) registers", log)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        sum(bool(re.match(r"(LDG|STG)\.E\.[US](8|16)", x)) for x in operations),
    )


def bundles(program: Program) -> float:
    """Return the bundles (one cycle each) per 1024 elements of a TPU program's only kernel."""
    (file,) = [
        f
        for f in glob.glob(f"{program.dump}/*adam_jax_step*final_bundles.txt")
        if "analysis" not in f
    ]
    text = _read(file)
    if re.search(r"LB: >>", text):
        raise ValueError("bundles: the kernel must have no loop, whose iterations aren't counted")
    windows = re.findall(r"window shape is \w+\[([\d,]+)\]", text)
    tile = max(math.prod(map(int, window.split(","))) for window in windows)
    return len(re.findall(r"^ *(?:0x[0-9a-f]+|0) ", text, re.MULTILINE)) / (tile / 1024)


def compute_over_memory(program: Program) -> float:
    """Return the time that the kernel's instructions take, over its memory traffic's time."""
    per_element = bundles(program) if program.chip is TPU else sass(program).per_element
    return per_element / program.chip.memory_cycles(program.least / program.elements)


def _read(file: str) -> str:
    return Path(file).read_text(errors="replace")


def _output(tool: str, *arguments: str) -> str:
    """Run one of CUDA's tools; the wheels have them in site-packages."""
    folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    command = shutil.which(tool, path=folder) or tool
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# The rows


def optimizer(storage: str) -> tuple[Any, Any]:
    """Return AdamW with this storage, and its parameters' dtype."""
    if storage != "int8, master weights":
        return adam_jax.adamw(1e-3, storage=storage), jnp.float32
    tx = adam_jax.adamw(1e-3, storage="int8")
    return adam_jax.master_weights(tx, bits=24), jnp.bfloat16


STORAGES = ("float32", "bfloat16", "int8", "compact", "int8, master weights")
LEAF = {"tpu": (32768, 8192), "gpu": (8192, 4096)}


def leaf(name: str, storage: str, way: str) -> Program:
    """Compile the step of one leaf for the chip of this name."""
    tx, dtype = optimizer(storage)
    return leaf_of(name, tx, dtype, way)


def leaf_of(name: str, tx: Any, dtype: Any = jnp.float32, way: str = "apply") -> Program:
    """Compile a transformation's step of one leaf for the chip of this name."""
    return compiled(CHIPS[name], tx, jax.ShapeDtypeStruct(LEAF[name], dtype), way)


def gpt2(name: str, storage: str, way: str) -> Program:
    """Compile the step of GPT-2 small for the chip of this name."""
    tx, dtype = optimizer(storage)
    return compiled(CHIPS[name], tx, trees.structs(trees.gpt2(), dtype), way)


def fallback(name: str, storage: str, way: str) -> Program:
    """Compile the step of one leaf in XLA, without a kernel."""
    tx = adam_jax.adamw(1e-3, storage=storage, implementation="xla")
    return compiled(CHIPS[name], tx, jax.ShapeDtypeStruct(LEAF["gpu"], jnp.float32), way)


def row(title: str, program: Program) -> dict[str, Any]:
    """Return the figures of a program with at most one kernel, or of a tree's step."""
    count = kernels(program)
    is_alone = count == 1 and launches(program) < 50
    code = sass(program) if is_alone and program.chip is GPU else None
    per_element = None
    if is_alone:
        per_element = bundles(program) if code is None else code.per_element
    on_mesh = "stack" in title
    return {
        "program": title,
        "bytes / least": "-" if on_mesh else f"{moved(program):.2f}",
        "temporaries, MB": f"{program.temporaries / 1e6:.1f}",
        "kernels": count,
        "launches": launches(program) if program.chip is GPU else "-",
        "all-gathers": all_gathers(program) if on_mesh else "-",
        "instructions": "-" if per_element is None else f"{per_element:.1f}",
        "registers": "-" if code is None else f"{code.registers}, {code.spilled} B spilled",
        "of memory time": "-" if not is_alone or on_mesh else f"{compute_over_memory(program):.2f}",
    }


def cases() -> dict[str, Callable[[], Program]]:
    """Return functions that compile the programs, by their titles."""
    found: dict[str, Callable[[], Program]] = {}
    for name in CHIPS:
        for storage in STORAGES:
            for way in ("update", "apply"):
                title = f"{name}, leaf, {storage}, {way}"
                found[title] = functools.partial(leaf, name, storage, way)
            if name == "gpu":
                title = f"{name}, GPT-2 small, {storage}, update"
                found[title] = functools.partial(gpt2, name, storage, "update")
        way = "apply" if name == "tpu" else "update"
        found[f"{name}, leaf, int8, {way}, in XLA"] = functools.partial(fallback, name, "int8", way)
    for kind in (AxisType.Auto, AxisType.Explicit):
        for storage in ("int8", "compact"):
            title = f"tpu, stack on 2×2, {storage}, apply, {kind.name.lower()} axes"
            found[title] = functools.partial(stack, storage, kind, "apply")
    return found


SUMMARY = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "compact": "compact",
    "int8, master weights": "int8, bfloat16 parameters and masters of 24 bits",
}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each storage."""
    by_title = {row["program"]: row for row in rows}
    return [
        {
            "AdamW": text,
            "v5e: bytes / least": by_title[f"tpu, leaf, {storage}, apply"]["bytes / least"],
            "v5e: compute / memory time": by_title[f"tpu, leaf, {storage}, apply"][
                "of memory time"
            ],
            "H100: compute / memory time": by_title[f"gpu, leaf, {storage}, apply"][
                "of memory time"
            ],
            "H100: launches for GPT-2's 148 leaves": by_title[
                f"gpu, GPT-2 small, {storage}, update"
            ]["launches"],
        }
        for storage, text in SUMMARY.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="compile only rows that contain these words")
    words = parser.parse_args().words
    chosen = {t: make for t, make in cases().items() if all(word in t for word in words)}
    rows = [row(title, make()) for title, make in tqdm(chosen.items(), leave=False)]
    if words:
        print(report.table(rows))
        return
    report.write("aot", rows)
    report.write("aot_summary", summary(rows))


if __name__ == "__main__":
    main()
