"""Every method on every family of models, with and without CLCA: works, or says why not."""

from __future__ import annotations

import pytest

import reduction
from tests import composition
from tests.covering import every


@pytest.mark.parametrize("name", every(["none", *reduction.list_methods()], 6))
def test_it_works_or_is_refused_in_one_sentence(name: str) -> None:
    for family in composition.COLUMNS:
        for plugin in composition.PLUGINS:
            works, said = composition.attempt(name, family, plugin)
            assert works or said
    # What a paper was written for is not negotiable.
    assert composition.attempt(name, "plain", "none")[0]
    if composition.PAGE.is_file():
        cells = [composition.cell(name, family) for family in composition.COLUMNS]
        assert composition.written(name) == cells, "run `python -m tests.composition`"


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    if not composition.PAGE.parent.is_dir():
        pytest.skip("needs a checkout: the documentation")
    assert composition.main(["--check"]) == 0, "run `python -m tests.composition`"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(composition, "PAGE", tmp_path / "composition.md")
    monkeypatch.setattr(composition, "page", lambda: "new\n")
    (tmp_path / "composition.md").write_text("old\n")
    assert composition.main(["--check"]) == 1
    assert "run `python -m tests.composition`" in capsys.readouterr().err
    assert composition.main([]) == 0 == composition.main(["--check"])
