"""Records from end to end, on real tiny runs: add, verify, list, compare and plot."""

import dataclasses
import json
import math
import re
import shutil
import statistics
import sys
from unittest import mock

import forge
import pytest
from forge import DEFAULTS, ROOT, TARGET, clone, edit, losses, names, put
from reference import slow_welch
from tiny import events

HEAD_LR = DEFAULTS["head_lr"]
NEW = [*forge.COMMON, "--name=New", "--claim=result"]


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
        pace = 1 + 0.01 * i
        folder = clone(base[0], bare.root / "staged", 10 * i, i, pace, by=pace)
        edit(folder, lambda rows: forge.in_stages(rows, batch_stages="1x128 2x128 4x64", lr_batch=128))
    bare.add(*(bare.root / "staged").iterdir(), *NEW)
    assert bare.main("verify") == (0, "1 records, 0 failed\n", "")
    record = bare.runs.read_record(bare.record("New"))
    assert [run["tokens"] for run in record.meta["runs"]] == [6 * 128 + 7 * 256 + 7 * 256] * 3
    given = bare.trials.knobs_of(record.runs[0], bare.root)
    assert "--batch_stages=1x128 2x128 4x64" in given and "--train_seq_len" not in " ".join(given)


# ---- add, verify and list


def test_what_add_writes(toy):
    base, cold = toy.arms()
    meta = json.loads((toy.record("Toy") / "meta.json").read_text())
    (arm,), result, found = meta["arms"], meta["result"], losses(base)
    for entry, folder in zip(meta["runs"] + arm["runs"], base + cold, strict=True):
        end = events(folder, "end")[0]
        own = dict(run_id=folder.name, tokens=20 * 256, val_loss=end["val_loss"], train_time_ms=end["train_ms"])
        assert entry | own == entry
    assert arm | dict(runs=0) == dict(name="cold", changed=dict(head_lr=0.0001), patch_sha256=None, runs=0)
    numbers = statistics.fmean(found), statistics.stdev(found), toy.decide.p_below(found, TARGET)
    assert [result[key] for key in ("val_loss_mean", "val_loss_sd", "p")] == pytest.approx(numbers)
    assert meta["changed"]["steps"] == 20 and "data_dir" not in meta["changed"] and meta["data"]["public"]
    fast = toy.meta()["result"]
    assert fast["gain_ci_ms"][0] < fast["gain_ms"] < fast["gain_ci_ms"][1]


def test_leaving_out_and_keeping_private(bare):
    base, cold = bare.arms()
    before = bare.tree()
    refused = bare.main("add", *base[:2], *NEW)
    assert refused.code == 1 and "left-out" in refused.out and base[2].name in refused.out and bare.tree() == before
    why = [f"--leave-out={run.name}=the power failed" for run in base[1:]]
    assert bare.main("add", base[0].name, *NEW, *why, "--private").code == 0
    readme = (bare.record("New") / "README.md").read_text()
    assert readme.startswith(bare.runs.PRIVATE + "\n") and f"- left out: {base[2].name}, the power failed" in readme
    assert bare.main("verify", bare.record("New").name) == (0, "1 records, 0 failed\n", "")


ADD, TRIAL = ("add", "{run}", *NEW), ("trial", "train_gpt.py", "train_gpt.py")
REFUSED = dict(
    name_that_is_a_path=(*ADD, "--name=../x"), track=(*ADD, "--track=x"), parent=(*ADD, "--parent=../x"),
    run_that_is_not_there=("add", "20200101-000000-abcdef", *NEW), arm_without_name=(*ADD, "--arm={cold}"),
    leave_out_without_reason=(*ADD, "--leave-out={run}"), arm_that_is_a_path=(*ADD, "--arm=../../../evil={cold}"),
    verify_of_nothing=("verify", "2020-01-01_Nothing"), compare_of_mixed_recipes=("compare", "logs", "{run}"),
    compare_of_a_script=("compare", "train_gpt.py", "a"), import_of_nothing=("import", "nothing"),
    plot_of_no_mark=("plot", "{run}", "--mark=x=1"), plot_into_nothing=("plot", "{run}", "--out=nowhere/x.png"),
    trial_of_nothing=("trial", "nothing.py", "train_gpt.py"), compare_of_one=("compare", "a"),
    trial_without_runs=(*TRIAL, "--runs=0"), trial_with_a_seed=(*TRIAL, "--seed=3"))


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED)
def test_bad_usage_is_refused_in_a_sentence_and_writes_nothing(toy, argv):
    (run, *_), (cold, _) = toy.arms()
    before = toy.tree()
    done = toy.main(*(word.format(run=run.name, cold=cold.name) for word in argv))
    assert done.code == 2 and toy.tree() == before
    sentence = done.err.splitlines()[-1]
    assert sentence.startswith("records.py") and len(sentence) > 30 and "Traceback" not in done.err


