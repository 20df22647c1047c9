"""Arguments of methods and schedules are checked: whatever is given, one sentence answers."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

import reduction
import zoo
from reduction import ZooError, checks, create_schedule
from reduction.registry import method
from reduction.schedules.base import SCHEDULES
from tests.cases import backbone, images

BAD: tuple[Any, ...] = ("a", "", None, [], {}, [None], True, math.nan, math.inf, -math.inf, 1j)
METHODS = reduction.list_methods()
# What tests of other files leave behind is no part of the library.
NAMED = [n for n in reduction.list_schedules() if SCHEDULES[n].__module__.startswith("reduction.")]


def options(cls: type) -> list[inspect.Parameter]:
    found = inspect.signature(cls).parameters.values()
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def kinds(parameter: inspect.Parameter) -> set[str]:
    return set(str(parameter.annotation).replace("Sequence[", "list[").split(" | "))


def fits(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether the annotation allows the value at all."""
    types = kinds(parameter)
    if value is None:
        return "None" in types
    if isinstance(value, bool):
        return "bool" in types
    if isinstance(value, str):
        return "str" in types
    if isinstance(value, list | dict):
        return any(t.startswith(("list", "Mapping")) for t in types)
    return False  # not a number, infinite, complex


def check(build: Any, parameter: inspect.Parameter, value: Any) -> None:
    what = f"{parameter.name}={value!r}"
    try:
        build(**{parameter.name: value})
    except ZooError as error:
        assert "\n" not in str(error), what
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    else:
        assert fits(value, parameter), f"{what} was taken"


@pytest.mark.parametrize("name", METHODS)
def test_every_argument_of_every_method_is_checked(name: str) -> None:
    for parameter in options(method(name)):
        for value in BAD:
            check(lambda **args: reduction.create(name, **args), parameter, value)


@pytest.mark.parametrize("name", NAMED)
def test_every_argument_of_every_schedule_is_checked(name: str) -> None:
    needed = {"constant_r": {"r": 3}, "per_block": {"keep": [3]}}
    needed["radius"] = {"pattern": "l2", "start": 1, "stop": 3}
    for parameter in options(SCHEDULES[name]):
        for value in BAD:
            base = needed.get(name, {})
            if name == "per_block" and parameter.name == "file":
                base = {}
            check(
                lambda base=base, **a: create_schedule({"name": name, **base, **a}),
                parameter,
                value,
            )


def test_the_same_sentence_everywhere() -> None:
    for call, says in [
        (lambda: checks.one_of("mode", "c", ("a", "b")), "mode must be one of ('a', 'b'), got 'c'"),
        (lambda: checks.one_of("osa", True, (0, 1)), "osa must be one of (0, 1), got True"),
        (lambda: checks.boolean("fuse", 1), "fuse must be true or false, got 1"),
        (lambda: checks.number("x", math.nan), "x must be a finite number, got nan"),
        (lambda: checks.number("x", -1, 0), "x must be 0 or more, got -1"),
        (lambda: checks.positive("tau", 0.0), "tau must be positive, got 0.0"),
        (lambda: checks.positive("t", "a", null=True), "t must be positive, or null, got 'a'"),
        (lambda: checks.share("s", 1.5), "s must be in [0, 1], got 1.5"),
        (lambda: checks.share("s", 0, zero=False), "s must be in (0, 1], got 0"),
        (lambda: checks.share("s", 1, one=False), "s must be in [0, 1), got 1"),
        (lambda: checks.share("s", 0.6, most=0.5), "s must be in [0, 0.5], got 0.6"),
        (lambda: checks.count("k", 0), "k must be 1 or more, got 0"),
        (lambda: checks.count("k", 2.0, null=True), "k must be 1 or more, or null, got 2.0"),
        (lambda: checks.listed("l", "abc"), "l must be a list, got 'abc'"),
        (lambda: checks.shares("r", []), "r must hold at least one number, got []"),
        (lambda: checks.shares("r", [0.5, 2]), "r must be in (0, 1], got 2"),
    ]:
        with pytest.raises(ZooError) as refused:
            call()
        assert str(refused.value) == says


def test_what_fits_is_given_back() -> None:
    numpy = pytest.importorskip("numpy")
    assert checks.count("k", numpy.int64(3)) == 3 and checks.positive("x", numpy.float32(0.5)) > 0
    assert checks.one_of("mode", "a", {"a": 1}) == "a" and checks.boolean("b", False) is False
    assert checks.number("x", None, null=True) is None and checks.share("s", 0) == 0
    assert checks.shares("r", (0.5, 1)) == [0.5, 1] and checks.shares("r", 0.5) == 0.5
    with pytest.raises(ZooError):
        checks.positive("x", torch.ones(2))


#: Of the right type as a rule, and out of most ranges.
ODD: tuple[Any, ...] = (-1, 0, 1e30, math.nan, math.inf, "x", [], True)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_an_odd_argument_is_refused_or_answers_with_numbers(name: str) -> None:
    dense, x = backbone("plain"), images(1)
    for parameter in options(method(name)):
        for value in ODD:
            what = f"{parameter.name}={value!r}"
            try:
                with torch.no_grad():
                    reducer = method(name)(**{parameter.name: value})
                    logits = zoo.wrap(dense, reducer).eval()(x)
            except ZooError as error:
                assert "\n" not in str(error), what
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            else:
                assert logits.isfinite().all(), what


@pytest.mark.parametrize("name", METHODS)
def test_no_loss_is_to_be_as_large_as_possible(name: str) -> None:
    for parameter in options(method(name)):
        if parameter.name.endswith("_weight") and parameter.annotation == "float":
            with pytest.raises(ZooError, match=f"{parameter.name} must be 0 or more, got -1"):
                method(name)(**{parameter.name: -1})


def test_ratios_are_one_per_stage() -> None:
    for name in ("dynamicvit", "dtps"):
        with pytest.raises(ZooError, match="one share per stage"):
            method(name)(ratios=[])
        with pytest.raises(ZooError, match="expected one share per stage, and the schedule has"):
            zoo.wrap(backbone("plain"), {"name": name, "ratios": [0.5]})
