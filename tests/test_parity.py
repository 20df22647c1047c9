"""Every golden fixture through the public API."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.fixture import Case
from tests.parity.runner import find, main, run_fixture

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", find(GOLDEN), ids=lambda p: p.stem)
def test_fixture(path: Path) -> None:
    cases = run_fixture(path)
    assert all(c.status == "PASS" for c in cases), "\n".join(c.line() for c in cases)


def test_a_wrong_fixture_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "tome_matching_functions"
    text = (GOLDEN / f"{name}.json").read_text()
    (tmp_path / f"{name}.json").write_text(text.replace('"T_out": 5', '"T_out": 4'))
    (tmp_path / f"{name}.safetensors").write_bytes((GOLDEN / f"{name}.safetensors").read_bytes())
    assert main(tmp_path) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_unknown_method_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"method": "nobody", "fixture": "x"}')
    assert main(tmp_path) == 1


def test_a_case_that_compared_nothing_has_not_passed() -> None:
    assert Case("x", "y").status == "FAIL"
