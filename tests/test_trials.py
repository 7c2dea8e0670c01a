"""rerun and trial, on real tiny runs: what is trained, what is not trained again, and what is said of it."""

import math
import shutil
import signal
import statistics
import subprocess
import sys
import time

import forge
import pytest
from forge import KNOBS, losses
from reference import slow_welch, t_quantile
from tiny import events

# ---- rerun


def test_rerun_of_a_recorded_seed_gives_its_loss(box):
    name, before = box.record("Toy").name, box.tree()
    done = box.main("rerun", name, "--yes", "--seed=2")
    assert done.code == 0 and ", inside the 95 % prediction interval of 3 runs: " in done.out, done
    assert "all of it is records/" in done.out and " then, " not in done.out
    again, = (box.logs / "reruns" / name).iterdir()
    base, _ = box.arms()
    assert losses([again])[0] == pytest.approx(losses(base)[1], abs=1e-4)
    assert events(again)[0]["seed"] == 2 and set(before) == {p for p in box.tree() if again not in p.parents}
    assert box.main("verify").code == 0


@pytest.mark.parametrize("shift, place, code", [(0.9, "inside", 0), (1.1, "OUTSIDE", 1), (-1.1, "OUTSIDE", 1)])
def test_rerun_of_a_new_seed_says_whether_it_lies_inside(box, monkeypatch, shift, place, code):
    """In place of a run comes one whose loss lies `shift` half widths of the interval from the mean."""
    base, _ = box.arms()
    values = losses(base)
    half, mean = t_quantile(0.975, 2) * statistics.stdev(values) * math.sqrt(4 / 3), statistics.fmean(values)

    def run_alone(script, knobs, seed, nproc):
        assert (script, seed, nproc) == (box.record("Toy") / "train_gpt.py", 4, 1)
        new = forge.clone(base[0], box.logs, 5, 4, by=mean + shift * half - values[0])
        forge.edit(new, forge.put("start", torch="9.9"))
        return box.runs.read_run(new)

    monkeypatch.setattr(box.trials, "run_alone", run_alone)
    done = box.main("rerun", box.record("Toy").name, answer="y\n")
    said = f", {place} the 95 % prediction interval of 3 runs: {mean:.6f} +- {half:.6f}\n"
    assert done.code == code and said in done.out
    assert " then, 9.9 now\n" in done.out and box.arms()[0] == base


@pytest.mark.parametrize("argv, answer, code", [
    (["--yes", "--data=nowhere"], "", 2), (["--data=data", "--yes"], "", 2), ([], "n\n", 2), ([], "", 3)])
def test_rerun_runs_nothing_without_data_or_consent(box, monkeypatch, argv, answer, code):
    monkeypatch.setattr(box.trials, "run_alone", None)
    before = box.tree()
    done = box.main("rerun", box.record("Toy").name, *argv, answer=answer)
    assert done.code == code and box.tree() == before and ("run this script" in done.out) == (not argv)
    assert not argv or f"val_sha256 {box.meta()['data']['val_sha256']}" in done.err


def test_rerun_runs_no_record_that_fails(box, monkeypatch):
    monkeypatch.setattr(box.trials, "run_alone", None)
    (box.record("Toy") / "train_gpt.py").write_text("print('mine')\n")
    done = box.main("rerun", box.record("Toy").name, "--yes")
    assert done.code == 1 and " script: " in done.out


# ---- trial


def trial(box, *argv):
    return box.main("trial", "train_gpt.py", "train_gpt.py", *argv, *KNOBS)


def test_seeds_of_one_process_are_those_of_separate_ones_bit_for_bit(box):
    """The toy's runs come from two processes, one an arm, and seed 3 alone from run.sh. Here run.sh makes each anew."""
    base, cold = box.arms()
    for run in (base[1], cold[1]):  # the second of their processes
        rows = events(run)
        before = set(box.logs.iterdir())
        box.shell(*[argument for argument in rows[0]["argv"] if not argument.startswith(("--data_dir", "--preset"))])
        again, = set(box.logs.iterdir()) - before
        seen = lambda found: [(row.get("train_loss"), row.get("val_loss")) for row in found]
        assert seen(events(again)) == seen(rows)


def test_what_the_toy_trial_said(box):
    said = (box.root / "trial.txt").read_text()
    assert said.startswith("before the runs: Welch's t decides, as there are 2 seeds in common")
    base, cold = box.arms()
    assert sorted([*base, *cold]) == [cold[0], base[0], base[1], cold[1], base[2]]  # B A A B, and the run by run.sh
    gap, low, high, _ = slow_welch(losses(base[:2]), losses(cold))
    verdict = f"train_gpt.py head_lr=0.0001 hurt: its loss is {gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f}"
    assert said.splitlines()[-1].startswith(verdict)
    assert said.count("run.sh: no GPU, processes: 1") == 2  # two processes for four runs
    assert not list(box.logs.rglob("weights.pt"))


class Stand:
    """In place of an arm's process: runs that lie `ready` are moved into logs/ when their seed is trained, and the
    context says what a run of the toy would say now."""

    def __init__(self, box, monkeypatch):
        self.box, self.ready, self.trained, self.now = box, {}, [], {}
        start = events(box.arms()[0][0])[0]
        self.start = {key: start[key] for key in (*box.runs.SOFTWARE, "gpu", "gpu_count", "gpu_memory_mib", "driver",
                                                  "data", "world_size", "knobs")}
        monkeypatch.setattr(box.trials.Arm, "ask", lambda arm, line="": self.ask(arm, line.strip()))

    def ask(self, arm, seed):
        cold = "--head_lr=0.0001" in arm.knobs
        if not seed:
            own = {"head_lr": 0.0001} if cold else {}
            return forge.json.dumps({**self.start, "knobs": self.start["knobs"] | own, **self.now})
        self.trained.append(f"{'cold' if cold else 'base'}{seed}")
        folder = self.ready[self.trained[-1]]
        shutil.copytree(folder, self.box.logs / folder.name)
        return folder.name


