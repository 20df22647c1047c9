"""Pictures of what becomes of an image's patches: they show what the model did."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from tests.browser import browser, find
from tests.cases import backbone
from zoo.checkpoint import save_pretrained
from zoo.cli.main import main
from zoo.data.checks import data_config
from zoo.errors import UnsupportedModel, ZooError
from zoo.report import write_report
from zoo.results.rows import new_row, read_rows
from zoo.visual.drawing import DARK, draw, fate_of
from zoo.visual.photographs import files_of, look, on_cells
from zoo.visual.sheet import chosen_states
from zoo.visual.trail import State

Run = Callable[[str], tuple[int, str, str]]
R6 = {"name": "constant_r", "r": 6}


def photo(width: int = 90, height: int = 60) -> Image.Image:
    y, x = np.indices((height, width))
    pixels = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    photo().save(tmp_path / "a.png")

    def call(line: str) -> tuple[int, str, str]:
        code = main(["eval", *shlex.split(line)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize(
    "name", ["tome", "topk", "evit", "token_pooling", "diffrate", "ats", "ltmp", "pixelprune"]
)
def test_a_trail_is_the_models_own_source_map(name: str) -> None:
    model = zoo.load("vit_digits", reducer=name)
    trail = zoo.visualize(model, photo()).trail()
    tensor = look(model, [photo()])[0].tensor
    with torch.no_grad():
        _, info = model.eval()(tensor, return_info="trace")
    assert trail.grid == info.grid and len(trail.states) == model.depth + 1
    for state, t in zip(trail.states[1:], info.trace, strict=True):
        assert np.array_equal(state.source, t.source[0].numpy())
        kept, merged, dropped = fate_of(state).counts()
        assert kept + merged + dropped == 64
        slots = len(set(state.source[state.source >= 0].tolist()))
        assert slots + model.prefix == state.tokens
    assert trail.counts[0] == 65


def test_the_model_stays_as_it_was() -> None:
    model = zoo.load("vit_digits", reducer="patchmerger", schedule={"name": "keep_rate"}).train()
    model.backbone.blocks[0].eval()
    before = [(name, m.training) for name, m in model.named_modules()]
    assign = model.reducer.assign
    zoo.visualize(model, photo())
    assert [(name, m.training) for name, m in model.named_modules()] == before
    assert model.reducer.assign == assign and "assign" not in vars(model.reducer)


@pytest.mark.parametrize("name", ["patchmerger", "sit", "sinkhorn", "dct", "tokenlearner"])
def test_mixtures_are_drawn_as_shares_and_say_so(name: str) -> None:
    model = zoo.load("vit_digits", reducer=name, schedule={"name": "keep_rate", "rate": 0.5})
    seen = zoo.visualize(model, photo())
    last = seen.trail().states[-1]
    assert last.heat is not None and last.heat.max() == pytest.approx(1)
    assert any("mixtures" in remark for remark in seen.trail().remarks)
    assert "mixtures" in seen.html()


def test_the_shares_of_two_mixtures_multiply() -> None:
    schedule = {"name": "per_block", "keep": [None, 32, 8, None, None, None]}
    model = zoo.load("vit_digits", reducer="sit", schedule=schedule)
    states = zoo.visualize(model, photo()).trail().states
    assert states[1].heat is None  # nothing is mixed yet
    one, two = states[2].heat, states[3].heat
    assert one is not None and two is not None and one.shape == two.shape == (64,)
    # What reaches the end counts in the product of both matrices, not in the second alone.
    assert not np.allclose(one, two) and np.array_equal(two, states[-1].heat)


def test_what_is_switched_or_set_aside_is_said() -> None:
    parked = zoo.visualize(zoo.load("vit_digits", reducer="evovit"), photo()).trail()
    assert any("set aside" in remark for remark in parked.remarks)
    assert min(parked.counts) < 65  # seen from inside the stage, not behind it
    gated = zoo.visualize(zoo.load("vit_digits", reducer="adavit"), photo()).trail()
    assert any("nothing to draw" in remark for remark in gated.remarks)


def test_adaptive_methods_give_every_image_its_own_counts() -> None:
    model = zoo.load("vit_digits", reducer="ats")
    flat = Image.new("RGB", (40, 40), "white")
    both = zoo.visualize(model, [photo(), flat])
    assert both.trail(0).counts != both.trail(1).counts
    for i, image in enumerate([photo(), flat]):
        assert zoo.visualize(model, image).trail().counts == both.trail(i).counts


@pytest.mark.parametrize("name", ["plain", "distilled", "gap", "registers", "eva02", "dinov3"])
def test_every_kind_of_tower_can_be_looked_at(name: str) -> None:
    model = zoo.wrap(backbone(name), "tome", R6)
    seen = zoo.visualize(model, photo())
    trail, picture = seen.images[0][1][0]
    rows, columns = model.grid
    assert trail.grid == model.grid and trail.counts[0] == rows * columns + model.prefix
    tall, wide = model.tower.patch_size(model.backbone)
    assert picture.size == (columns * wide, rows * tall)
    assert seen.sheet().width > 600


def test_grids_that_are_no_squares() -> None:
    m = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=2, embed_dim=24)
    seen = zoo.visualize(zoo.wrap(m, "tome", {"name": "constant_r", "r": 2}), photo())
    assert seen.trail().grid == (2, 4)
    assert seen.picture(cell=10).size == (40, 20)


def test_the_picture_is_what_the_model_saw() -> None:
    model = zoo.wrap(backbone("plain"), None)
    (seen,) = look(model, [photo()])
    # Cropped as for evaluation, and back in the colours that it had before it was normalised.
    size = model.tower.input_size(model.backbone)[1:]
    assert seen.picture.size == size[::-1] and tuple(seen.tensor.shape[2:]) == size
    config = data_config(model)
    back = (np.asarray(seen.picture) / 255 - np.array(config["mean"])) / np.array(config["std"])
    assert np.allclose(back.transpose(2, 0, 1), seen.tensor[0].numpy(), atol=0.02)


def test_a_rim_without_patches_is_left_out_and_padding_is_grey() -> None:
    class Cells:
        def patch_size(self, m: Any) -> tuple[int, int]:
            return 16, 16

    tower: Any = Cells()
    picture = Image.new("RGB", (70, 40), "red")
    assert on_cells(picture, tower, None, (2, 4)).size == (64, 32)
    padded = on_cells(picture, tower, None, (3, 5))
    assert padded.size == (80, 48)
    assert padded.getpixel((79, 47)) != (255, 0, 0) == padded.getpixel((5, 5))
    # Patches that overlap: the grid covers the whole picture.
    assert on_cells(picture, tower, None, (8, 14)).size == (70, 40)


def test_colours_say_what_became_of_a_patch() -> None:
    picture = Image.fromarray(np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5)
    state = State("block 0", np.array([0, 1, 1, -1]), 3)
    drawn = np.asarray(draw(picture, (2, 2), state, 2)).astype(int)
    pixels = np.asarray(picture).astype(int)
    assert (drawn[0, 0] == pixels[0, 0]).all()  # kept; on its right and below lie outlines
    mean = np.concatenate([pixels[:2, 2:].reshape(-1, 3), pixels[2:, :2].reshape(-1, 3)]).mean(0)
    assert np.allclose(drawn[0, 2], mean, atol=1)
    assert np.abs(drawn[3, 3] - np.array(DARK)).max() < 60
    dense = State("input", np.arange(4), 5)
    assert (np.asarray(draw(picture, (2, 2), dense, 2)) == pixels).all()


def test_selectors_show_kept_patches_and_every_number_of_them() -> None:
    model = zoo.load("vit_digits")
    trail = zoo.visualize(model, photo(), selector="visionzip", keep=[16, 8]).trail()
    sixteen, eight = trail.states[-2:]
    assert (sixteen.label, eight.label) == ("visionzip 16", "visionzip 8")
    assert sixteen.kept is not None and eight.kept is not None
    assert 0 < eight.kept.sum() < sixteen.kept.sum() <= 16
    tower = zoo.selector(model, "scope", keep=10)
    found = zoo.visualize(tower, photo())
    assert found.trail().states[-1].kept.sum() == 10 and found.trail().name == "scope"
    assert zoo.visualize(tower, photo(), keep=4).trail().states[-1].kept.sum() == 4
    with pytest.raises(ZooError, match="keep=4 is for a selector.*leave keep out"):
        zoo.visualize(model, photo(), keep=4)


def test_attention_is_that_of_attention_maps() -> None:
    model = zoo.load("vit_digits", reducer="tome", schedule=R6)
    trail = zoo.visualize(model, photo(), attention=True).trail()
    maps = zoo.attention_maps(model, look(model, [photo()])[0].tensor)
    for state, found in zip(trail.states[1:], maps, strict=True):
        seen = found.on_patches()[0].mean(0).flatten().detach().numpy()
        assert np.allclose(state.attention, seen, atol=1e-6)
    few = zoo.attention_maps(model, torch.zeros(1, 1, 16, 16), queries=1)
    assert few[0].weights.shape[2] == 1
    with pytest.raises(ZooError, match="from 1"):
        zoo.attention_maps(model, torch.zeros(1, 1, 16, 16), queries=0)
    with pytest.raises(ZooError, match="no class token"):
        zoo.visualize(zoo.wrap(backbone("gap"), None), photo(), attention=True)


def test_a_sheet_shows_the_blocks_in_which_something_changed() -> None:
    model = zoo.load("vit_digits", reducer="topk", schedule={"name": "keep_rate", "blocks": [2]})
    trail = zoo.visualize(model, photo()).trail()
    assert [trail.states[i].label for i in chosen_states(trail, 7)] == [
        "input",
        "block 2",
        "block 5",
    ]
    seen = zoo.visualize(model, photo())
    assert len(chosen_states(seen.trail(), 2)) == 2
    for draws in (seen.sheet, seen.strip):
        with pytest.raises(ZooError, match="at least 2"):
            draws(most=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere.jpg", "no such file"),
        ("*.xyz", "no file is called so"),
        ([], "no images"),
        (np.zeros((4, 4), dtype=np.float32), "8 bits"),
        (torch.zeros(2, 2), "expected a tensor"),
        (3, "expected images, got int"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(given: Any, words: str) -> None:
    with pytest.raises(ZooError, match=words) as error:
        zoo.visualize(zoo.load("vit_digits"), given)
    assert "\n" not in str(error.value)


def test_damaged_and_tiny_files(tmp_path: Path) -> None:
    model = zoo.load("vit_digits", reducer="tome", schedule=R6)
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    assert zoo.visualize(model, tmp_path / "one.png").trail().counts[0] == 65
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ZooError, match=r"bad\.png"):
        zoo.visualize(model, tmp_path / "bad.png")
    with pytest.raises(ZooError, match="holds no images"):
        (tmp_path / "empty").mkdir()
        files_of(tmp_path / "empty")
    assert len(files_of([tmp_path / "one.png", str(tmp_path / "o*.png")])) == 1  # each once


def test_names_with_line_breaks_are_drawn_in_one_line() -> None:
    models = {"one\nname": zoo.load("vit_digits")}
    seen = zoo.visualize(models, photo(), title="two\nlines")
    assert seen.sheet().width > 600 and seen.strip().width > 100 and seen.tokens().width == 900


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        photo().save(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    seen = zoo.visualize(zoo.load("vit_digits"), tmp_path)
    (page,) = seen.save(tmp_path / "see.html")
    assert seen.save(tmp_path / "see.png")[0].stat().st_size > 1000
    text = page.read_text(encoding="utf-8")
    found = re.search(r'id="payload">(.*?)</script>', text, re.S)
    assert found is not None and json.loads(found[1])["images"][0]["name"] == name


def test_photographs_are_turned_unless_told_otherwise(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 3  # upside down
    photo().save(tmp_path / "turned.jpg", exif=tags, quality=95)
    model = zoo.load("vit_digits")
    turned, stored = (
        look(model, [tmp_path / "turned.jpg"], {"upright": upright})[0].tensor
        for upright in (True, False)
    )
    assert torch.allclose(turned, stored.flip(2, 3), atol=0.05)
    assert not torch.allclose(turned, stored, atol=0.05)


def test_models_without_blocks_to_look_into_say_why() -> None:
    with pytest.raises(UnsupportedModel, match="windows"):
        zoo.visualize(timm.create_model("swin_tiny_patch4_window7_224"), photo())
    with pytest.raises(ZooError, match="by itself"):
        zoo.visualize(zoo.create_model("lookupvit_digits", None), photo())
    with pytest.raises(ZooError, match="already"):
        tower = zoo.selector(zoo.load("vit_digits"), "scope", keep=4)
        zoo.visualize(tower, photo(), selector="scope", keep=4)
    with pytest.raises(ZooError, match="no model"):
        zoo.visualize([], photo())
    with pytest.raises(ZooError, match=r"ends in \.html"):
        zoo.visualize(zoo.load("vit_digits"), photo()).save("x.gif.txt")


def test_a_page_holds_everything_and_nothing_that_ends_it() -> None:
    model = zoo.load("vit_digits", reducer="tome", schedule=R6)
    named = {"</script><b>": model, "dense": zoo.load("vit_digits")}
    seen = zoo.visualize(named, photo(), title="<i>one</i>")
    text = seen.html()
    assert "<i>one" not in text and "&lt;i&gt;one" in text
    found = re.search(r'<script type="application/json" id="payload">(.*?)</script>', text, re.S)
    assert found is not None
    (image,) = json.loads(found[1])["images"]
    assert [strip["name"] for strip in image["strips"]] == list(named)
    assert len(image["strips"][0]["states"]) == 7
    assert not re.search(r'(src|href)="?https?:', text)


@pytest.mark.skipif(find() is None, reason="no Chromium here")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    models = [zoo.load("vit_digits", reducer=name) for name in ("tome", "topk")]
    (page,) = zoo.visualize(models, [photo(), photo(50, 50)], attention=True).save(
        tmp_path / "see.html"
    )
    program = find()
    assert program is not None
    with browser(program) as tab:
        tab.open(page, 1100, 900)
        tab.wait('document.querySelector("#left canvas").width > 100')
        assert tab.evaluate('document.getElementById("where").textContent') == "block 5"
        tab.evaluate(
            '(() => { const b = document.getElementById("block"); b.value = 2;'
            ' b.dispatchEvent(new Event("input")); })()'
        )
        assert "block 1" in tab.evaluate('document.querySelector("#right figcaption").textContent')
        x, y = tab.place('document.querySelector("#left canvas")')
        tab.move(x, y)
        tab.wait('!document.getElementById("tip").hidden')
        assert tab.complaints() == []


def test_the_task_writes_pictures_and_a_row(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "task=[flops,visualize] images=a.png weights=vit_digits reducer=tome "
        "schedule.r=4 visualize.against=[topk,none] visualize.attention=true"
    )
    assert code == 0, err
    (row,) = read_rows(tmp_path / "results")
    visual = row["visual"]
    for path in (visual["page"], visual["tokens"], *visual["sheets"], row["picture"]):
        assert (tmp_path / path).stat().st_size > 1000
    assert visual["images"] == ["a.png"] and visual["counts"][0][:2] == [65, 61]
    assert f"pictures: {visual['page']}" in out
    page = (tmp_path / visual["page"]).read_text()
    assert '"name":"topk"' in page and '"name":"dense"' in page
    # Another budget keeps its own picture.
    assert run("task=visualize images=a.png weights=vit_digits reducer=tome schedule.r=5")[0] == 0
    rows = list(read_rows(tmp_path / "results"))
    assert rows[0]["picture"] != rows[1]["picture"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no images to look at; type images=FILE"),
        ("images=gone.png", "no such file or folder"),
        ("images=bad.png", "bad.png: "),
        ("images=a.png visualize.against=tomee", "did you mean 'tome'"),
        ("images=a.png visualize.panels=1", "whole number from 2"),
        ("images=a.png visualize.format=gif", "png"),
        ("images=a.png visualize.folder=a.png/x", "cannot be written"),
    ],
)
def test_mistakes_of_the_task_are_one_line(run: Run, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, _, err = run(f"task=visualize weights=vit_digits reducer=tome {line}")
    assert code != 0 and words in err and err.count("\n") == 1


def test_options_of_pictures_need_the_task(run: Run) -> None:
    for line in ("images=a.png", "visualize.panels=3"):
        code, _, err = run(f"weights=vit_digits {line}")
        assert code != 0 and "without the visualize task" in err


def test_a_damaged_file_among_others_is_left_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    line = "task=visualize weights=vit_digits selector=scope select.keep=[8,4] images=[a.png,b.png]"
    code, _, err = run(line)
    assert code == 0 and "left out: b.png" in err
    code, _, err = run(f"{line} data=folder data.damaged=fail")
    assert code != 0 and "b.png" in err


def test_bad_files_take_no_place_of_good_ones(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        photo().save(folder / f"IMG_{i}.png")
        (folder / f"._IMG_{i}.png").write_bytes(b"notes of macOS")
    # Opens, and has no meaning as colours.
    Image.fromarray(np.full((8, 8), 7.5, dtype=np.float32)).save(folder / "A.tiff")
    code, _, err = run("task=visualize weights=vit_digits images=photos limit=2")
    assert code == 0 and err.count("left out") == 1 and "A.tiff: floating-point" in err
    (row,) = read_rows(tmp_path / "results")
    assert [Path(name).name for name in row["visual"]["images"]] == ["IMG_0.png", "IMG_1.png"]


def test_what_changes_a_picture_changes_its_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IM", "a.png")
    save_pretrained(zoo.load("vit_digits"), tmp_path / "x" / "vit_digits")
    other = zoo.load("vit_digits")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    save_pretrained(other, tmp_path / "y" / "vit_digits")
    common = """task=visualize "images=['${oc.env:IM}']\""""
    scope = f"{common} weights=vit_digits selector=scope select.keep=8"
    folder = f"{common} weights=vit_digits data=folder"
    lines = [
        *(f"{common} weights={top}/vit_digits" for top in "xy"),
        *(f"{scope} select.block={block}" for block in (-2, -3)),
        *(f"{common} weights=vit_digits {more}" for more in ("limit=3", "data.crop_pct=0.5")),
        *(f"{folder} data.upright={value}" for value in ("true", "false")),
    ]
    for line in lines:
        code, _, err = run(line)
        assert code == 0, err
    pages = {row["visual"]["page"] for row in read_rows(tmp_path / "results")}
    assert len(pages) == len(lines)


def test_a_point_of_the_report_shows_its_picture(tmp_path: Path) -> None:
    good, page = tmp_path / "small.png", tmp_path / "index.html"
    photo().save(good)
    common = {"method": "tome", "backbone": "x", "dataset": "d", "task": ["accuracy"], "top1": 50.0}
    gone = {**common, "schedule": {"name": "constant_r", "r": 2}, "picture": str(tmp_path / "no")}
    row = {**common, "schedule": {"name": "constant_r", "r": 1}, "picture": str(good)}
    rows = [
        new_row(**kind, gmacs={"total": 1.0}, visual={"page": str(page)}) for kind in (row, gone)
    ]
    text = write_report(rows, tmp_path).html.read_text(encoding="utf-8")
    found = re.search(r'id="payload">(.*?)</script>', text, re.S)
    assert found is not None
    shown = [e.get("picture") for e in json.loads(found[1])["entries"].values()]
    assert sum(p is not None for p in shown) == 1
    (picture,) = [p for p in shown if p]
    assert picture["src"].startswith("data:image/png;base64,") and picture["page"] == str(page)
