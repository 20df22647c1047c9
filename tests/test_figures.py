"""The measures of the house are held, and the measuring itself is right."""

from __future__ import annotations

from pathlib import Path

from tests import figures


def test_figures_are_held() -> None:
    # `python -m tests.figures` names the files.
    assert not [figure for figure in figures.figures() if not figure.holds]


def test_every_module_lies_on_a_floor() -> None:
    for name in figures.modules():
        beside = any((name + ".").startswith(room + ".") for room in figures.BESIDE)
        assert beside or figures._room(name, figures.FLOORS) is not None, name
        if name.startswith("reduction"):
            assert figures._room(name, figures.REDUCTION) is not None, name


def test_imports_are_read_from_the_source(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{n}.py" for n in "abc")
    a.write_text("def f():\n    from zoo.b import x\n")
    b.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zoo.c\n")
    c.write_text("import zoo.a\nfrom . import b\n")
    graph = figures.imports({"zoo.a": a, "zoo.b": b, "zoo.c": c})
    assert graph == {"zoo.a": {"zoo.b"}, "zoo.b": set(), "zoo.c": {"zoo.a", "zoo.b"}}
    assert figures.circles(graph) == []
    b.write_text("def g():\n    import zoo.c\n")
    graph = figures.imports({"zoo.a": a, "zoo.b": b, "zoo.c": c})
    assert figures.circles(graph) == [["zoo.a", "zoo.b", "zoo.c"]]


def test_a_climb_is_found() -> None:
    assert figures.climbs({"zoo.run.train": {"zoo.model.stage", "zoo.data"}}) == []
    assert figures.climbs({"zoo.adapters.heads": {"zoo.model.stage"}})
    assert figures.climbs({"zoo.data.module": {"zoo.model.stage"}})
    assert figures.climbs({"reduction.functional.masking": {"reduction.methods.tome"}})
    assert figures.climbs({"reduction.tokens": {"zoo.errors"}})
