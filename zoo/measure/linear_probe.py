"""Logistic regression on frozen features.

Features are standardised (mean 0, standard deviation 1 over the training features), so that one
grid of C does for all models. The loss is scikit-learn's: C times the sum of cross entropies, plus
half the squared weights; the intercept is free. C is chosen on a part of the training features that
is left out of the fit, and the classifier is then fitted to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.errors import ZooError

GRID = (0.001, 0.01, 0.1, 1.0, 10.0)


class Probe(NamedTuple):
    """A fitted classifier.

    Attributes:
        weight: `(classes, C)`, of standardised features.
        bias: `(classes,)`.
        mean: Of the training features, `(C,)`.
        scale: One over their standard deviation, `(C,)`; 0 where they do not vary.
        c: The chosen C.
        scores: Accuracy on the part that was left out, percent, for every C.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    c: float
    scores: dict[float, float]

    def classes(self, features: Tensor) -> Tensor:
        """The most probable class of each row of `(N, C)`."""
        return _logits((features.double() - self.mean) * self.scale, self.weight, self.bias).argmax(
            1
        )


def fit_probe(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    grid: Sequence[float] = GRID,
    iterations: int = 200,
) -> Probe:
    """Choose C and fit.

    Args:
        features: Training features `(N, C)`.
        labels: Their classes `(N,)`, from 0.
        held_out: Which of them C is chosen on, `(N,)`, boolean.
        grid: Values of C to choose from; of equally good ones the smallest is taken.
        iterations: At most so many steps of L-BFGS for each.

    Raises:
        ZooError: There is one class only.
    """
    if len(labels.unique()) < 2:
        raise ZooError(
            "linear_probe needs training images of two classes or more, got "
            f"{len(labels)} of class {int(labels[0]) if len(labels) else '?'}; type a larger "
            "gallery_limit"
        )
    classes = int(labels.max()) + 1
    scores: dict[float, float] = {}
    values = sorted(set(map(float, grid)))
    if len(values) > 1 and bool(held_out.any()) and not bool(held_out.all()):
        mean, scale = _standard(features[~held_out])
        x, other = ((features[part].double() - mean) * scale for part in (~held_out, held_out))
        start = None
        for c in values:  # each from where the one before ended
            start = _fit(x, labels[~held_out], classes, c, iterations, start)
            right = _logits(other, *start).argmax(1) == labels[held_out]
            scores[c] = 100 * float(right.double().mean())
    best = max(values, key=lambda c: (scores.get(c, 0.0), -c))
    mean, scale = _standard(features)
    x = (features.double() - mean) * scale
    weight, bias = _fit(x, labels, classes, best, iterations, None)
    return Probe(weight, bias, mean, scale, best, scores)


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    x = features.double()
    spread = x.std(0, correction=0)
    return x.mean(0), torch.where(spread > 1e-12, 1 / spread.clamp_min(1e-12), 0.0)


def _fit(
    x: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    iterations: int,
    start: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    if start is None:
        start = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    # The measurement runs in inference mode; this part of it learns.
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = x.clone(), labels.clone()
        weight, bias = (part.clone().requires_grad_() for part in start)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            entropy = torch.nn.functional.cross_entropy(_logits(x, weight, bias), labels)
            value = entropy + weight.square().sum() / (2 * c * len(x))
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias
