"""`zoo eval` with tasks on features: what rows say, what is computed once, what is refused."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zoo
from reduction import KeepRate
from zoo.cli.main import main
from zoo.data import ImageData
from zoo.measure.features import Embedder
from zoo.measure.knn import knn_classes
from zoo.results.rows import read_rows

ALL = "task=[knn,linear_probe,retrieval]"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(line):
        code = main(["eval", *shlex.split(line)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def passes(monkeypatch):
    """Counts the images that models embed."""
    seen = []
    forward = Embedder.forward
    monkeypatch.setattr(
        Embedder, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1]
    )
    return seen


def rows(tmp_path):
    return read_rows(tmp_path / "results")


def entries(tmp_path):
    return sorted((tmp_path / "outputs" / "features").glob("*"))


def parts_of(row):
    arguments = {k: v for k, v in row["recipe"]["schedule"].items() if k != "name"}
    return {"reducer": row["method"], "schedule": KeepRate(**arguments)}


def embedded(split, **parts):
    """Features by hand, without the code under test."""
    model = zoo.load("vit_digits", **parts).eval()
    data = (
        ImageData("digits", test_split="test")
        .attach(model)
        .dataset("gallery" if split == "train" else split)
    )
    images, labels = zip(*data, strict=True)
    with torch.inference_mode():
        found = [
            model.forward_head(model.forward_features(part), pre_logits=True)
            for part in torch.stack(images).split(200)
        ]
    return torch.cat(found), torch.tensor(labels)


# --------------------------------------------------------------------------------- what rows say


def test_a_row_holds_what_the_functions_say_of_the_same_features(run, tmp_path, passes):
    line = f"weights=vit_digits reducer=topk schedule=keep_rate schedule.rate=0.3 {ALL}"
    code, out, _ = run(line)
    assert code == 0
    # Train and test images once each, for three tasks.
    assert sum(passes) == 1257 + 360
    (row,) = rows(tmp_path)
    assert (row["n_images"], row["n_gallery"], row["gallery"]) == (360, 1257, "own")
    assert (row["dataset"], row["split"], row["gallery_split"]) == ("digits", "test", "train")
    assert row["dtype"] == "float32" and row["device"] == "cpu"
    parts = parts_of(row)
    gallery, labels = embedded("train", **parts)
    queries, right = embedded("test", **parts)
    hits = int((knn_classes(queries, gallery, labels) == right).sum())
    assert row["knn"]["top1"] == pytest.approx(100 * hits / 360)
    low, high = row["knn"]["ci95"]
    assert low < row["knn"]["top1"] < high and (row["knn"]["k"], row["knn"]["temperature"]) == (
        20,
        0.07,
    )
    probe, found = row["linear_probe"], row["retrieval"]["class"]
    assert set(probe["scores"]) == {"0.001", "0.01", "0.1", "1", "10"}
    assert probe["scores"][f"{probe['c']:g}"] == max(probe["scores"].values())
    assert probe["top1"] > 90 and probe["held_out"] == 251
    assert 0 < found["map"] <= found["recall1"] <= found["recall5"] <= 100
    assert found["n_queries"] == 360 and found["map_ci95"][0] < found["map"]
    assert row["top1"] is None and row["centred_cosine"] is None
    assert f"k-NN {row['knn']['top1']:.2f} %" in out and "probe" in out and "mAP" in out


def test_a_gallery_of_the_dense_model_tells_how_far_features_have_moved(run, tmp_path):
    line = f"weights=vit_digits {ALL} retrieval.relevance=[class,crop] gallery=dense limit=60"
    assert run(f"{line} reducer=topk schedule=keep_rate schedule.rate=0.2")[0] == 0
    assert run(f"{line} reducer=none")[0] == 0
    reduced, dense = rows(tmp_path)
    assert reduced["gallery"] == dense["gallery"] == "dense"
    cosine = reduced["centred_cosine"]
    assert cosine["worst"] < cosine["mean"] < 0.999 and 0 <= cosine["worst_image"] < 360
    assert dense["centred_cosine"]["worst"] == pytest.approx(1)
    for task in ("knn", "linear_probe"):
        assert dense[task]["agreement"] == 100
        assert 50 < reduced[task]["agreement"] <= 100
        assert reduced[task]["agreement_ci95"][0] < reduced[task]["agreement"]
    ours, theirs = (row["retrieval"]["crop"] for row in (reduced, dense))
    assert ours["n_queries"] == ours["n_gallery"] == 60 and ours["crop"] == 0.8
    assert theirs["recall1"] > 100 / 60 and theirs["recall5"] >= theirs["recall1"]
    # By hand: the dense gallery's neighbours of the reduced queries.
    gallery, labels = embedded("train")
    queries, right = embedded("test", **parts_of(reduced))
    from zoo.data.draw import stratified

    drawn = stratified(right.tolist(), 60)
    hits = int((knn_classes(queries[drawn], gallery, labels) == right[drawn]).sum())
    assert reduced["knn"]["top1"] == pytest.approx(100 * hits / 60)


def test_images_among_themselves_leave_themselves_out(run, tmp_path):
    line = "weights=vit_digits task=[knn,retrieval] gallery_split=test limit=50 gallery_limit=100"
    assert run(line)[0] == 0
    (row,) = rows(tmp_path)
    assert (row["n_images"], row["n_gallery"], row["gallery_split"]) == (50, 100, "test")
    from zoo.data.draw import stratified

    x, labels = embedded("test")
    drawn, places = stratified(labels.tolist(), 50), stratified(labels.tolist(), 100)
    own = torch.tensor([places.index(i) for i in drawn])
    found = knn_classes(x[drawn], x[places], labels[places], exclude=own)
    hits = int((found == labels[drawn]).sum())
    assert row["knn"]["top1"] == pytest.approx(2 * hits)
    code, _, err = run("weights=vit_digits task=linear_probe gallery_split=test")
    assert code == 2 and "type gallery_split=train" in err


def test_one_split_under_two_names_is_one_split(run, tmp_path, folder):
    line = "weights=vit_digits task=knn knn.k=1 gallery_split=val data.test_split="
    for name in ("val", "validation"):
        assert run(line + name)[0] == 0
    once, again = (row["knn"]["top1"] for row in rows(tmp_path))
    assert once == again < 100  # no image has found itself
    code, _, err = run("weights=vit_digits task=linear_probe gallery_split=val data.test_split=val")
    assert code == 2 and "is what it is tested on" in err
    # In a folder, too, and where a folder has no splits at all.
    counts = []
    for root, name in (("pets", "validation"), ("pets/val", "test")):
        more = f"task=knn gallery_split=val data.root={root} data.test_split={name}"
        assert run(f"{PETS} {more}")[0] == 0
        counts.append(rows(tmp_path)[-1]["n_gallery"])
        code, _, err = run(f"{PETS} {more}".replace("task=knn", "task=[knn,linear_probe]"))
        assert code == 2 and "is what it is tested on" in err
    assert counts == [8, 8]


def test_limits_draw_from_all_classes_and_not_by_the_seed_of_the_run(run, tmp_path):
    for seed in (0, 1):
        line = f"weights=vit_digits task=retrieval limit=20 gallery_limit=40 seed={seed}"
        assert run(line)[0] == 0
    assert run(f"{line} features.seed=3")[0] == 0
    first, second, _ = rows(tmp_path)
    assert first["retrieval"] == second["retrieval"]
    assert first["retrieval"]["class"]["n_queries"] == 20
    labels = [load_file(path)["labels"] for path in entries(tmp_path)]
    assert sorted(map(len, labels)) == [20, 20, 40, 40]
    assert all(torch.bincount(one).tolist() == [len(one) // 10] * 10 for one in labels)


def test_accuracy_beside_counts_its_own_images(run, tmp_path):
    assert run("weights=vit_digits task=[accuracy,fidelity,knn] reducer=tome schedule.r=4")[0] == 0
    (row,) = rows(tmp_path)
    assert row["n_images"] == 360 and row["top1"] > 90 and row["knn"]["top1"] > 90


def test_models_without_a_classifier_are_looked_up_too(run, tmp_path):
    line = (
        "backbone=test_vit +backbone.args.num_classes=0 data=synthetic reducer=tome schedule.r=4 "
        f"knn.k=5 {ALL} dtype=bfloat16"
    )
    assert run(line)[0] == 0
    (row,) = rows(tmp_path)
    assert row["dtype"] == "bfloat16" and 0 <= row["knn"]["top1"] <= 100
    assert run(line.replace("dtype", "weights_dtype"))[0] == 0
    cast = rows(tmp_path)[-1]
    assert (cast["dtype"], cast["weights_dtype"]) == ("float32", "bfloat16") and cast["knn"]
    code, _, err = run(line + " +backbone.args.global_pool=''")
    assert code == 2 and "one vector per image" in err


# ------------------------------------------------------------------------------- the cache


def test_features_are_found_again_by_other_tasks_and_other_runs(run, tmp_path, passes):
    line = "weights=vit_digits reducer=tome schedule.r=4 limit=20 gallery_limit=50"
    assert run(f"{line} task=knn")[0] == 0
    assert sum(passes) == 70 and len(entries(tmp_path)) == 2
    assert run(f"{line} task=[linear_probe,retrieval,knn]")[0] == 0
    assert sum(passes) == 70
    first, second = rows(tmp_path)
    assert first["knn"] == second["knn"]
    # Anything that features depend on makes others.
    for more in (
        "schedule.r=3",
        "dtype=bfloat16",
        "data.crop_pct=0.5",
        "runtime.last_block=class_token",
    ):
        before = sum(passes)
        assert run(f"{line} task=knn {more}")[0] == 0
        assert sum(passes) == before + 70, more


def test_other_weights_under_the_same_name_are_other_features(run, tmp_path, passes):
    model = zoo.load("vit_digits")
    line = "weights=here task=retrieval limit=20 gallery_limit=50"
    from zoo.checkpoint import save_pretrained

    save_pretrained(model, "here")
    assert run(line)[0] == 0
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1e-3
    save_pretrained(model, "here")
    assert run(line)[0] == 0
    assert sum(passes) == 140


@pytest.mark.parametrize("harm", ["cut", "swapped", "flipped", "empty"])
def test_a_damaged_entry_is_computed_again_with_a_line(run, tmp_path, passes, harm):
    line = "weights=vit_digits task=retrieval limit=20 gallery_limit=50"
    assert run(line)[0] == 0
    one, other = entries(tmp_path)
    if harm == "cut":
        one.write_bytes(one.read_bytes()[:-100])
    elif harm == "swapped":
        one.write_bytes(other.read_bytes())
    elif harm == "flipped":
        bytes_ = bytearray(one.read_bytes())
        bytes_[-1] ^= 1
        one.write_bytes(bytes_)
    else:
        one.write_bytes(b"")
    before = sum(passes)
    code, _, err = run(line)
    assert code == 0 and f"{one.name} is damaged" in err and "computed again" in err
    assert sum(passes) - before in (20, 50)
    code, _, err = run(line)
    assert code == 0 and "damaged" not in err
    found = rows(tmp_path)
    assert found[0]["retrieval"] == found[1]["retrieval"] == found[2]["retrieval"]


def test_the_cache_can_be_switched_off_and_stays_small(run, tmp_path, passes):
    line = "weights=vit_digits task=retrieval limit=20 gallery_limit=50"
    assert run(f"{line} features.cache=false")[0] == 0
    assert not entries(tmp_path)
    assert run(f"{line} features.max_gb=0.00001 features.folder=kept")[0] == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1  # the last one stays
    Path("file").write_text("in the way")
    code, _, err = run(f"{line} features.folder=file")
    assert code == 0 and "features are not kept" in err


# --------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 20, 3), dtype=np.uint8)
                pixels[:, :, number] += 100
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "pets"


PETS = (
    "backbone=test_vit +backbone.args.num_classes=0 data=folder data.root=pets data.num_workers=0 "
    "knn.k=3"
)
CROPS = PETS.removesuffix(" knn.k=3") + " task=retrieval retrieval.relevance=crop"


def test_a_folder_is_looked_up_and_changes_of_it_are_seen(run, tmp_path, folder, passes):
    line = f"{PETS} {ALL} retrieval.relevance=[class,crop]"
    assert run(line)[0] == 0
    assert sum(passes) == 16 + 8 + 8
    (row,) = rows(tmp_path)
    assert row["n_images"] == 8 and row["n_gallery"] == 16 and row["dataset"] == "pets"
    assert run(line)[0] == 0 and sum(passes) == 32
    Image.new("RGB", (30, 30), "red").save(folder / "train" / "cat" / "0.png")
    assert run(line)[0] == 0 and sum(passes) == 32 + 16


def test_damaged_images_are_left_out_also_when_features_are_found(run, tmp_path, folder):
    (folder / "val" / "cat" / "1.png").write_bytes(b"no image")
    (folder / "train" / "dog" / "2.png").write_bytes(b"no image")
    line = f"{PETS} task=[knn,retrieval] retrieval.relevance=[class,crop] gallery=dense"
    for _ in range(2):
        assert run(f"{line} reducer=tome schedule.r=2")[0] == 0
    first, second = rows(tmp_path)
    assert first["n_images"] == second["n_images"] == 7 and first["n_gallery"] == 15
    assert first["notes"] == second["notes"] == "2 images could not be read"
    assert first["retrieval"] == second["retrieval"]
    assert run(f"{line} gallery_split=test")[0] == 0  # each without itself
    assert rows(tmp_path)[-1]["n_gallery"] == 7


def test_a_folder_to_evaluate_on_only_is_looked_up_in_itself(run, tmp_path, folder):
    line = f"{PETS} data.root=pets/val"
    code, _, err = run(f"{line} task=knn")
    assert code == 2 and "no folder for the split 'train'" in err and "gallery_split=test" in err
    assert run(f"{line} task=knn gallery_split=test")[0] == 0
    # Pictures among their own parts need no gallery, and no labels.
    assert run(f"{CROPS} data.root=pets/val")[0] == 0
    row = rows(tmp_path)[-1]
    assert row["retrieval"]["crop"]["n_gallery"] == 8 and row["n_gallery"] is None


def test_features_that_are_no_numbers_make_a_failed_row_that_names_the_image(
    run, tmp_path, folder, monkeypatch
):
    forward = Embedder.forward

    def broken(self, images):
        found = forward(self, images)
        found[2, 0] = torch.nan
        return found

    monkeypatch.setattr(Embedder, "forward", broken)
    code, _, err = run(f"{PETS} task=knn")
    assert code == 2 and str(Path("val") / "cat" / "2.png") in err
    (row,) = rows(tmp_path)
    assert row["status"] == "failed" and "NaN" in row["error"] and row["knn"] is None
    assert not entries(tmp_path)


def test_smaller_inputs_are_compared_with_the_dense_model_at_its_own_size(run, tmp_path, folder):
    zoo_model = zoo.create_model("test_vit", None, num_classes=2)
    from zoo.checkpoint import save_pretrained

    save_pretrained(zoo_model, "model")
    line = f"{PETS.partition(' data=')[0]} weights=model {PETS[PETS.index('data=') :]} task=knn"
    line = line.replace("+backbone.args.num_classes=0", "+backbone.args.num_classes=2")
    assert run(f"{line} gallery=dense +backbone.args.img_size=80")[0] == 0
    (row,) = rows(tmp_path)
    assert row["img_size"] == 80 and row["centred_cosine"]["mean"] < 1


# ------------------------------------------------------------------------------------ text


def test_images_are_classified_by_text_from_a_file(run, tmp_path):
    x, labels = embedded("train")
    model = zoo.load("vit_digits").eval()
    with torch.inference_mode():
        answers = model.backbone.head(x)
    centres = torch.stack([answers[labels == i].mean(0) for i in range(10)])
    names = [str(i) for i in range(10)]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    save_file(
        {"text": centres[order].contiguous()},
        tmp_path / "text.safetensors",
        metadata={"class_names": json.dumps([names[i] for i in order])},
    )
    line = "weights=vit_digits task=zeroshot zeroshot.embeddings=text.safetensors"
    code, out, _ = run(line)
    assert code == 0
    (row,) = rows(tmp_path)
    assert row["zeroshot"]["top1"] > 95 and row["zeroshot"]["top5"] >= row["zeroshot"]["top1"]
    assert row["zeroshot"]["classes"] == 10 and row["n_images"] == 360 and row["n_gallery"] is None
    assert "zero-shot" in out
    save_file({"text": torch.randn(10, 7)}, tmp_path / "text.safetensors")
    code, _, err = run(line)
    assert code == 2 and "answers with 10 numbers per image" in err and "embeddings of 7" in err
    code, _, err = run("weights=vit_digits task=zeroshot")
    assert code == 2 and "no text tower; type zeroshot.embeddings=FILE" in err


def test_a_text_tower_of_its_own_reads_the_names(run, tmp_path, folder, monkeypatch):
    from zoo.model.reduced import ReducedViT

    asked = []

    def encode_text(self, tokens):
        return torch.eye(self.num_features)[tokens[:, 0]]

    def tokenizer(sentences):
        asked.append(sentences)
        return torch.full((len(sentences), 1), len(asked))

    monkeypatch.setattr(ReducedViT, "encode_text", encode_text, raising=False)
    monkeypatch.setattr(ReducedViT, "tokenizer", staticmethod(tokenizer), raising=False)
    line = f"{PETS.removesuffix(' knn.k=3')} task=zeroshot"
    assert run(f'{line} \'zeroshot.templates=["a {{}}.","the {{}}."]\'')[0] == 0
    assert asked == [["a cat.", "the cat."], ["a dog.", "the dog."]]
    (row,) = rows(tmp_path)
    assert row["zeroshot"]["text"] == "text tower, 2 templates"
    assert row["zeroshot"]["classes"] == 2 and row["zeroshot"]["top5"] is None
    code, _, err = run(f"{line} zeroshot.templates=photo")
    assert code == 2 and "'photo' has no {} for the class name" in err


def test_the_text_tower_of_open_clip_is_that_of_the_same_weights(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from zoo.measure.zeroshot import encode_texts
    from zoo.run.zeroshot import open_clip_text

    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    clip = open_clip.create_model("tiny-clip").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    tower, tokenizer = open_clip_text("tiny-clip", str(tmp_path / "clip.pt"))
    names, templates = ["cat", "dog", "cow"], ["a photo of a {}.", "the {}."]
    found = encode_texts(tower.eval(), tokenizer, names, templates, torch.device("cpu"))
    own = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    for name, vector in zip(names, found.x, strict=True):
        with torch.no_grad():
            two = clip.encode_text(own([t.replace("{}", name) for t in templates]), normalize=True)
        mean = torch.nn.functional.normalize(two.mean(0), dim=0)
        torch.testing.assert_close(vector, mean)
    with pytest.raises(zoo.errors.ZooError, match="text tower of tiny-clip has no weights; type"):
        open_clip_text("tiny-clip", None)
    with pytest.raises(zoo.errors.ZooError, match="no text tower of tiny-clip with the weights"):
        open_clip_text("tiny-clip", str(tmp_path / "tiny-clip.json"))


@pytest.fixture
def tiny_clip(tmp_path, monkeypatch):
    """A model of open_clip with a name of its own, and weights of both towers."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    clip = open_clip.create_model("tiny-clip").eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    return clip


