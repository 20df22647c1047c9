"""Token reduction for vision transformers, in plain torch.

This package knows nothing of timm or Lightning: tokens, assignments, reducers and schedules work
on tensors. `zoo` attaches them to models.
"""

from reduction.assignment import Assignment, Keep, Merge, Mix, apply, unmerge
from reduction.base import (
    AttentionInput,
    AttentionOutput,
    Budget,
    Card,
    Dims,
    Outcome,
    Reducer,
    ScoreReducer,
    Spec,
    Step,
)
from reduction.errors import UnknownName, UnreachableBudget, ZooError
from reduction.geometric import Geometric
from reduction.registry import card, create, create_reducer, list_methods, register
from reduction.schedule import (
    ConstantR,
    KeepRate,
    PerBlock,
    Schedule,
    create_schedule,
    list_schedules,
    parse_r,
)
from reduction.target import Target, TargetGmacs, register_family
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
