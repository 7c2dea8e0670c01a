"""Whole runs of a tiny model on the CPU: folder, log, metrics, resuming, signals, exit codes."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import SCRIPT, command, environment, events, make_corpus, run, run_folders

import train_gpt as t

LINE = re.compile(r"^step:(\d+)/(\d+) (?:(train_loss|val_loss):(\d+\.\d+|nan|inf) )?train_time:(\d+)(ms|s) "
                  r"step_avg:(\d+\.\d+|nan)ms(?: [a-z_]+:\S+)*$", re.ASCII)
HEAD = ("run_id script_sha256 started changed seed python torch cuda driver gpu world_size grad_accum fp8 attention "
        "data_val data_train").split()
TAIL = ("val_loss train_time_ms steps tokens tokens_per_s mfu mfu_with_attention peak_train_mib peak_val_mib "
        "reserved_mib exit").split()
KEYS = dict(
    start="format run_id script_sha256 utc argv knobs changed seed device gpu gpu_count gpu_memory_mib driver torch "
          "cuda nccl triton python packages world_size grad_accum fp8 attention data",
    step="step tokens train_loss train_ms wall_s", val="step tokens val_loss val_tokens train_ms wall_s",
    clock="mark train_ms wall_s", checkpoint="step bytes ms", warning="text step", resume="step from_run_id",
    end="status code reason steps tokens val_loss train_ms wall_s tokens_per_s mfu mfu_with_attention peak_train_mib "
        "peak_val_mib reserved_mib")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A complete run with a checkpoint in it: (folder, its run folder, standard output)."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder / "data")
    out = run(folder, "--checkpoint_every=5", "--val_every=3", "--target_loss=1").stdout
    return folder, run_folders(folder)[0], out


def test_log(done):
    folder, logs, out = done
    raw = (logs / "log.txt").read_bytes()
    lines = raw.decode("ascii").split("\n")
    assert b"\r" not in raw and lines.pop() == "" and lines[0] == "train_gpt log 1"
    assert [line.partition(": ")[0] for line in lines[1:17]] == HEAD
    assert [line.partition(": ")[0] for line in lines[-11:]] == TAIL
    assert lines[-1] == "exit: 0 complete" and all(len(line) <= 400 for line in lines if not line.startswith("changed"))
    steps = [LINE.match(line).groups() for line in lines if line.startswith("step:")]
    assert [int(s[0]) for s in steps if s[2] == "train_loss"] == list(range(1, 9))
    assert [int(s[0]) for s in steps if s[2] == "val_loss"] == [0, 3, 6, 8]
    assert str(folder) not in raw.decode() + (logs / "metrics.jsonl").read_text()
    assert (logs / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert "sample: " in out and "dead time: " in out and "target missed by " in out.splitlines()[-1]


def test_metrics_and_clock(done):
    rows = events(done[1])
    assert rows[0]["event"] == "start" and rows[-1]["event"] == "end"
    for row in rows:
        assert list(row)[0] == "event" and list(row)[1:] == KEYS[row["event"]].split()
    assert rows[0]["knobs"]["data_dir"] == "data" and "data_dir" not in rows[0]["changed"]
    assert [m["mark"] for m in rows if m["event"] == "clock"] == ["start", "stop"] * 4
    running, before = False, dict(train_ms=0.0, wall_s=0.0)
    for row in (row for row in rows[1:] if "train_ms" in row):
        train, wall = row["train_ms"] - before["train_ms"], 1e3 * (row["wall_s"] - before["wall_s"])
        assert train == pytest.approx(wall, abs=1, rel=1e-3) if running else train == 0
        running, before = row.get("mark") == "start" or running and row.get("mark") != "stop", row
    assert [row["tokens"] for row in rows if row["event"] == "step"] == [1024 * n for n in range(1, 9)]


def test_at_most_fifty_step_lines_go_to_the_files(tmp_path):
    make_corpus(tmp_path / "data")
    out = run(tmp_path, "--steps=100", "--epochs=20", "--train_seq_len=128", "--sequences_per_step=1").stdout
    assert len(events(run_folders(tmp_path)[0], "step")) <= 50 and out.count("train_loss") == 100
    assert "minutes of training for 100 steps" in out and "--steps=50" in out


def test_repeating_the_stream_is_a_warning(tmp_path):
    make_corpus(tmp_path / "data", train=(1025,))
    run(tmp_path, "--epochs=8", "--save=False")
    assert "8.00 times" in events(run_folders(tmp_path)[0], "warning")[0]["text"]


def test_resume_equals_an_unbroken_run_bit_for_bit(done, tmp_path):
    folder, whole = tmp_path, torch.load(done[1] / "weights.pt")
    shutil.copytree(done[0] / "data", folder / "data")
    shutil.copytree(done[0] / "logs", folder / "logs")
    run(folder, "--resume=latest")
    resumed = run_folders(folder)[-1]
    again = torch.load(resumed / "weights.pt")
    assert all(torch.equal(whole["model"][k], again["model"][k]) for k in whole["model"])
    assert events(resumed, "end")[0]["val_loss"] == events(done[1], "end")[0]["val_loss"]
    assert events(resumed, "resume")[0] == dict(event="resume", step=5, from_run_id=done[1].name)
    assert events(resumed, "clock")[0]["train_ms"] > 0


def test_damaged_checkpoints(done, tmp_path):
    shutil.copytree(done[0] / "data", tmp_path / "data")
    shutil.copytree(done[0] / "logs", tmp_path / "logs")
    good = next((tmp_path / "logs").glob("*/checkpoints/step_000005.pt"))
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (good.parent / "step_000006.pt").write_bytes(flipped)
    (good.parent / "step_000007.pt").write_bytes(good.read_bytes()[:5000])
    run(tmp_path, "--resume=latest")
    warnings = [row["text"] for row in events(run_folders(tmp_path)[-1], "warning")]
    assert sum("is damaged" in text for text in warnings) == 2 and "--" not in warnings[0]
    assert "not usable" in run(tmp_path, f"--resume={good.parent / 'step_000007.pt'}", code=5).stderr
    assert "--num_heads=2" in run(tmp_path, f"--resume={good}", "--num_heads=4", code=2).stderr
    assert "does not hold" in run(tmp_path, f"--resume={done[1] / 'weights.pt'}", code=5).stderr
    shutil.rmtree(tmp_path / "logs")
    assert "no usable" in run(tmp_path, "--resume=latest", code=5).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_a_signal_saves_and_the_run_can_go_on(tmp_path):
    make_corpus(tmp_path / "data")
    long = ("--steps=3000", "--epochs=2000", "--save=False")
    process = subprocess.Popen(command(tmp_path, *long), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("step:2/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait(60) == 75 and "--resume=latest" in process.stderr.read()
    first = run_folders(tmp_path)[0]
    end, saved = events(first, "end")[0], events(first, "checkpoint")[0]
    assert end["status"] == "stopped" and end["steps"] == saved["step"]
    time.sleep(1)  # run folders are ordered by their second
    run(tmp_path, "--resume=latest", f"--steps={end['steps'] + 1}", "--epochs=2000")
    assert events(run_folders(tmp_path)[1], "resume")[0]["step"] == end["steps"]


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path):
    make_corpus(tmp_path / "data")
    knobs = ("--adam_eps=0", "--checkpoint_every=1")  # 0 / 0 in the embeddings, which see no gradient in step 1
    assert "training loss is nan at step 2" in run(tmp_path, *knobs, code=3).stderr
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["status"] == "failed" and end["code"] == 3 and math.isfinite(end["val_loss"])
    assert not list(tmp_path.glob(f"logs/*/checkpoints/step_{end['steps']:06d}.pt"))
    assert not list(tmp_path.glob("logs/*/weights.pt"))


def test_text_from_saved_weights(done):
    out = run(done[0], "--weights=latest", "--prompt=abc").stdout
    assert out.startswith("sample: abc") and len(run_folders(done[0])) == 1
    assert out == run(done[0], f"--weights={done[1] / 'weights.pt'}", "--prompt=abc").stdout
    assert "not usable" in run(done[0], "--weights=nowhere.pt", code=5).stderr


def test_two_ranks_give_the_same_losses(done, tmp_path):
    shutil.copytree(done[0] / "data", tmp_path / "data")
    run(tmp_path, "--steps=4", "--save=False", ranks=2)
    run(tmp_path, "--steps=4", "--save=False")
    two, one = sorted((events(f) for f in run_folders(tmp_path)), key=lambda rows: -rows[0]["world_size"])
    assert (two[0]["world_size"], two[0]["grad_accum"], one[0]["grad_accum"]) == (2, 2, 4)
    losses = [[row["val_loss"] for row in rows if row["event"] == "val"] for rows in (one, two)]
    assert losses[0][0] == losses[1][0] and losses[0][1] == pytest.approx(losses[1][1], abs=2e-3)
    steps = [[row["train_loss"] for row in rows if row["event"] == "step"] for rows in (one, two)]
    assert steps[0] == pytest.approx(steps[1], abs=2e-3)


def test_the_warm_up_leaves_no_trace(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = t.parse_overrides(command(done[0])[2:])
    run_ = t.Run(hp, 0, 1, torch.device("cpu"), [], b"")
    weights = {k: v.clone() for k, v in run_.model.state_dict().items()}
    state = torch.get_rng_state()
    run_.warm_up()
    assert all(torch.equal(v, weights[k]) for k, v in run_.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and run_.model.training
    assert all(p.grad is None for p in run_.model.parameters()) and not any(o.state for o in run_.optimizers)


def test_profile_writes_a_trace(tmp_path):
    make_corpus(tmp_path / "data")
    assert "Self CPU" in run(tmp_path, "--profile=2", "--steps=4", "--save=False").stdout
    assert json.loads((run_folders(tmp_path)[0] / "trace.json").read_text())["traceEvents"]


def test_a_failure_within_the_first_step_keeps_its_code_and_closes_the_log(tmp_path, monkeypatch):
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def launch(*_):
        raise MemoryError

    monkeypatch.setattr(t.Run, "launch", launch)
    monkeypatch.setattr(t, "catch_signals", list)
    with pytest.raises(SystemExit) as caught:
        t.main(command(tmp_path)[2:])
    assert caught.value.code == 6
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["code"] == 6 and end["status"] == "failed" and end["steps"] == 0
