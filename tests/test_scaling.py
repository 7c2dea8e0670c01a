"""What tests/bench_scaling.py reckons, its smoke run on two gloo ranks, and eight ranks with a slow one against one."""

import datetime
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import scaling
import torch
import torch.distributed as dist
from conftest import ROOT
from reference import relative_error
from small import documents, join, small_hp, small_model, window_tensor

import train_gpt as tg

RANKS, STEPS, DEADLINE = 8, 2, 150  # seconds, after which the processes are ended
# every rank has one sequence; 8 square matrices and 3 of each MLP shape: most shares of the latter are padding
KNOBS = dict(sequences_per_step=RANKS, layer_pattern="L-S", value_pattern="0..", train_seq_len=128, val_seq_len=128,
             window_max=128, steps=STEPS, momentum_warmup=0.17)


# ---- Pure functions


def test_covered_is_the_length_of_the_union():
    assert scaling.covered([]) == 0
    assert scaling.covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 3.5)]) == 4.5


@pytest.mark.parametrize("spans, cover, want", [
    ([(0, 10)], [], 10), ([(0, 10)], [(2, 4), (3, 5), (9, 12)], 6), ([(0, 1), (5, 6)], [(0, 6)], 0),
    ([(0, 2), (1, 3)], [(3, 9)], 3), ([], [(0, 1)], 0)])
def test_exposed_is_what_no_interval_covers(spans, cover, want):
    assert scaling.exposed_time(spans, cover) == want


def test_kernels_of_a_trace_by_kind():
    def event(name, ts, cat="kernel"):
        return dict(ph="X", cat=cat, name=name, ts=ts, dur=500.0)

    spans = scaling.kernel_spans(dict(traceEvents=[
        event("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(x)", 1000.0), event("ncclDevKernel_SendRecv(x)", 2000.0),
        event("ncclDevKernel_Reduce_Sum(x)", 2500.0), event("triton_poi_fused_0", 3000.0),
        event("Memcpy HtoD", 4000.0, "gpu_memcpy"), event("nccl:all_gather", 1000.0, "gpu_user_annotation"),
        event("aten::mm", 0.0, "cpu_op"), dict(ph="M", name="process_name")]))
    assert spans == {"ReduceScatter": [(1.0, 1.5)], "SendRecv": [(2.0, 2.5)], "other NCCL": [(2.5, 3.0)],
                     "compute": [(3.0, 3.5), (4.0, 4.5)]}


def test_efficiency_and_table():
    assert scaling.efficiency(760.0, 8, 100.0) == 0.95
    rows = [{"arm": "a", "ms": 1234.5, "n": 3, "same": True}, {"arm": "longer", "ms": 0.00021, "n": 12, "same": None}]
    assert scaling.table(rows).splitlines() == ["arm          ms   n  same", "a         1,234   3   yes",
                                                "longer  2.1e-04  12   n/a"]
    assert scaling.table([]) == "nothing"


# ---- Step time on paper


def test_payload_of_eight_ranks():
    assert scaling.plan_bytes(scaling.planned(8, "bf16")) == 1_188_298_752
    assert scaling.plan_bytes(scaling.planned(8, "fp8")) == 891_514_176


def test_exchange_and_optimizer_by_hand():
    bf16, fp8 = 1_188_298_752, 891_514_176
    assert scaling.exchange_ms(1, "bf16") == 0
    assert scaling.exchange_ms(8, "bf16") == pytest.approx(bf16 * 7 / 8 / 450e9 * 1e3)
    assert scaling.exchange_ms(8, "fp8") == pytest.approx(fp8 * 7 / 8 / 450e9 * 1e3)
    gathered, sent = (scaling.plan_bytes(scaling.planned(64, "bf16"), every) for every in (True, False))
    far = gathered / 8 * 7 / 8 / 50e9 * 1e3
    assert scaling.exchange_ms(64, "bf16") == pytest.approx(gathered * 7 / 8 / 450e9 * 1e3 + far)
    sent = scaling.plan_bytes(scaling.planned(64, "fp8"), every=False)
    half = (scaling.plan_bytes(scaling.planned(64, "fp8")) - sent) * 7 / 8
    assert scaling.exchange_ms(64, "fp8") == pytest.approx(
        (half + sent * 7 / 64) / 450e9 * 1e3 + (half / 8 + sent * 56 / 64) / 50e9 * 1e3)
    assert scaling.optimizer_ms(1) == pytest.approx(scaling.OPTIMIZER_MS)
    assert scaling.optimizer_ms(512) < scaling.optimizer_ms(64) < scaling.optimizer_ms(8) < scaling.OPTIMIZER_MS / 3


