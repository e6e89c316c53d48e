"""Leaves by name: one path string for a leaf wherever it is met, and masks made from patterns."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def path_string(path: tuple[Any, ...]) -> str:
    """A key path as "layers/0/kernel".

    Flax NNX shows an optimizer Variables at init, whose paths end in /value, and arrays at update:
    the ending is dropped so that a leaf keeps its name.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def matching(*patterns: str) -> Callable[[Any], Any]:
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


def not_matching(*patterns: str) -> Callable[[Any], Any]:
    """The opposite of `matching`: True on every leaf whose path matches none of the patterns.

    >>> import jax.numpy as jnp
    >>> not_matching("bias", "norm")({"dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}})
    {'dense': {'bias': False, 'kernel': True}}
    """
    return _mask("not_matching", patterns, wanted=False)


def _mask(caller: str, patterns: tuple[str, ...], *, wanted: bool) -> Callable[[Any], Any]:
    found = search("matching", *patterns)
    warned = False

    def warn_without_match(tree: Any) -> None:
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

    def mask(tree: Any) -> Any:
        if hasattr(tree, "dtype") and jnp.issubdtype(tree.dtype, jnp.integer):
            raise TypeError(
                f"{caller}: got a number in the place of parameters; under "
                f"optax.inject_hyperparams name the mask in static_args, or it is taken for a "
                f"schedule"
            )
        flags = jax.tree_util.tree_map_with_path(
            lambda path, _: found(path_string(path)) is wanted, tree
        )
        if patterns and not warned and wanted not in jax.tree.leaves(flags):
            warn_without_match(tree)
        return flags

    mask.__name__ = f"{caller}({', '.join(map(repr, patterns))})"  # which a repr shows
    return mask


def _is_hidden(x: Any) -> bool:
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
