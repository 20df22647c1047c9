"""Options that all parts of a kind have, without each of them saying so; those of reducers.

What a method publishes is one thing; whether later attentions see how many patches a token stands
for, and whether a dropped token is handed on, are questions that can be put to all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from reduction.assignment import Assignment, Keep
from reduction.checks import one_of
from reduction.config import Configured
from reduction.counts import Dims
from reduction.errors import ZooError
from reduction.functional.settling import hand_on
from reduction.tokens import Tokens

PropAttn = bool | Literal["paper"]
Settle = Literal["drop", "nearest"]


class Option(NamedTuple):
    """What constructors take beside their own arguments.

    Attributes:
        default: What it is where nothing was given.
        hint: Its type.
        text: Its type as it would be written.
    """

    default: Any
    hint: Any
    text: str


class WithOptions(type):
    """Class of parts with common options: takes them off a constructor's arguments.

    A class says in `common_options` which there are, and in `choose` what they do. One that has an
    argument of the same name itself gets it, because more may hang on it there.
    """

    def common_options(cls) -> Mapping[str, Option]:
        """The options that all have; a class method of the base of all parts."""
        return {}

    @property
    def __signature__(cls) -> inspect.Signature:
        """The arguments of the constructor, and the common ones behind them."""
        own = list(_constructor(cls).parameters.values())
        kind = inspect.Parameter.KEYWORD_ONLY
        more = [
            inspect.Parameter(name, kind, default=option.default, annotation=option.text)
            for name, option in cls._common().items()
        ]
        last = [p for p in own if p.kind is p.VAR_KEYWORD]
        return inspect.Signature([*(p for p in own if p not in last), *more, *last])

    @property
    def common_hints(cls) -> dict[str, Any]:
        """Annotations of the common options."""
        return {name: option.hint for name, option in cls.common_options().items()}

    def form_for(cls, chosen: Mapping[str, Any]) -> type:
        """The class to build where options were chosen; a class method of parts with forms."""
        return cls

    def __call__(cls, *args: Any, **given: Any) -> Any:
        """Build a part."""
        known, common = cls.common_options(), cls._common()
        chosen = {k: given.pop(k) for k in common if k in given}
        for name in known.keys() - common.keys() & given.keys():
            # What only the common option says is not for the constructor: its own default holds.
            if given[name] == known[name].default and isinstance(given[name], str):
                del given[name]
        made = type.__call__(cls.form_for(chosen), *args, **given)
        made.choose(**chosen)
        return made

    def _common(cls) -> dict[str, Option]:
        own = _constructor(cls).parameters
        return {k: v for k, v in cls.common_options().items() if k not in own}


class Optioned(Configured, metaclass=WithOptions):
    """What the common options do; no method has to know of it.

    Attributes:
        prop_attn: Whether attention adds log(size) to its logits (proportional attention).
        drops: Whether `assign` answers with a plain `Keep` in evaluation, so that `settle` has a
            say in what becomes of the others.
    """

    prop_attn: bool = False
    drops: ClassVar[bool] = False
    _chosen: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def common_options(cls) -> Mapping[str, Option]:
        """`prop_attn`, and `settle` where tokens are dropped."""
        found = {"prop_attn": Option("paper", PropAttn, "bool | str")}
        if cls.drops:
            found["settle"] = Option("drop", Settle, "str")
        return found

    def choose(self, prop_attn: PropAttn = "paper", settle: Settle = "drop") -> None:
        """Set the options that every method has; called once, behind the constructor.

        Raises:
            ZooError: If a value is none of these.
        """
        chosen: dict[str, Any] = {}
        if prop_attn_choice(prop_attn) != "paper":
            self.prop_attn = chosen["prop_attn"] = bool(prop_attn)
        if one_of("settle", settle, ("drop", "nearest")) != "drop":
            chosen["settle"] = settle
        self._chosen = chosen

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, and the common options where one was chosen."""
        return {**super().arguments(), **self._chosen}

    @property
    def hands_on(self) -> bool:
        """Whether dropped tokens are given to kept ones."""
        return "settle" in self._chosen

    def settled(self, t: Tokens, a: Assignment) -> Assignment:
        """An assignment after `settle` had its say: as it is, or dropped tokens handed on."""
        return hand_on(t, a.index) if self.hands_on and isinstance(a, Keep) else a

    def settle_macs(self, n: int, kept: int, dims: Dims) -> int:
        """Multiply-accumulates of handing on all but `kept` of `n` tokens, for one image."""
        return (n - kept) * kept * dims.width if self.hands_on else 0


def _constructor(cls: type) -> inspect.Signature:
    """Arguments of a class's own constructor, without `self`."""
    found = inspect.signature(vars(cls).get("__init__", cls.__init__))  # type: ignore[misc]
    return found.replace(parameters=list(found.parameters.values())[1:])


def prop_attn_choice(value: Any) -> PropAttn:
    """Read `prop_attn=paper|true|false`.

    Raises:
        ZooError: If it is something else.
    """
    if value == "paper" or isinstance(value, bool):
        return value  # type: ignore[no-any-return]
    raise ZooError(f"prop_attn must be true, false or 'paper' (as published), got {value!r}")