def test_nested_exchange_by_hand():
    share = 594_149_376 / 8
    assert scaling.nested_ms(8) == scaling.exchange_ms(8, "bf16")
    assert scaling.nested_ms(64) - scaling.nested_ms(8) == pytest.approx(2 * share * 7 / 8 / 50e9 * 1e3)


def test_the_record_holds_these_numbers():
    text = (ROOT / "records" / "SCALING.md").read_text(encoding="utf-8")
    assert scaling.paper() in text
    for n, size in ((1, "1 (were it sent)"), (8, "8"), (64, "64"), (512, "512")):
        plans = [scaling.planned(n, comm) for comm in ("bf16", "fp8")]
        slots = ", ".join(str(b.size // b.unit) for b in plans[0][1].buckets)
        bf16, fp8 = map(scaling.plan_bytes, plans)
        assert f"| {size} | {bf16:,} bytes | {fp8:,} bytes | {slots} |" in text
    for comm in ("bf16", "fp8"):
        assert f"{scaling.plan_bytes(scaling.planned(8, comm)) * 7 // 8:,}" in text
    few, many = (scaling.paper_row(n, "nested", n // 8)["step ms"] for n in (64, 512))
    assert f"from {few:.2f} ms on 64 GPUs to {many:.2f} on 512: {few / many:.1f} times" in text
    best = scaling.paper_row(8, "bf16")
    assert f"reach {best['efficiency']:.3f} of 8 times one GPU, or {best['at best']:.3f} at best" in text


# ---- What stands for a part of train_gpt.py


def test_a_bucket_for_each_ranks_matrix_trains_alike():
    """Without grouping there are more buckets, no matrix is lost, and the update is the same."""
    moved = []
    for grouped in (True, False):
        model, make = small_model(small_hp(**KNOBS), awake=True), tg.Muon.make_buckets
        tg.Muon.make_buckets = make if grouped else scaling.ungrouped(1)
        try:
            optimizers = tg.build_optimizers(model, small_hp(**KNOBS))
        finally:
            tg.Muon.make_buckets = make
        tg.train_step(model, model, optimizers, documents(small_hp(**KNOBS), 2), small_hp(**KNOBS), 0, window_tensor())
        moved.append([p.detach().clone() for p in model.parameters()])
        count = len(optimizers[1].buckets)
        assert count == (3 if grouped else sum(len(b.params) for b in optimizers[1].buckets))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*moved))
    eight = [p for b in scaling.ungrouped(8)(tg.Muon(optimizers[1].param_groups[0]["params"])) for p in b.params]
    assert sorted(map(id, eight)) == sorted(id(p) for b in optimizers[1].buckets for p in b.params)


def test_a_local_wire_fills_what_a_collective_would():
    wire, sent = scaling.Wire(None, 3, 4, local=True), torch.arange(8.0)
    share, every, other = sent.new_zeros(2), sent.new_zeros(8), sent.new_zeros(8)
    wire.reduce_scatter_tensor(share, sent, async_op=True).wait()
    wire.all_gather_into_tensor(every, sent[:2]).wait()
    wire.all_to_all_single(other, sent).wait()
    assert share.tolist() == [0, 1] and every.tolist() == [0, 1] * 4 and torch.equal(other, sent)
    assert [size for _, size in wire.calls] == [32] * 3 and wire.is_initialized() and wire.get_rank() == 3


def test_a_fault_is_timed_from_its_step(monkeypatch):
    script = ("import os, time\nprint('rank 0 pid', os.getpid(), flush=True)\nprint('resumed from x at step 4')\n"
              "for i in (4, 5):\n    print(f'step:{i}/9 train_loss:1.0', flush=True)\n"
              "print('train_gpt: a sentence', flush=True)\ntime.sleep(60)")
    monkeypatch.setattr(scaling, "launch", lambda *arguments: [sys.executable, "-c", script])
    acted = []

    def act(process, pids):
        acted.append(pids[0] == process.pid)
        time.sleep(0.2)  # so that the sentence is on its way
        os.kill(pids[0], signal.SIGTERM)

    seen = scaling.fault_run(1, [], str(ROOT), 5, act)
    assert acted == [True] and seen["code"] == -signal.SIGTERM and seen["said"] == "train_gpt: a sentence"
    assert seen["resumed"] == "resumed from x at step 4" and 0.2 <= seen["took"] < 30


# ---- Ranks


def scenario(comm: str, wire: scaling.Wire, slow: int = -1) -> dict:
    """STEPS steps of this rank through `wire`; the slow one is late before every step."""
    tg.dist = wire
    hp = small_hp(**KNOBS, grad_comm=comm)
    model, window, losses = small_model(hp, awake=True), window_tensor(), []
    optimizers = tg.build_optimizers(model, hp)
    for step in range(STEPS):
        if wire.rank == slow:
            time.sleep(0.3)
        data = documents(hp, RANKS, seed=step)[wire.rank :: wire.world]
        losses.append(tg.train_step(model, model, optimizers, data, hp, step, window))
    return dict(losses=torch.stack(losses), params=[p.detach().clone() for p in model.parameters()], calls=wire.calls,
                plan=[item for o in optimizers for item in o.plan()])


def worker(rank: int, folder: str, go) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    timeout = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    for comm in ("bf16", "fp8"):
        torch.save(scenario(comm, scaling.Wire(None, rank, RANKS), slow=5), f"{folder}/{comm}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    go.wait(DEADLINE)  # all leave together: nobody's exit may disturb a neighbour


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """seen[comm]: what each of the eight ranks saw; seen[comm, 1]: one rank alone."""
    # eight imports of torch take twice as long as all the rest; a fork server, where there is one, imports it once
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["train_gpt"])
    folder = tmp_path_factory.mktemp("ranks")
    barrier = context.Barrier(RANKS)
    processes = [context.Process(target=worker, args=(r, str(folder), barrier), daemon=True) for r in range(RANKS)]
    for process in processes:
        process.start()
    try:
        alone = {(comm, 1): scenario(comm, scaling.Wire(None, 0, 1)) for comm in ("bf16", "fp8")}
    finally:
        tg.dist = dist
    join(processes, DEADLINE)
    return alone | {comm: [torch.load(folder / f"{comm}-{r}.pt") for r in range(RANKS)] for comm in ("bf16", "fp8")}


@pytest.mark.parametrize("comm, near", [("bf16", 2e-3), ("fp8", 1e-5)])
def test_eight_ranks_train_as_one(seen, comm, near):
    """fp8 on one rank rounds each sequence's gradient, which is what each of eight ranks sends."""
    ranks, alone = seen[comm], seen[comm, 1]
    total = sum(rank["losses"] for rank in ranks)
    assert torch.allclose(total, alone["losses"], atol=near) and total[1] < total[0]
    for params in (rank["params"] for rank in ranks[1:]):
        assert all(torch.equal(a, b) for a, b in zip(ranks[0]["params"], params))
    start = small_model(small_hp(**KNOBS), awake=True).parameters()
    for a, b, p in zip(ranks[0]["params"], alone["params"], start):
        # Adam's first steps are signs, which a rounding may flip, and a scalar of few values shows one most; Muon lifts
        # the smallest directions, which roundings decide. With a rank left out, matrices differ by a third and more.
        assert relative_error(a - p, b - p) < (1e-3 if comm == "fp8" else 0.15)


@pytest.mark.parametrize("comm", ["bf16", "fp8"])
def test_eight_ranks_send_the_plan_in_one_order(seen, comm):
    for rank in seen[comm]:
        assert rank["plan"] == seen[comm][0]["plan"] and rank["calls"] == STEPS * rank["plan"]
    assert seen[comm, 1]["calls"] == []


def test_bench_on_two_ranks(tmp_path):
    """All parts that share one launch, with a tiny model; two ranks train alike, and send what is planned."""
    parts = "model,equal,speed,ablate,exposed,share"
    command = [sys.executable, "tests/bench_scaling.py", "--tiny", "--gpus=1,2", f"--part={parts}", "--steps=3",
               "--rounds=1", "--count=1", "--train_seq_len=128", "--layer_pattern=LS", "--value_pattern=0.",
               f"--out={tmp_path / 'rows.jsonl'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert scaling.paper() in done.stdout
    tables = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [t["part"] for t in tables] == ["equal"] * 3 + ["speed", "ablate"] + ["exposed"] * 2 + ["share"]
    assert all(scaling.table(t["rows"]) in done.stdout and t["gpu"] == "CPU, gloo" for t in tables)
    _, runs, same, speed, ablate, sent, _, share = (t["rows"] for t in tables)
    assert all(len(losses) == 3 for losses in tables[1]["losses"]) and runs[2]["most"] < 2e-3
    assert all(row["equal to 1e-3"] for row in same)
    assert {row["efficiency"] for row in speed if row["GPUs"] == 1} == {1.0} and len(speed) == 6
    assert len(ablate) == 7 and all(row["efficiency"] > 0 for row in ablate) and len(share) == 9
    for row in sent:
        assert row["counted"] == row["plan, bytes sent"] > 0 and row["one order on all ranks"]


def test_a_count_of_ranks_that_cannot_work_is_refused():
    command = [sys.executable, "tests/bench_scaling.py", "--tiny", "--gpus=1,3", "--part=speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2 and "bench_scaling: --sequences_per_step=8 cannot be dealt to 3 ranks" in done.stderr