def test_list_and_its_table_in_the_readme(box):
    """Without scipy or torch. What meets the target is ranked by time, and what misses it comes behind, by loss."""
    readme = box.root / "README.md"
    text = readme.read_text()
    assert text.startswith("# A toy\n") and text.endswith("The end.\n") and "\nold\n" not in text
    box.replace(readme, "| record |", "| the best |")
    box.expect("readme", "list --write")
    done = box.process("list", "--write", lacks=("scipy", "torch", "numpy", "matplotlib"))
    assert done.code == 0 and readme.read_text() == text and done.out.strip() in text
    fast = box.victim
    for i, (ms, p, loss) in enumerate([(5e3, None, 4.0), (3e3, 0.001, 4.2), (3e3, None, 3.9), (2e3, 0.001, 4.3)]):
        box.victim = shutil.copytree(fast, fast.with_name(f"2020-01-01_Gpu{i}"))
        result = dict(train_time_ms_median=ms, gain_ci_ms=None, val_loss_mean=loss, p=p)
        box.write(forge.overlay(box.meta(), dict(name=box.victim.name, result=result)))
    assert re.findall(r"^\| \[2020-01-01_Gpu(.)\]", box.main("list").out, re.M) == ["3", "1", "2", "0"]
    readme.write_text("# A toy\n")
    assert box.main("list", "--write").code == 2 and readme.read_text() == "# A toy\n"


@pytest.mark.parametrize("name, differs", [("corpus-1xh100", {"target_loss": 3.85, "min_runs": 3}),
                                           ("fineweb-1xh100", {"target_loss": None})])
def test_the_track_of_an_eighth_is_its_siblings(name, differs):
    """Same tokens, hardware and clock: how many tokens a step has is up to the run."""
    tracks = forge.runs.read_tracks()
    assert tracks[f"{name}-eighth"] == tracks[name] | differs


def test_without_scipy_nothing_is_passed_and_failures_still_show(box):
    done = box.process("verify", lacks=("scipy", "torch"))
    assert done.code == 3 and done.out.startswith("unchecked: scipy missing")
    assert done.out.endswith("\n2 records, 0 failed\n") and done.err == ""
    box.replace(box.victim / "README.md", "n = 3", "n = 4")
    done = box.process("verify", lacks=("scipy", "torch"))
    assert done.code == 1 and " readme: " in done.out and "unchecked: scipy missing" in done.out


def test_committed_records_verify():
    done = forge.Box(ROOT).main("verify")
    assert done.code == 0 and done.out.endswith("records, 0 failed\n"), done


def test_the_example_for_tensorboard(toy, monkeypatch):
    """Which is no dependency: a stand-in takes the scalars."""
    (run, *_), board = toy.arms()[0], mock.Mock()
    code = (ROOT / "records" / "README.md").read_text(encoding="utf-8").split("```python\n")[1]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(sys, "argv", ["follow.py", str(run)])
    exec(code.split("```")[0], {})
    board.SummaryWriter.return_value.add_scalar.assert_any_call("val_loss", losses([run])[0], 20)
    board.SummaryWriter.return_value.close.assert_called_once_with()


# ---- compare and plot


def test_compare_a_record_with_a_set_of_runs(toy):
    base, cold = toy.arms()
    done = toy.main("compare", toy.record("Toy").name, names(cold))
    gap, low, high, _ = slow_welch(losses(base), losses(cold))
    assert done.code == 0 and done.out.startswith(f"scripts: the same\nchanged knobs: head_lr {HEAD_LR} -> 0.0001\n")
    assert f"\nhead_lr=0.0001 hurt: its loss is {gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, n = 3" in done.out
    inside = toy.main("compare", toy.record("Toy") / "runs", toy.record("Toy") / "arms" / "cold")
    assert inside.code == 0 and "p of a mean below 5" in done.out and "p of a mean" not in inside.out  # no track


