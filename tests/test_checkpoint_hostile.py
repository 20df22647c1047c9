"""Files from somewhere else end in BadCheckpoint, whatever they hold, soon and in little memory."""

from __future__ import annotations

import copy
import functools
import json
import os
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from tests.test_checkpoint import make
from tests.test_checkpoint_refusals import lightning, refusal, weights_refusal
from zoo.checkpoint import save_pretrained
from zoo.errors import BadCheckpoint

COUNTS = {"name": "per_block", "keep": [14, None, 12, None, 9, None]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    models = [
        make("evit"),
        make("tome", COUNTS),
        zoo.create_model("vit_digits", "dynamicvit"),
        zoo.create_model("vit_digits", "topk", plugins=["clc"]),
        zoo.create_model("lookupvit_digits"),
    ]
    return [save_pretrained(m, place / str(i)) for i, m in enumerate(models)]


@pytest.fixture
def saved(folders: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "model"))


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test of this file takes long, or much memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_000_000, f"{grown / 1e6:.1f} GB"
    assert time.monotonic() - began < 120


def rewrite(folder: Path, **parts: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in parts.items():
        above, _, key = name.rpartition("__")
        node = functools.reduce(lambda n, k: n[k], above.split("__") if above else [], config)
        node[key] = value
    (folder / "config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------- any change of a recipe

numbers = st.sampled_from(
    [0, 1, 2, -1, 7, 10**6, 10**9, 2**31, 2**63, 10**40, -(10**9), 0.5, -0.5, 1e300]
)
words = st.sampled_from(
    ["", "a", "tome", "none", "test_vit", "../x", "/dev/zero", "hf-hub:a/b", "x" * 50_000]
    + ["\n", "\u202e", "\x1b[2J", "depth", "class"]
) | st.text(max_size=8)
plain = st.none() | st.booleans() | numbers | words | st.just(float("nan")) | st.just(float("inf"))
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words, inner, max_size=3)
        | st.just([1] * 50_000)
        | inner.map(lambda v: {"name": "constant_r", "r": v})
        | inner.map(lambda v: {"name": v})
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(
    "depth embed_dim num_heads img_size patch_size mlp_ratio reg_tokens init_values in_chans "
    "global_pool norm_layer weight_init compressed_grid features_only out_indices pruned device "
    "use_naflex model_name self name block_fn rate blocks r keep metric num_clr mean std "
    "input_size crop_pct file seed tag num_classes args sha256 reducer model".split()
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(node, dict):
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from places(value, (*path, i))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_change_of_a_recipe_loads_or_is_refused(
    folders: list[Path], tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data.draw(st.sampled_from(folders)), folder)
    names = [n for n in ("config.json", "schedule.json") if (folder / n).is_file()]
    file = folder / data.draw(st.sampled_from(names))
    recipe = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(recipe))))
        node = functools.reduce(lambda n, k: n[k], path[:-1], recipe)
        if isinstance(node[path[-1]], dict) and data.draw(st.booleans()):
            node, path = node[path[-1]], (data.draw(NAMES),)
        if data.draw(st.integers(0, 9)) == 0 and isinstance(node, dict):
            node.pop(path[-1], None)
        else:
            node[path[-1]] = copy.deepcopy(data.draw(values))
    file.write_text(json.dumps(recipe))
    began = time.monotonic()
    try:
        zoo.load(folder)
    except BadCheckpoint as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1500
    assert time.monotonic() - began < 20


# ------------------------------------------------------------------------------- single hostilities


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"backbone__args": {"img_size": 64, "depth": 10**9}}, "depth=1000000000 is larger"),
        ({"backbone__args": {"img_size": 64, "embed_dim": 2**24}}, "."),
        ({"backbone__args": {"img_size": 10**9}}, "img_size=1000000000 is larger"),
        ({"backbone__args": {"img_size": [64, -64]}}, "."),
        ({"backbone__args": {"img_size": 64, "num_heads": 0}}, "cannot build"),
        ({"backbone__args": {"img_size": 64, "norm_layer": {"a": 1}}}, "cannot build"),
        ({"backbone__args": {"img_size": 64, "device": "meta"}}, "device"),
        ({"backbone__args": {"img_size": 64, "checkpoint_path": "x"}}, "checkpoint_path"),
        ({"backbone__args": [1]}, "backbone.args must be a mapping"),
        ({"backbone__num_classes": -3}, "num_classes must be a whole number"),
        ({"backbone__num_classes": 10**7}, "test_vit"),
        ({"backbone__num_classes": True}, "num_classes must be a whole number"),
        ({"backbone__tag": ["a"]}, "tag must be a word"),
        ({"backbone__name": "vit\n\u202e"}, "unknown backbone"),
        ({"reducer": {"name": "evit", "self": 1}}, "evit"),
        ({"reducer": {"name": "tokenlearner", "bottleneck": 10**12}}, "."),
        ({"reducer": {"name": "sinkhorn", "tokens": 10**12}}, "."),
        ({"schedule": {"name": "target_ms", "ms": 1, "rounds": 10**9}}, "measured anew"),
        ({"schedule": {"name": "constant_r", "r": -5}}, "."),
        ({"schedule": {"name": "constant_r", "r": {"a": 1}}}, "."),
        ({"data": {"mean": "abc"}}, "data.mean"),
        ({"data": {"std": [0, 0, 0]}}, "data.std"),
        ({"data": {"input_size": [3, 10**9, 1]}}, "data.input_size"),
        ({"data": {"crop_pct": "half"}}, "data.crop_pct"),
        ({"weights": {"model": "model.safetensors", "sha256": [1] * 10**5}}, "sha256"),
        ({"plugins": [{"name": "clc", "num_clr": 10**12}]}, "."),
        ({"zoo": "1\x1b[2J" * 50, "format": 9}, "an unknown version"),
        ({"written_by": [1]}, "written_by"),
    ],
)  # fmt: skip
def test_recipes_that_ask_for_too_much(saved: Path, parts: dict[str, Any], words: str) -> None:
    rewrite(saved, **parts)
    text = refusal(saved)
    assert (words in text or words == ".") and text.isprintable() and len(text) < 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested"),
        ('{"format": 1, "format": 1}', "stands there twice"),
        ('{"format": NaN}', "NaN"),
        ('{"format": -Infinity}', "Infinity"),
        ('{"format": ' + "9" * 10_000 + "}", "not valid JSON"),
        ('{"format": 1e999}', "inf"),
        ('"' + "x" * (9 << 20) + '"', "MB"),
        ("[" + "1," * (1 << 18) + "1]", "refused"),
        ("\ufeff{}", "not valid JSON"),
        ("", "not valid JSON"),
    ],
    ids=lambda v: str(v)[:12],
)
def test_json_that_is_made_to_hurt(saved: Path, text: str, words: str) -> None:
    (saved / "config.json").write_text(text)
    found = refusal(saved)
    assert words in found and len(found) < 500
    (saved / "config.json").write_bytes(b'{"format": "\xff\xfe"}')
    assert "not valid JSON" in refusal(saved)


