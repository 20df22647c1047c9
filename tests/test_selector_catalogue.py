"""Selectors on the command line and in configuration files."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import hydra.utils
import pytest
from omegaconf import OmegaConf

import reduction
from reduction.selection.registry import SELECTORS
from zoo.cli import selectors
from zoo.cli.main import main
from zoo.published import config_folder

NAMES = reduction.list_selectors()
OPTIONS = sorted(p.stem for p in (config_folder() / "selector").glob("*.yaml"))


def test_every_selector_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--selectors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(NAMES)]] == NAMES
    assert all(len(line) <= 80 for line in lines)
    assert main(["list", "--selectors", "pru*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == ["prumerge", "prumerge_plus", "prunesid"]
    assert found[0]["arxiv"] == "2403.15388"


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_is_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", name, "--selector"]) == 0
    text = capsys.readouterr().out
    card = SELECTORS.get(name).card
    assert text.startswith(f"{name}: {card.title[:20]}")
    for option in inspect.signature(SELECTORS.get(name)).parameters:
        assert f"selector.{option}=" in text


def test_a_selector_is_shown_unless_a_method_is_called_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "visionzip"]) == 0
    assert "selector" in capsys.readouterr().out
    assert main(["show", "random"]) == 0
    assert "Random token dropping" in capsys.readouterr().out
    for words in (["show", "visonzip"], ["list", "--selectors", "visonzip"]):
        assert main(words) == 2
        assert "did you mean 'visionzip'" in capsys.readouterr().err
    assert main(["show", "tome", "--selector"]) == 2
    assert "unknown selector 'tome'" in capsys.readouterr().err
    assert main(["list", "--selectors", "--models"]) == 2


def test_listing_imports_no_torch() -> None:
    for words in (["list", "--selectors"], ["show", "scope"]):
        code = (
            f"import sys; from zoo.cli.main import main; main({words!r}); "
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_stored_catalogue_is_what_the_classes_say() -> None:
    assert selectors.STORED.file.read_text(encoding="utf-8") == selectors.STORED.text()


def test_selectors_and_options_are_the_same() -> None:
    assert OPTIONS == NAMES


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_says_every_argument_with_its_default(option: str) -> None:
    node = OmegaConf.load(config_folder() / "selector" / f"{option}.yaml")
    cls = SELECTORS.get(option)
    given = {str(k): v for k, v in OmegaConf.to_container(node).items() if k != "_target_"}
    defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    assert given == defaults
    made = hydra.utils.instantiate(node)
    assert type(made) is cls and made.config() == reduction.create_selector(option).config()
