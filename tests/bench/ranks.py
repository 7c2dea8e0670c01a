"""What scaling.py is built from: exposed time of a trace, step time on paper, a stand-in for torch.distributed that
counts, and faults. As a script it is train_gpt.py that tells its process id first."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from common import report, table, tg
from small import plan

COLLECTIVES = ("reduce_scatter_tensor", "all_to_all_single", "all_gather_into_tensor")


# ---- Pure functions


def covered(spans) -> float:
    """Length of the union of (start, end) intervals."""
    total, reach = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def exposed_time(spans, cover) -> float:
    """Length of the part of the union of `spans` that no interval of `cover` overlaps."""
    return covered([*spans, *cover]) - covered(cover)


def efficiency(rate: float, gpus: int, rate_of_one: float) -> float:
    """Distributed efficiency: tokens/s(N) / (N x tokens/s(1))."""
    return rate / (gpus * rate_of_one)


def kernel_spans(trace: dict) -> dict[str, list]:
    """(start, end) in ms of a trace's GPU work by kind: "compute", or the collective of an NCCL kernel."""
    spans = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            name, start = event["name"], event["ts"] / 1e3
            found = re.search(r"AllGather|ReduceScatter|AllReduce|SendRecv|$", name)[0] or "other NCCL"
            spans[found if "nccl" in name.lower() else "compute"].append((start, start + event["dur"] / 1e3))
    return spans


# ---- Step time on paper. Inputs: record 2026-11-24_CorpusRecipe, recipe.py; vendors' figures for links, memory

SEQUENCE_MS, OPTIMIZER_MS = 87.6, 8.5  # a sequence of 49,152 tokens with an eighth of the optimizer; that by itself
NVLINK, NETWORK, MEMORY = 450e9, 50e9, 3.35e12  # bytes/s: half of 900 GB/s is each way; 400 Gb/s; an H100's memory
HOST = 8  # GPUs on one NVLink


@functools.cache
def planned(world: int, comm: str) -> list:
    """The optimizers of the full model for `world` ranks, as shapes without values."""
    hp = dataclasses.replace(tg.Hyperparameters(), grad_comm=comm)
    with torch.device("meta"):
        model = tg.GPT(hp, tg.VOCAB["gpt2"])
    model.value_embeds.bfloat16()  # as tg.place does on a GPU
    model.bigrams.bfloat16()
    return tg.build_optimizers(model, hp, world)


def plan_bytes(optimizers, every: bool = True) -> int:
    """Payload of a step: gradients, and the parameters' updates too where `every`."""
    return sum(n for o in optimizers for kind, n in plan(o) if every or "all_gather" not in kind)


def exchange_ms(gpus: int, comm: str) -> float:
    """Bytes over link speed, without latency. In a reduce-scatter or all-gather the GPUs of a host share what crosses
    hosts, each an eighth; in the all-to-all of fp8 each GPU sends its own bytes to every other."""
    inside, payload = min(gpus, HOST), plan_bytes(planned(gpus, comm))
    hosts, direct = gpus // inside, plan_bytes(planned(gpus, comm), every=False) if comm == "fp8" else 0
    ring = payload - direct
    near = ring * (inside - 1) / inside + direct * (inside - 1) / gpus
    far = ring / inside * (hosts - 1) / hosts + direct * (gpus - inside) / gpus
    return near / NVLINK * 1e3 + far / NETWORK * 1e3


def optimizer_ms(gpus: int) -> float:
    """What every rank does, by bytes: cast gradients that are not bf16, subtract all updates. The rest, by values."""
    params = [p for o in planned(gpus, "bf16") for b in o.buckets for p in b.params]
    moved = sum(p.numel() * (2 + 2 * p.itemsize + (p.itemsize + 2) * (p.itemsize > 2)) for p in params)
    share, whole = (sum(b.share for o in planned(n, "bf16") for b in o.buckets) for n in (gpus, 1))
    every = moved / MEMORY * 1e3
    return every + (OPTIMIZER_MS - every) * share / whole


def nested_ms(gpus: int) -> float:
    """A remedy: shares over the 8 GPUs of a host as today, and a share's bf16 gradient summed over hosts in a ring."""
    hosts, share = gpus // HOST, plan_bytes(planned(HOST, "bf16"), every=False) / HOST
    return exchange_ms(HOST, "bf16") + 2 * share * (hosts - 1) / hosts / NETWORK * 1e3


def paper_row(gpus: int, exchange: str, split: int = 1) -> dict:
    """One step of one sequence for every `split` GPUs. Step time: compute, optimizer and exchange one after another;
    at best: exchange and optimizer wholly under each other."""
    nested = exchange == "nested"
    planned_for, comm = HOST if nested else gpus, "bf16" if nested else exchange
    compute, ideal = (SEQUENCE_MS - OPTIMIZER_MS / 8) / split, SEQUENCE_MS / split
    own, sent = optimizer_ms(planned_for), nested_ms(gpus) if nested else exchange_ms(gpus, comm)
    slow, fast = compute + own + sent, compute + max(own, sent)
    return {"GPUs": gpus, "exchange": exchange, "sequences": gpus // split,
            "payload MB": plan_bytes(planned(planned_for, comm)) / 1e6, "compute ms": compute, "optimizer ms": own,
            "exchange ms": sent, "step ms": slow, "at best ms": fast, "efficiency": ideal / slow,
            "at best": ideal / fast}


