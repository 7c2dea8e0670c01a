"""The other benches: each once with a tiny model on the CPU, what they reckon, what stands for parts of the recipe."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from reference import random_documents, visible
from small import documents, small_hp, small_model, trainer
from tiny import SCRIPT, edited, environment, events, make_corpus, run, run_folders, write_shard

BENCHES = Path(__file__).resolve().parent / "bench"
sys.path.insert(0, str(BENCHES))
import arms  # noqa: E402
import common  # noqa: E402
import parts  # noqa: E402
import profiler  # noqa: E402
import ranks  # noqa: E402
import recipe  # noqa: E402
import scaling  # noqa: E402
import score  # noqa: E402
from common import tg  # noqa: E402

BLOCK = tg.BLOCK
ROW_KERNEL = not torch.__version__.startswith("2.11.")  # 2.11 has no FP8 product with a scale a row on a CPU
SMALL = "--train_seq_len=256 --layer_pattern=LS --value_pattern=0.".split()


def bench(name, *options, cwd=ROOT, code=0):
    """What a bench printed, by a process of its own; asserts its exit code."""
    done = subprocess.run([sys.executable, BENCHES / f"{name}.py", *options], cwd=cwd, capture_output=True,
                          env=environment() | dict(CUDA_VISIBLE_DEVICES=""), encoding="utf-8", timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def tables(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- Each once


def test_recipe():
    said = bench("recipe", *SMALL)
    muon = "Muon step of matrices: ", "Muon step of down: "
    for line in ("compile optimizers: ", *muon, "window  1 blocks: ", "window  2 blocks: "):
        assert f"\n{line}" in said
    assert "unknown argument '--stepps=3'" in bench("recipe", "--stepps=3", code=2)


def test_profiler(tmp_path):
    make_corpus(tmp_path / "data")
    said = bench("profiler", "--data_dir=data", "--steps=2", *SMALL, cwd=tmp_path)
    run, = run_folders(tmp_path)
    trace = json.loads((run / "trace.json").read_text(encoding="utf-8"))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") in ("user_annotation", "cpu_op")]
    assert "Self CPU" in said and "aten::mm" in names and trace.get("host_name", "") == ""
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert events(run, "end")[0]["steps"] == 4 and "2 steps are profiled" in events(run, "warning")[0]["text"]
    for options, sentence in ((["--script=data"], "data is not the name of a Python file"),
                              (["--steps=0"], "a trace has 1 step"), (["--fp9=1"], "unknown argument '--fp9=1'")):
        assert sentence in bench("profiler", "--data_dir=data", *options, cwd=tmp_path, code=2)


def test_scaling_on_two_ranks(tmp_path):
    """Two ranks train alike, and send what is planned."""
    out, which = tmp_path / "rows.jsonl", "model,equal,speed,ablate,exposed,share"
    said = bench("scaling", *SMALL, "--gpus=1,2", f"--part={which}", "--steps=3", "--rounds=1", "--count=1",
                 f"--out={out}")
    assert ranks.paper() in said
    seen = tables(out)
    assert [t["part"] for t in seen] == ["equal"] * 3 + ["speed", "ablate"] + ["exposed"] * 2 + ["share"]
    assert all(common.table(t["rows"]) in said for t in seen)
    _, runs, same, speed, ablate, sent, _, share = (t["rows"] for t in seen)
    assert runs[2]["steps"] == 3 and runs[2]["most"] < 2e-3 and all(row["equal to 1e-3"] for row in same)
    assert {row["efficiency"] for row in speed if row["GPUs"] == 1} == {1.0} and len(speed) == 6
    assert len(ablate) == 7 and all(row["efficiency"] > 0 for row in ablate) and len(share) == 9
    for row in sent:
        assert row["counted"] == row["plan, bytes sent"] > 0 and row["one order on all ranks"]


def test_parts(tmp_path):
    out = tmp_path / "rows.jsonl"
    bench("parts", *SMALL, "--part=all", "--rounds=1", "--sequences_per_step=2", f"--out={out}")
    seen = {t["part"]: t["rows"] for t in tables(out)}
    assert list(seen) == list(parts.PARTS)
    rows = seen["steps"]
    assert len(rows) == 12 and [row["tokens"] for row in rows[:4]] == [256, 384, 256, 384]
    assert [row["window"] for row in rows[::4]] == [1, 2, 2]
    assert all(row["as ours"] is True and row["error"] == "none" for row in seen["masks"]) and len(seen["masks"]) == 12
    assert [row["head"] for row in seen["head"]] == ["FP8", "bf16"] and len(seen["optimizer"]) == 10
    for row in seen["scaling"]:
        rounding, kernel = row["emulated error"], row["kernel error"]
        if row["scales"] == "block" or row["scales"] == "row" and not ROW_KERNEL:  # a CPU has no such kernel
            assert kernel is None and "Error" in row["error"]
        else:
            assert kernel == pytest.approx(rounding, abs=1e-3) if rounding else kernel < 5e-3
    assert all(row["agrees"] is True and row["gap, first"] < 1e-5 for row in seen["longest"])


@pytest.mark.parametrize("module, argv, sentence", [
    (parts, ["--part=stepps"], "stepps are none of steps, masks"), (scaling, ["--gpus=a"], "'a' is not of the form"),
    (scaling, ["--gpus=1,3"], "--sequences_per_step=8 cannot be dealt to 3 ranks"),
    (scaling, ["--batch_stages=8x128"], "--batch_stages"), (parts, ["--data_dir=void"], "--data_dir="),
    (arms, ["--data_dir=void"], "--arm")])
def test_bad_input_gets_a_sentence(module, argv, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        module.main([*argv, *(["--tiny"] if module is not arms else [])])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


# ---- Stages that nobody asked for: of a preset, or the default of a script


def with_stages(folder, stages):
    """A copy of the script whose default is stages."""
    source, count = re.subn(r'(batch_stages: str = )"[^"]*"', rf'\1"{stages}"', SCRIPT.read_text(encoding="utf-8"))
    assert count == 1
    (folder / "staged.py").write_text(source, encoding="utf-8")
    return folder / "staged.py"


def test_the_last_stage_is_the_plain_batch(monkeypatch, tmp_path, capsys):
    script = common.load_script(with_stages(tmp_path, "2x128 4x256 6x384"))
    shape = lambda hp: (hp.batch_stages, hp.sequences_per_step, hp.train_seq_len)
    assert shape(script.parse_overrides(common.plain_batch(["--steps=1"], script))) == ("", 6, 384)
    assert common.plain_batch(["--batch_stages=1x128"], script) == ["--batch_stages=1x128"]
    assert common.plain_batch(["--train_seq_len=512"], script) == ["--train_seq_len=512"]
    monkeypatch.setitem(tg.PRESETS, "80gb", dict(batch_stages="2x128 4x256"))
    hp = common.read_knobs("bench", ["--steps=1", "--val_seq_len=512"], ranks=(1, 4), data=False)
    assert shape(hp) == ("", 4, 256) and hp.val_seq_len == 512
    with pytest.raises(SystemExit) as end:
        common.read_knobs("bench", ["--batch_stages=2x128 4x256"], data=False)
    assert end.value.code == 2 and "--batch_stages is not for benches" in capsys.readouterr().err


def test_benches_of_one_shape_run_where_stages_are_the_default(monkeypatch, tmp_path, capsys):
    """As on a GPU, where the tiny model's knobs, which name a shape, do not help."""
    make_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(tg.PRESETS, "80gb", dict(batch_stages="2x128 1x256"))
    for module in (recipe, parts, profiler):
        without = [knob for knob in module.TINY if knob[2:].partition("=")[0] not in tg.PLAIN_BATCH]
        monkeypatch.setattr(module, "TINY", without)
    recipe.main(["--quick"])
    assert "window  2 blocks: " in capsys.readouterr().out
    assert parts.main(["--part=steps", "--rounds=1", "--out=rows.jsonl"]) == 0
    assert [row["tokens"] for row in tables(tmp_path / "rows.jsonl")[0]["rows"][:2]] == [256, 384]
    script = with_stages(tmp_path, "2x128 1x128 1x256")
    assert profiler.main(["--data_dir=data", "--steps=1", f"--script={script}"]) == 0
    start = events(run_folders(tmp_path)[0], "start")[0]
    assert [(stage["sequences"], stage["seq_len"]) for stage in start["stages"]] == [(1, 256)]


