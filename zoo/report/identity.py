"""What a row is a measurement of: setting, weights, images, precision, run-time options and run.

Two rows are put side by side where they were measured on the same images, averaged where they
differ in the seed alone, and kept apart where they differ in anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.report.controls import was_trained_here
from zoo.report.quality import qualities
from zoo.report.readings import Row, fidelity, precision, switched_on
from zoo.report.words import DENSE, is_dense, number, plugins, tasks

# What may be typed for a training without making it another one.
_FREE = {"seed", "results", "threads", "output_dir", "trainer.enable_progress_bar"}


def canonical(value: Any) -> str:
    """A value as text that is equal for equal values; what a mapping leaves open is left out."""
    if isinstance(value, Mapping):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value, sort_keys=True, default=str)


def arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reducer's arguments; its seed is none of them, as draws are averaged over."""
    found = row.get("reducer")
    return {k: v for k, v in found.items() if k != "seed"} if isinstance(found, Mapping) else {}


def backbone(row: Mapping[str, Any]) -> str:
    """Name of the architecture, with the tag of its pretrained weights."""
    name, tag = str(row.get("backbone") or "?"), row.get("tag")
    return f"{name}.{tag}" if tag else name


def trained(row: Mapping[str, Any]) -> bool:
    """Whether the weights were trained for the purpose."""
    # All dense weights were trained dense; here those count that a training run has just made.
    return was_trained_here(row) if is_dense(row) else bool(row.get("trained"))


def weights(row: Mapping[str, Any]) -> str:
    """Which weights: their hash, or their name where there is none."""
    return str(row.get("weights_sha") or row.get("weights") or "")


