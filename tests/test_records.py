"""Records from end to end, on real tiny runs: add, verify, list, compare and plot."""

import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from types import SimpleNamespace

import forge
import pytest
from forge import ROOT, TARGET, TRACK, default_of, losses, names, without
from reference import slow_welch, t_below, t_quantile

HEAD_LR = default_of("head_lr")
COMMON = ["--track", TRACK, "--author", "a tester", "--summary", "a set", "--name", "New", "--claim", "result"]


@pytest.fixture
def toy(tmp_path_factory):
    return forge.made(tmp_path_factory)


@pytest.fixture
def box(tmp_path_factory, tmp_path):
    return forge.box(tmp_path_factory, tmp_path)


@pytest.fixture
def bare(box):
    """A copy without records: its runs are free to be added."""
    for name in ("Toy", "Fast"):
        shutil.rmtree(box.record(name))
    return box


# ---- Stages: batches that change during a run


@pytest.mark.parametrize("count", range(1, 7))
def test_stages_are_those_of_the_script(toy, count):
    import train_gpt

    assert set(train_gpt.PLACES) <= set(toy.runs.PLACES)
    batches = " ".join(f"{3 * k + 1}x{128 * (7 - k)}" for k in range(count))
    hp = dataclasses.replace(train_gpt.Hyperparameters(), steps=20 + count, batch_stages=batches)
    stages = toy.runs.stages_of(dataclasses.asdict(hp))
    assert [*map(tuple, stages)] == [*map(tuple, train_gpt.stages(hp))]
    for step in range(hp.steps + 1):
        assert toy.runs.tokens_before(step, stages) == train_gpt.tokens_before(step, hp)


def test_a_record_of_stages(bare):
    """Also `rerun` gives batches in one form: a script refuses --batch_stages beside --train_seq_len."""
    base, _ = bare.arms()
    for i in (4, 5, 6):
        folder = forge.clone(bare, base[0], bare.root / "staged", 10 * i, i, 1 + 0.01 * i, by=1 + 0.01 * i)
        bare.change(folder, lambda rows: forge.in_stages(rows, batch_stages="1x128 2x128 4x64", lr_batch=128))
    bare.add("New", (bare.root / "staged").iterdir(), "result")
    assert bare.main("verify") == (0, "1 records, 0 failed\n", "")
    record = bare.runs.read_record(bare.record("New"))
    assert [run["tokens"] for run in record.meta["runs"]] == [6 * 128 + 7 * 256 + 7 * 256] * 3
    given = bare.trials.knobs_of(record.runs[0], bare.root)
    assert "--batch_stages=1x128 2x128 4x64" in given and "--train_seq_len" not in " ".join(given)


# ---- add, verify and list


def test_what_add_writes(toy):
    record, (base, cold) = toy.record("Toy"), toy.arms()
    meta = json.loads((record / "meta.json").read_text())
    arm, result = meta["arms"][0], meta["result"]
    for entry, folder in zip(meta["runs"] + arm["runs"], base + cold, strict=True):
        end = toy.events(folder)[-1]
        wanted = folder.name, 20 * 256, end["val_loss"], end["train_ms"]
        assert tuple(entry[key] for key in ("run_id", "tokens", "val_loss", "train_time_ms")) == wanted
    assert arm | dict(runs=0) == dict(name="cold", changed=dict(head_lr=0.0001), patch_sha256=None, runs=0)
    mean, sd = statistics.fmean(losses(toy, base)), statistics.stdev(losses(toy, base))
    assert (result["val_loss_mean"], result["val_loss_sd"]) == (pytest.approx(mean), pytest.approx(sd))
    assert result["p"] == pytest.approx(1 - t_below((TARGET - mean) / sd * math.sqrt(3), 2, 100_000), rel=1e-4)
    assert meta["changed"]["steps"] == 20 and "data_dir" not in meta["changed"] and meta["data"]["public"]
    assert {path.name for path in (record / "arms" / "cold").iterdir()} == {run.name for run in cold}
    fast = json.loads((toy.record("Fast") / "meta.json").read_text())["result"]
    assert fast["gain_ci_ms"][0] < fast["gain_ms"] < fast["gain_ci_ms"][1]


