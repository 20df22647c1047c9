"""Methods that look at pixels as they were before they were normalised for the model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from reduction.checks import number, positive
from reduction.counts import Spec
from reduction.errors import ZooError
from reduction.mixins.learned import Learned

Channels = float | Sequence[float] | None


class Pixels(Learned):
    """A method whose arguments `mean` and `std` undo the normalisation of images.

    Where they are None, the backbone's published ones are used; 0.5 where it publishes none.
    """

    mean: Channels
    std: Channels
    _published: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5,), (0.5,))

    def normalised_by(self, mean: Channels, std: Channels) -> None:
        """Check and store the two arguments.

        Raises:
            ZooError: If one is neither a number, nor a list of them, nor None.
        """
        given: list[Channels] = []
        for name, value, check in (("mean", mean, number), ("std", std, positive)):
            if value is None or isinstance(value, Sequence):
                values = list(value or [])
                given.append(None if value is None else [check(name, v) for v in values])
            else:
                given.append(check(name, value))
        self.mean, self.std = given

    def setup(self, spec: Spec) -> None:
        """Note what the backbone publishes."""
        self._published = (spec.mean, spec.std)

    def pixels(self, images: Tensor) -> Tensor:
        """Images with values in [0, 1] again, `(B, channels, H, W)` in float32 or better.

        Raises:
            ZooError: If there are numbers for another count of channels.
        """
        x = images.float() if images.dtype.itemsize < 4 else images
        mean, std = (
            self._channels(name, given, published, x)
            for name, given, published in zip(
                ("mean", "std"), (self.mean, self.std), self._published, strict=True
            )
        )
        return x * std + mean

    def _channels(
        self, name: str, given: Channels, published: Sequence[float], images: Tensor
    ) -> Tensor:
        values = published if given is None else given
        listed = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
        if len(listed) not in (1, images.shape[1]):
            if given is not None:
                raise ZooError(
                    f"{name} must hold one number for each of the {images.shape[1]} channels, got "
                    f"{listed}"
                )
            listed = [sum(listed) / len(listed)]
        return images.new_tensor(listed).view(1, -1, 1, 1)