# ---- Weights on another stream


SOURCES = {"web": 700, "code": 300, "old_books": 100, "news": 300}  # tokens of each that are scored


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a run; beside its data lies a folder with another validation stream and the sources of that."""
    folder = tmp_path_factory.mktemp("score")
    make_corpus(folder / "data")
    run(folder, "--steps=3")
    (folder / "other").mkdir()
    tokens = torch.randint(0, 100, (1401,), generator=torch.Generator().manual_seed(1))
    tokens[[0, 300, 600, 700, 1000]] = tg.EOT
    write_shard(folder / "other/val_0.bin", tokens[:900])
    write_shard(folder / "other/val_1.bin", tokens[900:])
    shutil.copy(folder / "data/manifest.json", folder / "other")
    told = dict(sources=["web", "unseen", "code", "old_books", "news"], doc_source=[0, 2, 3, 4, 0])
    (folder / "other/val_docs.json").write_text(json.dumps(told))
    path, = folder.glob("logs/*/weights.pt")
    return path, folder / "other", tokens


def score_rows(capsys, *options):
    """What score.py printed: {header: cell} of each line."""
    assert score.main([str(option) for option in options]) == 0
    header, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    return [dict(zip(header, line)) for line in lines]


def test_a_score_is_the_mean_over_tokens_of_each_source(weights, monkeypatch):
    path, folder, tokens = weights
    made, hp = score.load(path, {})
    saved = torch.load(path)
    model = tg.GPT(hp, 384).eval()
    model.load_state_dict(saved["model"])
    model.use_flex = False
    window, each = torch.tensor(tg.window_at(3, hp), dtype=torch.int32), []
    with torch.no_grad():
        for first in range(0, 1400, hp.val_seq_len):
            ids, targets = tokens[first : first + hp.val_seq_len], tokens[first + 1 : first + hp.val_seq_len + 1]
            ids, count = torch.cat((ids, torch.full((hp.val_seq_len,), tg.EOT)))[: hp.val_seq_len], len(targets)
            x, targets = model.features(ids.int(), window), torch.cat((targets, targets[:1].expand(len(ids) - count)))
            each += model.losses(x, model.pointer(x, ids, targets), targets)[:count].tolist()
    source_of = ["web"] * 300 + ["code"] * 300 + ["old_books"] * 100 + ["news"] * 300 + ["web"] * 400
    by_hand = {name: sum(loss for loss, s in zip(each, source_of) if s == name) / n for name, n in SOURCES.items()}
    found = score.score(made, hp, folder)
    assert found["val_tokens"] == len(each) == 1400 and found["val_loss"] == pytest.approx(sum(each) / 1400, rel=1e-6)
    assert found["val_loss"] == made.evaluate(score.read_text(folder).stream, 1400, hp.steps), "the script's own"
    assert list(found["sources"]) == ["web", "code", "old_books", "news"], "no token of the fifth is scored"
    assert found["sources"] == pytest.approx(by_hand, rel=1e-6)
    groups = dict(prose=["news", "web"], programs=["code", "unseen"], none=[])
    by_group = score.score(made, hp, folder, groups)
    prose = (700 * by_hand["web"] + 300 * by_hand["news"]) / 1000
    want = dict(prose=prose, programs=by_hand["code"], other=by_hand["old_books"])
    assert list(by_group["sources"]) == list(want) and by_group["sources"] == pytest.approx(want, rel=1e-6)
    assert by_group["val_loss"] == found["val_loss"]
    few = score.score(made, hp, folder, val_tokens=310)
    assert few["val_loss"] == pytest.approx(sum(each[:310]) / 310, rel=1e-6) and list(few["sources"]) == ["web", "code"]


def test_a_score_on_the_runs_own_data_is_its_last_validation(weights, capsys):
    """By the script beside the weights; without one, by the project's, which is the same here."""
    path, other, _ = weights
    end = events(path.parent, "end")[0]
    alone = other.parent / "alone.pt"
    shutil.copy(path, alone)
    rows = score_rows(capsys, path, alone, f"--data={other.parent / 'data'}", "--val_tokens=1200")
    assert rows == [dict(weights=str(p), tokens="1,200", loss=f"{end['val_loss']:.4f}") for p in (path, alone)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["log.txt", "metrics.jsonl", "train_gpt.py", "weights.pt"]


def test_the_script_beside_the_weights_scores_them(weights, tmp_path, capsys):
    path, other, _ = weights
    edited(tmp_path, "return float(sums.sum() / val_tokens)", "return 7.0").rename(tmp_path / "train_gpt.py")
    shutil.copy(path, tmp_path)
    (tmp_path / "groups.json").write_text('{"prose": ["web", "news", "old_books"]}')
    mine, ours = score_rows(capsys, tmp_path / "weights.pt", path, "--data", other, f"--groups={tmp_path}/groups.json")
    assert mine["loss"] == "7.0000" != ours["loss"] and list(ours) == ["weights", "tokens", "loss", "prose", "other"]
    assert mine["prose"] == ours["prose"] and mine["other"] == ours["other"] and mine["tokens"] == "1,400"


@pytest.mark.parametrize("options, sentence", [
    (["nowhere.pt"], "nowhere.pt is missing, damaged or no weights"),
    (["note.txt"], "note.txt is missing, damaged or no weights"),
    (["strange/weights.pt"], "strange/weights.pt does not fit its script (AttributeError"),
    (["narrow/weights.pt"], "narrow/weights.pt does not fit its script (RuntimeError"),
    (["--data=void"], "void is not a folder with *val*.bin shards"),
    (["--data=gpt2"], "gpt2 holds gpt2 tokens, and the model was trained on bytes"),
    (["--data=wrong"], "val.bin is not a token shard"),
    (["--val_tokens=1401"], "--val_tokens=1401 must lie from 1 to 1400"),
    (["--val_tokens=0"], "--val_tokens=0 must lie from 1 to 1400"),
    (["--groups=note.txt"], "--groups=note.txt cannot be used"),
    (["--groups=nowhere.json"], "--groups=nowhere.json cannot be used"),
    (["--groups=flat.json"], "--groups=flat.json cannot be used"),
    (["--groups=twice.json"], "lists web twice"),
    (["--groups=unknown.json"], "has no source of the name wep: there are web, unseen, code"),
    (["--groups=fine.json", "--data=gpt2"], "gpt2 has no val_docs.json")])
def test_scores_of_bad_input_get_a_sentence(weights, monkeypatch, tmp_path, capsys, options, sentence):
    path, other, tokens = weights
    monkeypatch.chdir(tmp_path)
    for name, text in (("note.txt", "1"), ("flat.json", '{"a": "web"}'), ("twice.json", '{"a": ["web"], "b": ["web"]}'),
                       ("unknown.json", '{"a": ["wep"]}'), ("fine.json", "{}")):
        (tmp_path / name).write_text(text)
    for name in ("gpt2", "wrong", "strange", "narrow"):
        (tmp_path / name).mkdir()
    write_shard(tmp_path / "gpt2/val.bin", tokens)
    write_shard(tmp_path / "wrong/val.bin", tokens, count=7)
    for name, old, new in (("strange", "def build(hp, vocab", "def make(hp, vocab"),
                           ("narrow", "model = place(GPT(hp, vocab_size)", "model = place(GPT(hp, 128)")):
        edited(tmp_path, old, new).rename(tmp_path / name / "train_gpt.py")
        shutil.copy(path, tmp_path / name)
    given = options if options[0].endswith((".pt", ".txt")) and "=" not in options[0] else [str(path), *options]
    assert score.main([f"--data={other}", *given]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


# ---- What is reckoned


def test_exposed_time_of_a_trace():
    def event(name, ts, cat="kernel"):
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=500.0)

    spans = ranks.kernel_spans(dict(traceEvents=[
        event("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", 1000.0), event("ncclDevKernel_Reduce_Sum(x)", 2500.0),
        event("triton_poi_fused_0", 1250.0), event("Memcpy HtoD", 4000.0, "gpu_memcpy"),
        event("nccl:all_gather", 1000.0, "gpu_user_annotation"), dict(ph="M", name="process_name")]))
    assert spans == {"ReduceScatter": [(1.0, 1.5)], "other NCCL": [(2.5, 3.0)], "compute": [(1.25, 1.75), (4.0, 4.5)]}
    assert ranks.exposed_time(spans["ReduceScatter"], spans["compute"]) == 0.25
    assert ranks.covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 3.5)]) == 4.5


