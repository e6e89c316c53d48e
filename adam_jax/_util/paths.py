"""Leaf paths that are equal at init and update, and masks by path.

Flax puts a parameter in a box with metadata, such as axis names: `Partitioned` in Linen, `Variable`
in NNX. Here a box is one leaf, and its path is the leaf's path. So the path doesn't depend on the
box, which NNX leaves have at init but not at update.
"""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from adam_jax._util.typing import KeyPath, PyTree


def path_string(path: KeyPath) -> str:
    """Format a key path, e.g. "layers/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_box(x: PyTree) -> bool:
    """Whether x is a Flax box (NNX's Variable, or a class like Linen's Partitioned).

    An empty box, such as `optax.masked` makes, doesn't count: it has no leaf.
    """
    boxed = hasattr(x, "get_metadata") or (hasattr(x, "unbox") and hasattr(x, "replace_boxed"))
    return boxed and bool(jax.tree.leaves(x))


def unbox(x: PyTree) -> PyTree:
    """Return the content of a box, or x unchanged.

    Linen's own `unbox` would constrain the content to the sharding in the box.
    """
    if not is_box(x):
        return x
    return next(iter(jax.tree.leaves(x, is_leaf=lambda y: y is not x)), None)


def rebox(box: PyTree, content: PyTree) -> PyTree:
    """Return `content` in a box like `box`, or unchanged if `box` isn't a box."""
    if not is_box(box):
        return content
    structure = jax.tree.structure(box, is_leaf=lambda y: y is not box)
    return structure.unflatten([content] * structure.num_leaves)


def rebox_reduced(box: PyTree, content: PyTree) -> PyTree:
    """Return `content` in a box like `box`, without the names of axes whose size differs.

    Return `content` unboxed if `box` isn't Linen's, or doesn't have one name per axis.
    """
    names, shape = getattr(box, "names", ()) or (), getattr(unbox(box), "shape", ())
    if not is_box(box) or not hasattr(box, "replace_boxed") or len(names) != len(shape):
        return content
    kept = [n if a == b else None for n, a, b in zip(names, content.shape, shape, strict=True)]
    return box.replace(names=tuple(kept)).replace_boxed(content)


def leaves_with_path(tree: PyTree) -> list[tuple[KeyPath, PyTree]]:
    """Return the unboxed leaves with their key paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [(path, unbox(x)) for path, x in leaves if unbox(x) is not None]


def map_with_path(f: Callable[[KeyPath, PyTree], PyTree], tree: PyTree) -> PyTree:
    """Map f(key path, leaf) over a tree, and keep its boxes."""

    def in_box(path: KeyPath, x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f(path, leaf), x)

    return jax.tree_util.tree_map_with_path(in_box, tree, is_leaf=is_box)


Key: TypeAlias = tuple[str, int]
"""The path of a leaf, and how many leaves before it have the same path."""


def keys(paths: Iterable[KeyPath]) -> list[Key]:
    """Return a unique key for each leaf: {"a/b": x, "a": {"b": y}} has two leaves at "a/b"."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for path in map(path_string, paths):
        found.append((path, seen[path]))
        seen[path] += 1
    return found


def by_key(tree: PyTree) -> dict[Key, PyTree]:
    """Return the unboxed leaves of a tree by their keys."""
    leaves = leaves_with_path(tree)
    return dict(zip(keys(path for path, _ in leaves), (x for _, x in leaves), strict=True))


def matching(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Return a mask that is True for leaves whose path contains a match of any pattern.

    Args:
      *patterns: regular expressions, searched in paths such as "layers/0/kernel". They are
        case-sensitive: Linen's "LayerNorm_0/scale" needs "[Nn]orm" or "(?i)norm".

    Returns:
      a function from a tree to a tree of bools, for `weight_decay_mask=` and `optax.masked`. It
      warns once if no pattern matches any path.

    Raises:
      ValueError: a pattern is not a valid regular expression.

    >>> import jax.numpy as jnp
    >>> matching("bias", "norm")({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    {'dense': {'bias': True, 'kernel': False}}
    """
    return _mask("matching", patterns, wanted=True)


def not_matching(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Return a mask that is True for leaves whose path contains no match of any pattern.

    >>> import jax.numpy as jnp
    >>> not_matching("bias", "norm")({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    {'dense': {'bias': False, 'kernel': True}}
    """
    return _mask("not_matching", patterns, wanted=False)


def _mask(caller: str, patterns: tuple[str, ...], *, wanted: bool) -> Callable[[PyTree], PyTree]:
    found = search(caller, *patterns)
    warned = False

    def warn_without_match(tree: PyTree) -> None:
        nonlocal warned
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hidden)
        paths = [path_string(path) for path, _ in leaves]
        # a MaskedNode may hide a match, and one leaf needs no selection
        hidden = any(isinstance(leaf, optax.MaskedNode) for _, leaf in leaves)
        if hidden or len(paths) < 2 or any(map(found, paths)):
            return
        warned = True
        listed = ", ".join(map(repr, patterns))
        warnings.warn(
            f"{caller}: a pattern must match at least one path, got {listed} and the paths "
            f"{', '.join(paths[:8])}{', …' * (len(paths) > 8)}; correct the pattern, or omit the "
            f"mask",
            stacklevel=3,
        )

    def mask(tree: PyTree) -> PyTree:
        if hasattr(tree, "dtype") and jnp.issubdtype(tree.dtype, jnp.integer):
            raise TypeError(
                f"{caller}: the mask must be given parameters, got a number; name the argument "
                f"with the mask in static_args of optax.inject_hyperparams, which otherwise calls "
                f"it as a schedule"
            )
        flags = map_with_path(lambda path, _: found(path_string(path)) is wanted, tree)
        if patterns and not warned and wanted not in jax.tree.leaves(flags):
            warn_without_match(tree)
        return flags

    mask.__name__ = f"{caller}({', '.join(map(repr, patterns))})"  # for reprs
    return mask


def _is_hidden(x: PyTree) -> bool:
    """Whether a leaf is hidden from a transformation, by a mask or as None."""
    return x is None or isinstance(x, optax.MaskedNode)


def search(caller: str, *patterns: str) -> Callable[[str], bool]:
    """Return a predicate that finds a match of any pattern in a path; errors name `caller`."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{caller}: a pattern must be a regular expression, got {pattern!r} ({error}); "
                f"pass separate strings, and escape special characters with re.escape"
            ) from None
    return lambda path: any(p.search(path) is not None for p in compiled)