@pytest.fixture
def taken(box, monkeypatch):
    """The toy without the cold run of seed 2, which a trial would train again."""
    _, cold = box.arms()
    stand = Stand(box, monkeypatch)
    stand.ready["cold2"] = cold[1].rename(box.root / cold[1].name)
    return stand


def test_trial_goes_on_where_it_stopped(taken):
    done = trial(taken.box, "--runs=2", forge.COLD)
    assert done.code == 0 and done.out.count("already in logs/") == 3 and taken.trained == ["cold2"]
    assert "run 4 of 4: train_gpt.py head_lr=0.0001, seed 2" in done.out
    assert done.out.splitlines()[-1] == (taken.box.root / "trial.txt").read_text().splitlines()[-1]
    again = trial(taken.box, "--runs=2", forge.COLD)
    assert again.out.count("already in logs/") == 4 and taken.trained == ["cold2"]


@pytest.mark.parametrize("now", [
    dict(torch="9.9"), dict(data=dict(encoding="bytes", val_sha256="a" * 64, val_tokens=600, train=[])),
    dict(gpu="NVIDIA H100 80GB HBM3"), dict(packages={})])
def test_runs_of_other_data_versions_or_machines_are_not_counted(taken, now):
    taken.now = now
    base, cold = taken.box.arms()
    for name, run in dict(base1=base[0], base2=base[1], cold1=cold[0]).items():
        taken.ready[name] = forge.clone(run, taken.box.root / "new", 7200, int(name[-1]))
    done = trial(taken.box, "--runs=2", forge.COLD)
    assert "already in logs/" not in done.out and len(taken.trained) == 4 and done.code == 0


def test_a_resumed_run_is_no_run_of_a_trial(taken):
    base, _ = taken.box.arms()
    resume = dict(event="resume", step=2, from_run_id=base[0].name)
    forge.edit(base[1], lambda rows: rows.insert(1, resume))
    taken.ready["base2"] = forge.clone(base[0], taken.box.root / "new", 60, 2)
    trial(taken.box, "--runs=2", forge.COLD)
    assert taken.trained == ["base2", "cold2"]


def test_other_seeds_try_a_winner_again_and_a_second_look_is_said(taken):
    base, cold = taken.box.arms()
    for i in range(11, 15):
        taken.ready[f"base{i}"] = forge.clone(base[0], taken.box.root / "new", 60 * i, i, by=0.01 * i)
        taken.ready[f"cold{i}"] = forge.clone(cold[0], taken.box.root / "new", 60 * i + 5, i, by=0.02 * i)
    done = trial(taken.box, "--runs=3", "--first-seed=11", forge.COLD)
    assert taken.trained == ["cold11", "base11", "base12", "cold12", "cold13", "base13"]
    assert done.out.startswith("before the runs: the differences between runs of one seed decide (3 pairs")
    assert "3 pairs of one seed" in done.out.splitlines()[-1] and "looks at" not in done.out
    done = trial(taken.box, "--runs=4", "--first-seed=11", forge.COLD)
    assert "looks at these two after n = 3, 4: where nothing differs" in done.out and "ideas" not in done.out


@pytest.mark.parametrize("knob, words", [
    ("--b.adam_eps=1e-20", "both arms are one script"), ("--b.val_tokens=512", "losses cannot be compared"),
    ("--data_dir=/nope/embedded", "--data_dir=/nope/embedded is not a folder")])
def test_what_no_verdict_could_follow_is_refused_before_the_first_run(box, knob, words):
    """By the processes themselves."""
    before = set(box.logs.iterdir())
    done = trial(box, "--runs=2", knob)
    assert done.code == 2 and words in done.err and set(box.logs.iterdir()) == before


def test_a_script_that_only_imports_is_refused(box):
    (box.root / "mine.py").write_text("import train_gpt\n\ntrain_gpt.MLP = train_gpt.Block\ntrain_gpt.main()\n")
    done = box.main("trial", "train_gpt.py", "mine.py")
    assert done.code == 2 and "mine.py has no train_once" in done.err and "cp train_gpt.py my.py" in done.err


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
    end, text = time.monotonic() + 120, ""
    while '"step": 20, "tokens"' not in text and time.monotonic() < end:
        time.sleep(0.1)
        logs = [run / "metrics.jsonl" for run in {*box.logs.glob("2*")} - before]
        text = "".join(log.read_text() for log in logs if log.exists())
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    run, = (box.runs.read_run(folder) for folder in set(box.logs.glob("2*")) - before)
    assert run.complete and "run 2 of" not in said.partition("step:20/20")[2].partition("stopped")[2]


@pytest.mark.parametrize("old, new, words", [
    ("F.relu(self.up", "F.gelo(self.up", "gelo"), ("EOT = 50256", "EOT = 50256 / 0", "ZeroDivisionError")])
def test_the_log_of_a_failing_script_ends_with_the_line_that_failed(box, old, new, words):
    script = (box.root / "train_gpt.py").read_text(encoding="utf-8")
    assert old in script
    (box.root / "mine.py").write_text(script.replace(old, new, 1), encoding="utf-8")
    done = box.main("trial", "train_gpt.py", "mine.py", "--runs=1", *KNOBS)
    assert done.code == 2 and words in "\n".join(done.out.splitlines()[-4:])
    assert "ended with exit code 1: no complete run" in done.err
