"""rerun and trial, on real tiny runs: what is trained, what is not trained again, and what is said of it."""

import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import forge
import pytest
from forge import KNOBS, losses
from reference import slow_welch, t_quantile


@pytest.fixture
def box(tmp_path_factory, tmp_path):
    return forge.box(tmp_path_factory, tmp_path)


# ---- rerun


def test_rerun_of_a_recorded_seed_gives_its_loss(box):
    name, before = box.record("Toy").name, box.tree()
    done = box.main("rerun", name, "--yes", "--seed=2")
    assert done.code == 0 and ", inside 3 sd of run " in done.out, done
    assert "all of it is records/" in done.out and "then and now" in done.out and "  torch: " not in done.out
    again, = (box.logs / "reruns" / name).iterdir()
    base, _ = box.arms()
    assert losses(box, [again])[0] == pytest.approx(losses(box, base)[1], abs=1e-4)
    assert box.events(again)[0]["seed"] == 2 and set(before) == {p for p in box.tree() if again not in p.parents}
    assert box.main("verify").code == 0


@pytest.mark.parametrize("shift, place, code", [(0.9, "inside", 0), (1.1, "OUTSIDE", 1), (-1.1, "OUTSIDE", 1)])
def test_rerun_of_a_new_seed_says_whether_it_lies_inside(box, monkeypatch, shift, place, code):
    """In place of a run comes one whose loss lies `shift` half widths of the interval from the mean."""
    base, _ = box.arms()
    values = losses(box, base)
    half = t_quantile(0.975, 2) * statistics.stdev(values) * math.sqrt(4 / 3)
    called = []

    def train(arm, seed, _):
        called.extend([arm.script, seed, *arm.arguments])
        off = statistics.fmean(values) + shift * half - values[0]
        return box.runs.read_run(forge.clone(box, base[0], box.logs, 5, 4, by=off))

    monkeypatch.setattr(box.trials.Arm, "train", train)
    done = box.main("rerun", box.record("Toy").name, answer="y\n")
    assert done.code == code and f", {place} the 95 % prediction interval of 3 runs: " in done.out
    assert f"{statistics.fmean(values):.6f} +- {half:.6f}" in done.out and 4 in called
    assert called[0] == box.record("Toy") / "train_gpt.py" and box.arms()[0] == base


@pytest.mark.parametrize("argv, answer, code", [
    (["--yes", "--data=nowhere"], "", 2), (["--data=data", "--yes"], "", 2), ([], "n\n", 2), ([], "", 2)])
def test_rerun_runs_nothing_without_data_or_consent(box, monkeypatch, argv, answer, code):
    monkeypatch.setattr(box.trials.Arm, "train", None)
    before = box.tree()
    done = box.main("rerun", box.record("Toy").name, *argv, answer=answer)
    assert done.code == code and box.tree() == before
    assert ("run this script" in done.out) == (not argv)
    assert not argv or f"val_sha256 {box.meta()['data']['val_sha256']}" in done.err


def test_rerun_finds_its_data_by_the_words_of_their_names(box):
    """In any folder of data/; and it says what differs before it asks."""
    embedded, mine = box.root / "data/embedded", box.root / "data/mine"
    embedded.rename(mine)
    embedded.mkdir()
    (embedded / "manifest.json").write_text("{}")  # nothing is made anew
    for path in mine.glob("*train*"):
        path.rename(mine / f"medieval_{path.name}")
    done = box.main("rerun", box.record("Toy").name, answer="n\n")
    order = "then and now", "  the same", "data: mine, the same; seed 4", "run this script", "not run"
    places = [done.out.find(words) for words in order]
    assert done.code == 2 and places == sorted(places) and places[0] > 0


def test_rerun_runs_no_record_that_fails(box, monkeypatch):
    monkeypatch.setattr(box.trials.Arm, "train", None)
    script = box.record("Toy") / "train_gpt.py"
    script.write_text("print('mine')\n")
    done = box.main("rerun", box.record("Toy").name, "--yes")
    assert done.code == 1 and " script: " in done.out


# ---- trial: one process an arm


