"""Pictures of the towers of every library, and of what is built around a tower."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import zoo
from tests import hf_cases
from tests.cases import backbone
from tests.covering import every
from tests.families import family
from tests.test_visualize import photo
from zoo.cli.main import main
from zoo.errors import UnsupportedModel, ZooError
from zoo.model.reduced import ReducedViT
from zoo.visual.photographs import look

R1 = {"name": "constant_r", "r": 1}


def hugging_face(kind: str) -> Any:
    pytest.importorskip("transformers", minversion="5.0")
    return hf_cases.model(kind)


def open_clip(kind: str) -> Any:
    pytest.importorskip("open_clip")
    from tests.test_open_clip import clip, tiny

    return tiny() if kind == "tiny" else clip(kind)


def whole_clip() -> Any:
    pytest.importorskip("transformers", minversion="5.0")
    from transformers import CLIPConfig, CLIPModel

    vision: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3}
    own: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"num_hidden_layers": 1, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(vision_config={**vision, **own}, text_config={**text, **own}))


TOWERS: dict[str, Callable[[], Any]] = {
    **{n: partial(hugging_face, n) for n in ("clip-embeds", "siglip-head", "siglip2")},
    "open_clip": lambda: open_clip("tiny"),
    "open_clip, a trunk of timm": lambda: open_clip("map").visual,
    "hybrid": lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=2, img_size=96),
    "naflex": lambda: family("naflex_map"),
    "beit": lambda: family("beit_wide"),
}


@pytest.mark.parametrize("name", every(list(TOWERS), 2))
def test_every_librarys_towers_are_drawn(name: str) -> None:
    tower = TOWERS[name]().eval()
    model = zoo.wrap(tower, "tome", R1)
    has_class = bool(model.tower.class_tokens(tower))
    seen = zoo.visualize([model, tower], photo(), attention=has_class)
    trail, dense = seen.trail(), seen.trail(model=1)
    rows, columns = model.tower.grid(tower)
    assert trail.grid == dense.grid == (rows, columns)
    start = rows * columns + model.prefix
    assert trail.counts == [start - i for i in range(model.depth + 1)]
    assert set(dense.counts) == {start}
    assert (trail.states[-1].attention is not None) == has_class
    # The picture is all that the patches cover, which is the whole image for each of these.
    assert seen.images[0][1][0].picture.size == model.tower.input_size(tower)[:0:-1]
    chosen = zoo.visualize(tower, photo(), selector="divprune", keep=3).trail().states[-1]
    assert chosen.kept is not None and chosen.kept.sum() == 3
    assert "mixtures" in zoo.visualize(zoo.wrap(tower, "patchmerger"), photo()).html()


def around(kind: str) -> tuple[nn.Module, ReducedViT]:
    """A model, and the reduced tower that it holds."""
    if kind == "hf":
        whole = zoo.attach(whole_clip(), "tome", R1)
        reduced = zoo.attached(whole)
    elif kind == "compiled":
        reduced = zoo.wrap(backbone("plain"), "tome", R1)
        whole = torch.compile(reduced)
    else:
        whole = open_clip(kind)
        reduced = whole.visual = zoo.wrap(whole.visual, "tome", R1)
    assert reduced is not None
    return whole, reduced


@pytest.mark.parametrize("kind", ["hf", "compiled", "CLIP", "map"])
def test_the_tower_in_a_model_is_found(kind: str) -> None:
    whole, reduced = around(kind)
    seen = zoo.visualize({"whole": whole, "tower": reduced}, photo())
    assert seen.trail(0).counts == seen.trail(0, 1).counts
    assert seen.trail(0).counts[-1] == seen.trail(0).counts[0] - reduced.depth


def test_the_tower_in_a_dense_model_is_found() -> None:
    whole = whole_clip()
    trail = zoo.visualize(whole, photo(), selector="scope", keep=2, attention=True).trail()
    assert trail.counts == [17, 17, 17, 2] and trail.states[1].attention is not None


def test_several_towers_or_none_are_one_line() -> None:
    two = nn.ModuleDict({"student": zoo.wrap(backbone("plain"), None), "teacher": backbone("gap")})
    assert zoo.visualize(two, photo()).trail().counts[0] == 65  # the wrapped one is meant
    two["third"] = zoo.wrap(backbone("gap"), "tome")
    with pytest.raises(ZooError, match=r"2 towers: student, third; .* model\.student"):
        zoo.visualize(two, photo())
    with pytest.raises(UnsupportedModel, match="models of torch itself"):
        zoo.visualize(nn.Linear(2, 2), photo())
    with pytest.raises(UnsupportedModel, match="expected a model, got the text 'vit_digits'"):
        zoo.visualize("vit_digits", photo())  # type: ignore[arg-type]


def seen_by(tower: Any) -> tuple[np.ndarray[Any, Any], Image.Image]:
    (seen,) = look(zoo.wrap(tower, None), [Image.new("RGB", (40, 40), (128, 128, 128))])
    return seen.tensor[0, :, 0, 0].numpy(), seen.picture


def test_images_are_prepared_as_the_library_does(tmp_path: Path) -> None:
    grey = 128 / 255
    clip = (grey - np.array([0.4815, 0.4578, 0.4082])) / np.array([0.2686, 0.2613, 0.2758])
    half = np.full(3, (grey - 0.5) / 0.5)
    for tower, expected in (
        (hugging_face("clip"), clip),
        (hugging_face("siglip-head"), half),
        (hugging_face("siglip2"), half),
        (open_clip("tiny"), clip),
    ):
        values, picture = seen_by(tower)
        assert np.allclose(values, expected, atol=1e-3)
        assert picture.getpixel((0, 0)) == (128, 128, 128)
    # What a model itself says comes first: of its own folder, or of its weights.
    own = open_clip("tiny")
    own.preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    assert np.allclose(seen_by(own)[0], (grey - 0.5) / 0.25, atol=1e-3)
    own = hugging_face("clip")
    own.config._name_or_path = str(tmp_path)
    text = '{"image_mean": [0, 0, 0], "image_std": [2, 2, 2], "do_normalize": true}'
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert np.allclose(seen_by(own)[0], grey / 2, atol=1e-3)
    asked = zoo.visualize(own, Image.new("RGB", (9, 9)), mean=[0.5] * 3, std=[0.5] * 3)
    assert asked.images[0][1][0].picture.getpixel((0, 0)) == (0, 0, 0)


def test_one_channel_gets_the_mean_of_the_usual_ones() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    tower = hf_cases.model("clip", num_channels=1)
    values, picture = seen_by(tower)
    mean, std = np.mean([0.4815, 0.4578, 0.4082]), np.mean([0.2686, 0.2613, 0.2758])
    assert np.allclose(values, [(128 / 255 - mean) / std], atol=1e-3)
    assert picture.getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(ZooError, match=r"mean holds 2 numbers, expected 1: .* of 1 channel$"):
        zoo.visualize(tower, photo(), mean=[0.5, 0.5])
    with pytest.raises(ZooError, match=r"mean holds 2 numbers, expected 1 or 3: .* 3 channels$"):
        zoo.visualize(hf_cases.model("clip"), photo(), mean=[0.5, 0.5])


def test_attention_where_no_patch_takes_part() -> None:
    reducer = {"name": "adavit", "token_threshold": 0.999}
    model = zoo.wrap(backbone("plain"), reducer, {"name": "constant_r", "r": 8})
    states = zoo.visualize(model, photo(), attention=True).trail().states
    assert all(s.attention is not None and not s.attention.any() for s in states[1:])


@pytest.mark.parametrize(
    "line",
    [
        "backbone=hf backbone.name=google/siglip-base-patch16-224 "
        "'+backbone.args={num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2}'",
        "backbone=open_clip backbone.name=ViT-B-32 '+backbone.args={layers: 2, width: 64}'",
    ],
    ids=["hf", "open_clip"],
)
def test_the_task_takes_other_libraries(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("open_clip" if "open_clip" in line else "transformers")
    monkeypatch.chdir(tmp_path)
    photo().save("a.png")
    more = "task=visualize images=a.png reducer=tome schedule.r=3 visualize.against=[topk]"
    code = main(["eval", *shlex.split(f"{more} {line}")])
    out, err = capsys.readouterr()
    assert code == 0, err
    page = next(Path().rglob("index.html")).read_text(encoding="utf-8")
    told = "score_from=column_mean"  # a method takes its other score where it has to, and says so
    siglip = "siglip" in line
    assert (told in err) == (f'"name":"topk ({told})"' in page) == siglip
    assert "pictures: outputs/visual/" in out
    if siglip:
        assert main(["eval", *shlex.split(f"{more} {line} visualize.against=ats")]) != 0
        err = capsys.readouterr().err
        assert err.startswith("error: visualize.against=ats: reducer 'ats' scores tokens by")
