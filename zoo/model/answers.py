"""Answers that are no numbers: whatever is measured on them is no measurement."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from zoo.errors import ZooError


class NotFinite(ZooError):
    """A model answered an image with NaN or infinity, so it has no accuracy, fidelity or speed.

    Attributes:
        image: Place of the image among those that were measured on, from 0.
    """

    def __init__(self, message: str, image: int) -> None:
        super().__init__(message)
        self.image = image

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, int]]:
        """For other processes, which are told."""
        return type(self), (str(self), self.image)


def check_finite(
    answers: Tensor,
    first: int | Tensor = 0,
    who: str = "the model",
    name: Callable[[int], str | None] | None = None,
) -> None:
    """Refuse answers that are not all finite.

    Args:
        answers: Logits or features, `(B, ...)`.
        first: Place of the first of these images among all, or the places `(B,)` of each.
        who: Whose answers they are.
        name: What an image is called, by its place: its file, or None where it has none.

    Raises:
        NotFinite: With the first image that was answered so.
    """
    fine = answers.isfinite()
    if bool(fine.all()):
        return
    bad = int((~fine.flatten(1).all(1)).nonzero()[0])
    values = answers[bad].flatten()
    place = int(first[bad]) if isinstance(first, Tensor) else first + bad
    kind = "NaN" if bool(values.isnan().any()) else "infinity"
    count = int((~values.isfinite()).sum())
    called = None if name is None else name(place)
    where = f"image {place}" + (f" ({called})" if called else "")
    raise NotFinite(
        f"{who} answers {where}, counted from 0, with {kind} ({count} of {len(values)} numbers): "
        "nothing is measured; its weights, the precision or that image are at fault",
        place,
    )
