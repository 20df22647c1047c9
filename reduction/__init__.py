"""Token reduction for vision transformers, in plain torch.

This package knows nothing of timm or Lightning: tokens, assignments, reducers and schedules work
on tensors. `zoo` attaches them to models.
"""

from reduction.assignment import Assignment, Fuse, Keep, Merge, Mix, apply, unmerge
from reduction.base import (
    AttentionInput,
    AttentionOutput,
    Card,
    Outcome,
    Reducer,
    ScoreReducer,
)
from reduction.counts import Budget, Dims, Spec, Step
from reduction.errors import UnknownName, UnreachableBudget, ZooError
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
from reduction.tokens import Signals, Tokens

__all__ = [
    "Assignment",
    "AttentionInput",
    "AttentionOutput",
    "Budget",
    "Card",
    "ConstantR",
    "Dims",
    "Geometric",
    "Fuse",
    "Keep",
    "KeepRate",
    "Merge",
    "Mix",
    "Outcome",
    "PerBlock",
    "Reducer",
    "Schedule",
    "ScoreReducer",
    "Signals",
    "Spec",
    "Step",
    "Target",
    "TargetGmacs",
    "Tokens",
    "UnknownName",
    "UnreachableBudget",
    "ZooError",
    "apply",
    "card",
    "create",
    "create_reducer",
    "create_schedule",
    "list_methods",
    "list_schedules",
    "parse_r",
    "register",
    "register_family",
    "unmerge",
]
