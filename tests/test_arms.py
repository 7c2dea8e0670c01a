"""tests/bench/arms.py: its runs are those of a script by itself, and it goes on where it was."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import documents, small_hp
from tiny import KNOBS, SCRIPT, environment, events, make_corpus, write_shard

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import arms  # noqa: E402
import common  # noqa: E402
import score  # noqa: E402

TWO = [f"--arm=base:{SCRIPT}", f"--arm=fast:{SCRIPT},--muon_lr=0.02", "--seeds=1,2"]


def command(folder, *options):
    return subprocess.run([sys.executable, arms.__file__, "--data_dir=data", *KNOBS, "--steps=3", *options], cwd=folder,
                          env=environment(), capture_output=True, text=True, timeout=300)


def recorded(folder):
    return [json.loads(line) for line in (folder / ".cache/arms/results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which two arms were trained, and what the command printed."""
    folder = tmp_path_factory.mktemp("arms")
    make_corpus(folder / "data")
    done = command(folder, *TWO)
    assert done.returncode == 0 and "workers ended with [0]" in done.stdout, done.stdout + done.stderr
    return folder, done.stdout


def test_runs_interleave_by_seed_and_are_in_the_table(trained):
    folder, said = trained
    rows = recorded(folder)
    assert {(r["arm"], r["seed"]) for r in rows[:2]} == {("base", 1), ("fast", 1)} and len(rows) == 4
    ends = {path.parent.name: events(path.parent, "end")[0] for path in folder.glob("logs/*/metrics.jsonl")}
    assert all(ends[r["run_id"]]["val_loss"] == r["val_loss"] and r["run_id"] in said for r in rows)
    assert [line.split()[:3] for line in said.splitlines()[2:4]] == [["base", "2", "0"], ["fast", "2", "0"]]


def test_an_arm_equals_its_script_run_by_itself(trained, tmp_path):
    """Also a run that was not the first of its process."""
    folder, _ = trained
    ours = recorded(folder)[-1]
    argv = events(folder / "logs" / ours["run_id"], "start")[0]["argv"]
    argv = [argument for argument in argv if not argument.startswith("--data_dir")] + [f"--data_dir={folder / 'data'}"]
    subprocess.run([sys.executable, SCRIPT, *argv], cwd=tmp_path, env=environment(), check=True, timeout=300,
                   stdout=subprocess.DEVNULL)
    alone, = tmp_path.glob("logs/*")
    assert events(alone, "end")[0]["val_loss"] == ours["val_loss"] and f"--seed={ours['seed']}" in argv
    losses = [[e["train_loss"] for e in events(run, "step")] for run in (alone, folder / "logs" / ours["run_id"])]
    assert losses[0] == losses[1]


def test_the_same_command_goes_on_and_tries_failures_again(trained):
    folder, _ = trained
    before, path = recorded(folder), folder / ".cache/arms/results.jsonl"
    failed = dict(before[-1], val_loss=None)
    path.write_text("".join(json.dumps(row) + "\n" for row in [*before[:-1], failed]))
    done = command(folder, *TWO)
    assert done.returncode == 0, done.stderr
    after = recorded(folder)
    assert after[:-1] == before[:-1] and after[-1]["val_loss"] == before[-1]["val_loss"]
    assert after[-1]["run_id"] != before[-1]["run_id"]


def test_a_run_that_fails_leaves_the_others(tmp_path):
    make_corpus(tmp_path / "data")
    done = command(tmp_path, f"--arm=bad:{SCRIPT},--adam_eps=0", f"--arm=good:{SCRIPT}")
    assert done.returncode == 1 and "missing: bad seed 1\n" in done.stderr, done.stdout + done.stderr
    assert {row["arm"]: row["val_loss"] is None for row in recorded(tmp_path)} == {"bad": True, "good": False}


