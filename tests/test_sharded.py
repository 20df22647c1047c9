"""Training in shares (FSDP2) by two processes of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch

import zoo.models  # noqa: F401  (registers vit_digits)
from zoo.lit.callbacks import EMA
from zoo.lit.classifier import Classifier
from zoo.lit.sharded import Sharded, check_sharding, kept_whole, make_whole
from zoo.model.reduced import ReducedViT

_GRADIENTS = """
import torch
from torch import distributed, nn
import zoo
from zoo.lit.sharded import is_sharded, shard, unsharded
import copy
distributed.init_process_group("gloo")
mesh = distributed.init_device_mesh("cpu", (2,))
torch.manual_seed(0)
schedule = {"name": "constant_r", "r": 4}
for name in ("tome", "evit", "dynamicvit"):
    net = zoo.load("vit_digits", reducer={"name": name}, schedule=schedule).train()
    same, whole = copy.deepcopy(net), copy.deepcopy(net)
    shard(net, mesh)
    assert is_sharded(net) and not is_sharded(same)
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([1, 2, 3, 4])
    for model in (net, same):
        torch.manual_seed(1)
        nn.functional.cross_entropy(model(images), labels).backward()
    for (key, p), q in zip(net.named_parameters(), same.parameters(), strict=True):
        assert p.to_local().numel() < q.numel() or q.shape[0] == 1 or q.numel() < 2, key
        if q.grad is not None:
            assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-6), key
    again = unsharded(net, whole)
    for p, q in zip(again.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(again.eval()(images), same.eval()(images))
print("same")
"""


@pytest.fixture
def module():
    return Classifier(ReducedViT(timm.create_model("vit_digits", embed_dim=16, depth=1)))


def trainer(*callbacks, strategy=None):
    return SimpleNamespace(strategy=strategy or Sharded(), callbacks=list(callbacks))


def test_what_does_not_go_with_shares_is_refused(module):
    check_sharding(trainer(), module)
    with pytest.raises(zoo.errors.ZooError, match="callbacks.ema=null"):
        check_sharding(trainer(EMA()), module)
    check_sharding(trainer(EMA(), strategy="ddp"), module)
    next(module.net.parameters()).requires_grad_(False)
    with pytest.raises(zoo.errors.ZooError, match="frozen; type trainer=ddp"):
        check_sharding(trainer(), module)


def test_other_strategies_keep_no_copy(module):
    assert kept_whole(trainer(strategy="ddp"), module) is None
    shares = trainer()
    net, whole = module.net, kept_whole(shares, module)
    assert whole is not net
    make_whole(shares, module, whole)
    assert module.net is net and shares.strategy.active is False  # it never was in shares


def run(command, folder, environment=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # starts Python twice
def test_gradients_in_shares_are_those_of_the_whole(tmp_path):
    (tmp_path / "gradients.py").write_text(_GRADIENTS)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "gradients.py"]
    assert run(command, tmp_path, {"PYTHONPATH": root}).count("same") == 2


def trained_in_both_ways(tmp_path, *words):
    plain = [sys.executable, "-m", "zoo", "train", "weights=vit_digits", "reducer=tome"]
    plain += ["schedule.r=4", "trainer.accelerator=cpu", "trainer.devices=2"]
    plain += ["trainer.precision=32-true", "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    plain += ["callbacks.ema=null", "logger=none", "threads=1", "results=rows.jsonl"]
    states = []
    for name in ("ddp", "fsdp"):
        run([*plain, *words, f"trainer={name}", f"output_dir={name}"], tmp_path)
        states.append(zoo.load(str(tmp_path / name / "model")).state_dict())
    return states


@pytest.mark.slow  # starts Python four times
def test_adamw_moves_by_rounding_only_what_has_no_gradient_to_speak_of(tmp_path):
    ddp, fsdp = trained_in_both_ways(tmp_path, "optim=adamw", "optim.lr=0.001")
    apart = total = 0
    for key, value in ddp.items():
        off = (value - fsdp[key]).abs() > 1e-5
        if key.endswith("qkv.bias"):  # a softmax does not see the bias of the keys
            queries, _, values = off.chunk(3)
            assert not (queries | values).any()
            continue
        apart, total = apart + int(off.sum()), total + off.numel()
    assert apart < 1e-3 * total


@pytest.mark.slow  # starts Python five times
def test_a_model_trained_in_shares_is_that_of_ddp_and_an_ordinary_one(tmp_path):
    states = trained_in_both_ways(tmp_path, "optim=sgd", "optim.lr=0.1")
    start = zoo.load("vit_digits").state_dict()
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, atol=1e-5), key
    assert any(not torch.allclose(value, start[key], atol=1e-4) for key, value in states[1].items())
    words = ["eval", "weights=fsdp/model", "results=rows.jsonl"]
    run([sys.executable, "-m", "zoo", *words], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["n_images"] for row in rows] == [360] * 3
    assert rows[1]["top1"] == rows[2]["top1"] and rows[2]["trained"]
