"""Leaves by path, the same path at init and update, and masks made from patterns.

Flax wraps a parameter in a box that carries its metadata, such as axis names: Linen's is a
`Partitioned`, NNX's a `Variable`. Here a box counts as one leaf, whose path is the path of the box.
So a leaf keeps its path whether it is boxed, as NNX's are at init, or not, as they are at update.
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
    """Return a key path as "layers/0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_box(x: PyTree) -> bool:
    """Whether this is a box of Flax (NNX's Variable, or Linen's Partitioned and its like).

    An empty box, such as `optax.masked` makes, is none: it has no leaf.
    """
    boxed = hasattr(x, "get_metadata") or (hasattr(x, "unbox") and hasattr(x, "replace_boxed"))
    return boxed and bool(jax.tree.leaves(x))


def unbox(x: PyTree) -> PyTree:
    """Return the content of a box; anything else as it is.

    Linen's own `unbox` would constrain the content to the sharding that the box names.
    """
    if not is_box(x):
        return x
    return next(iter(jax.tree.leaves(x, is_leaf=lambda y: y is not x)), None)


def rebox(box: PyTree, content: PyTree) -> PyTree:
    """Return `content` in a box like this one, or as it is if this is no box."""
    if not is_box(box):
        return content
    structure = jax.tree.structure(box, is_leaf=lambda y: y is not box)
    return structure.unflatten([content] * structure.num_leaves)


def leaves_with_path(tree: PyTree) -> list[tuple[KeyPath, PyTree]]:
    """Return the leaves with their key paths, out of their boxes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [(path, unbox(x)) for path, x in leaves if unbox(x) is not None]


def map_with_path(f: Callable[[KeyPath, PyTree], PyTree], tree: PyTree) -> PyTree:
    """Return the tree of f(key path, leaf), in the same boxes."""

    def in_box(path: KeyPath, x: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f(path, leaf), x)

    return jax.tree_util.tree_map_with_path(in_box, tree, is_leaf=is_box)


Key: TypeAlias = tuple[str, int]
"""The path of a leaf, and how many leaves before it have the same path."""


def keys(paths: Iterable[KeyPath]) -> list[Key]:
    """Return a distinct key for each leaf: {"a/b": x, "a": {"b": y}} has two leaves at "a/b"."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for path in map(path_string, paths):
        found.append((path, seen[path]))
        seen[path] += 1
    return found


def by_key(tree: PyTree) -> dict[Key, PyTree]:
    """Return the leaves of a tree, out of their boxes, by their keys."""
    leaves = leaves_with_path(tree)
    return dict(zip(keys(path for path, _ in leaves), (x for _, x in leaves), strict=True))


def matching(*patterns: str) -> Callable[[PyTree], PyTree]:
    """A mask that is True on the leaves whose path contains a match of any pattern.

    Args:
      *patterns: regular expressions, searched in paths such as "layers/0/kernel". Case counts:
        Linen's norms are "LayerNorm_0/scale", which "[Nn]orm" and "(?i)norm" find.

    Returns:
      a function from a tree to a tree of bools, for `weight_decay_mask=` and `optax.masked`. It
      warns once if no pattern matches any of the paths.

    Raises:
      ValueError: a pattern is not a valid regular expression.

    >>> import jax.numpy as jnp
    >>> matching("bias", "norm")({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    {'dense': {'bias': True, 'kernel': False}}
    """
    return _mask("matching", patterns, wanted=True)


def not_matching(*patterns: str) -> Callable[[PyTree], PyTree]:
    """The opposite of `matching`: True on every leaf whose path matches none of the patterns.

    >>> import jax.numpy as jnp
    >>> not_matching("bias", "norm")({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    {'dense': {'bias': False, 'kernel': True}}
    """
    return _mask("not_matching", patterns, wanted=False)


def _mask(caller: str, patterns: tuple[str, ...], *, wanted: bool) -> Callable[[PyTree], PyTree]:
    found = search("matching", *patterns)
    warned = False

    def warn_without_match(tree: PyTree) -> None:
        nonlocal warned
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hidden)
        paths = [path_string(path) for path, _ in leaves]
        # under a MaskedNode there may be a match, and of a single leaf nothing is to be chosen
        hidden = any(isinstance(leaf, optax.MaskedNode) for _, leaf in leaves)
        if hidden or len(paths) < 2 or any(map(found, paths)):
            return
        warned = True
        listed = ", ".join(map(repr, patterns))
        warnings.warn(
            f"{caller}: a pattern must match at least one path, got {listed} and the paths "
            f"{', '.join(paths[:8])}{', …' * (len(paths) > 8)}; correct the pattern, or leave out "
            f"the mask",
            stacklevel=3,
        )

    def mask(tree: PyTree) -> PyTree:
        if hasattr(tree, "dtype") and jnp.issubdtype(tree.dtype, jnp.integer):
            raise TypeError(
                f"{caller}: got a number in the place of parameters; under "
                f"optax.inject_hyperparams name the mask in static_args, or it is taken for a "
                f"schedule"
            )
        flags = map_with_path(lambda path, _: found(path_string(path)) is wanted, tree)
        if patterns and not warned and wanted not in jax.tree.leaves(flags):
            warn_without_match(tree)
        return flags

    mask.__name__ = f"{caller}({', '.join(map(repr, patterns))})"  # which a repr shows
    return mask


def _is_hidden(x: PyTree) -> bool:
    """Whether a leaf is kept from a transformation, by a mask or as None."""
    return x is None or isinstance(x, optax.MaskedNode)


def search(caller: str, *patterns: str) -> Callable[[str], bool]:
    """Whether a path contains a match of any pattern; errors carry the caller's name."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{caller}: {pattern!r} is not a regular expression ({error}); pass patterns as "
                f"separate strings, and escape special characters with re.escape"
            ) from None
    return lambda path: any(p.search(path) is not None for p in compiled)
