"""Whole runs of a tiny model on the CPU: folder, log, metrics, resuming, signals, exit codes."""

import dataclasses
import gc
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from tiny import (
    KNOBS,
    SCRIPT,
    command,
    cut_off,
    edited,
    environment,
    events,
    make_corpus,
    run,
    run_folders,
    write_shard,
)

import train_gpt as t

sys.path.append(str(ROOT / "records"))
import runs  # noqa: E402

SOURCE, HP = SCRIPT.read_bytes(), t.Hyperparameters()
LINE = re.compile(r"^step:(\d+)/(\d+) (?:(train_loss|val_loss):(\d+\.\d+|nan|inf) )?train_time:(\d+)(ms|s) "
                  r"step_avg:(\d+\.\d+|nan)ms(?: [a-z_]+:\S+)*$", re.ASCII)
KEYS = dict(
    start="format run_id utc argv changed seed device gpu gpu_count gpu_memory_mib driver torch cuda nccl triton "
          "python packages world_size fp8 attention stages script_sha256 knobs data",
    step="step tokens train_loss lr momentum window sequences seq_len train_ms wall_s",
    val="step tokens val_loss val_tokens train_ms wall_s",
    clock="mark train_ms wall_s", checkpoint="step bytes ms", warning="text step", resume="step from_run_id",
    end="status code reason steps tokens val_loss train_ms wall_s tokens_per_s peak_train_mib peak_val_mib "
        "reserved_mib")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A complete run with a checkpoint in it: (folder, its run folder, standard output)."""
    folder = tmp_path_factory.mktemp("run")
    make_corpus(folder / "data")
    out = run(folder, "--checkpoint_every=5", "--val_every=3").stdout
    return folder, run_folders(folder)[0], out


def test_log(done):
    folder, logs, out = done
    raw = (logs / "log.txt").read_bytes()
    lines = raw.decode("ascii").split("\n")
    assert b"\r" not in raw and lines.pop() == "" and lines[0] == "train_gpt log 2"
    facts = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith("clock"))
    assert facts["run_id"] == logs.name and facts["gpu"] == "n/a" and facts["steps"] == "8"
    assert "{" not in raw.decode().replace(facts["changed"], "") and lines[-1] == "exit: 0 complete"
    steps = [LINE.match(line).groups() for line in lines if line.startswith("step:")]
    assert [int(s[0]) for s in steps if s[2] == "train_loss"] == list(range(1, 9))
    assert [int(s[0]) for s in steps if s[2] == "val_loss"] == [0, 3, 6, 8]
    assert str(folder) not in raw.decode() + (logs / "metrics.jsonl").read_text()
    assert (logs / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
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
    assert rows[0]["stages"] == [dict(first=0, sequences=4, seq_len=256)] and rows[0]["format"] == 2


def test_at_most_fifty_step_lines_go_to_the_files(tmp_path):
    make_corpus(tmp_path / "data")
    out = run(tmp_path, "--steps=100", "--epochs=20", "--train_seq_len=128", "--sequences_per_step=1").stdout
    assert len(events(run_folders(tmp_path)[0], "step")) <= 50 and out.count("train_loss") == 100
    assert "minutes of training for 100 steps, and validations: 1; --steps=N" in out


def test_repeating_the_stream_is_a_warning(tmp_path):
    make_corpus(tmp_path / "data", train=(1025,))
    run(tmp_path, "--epochs=8", "--save=False")
    assert "begun 8 times" in events(run_folders(tmp_path)[0], "warning")[0]["text"]


def test_resume_equals_an_unbroken_run_bit_for_bit(done, tmp_path):
    folder, whole = tmp_path, torch.load(done[1] / "weights.pt")
    shutil.copytree(done[0] / "data", folder / "data")
    shutil.copytree(done[0] / "logs", folder / "logs")
    cut_off(run_folders(folder)[0])
    run(folder, "--resume=latest")
    resumed = run_folders(folder)[-1]
    again = torch.load(resumed / "weights.pt")
    assert all(torch.equal(whole["model"][k], again["model"][k]) for k in whole["model"])
    assert events(resumed, "end")[0]["val_loss"] == events(done[1], "end")[0]["val_loss"]
    assert events(resumed, "resume")[0] == dict(event="resume", step=5, from_run_id=done[1].name)
    assert events(resumed, "clock")[0]["train_ms"] > 0


def test_a_resumed_run_has_the_rates_of_its_knobs(done, tmp_path, monkeypatch):
    """Not those that the optimizers were saved with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done[0] / "data", tmp_path / "data")
    checkpoint = next(done[1].glob("checkpoints/step_000005.pt"))
    for knobs in ((), ("--head_lr=0.5",)):
        once(tmp_path, f"--resume={checkpoint}", "--val_every=3", "--checkpoint_every=5", *knobs)
    folders = run_folders(tmp_path)
    warned = {folder / "weights.pt": [row["text"] for row in events(folder, "warning")] for folder in folders}
    plain, other = sorted(warned, key=lambda path: len(warned[path]))
    assert warned[plain] == [] and warned[other] == [f"changed since the checkpoint: head_lr {HP.head_lr} -> 0.5"]
    heads = [torch.load(path)["model"]["lm_head.weight"] for path in (plain, other)]
    start = torch.load(checkpoint)["model"]["lm_head.weight"]
    assert (heads[1] - start).abs().max() > 10 * (heads[0] - start).abs().max()


