"""Token reduction for vision transformers, in plain torch.

This package knows nothing of timm or Lightning: tokens, assignments, reducers, selectors and
schedules work on tensors. `zoo` attaches them to models.
"""

from reduction.assignment import Assignment, Fuse, Keep, Merge, Mix, apply, unmerge
from reduction.base import Card, Reducer
from reduction.counts import Budget, Dims, Spec, Step
from reduction.errors import UnknownName, UnreachableBudget, ZooError
from reduction.mixins.adaptive import Adaptive
from reduction.mixins.answer import OwnAnswer
from reduction.mixins.attention import AttentionInput, AttentionOutput, ExtraKeys, OwnAttention
from reduction.mixins.entry import AtInput
from reduction.mixins.following import Extends, Follows, Remembers
from reduction.mixins.images import SeesImages
from reduction.mixins.learned import Learned, Queries, Staged
from reduction.mixins.masking import Masked
from reduction.mixins.parking import Parks
from reduction.mixins.ranking import ScoreReducer
from reduction.mixins.training import Outcome, Trains
from reduction.registry import (
    card,
    create,
    create_reducer,
    create_schedule,
    list_methods,
    list_schedules,
    register,
)
from reduction.schedules.base import Schedule
from reduction.schedules.constant_r import ConstantR, parse_r
from reduction.schedules.geometric import Geometric
from reduction.schedules.keep_rate import KeepRate
from reduction.schedules.per_block import PerBlock
from reduction.schedules.target import Target, TargetGmacs, register_family
from reduction.selection.base import Selection, Selector
from reduction.selection.registry import (
    create_selector,
    list_selectors,
    register_selector,
    retained_count,
    retained_mask,
    select,
    signals_of,
)
from reduction.tokens import Signals, Tokens

__all__ = [
    "Adaptive",
    "Assignment",
    "AtInput",
    "AttentionInput",
    "AttentionOutput",
    "Budget",
    "Card",
    "ConstantR",
    "Dims",
    "Extends",
    "ExtraKeys",
    "Follows",
    "Fuse",
    "Geometric",
    "Keep",
    "KeepRate",
    "Learned",
    "Masked",
    "Merge",
    "Mix",
    "Outcome",
    "OwnAnswer",
    "OwnAttention",
    "Parks",
    "PerBlock",
    "Queries",
    "Reducer",
    "Remembers",
    "Schedule",
    "ScoreReducer",
    "SeesImages",
    "Selection",
    "Selector",
    "Signals",
    "Spec",
    "Staged",
    "Step",
    "Target",
    "TargetGmacs",
    "Tokens",
    "Trains",
    "UnknownName",
    "UnreachableBudget",
    "ZooError",
    "apply",
    "card",
    "create",
    "create_reducer",
    "create_schedule",
    "create_selector",
    "list_methods",
    "list_schedules",
    "list_selectors",
    "parse_r",
    "register",
    "register_family",
    "register_selector",
    "retained_count",
    "retained_mask",
    "select",
    "signals_of",
    "unmerge",
]