def test_both_towers_of_open_clip_from_one_file(run, tmp_path, folder, tiny_clip):
    line = "task=zeroshot backbone=open_clip backbone.name=tiny-clip data=folder data.root=pets"
    code, out, err = run(f"{line} weights=clip.safetensors reducer=tome schedule.r=1")
    assert (code, err) == (0, "") and "zero-shot" in out
    (row,) = rows(tmp_path)
    assert row["zeroshot"]["text"] == "text tower, 7 templates"
    assert row["zeroshot"]["classes"] == 2
    code, _, err = run(line)
    assert code == 2 and "the text tower of tiny-clip has no weights" in err
    hf = line.replace("open_clip", "hf").replace("tiny-clip", "openai/clip-vit-base-patch32")
    code, _, err = run(hf)
    assert code == 2 and err.count("\n") == 1 and "type backbone=open_clip" in err


def test_weights_of_open_clip_compute_as_their_tag_says(tiny_clip, tmp_path, monkeypatch):
    import open_clip

    from zoo.libraries import open_clip_models as ours

    tags = {"quick": {"quick_gelu": True, "hf_hub": "org/name/"}, "plain": {"hf_hub": "org/name/"}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: list(tags))
    monkeypatch.setattr(ours, "cached", lambda *names: tmp_path / "clip.safetensors")
    for tag, kind in (("quick", "QuickGELU"), ("plain", "GELU")):
        for pretrained in (True, False):
            tower = zoo.create_model(f"open_clip:tiny-clip.{tag}", pretrained=pretrained).unwrap()
            assert type(tower.transformer.resblocks[0].mlp.gelu).__name__ == kind
            same = torch.equal(tower.conv1.weight, tiny_clip.visual.conv1.weight)
            assert same is pretrained