def test_the_last_checkpoint_holds_the_weights_before_they_are_blended(here):
    run = once(here, "--checkpoint_every=4", "--average=2.0", "--average_share=0.25")
    saved = torch.load(run.log.folder / "checkpoints/step_000008.pt")["model"]
    ended = torch.load(run.log.folder / "weights.pt")["model"]
    names = run.trainer.model.named_parameters(remove_duplicate=False)
    averages = {name: o.state[p]["average"] for name, p in names
                for o in run.trainer.optimizers if "average" in o.state.get(p, {})}
    assert {"embed.weight", "blocks.0.attn.qkv", "blocks.3.mlp.down.weight"} <= averages.keys()
    for name, weight in saved.items():
        if name not in averages:
            assert torch.equal(weight, ended[name]), name
            continue
        mixed = weight.lerp(averages[name], 0.25)
        mixed *= weight.norm(dim=(-2, -1), keepdim=True) / mixed.norm(dim=(-2, -1), keepdim=True)
        assert torch.allclose(ended[name], mixed, rtol=1e-4, atol=1e-7) and not torch.equal(weight, ended[name]), name
    for step in (4, 8):
        again = once(here, f"--resume={run.log.folder / f'checkpoints/step_{step:06d}.pt'}", "--average=2.0",
                     "--average_share=0.25")
        other = torch.load(again.log.folder / "weights.pt")["model"]
        assert all(torch.equal(ended[name], other[name]) for name in ended)
        assert problems(again.log.folder) == []
    assert problems(run.log.folder) == []


def test_damaged_checkpoints(done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done[0] / "data", tmp_path / "data")
    shutil.copytree(done[0] / "logs", tmp_path / "logs")
    good = next((tmp_path / "logs").glob("*/checkpoints/step_000005.pt"))
    cut_off(good.parents[1])
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (good.parent / "step_000006.pt").write_bytes(flipped)
    (good.parent / "step_000007.pt").write_bytes(good.read_bytes()[:5000])
    spoilt = torch.load(good)
    spoilt["optimizers"][0][0]["state"][0]["momentum_buffer"][-1] = math.inf
    torch.save(spoilt, good.parent / "step_000008.pt")
    once(tmp_path, "--resume=latest")
    warnings = [row["text"] for row in events(run_folders(tmp_path)[-1], "warning")]
    assert sum("is not usable" in text for text in warnings) == 3 and "--" not in warnings[0]
    for step, why in ((8, "numbers that are not finite"), (7, "not usable")):
        assert why in ended(capsys, tmp_path, f"--resume={good.parent / f'step_00000{step}.pt'}", code=5)
    assert "--num_heads=2" in ended(capsys, tmp_path, f"--resume={good}", "--num_heads=4", code=2)
    assert "holds no run" in ended(capsys, tmp_path, f"--resume={done[1] / 'weights.pt'}", code=5)
    shutil.rmtree(tmp_path / "logs")
    assert "no usable" in ended(capsys, tmp_path, "--resume=latest", code=5)


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
    said = process.stderr.read()
    assert process.wait(60) == 75 and "--resume=latest" in said and said.startswith("stopping after this step")
    first = run_folders(tmp_path)[0]
    end, saved = events(first, "end")[0], events(first, "checkpoint")[0]
    assert end["status"] == "stopped" and end["steps"] == saved["step"] and end["val_loss"] is None
    time.sleep(1)  # run folders are ordered by their second
    saved = next(first.glob("checkpoints/*.pt"))
    run(tmp_path, f"--resume={saved}", f"--steps={end['steps'] + 1}", "--epochs=2000")
    assert events(run_folders(tmp_path)[1], "resume")[0]["step"] == end["steps"]


