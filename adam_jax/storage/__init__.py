"""How a moment lies in memory.

A format is chosen per leaf when the state is made; afterwards the state describes itself: what is
stored determines how it is read and written, so update never sees the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from adam_jax import checks
from adam_jax.arithmetic import arithmetic_dtype
from adam_jax.declare import Moment
from adam_jax.layouts import fitting
from adam_jax.paths import path_string
from adam_jax.storage import blocks, dense, int8
from adam_jax.storage.blocks import Blocks, Code
from adam_jax.storage.noise import vary

__all__ = ["Blocks", "Code", "Format", "register"]


class Format(NamedTuple):
    """A coded format: the code of signed moments, and that of non-negative ones."""

    signed: Code
    positive: Code


FORMATS = {"int8": Format(int8.SIGNED, int8.POSITIVE)}
"""The coded formats by name. Beside them every floating-point dtype is a format."""

CODES: dict[Any, Code] = {jnp.dtype(code.dtype): code for f in FORMATS.values() for code in f}
"""The code that a dtype of codes stands for."""

MIN_SIZE = 4096
"""Leaves with fewer elements stay uncoded, unless a function of the leaf asks for a code."""

Storage: TypeAlias = Any
"""A format's name, a dtype, {moment: either}, a function (path, leaf) of these; None: default."""


def register(name: str, signed: Code, positive: Code) -> None:
    """Makes a format of one's own a name that `storage=` takes, with everything that int8 has.

    Args:
      name: what `storage=` will be given.
      signed: the code of signed moments.
      positive: the code of moments that are never negative; it may be the same. It should give
        nothing above zero the code of zero: where nu is 0 and mu is not, a step is mu/ε.

    Raises:
      ValueError: the name or a dtype is taken, a block is no power of two, or a code does not give
        back -1, 0 and 1.

    >>> import jax.numpy as jnp, adam_jax
    >>> from adam_jax.storage import Code, register
    >>> code = Code(
    ...     jnp.float8_e4m3fn,
    ...     lambda y, draw: (y * 448).astype(jnp.float8_e4m3fn),  # to the nearest
    ...     lambda codes: codes.astype(jnp.float32) / 448,
    ... )
    >>> register("float8 in blocks", code, code)
    >>> tx = adam_jax.adamw(1e-3, storage="float8 in blocks")
    """
    for code, ends in ((signed, (-1, 0, 1)), (positive, (0, 1))):
        wrong = _unfit(name, code, ends)
        if wrong:
            raise ValueError(f"register: {name!r} {wrong}")
    FORMATS[name] = Format(signed, positive)
    CODES.update({jnp.dtype(code.dtype): code for code in (signed, positive)})


def _unfit(name: str, code: Code, ends: tuple[int, ...]) -> str:
    """What keeps a code from being registered."""
    dtype = jnp.dtype(code.dtype)
    if name in FORMATS or _floating(name) is not None:
        return f"is taken; choose a name beside {', '.join(map(repr, names()))}"
    if dtype in CODES or dtype.itemsize > 2 or dtype == jnp.bfloat16:
        return (
            f"has codes of {dtype}, which a state could not be told apart by; take another small "
            f"dtype than {', '.join(map(str, CODES))}"
        )
    if code.block < 1 or code.block & (code.block - 1):
        return f"has blocks of {code.block}; take a power of two"
    y = jnp.array(ends, jnp.float32)
    codes = code.encode(y, jnp.full_like(y, 0.5))
    back = code.decode(codes)
    if codes.dtype != dtype or not np.array_equal(back, y):
        return f"gives back {np.asarray(back)} in {codes.dtype} for {ends} in {dtype}"
    return ""


def names() -> list[str]:
    """The formats that an error or a docstring lists."""
    return ["float32", "bfloat16", *FORMATS]