def test_leaving_out_and_keeping_private(bare):
    base, cold = bare.arms()
    before = bare.tree()
    refused = bare.main("add", *base[:2], *COMMON)
    assert refused.code == 1 and "left-out" in refused.out and base[2].name in refused.out and bare.tree() == before
    why = [f"--leave-out={run.name}=the power failed" for run in base[1:]]
    assert bare.main("add", base[0].name, *COMMON, *why, "--private").code == 0
    readme = (bare.record("New") / "README.md").read_text()
    assert readme.startswith(bare.runs.PRIVATE + "\n") and f"- left out: {base[2].name}, the power failed" in readme
    assert bare.main("verify", bare.record("New").name) == (0, "1 records, 0 failed\n", "")


ADD, TRIAL = ("add", "{run}", *COMMON), ("trial", "train_gpt.py", "train_gpt.py")
REFUSED = dict(
    name_that_is_a_path=(*ADD, "--name", "../x"), compare_of_one=("compare", "a"), track=(*ADD, "--track", "x"),
    run_that_is_not_there=("add", "20200101-000000-abcdef", *COMMON), parent=(*ADD, "--parent", "../x"),
    leave_out_without_reason=(*ADD, "--leave-out", "{run}"), arm_that_is_a_path=(*ADD, "--arm", "../../../evil={cold}"),
    arm_without_name=(*ADD, "--arm", "{cold}"), verify_of_nothing=("verify", "2020-01-01_Nothing"),
    compare_of_a_script=("compare", "train_gpt.py", "a"), compare_of_mixed_recipes=("compare", "logs", "{run}"),
    plot_of_no_mark=("plot", "{run}", "--mark", "x=1"), plot_into_nothing=("plot", "{run}", "--out", "nowhere/x.png"),
    import_of_nothing=("import", "nothing"), trial_of_nothing=("trial", "nothing.py", "train_gpt.py"),
    unknown_option=("list", "--all"), trial_without_runs=(*TRIAL, "--runs=0"), trial_with_a_seed=(*TRIAL, "--seed=3"))


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED)
def test_bad_usage_is_refused_in_a_sentence_and_writes_nothing(toy, argv):
    base, cold = toy.arms()
    before = {path for path in toy.tree() if ".cache" not in path.parts}
    done = toy.main(*(word.format(run=base[0].name, cold=cold[0].name) for word in argv))
    assert done.code == 2 and {path for path in toy.tree() if ".cache" not in path.parts} == before
    sentence = done.err.splitlines()[-1]
    assert sentence.startswith("records.py") and len(sentence) > 30 and "Traceback" not in done.err


def test_list_and_its_table_in_the_readme(box, tmp_path):
    """Without scipy or torch. What meets the target is ranked by time, and what misses it comes behind, by loss."""
    readme = box.root / "README.md"
    text = readme.read_text()
    assert text.startswith("# A toy\n") and text.endswith("The end.\n") and "\nold\n" not in text
    box.replace(readme, "| record |", "| the best |")
    box.expect("readme", "list --write")
    done = box.process("list", "--write", PYTHONPATH=without(tmp_path, "scipy", "torch", "numpy", "matplotlib"))
    assert done.code == 0 and readme.read_text() == text and done.out.strip() in text
    for i, (ms, p, loss) in enumerate([(5e3, None, 4.0), (3e3, 0.001, 4.2), (3e3, None, 3.9), (2e3, 0.001, 4.3)]):
        box.victim = shutil.copytree(box.record("Fast"), box.root / "records" / f"2020-01-01_Gpu{i}")
        result = dict(train_time_ms_median=ms, gain_ci_ms=None, val_loss_mean=loss, p=p)
        box.write(box.victim, forge.overlay(box.meta(), dict(name=box.victim.name, result=result)))
    rows = re.findall(r"^\| \[2020-01-01_(Gpu.)\].* \|$", box.main("list").out, re.M)
    assert rows == ["Gpu3", "Gpu1", "Gpu2", "Gpu0"]
    readme.write_text("# A toy\n")
    assert box.main("list", "--write").code == 2 and readme.read_text() == "# A toy\n"


