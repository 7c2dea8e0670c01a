"""bench_claims.py and its probes against slow references, and its runs against train_gpt.py's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_claims
import claims
import pytest
import torch
from matplotlib import pyplot
from small import documents, small_hp, small_model, window_tensor
from tiny import SCRIPT, environment, make_corpus

import train_gpt as tg

sys.path.append(str(SCRIPT.parent / "records"))
import runs  # noqa: E402

E5M2, E4M3 = torch.float8_e5m2, torch.float8_e4m3fn
ARMS = ["default", "instrumented", "skips_fixed", "skips_none", "cooldown_1.5", "all_off"]


def row(arm: str, seed: int, loss: float) -> dict:
    return dict(arm=arm, seed=seed, val_loss=loss, run_id=f"{arm}{seed}", train_ms=1000.0, peak_train_mib=None)


@pytest.mark.parametrize("arm", bench_claims.ARMS)
def test_every_patch_fits_the_script_and_every_knob_is_one(arm):
    source = bench_claims.script(arm)
    compile(source, arm, "exec")
    assert (source == SCRIPT.read_bytes()) == (not bench_claims.ARMS[arm].patch)
    knobs = bench_claims.ARMS[arm].knobs.format(window_max=1792, rounded=1728, long=65536).split()
    tg.check(tg.parse_overrides(["--val_tokens=2097152", *knobs]), 1)


def test_a_patch_whose_text_is_gone_is_refused(monkeypatch):
    monkeypatch.setitem(bench_claims.PATCHES, "skips_none", [("no such text", "")])
    with pytest.raises(ValueError, match="is there 0 times"):
        bench_claims.script("skips_none")


def test_an_arm_gets_two_more_runs_only_beyond_2_sd():
    first = bench_claims.wanted(ARMS, [])
    assert first[:3] == [("default", seed) for seed in (1, 2, 3)] and ("all_off", 1) in first and len(first) == 8
    done = [row("default", seed, 4.0 + 0.01 * seed) for seed in (1, 2, 3)]  # mean 4.02, sd 0.01
    near, far = row("skips_fixed", 1, 4.0399), row("all_off", 1, 3.9999)
    assert bench_claims.wanted(ARMS, [*done, near, far])[8:] == [("all_off", 2), ("all_off", 3)]
    assert bench_claims.wanted(ARMS, [*done, row("skips_none", 1, None), row("instrumented", 1, 9.0)])[8:] == []


def test_runs_beyond_the_plan_come_last_and_once():
    done = [row("default", seed, 4.0 + 0.01 * seed) for seed in (1, 2, 3)] + [row("all_off", 1, 5.0)]
    also = [("all_off", 3), ("skips_fixed", 2)]
    jobs = bench_claims.wanted(["all_off"], done, also)
    assert jobs[3:] == [("all_off", 1), ("all_off", 2), ("all_off", 3), ("skips_fixed", 2)]
    assert bench_claims.wanted(["all_off"], [], also)[3:] == [("all_off", 1), *also], "also before the default is known"
    more = [*done, row("default", 4, 9.0)]
    assert bench_claims.wanted(["all_off"], more, also) == jobs, "further seeds of the default do not move the bound"


def test_arms_of_another_script(monkeypatch, tmp_path):
    """What the arms of a record were trained with, and whose arms those with the same name are today."""
    record = SCRIPT.parent / "records" / "2026-11-25_Claims" / "train_gpt.py"
    args = state(monkeypatch, tmp_path, f"--base={record}", "--also=grad_sums_fp32:2,all_off:1")
    assert args.scripts["default"] == record.read_bytes() and args.also == [("grad_sums_fp32", 2), ("all_off", 1)]
    theirs, ours = args.scripts["grad_sums_fp32"].decode(), bench_claims.script("grad_sums_fp32").decode()
    assert theirs.count("gradient = bucket.pack().float()") == ours.count("gradient = bucket.pack().float()") == 1
    assert "instrumented" in args.keys and args.keys["default"] != state(monkeypatch, tmp_path).keys["default"]


def test_an_arm_that_is_the_default_is_not_trained(monkeypatch, tmp_path, capsys):
    make_corpus(tmp_path / "data", train=(20000, 20000))
    arms = "--arms=default,instrumented,window_record_21,window_published,window_fixed,skips_none"
    args = state(monkeypatch, tmp_path, arms, "--window_min=1", "--window_max=192")
    assert bench_claims.renamed_default(args) == {"window_record_21"}
    assert "they are the default: window_record_21\n" in capsys.readouterr().err
    other = state(monkeypatch, tmp_path, "--arms=default", "--also=window_record_21:2")
    assert bench_claims.renamed_default(other) == set(), "with the tiny model's windows it is another"


def test_probes_of_other_knobs_are_not_drawn(tmp_path):
    for age, (name, step) in enumerate({"probes_a.1.old": 1, "probes_a.1.new": 2, "probes_a.2.new": 3,
                                        "probes_b.1.old": 4}.items()):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(dict(step=step)))
        os.utime(path, (age, age))
    assert [row["step"] for row in claims.read_probes(tmp_path)] == [2, 3, 4]


def test_summary_and_packing():
    done = [row("default", seed, 4.0 + 0.01 * seed) for seed in (1, 2, 3)] + [row("all_off", 1, 5.0)]
    done += [row("all_off", 2, 5.1), row("instrumented", 1, 4.01), row("skips_none", 1, None)]
    table = {r["arm"]: r for r in bench_claims.summary(done)}
    assert table.keys() == {"default", "instrumented", "all_off"}
    assert table["all_off"]["to default"] == pytest.approx(1.03) and table["all_off"]["low"] < 1.03
    assert table["instrumented"]["low"] is None and table["all_off"]["failed"] == 0
    pairs = [5.0 - 4.01, 5.1 - 4.02]  # of seeds 1 and 2; sd 0.0636, t of one degree of freedom 12.706
    assert table["all_off"]["same seed"] == pytest.approx(sum(pairs) / 2)
    assert table["all_off"]["+-"] == pytest.approx(12.7062 * (pairs[1] - pairs[0]) / 2**0.5 / 2**0.5, rel=1e-4)
    text = bench_claims.packing(done)
    assert text.startswith("records.py add default1 default2 default3 --arm all_off=all_off1 all_off2 --leave-out")
    assert "skips_none" not in text and "'instrumented1=" in text
    assert bench_claims.packing(done[3:]) == ""


def state(monkeypatch, tmp_path, *options):
    """The bench's arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)
    bench_claims.STATE.mkdir(parents=True, exist_ok=True)
    return bench_claims.parse(["--data_dir=data", "--tiny", "--steps=5", f"--arms={','.join(ARMS)}", *options])


