"""Every mistake on the command line is one line and an exit code, without importing torch."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zoo
from zoo.results.rows import read_rows
from zoo.run.messages import unknown_flag

ROOT = Path(zoo.__file__).resolve().parents[1]


def one_line(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in err and "HYDRA_FULL_ERROR" not in err
    return lines[0]


# What is typed, and what the one line has to hold.
MISTAKES = [
    ("eval backbone=deit_smal", "did you mean deit_small"),
    ("eval reducer=tomme backbone=test_vit", "reducer=tomme: no such reducer; did you mean tome"),
    ("eval reducer=zzz", "reducer is one of adavit, algm, "),
    ("eval schedule=keeprate", "did you mean keep_rate"),
    ("eval seedd=1", "no option 'seedd'; did you mean seed?"),
    ("eval throughput.round=3", "did you mean rounds"),
    ("eval throughput.foo=3", "throughput has batch, rounds"),
    ("eval schedule.rate=0.5", "it belongs to schedule="),
    ("eval rate=0.5", "did you mean"),
    (
        "eval reducer.metric=key",
        "no reducer is chosen; add reducer=dtome|importance_then_similarity|pixelprune|toma|tome",
    ),
    ("eval backbone=test_vit backbone.args.img_size=96", "+backbone.args.img_size=VALUE"),
    ("eval weights=epoch=3.ckpt", """quote a value that holds =, so: 'weights="epoch=3.ckpt"'"""),
    ("eval seed", "options are written name=value"),
    ("eval seed=[1", "cannot read 'seed=[1'"),
    ("eval seed=1,2", "add -m to run each"),
    ("eval backbone=glob(*)", "add -m to run each"),
    ("eval +seed=1", "An item is already at 'seed'"),
    ("eval --multirn", "did you mean --multirun"),
    ("eval --seed=1", "options are set without dashes: seed=1"),
    ("eval --config-name=evall", "evall"),
    ("evall", "no command 'evall'; did you mean eval"),
    ("backbone=test_vit", "zoo eval backbone=test_vit"),
    ("list --foo", "zoo list --help"),
    ("show tomme", "did you mean 'tome'"),
    ("report nowhere", "nowhere does not exist"),
    # These need the model.
    ("eval", "weights=vit_digits"),
    ("eval backbone=test_vit task=flop", "did you mean flops"),
    ("eval backbone=test_vit task=[]", "task is empty"),
    ("eval backbone=timm task=flops", "type backbone.name=VALUE"),
    ("eval backbone=timm backbone.name=test_vitt task=flops", "did you mean 'test_vit"),
    ("eval backbone=timm backbone.name=resnet18 task=flops", "ResNet is not supported"),
    ("eval backbone=test_vit +backbone.args.img_size=100 task=flops", "multiple of the patch size"),
    ("eval backbone=test_vit +backbone.args.foo=1 task=flops", "foo"),
    (
        "eval backbone=test_vit reducer=evit schedule=keep_rate schedule.rate=1.3 task=flops",
        "keep rate must be in (0, 1], got 1.3",
    ),
    ("eval backbone=test_vit reducer=tome schedule.r=90 task=flops", "can remove at most 50"),
    ("eval backbone=test_vit reducer=tome +reducer.foo=1 task=flops", "foo"),
    ("eval weights=vit_digits task=accuracy +data.foo=1", "data: no argument 'foo'"),
    ("eval backbone=test_vit reducer=tome reducer.metric=foo task=flops", "metric must be"),
    ("eval backbone=test_vit data=folder task=accuracy", "data.root"),
    ("eval backbone=test_vit data=folder data.root=nowhere task=accuracy", "nowhere"),
    ("eval weights=nowhere.ckpt task=flops", "nowhere.ckpt: no such file"),
    ("eval weights=vit_digitz task=flops", "vit_digitz"),
    ("eval backbone=test_vit task=throughput throughput.batch=0", "throughput.batch"),
    ("eval backbone=test_vit device=cudaa task=flops", "device=cudaa"),
    ("eval backbone=test_vit dtype=fp8 task=flops", "float32, bfloat16, float16"),
    ("eval weights=vit_digits task=flops 'images=${oc.env:NOT_HERE}'", "'NOT_HERE' not found"),
]


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line(run, line, expected):
    code, out, err = run(line)
    assert code == 2
    assert expected in one_line(err)
    assert out == ""


def test_checkpoint_of_another_architecture(run, tmp_path):
    zoo.create_model("test_vit", num_classes=3)
    from zoo.checkpoint import save_pretrained

    save_pretrained(zoo.create_model("test_vit", num_classes=3), tmp_path / "small")
    code, _, err = run("eval backbone=test_vit2 weights=small task=flops")
    assert code == 2
    one_line(err)


def test_weights_without_a_recipe_ask_for_the_backbone(run, tmp_path):
    import torch

    model = zoo.create_model("test_vit", num_classes=3)
    torch.save(model.backbone.state_dict(), tmp_path / "plain.pth")
    code, _, err = run("eval weights=plain.pth task=flops")
    assert code == 2
    assert "backbone=NAME" in one_line(err)
    code, out, _ = run(
        "eval weights=plain.pth backbone=test_vit +backbone.args.num_classes=3 task=flops"
    )
    assert code == 0, out


def test_a_failed_run_leaves_a_row_and_loses_none(run, tmp_path):
    rows = tmp_path / "results" / "local" / "rows.jsonl"
    assert run("eval backbone=test_vit task=flops")[0] == 0
    before = rows.read_bytes()
    assert run("eval backbone=test_vit reducer=tome schedule.r=90 task=flops")[0] == 2
    assert rows.read_bytes().startswith(before)
    good, bad = read_rows(rows)
    assert (good["status"], bad["status"]) == ("ok", "failed")
    assert "at most 50" in bad["error"]
    assert (bad["method"], bad["schedule"]["r"], bad["backbone"]) == ("tome", 90, "test_vit")
    # A typo never got as far as a run.
    run("eval seedd=1")
    assert len(read_rows(rows)) == 2


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    import zoo.run.evaluate

    def broken(cfg):
        raise RuntimeError("a bug")

    monkeypatch.setattr(zoo.run.evaluate, "evaluate", broken)
    code, _, err = run("eval backbone=test_vit")
    assert code == 1
    assert "Traceback" in err and "in broken" in err and "RuntimeError: a bug" in err


def test_full_error_shows_tracebacks_of_mistakes_too(run, monkeypatch):
    from reduction import ZooError

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZooError, match="no such task"):
        run("eval backbone=test_vit task=flop")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_environment_and_arguments_are_as_before(run, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    argv = list(sys.argv)
    run("eval seedd=1")
    run("eval backbone=test_vit task=flop")
    assert sys.argv == argv
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_interrupt_is_one_line_and_130(run, monkeypatch):
    import zoo.run.evaluate

    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.run.evaluate, "evaluate", interrupted)
    assert run("eval backbone=test_vit") == (130, "", "interrupted\n")


def test_ctrl_c_in_the_shell(tmp_path):
    slow = "throughput.rounds=1000 throughput.min_time=1"
    command = f"{ROOT / 'eval.py'} backbone=test_vit task=throughput {slow}"
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A test run in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("outputs/eval/*/*/.hydra/overrides.yaml")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err) == ("", "interrupted\n")


def test_overview_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("train", "eval", "list", "show", "report", "doctor"):
        assert f"zoo {command} " in out
    assert run("") == (0, out, "")
    assert run("--version") == (0, f"tokenzoo {zoo.__version__}\n", "")


def test_list(run):
    code, out, _ = run("list")
    table = out.split("\n\n")[0].splitlines()
    names = [line.split()[0] for line in table[1:]]
    assert code == 0 and names == zoo.list_methods()
    assert json.loads(run("list tome* --json")[1])[0]["arxiv"] == "2210.09461"
    assert run("list --models 'test_vit?'")[1].split() == ["test_vit2", "test_vit3", "test_vit4"]
    assert run("list --models nothing*")[0] == 2


def test_show_names_the_paper_and_the_arguments(run):
    code, out, _ = run("show tome")
    assert code == 0
    assert "Bolya" in out and "arxiv.org/abs/2210.09461" in out and "reducer.metric=key" in out


def test_every_method_can_be_shown(run):
    for name in zoo.list_methods():
        assert run(f"show {name}")[0] == 0


def test_scripts_and_console_command_are_the_same(run, tmp_path):
    code, out, _ = run("eval backbone=test_vit reducer=tome schedule.r=8 --cfg job")
    script = subprocess.run(
        [sys.executable, ROOT / "eval.py", *shlex.split("backbone=test_vit reducer=tome")]
        + shlex.split("schedule.r=8 --cfg job"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert code == 0 and script.stdout == out


def test_answers_at_once_import_nothing_heavy(tmp_path):
    """--help, --cfg job, typos and tab completion never wait for torch."""
    program = """
