"""Parameter groups by path, like PyTorch's `param_groups`, built on `optax.partition`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import cast

import jax
import optax

from adam_jax._engine.transformation import Transformation, describe, transformation_of
from adam_jax._util import errors
from adam_jax._util.paths import leaves_with_path, map_with_path, path_string
from adam_jax._util.typing import PyTree

Settings = Mapping[str, PyTree] | str | optax.GradientTransformation


def groups(
    constructor: Callable[..., optax.GradientTransformation],
    patterns: Mapping[str, Settings],
    **shared: PyTree,
) -> Transformation:
    """Make one optimizer whose settings differ between parameter groups.

    Args:
      constructor: makes each group's optimizer, such as `adamw` or `tunable(adamw)`.
      patterns: maps regular expressions, searched in paths such as "layers/0/kernel", to settings
        for the matching leaves. Settings are a mapping of arguments that override the shared ones,
        "frozen", or another Optax transformation. The argument `learning_rate_factor` multiplies
        the shared learning rate or schedule.
      **shared: arguments for all groups, and for leaves that match no pattern.

    Returns:
      an Optax transformation with the state of `optax.partition`, whose labels are the patterns and
      "default".

    Raises:
      TypeError: constructor is a transformation, patterns isn't a mapping, or an argument is
        unknown or has a wrong type.
      ValueError: a setting is out of range, or a pattern is "default" or isn't a regular
        expression; at init, a pattern matches no leaf, or two match one leaf.

    >>> import adam_jax, jax.numpy as jnp
    >>> tx = groups(
    ...     adam_jax.adamw,
    ...     {r"bias|norm": dict(weight_decay=0.0), r"^head/": dict(learning_rate_factor=0.1)},
    ...     learning_rate=1e-3,
    ...     weight_decay=0.1,
    ... )
    >>> state = tx.init({"head": {"kernel": jnp.ones((2, 2))}, "norm": jnp.ones(2)})
    """
    with errors.error_context("groups"):
        errors.constructor(constructor, "groups(adam_jax.adamw, {...}, learning_rate=1e-3)")
        errors.mapping("patterns", patterns, "{'bias': {'weight_decay': 0.0}}")
    if "default" in patterns:
        raise ValueError(
            "groups: a pattern must not be 'default', the label of leaves that match none; write "
            "'(default)'"
        )
    parts: dict[Hashable, optax.GradientTransformation] = {
        p: _optimizer(constructor, p, s, shared) for p, s in patterns.items()
    }
    parts["default"] = constructor(**shared)

    def labels(tree: PyTree) -> PyTree:
        return map_with_path(lambda path, _: _label(path_string(path), patterns), tree)

    partitioned = optax.partition(parts, labels)

    def init(params: PyTree) -> PyTree:
        paths = [path_string(p) for p, _ in leaves_with_path(params)]
        hidden = any(map(_is_hidden, jax.tree.leaves(params, is_leaf=_is_hidden)))
        for pattern in patterns if not hidden else ():  # a hidden leaf may match
            if paths and not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"groups: {pattern!r} matches no parameter; the paths are {_some(paths)}"
                )
        return partitioned.init(params)

    text = f"groups({', '.join(f'{p!r}: {describe(tx)}' for p, tx in parts.items())})"
    return transformation_of(parts, init, partitioned.update, text)


def _optimizer(
    constructor: Callable[..., optax.GradientTransformation],
    pattern: str,
    settings: Settings,
    shared: Mapping[str, PyTree],
) -> optax.GradientTransformation:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"groups: {pattern!r} must be a regular expression ({error})") from None
    if errors.is_transformation(settings):
        return cast(optax.GradientTransformation, settings)
    if settings == "frozen":
        return optax.set_to_zero()
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"groups: the settings of {pattern!r} must be a mapping of arguments, 'frozen', or an "
            f"Optax transformation, got {settings!r}"
        )
    own: dict[str, PyTree] = dict(settings)
    factor = own.pop("learning_rate_factor", None)
    if factor is not None:
        if "learning_rate" in own or "learning_rate" not in shared:
            raise ValueError(
                f"groups: the learning_rate_factor of {pattern!r} multiplies the shared "
                f"learning_rate; pass learning_rate= to groups, and none in the pattern's settings"
            )
        own["learning_rate"] = _scaled(shared["learning_rate"], factor)
    return constructor(**{**shared, **own})


def _scaled(rate: PyTree, factor: PyTree) -> PyTree:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


def _label(path: str, patterns: Mapping[str, Settings]) -> str:
    found = [p for p in patterns if re.search(p, path)]
    if len(found) > 1:
        raise ValueError(
            f"groups: {path!r} must match one pattern, got {_some(map(repr, found))}; make them "
            f"exclude each other, e.g. with ^, $, or (?!...)"
        )
    return found[0] if found else "default"


def _is_hidden(x: PyTree) -> bool:
    return isinstance(x, optax.MaskedNode)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