@pytest.mark.parametrize("name, differs", [("corpus-1xh100", {"target_loss": 3.85, "min_runs": 3}),
                                           ("fineweb-1xh100", {"target_loss": None})])
def test_the_track_of_an_eighth_is_its_siblings(name, differs):
    """Same tokens, hardware and clock: how many tokens a step has is up to the run."""
    tracks = {path.stem: json.loads(path.read_text()) for path in (ROOT / "records/tracks").glob("*.json")}
    assert tracks[f"{name}-eighth"] == tracks[name] | differs


def test_without_scipy_nothing_is_passed_and_failures_still_show(box, tmp_path):
    path = without(tmp_path, "scipy", "torch")
    done = box.process("verify", PYTHONPATH=path)
    assert done.code == 3 and done.out.startswith("unchecked: scipy missing")
    assert done.out.endswith("\n2 records, 0 failed\n") and done.err == ""
    box.replace(box.victim / "README.md", "n = 3", "n = 4")
    done = box.process("verify", PYTHONPATH=path)
    assert done.code == 1 and " readme: " in done.out and "unchecked: scipy missing" in done.out


def test_committed_records_verify():
    command = [sys.executable, str(forge.ROOT / "records" / "records.py"), "verify"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.endswith("records, 0 failed\n"), done.stdout + done.stderr


def test_the_example_for_tensorboard(toy, monkeypatch):
    """Which is no dependency: a stand-in takes the scalars."""
    base, _ = toy.arms()
    code, written = (ROOT / "records" / "README.md").read_text(encoding="utf-8").split("```python\n")[1], []
    out = SimpleNamespace(add_scalar=lambda *row: written.append(row), close=lambda: written.append("closed"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda name: out))
    monkeypatch.setattr(sys, "argv", ["follow.py", str(base[0])])
    exec(code.split("```")[0], {})
    assert written.pop() == "closed" and ("val_loss", losses(toy, base)[0], 20) in written


# ---- compare and plot


def test_compare_a_record_with_a_set_of_runs(toy):
    base, cold = toy.arms()
    done = toy.main("compare", toy.record("Toy").name, names(cold))
    gap, low, high, _ = slow_welch(losses(toy, base), losses(toy, cold))
    assert done.code == 0 and done.out.startswith(f"scripts: the same\nchanged knobs: head_lr {HEAD_LR} -> 0.0001\n")
    assert f"\nhead_lr=0.0001 hurt: its loss is {gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, n = 3" in done.out
    inside = toy.main("compare", toy.record("Toy") / "runs", toy.record("Toy") / "arms" / "cold")
    assert inside.code == 0 and "p of a mean below 5" in done.out and "p of a mean" not in inside.out  # no track


@pytest.mark.parametrize("status", ["stopped", "failed", None])
def test_only_complete_runs_count(box, status):
    base, cold = box.arms()
    rows = box.events(base[0])
    rows[-1] |= dict(status=status, code=75, steps=7, val_loss=None)
    box.rewrite(base[0], rows if status else rows[:-1])
    done = box.main("compare", base[0], cold[0])
    assert done.code == 2 and "holds 1 runs, and no complete one" in done.err
    done = box.main("compare", f"{base[0]},{base[1]}", cold[0])
    assert done.code == 3 and f"only complete runs count, and these are not: {base[0].name}" in done.out


def test_the_same_losses_are_a_pure_refactoring(box):
    base, _ = box.arms()
    same = [forge.clone(box, run, box.root / "same", 3600 + 60 * i, i, pace=0.5) for i, run in enumerate(base, 1)]
    for folder in same:
        box.rescript(folder, "# written anew\n")
    done = box.main("compare", names(base), "same")
    assert done.code == 0 and "same: identical losses, to the last digit, with each seed of both (3)" in done.out
    box.change(folder, lambda rows: forge.shift(rows, 1e-9))
    done = box.main("compare", names(base), "same")
    assert done.code == 0 and "identical" not in done.out and "equal to" in done.out and "within 0.01" in done.out


def alternating(box, *shifts, pace=0.5):
    """Sets A and B of clones that took turns; the losses of B lie `shifts` from those of A, by seed."""
    base, _ = box.arms()
    for i, by in enumerate(shifts, 1):
        forge.clone(box, base[0], box.root / "a", 100 * i, i, 1 + 0.001 * i, 0.01 * i)
        forge.clone(box, base[0], box.root / "b", 100 * i + 50, i, pace + 0.001 * i, 0.01 * i + by, head_lr=0.5)
    return "a", "b"


@pytest.mark.parametrize("shifts, options, code, words", [
    ((0.001, -0.002, 0.002), [], 0, f"head_lr=0.5: equal to head_lr={HEAD_LR} within 0.01"),
    ((0.001, -0.002, 0.002), ["--margin=0.001"], 3, "the losses are not separated"),
    ((0.03, -0.02, 0.02), [], 3, "no effect on the loss that could be told from noise"),
    ((-0.03, -0.02, -0.025), [], 0, "head_lr=0.5 helped: its loss is -0.0250"),
    ((0.003, 0.002, 0.0025), [], 0, "head_lr=0.5 hurt, by less than 0.01: its loss is +0.0025")])
def test_time_to_equal_loss_takes_an_interval_inside_the_margin(box, shifts, options, code, words):
    done = box.main("compare", *alternating(box, *shifts), *options)
    margin, last = float((options or ["=0.01"])[0].partition("=")[2]), done.out.splitlines()[-1]
    low, high = (float(x) for x in last.split("95 % interval ")[1].split(", ")[0].split(" to "))
    assert done.code == code and words in done.out and "3 pairs of one seed" in last and "by Welch's t" in done.out
    inside = -margin < low and high < margin
    assert (f"time to equal loss, within {margin:g}, x 0.5" if inside else "not at equal loss, x 0.5") in last
    ratios = [math.log((0.5 + 0.001 * i) / (1 + 0.001 * i)) for i in (1, 2, 3)]
    half = t_quantile(0.975, 2) * statistics.stdev(ratios) / math.sqrt(3)
    mean, first, end = (math.exp(statistics.fmean(ratios) + k * half) for k in (0, -1, 1))
    assert f"x {mean:.3f} (95 % interval x {first:.3f} to {end:.3f})" in last
    assert ("with a chance of 80 % takes n = " in done.out) == (code == 3)


def test_runs_that_did_not_take_turns_give_no_verdict_on_time(box):
    a, b = alternating(box, 0.001, 0.002, 0.0015)
    assert "no verdict on time" not in box.main("compare", a, b).out
    assert "no verdict on time (x " in box.main("compare", names(box.arms()[0]), b).out
    done = box.main("compare", names(box.arms()[0][:2]), b)
    assert done.code == 3 and "takes an interval to say" not in done.out
    done = box.main("compare", box.arms()[0][0], b)
    assert done.code == 3 and "takes an interval to say, and so 3 runs of each" in done.out


def test_compare_other_machines_scripts_and_streams(box):
    base, _ = box.arms()
    other = [forge.clone(box, base[0], box.root / "other", i, i, by=1 + i / 100) for i in (1, 2)]
    for folder in other:
        box.rescript(folder, "# \x1b[31m mine\n")
        box.change(folder, forge.put("start", torch="1.0", packages={}))
    done = box.main("compare", names(base), "other")
    assert done.code == 0 and "+# \\x1b[31m mine\n" in done.out and "\x1b" not in done.out
    assert "note: not one kind of machine" in done.out and "torch 1.0" in done.out
    (other[0] / "train_gpt.py").write_text("pass")
    assert "SHA-256 of train_gpt.py" in box.main("compare", base[0], other[0]).err
    for folder in other:
        (folder / "train_gpt.py").unlink()
    assert "scripts: not the same, and one is not kept" in box.main("compare", base[0], other[0]).out
    for folder in other:
        box.change(folder, forge.put("start", data=dict(val_sha256="a" * 64)))
    for command in ("compare", "plot"):
        done = box.main(command, names(base), "other")
        assert done.code == 2 and "validated on" in done.err and done.out == ""


@pytest.mark.parametrize("count, x, column, scale", [(1, "time", 3, 1e3), (20, "tokens", 1, 1e6), (3, "steps", 0, 1)])
def test_a_picture_shows_both_losses_and_keeps_its_legend_inside(toy, tmp_path, monkeypatch, count, x, column, scale):
    drawn, picture, (base, cold) = [], toy.sets.picture, toy.arms()
    monkeypatch.setattr(toy.sets, "picture", lambda *row: drawn.append(picture(*row)) or drawn[-1])
    sets = [f"a name without end {i} {'W' * 99}={run}" for i, run in enumerate((4 * (base + cold))[:count])]
    done = toy.main("plot", *sets, f"--x={x}", "--out", tmp_path / "plot.png", "--mark", "a mark=1e-3,0.5")
    assert done.code == 0 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn[0].draw_without_rendering()
    axis, = drawn[0].axes
    legend, frame = axis.get_legend().get_window_extent(), axis.get_window_extent()
    assert frame.contains(*legend.min) and frame.contains(*legend.max)
    run, (raw, mean, scored) = toy.runs.read_run(base[0]), axis.lines[:3]
    xs = lambda points: [p[column] / scale for p in points]
    assert [*zip(*raw.get_data())] == [*zip(xs(run.steps), [p[2] for p in run.steps])]
    assert [*mean.get_xdata()] == xs(run.steps) and raw.get_alpha() < 1 and raw.get_linewidth() < mean.get_linewidth()
    assert [*zip(*scored.get_data())] == [*zip(xs(run.vals[1:]), [p[2] for p in run.vals[1:]])]
    assert scored.get_linestyle() == "--" and mean.get_linestyle() == "-"
    (low, high), shown = axis.get_ylim(), [text.get_text() for text in axis.get_legend().get_texts()]
    assert low < 0.5 < run.val_loss < high and "a mark: 0.5" in shown


def test_sets_are_called_by_what_differs(box):
    """By knobs where one script ran and they tell all apart, else by where they lie; a name of the user's stays."""
    (base, cold), record = box.arms(), box.record("Toy")
    called = lambda *texts: [s.label for s in box.sets.load_all([*map(str, texts)])]
    assert called(base[0], cold[0], f"mine={base[1]}") == [f"head_lr={HEAD_LR}", "head_lr=0.0001", "mine"]
    assert called(base[0], base[1], cold[0]) == [base[0].name, base[1].name, cold[0].name]
    assert called(record) == [record.name] and called(f"{base[0]},{base[1]}") == [f"{base[0].name} and 1 more"]
    for run in (record / "arms/cold").iterdir():
        box.change(run, forge.put("start", script_sha256="a" * 64))
    assert called(record / "runs", record / "arms/cold") == ["runs", "cold"]
    shutil.copytree(record / "runs", box.root / "runs")
    assert called(record / "runs", box.root / "runs") == [f"{record.name}/runs", f"{box.root.name}/runs"]


def test_a_mean_is_of_the_points_that_all_runs_have(toy):
    """Those of two public scripts that a name joins may lie at other steps."""
    curves = [[(step, None, loss, 10.0 * step) for step, loss in points] for points in (
        ((5, 4.0), (10, 3.0), (20, 2.0)), ((10, 4.0), (20, 3.0)))]
    assert toy.sets.mean_curve(curves, 3, 10) == ([10, 20], [3.5, 2.5])
    line = [3 - 0.01 * i for i in range(50)]  # smoothing keeps it to its ends
    assert toy.sets.smooth(line) == pytest.approx(line) and toy.sets.smooth([]) == []