import os, sys
from zoo.cli.main import main
assert main(["--help"]) == 0
for command in ("eval", "train"):
    assert main([command, "--help"]) == 0
    assert main([command, "reducer=tome", "--cfg", "job"]) == 0
    assert main([command, "reducer=tomme"]) == 2
    assert main([command, "seedd=1"]) == 2
    os.environ["COMP_LINE"] = f"zoo {command} reducer=to"
    assert main(["-sc", "query=bash"]) == 0
heavy = {"torch", "timm", "lightning", "torchvision", "fvcore", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "reducer=tome" in done.stdout.split()
    assert list(tmp_path.iterdir()) == []


def test_completion_of_the_commands(run, monkeypatch):
    monkeypatch.setenv("COMP_LINE", "zoo ")
    assert run("-sc query=bash")[1].split() == [
        "train",
        "eval",
        "list",
        "show",
        "report",
        "calibrate",
        "doctor",
    ]


def test_help_names_every_group(run):
    code, out, _ = run("eval --help")
    assert code == 0
    for group in ("backbone", "reducer", "schedule", "data"):
        assert f"\n{group}: " in out


@pytest.mark.parametrize("arguments", ["--help", "eval --help", "report --help"])
def test_output_that_nobody_reads(tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "zoo", *arguments.split()],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flag", ["--mult", "-m", "-cfoo", "--cfg", "--config-dir=x", "-sc"])
def test_flags_of_hydra_pass(flag):
    if flag == "-cfoo":
        assert unknown_flag([flag])
    else:
        assert unknown_flag([flag, "seed=-1", "~seed", "-1"]) is None
