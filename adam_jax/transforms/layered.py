"""Parameters with an outer part and stacked layers, and the optimizer states for them.

In parameters `{"outer": ..., "layers": ...}`, the leaves of layers are stacked along axis 0. A leaf
of an optimizer's state belongs to the parameter whose path is a suffix of the leaf's path. Other
leaves, such as step counts, are shared by all parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adam_jax._util.paths import is_box, leaves_with_path
from adam_jax._util.typing import KeyPath, PyTree

OUTER, LAYERS, SHARED = "outer", "layers", "shared"

Leaves = Mapping[str, Sequence[PyTree]]
"""The leaves of a tree by part: outer, layers, and shared; Flax boxes count as leaves."""


class Layout(NamedTuple):
    """The structure of a tree, and the parameter that each of its leaves belongs to."""

    treedef: Any
    owners: Sequence[KeyPath]
    """The path of a leaf's parameter; () for shared leaves."""

    @classmethod
    def of(cls, tree: PyTree, params: PyTree) -> Layout:
        """Return the layout of `params`, or of an optimizer's state for them."""
        paths = {path for path, _ in leaves_with_path(params)}
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
        return cls(treedef, [_owner(path, paths) for path, _ in leaves])

    @property
    def parts(self) -> list[str]:
        """Return the part of each leaf."""
        return list(map(part_of, self.owners))

    def split(self, tree: PyTree) -> dict[str, list[PyTree]]:
        """Return the leaves of a tree of this layout by part; leaves can be `MaskedNode`s."""
        leaves = list(zip(self.parts, self.treedef.flatten_up_to(tree), strict=True))
        return {part: [x for p, x in leaves if p == part] for part in (OUTER, LAYERS, SHARED)}

    def parts_of_arrays(self, tree: PyTree) -> list[str]:
        """Return the part of each array in a tree of this layout."""
        leaves = self.treedef.flatten_up_to(tree)
        pairs = zip(self.parts, leaves, strict=True)
        return [part for part, x in pairs for _ in jax.tree.leaves(x)]

    def join(self, leaves: Leaves) -> PyTree:
        """Return the tree of these leaves, with a `MaskedNode` for each leaf of other parts."""
        given = {part: iter(xs) for part, xs in leaves.items()}
        return self.treedef.unflatten(
            next(given[part]) if part in given else optax.MaskedNode() for part in self.parts
        )

    def only(self, owner: KeyPath, leaves: Sequence[PyTree]) -> list[PyTree]:
        """Return the leaves of the owner's part, with `MaskedNode`s for other owners' leaves."""
        owners = [
            o for o, part in zip(self.owners, self.parts, strict=True) if part == part_of(owner)
        ]
        return [
            x if o == owner else optax.MaskedNode() for o, x in zip(owners, leaves, strict=True)
        ]


def part_of(owner: KeyPath) -> str:
    """Return the part of the leaves of a parameter."""
    return owner[0].key if owner else SHARED


def _owner(path: KeyPath, params: Collection[KeyPath]) -> KeyPath:
    """Return the parameter path that is a suffix of `path`, or () if there is none."""
    return next((path[k:] for k in range(len(path)) if path[k:] in params), ())


def layer_of(stacked: PyTree, index: jax.typing.ArrayLike) -> PyTree:
    """Return one layer of a tree of stacked leaves."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), stacked
    )


def with_layer(stacked: PyTree, layer: PyTree, index: jax.Array) -> PyTree:
    """Return the stacked leaves with one layer replaced, in place if XLA can."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), stacked, layer
    )
