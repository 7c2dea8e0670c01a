"""Whole runs of a tiny model on the CPU: folder, log, metrics, resuming, signals, exit codes."""

import dataclasses
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import KNOBS, SCRIPT, command, environment, events, make_corpus, run, run_folders

import train_gpt as t

LINE = re.compile(r"^step:(\d+)/(\d+) (?:(train_loss|val_loss):(\d+\.\d+|nan|inf) )?train_time:(\d+)(ms|s) "
                  r"step_avg:(\d+\.\d+|nan)ms(?: [a-z_]+:\S+)*$", re.ASCII)
KEYS = dict(
    start="format run_id script_sha256 utc argv knobs changed seed device gpu gpu_count gpu_memory_mib driver torch "
          "cuda nccl triton python packages world_size fp8 attention stages data",
    step="step tokens train_loss lr momentum window sequences seq_len train_ms wall_s",
    val="step tokens val_loss val_tokens train_ms wall_s",
    clock="mark train_ms wall_s", checkpoint="step bytes ms", warning="text step", resume="step from_run_id",
    end="status code reason steps tokens val_loss train_ms wall_s tokens_per_s mfu peak_train_mib peak_val_mib "
        "reserved_mib")


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
    assert b"\r" not in raw and lines.pop() == "" and lines[0] == "train_gpt log 2"
    facts = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("clock"))
    assert facts["run_id"] == logs.name and facts["gpu"] == facts["mfu"] == "n/a" and facts["steps"] == "8"
    assert "{" not in raw.decode().replace(facts["changed"], "") and lines[-1] == "exit: 0 complete"
    steps = [LINE.match(line).groups() for line in lines if line.startswith("step:")]
    assert [int(s[0]) for s in steps if s[2] == "train_loss"] == list(range(1, 9))
    assert [int(s[0]) for s in steps if s[2] == "val_loss"] == [0, 3, 6, 8]
    assert str(folder) not in raw.decode() + (logs / "metrics.jsonl").read_text()
    assert (logs / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert "target missed by " in out.splitlines()[-1]
    shown = [line for line in lines if not line.startswith("clock: ")]
    assert [line for line in out.splitlines() if line in set(shown)] == shown, "the screen shows what the log holds"


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
    hp, steps = t.Hyperparameters(**rows[0]["knobs"]), [row for row in rows if row["event"] == "step"]
    assert [row["tokens"] for row in steps] == [1024 * n for n in range(1, 9)]
    for step, row in enumerate(steps):
        schedules = dict(lr=t.lr_at(step, hp), momentum=t.momentum_at(step, hp), window=t.window_at(step, hp))
        assert row.items() >= (schedules | dict(sequences=4, seq_len=256)).items()
    assert rows[0]["stages"] == [dict(first=0, sequences=4, seq_len=256, lr=1.0)] and rows[0]["format"] == 2


def test_at_most_fifty_step_lines_go_to_the_files(tmp_path):
    make_corpus(tmp_path / "data")
    out = run(tmp_path, "--steps=100", "--epochs=20", "--train_seq_len=128", "--sequences_per_step=1").stdout
    assert len(events(run_folders(tmp_path)[0], "step")) <= 50 and out.count("train_loss") == 100
    assert "minutes of training for 100 steps" in out and "--steps=50" in out


def test_repeating_the_stream_is_a_warning(tmp_path):
    make_corpus(tmp_path / "data", train=(1025,))
    run(tmp_path, "--epochs=8", "--save=False")
    assert "begun 8 times" in events(run_folders(tmp_path)[0], "warning")[0]["text"]


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


def test_a_resumed_run_has_the_rates_of_its_knobs(done, tmp_path):
    """Not those that the optimizers were saved with."""
    shutil.copytree(done[0] / "data", tmp_path / "data")
    checkpoint = next(done[1].glob("checkpoints/step_000005.pt"))
    for knobs in ((), ("--head_lr=0.5",)):
        run(tmp_path, f"--resume={checkpoint}", "--val_every=3", "--checkpoint_every=5", "--target_loss=1", *knobs)
    folders = run_folders(tmp_path)
    warned = {folder / "weights.pt": [row["text"] for row in events(folder, "warning")] for folder in folders}
    plain, other = sorted(warned, key=lambda path: len(warned[path]))
    assert warned[plain] == [] and warned[other] == ["changed since the checkpoint: head_lr"]
    heads = [torch.load(path)["model"]["lm_head.weight"] for path in (plain, other)]
    start = torch.load(checkpoint)["model"]["lm_head.weight"]
    assert (heads[1] - start).abs().max() > 10 * (heads[0] - start).abs().max()


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
    assert sum("is not usable" in text for text in warnings) == 2 and "--" not in warnings[0]
    assert "not usable" in run(tmp_path, f"--resume={good.parent / 'step_000007.pt'}", code=5).stderr
    assert "--num_heads=2" in run(tmp_path, f"--resume={good}", "--num_heads=4", code=2).stderr
    assert "holds no run" in run(tmp_path, f"--resume={done[1] / 'weights.pt'}", code=5).stderr
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
    assert end["status"] == "stopped" and end["steps"] == saved["step"] and end["val_loss"] is None
    time.sleep(1)  # run folders are ordered by their second
    run(tmp_path, "--resume=latest", f"--steps={end['steps'] + 1}", "--epochs=2000")
    assert events(run_folders(tmp_path)[1], "resume")[0]["step"] == end["steps"]


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(tmp_path):
    make_corpus(tmp_path / "data")
    knobs = ("--adam_eps=0", "--checkpoint_every=1")  # 0 / 0 in the embeddings, which see no gradient in step 1
    assert "training loss is nan at step 2" in run(tmp_path, *knobs, code=3).stderr
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["status"] == "failed" and end["code"] == 3 and end["val_loss"] is None
    assert not list(tmp_path.glob(f"logs/*/checkpoints/step_{end['steps']:06d}.pt"))
    assert not list(tmp_path.glob("logs/*/weights.pt"))


def test_two_ranks_give_the_same_losses(done, tmp_path):
    shutil.copytree(done[0] / "data", tmp_path / "data")
    run(tmp_path, "--steps=4", "--save=False", ranks=2)
    run(tmp_path, "--steps=4", "--save=False")
    two, one = sorted((events(f) for f in run_folders(tmp_path)), key=lambda rows: -rows[0]["world_size"])
    assert (two[0]["world_size"], one[0]["world_size"]) == (2, 1) and two[0]["stages"] == one[0]["stages"]
    losses = [[row["val_loss"] for row in rows if row["event"] == "val"] for rows in (one, two)]
    assert losses[0][0] == losses[1][0] and losses[0][1] == pytest.approx(losses[1][1], abs=2e-3)
    steps = [[row["train_loss"] for row in rows if row["event"] == "step"] for rows in (one, two)]
    assert steps[0] == pytest.approx(steps[1], abs=2e-3)


def test_the_warm_up_leaves_no_trace(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hp = t.parse_overrides([*command(done[0])[2:], "--batch_stages=", "--lr_stages="])
    staged = dataclasses.replace(hp, batch_stages="4x256 2x512")
    for knobs in (hp, staged):
        trainer = t.build(knobs, 384, 0, 1, torch.device("cpu"))
        weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        state = torch.get_rng_state()
        trainer.warm_up()
        assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state()) and trainer.model.training
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not any(o.state for o in trainer.optimizers)


def test_a_failure_within_the_first_step_keeps_its_code_and_closes_the_log(tmp_path, monkeypatch):
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(t.Trainer, "train_step", fail)
    monkeypatch.setattr(t, "catch_signals", list)
    with pytest.raises(SystemExit) as caught:
        t.main(command(tmp_path)[2:])
    assert caught.value.code == 6
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["code"] == 6 and end["status"] == "failed" and end["steps"] == 0


STAGES = "--batch_stages=4x128 8x128 4x256", "--lr_stages=0.5 1 0.8", "--steps=9", "--epochs=3", "--cooldown=0.4"
TINY = [knob for knob in KNOBS if not knob.startswith(("--train_seq_len", "--sequences_per_step", "--steps"))]


def staged(folder, *knobs, ranks=1, code=0):
    """A run of three stages; asserts its exit code."""
    launch = command(folder, ranks=ranks)[: -len(KNOBS)]
    done = subprocess.run([*launch, *TINY, *STAGES, *knobs], cwd=folder, env=environment(), capture_output=True,
                          encoding="utf-8", timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Two equal complete runs of three stages that begin at steps 0, 3 and 6, one with a checkpoint at 5, one with
    those at 6 and 8: (folder, their run folders)."""
    folder = tmp_path_factory.mktemp("stages")
    make_corpus(folder / "data")
    staged(folder, "--checkpoint_every=5")
    first = run_folders(folder)[0]
    staged(folder, "--checkpoint_every=2")
    return folder, [first, *(run for run in run_folders(folder) if run != first)]


def test_stages_stand_in_the_events(stages):
    rows = events(stages[1][0])
    found = [tuple(stage.values()) for stage in rows[0]["stages"]]
    assert found == [(0, 4, 128, 0.5), (3, 8, 128, 1.0), (6, 4, 256, 0.8)]
    steps = [row for row in rows if row["event"] == "step"]
    assert [(row["sequences"], row["seq_len"]) for row in steps] == [(4, 128)] * 3 + [(8, 128)] * 3 + [(4, 256)] * 3
    assert [row["tokens"] for row in steps] == [512, 1024, 1536, 2560, 3584, 4608, 5632, 6656, 7680]
    assert [row["lr"] for row in steps[:6]] == pytest.approx([0.5] * 3 + [1.0] * 3)


@pytest.mark.parametrize("which, step", [(0, 5), (1, 6), (1, 8)])
def test_resume_inside_a_stage_and_at_a_border_bit_for_bit(stages, tmp_path, which, step):
    """From step 5 on the run crosses a border, and at 6 what comes next is of another stage."""
    folder, found = stages
    shutil.copytree(folder / "data", tmp_path / "data")
    staged(tmp_path, f"--resume={found[which] / f'checkpoints/step_{step:06d}.pt'}")
    resumed = run_folders(tmp_path)[0]
    whole, again = (torch.load(run / "weights.pt")["model"] for run in (found[0], resumed))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert events(resumed, "end")[0]["val_loss"] == events(found[0], "end")[0]["val_loss"]
    assert events(resumed, "resume")[0]["step"] == step


def test_resume_where_the_stages_moved_is_refused(stages, tmp_path):
    folder, found = stages
    shutil.copytree(folder / "data", tmp_path / "data")
    checkpoint = found[0] / "checkpoints" / "step_000005.pt"
    resume = f"--resume={checkpoint}"
    other = staged(tmp_path, resume, "--batch_stages=4x128 8x128 4x384", code=2).stderr
    assert "was written with --batch_stages=4x128 8x128 4x256" in other
    assert "give the same --steps" in staged(tmp_path, resume, "--steps=18", "--epochs=9", code=2).stderr
    assert not (tmp_path / "logs").exists()
    saved = torch.load(checkpoint)
    saved["model"]["extra"] = torch.zeros(1)
    torch.save(saved, tmp_path / "other.pt")
    assert "weights of another script" in staged(tmp_path, f"--resume={tmp_path / 'other.pt'}", code=5).stderr


def test_stages_on_two_ranks_give_the_same_losses(stages, tmp_path):
    shutil.copytree(stages[0] / "data", tmp_path / "data")
    staged(tmp_path, "--save=False", ranks=2)
    one, two = (events(run, "step") for run in (stages[1][0], run_folders(tmp_path)[0]))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["train_loss"] for row in one] == pytest.approx([row["train_loss"] for row in two], abs=2e-3)