def trial(box, *argv):
    return box.main("trial", "train_gpt.py", "train_gpt.py", *argv, *KNOBS)


def test_seeds_of_one_process_are_those_of_separate_ones_bit_for_bit(box):
    """The toy's runs come from two processes, one an arm, and seed 3 alone from run.sh. Here run.sh makes each anew."""
    base, cold = box.arms()
    for run in (base[1], cold[1]):  # the second of their processes
        rows = box.events(run)
        before = set(box.logs.iterdir())
        own = [argument for argument in rows[0]["argv"] if not argument.startswith(("--data_dir", "--preset"))]
        box.shell(*own)
        again, = set(box.logs.iterdir()) - before
        for kind, key in (("step", "train_loss"), ("val", "val_loss")):
            assert [row[key] for row in box.events(again) if row["event"] == kind] == [
                row[key] for row in rows if row["event"] == kind]


def test_what_the_toy_trial_said(box):
    said = (box.root / "trial.txt").read_text()
    assert said.startswith("before the runs: Welch's t decides, as there are 2 seeds in common")
    assert "run 1 of 4: head_lr=0.0001, seed 1\n" in said and "run 3 of 4: train_gpt.py, seed 2" in said
    base, cold = box.arms()
    assert sorted([*base, *cold]) == [cold[0], base[0], base[1], cold[1], base[2]]  # B A A B, and the run by run.sh
    gap, low, high, _ = slow_welch(losses(box, base[:2]), losses(box, cold))
    assert f"head_lr=0.0001 hurt: its loss is {gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f}" in said
    assert [said.count(f"run.sh: no GPU, processes: {n}") for n in (1, 2)] == [2, 0]  # two processes for four runs


class Stand:
    """In place of an arm's process: runs that lie ready are moved into logs/ when their seed is trained, and `context`
    says what a run of the toy would say now."""

    def __init__(self, box, monkeypatch, **ready):
        self.box, self.ready, self.trained, self.now = box, ready, [], {}
        start = box.events(box.arms()[0][0])[0]
        self.start = {key: start[key] for key in (*box.runs.SOFTWARE, "gpu", "gpu_count", "gpu_memory_mib", "driver",
                                                  "data", "world_size", "knobs")}
        monkeypatch.setattr(box.trials.Arm, "ask", lambda arm, words: self.ask(arm, words))

    def ask(self, arm, words):
        if words == "context":
            own = {"head_lr": 0.0001} if "--head_lr=0.0001" in arm.arguments else {}
            return {**self.start, "knobs": self.start["knobs"] | own, **self.now}
        self.trained.append((arm.label, int(words.split()[1]), *arm.arguments))
        folder = self.ready[f"{'cold' if '--head_lr=0.0001' in arm.arguments else 'base'}{words.split()[1]}"]
        shutil.copytree(folder, self.box.logs / folder.name)
        return dict(run_id=folder.name)


@pytest.fixture
def taken(box, monkeypatch):
    """The toy without the cold run of seed 2, which a trial would train again."""
    _, cold = box.arms()
    (box.root / "lost").mkdir()
    return Stand(box, monkeypatch, cold2=shutil.move(cold[1], box.root / "lost" / cold[1].name)
                 and box.root / "lost" / cold[1].name)


def test_trial_goes_on_where_it_stopped(taken):
    done = trial(taken.box, "--runs=2", forge.COLD)
    assert done.code == 0 and done.out.count("already in logs/") == 3
    assert "run 4 of 4: head_lr=0.0001, seed 2" in done.out
    assert [row[:2] for row in taken.trained] == [("head_lr=0.0001", 2)]
    assert sorted(taken.trained[0][2:]) == sorted([*KNOBS, "--head_lr=0.0001", "--save=False"])
    said = (taken.box.root / "trial.txt").read_text()
    assert done.out.splitlines()[-1].split(";")[0] == said.splitlines()[-1].split(";")[0]
    assert "some of these runs are of an earlier trial" in done.out
    again = trial(taken.box, "--runs=2", forge.COLD)
    assert again.out.count("already in logs/") == 4 and len(taken.trained) == 1


