"""Names of selectors, and the functions that users call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

from reduction.errors import ZooError
from reduction.registry import Registry
from reduction.selection.base import Selection, Selector, everything
from reduction.selection.given import SIGNALS, Given, given

SelectorLike = str | Mapping[str, Any] | Selector
_S = TypeVar("_S", bound=type[Selector])

SELECTORS: Registry[Selector] = Registry(
    "selector", Selector, "reduction.selectors", "{'name': 'visionzip'}"
)


def register_selector(name: str) -> Callable[[_S], _S]:
    """Class decorator that gives a selector its registry name.

    Args:
        name: Lower case letters, digits and underscores.

    Raises:
        ValueError: If the name is malformed or taken, or the class has no `card`.
    """
    return SELECTORS.named(name)


def list_selectors() -> list[str]:
    """Registry names of all selectors, sorted."""
    return SELECTORS.names()


def create_selector(spec: SelectorLike, **options: Any) -> Selector:
    """Build a selector from a name, a mapping `{"name": ..., **options}`, or pass an instance on.

    Args:
        spec: Which.
        **options: Further constructor arguments.

    Raises:
        UnknownName: If there is no such selector.
        ZooError: If an option is unknown or has a bad value.
    """
    parsed = SELECTORS.parse(spec)
    if isinstance(parsed, Selector):
        if options:
            raise ZooError(f"{parsed.name or type(parsed).__name__} is built already: {options}")
        return parsed
    name, args = parsed
    return SELECTORS.build(name, {**args, **options})


def select(
    features: Tensor,
    keep: int | float | None,
    method: SelectorLike = "visionzip",
    *,
    grid: tuple[int, int] | None = None,
    group: int = 1,
    group_order: str = "raster",
    **signals_and_options: Any,
) -> Selection:
    """Choose K of a tower's tokens, for a language model or an index.

    Every image by itself, the same in every batch; scores in float32, ties to the lower index; no
    state and no chance. Gradients pass through the features alone.

    Args:
        features: Patches `(B, N, C)` without prefix tokens, of the block before the last; or what
            a merger made of groups of patches.
        keep: Tokens K, or a share in (0, 1), see `retained_count`. None where an adaptive method
            decides; K of N or more changes nothing.
        method: Name, mapping `{"name": ..., **options}`, or instance.
        grid: Rows and columns of the patches; None takes a square, where N allows one.
        group: Patches in each row of `features`; signals are then of all patches, and the mean over
            a group speaks for it.
        group_order: "raster", patches row by row; "runs", those of a group one after another.
        **signals_and_options: What the attention said, see `reduction.signals_of` and
            `reduction.selection.given.SIGNALS`, and constructor arguments of the method, e.g.
            `compat="official"`.

    Returns:
        Features `(B, K, C)`, their indices, the method's own order, and what became of the others.

    Raises:
        UnknownName: If there is no such method.
        ZooError: If a signal is missing, a shape does not fit, or an option is unknown.

    Examples:
        >>> import torch, reduction
        >>> x, row = torch.randn(2, 64, 32), torch.rand(2, 4, 65).softmax(-1)
        >>> reduction.select(x, 16, "scope", cls_row=row).features.shape
        torch.Size([2, 16, 32])
    """
    signals = {k: v for k, v in signals_and_options.items() if k in SIGNALS and v is not None}
    options = {k: v for k, v in signals_and_options.items() if k not in SIGNALS}
    _refuse_unknown(method, options)
    selector = create_selector(method, **options)
    share = _share(keep)
    inputs = given(features, signals, grid, group, group_order, share)
    return pick(selector, inputs, keep)


def pick(selector: Selector, inputs: Given, keep: int | float | None) -> Selection:
    """`select` with a selector and inputs that are made already.

    Args:
        selector: An instance.
        inputs: Of `reduction.selection.given.given`.
        keep: See `select`.

    Raises:
        ZooError: As `select` does.
    """
    count = asked(selector, inputs.n, keep)
    if count is not None and count >= inputs.n:
        return everything(inputs)
    return selector.pick(inputs, count)


def asked(selector: Selector, n: int, keep: int | float | None) -> int | None:
    """The number of tokens that `keep` asks for.

    Raises:
        ZooError: If it is no number of tokens, and no share either.
    """
    name = selector.name or type(selector).__name__
    if keep is None:
        if not selector.adaptive:
            raise ZooError(f"{name} needs keep, a number of tokens or a share of them, got None")
        return None
    share = _share(keep)
    return int(keep) if share is None else selector.count(n, share)


def retained_count(
    n: int,
    share_removed: float,
    method: SelectorLike = "visionzip",
    *,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> int:
    """How many tokens will remain, from sizes alone and before any image is seen.

    `select(features, 1 - share_removed, method)` answers with exactly so many rows.

    Args:
        n: Tokens N, or groups of them.
        share_removed: Share that a serving engine prunes, in [0, 1).
        method: Name, mapping, or instance.
        grid: Rows and columns of the N tokens, for methods with neighbourhoods.
        **options: Constructor arguments of the method.

    Raises:
        ZooError: If the share is out of range.
    """
    whole = isinstance(n, Integral) and not isinstance(n, bool) and n >= 1
    if not whole:
        raise ZooError(f"n must be a number of tokens, 1 or more, got {n!r}")
    number = isinstance(share_removed, Real) and not isinstance(share_removed, bool)
    if not number or not 0 <= share_removed < 1:
        raise ZooError(f"share_removed must be in [0, 1), got {share_removed!r}")
    selector = create_selector(method, **options)
    keep = n if share_removed == 0 else selector.count(n, 1 - share_removed)
    return n if keep >= n else selector.rows(n, keep, grid)


def retained_mask(selection: Selection) -> Tensor:
    """Which patches remained, `(B, N)` bool, for an engine that takes `embeddings[mask]`.

    As many are true as `retained_count` said; rows that stand for no patch are not among them.

    Args:
        selection: Of `select`.
    """
    return selection.mask()


def signals_of(
    method: SelectorLike,
    depth: int,
    class_token: bool = True,
    block: int | None = None,
    **options: Any,
) -> tuple[tuple[str, int], ...]:
    """What a tower has to be asked for, and of which block.

    Args:
        method: Name, mapping, or instance.
        depth: Blocks of the tower.
        class_token: Whether the tower has one; "column" takes the place of "cls_row" without.
        block: Whose output is chosen from; None is the last but one.
        **options: Constructor arguments of the method.

    Returns:
        Pairs of a keyword of `select` and the index of a block.
    """
    selector = create_selector(method, **options)
    source = max(depth - 2, 0) if block is None else block
    row = "cls_row" if class_token else "column"
    found: list[tuple[str, int]] = []
    shallow = selector.shallow_block(depth)
    for what in selector.reads:
        name = row if what == "attention" else what
        if shallow is not None and what in ("attention", "column"):
            found.append((f"{name}_shallow", max(0, min(shallow, source))))
        found.append((name, source))
    if selector.from_last:
        behind = min(source + 1, depth - 1)
        found += [("q", behind) if class_token else ("column", source), ("k", behind)]
    return tuple(found)


def _share(keep: int | float | None) -> float | None:
    """`keep`, where it is a share of the tokens and no number of them.

    Raises:
        ZooError: If it is neither.
    """
    if isinstance(keep, Integral) and not isinstance(keep, bool):
        if keep >= 1:
            return None
    elif isinstance(keep, Real) and not isinstance(keep, bool) and 0 < keep < 1:
        return float(keep)
    elif keep is None:
        return None
    raise ZooError(f"keep must be a number of tokens from 1, or a share in (0, 1), got {keep!r}")


def _refuse_unknown(method: SelectorLike, options: Mapping[str, Any]) -> None:
    """Name signals too where a keyword is neither a signal nor an option."""
    name = method if isinstance(method, str) else None
    if isinstance(method, Mapping):
        name = method.get("name")
    if not isinstance(name, str):
        return
    known = list(inspect.signature(SELECTORS.get(name)).parameters)
    for key in options:
        if key not in known:
            raise ZooError(
                f"selector {name!r}: {key!r} is neither an option ({', '.join(sorted(known))}) "
                f"nor a signal ({', '.join(SIGNALS)})"
            )