@pytest.mark.parametrize("status", ["stopped", "failed", None])
def test_only_complete_runs_count(box, status):
    base, cold = box.arms()
    ended = put("end", status=status, code=75, steps=7, val_loss=None)
    edit(base[0], ended if status else list.pop)
    done = box.main("compare", base[0], cold[0])
    assert done.code == 2 and "holds 1 runs, and no complete one" in done.err
    done = box.main("compare", f"{base[0]},{base[1]}", cold[0])
    assert done.code == 3 and f"only complete runs count, and these are not: {base[0].name}" in done.out


def test_the_same_losses_are_a_pure_refactoring(box):
    base, _ = box.arms()
    for i, run in enumerate(base, 1):
        folder = clone(run, box.root / "same", 3600 + 60 * i, i, pace=0.5)
        edit(folder, forge.extend(folder / "train_gpt.py", "# written anew\n"))
    done = box.main("compare", names(base), "same")
    assert done.code == 0 and "same: identical losses, to the last digit, with each seed of both (3)" in done.out
    edit(folder, lambda rows: forge.shift(rows, 1e-9))
    done = box.main("compare", names(base), "same")
    assert done.code == 0 and "identical" not in done.out and "equal to" in done.out and "within 0.01" in done.out


def alternating(box, *shifts):
    """Sets A and B of clones that took turns; the losses of B lie `shifts` from those of A, by seed."""
    base, _ = box.arms()
    for i, by in enumerate(shifts, 1):
        own, pace = 0.01 * i, 0.001 * i
        clone(base[0], box.root / "a", 100 * i, i, 1 + pace, own)
        clone(base[0], box.root / "b", 100 * i + 50, i, 0.5 + pace, own + by,
              head_lr=0.5)
    return "a", "b"


EQUAL, APART = "time to equal loss, within {:g}, x 0.5", "not at equal loss, x 0.5"


@pytest.mark.parametrize("shifts, margin, code, words, time", [
    ((0.001, -0.002, 0.002), 0.01, 0, f"head_lr=0.5: equal to head_lr={HEAD_LR} within 0.01", EQUAL),
    ((0.001, -0.002, 0.002), 0.001, 3, "no effect on the loss that could be told from noise", APART),
    ((-0.03, -0.02, -0.025), 0.01, 0, "head_lr=0.5 helped: its loss is -0.0250", APART),
    ((0.003, 0.002, 0.0025), 0.01, 0, "head_lr=0.5 hurt, by less than 0.01: its loss is +0.0025", EQUAL)])
def test_time_to_equal_loss_takes_an_interval_inside_the_margin(box, shifts, margin, code, words, time):
    done = box.main("compare", *alternating(box, *shifts), f"--margin={margin}")
    last = done.out.splitlines()[-1]
    assert done.code == code and words in done.out and "3 pairs of one seed" in last and "by Welch's t" in done.out
    assert time.format(margin) in last and ("with a chance of 80 % takes n = " in done.out) == (code == 3)
    paces = ([math.log(pace + 0.001 * i) for i in (1, 2, 3)]
             for pace in (1, 0.5))
    ends = map(math.exp, box.decide.paired(*paces)[:3])
    assert "x {:.3f} (95 % interval x {:.3f} to {:.3f})".format(*ends) in last


def test_runs_that_did_not_take_turns_give_no_verdict_on_time(box):
    (a, b), (base, _) = alternating(box, 0.001, 0.002, 0.0015), box.arms()
    assert "no verdict on time" not in box.main("compare", a, b).out
    assert "no verdict on time (x " in box.main("compare", names(base), b).out
    done = box.main("compare", base[0], b)
    assert done.code == 3 and "takes an interval to say, and so 3 runs of each" in done.out