@pytest.mark.parametrize("now", [
    dict(torch="9.9"), dict(data=dict(encoding="bytes", val_sha256="a" * 64, val_tokens=600, train=[])),
    dict(gpu="NVIDIA H100 80GB HBM3"), dict(packages={})])
def test_runs_of_other_data_versions_or_machines_are_not_counted(taken, now):
    taken.now = now
    base, cold = taken.box.arms()
    for name, run in dict(base1=base[0], base2=base[1], cold1=cold[0]).items():
        folder = taken.box.root / "new" / forge.later(run.name, 7200)[0]
        forge.clone(taken.box, run, taken.box.root / "new", 7200, int(name[-1]))
        taken.ready[name] = folder
    done = trial(taken.box, "--runs=2", forge.COLD)
    differ, = now
    assert "already in logs/" not in done.out and len(taken.trained) == 4 and done.code == 0
    differ += ", gpu_count" * (differ == "gpu")
    assert all(f"train_gpt.py: not counted, for {differ}: {run.name}\n" in done.out for run in base[:2])


def test_runs_of_other_knobs_are_other_runs(taken):
    base, _ = taken.box.arms()
    odd = forge.clone(taken.box, base[1], taken.box.logs, -100, 2, by=1, epochs=3)
    done = trial(taken.box, "--runs=2", forge.COLD)
    assert len(taken.trained) == 1 and odd.name not in done.out and done.code == 0


def test_context_is_that_of_a_start_event(box):
    """By the processes themselves; where the data are gone, no verdict of old."""
    done = trial(box, "--runs=2", forge.COLD)
    assert done.code == 0 and done.out.count("already in logs/") == 4 and "run 1 of" not in done.out
    done = trial(box, "--runs=2", forge.COLD, "--data_dir=/nope/embedded")
    assert done.code == 2 and "--data_dir=/nope/embedded is not a folder" in done.err and "loss" not in done.out


def test_a_second_look_is_said(taken):
    assert "look" not in trial(taken.box, "--runs=2", forge.COLD).out
    base, cold = taken.box.arms()
    taken.ready["cold3"] = forge.clone(taken.box, cold[1], taken.box.root / "new", 60, 3, by=0.01)
    done = trial(taken.box, "--runs=3", forge.COLD)
    assert "look 2)" in done.out.splitlines()[-1] and "ideas" not in done.out
    assert done.out.startswith("before the runs: the differences between runs of one seed decide (3 pairs")
    assert "3 pairs of one seed" in done.out.splitlines()[-1]


def test_other_seeds_try_a_winner_again(taken):
    base, cold = taken.box.arms()
    for i in (11, 12):
        taken.ready[f"base{i}"] = forge.clone(taken.box, base[0], taken.box.root / "new", 60 * i, i, by=0.01 * i)
        taken.ready[f"cold{i}"] = forge.clone(taken.box, cold[0], taken.box.root / "new", 60 * i + 5, i, by=0.02 * i)
    done = trial(taken.box, "--runs=2", "--first-seed=11", forge.COLD)
    assert [row[:2] for row in taken.trained] == [("head_lr=0.0001", 11), ("train_gpt.py", 11), ("train_gpt.py", 12),
                                                  ("head_lr=0.0001", 12)]
    assert done.code in (0, 3) and "already" not in done.out


def test_two_gpus_train_the_arms_side_by_side(taken, monkeypatch):
    base, cold = taken.box.arms()
    for name, run in dict(base1=base[0], cold1=cold[0]).items():
        taken.ready[name] = shutil.move(run, taken.box.root / "lost" / run.name)
    monkeypatch.setattr(taken.box.trials, "visible_gpus", lambda: ["5", "7", "8"])
    seen = []
    monkeypatch.setattr(taken.box.trials.Arm, "end", lambda arm: seen.append((arm.label, dict(arm.surroundings))))
    done = trial(taken.box, "--runs=1", forge.COLD)
    assert done.code == 3 and "side by side on 2 of 3 GPUs" in done.out and len(taken.trained) == 2
    assert {(label, where.get("CUDA_VISIBLE_DEVICES")) for label, where in seen[-2:]} == {
        ("train_gpt.py", "5"), ("head_lr=0.0001", "7")}