def test_workers_never_take_the_same_run_and_end_when_none_is_left(monkeypatch, tmp_path):
    args, taken = state(monkeypatch, tmp_path), []
    while len(taken) < 8:
        taken.append(bench_claims.take(args, set()))
    assert sorted(taken) == sorted(bench_claims.wanted(ARMS, [])) and taken[:3] == [("default", s) for s in (1, 2, 3)]
    for arm, seed in taken:
        bench_claims.note(row(arm, seed, 4.0 + 0.01 * seed) | dict(key=args.keys[arm]))
    assert bench_claims.take(args, set()) is None
    late = state(monkeypatch, tmp_path, "--until=50", "--longest=60", "--muon_lr=0.1")
    claimed = set(bench_claims.STATE.glob("*.job"))
    assert bench_claims.take(late, set()) is None and set(bench_claims.STATE.glob("*.job")) == claimed
    late.end += 1000
    assert bench_claims.take(late, set()) == ("default", 1)  # other knobs: it was the clock alone that said no


def test_a_worker_prefers_what_it_has_compiled(monkeypatch, tmp_path):
    args = state(monkeypatch, tmp_path)
    for seed in bench_claims.SEEDS:
        bench_claims.note(row("default", seed, 4.0 + 0.01 * seed) | dict(key=args.keys["default"]))
    assert bench_claims.take(args, {bench_claims.program("all_off")}) == ("all_off", 1)


