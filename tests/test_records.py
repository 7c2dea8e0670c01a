"""Records from end to end, on real tiny runs: add, verify, list, compare, plot, rerun and trial; the statistics."""

import dataclasses
import hashlib
import json
import math
import random
import shutil
import statistics
import subprocess
import sys

import forge
import pytest
from forge import KNOBS, TARGET, TRACK, without

PUBLISHED = [3.2791, 3.2773, 3.2783, 3.2775, 3.2781, 3.2775, 3.2793, 3.2772, 3.2769, 3.2775, 3.2806, 3.2779, 3.2816]
COMMON = ["--track", TRACK, "--author", "a tester", "--summary", "a set", "--name", "New", "--claim", "result"]


@pytest.fixture
def toy(tmp_path_factory):
    return forge.made(tmp_path_factory)


@pytest.fixture
def box(tmp_path_factory, tmp_path):
    return forge.box(tmp_path_factory, tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One copy for all that must not write."""
    return forge.box(tmp_path_factory, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def bare(box):
    """A copy without records: its runs are free to be added."""
    for name in ("Toy", "Fast"):
        shutil.rmtree(box.record(name))
    return box


def losses(checkout, folders):
    return [checkout.events(folder)[-1]["val_loss"] for folder in folders]


# ---- Statistics, against slow and obvious references


def t_below(t, df, pieces=2000):
    """P(T < t) of Student's distribution, by Simpson's rule."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    ys = [scale * (1 + (t * i / pieces) ** 2 / df) ** (-(df + 1) / 2) for i in range(pieces + 1)]
    return 0.5 + t / pieces / 3 * (ys[0] + ys[-1] + 4 * sum(ys[1:-1:2]) + 2 * sum(ys[2:-1:2]))


def t_quantile(p, df):
    low, high = 0.0, 1000.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, df) < p else (low, middle)
    return low


def slow_welch(a, b):
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    df = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b)))
    gap, error = statistics.fmean(b) - statistics.fmean(a), math.sqrt(sum(parts))
    half = t_quantile(0.975, df) * error
    return gap, gap - half, gap + half, 2 * (1 - t_below(abs(gap) / error, df))


def test_published_losses(toy):
    assert statistics.fmean(PUBLISHED) == pytest.approx(3.27836923, abs=5e-9)
    assert statistics.stdev(PUBLISHED) == pytest.approx(0.00141562, abs=5e-9)
    assert toy.sets.p_below(PUBLISHED, 3.28) == pytest.approx(0.00066906, abs=5e-9)
    t = (3.28 - statistics.fmean(PUBLISHED)) / (statistics.stdev(PUBLISHED) / math.sqrt(13))
    assert 1 - t_below(t, 12) == pytest.approx(0.00066906, abs=5e-9)
    assert toy.sets.p_below([3.27] * 3, 3.28) is None


@pytest.mark.parametrize("cut, shift", [(6, 0), (3, 0.002), (10, -0.01)])
def test_welch_prediction_and_runs_needed(toy, cut, shift):
    a, b = PUBLISHED[:cut], [x + shift for x in PUBLISHED[cut:]]
    assert toy.sets.welch(a, b) == pytest.approx(slow_welch(a, b), rel=1e-5, abs=1e-9)
    mean, half = toy.sets.prediction(a)
    assert mean == pytest.approx(sum(a) / cut)
    assert half == pytest.approx(t_quantile(0.975, cut - 1) * statistics.stdev(a) * math.sqrt(1 + 1 / cut), rel=1e-6)
    gap, spread = abs(statistics.fmean(b) - statistics.fmean(a)), statistics.variance(a) + statistics.variance(b)
    assert toy.sets.runs_needed(a, b) == next(
        n for n in range(min(len(a), len(b)) + 1, 10**6) if gap >= 2 * math.sqrt(spread / n))
    assert toy.sets.welch(a[:1], b) is None


def test_place_knobs_are_those_of_the_script(toy):
    import train_gpt

    assert set(train_gpt.PLACES) <= set(toy.runs.PLACES)