def test_links_and_pipes(saved: Path, folders: list[Path], tmp_path: Path) -> None:
    # A cache of downloads is made of links.
    for name in ("config.json", "model.safetensors"):
        (saved / name).unlink()
        (saved / name).symlink_to(folders[0] / name)
    zoo.load(saved)
    for target in ("/dev/zero", "config.json", "nowhere"):
        (saved / "config.json").unlink()
        (saved / "config.json").symlink_to(target)
        assert "no config.json" in refusal(saved)
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    assert "no config.json" in refusal(saved)
    other = Path(shutil.copytree(folders[1], tmp_path / "other"))
    (other / "schedule.json").unlink()
    os.mkfifo(other / "schedule.json")
    assert "schedule.json: no such file" in refusal(other)
    (other / "schedule.json").unlink()
    (other / "schedule.json").write_text('{"name": "per_block", "file": "/dev/zero"}')
    assert "expected the counts" in refusal(other)


def sparse(
    path: Path, header: dict[str, Any] | bytes, size: int, length: int | None = None
) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write((len(content) if length is None else length).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + size)


@pytest.mark.parametrize("hashed", [True, False])
def test_weights_that_are_mostly_nothing(saved: Path, hashed: bool) -> None:
    if not hashed:
        rewrite(saved, weights={"model": "model.safetensors", "sha256": None})
    path, big = saved / "model.safetensors", 1 << 40
    one = {"dtype": "F32", "shape": [big // 4], "data_offsets": [0, big]}
    sparse(path, {"head.weight": one}, big)
    assert "model.safetensors" in refusal(saved)
    sparse(
        path, {"head.weight": {**one, "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}, 1 << 30
    )
    assert "not those of test_vit" in refusal(saved)
    sparse(path, {"head.weight": {**one, "shape": [1 << 62, 1 << 62]}}, 100)
    assert "model.safetensors" in refusal(saved)
    sparse(path, b"{}", 0, length=1 << 62)
    assert "cut short" in refusal(saved)
    sparse(path, b'{"a": ' * 10_000, 0)
    assert "cut short" in refusal(saved)
    sparse(path, {}, 0)
    assert "missing" in refusal(saved)


def bomb(path: Path, name: str, megabytes: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open(name, "w", force_zip64=True) as entry:
            for _ in range(megabytes):
                entry.write(bytes(1 << 20))


def test_archives_that_unpack_to_too_much(tmp_path: Path) -> None:
    bomb(tmp_path / "a.ckpt", "a/data.pkl", 400)
    assert "unpack to" in weights_refusal(make(), tmp_path / "a.ckpt")
    assert "unpack to" in refusal(tmp_path / "a.ckpt")
    bomb(tmp_path / "a.npz", "embedding/kernel.npy", 400)
    assert "unpack to" in weights_refusal(make(), tmp_path / "a.npz")
    # An array that says it is larger than the file.
    np.savez(tmp_path / "b.npz", **{"embedding/kernel": np.zeros((16, 16, 3, 64), np.float32)})
    data = (tmp_path / "b.npz").read_bytes().replace(b"(16, 16, 3, 64)", b"(99999999999999)")
    (tmp_path / "b.npz").write_bytes(data)
    assert "b.npz" in weights_refusal(make(), tmp_path / "b.npz")


def test_checkpoints_that_refer_to_themselves(tmp_path: Path) -> None:
    laughs: Any = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 10
    circle: list[Any] = []
    circle.append(circle)
    for value in (laughs, circle, {"a": torch.ones(2)}, 10**400, float("nan")):
        path = lightning(make("tome"), tmp_path / "a.ckpt", data={"mean": value})
        assert refusal(path).count(str(path)) == 1
    state: dict[str, Any] = {"weight": torch.ones(1)}
    for _ in range(40):
        state = {f"{i}": state for i in range(50)}
    torch.save(state, tmp_path / "b.ckpt")
    assert "b.ckpt" in weights_refusal(make(), tmp_path / "b.ckpt")
    body = make().unwrap().state_dict()
    # One number seen as very many.
    body["head.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(body, tmp_path / "c.ckpt")
    assert "1099511627776 classes" in weights_refusal(make(), tmp_path / "c.ckpt")
    names = {f"a{i}.pos_embed": torch.ones(1) for i in range(2000)}
    torch.save({**names, **make().unwrap().state_dict()}, tmp_path / "d.ckpt")
    assert "d.ckpt" in weights_refusal(make(), tmp_path / "d.ckpt")