def test_a_score_is_that_of_the_saved_weights_and_moves_no_run(trained):
    """Of two seeds in one process; the other stream has documents of two sources, in two groups."""
    folder, _ = trained
    before, other = {(row["arm"], row["seed"]): row for row in recorded(folder)}, folder / "other"
    make_corpus(other, train=(), val=1501)
    (other / "val_docs.json").write_text(json.dumps(dict(sources=["web", "code"], doc_source=[0, 1, 1, 0, 1, 1])))
    (folder / "groups.json").write_text('{"programs": ["code"]}')
    options = ["--score=other", "--groups=groups.json", f"--arm=base:{SCRIPT},--save=True", "--seeds=1,2"]
    done = command(folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = recorded(folder)[len(before):]
    assert [row["val_loss"] for row in rows] == [before["base", seed]["val_loss"] for seed in (1, 2)]
    for row in rows:
        made, hp = score.load(folder / "logs" / row["run_id"] / "weights.pt", {})
        alone = score.score(made, hp, other, dict(programs=["code"]))
        assert row["score"] == alone["val_loss"] != row["val_loss"] and row["score_sources"] == alone["sources"]
        assert list(alone["sources"]) == ["programs", "other"]
    _, header, line, title, groups, by_group = done.stdout.splitlines()[:6]
    assert f"{statistics.fmean(row['score'] for row in rows):.4f}" in line and "score same seed" in header
    assert title == "mean scores by group" and groups.split() == ["arm", "programs", "other"]
    for name, cell in zip(("programs", "other"), by_group.split()[1:]):
        assert cell == f"{statistics.fmean(row['score_sources'][name] for row in rows):.4f}"
    assert command(folder, *options).returncode == 0 and len(recorded(folder)) == len(before) + 2


# ---- The list of runs


def parsed(monkeypatch, tmp_path, *options):
    monkeypatch.chdir(tmp_path)
    arms.STATE.mkdir(parents=True, exist_ok=True)
    return arms.parse(["--data_dir=data", *(options or TWO)])


def test_workers_never_take_the_same_run(monkeypatch, tmp_path):
    args = parsed(monkeypatch, tmp_path)
    taken = [arms.take(args, set()) for _ in range(5)]
    assert [job and (job.name, job.seed) for job in taken] == [("base", 1), ("fast", 1), ("base", 2), ("fast", 2), None]
    late = parsed(monkeypatch, tmp_path, *TWO, "--until=0", "--muon_momentum=0.9")
    assert arms.take(late, set()) is None and not late.arms[0].key == args.arms[0].key
    late.end += 1000
    assert arms.take(late, set()).name == "base", "it was the clock alone that said no"


def test_a_worker_prefers_what_it_has_compiled_but_no_later_seed(monkeypatch, tmp_path):
    (tmp_path / "my.py").write_bytes(SCRIPT.read_bytes() + b"#")
    args = parsed(monkeypatch, tmp_path, f"--arm=base:{SCRIPT}", "--arm=mine:my.py", "--seeds=1,2")
    compiled = {arms.digest(args.arms[1])}
    taken = [arms.take(args, compiled) for _ in range(4)]
    assert [(job.name, job.seed) for job in taken] == [("mine", 1), ("base", 1), ("mine", 2), ("base", 2)]


def test_runs_of_other_knobs_or_scripts_do_not_count(monkeypatch, tmp_path):
    (tmp_path / "my.py").write_bytes(SCRIPT.read_bytes())
    mine = "--arm=base:my.py"
    args = parsed(monkeypatch, tmp_path, mine)
    arms.note(arms.jobs(args)[0], val_loss=4.0, train_ms=1.0)
    assert len(arms.results(args)) == len(arms.results(parsed(monkeypatch, tmp_path, mine))) == 1
    assert not arms.results(parsed(monkeypatch, tmp_path, mine + ",--skip_lr=0"))
    assert not arms.results(parsed(monkeypatch, tmp_path, mine, "--score=other")), "its score is not known"
    (tmp_path / "my.py").write_bytes(SCRIPT.read_bytes() + b"#")
    assert not arms.results(parsed(monkeypatch, tmp_path, mine))


def test_differences_by_hand(monkeypatch, tmp_path):
    args = parsed(monkeypatch, tmp_path)
    losses = dict(zip(arms.jobs(args), (4.0, 5.0, 4.02, 5.1)))  # base, fast; base, fast
    done = {job: dict(seed=job.seed, val_loss=loss, train_ms=30.0, steps=3, peak_train_mib=7)
            for job, loss in losses.items()}
    base, fast = arms.summary(args, done)
    assert base["difference"] is None and base["loss"] == pytest.approx(4.01) and base["ms a step"] == 10
    assert fast["difference"] == fast["same seed"] == pytest.approx(1.04) and fast["low"] < 1.04 < fast["high"]
    assert fast["+-"] == pytest.approx(12.7062 * 0.08 / 2, rel=1e-4)  # t of one degree of freedom; pairs 1.00 and 1.08
    assert not any("score" in key for key in fast)
    args.score = "other"
    for row, loss in zip(done.values(), (3.0, 3.5, 3.1, 3.8)):  # pairs 0.5 and 0.7
        row.update(score=loss, score_sources=dict(web=loss - 1, code=loss + 1))
    base, scored = arms.summary(args, done)
    assert scored.items() > fast.items() and base["score same seed"] is base["score +-"] is None
    assert base["score"] == pytest.approx(3.05) and base["score sd"] == pytest.approx(0.1 / 2**0.5)
    assert scored["score"] == pytest.approx(3.65) and scored["score same seed"] == pytest.approx(0.6)
    assert scored["score +-"] == pytest.approx(12.7062 * 0.2 / 2, rel=1e-4)
    assert arms.by_group(args, done)[1] == dict(arm="fast", web=pytest.approx(2.65), code=pytest.approx(4.65))
    done[arms.jobs(args)[0]]["val_loss"] = None  # a run that failed
    base, fast = arms.summary(args, done)
    assert (base["n"], base["failed"], base["sd"]) == (1, 1, None) and fast["same seed"] == pytest.approx(1.08)


def test_a_second_model_of_a_script_recompiles_nothing():
    """That is why runs of one script share a process. As a GPU compiles it, but for the code itself."""
    torch._dynamo.reset()
    module = common.load_script(SCRIPT)
    module.compiled = lambda part, **_: torch.compile(part, backend="aot_eager", dynamic=False, fullgraph=True)

    def losses(seed):
        hp = module.Hyperparameters(**dataclasses.asdict(small_hp(seed=seed, steps=2)))
        trainer = module.build(hp, 384, 0, 1, torch.device("cpu"))
        trainer.compile()
        return [float(trainer.train_step(step, documents(hp, 2, seed=step))) for step in range(2)]

    first = losses(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert losses(2) != first and losses(1) == first


# ---- Bad input


@pytest.mark.parametrize("options, sentence", [
    (["--arm=base"], "'base' is not of the form NAME:SCRIPT"),
    (["--arm=a:nowhere.py"], "arm a: nowhere.py cannot be read"),
    (["--arm=a:note.txt"], "arm a: note.txt is not the name of a Python file"),
    (["--arm=a:other.py"], "arm a: other.py cannot be loaded (ZeroDivisionError"),
    ([f"--arm=a:{SCRIPT}", f"--arm=a:{SCRIPT},--skip_lr=0"], "two arms have one name"),
    ([f"--arm=a:{SCRIPT},--muonlr=1"], "arm a: unknown argument '--muonlr=1'"),
    ([f"--arm=a:{SCRIPT}", "--muonlr=1"], "arm a: unknown argument '--muonlr=1'"),
    ([f"--arm=a:{SCRIPT},--seed=2"], "arm a: --seed=2 is no knob of an arm"),
    ([f"--arm=a:{SCRIPT},--data_dir=void"], "arm a: --data_dir=void is not a folder"),
    ([f"--arm=a:{SCRIPT}", "--seeds=1,x"], "'1,x' is not of the form 1,2"),
    ([f"--arm=a:{SCRIPT}", "--gpus=99"], "--gpus=99 is not there"),
    (["--arm=a:old.py"], "arm a: old.py lacks train_once"),
    ([f"--arm=a:{SCRIPT}", "--groups=note.txt"], "--groups are those of --score=DIR"),
    ([f"--arm=a:{SCRIPT}", "--score=data", "--groups=note.txt"], "--groups=note.txt cannot be used"),
    ([f"--arm=a:{SCRIPT}", "--score=void"], "void is not a folder with *val*.bin"),
    ([f"--arm=a:{SCRIPT}", "--score=gpt2"], "arm a: it trains on bytes, and --score=gpt2 is of another")])
def test_bad_input_gets_a_sentence(monkeypatch, tmp_path, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    make_corpus(tmp_path / "data")
    (tmp_path / "note.txt").write_text("1")
    (tmp_path / "other.py").write_text("1 / 0")
    (tmp_path / "old.py").write_text(SCRIPT.read_text(encoding="utf-8").replace("train_once", "train_one"))
    (tmp_path / "gpt2").mkdir()
    write_shard(tmp_path / "gpt2/val.bin", range(99))
    try:
        code = arms.main(["--data_dir=data", *KNOBS, *options])
    except SystemExit as end:
        code = end.code
    assert code == 2 and sentence in capsys.readouterr().err and not (tmp_path / "logs").exists()