def once(folder, *knobs, source=SOURCE):
    """A run in this process, in `folder`, which must be the working one."""
    return t.train_once([*command(folder)[2:], *knobs], source)


def ended(capsys, folder, *knobs, code, **more):
    """What a run in this process said when it ended with `code`."""
    with pytest.raises(SystemExit) as caught:
        once(folder, *knobs, **more)
    assert caught.value.code == code
    return capsys.readouterr().err


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a corpus, which is the working one."""
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def poison(monkeypatch, step, spoil):
    """Let `spoil(trainer)` follow a step."""
    real = t.Trainer.train_step

    def train_step(self, at, pairs):
        loss = real(self, at, pairs)
        if at + 1 == step:
            with torch.no_grad():
                spoil(self)
        return loss

    monkeypatch.setattr(t.Trainer, "train_step", train_step)


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(here, capsys):
    said = ended(capsys, here, "--adam_eps=0", "--save=False", code=3)  # 0 / 0 in the embeddings, which see no gradient
    assert "training loss is nan at step 2" in said
    end = events(run_folders(here)[0], "end")[0]
    assert end["status"] == "failed" and end["code"] == 3 and end["val_loss"] is None
    said = ended(capsys, here, "--adam_eps=0", "--checkpoint_every=1", code=3)
    assert re.search(r"train_gpt: [\w.]+ is not finite after step 1: no file is written", said)
    assert not list(here.glob("logs/*/*.pt")) + list(here.glob("logs/*/*/*.pt"))


SPOILT = {
    "embed.weight": lambda tr: tr.model.embed.weight[383].fill_(math.nan),  # of a token that no text holds
    "Adam's exp_avg_sq of embed.weight": lambda tr: tr.optimizers[1].state[
        tr.model.embed.weight]["exp_avg_sq"][-1].fill_(math.inf),
    "Muon's momentum_buffer of blocks.0.attn.qkv": lambda tr: next(
        iter(tr.optimizers[0].state.values()))["momentum_buffer"][-1].fill_(-math.inf)}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("knobs", [("--checkpoint_every=2",), ("--checkpoint_every=2", "--save=False")])
def test_what_is_not_finite_is_named_and_never_written(here, capsys, monkeypatch, name, knobs):
    poison(monkeypatch, 6, SPOILT[name])
    said = ended(capsys, here, *knobs, code=3)
    assert f"{name}" in said and "is not finite after step 6" in said
    folder = run_folders(here)[0]
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == ["step_000002.pt", "step_000004.pt"]
    assert not (folder / "weights.pt").exists() and events(folder, "end")[0]["code"] == 3
    monkeypatch.undo()
    monkeypatch.chdir(here)
    run = once(here, *knobs, "--resume=latest")
    assert run.step == 8 and events(run.log.folder, "resume")[0]["step"] == 4


def test_the_end_of_a_run_is_checked_too(here, capsys, monkeypatch):
    poison(monkeypatch, 8, SPOILT["embed.weight"])
    assert "embed.weight is not finite after step 8" in ended(capsys, here, "--save=False", code=3)


def test_what_is_not_finite_on_rank_1_alone_is_named(tmp_path):
    """The last value of a moment is padding, or a row that no text holds: no loss and no weight shows it."""
    make_corpus(tmp_path / "data")
    spoil = ('self.optimizers[1].state[self.model.embed.weight]["exp_avg_sq"][-1] = float("inf") if self.rank else 1.0'
             "\n        self.average(step)\n")
    script = edited(tmp_path, "self.average(step)\n", spoil)
    said = run(tmp_path, "--steps=1", ranks=2, code=1, script=script).stderr
    sentence = "Adam's exp_avg_sq of embed.weight is not finite after step 1"
    assert f"train_gpt: rank 0: {sentence}" in said and f"train_gpt: rank 1: {sentence}" in said
    assert re.search(f"Root Cause[^=]*traceback : {sentence}", said), "torchrun's own summary ends with it"
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["code"] == 3 and not list(tmp_path.glob("logs/*/*.pt"))


# ---- latest: of this script, these knobs and this data


def rename(folder, day):
    """Give a run another day, so that it is the oldest or the newest: (its new folder)."""
    return folder.rename(folder.with_name(f"{day}{folder.name[8:]}"))


@pytest.fixture
def killed(done, tmp_path, monkeypatch):
    """A working folder with the corpus and the run of `done`, killed after its checkpoint at 5: (folder, the run's)."""
    shutil.copytree(done[0] / "data", tmp_path / "data")
    shutil.copytree(done[0] / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    cut_off(run_folders(tmp_path)[0])
    return tmp_path, rename(run_folders(tmp_path)[0], "20200101")


def test_latest_goes_on_from_its_own_experiment(killed, capsys):
    folder, first = killed
    other = once(folder, "--muon_lr=0.5", "--checkpoint_every=2")
    cut_off(other.log.folder)
    rename(other.log.folder, "20200102")
    again = once(folder, "--resume=latest", "--log_norms=3", "--val_every=4", "--save=False")
    assert [row["step"] for row in events(again.log.folder, "resume")] == [5]
    assert events(again.log.folder, "resume")[0]["from_run_id"] == events(first, "start")[0]["run_id"]
    assert not events(again.log.folder, "warning")
    before = len(run_folders(folder))
    for knobs in ((), ("--checkpoint_every=3", "--log_norms=2")):
        said = ended(capsys, folder, "--resume=latest", *knobs, code=0)
        assert f"already complete: {again.log.run_id}" in said and len(run_folders(folder)) == before
    assert once(folder, "--resume=latest", "--muon_lr=0.5").step == 8


@pytest.mark.parametrize("damage", [
    None, b"", b"{", b"\xff\x00", b"[]\n", b'{"event": "start"}\n', b'{"data": {"train": []}, "knobs": []}\n'])
def test_latest_passes_over_metrics_that_cannot_be_read(killed, damage):
    folder, first = killed
    bad = folder / "logs" / "20991231-000000-ffffff"
    shutil.copytree(first / "checkpoints", bad / "checkpoints")
    if damage is not None:
        (bad / "metrics.jsonl").write_bytes(damage)
    (folder / "logs" / "note.txt").write_text("no run")
    with open(first / "metrics.jsonl", "a") as file:
        file.write('{"event": "st')  # killed within a line
    run = once(folder, "--resume=latest")
    assert events(run.log.folder, "resume")[0]["step"] == 5 and not events(run.log.folder, "warning")


def test_latest_says_what_is_other(killed, capsys):
    folder, first = killed
    line = f"--resume=logs/{first.name}/checkpoints/step_000005.pt"
    said = ended(capsys, folder, "--resume=latest", "--muon_lr=0.5", "--seed=2", code=5)
    assert "seed 1 -> 2" in said and f"muon_lr {HP.muon_lr} -> 0.5" in said and line in said and said.count("\n") == 1
    source = SCRIPT.read_bytes()
    hashes = [hashlib.sha256(text).hexdigest()[:12] for text in (source, source + b"\n")]
    said = ended(capsys, folder, "--resume=latest", code=5, source=source + b"\n")
    assert f"the script {hashes[0]} -> {hashes[1]}" in said and "muon_lr" not in said and line in said
    write_shard(folder / "data" / "train_000001.bin", [50256, *range(99)] * 60)
    said = ended(capsys, folder, "--resume=latest", code=5)
    assert re.search("differs in training data [0-9a-f]{12} -> [0-9a-f]{12}:", said) and line in said
    assert len(run_folders(folder)) == 1
    named = once(folder, line, "--muon_lr=0.5")
    warned = events(named.log.folder, "warning")[0]["text"]
    want = f"changed since the checkpoint: muon_lr {HP.muon_lr} -> 0[.]5, training data .{{12}} -> .{{12}}"
    assert re.fullmatch(want, warned)
    (first / "metrics.jsonl").unlink()
    shutil.rmtree(named.log.folder)
    assert "metrics.jsonl that cannot be read" in ended(capsys, folder, "--resume=latest", code=5)


def test_other_validation_data_is_other_data(killed, capsys):
    folder, _ = killed
    write_shard(folder / "data" / "val_000000.bin", [50256, *range(99)] * 20)
    assert "differs in validation data" in ended(capsys, folder, "--resume=latest", code=5)


def test_all_ranks_follow_what_rank_0_finds(tmp_path):
    make_corpus(tmp_path / "data")
    run(tmp_path, "--steps=4", "--checkpoint_every=2", ranks=2)
    assert "already complete" in run(tmp_path, "--steps=4", "--resume=latest", ranks=2).stderr
    assert "steps 4 -> 5" in run(tmp_path, "--steps=5", "--resume=latest", ranks=2, code=1).stderr
    cut_off(run_folders(tmp_path)[0])
    for path in tmp_path.glob("logs/*/checkpoints/step_000004.pt"):
        path.unlink()
    run(tmp_path, "--steps=4", "--resume=latest", ranks=2)
    assert events(run_folders(tmp_path)[-1], "resume")[0]["step"] == 2


# ---- Called by other code


def test_runs_in_one_process_are_those_of_their_own(done, here, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    want = events(done[1], "end")[0]["val_loss"]
    first = once(here, "--seed=2", "--save=False")
    assert first.val_loss != want
    assert [once(here, "--save=False").val_loss for _ in range(2)] == [want] * 2
    assert not events(run_folders(here)[0], "warning")
    poison(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
    for _ in range(2):  # the first Ctrl-C of the second run is its first
        with pytest.raises(SystemExit) as caught:
            once(here, "--seed=3")
        assert caught.value.code == 75
    poison(monkeypatch, 2, lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        once(here)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == handlers
    assert gc.get_freeze_count() == 0


def test_a_library_call_says_that_it_was_one(here, tmp_path):
    call = "import train_gpt as t\nt.MLP = type('MLP', (t.MLP,), {})\nt.main(%s)\n"
    surroundings = environment() | dict(PYTHONPATH=str(ROOT))

    def python(text):
        (tmp_path / "my.py").write_text(text)
        return subprocess.run([sys.executable, "my.py", *command(here)[2:]], env=surroundings, capture_output=True,
                              encoding="utf-8", timeout=300)

    refused = python(call % "")
    assert refused.returncode == 2 and "cp train_gpt.py my.py" in refused.stderr and not (here / "logs").exists()
    assert refused.stderr.count("\n") == 1
    allowed = python("import sys\n" + call % "sys.argv[1:]")
    assert allowed.returncode == 0, allowed.stderr
    warned = [row["text"] for row in events(run_folders(here)[0], "warning")]
    assert len(warned) == 1 and warned[0].startswith("other code called this script")
    for text in (allowed.stdout, (run_folders(here)[0] / "log.txt").read_text()):
        assert "warning: other code" in text


def test_a_module_beside_the_script_is_named(tmp_path):
    make_corpus(tmp_path / "data")
    script = edited(tmp_path, "import numpy as np\nimport torch\n", "import helper\nimport numpy as np\nimport torch\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    (tmp_path / "_ops.py").write_text("")  # torch.ops says that it is this file
    run(tmp_path, "--steps=1", script=script)
    warned = [row["text"] for row in events(run_folders(tmp_path)[0], "warning")]
    assert len(warned) == 1 and warned[0].startswith("helper.py lies beside the script")


@pytest.mark.parametrize("old, new, kind", [
    ("return self.down(F.relu(self.up(x)).square())", "return self.down(F.gelo(self.up(x)))", "AttributeError("),
    ("return self.down(F.relu(self.up(x)).square())", "return self.up(x) @ self.down.weight", "RuntimeError(")])
def test_a_script_that_fails_is_told_its_line(tmp_path, old, new, kind):
    make_corpus(tmp_path / "data")
    script = edited(tmp_path, old, new)
    said = run(tmp_path, code=1, script=script).stderr
    number = script.read_text().partition(new.strip())[0].count("\n") + 1
    folder = run_folders(tmp_path)[0]
    reason = events(folder, "end")[0]["reason"]
    assert reason.startswith(f"the script failed in line {number}: {kind}") and events(folder, "end")[0]["code"] == 1
    assert f"train_gpt: {reason}\n" in said and "Traceback" in said and "\n" not in reason
    assert (folder / "log.txt").read_text().splitlines()[-1] == f"exit: 1 {reason}"


def test_a_failure_before_the_first_step_ends_the_run_too(here, monkeypatch):
    """As one in the warm-up would."""
    def catch_signals(stack):
        raise ValueError("no")

    monkeypatch.setattr(t, "catch_signals", catch_signals)
    with pytest.raises(ValueError):
        once(here)
    reason = events(run_folders(here)[0], "end")[0]["reason"]
    number = int(re.fullmatch(r"the script failed in line (\d+): ValueError\('no'\)", reason)[1])
    assert SCRIPT.read_text().splitlines()[number - 1].strip() == "self.signals = catch_signals(self.handlers)"


# ---- Who listens


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("tail, lines", [("| head -5", 5), ("> /dev/full", 0), ("2>&1 | head -3", 3), (">&-", 0)])
def test_a_run_goes_on_when_nobody_listens(tmp_path, tail, lines):
    make_corpus(tmp_path / "data")
    launch = " ".join(f"'{word}'" for word in command(tmp_path, "--steps=10", "--epochs=9", "--save=False"))
    shell = subprocess.run(["bash", "-c", f"set -o pipefail; {launch} {tail}"], cwd=tmp_path, env=environment(),
                           capture_output=True, encoding="utf-8", timeout=300)
    assert (shell.returncode, shell.stderr) == (0, "") and shell.stdout.count("\n") == lines
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert (end["status"], end["steps"]) == ("complete", 10)


def test_a_name_that_the_terminal_cannot_show(tmp_path):
    make_corpus(tmp_path / "d\xe9")
    done = subprocess.run(command(tmp_path, "--data_dir=d\xe9"), cwd=tmp_path, capture_output=True, encoding="ascii",
                          env=environment() | dict(PYTHONIOENCODING="ascii", PYTHONUTF8="1"), timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "--data_dir='d\\xe9'" in done.stdout
    assert [row["status"] for row in events(run_folders(tmp_path)[0], "end")] == ["complete"]


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("what, code", [
    ("--help | head -2", 0), ("--help > /dev/full", 0), ("--stepps=3 2> /dev/full", 2), ("--stepps=3 2>&1 | true", 2)])
def test_an_end_keeps_its_code_when_nobody_listens(tmp_path, what, code):
    shell = subprocess.run(["bash", "-c", f"set -o pipefail; '{sys.executable}' '{SCRIPT}' {what}"], cwd=tmp_path,
                           env=environment(), capture_output=True, encoding="utf-8", timeout=300)
    assert (shell.returncode, shell.stderr) == (code, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP there")
def test_a_hangup_that_is_ignored_stays_ignored(here, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        poison(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        assert once(here).step == 8
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- Norms, and losses by source


def problems(folder):
    """What the records find in a run; its arguments name some knobs twice."""
    return [code for code, sentence in runs.check_run(runs.read_run(folder)) if "list of arguments" not in sentence]


def test_norms_stand_where_they_are_due(here):
    """Of 50 steps, of which every second is kept anyway."""
    folder = once(here, "--steps=50", "--epochs=20", "--log_norms=7", "--train_seq_len=128").log.folder
    rows, due = {row["step"]: row for row in events(folder, "step")}, set(range(7, 50, 7))
    assert set(rows) == {1, *range(2, 51, 2)} | due
    assert {step for step, row in rows.items() if "norms" in row} == due
    kinds = "matrices scalars mixes skip_weights embed value_embeds bigrams down".split()
    for step in due:
        assert [*rows[step]["norms"]] == [f"{kind}.{what}" for kind in kinds for what in ("grad", "update")]
    assert problems(folder) == []
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"norms"', '"norm"', 1))
    with pytest.raises(runs.Bad):
        runs.read_run(folder)
    for change in (lambda row: row.pop("norms", None), lambda row: row.update(norms=dict(embed=1.0))):
        changed = [json.loads(line) for line in text.splitlines()]
        change(next(row for row in changed if row.get("step") == (14 if "pop" in change.__code__.co_names else 16)))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        assert problems(folder) == ["truncated"]


def test_a_norm_that_is_not_finite_is_strict_json(here, monkeypatch):
    real = t.Outcome.wait
    spoilt = lambda self: (*real(self)[:2], [math.nan, math.inf, *real(self)[2][2:]])
    monkeypatch.setattr(t.Outcome, "wait", spoilt)
    norms = events(once(here, "--steps=1", "--log_norms=1").log.folder, "step")[0]["norms"]
    assert (norms["matrices.grad"], norms["matrices.update"]) == ("nan", "inf") and norms["down.update"] > 0


def tell_sources(folder, names, sources):
    (folder / "data" / "val_docs.json").write_text(json.dumps(dict(sources=names, doc_source=sources)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_by_source_is_that_of_its_tokens(done, tmp_path, ranks):
    """The validation stream has a document every 300 tokens, and 1,200 tokens in pieces of 512 are scored."""
    shutil.copytree(done[0] / "data", tmp_path / "data")
    tell_sources(tmp_path, ["web", "code", "old_books", "unseen"], [0, 1, 0, 2, 3, 3, 3])
    run(tmp_path, "--checkpoint_every=5", "--val_every=3", ranks=ranks)
    folder = run_folders(tmp_path)[0]
    vals, want = events(folder, "val"), events(done[1], "val")
    if ranks == 1:
        assert [row["val_loss"] for row in vals] == [row["val_loss"] for row in want]
    assert vals[0]["val_loss"] == want[0]["val_loss"]
    for row in vals:
        assert list(row["sources"]) == ["web", "code", "old_books"]
        parts = row["sources"]["web"] * 600 + row["sources"]["code"] * 300 + row["sources"]["old_books"] * 300
        assert parts / 1200 == pytest.approx(row["val_loss"], rel=1e-9)
    model = torch.load(folder / "weights.pt")
    hp = t.Hyperparameters(**model["knobs"])
    gpt = t.GPT(hp, 384).eval()
    gpt.load_state_dict(model["model"])
    gpt.use_flex = False
    shard = torch.from_numpy(t.open_shard(tmp_path / "data" / "val_000000.bin").astype("int64"))
    sums, source = [0.0] * 3, (0, 1, 0, 2)
    with torch.no_grad():
        for first in range(0, 1200, 512):
            ids = torch.cat((shard[first : min(first + 512, 1200)], torch.full((512,), 50256)))[:512].int()
            x = gpt.features(ids, torch.tensor(t.window_at(8, hp), dtype=torch.int32))
            targets = shard[first + 1 : first + 513]
            losses = gpt.losses(x, gpt.pointer(x, ids, targets), targets)
            for i in range(first, min(first + 512, 1200)):
                sums[source[i // 300]] += float(losses[i - first])
    found = vals[-1]["sources"].values()
    assert list(found) == pytest.approx([s / n for s, n in zip(sums, (600, 300, 300))], rel=1e-5)
    assert problems(folder) == []


def test_machine_and_data_are_known_before_a_run(done):
    start, hp = events(done[1], "start")[0], t.parse_overrides(command(done[0])[2:])
    data = t.load_corpus(hp, thorough=True).facts
    assert start["data"] == data and start.items() >= t.machine(torch.device("cpu"), 1).items()
    assert set(t.machine(torch.device("cpu"), 2)) == set(
        "gpu gpu_count gpu_memory_mib driver torch cuda nccl triton python packages".split())


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
    hp = t.parse_overrides([*command(done[0])[2:], "--batch_stages="])
    staged = dataclasses.replace(hp, batch_stages="4x256 2x512")
    for knobs in (hp, staged):
        trainer = t.build(knobs, 384, 0, 1, torch.device("cpu"))
        weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        state = torch.get_rng_state()
        trainer.warm_up()
        assert all(torch.equal(v, weights[k]) for k, v in trainer.model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state()) and trainer.model.training
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not any(moment.any() for o in trainer.optimizers for s in o.state.values() for moment in s.values())


def test_a_failure_within_the_first_step_keeps_its_code_and_closes_the_log(tmp_path, monkeypatch):
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(t.Trainer, "train_step", fail)
    with pytest.raises(SystemExit) as caught:
        t.main(command(tmp_path)[2:])
    assert caught.value.code == 6
    end = events(run_folders(tmp_path)[0], "end")[0]
    assert end["code"] == 6 and end["status"] == "failed" and end["steps"] == 0


STAGES = ("--batch_stages=4x128 8x128 4x256", "--lr_batch=512",
          "--average=2.0", "--steps=9", "--epochs=3", "--cooldown=0.4")  # averages from step 3 on
TINY = [knob for knob in KNOBS if not knob.startswith(("--train_seq_len", "--sequences_per_step", "--steps"))]


def staged(folder, *knobs, ranks=1, code=0):
    """A run of three stages; asserts its exit code."""
    launch = command(folder, ranks=ranks)[: -len(KNOBS)]
    done = subprocess.run([*launch, *TINY, *STAGES, *knobs], cwd=folder, env=environment(), capture_output=True,
                          encoding="utf-8", timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def staged_once(folder, *knobs):
    """The same in this process, whose working folder it is."""
    return t.train_once([*command(folder)[2 : -len(KNOBS)], *TINY, *STAGES, *knobs], SOURCE)


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
    assert found == [(0, 4, 128), (3, 8, 128), (6, 4, 256)]
    steps = [row for row in rows if row["event"] == "step"]
    assert [(row["sequences"], row["seq_len"]) for row in steps] == [(4, 128)] * 3 + [(8, 128)] * 3 + [(4, 256)] * 3
    assert [row["tokens"] for row in steps] == [512, 1024, 1536, 2560, 3584, 4608, 5632, 6656, 7680]
    assert [row["lr"] for row in steps[:6]] == pytest.approx([1.0] * 3 + [2**0.5] * 3)


@pytest.mark.parametrize("which, step", [(0, 5), (1, 6), (1, 8)])
def test_resume_inside_a_stage_and_at_a_border_bit_for_bit(stages, tmp_path, monkeypatch, which, step):
    """From step 5 on the run crosses a border, and at 6 that comes next."""
    folder, found = stages
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "data", tmp_path / "data")
    staged_once(tmp_path, f"--resume={found[which] / f'checkpoints/step_{step:06d}.pt'}")
    resumed = run_folders(tmp_path)[0]
    whole, again = (torch.load(run / "weights.pt")["model"] for run in (found[0], resumed))
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert events(resumed, "end")[0]["val_loss"] == events(found[0], "end")[0]["val_loss"]
    assert events(resumed, "resume")[0]["step"] == step


def test_resume_where_the_stages_moved_is_refused(stages, tmp_path, monkeypatch, capsys):
    folder, found = stages
    monkeypatch.chdir(tmp_path)

    def refused(*knobs, code=2):
        with pytest.raises(SystemExit) as caught:
            staged_once(tmp_path, *knobs)
        assert caught.value.code == code
        return capsys.readouterr().err

    shutil.copytree(folder / "data", tmp_path / "data")
    checkpoint = found[0] / "checkpoints" / "step_000005.pt"
    resume = f"--resume={checkpoint}"
    other = refused(resume, "--batch_stages=4x128 8x128 4x384")
    assert "was written with --batch_stages=4x128 8x128 4x256" in other
    assert "with --steps=9 3584 tokens read by step 5: give" in refused(resume, "--steps=18", "--epochs=9")
    assert not (tmp_path / "logs").exists()
    saved = torch.load(checkpoint)
    saved["model"]["extra"] = torch.zeros(1)
    torch.save(saved, tmp_path / "other.pt")
    assert "weights of another script" in refused(f"--resume={tmp_path / 'other.pt'}", code=5)


def test_stages_on_two_ranks_give_the_same_losses(stages, tmp_path):
    shutil.copytree(stages[0] / "data", tmp_path / "data")
    staged(tmp_path, "--save=False", ranks=2)
    one, two = (events(run, "step") for run in (stages[1][0], run_folders(tmp_path)[0]))
    assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
    assert [row["train_loss"] for row in one] == pytest.approx([row["train_loss"] for row in two], abs=2e-3)