@pytest.mark.parametrize("line, knobs, given", [
    ("    save: bool = True\n", [], ["--save=False"]), ("    save: bool = knob(True)\n", [], ["--save=False"]),
    ("    save: bool = True\n", ["--save=True"], ["--save=True"]), ("    keep: bool = True\n", [], [])])
def test_trial_keeps_no_weights_where_the_script_can_be_told(box, monkeypatch, line, knobs, given):
    """So that no run of a trial is sampled. A script without the knob `save` would refuse it. Nor does this one have
    what it takes to share a process: each of its runs is started alone."""
    called = []

    def train(arm, *_):
        called.extend(arm.arguments)
        raise box.sets.Undecided("enough")

    monkeypatch.setattr(box.trials.Arm, "train", train)
    shutil.rmtree(box.logs)
    (box.root / "mine.py").write_text(f"class Hyperparameters:\n    steps: int = 20\n{line}")
    assert box.main("trial", "train_gpt.py", "mine.py", *KNOBS, *knobs).code == 3
    assert [knob for knob in called if knob.startswith("--save")] == given
    assert not list(box.logs.rglob("weights.pt"))


@pytest.mark.parametrize("source", ["class :", "x = 1\0", "(" * 5000 + ")" * 5000])
def test_a_script_that_cannot_be_compiled_is_refused(box, source):
    (box.root / "mine.py").write_text(source)
    done = box.main("trial", "train_gpt.py", "mine.py")
    assert done.code == 2 and "mine.py is no Python that can be compiled: " in done.err


def test_a_script_that_only_imports_is_refused(box):
    (box.root / "mine.py").write_text("import train_gpt\n\ntrain_gpt.MLP = train_gpt.Block\ntrain_gpt.main()\n")
    before = {path for path in box.tree() if ".cache" not in path.parts}
    done = box.main("trial", "train_gpt.py", "mine.py")
    assert done.code == 2 and "mine.py has no class Hyperparameters" in done.err and "cp train_gpt.py my.py" in done.err
    assert {path for path in box.tree() if ".cache" not in path.parts} == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 3), (signal.SIGTERM, 143)])