def same_weights(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are of the same weights, as far as they tell."""
    for key in ("weights_sha", "weights"):
        if one.get(key) and other.get(key):
            return bool(one[key] == other[key])
    return not (weights(one) or weights(other))


def options(row: Mapping[str, Any]) -> list[str]:
    """What was switched on for speed: run-time options, and the compiler."""
    return [*switched_on(row), *(["compiled"] if row.get("compile") else [])]


def cost_options(row: Mapping[str, Any]) -> list[str]:
    """Run-time options that change the cost."""
    return [option for option in switched_on(row) if option.startswith("last_block=")]


def has_quality(row: Mapping[str, Any]) -> bool:
    """Whether a row knows how good answers or features are, by labels or against dense ones."""
    if number(row.get("top1")) is not None or fidelity(row) or qualities(row):
        return True
    # Fidelity is measured against the dense model, whose own row holds none.
    return is_dense(row) and bool(row.get("dataset")) and "fidelity" in tasks(row)


def images(row: Mapping[str, Any]) -> int | None:
    """How many images the answers were judged on, None where the row does not say."""
    found = row.get("fidelity")
    count = number(row.get("n_images"))
    if count is None and isinstance(found, Mapping):
        count = number(found.get("n_images"))
    return None if count is None else int(count)


class Identity:
    """What each row is, seen among all rows of a report.

    Args:
        rows: All of them: which images are all images, and which weights were trained here, no row
            knows by itself.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._most: dict[str, int] = {}
        self._galleries: dict[str, tuple[int, str]] = {}
        trainings: dict[str, dict[str, Row]] = {}
        for row in rows:
            if has_quality(row):
                name = _split(row)
                self._most[name] = max(self._most.get(name, 0), images(row) or 0)
                if (found := _gallery(row)) is not None:
                    self._galleries[name] = max(self._galleries.get(name, found), found)
            if was_trained_here(row) and row.get("weights_sha"):
                trainings.setdefault(str(row["weights_sha"]), {})[str(row.get("seed"))] = row
        # Where only a reducer was trained, the backbone's hash is that of all its trainings.
        self._training = {k: rows.popitem()[1] for k, rows in trainings.items() if len(rows) == 1}

    def key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What has to be equal for two rows to be runs of one entry."""
        own = "" if trained(row) else weights(row)
        return self.setting(row), own, self.data(row), precision(row), *options(row)

    def setting(self, row: Mapping[str, Any]) -> str:
        """Method, arguments, budget, backbone, input size, plugins and training."""
        # A dense model has no budget: the runs of a sweep over budgets are the same run.
        dense = [DENSE, None, None]
        own = [row.get("method"), arguments(row), row.get("schedule")]
        return canonical(
            [
                *[canonical(part) for part in (dense if is_dense(row) else own)],
                backbone(row),
                row.get("img_size"),
                trained(row),
                canonical(self.training(row)),
                plugins(row),
            ]
        )

    def training(self, row: Mapping[str, Any]) -> Any:
        """How the weights were trained, where that was for the purpose and somebody says it."""
        if not trained(row):
            return None
        maker: Mapping[str, Any] = self._training.get(str(row.get("weights_sha")), {})
        found = row.get("training") or maker.get("training")
        if isinstance(found, Mapping) and found.get("start_sha"):
            # The same weights by another name are the same start.
            return {key: value for key, value in found.items() if key != "start"}
        return found or _typed(row if was_trained_here(row) else maker)

    def whole(self, row: Mapping[str, Any]) -> bool:
        """Whether a row was measured on as many images as any; a row that does not say was."""
        count = images(row)
        return count is None or count >= self._most.get(_split(row), 0)

    def data(self, row: Mapping[str, Any]) -> str:
        """Data set, split, and the number of images and the gallery where they are not usual."""
        label = _split(row) if self.whole(row) else f"{_split(row)}, {images(row):,} images"
        gallery = _gallery(row)
        if gallery is None or gallery == self._galleries.get(_split(row)):
            return label
        return f"{label}, in {gallery[0]:,} of {gallery[1]}"

    def of_a_training(self, row: Mapping[str, Any]) -> str:
        """With what the weights of a row were trained that claims no training; empty if given.

        Such as those of a fine-tuned reduced model that is run dense.
        """
        if trained(row):
            return ""
        found = row.get("training")
        if isinstance(found, Mapping):
            return str(found.get("method") or "something else")
        maker = self._training.get(str(row.get("weights_sha")))
        return "" if maker is None else str(maker.get("method") or "something else")

    def run(self, row: Mapping[str, Any]) -> str:
        """The run in words: its seeds. A later run of the same name replaces an earlier one.

        A row that evaluates trained weights does not know the seed that they were trained with; the
        row of the training does.
        """
        reducer = row.get("reducer")
        draw = reducer.get("seed") if isinstance(reducer, Mapping) else None
        drawn = [] if draw is None else [f"draw {draw}"]
        if not trained(row):
            return drawn[0] if drawn else f"seed {row.get('seed')}"
        maker: Mapping[str, Any] | None = self._training.get(str(row.get("weights_sha")))
        if was_trained_here(row):
            maker = row
        own = [f"weights {weights(row)[:12]}"] if maker is None and weights(row) else []
        return ", ".join([*own, f"seed {(maker or row).get('seed')}", *drawn])


def _gallery(row: Mapping[str, Any]) -> tuple[int, str] | None:
    """Size and split of what images were looked up in, None where they were not."""
    count = number(row.get("n_gallery"))
    return None if count is None else (int(count), str(row.get("gallery_split") or "the gallery"))


def _typed(row: Mapping[str, Any]) -> dict[str, str] | None:
    """What was typed for a training whose row says nothing else of it; older ones do not."""
    words = [word.partition("=") for word in str(row.get("command") or "").split()]
    typed = {name.lstrip("+"): value for name, equals, value in words if equals}
    found = {k: v for k, v in typed.items() if k not in _FREE and not k.startswith("hydra.")}
    return found or None


def _split(row: Mapping[str, Any]) -> str:
    dataset, split = row.get("dataset"), row.get("split")
    if not dataset:
        return "unnamed data"
    return f"{dataset} ({split})" if split else str(dataset)