def test_the_exchange_on_paper():
    sent = ranks.plan_bytes(ranks.planned(8, "bf16"))
    assert ranks.exchange_ms(8, "bf16") == pytest.approx(sent * 7 / 8 / 450e9 * 1e3)
    assert ranks.nested_ms(64) - ranks.nested_ms(8) == pytest.approx(2 * sent / 2 / 8 * 7 / 8 / 50e9 * 1e3)


# ---- What stands for a part of the recipe


def test_the_ninth_collective_leaves_early():
    """In a CUDA graph it holds up what Muon computes from what the first has brought."""
    sizes = [bucket.size for optimizer in ranks.planned(8, "bf16") for bucket in optimizer.buckets]
    assert sum(sizes[:8]) < sum(sizes) / 5


def test_a_bucket_for_each_ranks_matrix_trains_alike(monkeypatch):
    moved, counts, hp = [], [], small_hp()
    for make in (tg.Muon.make_buckets, ranks.ungrouped(1)):
        monkeypatch.setattr(tg.Muon, "make_buckets", make)
        model = small_model(hp, awake=True)
        made = trainer(model, hp)
        made.train_step(0, documents(hp, 2))
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        counts.append(len(made.optimizers[0].buckets))
    assert torch.allclose(*moved, atol=1e-6) and counts[0] < counts[1]