# ---- Stages: batches that change during a run


def random_stages(random):
    """Knobs of up to six stages, and for each step of the run its stage."""
    count = random.randint(1, 6)
    shape = lambda: (random.randint(1, 32), 128 * random.randint(1, 400), random.choice([1, 0.7, 0.25]))
    stages = [shape() for _ in range(count)]
    steps = random.randint(count, 60)
    knobs = dict(steps=steps, batch_stages=" ".join(f"{n}x{length}" for n, length, _ in stages),
                 lr_stages=random.choice(["", " ".join(str(lr) for *_, lr in stages)]))
    rates = [lr if knobs["lr_stages"] else 1 for *_, lr in stages]
    borders = [k * steps // count for k in range(count)]
    last = [max(k for k in range(count) if borders[k] <= step) for step in range(steps)]
    return knobs, [(borders[k], *stages[k][:2], rates[k]) for k in last]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_random_stages(toy, seed):
    knobs, wanted = random_stages(random.Random(seed))
    stages, size = toy.runs.stages_of(dict(knobs, sequences_per_step=8, train_seq_len=1024)), 0
    assert [tuple(stage) for stage in stages] == sorted(set(wanted))
    for step, own in enumerate(wanted):
        assert toy.runs.tokens_before(step, stages) == size and tuple(toy.runs.stage_at(step, stages)) == own
        size += own[1] * own[2]
    assert toy.runs.tokens_before(len(wanted), stages) == size


def test_a_run_without_stages_has_one(toy):
    knobs = dict(steps=20, sequences_per_step=8, train_seq_len=1024)
    for more in {}, dict(batch_stages="", lr_stages=""):
        stages = toy.runs.stages_of(knobs | more)
        assert [tuple(stage) for stage in stages] == [(0, 8, 1024, 1)]
        assert [toy.runs.tokens_before(step, stages) for step in (0, 1, 20)] == [0, 8192, 20 * 8192]


@pytest.mark.parametrize("seed", range(20))
def test_the_script_and_verify_agree_over_stages(toy, seed):
    import train_gpt

    knobs, wanted = random_stages(random.Random(seed))
    hp = dataclasses.replace(train_gpt.Hyperparameters(), **knobs)
    stages = toy.runs.stages_of(dataclasses.asdict(hp))
    assert [tuple(stage) for stage in train_gpt.stages(hp)] == [tuple(stage) for stage in stages]
    for step in range(len(wanted) + 1):
        assert train_gpt.tokens_before(step, hp) == toy.runs.tokens_before(step, stages)


STAGED = dict(batch_stages="1x128 2x128 4x64", lr_stages="0.5 0.75 1")
PARTS = (0, 1, 128, 0.5), (6, 2, 128, 0.75), (13, 4, 64, 1.0)


def add_stages(bare):
    """Add a record of runs in stages; returns it, and the runs of one stage that they were made of."""
    base, _ = bare.arms()
    for i in (4, 5, 6):
        folder = forge.clone(bare, base[0], bare.root / "staged", 10 * i, i, 1 + 0.01 * i, by=1 + 0.01 * i)
        rows = bare.events(folder)
        forge.in_stages(rows, PARTS, **STAGED)
        bare.rewrite(folder, rows)
    done = bare.main("add", *(bare.root / "staged").iterdir(), *COMMON)
    assert done.code == 0, done
    return bare.record("New"), base


def test_a_record_of_stages(bare):
    record, base = add_stages(bare)
    assert bare.main("verify") == (0, "1 records, 0 failed\n", "")
    meta = json.loads((record / "meta.json").read_text())
    assert meta["changed"]["lr_stages"] == "0.5 0.75 1"
    assert [run["tokens"] for run in meta["runs"]] == [6 * 128 + 7 * 256 + 7 * 256] * 3
    done = bare.main("compare", names(base), record.name)
    assert done.code == 0 and "batch_stages" in done.out and "1x128 2x128 4x64" in done.out
    assert bare.main("plot", names(base), record.name, "--out", bare.root / "plot.png").code == 0


def test_rerun_of_stages_gives_batches_in_one_form(bare, monkeypatch):
    """A script refuses --batch_stages beside --train_seq_len or --sequences_per_step."""
    add_stages(bare)
    called = []

    def launch(script, knobs, *_):
        called.extend(knobs)
        raise bare.sets.Undecided("enough")

    monkeypatch.setattr(bare.trials, "launch", launch)
    monkeypatch.setattr(bare.trials, "differences", lambda *_: [])
    assert bare.main("rerun", "New", "--yes").code == 3
    assert "--batch_stages=1x128 2x128 4x64" in called and "--lr_stages=0.5 0.75 1" in called
    assert not [knob for knob in called if knob.startswith(("--train_seq_len=", "--sequences_per_step="))]


def test_a_stopped_run_has_no_loss_at_its_end_in_format_2(box):
    for version, loss in (1, "the last"), (2, None):
        rows = box.events(box.run())
        forge.convert(rows, version)
        forge.at(rows, "end").update(status="stopped", code=75, **({} if loss else dict(val_loss=None)))
        box.rewrite(box.run(), rows)
        run = box.runs.read_run(box.run())
        assert not run.complete and {code for code, _ in box.runs.check_run(run)} == {"truncated"}


# ---- add, verify and list


def test_verify_needs_no_torch(toy, tmp_path):
    done = toy.process("verify", PYTHONPATH=without(tmp_path, "torch"))
    assert done == (0, "2 records, 0 failed\n", "")


def test_what_add_writes(toy):
    record, (base, cold) = toy.record("Toy"), toy.arms()
    meta = json.loads((record / "meta.json").read_text())
    for entry, folder in zip(meta["runs"] + meta["arms"][0]["runs"], base + cold, strict=True):
        end = toy.events(folder)[-1]
        assert entry["run_id"] == folder.name and entry["val_loss"] == end["val_loss"] and entry["tokens"] == 20 * 256
        assert entry["train_time_ms"] == end["train_ms"] and entry["steps"] == 20
    assert [entry["seed"] for entry in meta["runs"]] == [1, 2, 3]
    assert meta["arms"][0] | dict(runs=0) == dict(name="cold", changed=dict(head_lr=0.0001), patch_sha256=None, runs=0)
    found, mean, sd = losses(toy, base), meta["result"]["val_loss_mean"], meta["result"]["val_loss_sd"]
    assert mean == pytest.approx(sum(found) / 3)
    assert sd == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in found) / 2))
    assert meta["result"]["p"] == pytest.approx(1 - t_below((TARGET - mean) / sd * math.sqrt(3), 2), rel=1e-4)
    assert meta["changed"]["steps"] == 20 and "data_dir" not in meta["changed"] and meta["data"]["public"]
    names = [path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()]
    runs = [f"runs/{folder.name}" for folder in base] + [f"arms/cold/{folder.name}" for folder in cold]
    assert sorted(names) == sorted(["README.md", "meta.json", "train_gpt.py"] + [
        f"{run}/{file}" for run in runs for file in ("log.txt", "metrics.jsonl")])
    fast = json.loads((toy.record("Fast") / "meta.json").read_text())["result"]
    assert fast["gain_ci_ms"][0] < fast["gain_ms"] < fast["gain_ci_ms"][1]