def test_a_stop_in_the_last_validation_ends_the_trial(box, number, code):
    """Which its training hears too late to stop: it completes, and must not wait for another seed."""
    script = (box.root / "train_gpt.py").read_text(encoding="utf-8")
    slow = script.replace("    run.save_weights()\n", "    time.sleep(4)\n    run.save_weights()\n", 1)
    assert slow != script
    (box.root / "slow.py").write_text(slow, encoding="utf-8")
    command = [sys.executable, "records/records.py", "trial", "slow.py", "slow.py", "--b.muon_lr=0.03", *KNOBS]
    before = set(box.logs.glob("2*"))
    process = subprocess.Popen(command, cwd=box.root, env=box.environment, stdout=subprocess.PIPE, encoding="utf-8",
                               stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        new = list(set(box.logs.glob("2*")) - before)
        if new and (new[0] / "metrics.jsonl").exists() and '"step": 20, "tokens"' in (
                new[0] / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    run, = (box.runs.read_run(folder) for folder in set(box.logs.glob("2*")) - before)
    assert run.complete and "run 2 of" not in said.partition("step:20/20")[2].partition("stopped")[2]


def test_where_one_arm_fails_the_other_is_told_to_end(box):
    told, trained = threading.Event(), []

    def slow(seed, title):
        trained.append(seed)
        if not told.wait(60):
            raise AssertionError("nobody told it")
        raise box.decide.Undecided("stopped")

    def broken(seed, title):
        raise box.runs.Bad("script", "it failed")

    arms = [SimpleNamespace(label="a", train=slow, halt=told.set),
            SimpleNamespace(label="b", train=broken, halt=told.set)]
    with pytest.raises(box.runs.Bad, match="it failed"):
        box.trials.side_by_side(arms, [(arm, seed) for seed in (1, 2) for arm in (0, 1)], {})
    assert told.is_set() and trained == [1]


def test_a_halted_training_takes_no_command(box):
    """It is no fault of the script, and stops."""
    arm = box.trials.Arm(box.root / "train_gpt.py", "a", [], 1)
    arm.process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfor line in sys.stdin: print('\x1etrial {}', flush=True)"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True)
    arm.tail, process = [], arm.process
    assert arm.ask("train 1") == {}
    arm.halt()
    with pytest.raises(box.decide.Undecided):
        arm.ask("train 2")
    arm.end()
    assert process.poll() is not None and arm.process is None


@pytest.mark.parametrize("knob, words", [
    ("--b.adam_eps=1e-20", "both arms are one recipe"), ("--b.val_tokens=512", "losses on other tokens")])
def test_arms_that_cannot_be_told_apart_are_refused_before_the_first_run(box, monkeypatch, knob, words):
    shutil.rmtree(box.logs)
    done = trial(box, "--runs=2", knob)
    assert done.code == 2 and words in done.err and not list(box.logs.glob("2*"))


def test_a_resumed_run_is_no_run_of_a_trial(taken):
    base, _ = taken.box.arms()
    resume = dict(event="resume", step=2, from_run_id=base[0].name)
    taken.box.change(base[1], lambda rows: rows.insert(1, resume))
    taken.ready["base2"] = forge.clone(taken.box, base[0], taken.box.root / "new", 60, 2)
    done = trial(taken.box, "--runs=2", forge.COLD)
    assert "not counted, for its origin" in done.out and base[1].name in done.out
    assert ("train_gpt.py", 2) in [row[:2] for row in taken.trained]


@pytest.mark.parametrize("old, new, words", [
    ("F.relu(self.up", "F.gelo(self.up", "gelo"),
    ("    def forward(self, x):  # (T, D)\n        hidden",
     "    def forward(self, x):\n        raise ValueError('mine')\n        hidden", "ValueError('mine')"),
    ("EOT = 50256", "EOT = 50256 / 0", "ZeroDivisionError")])
def test_the_log_of_a_failing_script_ends_with_the_line_that_failed(box, old, new, words):
    script = (box.root / "train_gpt.py").read_text(encoding="utf-8")
    assert old in script
    (box.root / "mine.py").write_text(script.replace(old, new, 1), encoding="utf-8")
    done = box.main("trial", "train_gpt.py", "mine.py", "--runs=1", *KNOBS)
    assert done.code == 2 and words in "\n".join(done.out.splitlines()[-4:])
    assert re.search(r"mine.py ended with exit code 1.*: no complete run", done.err)
    folders = [box.runs.read_run(folder) for folder in box.logs.glob("2*")]
    ends = [run.end["reason"] for run in folders if run.end.get("status") == "failed"]
    assert not ends or words in ends[0] and words in done.err


def test_trial_of_a_script_with_itself_is_the_noise_floor(box, monkeypatch):
    base, _ = box.arms()
    forge.clone(box, base[2], box.logs, 5, 4, by=0.02)
    stand, looks = Stand(box, monkeypatch), (box.logs / "looks.jsonl").read_text()
    done = trial(box, "--runs=2")
    assert sorted(line.split(", ")[1][:6] for line in done.out.splitlines() if "already" in line) == [
        f"seed {seed}" for seed in (1, 2, 3, 4)] and not stand.trained
    a, b = losses(box, base[:2]), losses(box, box.arms()[0][2:])
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    assert done.code == 0 and "Noise floor: two sets of 2 runs" in done.out
    noise = t_quantile(0.975, 2) * pooled  # sqrt(2 / n) is 1
    for number in (f"sd {pooled:.4f}", f"{noise:.4f} in 95 %", f"{statistics.fmean(b) - statistics.fmean(a):+.4f}"):
        assert number in done.out.splitlines()[-1]
    done = trial(box, "--runs=1")
    assert done.code == 3 and "takes an interval" in done.out
    assert (box.logs / "looks.jsonl").read_text() == looks  # nothing was compared that could help or hurt