def test_a_fault_is_timed_from_its_step(monkeypatch):
    script = ("import os, time\nprint('rank 0 pid', os.getpid(), flush=True)\nprint('resumed from x at step 4')\n"
              "for i in (4, 5):\n    print(f'step:{i}/9 train_loss:1.0', flush=True)\n"
              "print('train_gpt: a sentence', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(ranks, "launch", lambda *arguments: [sys.executable, "-c", script])

    def act(process, pids):
        assert pids[0] == process.pid
        time.sleep(0.2)  # so that the sentence is on its way
        os.kill(pids[0], signal.SIGTERM)

    seen = ranks.fault_run(1, [], str(ROOT), 5, act)
    assert seen["code"] == -signal.SIGTERM and seen["said"] == "train_gpt: a sentence"
    assert seen["resumed"] == "resumed from x at step 4" and seen["acted"]


@pytest.mark.parametrize("seed", range(3))
def test_standard_masks_are_the_defined_ones(seed):
    """create_block_mask's, by elements and by blocks; test_masks.py has ours."""
    ids = random_documents(6 * BLOCK, torch.Generator().manual_seed(seed))
    window, at = torch.tensor(2 * seed + 1, dtype=torch.int32), torch.arange(6 * BLOCK)
    want = [visible(ids, blocks) for blocks in (2 * seed + 1, max((2 * seed + 1) // 2, 1))]
    masks = parts.standard_masks(ids, BLOCK, window, 6)
    assert all(torch.equal(mask.mask_mod(0, 0, at[:, None], at), w) for mask, w in zip(masks, want))
    tiles = [w.view(6, BLOCK, 6, BLOCK) for w in want for _ in "kq"]
    grid = torch.stack([(t.any(3).any(1) + t.all(3).all(1).int()).to(torch.int8) for t in tiles])
    for make in (tg.create_masks, parts.standard_masks):
        assert torch.equal(parts.grids(parts.tables(make, 6, ids, window)), grid)


@pytest.mark.parametrize("tile, shape", [((0, 0), (1, 1)), ((1, 0), (256, 1)), ((1, 128), (256, 3)),
                                         ((128, 128), (2, 3))])
def test_each_tile_fills_the_format(tile, shape):
    x = torch.randn(256, 384) * 10 ** (-8 * torch.linspace(0, 1, 256))[:, None]
    values, factors = parts.quantise(x, parts.E4M3, tile)
    assert factors.shape == shape and values.shape == x.shape
    tiles = values.float().view(shape[0], 256 // shape[0], shape[1], 384 // shape[1])
    assert torch.equal(tiles.abs().amax((1, 3)), torch.full(shape, 448.0))
    error = (parts.dequantise(values, factors) - x).abs()
    largest = x.abs().view(tiles.shape).amax((1, 3), keepdim=True).expand(tiles.shape).reshape(x.shape)
    assert (error <= x.abs() / 16 + largest * 2**-18).all()  # 3 mantissa bits, and what lies below the smallest
