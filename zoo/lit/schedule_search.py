"""The Lightning recipe around `zoo.budget.search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo.budget.search import Found, ScheduleSearch, check_searchable
from zoo.errors import ZooError
from zoo.lit.classifier import Classifier

if TYPE_CHECKING:
    from zoo.model.reduced import ReducedViT


class SearchedSchedule(Classifier):
    """Find counts per block that keep a model's answers closest to the dense model's.

    Nothing is trained: the search runs before the first epoch, on training images without their
    labels, and the model is tested with what it found.

    Args:
        net: A model with a reducer of fixed counts and a schedule, whose cost is the budget.
        images: Calibration images.
        objective: See `zoo.budget.search.ScheduleSearch`.
        evaluations: Likewise.
        seconds: Likewise.
        seed: Likewise.
        cache: Likewise; a search that is repeated with the same file goes on where it stopped.
            None is `search.jsonl` in the folder of the run.
        **options: See `Classifier`.

    Raises:
        ZooError: If the model cannot be searched, or `images` is below 1.
    """

    volatile = frozenset({"schedule"})

    def __init__(
        self,
        net: ReducedViT,
        images: int = 256,
        objective: str = "kl",
        evaluations: int = 300,
        seconds: float | None = None,
        seed: int = 0,
        cache: str | None = None,
        **options: Any,
    ) -> None:
        if images < 1:
            raise ZooError(f"module.images must be 1 or more, got {images!r}")
        check_searchable(net)
        super().__init__(net, **options)
        self.images, self.cache = int(images), cache
        self.options: dict[str, Any] = {
            "objective": objective,
            "evaluations": evaluations,
            "seconds": seconds,
            "seed": seed,
        }
        self.found: Found | None = None

    def configure_optimizers(self) -> None:
        """Nothing is trained."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing is trained."""

    def on_fit_start(self) -> None:
        """Search.

        Raises:
            ZooError: On several devices, which would search several times.
        """
        if self.trainer.world_size > 1:
            raise ZooError("the search runs on one device; type trainer.devices=1")
        bar = self.trainer.progress_bar_callback
        cache = self.cache or Path(self.trainer.default_root_dir) / "search.jsonl"
        options = dict(self.options)
        if getattr(self.trainer, "fast_dev_run", False):
            options["evaluations"] = 3
        search = ScheduleSearch(self.net, self._calibration(), cache=cache, **options)
        self.found = search.run(progress=bool(getattr(bar, "is_enabled", bar)))
        self.net.schedule = self.found.schedule

    def _calibration(self) -> list[Tensor]:
        found: list[Tensor] = []
        missing = self.images
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009  (Lightning hides it)
        for images, _ in data.train_dataloader():
            found.append(images[:missing].to(self.device))
            missing -= len(found[-1])
            if missing <= 0:
                break
        return found

    def finish(self, folder: Path, write: bool) -> dict[str, Any]:
        """Write schedule.json."""
        found = self.found
        if found is None:
            return {}
        path = folder / "schedule.json"
        report = {
            "keep": found.schedule.keep,
            "prefix": 0,
            "backbone": self.net.recipe["backbone"]["name"],
            "reducer": self.net.recipe["reducer"],
            "gmacs": found.gmacs,
            "distance": found.score,
            "start": {
                "keep": found.start,
                "gmacs": found.start_gmacs,
                "distance": found.start_score,
            },
            "evaluations": found.evaluations,
            "complete": found.complete,
            "images": self.images,
            **self.options,
        }
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n")
            print(f"schedule: {path}")
        kind = self.options["objective"]
        return {
            "trained": False,
            "notes": (
                f"counts searched with {found.evaluations} schedules on {self.images} images "
                f"without labels; {kind} {found.score:.4g} against {found.start_score:.4g} before, "
                f"{found.gmacs:.4g} against {found.start_gmacs:.4g} GMACs"
            ),
        }