def test_leaving_out_and_keeping_private(bare):
    base, cold = bare.arms()
    before = bare.tree()
    refused = bare.main("add", *base[:2], *COMMON)
    assert refused.code == 1 and f" left-out: {forge.today()}_New: logs/{base[2].name} (seed 3, " in refused.out
    assert bare.tree() == before
    why = [arg for run in base[1:] for arg in ("--leave-out", f"{run.name}=the power failed")]
    assert bare.main("add", base[0].name, *COMMON, *why, "--private").code == 0
    record, readme = bare.record("New"), (bare.record("New") / "README.md").read_text()
    assert readme.startswith(bare.runs.PRIVATE + "\n") and f"- left out: {base[2].name}, the power failed" in readme
    meta, out = json.loads((record / "meta.json").read_text()), [run.name for run in base[1:]]
    assert [run["run_id"] for run in meta["left_out"]] == out and not meta["data"]["public"]
    assert bare.main("verify", record.name) == (0, "1 records, 0 failed\n", "")


REFUSED = dict(
    nothing_to_add=("add",), name_that_is_a_path=("add", "{run}", *COMMON, "--name", "../x"), no_command=(),
    name_that_is_there=("add", "{run}", *COMMON, "--name", "Toy"),
    run_that_is_not_there=("add", "20200101-000000-abcdef", *COMMON),
    track_that_is_not_there=("add", "{run}", *COMMON, "--track", "x"),
    claim_of_no_kind=("add", "{run}", *COMMON, "--claim", "best"),
    leave_out_without_reason=("add", "{run}", *COMMON, "--leave-out", "{run}"),
    arm_that_is_a_path=("add", "{run}", *COMMON, "--arm", "../../../evil={cold}"),
    arm_without_name=("add", "{run}", *COMMON, "--arm", "{cold}"), parent=("add", "{run}", *COMMON, "--parent", "../x"),
    verify_of_nothing=("verify", "2020-01-01_Nothing"), verify_of_a_path=("verify", "../records"),
    list_of_nothing=("list", "nowhere"), compare_of_nothing=("compare", "a", "b"), compare_of_one=("compare", "a"),
    compare_of_mixed_recipes=("compare", "logs", "{run}"), rerun_of_nothing=("rerun", "2020-01-01_Nothing"),
    same_run_twice=("compare", "{run},{run}", "{cold}"), plot_of_nothing=("plot", "nothing"),
    plot_into_nothing=("plot", "{run}", "--out", "nowhere/plot.png"), import_of_nothing=("import", "nothing"),
    trial_of_nothing=("trial", "nothing.py", "train_gpt.py"), unknown_option=("list", "--all"),
    trial_without_runs=("trial", "train_gpt.py", "train_gpt.py", "--runs=0"),
    trial_with_a_seed=("trial", "train_gpt.py", "train_gpt.py", "--seed=3"),
)


