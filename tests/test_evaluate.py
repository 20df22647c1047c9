"""What `zoo eval` measures and writes down: kernels, fidelity without labels, provenance."""

import pytest
import torch

import zoo
from reduction.functional import kernels
from zoo.checkpoint import save_pretrained
from zoo.measure.describe import dense_of
from zoo.measure.fidelity import compare_answers
from zoo.results.rows import read_rows


def rows(tmp_path):
    return read_rows(tmp_path / "results")


# --------------------------------------------------------------------- the same bytes again


@pytest.fixture
def biased(monkeypatch):
    """A clock that always finds another kernel to be the fastest."""
    calls = iter(range(100_000_000))

    def fastest(rivals, *_):
        return rivals[next(calls) % len(rivals)]

    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "_fastest", fastest)
    yield
    kernels.forget()


def test_deterministic_runs_choose_kernels_without_a_clock(run, tmp_path, biased):
    line = "eval weights=vit_digits reducer=tome schedule.r=4 task=[accuracy,fidelity] limit=40"
    for _ in range(3):
        kernels.forget()
        assert run(f"{line} deterministic=true")[0] == 0
    found = [{k: v for k, v in r.items() if k not in ("run_id", "created")} for r in rows(tmp_path)]
    assert found[0] == found[1] == found[2]
    assert found[0]["deterministic"] is True
    assert set(found[0]["kernels"].values()) == {"fused"}
    # The switch belongs to the run.
    assert not kernels.deterministic() and not torch.are_deterministic_algorithms_enabled()
    kernels.forget()
    assert run(line)[0] == 0
    last = rows(tmp_path)[-1]
    assert last["deterministic"] is False
    assert {"fused", "at_once"} <= set(last["kernels"].values()) | {"at_once"}
    assert last["kernels"].keys() == found[0]["kernels"].keys()


def test_a_budget_in_time_cannot_go_without_a_clock(run):
    code, _, err = run(
        "eval weights=vit_digits reducer=tome schedule=target_speedup deterministic=true task=flops"
    )
    assert code == 2 and "deterministic=true goes without a clock" in err


# ------------------------------------------------------------------ fidelity without labels


def test_a_model_without_classifier_compares_its_features(run, tmp_path):
    line = (
        "eval backbone=test_vit +backbone.args.num_classes=0 task=fidelity data=synthetic limit=4"
    )
    assert run(f"{line} reducer=tome")[0] == 0
    assert run(f"{line} reducer=none")[0] == 0
    reduced, dense = rows(tmp_path)
    found = reduced["fidelity"]
    assert found["agreement"] is None and found["kl"] is None and found["n_images"] == 4
    assert 0 < found["cosine"] < 1
    assert (reduced["dataset"], dense["dataset"], dense["fidelity"]) == ("synthetic",) * 2 + (None,)
    from zoo.report import table

    text = table(rows(tmp_path))
    assert "· synthetic (test)" in text and text.rstrip().endswith(f"{found['cosine']:.3f}")
    code, _, err = run(line.replace("task=fidelity", "task=accuracy") + " reducer=tome")
    assert code == 2 and "0 outputs" in err


def test_classes_of_the_data_are_no_concern_of_fidelity(run, tmp_path):
    # Four classes of shapes, ten outputs.
    line = "eval backbone=test_vit +backbone.args.num_classes=10 reducer=tome task=fidelity limit=4"
    assert run(f"{line} data=synthetic")[0] == 0
    assert rows(tmp_path)[0]["fidelity"]["agreement"] is not None


def test_tokens_that_nobody_pooled_cannot_be_compared(run):
    code, _, err = run(
        "eval backbone=test_vit +backbone.args.num_classes=0 +backbone.args.global_pool='' "
        "reducer=tome task=fidelity data=synthetic limit=4"
    )
    assert code == 2 and "fidelity compares one vector per image" in err


def test_features_that_turn_have_no_cosine_left():
    class Features(torch.nn.Module):
        num_classes = 0

        def __init__(self, turn):
            super().__init__()
            self.turn = turn

        def forward(self, images):
            x = images.flatten(1)
            return torch.stack([-x[:, 1], x[:, 0]], 1) if self.turn else x

    images = torch.rand(3, 1, 1, 2)
    found = compare_answers(Features(True), Features(False), [(images, images)])
    assert found["cosine"] == pytest.approx(0) and found["agreement"] is None
    assert compare_answers(Features(True), Features(True), [(images, images)])["cosine"] == 1


def test_the_dense_model_runs_with_the_options_of_the_reduced_one():
    m = zoo.load("vit_digits", reducer="tome", linear="onednn", last_block="class_token")
    dense = dense_of(m)
    assert dense.runtime == m.runtime and dense.reducer is None
    assert dense_of(zoo.load("vit_digits", reducer="tome")) is not dense
    count = zoo.profile(m)
    assert count.dense == pytest.approx(zoo.profile(dense).gmacs)
    assert count.dense < zoo.profile(zoo.load("vit_digits")).gmacs


# ------------------------------------------------------------------------------- provenance


@pytest.mark.slow
def test_how_weights_were_trained_is_in_every_row_of_theirs(run, tmp_path):
    line = "train weights=vit_digits reducer=tome schedule.r=4 trainer=cpu trainer.max_epochs=1 "
    line += "trainer.limit_train_batches=2 trainer.limit_val_batches=1 callbacks=none logger=none"
    for seed, more in ((0, ""), (1, ""), (0, "aux_weight=0.5")):
        folder = f"output_dir={tmp_path}/{seed}{more[:3]}"
        assert run(f"{line} seed={seed} {folder} {more}".strip())[0] == 0
    first, second, other = (row["training"] for row in rows(tmp_path))
    assert first == second != other
    assert (first["epochs"], first["start"], first["partial"]) == (1, "vit_digits", True)
    assert len(first["start_sha"]) == 64
    assert run(f"eval weights={tmp_path}/0/model task=accuracy")[0] == 0
    assert run(f"eval weights={tmp_path}/0/model task=accuracy reducer=none")[0] == 0
    *_, again, dense = rows(tmp_path)
    assert again["trained"] and again["training"] == first
    assert not dense["trained"] and dense["training"]["method"] == "tome"


def test_a_checkpoint_is_trained_with_its_own_method(run, tmp_path):
    m = zoo.load("vit_digits", reducer="tome")
    state = {f"net.{k}": v for k, v in m.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"recipe": m.recipe}}, tmp_path / "a.ckpt")
    for more in ("", "reducer=tome", "reducer=topk", "reducer=none"):
        assert run(f"eval weights=a.ckpt task=flops {more}")[0] == 0
    assert [row["trained"] for row in rows(tmp_path)] == [True, True, False, False]
    assert save_pretrained(m, tmp_path / "b")
    assert run("eval weights=b task=flops")[0] == 0
    assert rows(tmp_path)[-1]["trained"] is False
