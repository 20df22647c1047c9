"""Several processes that measure together: each its share, and every image once."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from zoo.errors import ZooError

T = TypeVar("T")

_AGREED = "agreed_by_all_processes"


class Processes(NamedTuple):
    """This process among those of a run.

    What they tell each other goes through `collect` alone, so that one which fails is heard by the
    others wherever these are.

    Attributes:
        rank: Number of this one, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def collect(self, work: Callable[[], T]) -> list[T]:
        """Do something in every process.

        Returns:
            What each of them found, in order of their numbers.

        Raises:
            Exception: One of them failed; its error is raised in all of them, see `is_agreed`.
            ZooError: One of them has ended meanwhile.
        """
        if self.size == 1:
            return [work()]
        own: tuple[T | None, Exception | None]
        try:
            own = work(), None
        except Exception as error:
            own = None, portable(error)
        found: list[tuple[Any, Exception | None]] = gathered(own, self.size)
        problem = next((problem for _, problem in found if problem is not None), None)
        if problem is not None:
            setattr(problem, _AGREED, True)
            raise problem
        return [result for result, _ in found]

    def first(self, work: Callable[[], T]) -> T:
        """Do something in the first process and hand the result to all."""
        found: list[Any] = self.collect(lambda: work() if self.rank == 0 else None)
        return found[0]  # type: ignore[no-any-return]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of this process."""
        return items[self.rank :: self.size]


def is_agreed(error: Exception) -> bool:
    """Whether the other processes know of an error and raise it, too."""
    return bool(getattr(error, _AGREED, False))


#: One process, which has nobody to wait for.
ALONE = Processes()


def gathered(own: T, count: int) -> list[T]:
    """What each of several processes gives.

    Raises:
        ZooError: One of them has ended.
    """
    from torch import distributed

    found: list[Any] = [None] * count
    try:
        distributed.all_gather_object(found, own)
    except RuntimeError as error:
        raise ZooError(
            "another process of this run has ended or cannot be reached: nothing is measured; look "
            f"at what it said before ({str(error).splitlines()[0][:120]})"
        ) from error
    return found


def portable(error: Exception) -> Exception:
    """An error as it arrives in another process, which not every class of errors does."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:
        pass
    if isinstance(error, ZooError):
        return ZooError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
