"""DCT: the public port to images."""

from __future__ import annotations

from collections.abc import Iterator

from tests.parity.fixture import Case, Fixture
from tests.parity.pitome import ratio_or_count
from tests.parity.runner import handles
from tests.parity.stages import run_cases


@handles("dct")
def dct(fx: Fixture) -> Iterator[Case]:
    yield from run_cases(fx, "dct", ratio_or_count(fx))
