"""What batches leave behind, in few pieces of memory."""

from __future__ import annotations

import torch
from torch import Tensor


class Growing:
    """Rows that come batch by batch, on the CPU.

    Small tensors that are kept one by one come to lie where the images of their batch were, and
    what is left around them is too small for the images of the next: a process grew by 0.7 MB with
    every image of 224 pixels. So rows are copied into one tensor, which doubles when it is full.

    Args:
        first: Rows that it has room for at the start.
    """

    def __init__(self, first: int = 1024) -> None:
        self._first, self._rows, self._count = first, torch.empty(0), 0

    def add(self, rows: Tensor) -> None:
        """Take a batch of them.

        Args:
            rows: `(B, ...)`, all batches of one type and, but for B, of one shape.
        """
        if not len(rows):
            return
        end = self._count + len(rows)
        if end > len(self._rows):
            room = max(self._first, end, 2 * len(self._rows))
            larger = torch.empty(room, *rows.shape[1:], dtype=rows.dtype)
            if self._count:
                larger[: self._count] = self._rows[: self._count]
            self._rows = larger
        self._rows[self._count : end] = rows
        self._count = end

    def tensor(self) -> Tensor:
        """All of them, in their order."""
        return self._rows[: self._count].clone()
