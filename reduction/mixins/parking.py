"""Methods that put tokens aside and bring them back.

What is parked lies in `Tokens.memory`, under names that begin with `bank.`: rows and their places,
and sizes, origins, source map and grid as they were when nothing had been parked yet.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reduction.tokens import Tokens, take_rows

BANK = "bank."


class Parks:
    """A method whose removed tokens are not gone.

    Attributes:
        parks: When they come back: before the next step and behind the last block ("stage"), or
            behind every block, and then a step lasts until the next one ("block"); "no" where an
            option keeps them from being parked. Counts are planned so.
    """

    parks: Literal["no", "stage", "block"] = "stage"

    def lasts(self, block: int, first: int) -> bool:
        """Whether a step is repeated in a later block, where `parks` is "block".

        Args:
            block: The later block.
            first: That of the step.
        """
        return True

    def restores(self, block: int, depth: int) -> bool:
        """Whether tokens that are parked behind this block, where it is their turn, come back."""
        return True

    def restore(self, t: Tokens) -> Tokens:
        """Put parked tokens back, see `parks`."""
        raise NotImplementedError(f"{type(self).__name__} must override restore")


def park(t: Tokens, out: Tokens, kept: Tensor | None = None, gone: Tensor | None = None) -> Tokens:
    """Put tokens aside.

    Args:
        t: Tokens with N reducible tokens.
        out: The same without those that are put aside.
        kept: Tokens of `t` that are the first of `out`, in that order, `(B, M)`.
        gone: Tokens to put aside, `(B, G)`; None (and no `kept`): all of them, as they lie.

    Returns:
        `out`, with what is parked in its memory.
    """
    memory = dict(out.memory)
    if f"{BANK}size" not in memory:
        memory |= _bookkeeping(t)
    if kept is None or gone is None:
        return out._replace(memory={**memory, f"{BANK}rows.0": t.patches})
    place, number = memory.get(f"{BANK}place"), len(parked(out))
    memory[f"{BANK}rows.{number}"] = take_rows(t.patches, gone)
    memory[f"{BANK}places.{number}"] = gone if place is None else place.gather(1, gone)
    memory[f"{BANK}place"] = kept if place is None else place.gather(1, kept)
    return out._replace(memory=memory)


def parked(t: Tokens) -> list[Tensor]:
    """Rows that are parked, `(B, G, C)` for each time that some were."""
    return [v for k, v in t.memory.items() if k.startswith(f"{BANK}rows.")]


def in_place(t: Tokens, rows: list[Tensor]) -> Tensor:
    """All patches in the order of before the first parking, `(B, N, C)`.

    Args:
        t: Tokens, the first of which were kept.
        rows: Of `parked`, perhaps changed.
    """
    first = t.memory[f"{BANK}place"]
    places = [v for k, v in t.memory.items() if k.startswith(f"{BANK}places.")]
    order = torch.cat([first, *places], dim=1).argsort(dim=1)
    return take_rows(torch.cat([t.patches[:, : first.shape[1]], *rows], dim=1), order)


def unpark(t: Tokens, patches: Tensor, behind: int | None = None) -> Tokens:
    """Tokens as before the first parking, with new features.

    Args:
        t: Tokens; nothing is left in their memory of what was parked.
        patches: `(B, N, C)`, in the order of then.
        behind: The first of the present tokens that came later and stay behind these; None: none.
    """
    bank = {k.removeprefix(BANK): v for k, v in t.memory.items() if k.startswith(BANK)}
    rows = [t.x[:, : t.prefix], patches]
    size, origin = bank["size"], bank.get("origin")
    if behind is not None and behind < t.n:
        rows.append(t.patches[:, behind:])
        size = torch.cat([size, t.patch_size[:, behind:]], dim=1)
        if origin is not None and t.origin is not None:
            origin = torch.cat([origin, t.origin[:, behind:]], dim=1)
    grid = None
    if "grid" in bank:
        grid = (int(bank["grid"].shape[0]), int(bank["grid"].shape[1]))
    return t._replace(
        x=torch.cat(rows, dim=1),
        size=size,
        origin=origin,
        source=bank.get("source"),
        memory={k: v for k, v in t.memory.items() if not k.startswith(BANK)},
        grid=grid,
    )


def _bookkeeping(t: Tokens) -> dict[str, Tensor]:
    found = {f"{BANK}size": t.size}
    for name, value in (("origin", t.origin), ("source", t.source)):
        if value is not None:
            found[BANK + name] = value
    if t.grid is not None:
        # Its shape is the grid: known without waiting for a device, and through checkpointing.
        found[f"{BANK}grid"] = t.size.new_empty(1).expand(t.grid)
    return found
