"""The account of timm's vision transformers: reasons, the page, and models tried one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm

import zoo
from zoo import backbones
from zoo.adapters.hollow import hollow
from zoo.adapters.reasons import REASONS, SUPPORTED
from zoo.cli import coverage
from zoo.errors import UnsupportedModel

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "vitamin_small_224",
        "naflexvit_base_patch16_gap",
        "eva02_tiny_patch14_224",
        "flexivit_small",
        "vit_small_patch16_18x2_224",
        "lookupvit_tiny_patch16_224",
    ],
)
def test_a_model_is_tried_without_data(name: str) -> None:
    if name not in timm.list_models(name):
        pytest.skip("no such model here")
    assert backbones.attempt(name)[1] == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "its attention mixes the maps of all heads"),
        ("swin_tiny_patch4_window7_224", "within windows of the raster"),
        ("hiera_tiny_224", "queries pool from stage to stage"),
        ("samvit_base_patch16_224", "convolutions over it stand behind"),
        ("xcit_nano_12_p16_224", "among channels"),
        ("resnet18", "no one sequence of tokens"),
    ],
)
def test_what_cannot_be_reduced_says_why(name: str, reason: str) -> None:
    with hollow():
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModel, match=f"is not supported: .*{reason}.*; supported are"):
        zoo.wrap(model, "tome")


def test_every_sentence_is_of_a_file_and_none_of_a_supported_one() -> None:
    assert not set(REASONS) & set(SUPPORTED)
    assert all("\n" not in reason and reason[-1] != "." for reason in REASONS.values())
    assert set(backbones.transformers()) <= {*REASONS, *SUPPORTED}


def test_the_page_is_what_was_tried() -> None:
    assert (ROOT / coverage.PAGE).read_text(encoding="utf-8") == coverage.page(ROOT)
    stores = sorted((ROOT / coverage.FOLDER).glob("timm-*.jsonl"))
    assert [store.stem for store in stores][0] == "timm-1.0.20"  # the oldest that is supported
    for store in stores:
        tried = [t for t in coverage.read(store) if t.file in SUPPORTED]
        assert len({t.name for t in tried}) == len(tried)
        assert sum(not t.problem for t in tried) >= 270
        # timm 1.0.20 passes this one's block an argument that it does not take.
        assert [t.name for t in tried if t.problem] in ([], ["eva02_enormous_patch14_clip_224"])
    known = json.loads(backbones.FILE.read_text(encoding="utf-8"))
    newest = coverage.read(ROOT / coverage.FOLDER / f"timm-{known['timm']}.jsonl")
    assert {t.name for t in newest if not t.problem} <= set(known["works"])


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families = {"beit": ["beit_base_patch16_224"], "cait": ["cait_xxs24_224", "cait_s24_224"]}
    tried: list[str] = []

    def attempt(name: str) -> tuple[str, str]:
        tried.append(name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return "Kind", "" if name.startswith("beit") else "a reason"

    monkeypatch.setattr(backbones, "transformers", lambda: families)
    monkeypatch.setattr(backbones, "attempt", attempt)
    with pytest.raises(KeyboardInterrupt):
        coverage.try_all(tmp_path)
    found = coverage.try_all(tmp_path)
    assert tried == ["beit_base_patch16_224", "cait_xxs24_224", "cait_xxs24_224", "cait_s24_224"]
    assert [t.problem for t in found] == ["", "a reason", "a reason"]
    assert f"| {timm.__version__} | 1 | 1 | 2 |" in coverage.page(tmp_path)