def test_runs_of_other_knobs_or_scripts_do_not_count(monkeypatch, tmp_path):
    args = state(monkeypatch, tmp_path)
    bench_claims.note(row("default", 1, 4.0) | dict(key=args.keys["default"]))
    assert len(bench_claims.results(args)) == 1
    assert bench_claims.results(state(monkeypatch, tmp_path, "--steps=6")) == []
    real = bench_claims.script
    monkeypatch.setattr(bench_claims, "script", lambda *which: real(*which) + b"#")
    assert bench_claims.results(state(monkeypatch, tmp_path)) == []


def test_another_choice_of_arms_keeps_what_is_done(trained):
    """The command starts by forgetting failures, and nothing else."""
    before = results(trained)
    options = "--data_dir=data", "--tiny", "--steps=5", "--arms=default"
    done = subprocess.run([sys.executable, bench_claims.__file__, *options], cwd=trained, env=environment(),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and results(trained) == before, done.stdout + done.stderr


def test_the_run_of_a_worker_that_died_counts_as_failed(monkeypatch, tmp_path):
    """Else the other workers would wait for it."""
    args = state(monkeypatch, tmp_path)
    for gpu, run in (("0", ("default", 1)), ("1", ("default", 2))):
        bench_claims.job_file(args, *run).write_text(gpu)
    workers = {gpu: subprocess.Popen([sys.executable, "-c", f"raise SystemExit({gpu})"]) for gpu in "01"}
    assert bench_claims.watch_over(args, workers) == [0, 1]
    assert [(r["arm"], r["seed"], r["val_loss"]) for r in bench_claims.results(args)] == [("default", 2, None)]


@pytest.mark.parametrize("options, code, sentence", [
    (["--data_dir=nowhere"], 2, "bench_claims: --data_dir=nowhere is not a folder"),
    (["--data_dir=nowhere", "--muonlr=1"], 2, "bench_claims: unknown argument '--muonlr=1'"),
    (["--arms=defualt"], 2, "--arms: defualt are none of"), (["--also=al_off:2"], 2, "--also: al_off are none of"),
    (["--also=all:2"], 2, "--also: all are none of"),
    (["--also=all_off"], 2, "--also: 'all_off' is not of the form arm:seed,arm:seed"),
    (["--base=nowhere.py"], 2, "--base=nowhere.py: "),
    ([f"--base={SCRIPT.with_name('run.sh')}", "--arms=skips_none"], 2, "what the arm skips_none replaces"),
    (["--base=data.py", "--arms=default"], 2, "--base=data.py: "),
    (["--also=:1"], 2, "--also: ':1' is not of the form"),
    (["--arms=grad_comm_fp8", "--data_dir=data", "--base=old.py"], 2, "arm grad_comm_fp8: unknown argument"),
    (["--draw=pictures"], 1, "lacks the probes of some of")])
def test_bad_input_gets_a_sentence(tmp_path, options, code, sentence):
    make_corpus(tmp_path / "data")
    (tmp_path / "data.py").write_text("print(1)")
    (tmp_path / "old.py").write_text(SCRIPT.read_text().replace("grad_comm", "exchange"))
    done = subprocess.run([sys.executable, bench_claims.__file__, "--tiny", *options], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == code and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "pictures").exists()


def test_a_run_that_diverges_fails_alone(tmp_path):
    make_corpus(tmp_path / "data", train=(20000, 20000))
    options = "--data_dir=data", "--tiny", "--steps=5", "--arms=default,window_fixed", "--adam_eps=0"
    done = subprocess.run([sys.executable, bench_claims.__file__, *options], cwd=tmp_path, env=environment(),
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "workers ended with [0]" in done.stdout and "records.py add" not in done.stdout
    assert "missing: default seed 1, default seed 2, default seed 3, window_fixed seed 1" in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which some arms were trained, by a worker as on a GPU."""
    folder = tmp_path_factory.mktemp("claims")
    make_corpus(folder / "data", train=(20000, 20000))
    options = "--data_dir=data", "--tiny", "--steps=5", f"--arms={','.join(ARMS)}"
    done = subprocess.run([sys.executable, bench_claims.__file__, *options], cwd=folder, env=environment(),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "workers ended with [0]" in done.stdout, done.stdout + done.stderr
    return folder


def results(folder: Path) -> dict:
    lines = (folder / ".cache/claims/results.jsonl").read_text().splitlines()
    return {(r["arm"], r["seed"]): r for r in map(json.loads, lines)}


def test_runs_are_whole_and_probes_change_nothing(trained):
    done = results(trained)
    assert {arm for arm, _ in done} == set(ARMS)
    assert done["instrumented", 1]["val_loss"] == done["default", 1]["val_loss"]
    assert done["skips_none", 1]["val_loss"] != done["skips_fixed", 1]["val_loss"]
    for result in done.values():
        run = runs.read_run(trained / "logs" / result["run_id"])
        assert run.complete and run.val_loss == result["val_loss"] and not [*runs.check_run(run)]


@pytest.mark.parametrize("arm", ["all_off", "cooldown_1.5"])
def test_an_arm_equals_its_script_run_by_itself(trained, arm):
    """Also where a run before it in the same process lent its model's memory."""
    done = results(trained)[arm, 1]
    mine = trained / f"{arm}.py"
    mine.write_bytes(bench_claims.script(arm))
    start = json.loads((trained / "logs" / done["run_id"] / "metrics.jsonl").read_text().splitlines()[0])
    argv = [*start["argv"][1:], f"--data_dir={trained / 'data'}"]
    alone = subprocess.run([sys.executable, mine, *argv], cwd=trained, env=environment(), capture_output=True,
                           text=True, timeout=300)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert f"val_loss: {done['val_loss']:.6f}" in alone.stdout


def test_pictures(trained):
    claims.draw(trained, trained / ".cache/claims")
    assert all((trained / name).stat().st_size > 5000 for name in ("gradients.png", "scales.png"))
    claims.draw_curve(pyplot, SCRIPT.parent / "records" / "2026-11-25_Claims", trained / "curve.png")
    assert (trained / "curve.png").stat().st_size > 5000


def test_length_probe_scores_the_same_tokens(trained):
    rows = [r for r in claims.read_probes(trained / ".cache/claims") if r["probe"] == "length"]
    assert [r["length"] for r in rows] == [512, 256]
    assert rows[0]["val_loss"] == pytest.approx(results(trained)["default", 1]["val_loss"], abs=1e-5)  # fp32 sums


def test_fp8_stats_of_known_values():
    x = torch.tensor([0.0, 2.0**-40, 1.0, 2.0, 4.0, 1e6, -1e6, -8.0])  # one is lost, two are clamped
    stats = claims.fp8_stats(x, 1.0, E5M2)
    assert stats["zeros"] == 2 / 8 and stats["lost"] == 1 / 8 and stats["clamped"] == 2 / 8
    counts = torch.tensor([2, 1, 1, 1, 1, 1, 1]) / 8  # the two zeros share a byte; the two clamped differ by sign
    assert stats["bits"] == pytest.approx(float(-(counts * counts.log2()).sum()))
    assert claims.fp8_stats(x, 2.0**26, E5M2)["lost"] == 0
    exact = claims.fp8_stats(torch.tensor([1.0, 1.5, -448.0]), 1.0, E4M3)
    assert exact["error"] == 0 and exact["clamped"] == 0


def test_fp8_stats_cast_as_the_recipe_does():
    x = torch.randn(1000) * 100
    for scale, dtype in ((2.0**10, E5M2), (4.0, E4M3)):
        back = tg.to_fp8(x, torch.tensor(scale), dtype).float()
        assert claims.fp8_stats(x, scale, dtype)["error"] == pytest.approx(
            float((back - x * scale).norm() / (x * scale).norm()))


def test_logit_gradient_is_what_the_head_gets():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (input_ids, targets), caught = documents(hp, 1)[0], []
    handle = model.lm_head.register_full_backward_hook(lambda module, grads, out: caught.append(out[0]))
    model(input_ids, targets, window_tensor(2)).backward()
    handle.remove()
    with torch.no_grad():
        x = model.features(input_ids, window_tensor(2))[:64]
    found = claims.logit_gradient(model, x, targets[:64], hp.train_seq_len)
    torch.testing.assert_close(found, caught[0][:64], rtol=1e-4, atol=1e-9)
    expected = [sum(p.grad.square().sum() for p in b.parameters()).sqrt() for b in (*model.encoder, *model.decoder)]
    torch.testing.assert_close(claims.block_norms(model), torch.stack(expected))