@pytest.mark.parametrize("argv", REFUSED.values(), ids=REFUSED)
def test_bad_usage_is_refused_in_a_sentence_and_writes_nothing(shared, argv):
    base, cold = shared.arms()
    before = shared.tree()
    done = shared.main(*(word.format(run=base[0].name, cold=cold[0].name) for word in argv))
    assert done.code == 2 and "Traceback" not in done.err and shared.tree() == before
    sentence = (done.err or done.out).splitlines()[-1]
    assert sentence.startswith(("records.py", "skipped: ")) and len(sentence) > 30


def test_list_and_its_table_in_the_readme(box, tmp_path):
    readme = box.root / "README.md"
    text = readme.read_text()
    assert text.startswith("# A toy\n\n<!-- ") and text.endswith("<!-- end of records -->\n\nThe end.\n")
    assert "old" not in text and text.count("nobody has run ours there") == 5
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| [2")]
    assert [row[1] for row in rows] == ["reference", "record"] and [row[2] for row in rows] == ["not ranked"] * 2
    assert float(rows[0][3]) <= float(rows[1][3]) and rows[1][7] == box.record("Toy").name  # the better loss is first
    path = without(tmp_path, "scipy", "torch", "numpy", "matplotlib")
    done = box.process("list", "--write", PYTHONPATH=path)
    assert done.code == 0 and readme.read_text() == text and done.out.strip() in text
    assert box.process("list", TRACK, PYTHONPATH=path).out.count("**") == 2
    readme.write_text(text.replace("| record |", "| the best |"))
    (code, sentence), = box.problems()
    assert code == "readme" and "list --write" in sentence
    assert box.main("list", "--write").code == 0 and box.main("verify").code == 0 and readme.read_text() == text
    readme.write_text("# A toy\n")
    assert box.main("list", "--write").code == 2 and readme.read_text() == "# A toy\n"


def test_other_gpus_or_counts_are_never_ranked_together(box):
    """In a table, of those that miss the target the least loss is first, then the least time."""
    ranked = [("NVIDIA H100 A", 5e3, None, 4.0), ("NVIDIA H100 B", 1e3, [400.0, 600.0], 4.0),
              ("NVIDIA H100 A", 3e3, None, 4.0), ("NVIDIA H100 A", 2e3, None, 5.0)]
    for i, (gpu, ms, interval, loss) in enumerate(ranked):
        box.victim = shutil.copytree(box.record("Fast"), box.root / "records" / f"2020-01-01_Gpu{i}")
        meta = box.meta() | dict(track="fineweb-1xh100", name=box.victim.name)
        meta["hardware"] |= dict(gpu=gpu, count=1)
        meta["result"] |= dict(train_time_ms_median=ms, gain_ms=500.0, gain_ci_ms=interval, val_loss_mean=loss, p=None)
        box.write(box.victim, meta)
    lines = box.main("list", "fineweb-1xh100").out.splitlines()
    tables = [line.split(" |")[0] for line in lines if line.startswith("| ") and "claim" in line or "Gpu" in line]
    names = [f"| [2020-01-01_Gpu{i}](records/2020-01-01_Gpu{i})" for i in range(4)]
    assert tables == ["| 1 x NVIDIA H100 A", names[2], names[0], names[3], "| 1 x NVIDIA H100 B", names[1]]
    assert [line.rstrip(" |").rpartition("| ")[2] for line in lines if "Gpu" in line] == ["n/a"] * 3 + ["0.50"]


def test_without_scipy_nothing_is_passed_and_failures_still_show(box, tmp_path):
    path = without(tmp_path, "scipy")
    done = box.process("verify", PYTHONPATH=path)
    assert done.code == 3 and done.out.startswith("unchecked: scipy missing")
    assert done.out.endswith("\n2 records, 0 failed\n") and done.err == ""
    readme = box.victim / "README.md"
    readme.write_text(readme.read_text().replace("n = 3", "n = 4"))
    done = box.process("verify", PYTHONPATH=path)
    assert done.code == 1 and " readme: " in done.out and "unchecked: scipy missing" in done.out


def test_committed_records_verify():
    command = [sys.executable, str(forge.ROOT / "records" / "records.py"), "verify"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.endswith("records, 0 failed\n"), done.stdout + done.stderr


# ---- compare and plot


def names(folders):
    return ",".join(folder.name for folder in folders)


def test_compare_a_record_with_a_set_of_runs(toy):
    base, cold = toy.arms()
    done = toy.main("compare", toy.record("Toy").name, names(cold))
    gap, low, high, _ = slow_welch(losses(toy, base), losses(toy, cold))
    assert done.code == 0 and done.out.startswith("scripts: the same\nchanged knobs: head_lr 0.008 -> 0.0001\n")
    assert f": {gap:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (Welch)" in done.out
    assert "no time at equal loss" in done.out and "20 and 20 steps (+0)" in done.out and "note:" not in done.out
    inside = toy.main("compare", toy.record("Toy") / "runs", toy.record("Toy") / "arms" / "cold")  # keep no script
    assert inside.out.split("\n")[:2] == done.out.split("\n")[:2] and "_Toy/arms/cold: loss" in inside.out


def test_compare_says_how_many_runs_it_takes(toy):
    a, b = toy.record("Toy"), toy.record("Fast")
    done = toy.main("compare", a.name, b.name)
    sets = [losses(toy, sorted((record / "runs").iterdir())) for record in (a, b)]
    times = [statistics.fmean(run["train_time_ms"] for run in json.loads((record / "meta.json").read_text())["runs"])
             for record in (a, b)]
    need = toy.sets.runs_needed(*sets)
    assert done.code == 3 and f"{need} runs of each, {need - 3} more" in done.out
    assert f"{b.name} takes x {times[1] / times[0]:.3f} of {a.name}'s" in done.out
    assert "changed knobs: mlp_ratio 4 -> 3" in done.out
    done = toy.main("compare", names(toy.arms()[0][:2]), toy.arms()[0][2].name)
    assert done.code == 3 and "not decidable" in done.out


def test_compare_other_machines_scripts_and_streams(box):
    base, _ = box.arms()
    other = [forge.clone(box, base[0], box.root / "other", i, i, by=1 + i / 100) for i in (1, 2)]
    script = (base[0] / "train_gpt.py").read_bytes() + b"# \x1b[31m mine\n"
    for folder in other:
        (folder / "train_gpt.py").write_bytes(script)
        rows = box.events(folder)
        rows[0].update(torch="1.0", script_sha256=hashlib.sha256(script).hexdigest())
        box.rewrite(folder, rows)
    done = box.main("compare", names(base), "other")
    assert done.code == 0 and "+# \\x1b[31m mine\n" in done.out and "\x1b" not in done.out
    assert "note: not one kind of machine" in done.out and "1.0" in done.out
    (other[0] / "train_gpt.py").unlink()
    assert f"scripts: not the same, and that of {other[0].name} is" in box.main("compare", *base[:1], other[0]).out
    for folder in other:
        rows = box.events(folder)
        rows[0]["data"]["val_sha256"] = "a" * 64
        box.rewrite(folder, rows)
    done = box.main("compare", names(base), "other")
    own = box.events(base[0])[0]["data"]["val_sha256"]
    assert done.code == 2 and "a" * 12 in done.err and own[:12] in done.err and done.out == ""


def test_plot(toy, tmp_path):
    out = tmp_path / "plot.png"
    done = toy.main("plot", toy.record("Toy").name, toy.record("Fast").name, "--out", out)
    data = out.read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert done == (0, f"{out}: {len(data)} bytes\n", "")
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) <= 100 * 1024 and width > 2 * height > 400


# ---- rerun and trial


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

    def launch(script, knobs, seed, *_):
        called.extend([script, seed, *knobs])
        off = statistics.fmean(values) + shift * half - values[0]
        return box.runs.read_run(forge.clone(box, base[0], box.logs, 5, 4, by=off))

    monkeypatch.setattr(box.trials, "launch", launch)
    monkeypatch.setattr(box.trials, "differences", lambda *_: [])
    done = box.main("rerun", box.record("Toy").name, answer="y\n")
    assert done.code == code and f", {place} the 95 % prediction interval of 3 runs: " in done.out
    assert f"{statistics.fmean(values):.6f} +- {half:.6f}" in done.out and 4 in called
    assert called[0] == box.record("Toy") / "train_gpt.py" and box.arms()[0] == base


@pytest.mark.parametrize("argv, answer, code", [
    (["--yes", "--data=nowhere"], "", 2), (["--data=data", "--yes"], "", 2), ([], "n\n", 2), ([], "", 2)])
def test_rerun_runs_nothing_without_data_or_consent(box, monkeypatch, argv, answer, code):
    monkeypatch.setattr(box.trials, "launch", None)
    monkeypatch.setattr(box.trials, "differences", lambda *_: [])
    before = box.tree()
    done = box.main("rerun", box.record("Toy").name, *argv, answer=answer)
    assert done.code == code and box.tree() == before
    assert ("run this script" in done.out) == (not argv)
    assert not argv or f"val_sha256 {box.meta()['data']['val_sha256']}" in done.err


def test_rerun_runs_no_record_that_fails(box, monkeypatch):
    monkeypatch.setattr(box.trials, "launch", None)
    script = box.record("Toy") / "train_gpt.py"
    script.write_text("print('mine')\n")
    done = box.main("rerun", box.record("Toy").name, "--yes")
    assert done.code == 1 and " script: " in done.out


def test_trial_goes_on_where_it_stopped(box, monkeypatch):
    said = (box.root / "trial.txt").read_text()
    assert "run 1 of 4: train_gpt.py --head_lr=0.0001, seed 1\n" in said and "run 3 of 4: train_gpt.py, seed 2" in said
    base, cold = box.arms()
    assert sorted([*base, *cold]) == [cold[0], base[0], base[1], cold[1], base[2]]  # B A A B, and the run by run.sh
    gap, low, high, _ = slow_welch(losses(box, base[:2]), losses(box, cold))
    assert f"--head_lr=0.0001 hurt: its loss is {gap:+.4f} (95 % interval {low:+.4f} to {high:+.4f}" in said
    lost, called = shutil.move(cold[1], box.root / "lost"), []

    def launch(script, knobs, seed, title):
        called.extend([title, seed, *knobs])
        return box.runs.read_run(shutil.move(lost, cold[1]))

    monkeypatch.setattr(box.trials, "launch", launch)
    done = box.main("trial", "train_gpt.py", "train_gpt.py", "--runs=2", forge.COLD, *KNOBS)
    assert done.code == 0 and done.out.count("already in logs/") == 3 and called[0].startswith("run 4 of 4: ")
    assert called[1] == 2 and sorted(called[2:]) == sorted([*KNOBS, "--head_lr=0.0001", "--save=False"])
    assert done.out.splitlines()[-1] == said.splitlines()[-1]


@pytest.mark.parametrize("line, knobs, given", [
    ("    save: bool = True\n", [], ["--save=False"]), ("    save: bool = knob(True)\n", [], ["--save=False"]),
    ("    save: bool = True\n", ["--save=True"], ["--save=True"]), ("    keep: bool = True\n", [], []), ("", [], [])])
def test_trial_keeps_no_weights_where_the_script_can_be_told(box, monkeypatch, line, knobs, given):
    """So that no run of a trial is sampled. A script without the knob `save` would refuse it."""
    called = []

    def launch(script, knobs, *_):
        called.extend(knobs)
        raise box.sets.Undecided("enough")

    monkeypatch.setattr(box.trials, "launch", launch)
    (box.root / "mine.py").write_text(f"class Hyperparameters:\n    steps: int = 20\n{line}")
    assert box.main("trial", "train_gpt.py", "mine.py", *knobs).code == 3
    assert [knob for knob in called if knob.startswith("--save")] == given
    assert not list(box.logs.rglob("weights.pt"))


def test_trial_of_a_script_with_itself_is_the_noise_floor(box, monkeypatch):
    base, _ = box.arms()
    forge.clone(box, base[2], box.logs, 5, 4, by=0.02)
    monkeypatch.setattr(box.trials, "launch", None)
    done = box.main("trial", "train_gpt.py", "train_gpt.py", "--runs=2", *KNOBS)
    assert sorted(line.split(", ")[1][:6] for line in done.out.splitlines() if "already" in line) == [
        f"seed {seed}" for seed in (1, 2, 3, 4)]
    a, b = losses(box, base[:2]), losses(box, box.arms()[0][2:])
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    assert done.code == 0 and "Noise floor: with 2 runs of each" in done.out
    for number in (f"sd {pooled:.4f}", f"{2 * pooled:.4f}", f"{statistics.fmean(b) - statistics.fmean(a):+.4f}"):
        assert number in done.out.splitlines()[-1]
    done = box.main("trial", "train_gpt.py", "train_gpt.py", "--runs=1", *KNOBS)
    assert done.code == 3 and "One run of each says nothing" in done.out


def test_trial_does_not_count_runs_of_another_preset(box, monkeypatch):
    base, _ = box.arms()
    odd = forge.clone(box, base[1], box.logs, -100, 2, by=1, epochs=3)
    rows = box.events(odd)
    rows[0]["argv"] = ["--preset=tiny" if a.startswith("--preset") else a for a in box.events(base[1])[0]["argv"]]
    box.rewrite(odd, rows)
    kept, called = shutil.move(base[1], box.root / "kept"), []

    def launch(script, knobs, seed, title):
        called.append(seed)
        return box.runs.read_run(shutil.move(kept, base[1]))

    monkeypatch.setattr(box.trials, "launch", launch)
    done = box.main("trial", "train_gpt.py", "train_gpt.py", "--runs=2", forge.COLD, *KNOBS)
    assert called == [2] and odd.name not in done.out and done.code == 0