def paper() -> str:
    """Both tables of records/SCALING.md."""
    sizes = [(n, how) for n in (8, 64, 512) for how in ("bf16", "fp8", "nested") if n > 8 or how != "nested"]
    whole, split = [paper_row(*size) for size in sizes], [paper_row(n, how, n // 8) for n, how in sizes if n > 8]
    return f"One sequence a GPU\n{table(whole)}\n\nEight sequences a step, each over GPUs/8\n{table(split)}"


# ---- What stands for a part of train_gpt.py inside the bench


class Done:
    def wait(self):
        return True


class Wire:
    """Stands for torch.distributed inside train_gpt: the first `world` ranks alone, every payload counted. `blocking`:
    collectives waited for at once. `local`: copies in place of collectives, as the share of one rank."""
    def __init__(self, group, rank: int, world: int, blocking=(), local: bool = False):
        self.group, self.rank, self.world, self.calls = group, rank, world, []
        self.blocking, self.local = blocking, local

    def __getattr__(self, name):
        return functools.partial(self.send, name) if name in COLLECTIVES else getattr(dist, name)

    def is_initialized(self) -> bool:
        return self.world > 1

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def all_reduce(self, tensor):
        return None if self.local else dist.all_reduce(tensor, group=self.group)

    def send(self, name: str, got, sent, async_op: bool = False):
        self.calls.append((name, max(t.numel() * t.element_size() for t in (got, sent))))
        if self.local:  # whatever a rank receives, it has the same size and is written once
            got.view(-1, min(sent.numel(), got.numel())).copy_(sent.view(-1)[: got.numel()])
            return Done()
        work = getattr(dist, name)(got, sent, group=self.group, async_op=True)
        if not async_op or name in self.blocking:
            work.wait()
        return work


def ungrouped(world: int):
    """Muon.make_buckets with as few matrices in a bucket as give each rank one, instead of all of a shape."""
    def make(muon, grouped=tg.Muon.make_buckets):
        buckets = []
        for bucket in grouped(muon):
            chunk = []
            for i, p in enumerate(bucket.params, 1):
                chunk.append(p)
                if sum(q.shape[:-2].numel() for q in chunk) >= world or i == len(bucket.params):
                    buckets.append(tg.Bucket(chunk, bucket.group, bucket.unit, world))
                    chunk = []
        return buckets
    return make


# ---- Faults: train_gpt.py itself under torchrun


def launch(n: int, script: str, *arguments: str) -> list[str]:
    own = "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={n}"  # the address spares looking a name up
    return [sys.executable, "-m", "torch.distributed.run", *own, script, *arguments]


def fault_run(n: int, knobs: list[str], folder: str, trigger: int, act=None) -> dict:
    """Train until step `trigger`, then `act(launcher, {rank: pid})`: what was printed, and the seconds it took."""
    began, pids, seen = time.perf_counter(), {}, dict(first=None, acted=None, said="", resumed="")
    process = subprocess.Popen(launch(n, __file__, *knobs), cwd=folder, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    def end():
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
    timer = threading.Timer(400, end)
    timer.start()
    try:
        for line in process.stdout:
            if found := re.match(r"rank (\d+) pid (\d+)", line):
                pids[int(found[1])] = int(found[2])
            if found := re.match(r"step:(\d+)/\d+ train_loss", line):
                seen["first"] = seen["first"] or time.perf_counter() - began
                if act and int(found[1]) >= trigger and seen["acted"] is None:
                    seen["acted"] = time.perf_counter()
                    act(process, pids)
            if line.startswith(("train_gpt: ", "resumed from")):
                seen["said" if line.startswith("t") else "resumed"] = line.strip()
        seen["code"] = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # the bench itself was told to end
            end()
    return seen | dict(took=time.perf_counter() - (seen["acted"] or began))


def faults(args, knobs: list[str]) -> None:
    n, rows = args.gpus[-1], []
    knobs = [*knobs, "--epochs=100000", "--val_every=0", "--save=False", "--checkpoint_every=5"]
    with tempfile.TemporaryDirectory() as folder:
        files = lambda: sorted(Path(folder).glob("logs/*/checkpoints/step_*.pt"))
        newest = lambda: max((int(path.stem[5:]) for path in files()), default=0)
        runs = [(f"SIGKILL of rank {n - 1}", 8, lambda _, pids: os.kill(pids[n - 1], signal.SIGKILL), "--steps=100000"),
                ("resume; SIGTERM to the launcher", 12, lambda process, _: process.terminate(), "--steps=100000"),
                ("resume, to the end", 0, None, None)]
        for what, trigger, act, steps in runs:
            latest = "latest" if steps else files()[-1]  # which other --steps than the checkpoint's have to name
            resume = [f"--resume={latest}"] if rows else []
            seen = fault_run(n, [*knobs, steps or f"--steps={newest() + 5}", *resume], folder, newest() + trigger, act)
            rows.append({"fault": what, "ranks": n, "backend": "nccl" if torch.cuda.device_count() else "gloo",
                         "exit code": seen["code"], "signal, else launch, to the end, s": seen["took"],
                         "launch to first step, s": seen["first"], "newest checkpoint": newest(),
                         "said": " | ".join(filter(None, (seen["resumed"], seen["said"]))) or "nothing"})
            print(f"faults: {rows[-1]}", flush=True)
    report(args, "faults", "torchrun turns any exit code of a rank into 1", rows)


if __name__ == "__main__":  # a rank of a fault's run
    print(f"rank {os.environ['RANK']} pid {os.getpid()}", flush=True)
    tg.main(sys.argv[1:])
