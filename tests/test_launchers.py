"""Sweeps whose jobs run in other processes: no row is lost, and the sweep says how they ended."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from zoo.results.rows import _lock, append_row, new_row, readable_rows
from zoo.run import launchers
from zoo.run.deaths import end_of, hear
from zoo.run.launchers import Follower, refuse
from zoo.run.messages import explain, is_lost
from zoo.run.outcome import State
from zoo.run.sweep import ProgressCallback
from zoo.run.typed import overrides_of, typed


@pytest.mark.parametrize(
    ("name", "extra"), [("joblib", "joblib"), ("submitit_slurm", "submitit"), ("ray", "ray")]
)
def test_a_launcher_without_its_plugin_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(launchers, "_installed", lambda plugin: False)
    message = refuse(["-m", f"hydra/launcher={name}", "seed=0,1"])
    assert message is not None and f"pip install 'tokenzoo[{extra}]'" in message


def test_launchers_that_would_do_nothing_or_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(launchers, "_installed", lambda plugin: True)
    assert "without -m" in str(refuse(["hydra/launcher=joblib", "seed=0"]))
    assert refuse(["--multirun", "hydra/launcher=joblib", "seed=0"]) is None
    assert refuse(["hydra/launcher=joblib", "hydra.mode=MULTIRUN"]) is None
    assert refuse(["hydra/launcher=mine", "-m"]) is None  # Hydra knows them
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "-m under torchrun" in str(refuse(["-m", "seed=0,1"]))
    assert refuse(["seed=0"]) is None


def test_what_was_typed_travels_with_the_jobs():
    from hydra.core.singleton import Singleton

    before = typed().argv
    typed().argv = ["zoo", "eval", "-m", "reducer=tome,topk"]
    state = pickle.loads(pickle.dumps(Singleton.get_state()["instances"]))
    typed().argv = before
    assert next(v for k, v in state.items() if k.__name__ == "Typed").argv[-1].endswith("topk")


def test_the_bar_of_a_sweep_stays_where_it_is():
    callback = ProgressCallback()
    callback._bar, callback._follower = sys.stderr, object()
    sent = pickle.loads(pickle.dumps(callback))
    assert sent._bar is None and sent._follower is None


def test_rows_are_said_as_they_come(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(State, "failed_jobs", 0)
    monkeypatch.setattr(State, "rows_path", None)
    path, seen = tmp_path / "rows.jsonl", []
    follower = Follower(path, lambda: seen.append(1))
    follower._look()  # no file yet
    append_row(path, new_row(backbone="deit", method="tome", top1=50.0))
    command = "zoo eval seed=1 'task=[accuracy]'"
    line = json.dumps(new_row(status="failed", error="no data", command=command))
    with open(path, "a") as file:
        file.write(line[:50])
    follower._look()
    assert len(seen) == 1  # a line that is still being written
    with open(path, "a") as file:
        file.write(line[50:] + "\n")
    follower.start()
    follower.stop()
    out, err = capsys.readouterr()
    assert out == "deit + tome | top-1 50.00 %\n"
    assert err == "error: no data [seed=1 task=[accuracy]]\n"
    assert len(seen) == 2 and State.failed_jobs == 1 and State.rows_path == str(path)


def test_the_end_of_a_process_is_put_in_words():
    def of(*codes):
        return end_of([SimpleNamespace(returncode=code) for code in codes])

    assert "process 2 of this run was killed by SIGKILL" in of(None, -9)
    assert "process 1 of this run ended with exit code 3" in of(3, -9)
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9")
    assert "another process of this run has ended" in str(explain(lost))


def test_who_waits_for_a_lost_process_hears_of_it_first():
    told = []

    def watch():
        time.sleep(0.2)
        told.append("which one it was")

    watching = threading.Thread(target=watch, name="child-process-observer", daemon=True)
    watching.start()
    assert is_lost(RuntimeError("Connection closed by peer [::1]:9"))
    hear(30)
    assert told and not is_lost(RuntimeError("shapes differ"))


_WRITER = """
import sys
from zoo.results.rows import append_row
for i in range(60):
    append_row(sys.argv[1], {"run_id": f"{sys.argv[2]}-{i}", "notes": "x" * 5000})
    print(i, flush=True)
