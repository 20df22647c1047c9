"""TCA: the released code, its random first centre injected."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

import zoo
from reduction import Signals, Step, Tokens
from reduction.assignment import Merge
from reduction.methods.tca import TCA
from reduction.schedules.keep_rate import KeepRate
from tests.parity.fixture import Case, Fixture
from tests.parity.runner import handles
from tests.parity.stages import check_blocks, check_counts, evaluated


class Recorded(TCA):
    """TCA with given first centres, that remembers what it chose."""

    def __init__(self, starts: dict[int, Tensor], **args: object) -> None:
        super().__init__(**args)
        self.starts = starts
        self.chosen: dict[int, tuple[Merge, int, int]] = {}

    def first_center(self, score: Tensor, step: Step) -> Tensor:
        return self.starts[step.block]

    def assign(self, t: Tokens, s: Signals, step: Step) -> Merge:
        found = super().assign(t, s, step)
        whole, members, _ = self._shares(t.n, step.keep)
        self.chosen[step.block] = (found, whole, members)
        return found


def check_choices(case: Case, fx: Fixture, reducer: Recorded) -> None:
    """Tokens kept, tokens in groups, and the group of each."""
    for stage, block in enumerate(fx.info["stage_blocks"]):
        stored = fx.group(f"stage{stage}.")
        found, whole, members = reducer.chosen[block]
        case.equal(f"stage{stage}.kept", found.leader[:, :whole], stored["kept_rel"])
        body = stored["coreset_rel"]
        case.equal(f"stage{stage}.members", members, body.shape[1])
        groups = found.slot.gather(1, body) - whole
        case.equal(f"stage{stage}.assignment", groups, stored["coreset_assignment"])
        last = found.leader.shape[1] - 1
        sizes = (found.slot == last).sum(1)
        rest = found.slot.shape[1] - whole - members
        case.equal(f"stage{stage}.extra", sizes.tolist(), [rest] * len(sizes))


@handles("tca")
def tca(fx: Fixture) -> Iterator[Case]:
    config, extra = fx.config, {}
    if "norm_layer" in fx.info["timm"]:
        eps = float(fx.info["timm"]["norm_layer"].split("eps=")[1].rstrip(")"))
        extra["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    blocks = config["drop_loc"]
    starts = {
        block: fx.tensors[f"stage{s}.coreset_start"]
        for s, block in enumerate(fx.info["stage_blocks"])
    }
    reducer = Recorded(
        starts,
        centers=config["num_centers"],
        counting=config.get("counting", "release"),
        anchors=int(config.get("anchors", 0)),
    )
    schedule = KeepRate(1 - config["drop_rate"], blocks, rounding="ceil", of="current")
    model = zoo.wrap(fx.backbone(**extra), reducer, schedule).eval()
    if "anchors" in fx.tensors:
        reducer.set_anchors(fx.tensors["anchors"].float())
    case, info = evaluated(fx, model)
    check_counts(case, fx, model, info)
    check_blocks(case, fx, model, info)
    check_choices(case, fx, reducer)
    yield case