def test_a_hub_that_is_not_there_is_one_line(tiny_clip, monkeypatch):
    import open_clip

    from zoo.libraries import hub
    from zoo.libraries.open_clip_models import tokenizer_of

    asked = []

    class Session:
        def head(self, url, **options):
            asked.append(url)
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(zoo.errors.ZooError, match="weights openai of ViT-B-32: no network"):
        zoo.create_model("open_clip:ViT-B-32.openai", pretrained=True)
    with pytest.raises(zoo.errors.ZooError, match="cannot fetch the tokenizer timm/.*: no network"):
        tokenizer_of("ViT-B-16-SigLIP2")
    assert len(asked) == 2
    assert isinstance(tokenizer_of("ViT-B-32"), open_clip.tokenizer.SimpleTokenizer)


# ---------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("task=knn knn.k=2000", "knn.k=2000: expected at most 1257"),
        ("task=knn gallery_limit=10", "knn.k=20: expected at most 10"),
        ("task=knn knn.k=0", "knn.k=0: expected a whole number from 1"),
        ("task=knn knn.temperature=0", "knn.temperature=0: expected a number above 0"),
        ("task=knn gallery=dence", "gallery=dence: expected one of own, dense"),
        ("task=accuracy knn.k=3", "knn.k has no effect without the knn or select task"),
        ("task=knn retrieval.crop=0.5", "no effect without the retrieval task"),
        (
            "task=accuracy gallery=dense",
            "no effect without the knn, linear_probe, retrieval or select",
        ),
        ("task=flops features.cache=false", "features.cache has no effect"),
        ("task=retrieval retrieval.relevance=[class,kind]", "expected one of class, crop"),
        ("task=linear_probe linear_probe.c=[]", "linear_probe.c=[]: expected a list"),
        ("task=linear_probe gallery_limit=1", "two classes or more"),
        ("task=kmn", "did you mean knn"),
        ("task=knn ~knn.k", "knn.k has no value any more"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(run, line, words):
    code, _, err = run(f"weights=vit_digits {line}")
    assert code == 2 and words in err and err.count("\n") == 1


def test_what_reduces_by_itself_has_no_dense_gallery(run):
    code, _, err = run("backbone=lookupvit_digits task=knn gallery=dense")
    assert code == 2 and "type gallery=own" in err


# ---------------------------------------------------------------------------------- reports


def row_of(method, gmacs, **more):
    from zoo.results.rows import new_row

    schedule = None if method == "none" else {"name": "constant_r", "r": 10}
    known = {"backbone": "tower", "dataset": "pets", "split": "test", "n_images": 100}
    known |= {"gmacs": {"total": gmacs}, "gmacs_dense": 6.0, "gallery": "own", "n_gallery": 500}
    known |= {"task": ["knn"], "method": method, "schedule": schedule, "weights": "w"}
    return new_row(**{**known, "gallery_split": "train", **more})


def test_a_report_goes_by_neighbours_where_nothing_has_an_accuracy(tmp_path):
    from zoo.report import table, write_report
    from zoo.report.compare import compare

    rows_ = [
        row_of("none", 6.0, knn={"top1": 80.0, "ci95": [71.1, 86.7]}),
        row_of("tome", 4.0, knn={"top1": 79.0, "ci95": [70.0, 85.8]}),
        row_of("topk", 4.0, knn={"top1": 70.0, "ci95": [60.4, 78.1]}),
        # Another task on the same model and images completes its entry.
        row_of("topk", 4.0, task=["retrieval"], retrieval={"crop": {"recall1": 44.0, "map": 50.0}}),
        row_of("tome", 4.0, gallery="dense", knn={"top1": 78.0, "agreement": 91.0}),
        row_of("tome", 4.0, n_gallery=50, knn={"top1": 60.0}),
    ]
    found = compare(rows_)
    view, other = found.views
    assert view.label == "tower · pets (test)"
    assert other.label == "tower · pets (test), in 50 of train"
    assert view.metric.key == "knn" and [e.name for e in view.front] == ["tome", "dense"]
    assert [e.name for e in view.entries] == ["dense", "tome", "topk"]
    assert view.entries[1].lost(view.metric) == pytest.approx(-1)
    text = table(rows_)
    assert "on the Pareto front of k-NN accuracy against GMACs" in text
    assert "44.00" in text and "91.00" in text and "78.00" in text
    paths = write_report(rows_, tmp_path)
    page = paths.html.read_text(encoding="utf-8")
    assert "k-NN accuracy 79.00 % [70.00, 85.80] (Δ −1.00)" in page
    assert "Dense model, k-NN accuracy" in page
    csv = paths.csv.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"knn_top1", "knn_agreement", "crop_recall1", "class_map", "n_gallery"} <= set(csv)
    assert "k-NN %" in paths.markdown.read_text(encoding="utf-8")