def test_compare_other_machines_scripts_and_streams(box):
    base, _ = box.arms()
    other = clone(base[0], box.root / "other", 1, 1, by=1)
    edit(other, forge.extend(other / "train_gpt.py", "# \x1b[31m mine\n"))
    edit(other, put("start", torch="1.0", packages={}))
    done = box.main("compare", names(base), other)
    assert done.code == 3 and "+# \\x1b[31m mine\n" in done.out and "\x1b" not in done.out
    assert "note: not one kind of machine" in done.out and "torch 1.0" in done.out
    (other / "train_gpt.py").write_text("pass")
    assert "SHA-256 of train_gpt.py" in box.main("compare", base[0], other).err
    (other / "train_gpt.py").unlink()
    assert "scripts: not the same, and one is not kept" in box.main("compare", base[0], other).out
    edit(other, put("start", data=dict(val_sha256="a" * 64)))
    for command in ("compare", "plot"):
        done = box.main(command, names(base), other)
        assert done.code == 2 and "validated on" in done.err and done.out == ""


@pytest.mark.parametrize("count, x, column, scale", [
    (1, "time", 3, 1e3), (20, "tokens", 1, 1e6), (3, "steps", 0, 1)])
def test_a_picture_shows_both_losses_and_keeps_its_legend_inside(toy, tmp_path, count, x, column, scale):
    base, cold = toy.arms()
    sets = [f"a name without end {i} {'W' * 99}={run}" for i, run in enumerate((4 * (base + cold))[:count])]
    done = toy.main("plot", *sets, f"--x={x}", "--out", tmp_path / "plot.png", "--mark", "a mark=1e-3,0.5")
    assert done.code == 0 and (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    figure = toy.sets.picture(toy.sets.load_all(sets), x, [("a mark", 1e-3, 0.5)])
    figure.draw_without_rendering()
    axis, = figure.axes
    legend, frame = axis.get_legend(), axis.get_window_extent()
    assert all(frame.contains(*corner) for corner in legend.get_window_extent().get_points())
    run, (raw, mean, scored) = toy.runs.read_run(base[0]), axis.lines[:3]
    for line, points in ((raw, run.steps), (scored, run.vals[1:])):
        xs, ys = line.get_data()
        assert [*xs] == [point[column] / scale for point in points]
        assert [*ys] == [point[2] for point in points]
    assert [*mean.get_xdata()] == [*raw.get_xdata()] and raw.get_alpha() < 1
    assert scored.get_linestyle() == "--" != mean.get_linestyle()
    (low, high), shown = axis.get_ylim(), [text.get_text() for text in legend.get_texts()]
    assert low < 0.5 < run.val_loss < high and "a mark: 0.5" in shown


def test_sets_are_called_by_what_differs(box):
    """By knobs where one script ran and they tell all apart, else by where they lie; a name of the user's stays."""
    (base, cold), record = box.arms(), box.record("Toy")
    called = lambda *texts: [s.label for s in box.sets.load_all([*map(str, texts)])]
    assert called(base[0], cold[0], f"mine={base[1]}") == [f"head_lr={HEAD_LR}", "head_lr=0.0001", "mine"]
    assert called(base[0], base[1], cold[0]) == [base[0].name, base[1].name, cold[0].name]
    assert called(record) == [record.name] and called(f"{base[0]},{base[1]}") == [f"{base[0].name} and 1 more"]
    for run in (record / "arms/cold").iterdir():
        edit(run, put("start", script_sha256="a" * 64))
    assert called(record / "runs", record / "arms/cold") == ["runs", "cold"]
    shutil.copytree(record / "runs", box.root / "runs")
    assert called(record / "runs", box.root / "runs") == [f"{record.name}/runs", f"{box.root.name}/runs"]


def test_a_mean_is_of_the_points_that_all_runs_have(toy):
    """Those of two public scripts that a name joins may lie at other steps."""
    short = [(10, None, 4.0, 100.0), (20, None, 3.0, 200.0)]
    long = [(5, None, 9.0, 50.0), (10, None, 3.0, 100.0),
            (20, None, 2.0, 200.0)]
    mean = toy.sets.mean_curve([long, short], 3, 10)
    assert mean == ([10, 20], [3.5, 2.5])
    line = [3 - 0.01 * i for i in range(50)]  # smoothing keeps it to its ends
    assert toy.sets.smooth(line) == pytest.approx(line) and toy.sets.smooth([]) == []