"""


def test_writers_that_are_killed_spoil_no_row_of_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", _WRITER, str(path)]
    writers = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    written = [int(writers[0].stdout.readline()) for _ in range(5)]
    writers[0].kill()
    # As if it had been killed within a line: it had the lock then, so that no other writer stood
    # between its look at the file's end and its own line.
    with open(path, "ab") as file:
        _lock(file.fileno())
        file.write(b'{"run_id": "half')
    append_row(path, {"run_id": "after", "notes": ""})
    for writer in writers:
        writer.communicate(timeout=60)
    rows = readable_rows([path])
    names = [row["run_id"] for row in rows]
    assert len(names) == len(set(names))
    assert {f"{i}-{k}" for i in (1, 2) for k in range(60)} <= set(names)
    assert {f"0-{k}" for k in written} | {"after"} <= set(names)


def test_rows_of_several_machines_are_joined_and_each_run_counts_once(tmp_path, capsys):
    one, two = (new_row(backbone="deit", method=name, top1=1.0) for name in ("tome", "topk"))
    same_name = {**two, "created": "2027-01-01T00:00:00.000+00:00", "method": "evit"}
    for name, rows in (("a", [one, two]), ("b/c", [two, same_name]), ("d", [one, {"method": "x"}])):
        for row in rows:
            append_row(tmp_path / name / "rows.jsonl", row)
    append_row(tmp_path / "d" / "rows.jsonl", {"method": "x"})  # rows without a name are many
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "d", tmp_path / "a/rows.jsonl"]
    assert sorted(row["method"] for row in readable_rows(paths)) == [
        *("evit", "tome", "topk", "x", "x"),
    ]


def test_options_are_taken_out_of_a_command():
    assert overrides_of("python eval.py '~data' seed=0 -m") == ["~data", "seed=0"]


@pytest.mark.slow  # starts Python many times
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_in_other_processes_loses_no_row(tmp_path, launcher):
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    try:
        found = importlib.util.find_spec(plugin)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"hydra/launcher={launcher} is not installed")
    command = [sys.executable, "-m", "zoo", "eval", "-m", f"hydra/launcher={launcher}"]
    command += ["weights=vit_digits", "reducer=tome,topk,evit,none", "schedule.r=1,40", "limit=12"]
    command += ["control=[]", "results=rows.jsonl", "~hydra.callbacks.report"]
    command += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=500, env=environment
    )
    assert run.returncode == 1, run.stderr  # nothing can remove 40 of 64 in every block
    assert run.stdout.count("top-1") == 5
    assert "[weights=vit_digits reducer=tome schedule.r=40" in run.stderr
    assert "error: 3 jobs of the sweep failed" in run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and len({row["run_id"] for row in rows}) == 8
    assert len({row["command"] for row in rows}) == 8
    assert all(row["command"].startswith("python -m zoo eval weights=") for row in rows)
    assert sorted(row["status"] for row in rows) == ["failed"] * 3 + ["ok"] * 5
    [own] = tmp_path.glob("outputs/eval-sweep/*/*/rows.jsonl")
    assert len(own.read_text().splitlines()) == 8


def test_control_rows_are_measured_by_one_process():
    from omegaconf import OmegaConf

    from zoo.run.controls import Job, _alone

    typed = ("seed=1", "trainer=ddp", "trainer.devices=2", "+trainer.x=1", "trained=1")
    trainer = {"strategy": "ddp", "accelerator": "cpu", "devices": 2}
    cfg = OmegaConf.create({"device": "auto", "trainer": trainer})
    job = _alone(Job(cfg, typed))
    assert job.cfg.trainer is None and job.cfg.device == "cpu"
    assert job.overrides == ("seed=1", "trained=1", "device=cpu")
    spawned = Job(OmegaConf.merge(cfg, {"trainer": {"strategy": "ddp_spawn"}}), typed)
    assert _alone(spawned) is spawned