def test_runs_that_differ_in_their_draws_are_averaged(tmp_path):
    from zoo.report import table
    from zoo.report.compare import compare

    rows_ = [
        row_of(
            "random",
            4.0,
            reducer={"name": "random", "seed": seed},
            knn={"top1": score, "ci95": [score - 5, score + 5]},
        )
        for seed, score in enumerate((70.0, 72.0, 77.0))
    ]
    (entry,) = compare(rows_).entries
    assert entry.count == 3 and entry.quality["knn"].value == pytest.approx(73)
    assert entry.interval_of(compare(rows_).views[0].metric) == (70, 77)
    assert "73.00 ± 3.61" in table(rows_)


def test_what_a_row_says_beside_numbers_does_no_harm(tmp_path):
    from zoo.report import table
    from zoo.report.words import summary_line

    for bad in ("text", [1], {"top1": None}, {"top1": "x", "ci95": 3}, {"class": "x", "crop": []}):
        row = row_of("tome", 4.0, knn=bad, retrieval=bad, centred_cosine=bad, zeroshot=bad)
        assert summary_line(row) and table([row, row_of("none", 6.0, knn={"top1": 5.0})])


def test_a_tower_that_runs_smaller_than_its_release_is_its_own_dense_model():
    from hydra import compose, initialize_config_dir

    from zoo.published import config_folder
    from zoo.run.fidelity import full_size_config

    def full(*more):
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return full_size_config(compose("eval", ["weights=w", *more]))

    assert full("backbone=dinov2_small") is None
    assert full("backbone=dinov2_small", "backbone.args.img_size=224") is None
    smaller = full("backbone=dinov2_small", "backbone.args.img_size=140")
    assert smaller.backbone.args.img_size == 224
    assert "img_size" not in full("backbone=test_vit", "+backbone.args.img_size=80").backbone.args