def decode(stored: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A moment of one leaf in the dtype of the arithmetic."""
    if not isinstance(stored, Blocks):
        return dense.decode(stored, dtype)
    return blocks.decode(CODES[stored.codes.dtype], stored).astype(dtype)


def encode(
    name: str,
    x: jax.Array,
    stored: Any,
    bits: jax.Array | None,
    share: Callable[..., jax.Array] | None = None,
) -> Any:
    """x as `stored` is stored; rounded to the nearest where there are no random bits.

    `share` is for a part of a leaf: (largest of its blocks, block) → that of whole blocks.
    """
    bits = None if bits is None else vary(bits, name)
    if not isinstance(stored, Blocks):
        return dense.encode(x, stored, bits)
    draw = jnp.float32(0.5) if bits is None else _uniform(bits)
    # one x for scales and codes: compiled into both, it could round in two ways
    x = jax.lax.optimization_barrier(x.astype(jnp.float32))
    code = CODES[stored.codes.dtype]
    share = None if share is None else functools.partial(share, block=code.block)
    return _without_derivative(code, blocks.size(stored), share, x, draw)


def _uniform(bits: jax.Array) -> jax.Array:
    """24 bits as a number in [0, 1)."""
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _without_derivative(
    code: Code, block: int, share: Any, x: jax.Array, draw: jax.Array
) -> Blocks:
    return blocks.encode(code, x, draw, block, share)


@_without_derivative.defjvp
def _no_derivative(code: Code, block: int, share: Any, primals: Any, tangents: Any) -> Any:
    del block, share, primals, tangents
    raise checks.no_derivative(f"is coded in {jnp.dtype(code.dtype)}")


def one_leaf(codes: Any, scales: Any) -> Any:
    """One leaf of a moment in `Blocks`: codes with their scales, or its values if it is uncoded."""
    return Blocks(codes, scales) if getattr(codes, "dtype", None) in CODES else codes


def leaves(moment: Any) -> dict[str, Any]:
    """A moment's leaves by their paths, each as it is stored; also of NNX Variables."""
    coded = isinstance(moment, Blocks)
    codes = jax.tree_util.tree_leaves_with_path(moment.codes if coded else moment)
    scales = jax.tree.leaves(moment.scales) if coded else [None] * len(codes)
    return {path_string(p): one_leaf(x, s) for (p, x), s in zip(codes, scales, strict=True)}


def with_leaves(moment: Any, new: Sequence[Any]) -> Any:
    """The moment with new leaves, stored as its own are."""
    if not isinstance(moment, Blocks):
        return jax.tree.unflatten(jax.tree.structure(moment), new)
    codes = jax.tree.unflatten(jax.tree.structure(moment.codes), [codes_of(x) for x in new])
    kept = jax.tree.leaves(moment.scales)
    scales = [x.scales if isinstance(x, Blocks) else s for x, s in zip(new, kept, strict=True)]
    return Blocks(codes, jax.tree.unflatten(jax.tree.structure(moment.scales), scales))


def codes_of(stored: Any) -> Any:
    """What has the leaf's shape: its codes, or its values."""
    return stored.codes if isinstance(stored, Blocks) else stored


def block_of(stored: Any) -> int:
    """How many elements share a scale in this format; 1 where nothing is coded."""
    return CODES[stored.codes.dtype].block if isinstance(stored, Blocks) else 1


def is_coded(stored: Any) -> bool:
    """Whether what is stored for one leaf is in codes."""
    return isinstance(stored, Blocks) and stored.codes.dtype in CODES


def draws(stored: Any) -> bool:
    """Whether writing any of these moments takes random bits."""
    return any(x.dtype in (jnp.bfloat16, *CODES) for x in jax.tree.leaves(stored))


def dtypes(operands: Any) -> list[Any]:
    """The dtypes of a leaf's operands, in which a coded moment counts as float32."""
    kept = jax.tree.leaves(operands, is_leaf=lambda x: isinstance(x, Blocks))
    return [x.scales.dtype if isinstance(x, Blocks) else x.dtype for x in kept]


def start(
    storage: Storage, name: str, declared: Moment, params: Any, value: chex.Numeric
) -> chex.ArrayTree:
    """A moment of all leaves before the first step; `Blocks` where any of them may be coded."""

    def format(path: tuple[Any, ...], leaf: Any) -> Any:
        found = format_of(storage, name, path, leaf)
        return (found.signed if declared.signed else found.positive) if _is_format(found) else found

    def codes(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        kept = format(path, leaf)
        if isinstance(kept, Code):
            code = kept.encode(jnp.sign(jnp.asarray(value, jnp.float32)), jnp.float32(0))
            return jnp.full_like(leaf, code, dtype=kept.dtype)
        return jnp.full_like(leaf, jnp.asarray(value).astype(kept), dtype=kept)

    def scales(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        leaf = _plain(leaf)
        kept = format(path, leaf)
        if isinstance(kept, Code):
            size = jnp.abs(jnp.asarray(value, jnp.float32))
            return _laid_out(jnp.full(blocks.scales_shape(leaf.shape, kept.block), size), leaf)
        return jnp.ones((*np.shape(leaf)[:-1], 1), jnp.float32)

    tree = jax.tree_util.tree_map_with_path(codes, params)
    if not _in_blocks(storage, name, tree):
        return tree
    # a scales leaf must not inherit the metadata of an NNX Variable: its sharding may not fit
    return Blocks(tree, jax.tree_util.tree_map_with_path(scales, params, is_leaf=_is_variable))


def _laid_out(scales: jax.Array, leaf: Any) -> jax.Array:
    """Scales spread over explicit mesh axes as their leaf is, where the devices divide them."""
    sharding = jax.typeof(leaf).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return scales
    return jax.reshard(scales, fitting(sharding.mesh, sharding.spec, scales.shape))


def _in_blocks(storage: Storage, name: str, codes: Any) -> bool:
    """Whether a moment lies in `Blocks`: known without leaves, but for a function of them."""
    if _is_function(storage):
        leaves = jax.tree.leaves(codes)
        return not leaves or any(leaf.dtype in CODES for leaf in leaves)
    return is_format(storage.get(name) if isinstance(storage, Mapping) else storage)


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata")


def _plain(leaf: Any) -> Any:
    return jax.tree.leaves(leaf)[0] if _is_variable(leaf) else leaf


def _is_format(x: Any) -> bool:
    return isinstance(x, Format)


def is_format(storage: Any) -> bool:
    """Whether this is the name of a coded format."""
    return isinstance(storage, str) and storage in FORMATS


def described(storage: Storage) -> str:
    """`storage` as a repr shows it: int8[128] for codes in blocks of 128."""
    if is_format(storage):
        return f"{storage}[{FORMATS[storage].signed.block}]"
    if isinstance(storage, Mapping):
        return f"{{{', '.join(f'{k}: {described(v)}' for k, v in storage.items())}}}"
    if _is_function(storage):
        return storage.__name__
    dtype = None if storage is None else _floating(storage)
    return str(storage if dtype is None else dtype)


def may_code(storage: Storage, moments: Collection[str]) -> bool:
    """Whether any of these moments may come to be coded."""
    if isinstance(storage, Mapping):
        return any(is_format(storage.get(name)) for name in moments)
    return bool(moments) and (is_format(storage) or _is_function(storage))


def uncoded(storage: Storage, name: str, because: str) -> Storage:
    """`storage` with the default in the place of codes, for what cannot be coded."""
    if isinstance(storage, Mapping) and is_format(storage.get(name)):
        raise ValueError(
            f"{checks.who()}: storage={storage!r} codes {name}, {because}; give it a dtype"
        )
    if _is_function(storage):
        function: Any = storage
        return lambda path, leaf: uncoded(function(path, leaf), name, because)
    return None if is_format(storage) else storage


def format_of(storage: Storage, name: str, path: tuple[Any, ...], leaf: Any) -> Any:
    """What the moment `name` of one leaf is kept in: a dtype, or a `Format`."""
    by_leaf = _is_function(storage)
    if by_leaf:
        storage = storage(path_string(path), leaf)
    if isinstance(storage, Mapping):
        storage = storage.get(name)
    default = dense.default(jnp.result_type(float if isinstance(leaf, int) else leaf))
    if storage is None:
        return default
    kept = check_format(storage)
    if not isinstance(kept, Format) or (_codable(leaf) and (by_leaf or np.size(leaf) >= MIN_SIZE)):
        return kept
    return arithmetic_dtype(default)


def _codable(leaf: Any) -> bool:
    """Codes are of real numbers, and a scale beside each element would save nothing."""
    return np.ndim(leaf) > 0 and leaf.shape[-1] > 1 and not jnp.iscomplexobj(leaf)


def check(storage: Storage, moments: Collection[str]) -> None:
    """Raises where `storage` names a format or a moment that there is not."""
    if _is_function(storage):
        return
    if isinstance(storage, Mapping):
        for name, format in storage.items():
            if name not in moments:
                raise ValueError(
                    f"{checks.who()}: storage names the moment {name!r}; "
                    f"it has {', '.join(moments) or 'none'}"
                )
            if format is not None:
                check_format(format)
    elif storage is not None:
        check_format(storage)


def check_format(storage: Any) -> Any:
    """A format given by name or dtype: a dtype, or a `Format`."""
    if is_format(storage):
        return FORMATS[storage]
    dtype = _floating(storage)
    if dtype is None:
        listed = ", ".join(map(repr, names()))
        raise ValueError(
            f"{checks.who()}: storage must be one of {listed}, a floating-point dtype, a mapping "
            f"from moments to these or a function (path, leaf) of these, got {storage!r}"
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def _floating(x: Any) -> Any:
    """x as a floating-point or complex dtype; None where it is none."""
    try:
        dtype = jnp.dtype(x)
    except (TypeError, ValueError):
        return None
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else None


def with_dtype(storage: Storage, moment: str, argument: str, dtype: Any) -> Storage:
    """`storage` with Optax's mu_dtype (or accumulator_dtype) merged in."""
    if dtype is None:
        return storage
    asked, dtype = dtype, _floating(dtype)
    if dtype is None:
        raise ValueError(
            f"{checks.who()}: {argument} must be a floating-point dtype, got {asked!r}; "
            f"for other formats use storage= ({', '.join(names())})"
        )
    given = storage.get(moment) if isinstance(storage, Mapping) else storage
    if given is not None and (_is_function(given) or check_format(given) != dtype):
        raise ValueError(
            f"{checks.who()}: {argument}={dtype} conflicts with storage={storage!r}; "
            f"drop {argument} and write storage={{{moment!r}: {dtype.name!r}, ...}}"
        )
    rest = storage if isinstance(storage, Mapping) else {}
    return storage if given is not None else {**rest, moment: dtype}


def split(storage: Storage, *groups: Collection[str]) -> list[Storage]:
    """`storage` for each group of moments, where an optimizer has several rules with moments."""
    if not isinstance(storage, Mapping):
        return [storage] * len(groups)
    check(storage, [name for group in groups for name in group])
    return [{name: f for name, f in storage.items() if name in group} for group in groups]


def _is_dtype(x: Any) -> bool:
    return isinstance(x, type) or hasattr(x, "dtype")


def _is_function(x: Any) -> bool:
    return callable(x) and not _is_dtype(x)
