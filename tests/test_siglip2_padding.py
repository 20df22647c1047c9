"""SigLIP 2 on padded batches of several shapes: every image gets what it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from tests.hf_cases import model
from zoo.errors import ZooError

pytest.importorskip("transformers", minversion="5.0")

R2 = {"name": "constant_r", "r": 2}
SIZES = ((40, 90), (64, 64), (90, 40), (64, 64))


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """What the image processor makes of images of several shapes, with rubbish for padding."""
    from transformers import Siglip2ImageProcessor

    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in SIZES]
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=24)
    given = dict(processor(images=images, return_tensors="pt"))
    assert given["pixel_attention_mask"].sum(1).tolist() == [21, 16, 21, 16]
    given["pixel_values"][given["pixel_attention_mask"] == 0] = torch.nan
    return given


def alone(given: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """One image without its padding."""
    count = int(given["spatial_shapes"][i].prod())
    return {
        k: v[i : i + 1] if k == "spatial_shapes" else v[i : i + 1, :count] for k, v in given.items()
    }


def check_rows(ours: Any, given: dict[str, Tensor], whole: Any, **options: Any) -> None:
    """An answer to a batch against those to its images alone; rows behind their tokens are zero."""
    for i in range(len(SIZES)):
        one = whole(**alone(given, i), **options)
        for key, value in one.items():
            values, found = (
                (value, ours[key]) if isinstance(value, tuple) else ((value,), (ours[key],))
            )
            for expected, x in zip(values, found, strict=True):
                rows = x[i] if x.dim() == 2 else x[i, : expected.shape[1]]
                assert torch.allclose(rows, expected[0], atol=1e-5), key
                assert x.dim() == 2 or not x[i, expected.shape[1] :].any()


@pytest.mark.parametrize("reducer", ["tome", "ltp", "patchmerger", "apt"])
def test_every_image_gets_what_it_gets_alone(batch: dict[str, Tensor], reducer: str) -> None:
    whole = zoo.wrap(model("siglip2"), reducer, R2 if reducer == "tome" else None).eval()
    with torch.no_grad():
        ours = whole(**batch, output_hidden_states=True)
        assert len(ours.hidden_states) == whole.depth + 1
        check_rows(ours, batch, whole, output_hidden_states=True)
        # The same model with one tensor for an answer takes what the processor made, too.
        assert torch.equal(whole.tensors()(batch), ours.pooler_output)


def test_nothing_reduced_is_the_original(batch: dict[str, Tensor]) -> None:
    given = {**batch, "pixel_values": batch["pixel_values"].nan_to_num()}
    for name in ("siglip2", "siglip2-head"):
        m = model(name)
        with torch.no_grad():
            theirs, ours = m(**given), zoo.wrap(m, None)(**given)
            assert all(torch.equal(ours[key], value) for key, value in theirs.items())
            assert torch.equal(zoo.wrap(m, None).tensors()(given), next(reversed(theirs.values())))


def test_labels_and_a_reducer_in_place(batch: dict[str, Tensor]) -> None:
    m, labels = model("siglip2-head"), torch.tensor([1, 0, 3, 2])
    wrapped = zoo.wrap(m, "tome", R2)
    with torch.no_grad():
        ours = wrapped(**batch, labels=labels)
        logits = torch.cat([wrapped(**alone(batch, i)).logits for i in range(len(SIZES))])
        assert torch.allclose(ours.logits, logits, atol=1e-5)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert torch.allclose(ours.loss, expected, atol=1e-5)
        as_tuple = wrapped(**batch, labels=labels, return_dict=False)
        assert torch.equal(as_tuple[0], ours.loss) and torch.equal(as_tuple[1], ours.logits)
        zoo.attach(m, "tome", R2)
        assert torch.equal(m(**batch, labels=labels).loss, ours.loss)


def test_one_row_per_patch_is_as_long_as_the_mask(batch: dict[str, Tensor]) -> None:
    m = zoo.attach(model("siglip2"), "tome", R2, restore="merged").eval()
    with torch.no_grad():
        ours = m(**batch)
        assert ours.last_hidden_state.shape[:2] == batch["pixel_attention_mask"].shape
        check_rows(ours, batch, m)


def test_one_image_and_none(batch: dict[str, Tensor]) -> None:
    whole = zoo.wrap(model("siglip2"), "tome", R2)
    with torch.no_grad():
        one = {key: value[:1] for key, value in batch.items()}
        answer, info = whole(**one, return_info=True)
        assert info.grid == tuple(batch["spatial_shapes"][0].tolist()) == (3, 7)
        assert answer.last_hidden_state.shape[1] == 21 - 2 * whole.depth
        none = {key: value[:0] for key, value in batch.items()}
        assert whole(**none).pooler_output.shape == (0, 32)


def test_what_cannot_be_is_one_line(batch: dict[str, Tensor]) -> None:
    whole = zoo.wrap(model("siglip2"), "tome", R2)
    mask = batch["pixel_attention_mask"]
    odd = mask.clone()
    odd[1, 3] = 0
    without = {k: v for k, v in batch.items() if k != "pixel_attention_mask"}
    for changes, words in (
        ({"pixel_attention_mask": odd}, r"image 1 of the batch: expected its 4x4 patches"),
        ({"pixel_attention_mask": mask[:, :5]}, r"pixel_attention_mask of shape \(4, 24\)"),
        ({"pixel_attention_mask": mask.new_ones(4, 24)}, "image 0 of the batch"),
        ({"spatial_shapes": batch["spatial_shapes"][:2]}, r"spatial_shapes of shape \(B, 2\)"),
        ({"return_info": True}, "one size at a time"),
    ):
        with pytest.raises(ZooError, match=words) as error:
            whole(**{**batch, **changes})
        assert "\n" not in str(error.value)
    with pytest.raises(ZooError, match="expected pixel_attention_mask beside patches"):
        whole(**without)


def test_selectors_refuse_padded_batches(batch: dict[str, Tensor]) -> None:
    eyes = zoo.selector(zoo.wrap(model("siglip2"), None), "divprune", keep=8)
    for given in (batch, batch["pixel_values"]):
        with pytest.raises(ZooError, match="only the tower itself takes them"):
            eyes(given)
