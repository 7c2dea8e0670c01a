"""Measures how training scales over the GPUs of one machine, and prints a table for each part:

    python tests/bench/scaling.py --data_dir=DIR [--gpus=1,2,4,8] [--part=all] [--steps=128] [--out=FILE] [--knob=value]

equal: N ranks against one that accumulates gradients. speed: tokens/s and efficiency, strong and weak. ablate:
grouping, overlap and FP8 exchange, each taken away by a patch made here. exposed: NCCL kernels that run while nothing
computes, and bytes sent. share: each rank's optimizer at 8 ranks, timed on one GPU. faults: SIGKILL, SIGTERM, resume.
model: step time on paper. Kernels start one by one, without the CUDA graphs of a run, so that small steps wait for the
host. Without CUDA, or with --tiny, the model is tiny. Ranks see the environment as it is. Exit code 2: bad input; 1: a
part failed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))
import ranks  # noqa: E402
from common import (  # noqa: E402
    TINY,
    data_option,
    environment,
    make_parser,
    names,
    numbers,
    parse_known,
    plain_batch,
    read_knobs,
    report,
    shown,
    tg,
)
from ranks import HOST, Wire, efficiency, launch  # noqa: E402

PARTS = ("equal", "speed", "ablate", "exposed", "share", "faults", "model")
TRACED = 4  # steps of a trace, and of a count of bytes


# ---- The ranks' side


class Bench:
    """One rank: one model, compiled once, its weights at the start, and a trainer of it for every count of ranks."""

    def __init__(self, hp: tg.Hyperparameters, args):
        self.args, self.began, self.made = args, time.perf_counter(), {}
        self.rank, self.world, self.device = tg.init_distributed()
        self.hp, self.corpus = hp, tg.load_corpus(hp, thorough=False)
        base = tg.build(hp, tg.VOCAB[self.corpus.encoding], self.rank, self.world, self.device)
        self.model, self.cuda, self.window = base.model, base.cuda, base.window
        self.tensors = list(self.model.state_dict().values())
        self.first = [t.clone() for t in self.tensors]
        self.flag = torch.zeros((), dtype=torch.int32, device=self.device)
        self.groups = {n: dist.new_group(list(range(n))) for n in args.gpus if 1 < n < self.world}
        self.pairs = self.sequences()
        self.facts = dict(gpu=torch.cuda.get_device_name() if self.cuda else "CPU, gloo", torch=torch.__version__,
                          ranks=self.world, steps=hp.steps, fp8=self.model.lm_head.use_fp8)
        self.say(" ".join(f"{k}: {v}" for k, v in self.facts.items()))

    def sequences(self) -> torch.Tensor:
        """As many training sequences as a step has, other ones for each rank: a batch, as `tg.prefetch` yields it."""
        stream, length, count = self.corpus.train, self.hp.train_seq_len, self.hp.sequences_per_step
        whole, places = (stream.total - 1) // length, range(self.rank * count, (self.rank + 1) * count)
        batch = torch.stack([stream.pair(i % whole * length, length) for i in places])
        return batch.pin_memory() if self.cuda else batch

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", flush=True)

    def report(self, part: str, title: str, rows: list[dict], **hidden) -> None:
        if self.rank == 0:
            report(self.args, part, f"{title} ({self.facts['gpu']})", rows, **self.facts, **hidden)

    def gather(self, value) -> list:
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def reset(self) -> None:
        self.model.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, self.first)

    def arm(self, n: int, comm: str = "bf16", grouped: bool = True, **how) -> tuple[Wire, tg.Trainer]:
        """The first n ranks: what they exchange through (`how`: see Wire), and their trainer."""
        wire = Wire(self.groups.get(n), self.rank if n > 1 else 0, n, **how)
        return wire, self.trainer(wire, comm, grouped)

    def trainer(self, wire: Wire, comm: str = "bf16", grouped: bool = True) -> tg.Trainer:
        """Made once for each kind; all share the model and its compiled code."""
        key, tg.dist = (wire.world, wire.rank, comm, grouped), wire
        if key in self.made:
            return self.made[key]
        make = tg.Muon.make_buckets if grouped else ranks.ungrouped(wire.world)
        hp = dataclasses.replace(self.hp, grad_comm=comm)
        with mock.patch.object(tg.Muon, "make_buckets", make):
            optimizers = tg.build_optimizers(self.model, hp, wire.world)
        made = self.made[key] = tg.Trainer(hp, self.model, optimizers, wire.rank, wire.world)
        made.window = self.window
        for optimizer in optimizers if self.cuda else ():
            optimizer.compile()
        return made

    def step(self, wire: Wire, trainer: tg.Trainer, batch: torch.Tensor, step: int | None = None):
        """What the loop does on the GPU, but kernel by kernel, without CUDA graphs: copy tokens, train, sum the loss
        over ranks. Default: at half the run."""
        tg.dist = wire
        loss = trainer.train_step(self.hp.steps // 2 if step is None else step, batch)
        if wire.world > 1:
            wire.all_reduce(loss)
        return loss

    def mark(self):
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, work, count: int, lead: int = 0) -> list[float]:
        """ms of each of `count` calls, after one that is not counted. `lead`: keep the GPUs of so many ranks busy
        before each, so that the host is ahead as it is after a step's backward, and let them begin together."""
        marks = []
        for _ in range(count + 1):
            if lead and self.cuda:
                torch.cuda._sleep(100_000_000)  # cycles, about 50 ms
                if lead > 1:  # clocks differ: else the first to wake would count its wait for the others
                    dist.all_reduce(self.flag, group=self.groups.get(lead))
            marks.append((self.mark(), work(), self.mark()))
        if self.cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) if self.cuda else b - a for a, _, b in marks[1:]]

    def compare(self, what: str, arms: dict, count: int, lead: bool = False) -> dict[str, float]:
        """Median ms of each arm {name: (ranks, work)} on the slowest rank; interleaved, the first round not counted."""
        times = defaultdict(list)
        for turn in range(self.args.rounds + 1):
            for name, (n, work) in arms.items():
                if self.world > 1:
                    dist.barrier()
                if self.rank < n:
                    times[name] += self.timed(work, count if turn else 0, n if lead else 0)
            self.say(f"{what}: round {turn} of {self.args.rounds}" + (" (0 compiles)" if not turn else " " + ", ".join(
                f"{name} {statistics.median(t):.2f} ms" for name, t in times.items())))
        seen = self.gather({name: statistics.median(t) for name, t in times.items() if t})
        return {name: max(s[name] for s in seen if name in s) for name in arms}

    def meet(self, part: str, failed: bool) -> None:
        """A rank that failed in a part waits until all are through with it, or ends, and with it the others."""
        store = dist.distributed_c10d._get_default_store() if self.world > 1 else dist.HashStore()
        store.set(f"{part} {self.rank}", "over")
        if failed:
            store.wait([f"{part} {rank}" for rank in range(self.world)], timedelta(seconds=15))

    # Parts

    def train(self, n: int) -> tuple[list[float], float, float]:
        """The whole run on the first n ranks: training losses, then the validation loss on n ranks and on one."""
        hp, (wire, trainer) = self.hp, self.arm(n)
        self.reset()
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        batches = tg.prefetch(self.corpus.train, hp, wire.rank, n, 0, self.cuda)
        losses = torch.stack([self.step(wire, trainer, batch, i) for i, batch in enumerate(batches)]).tolist()
        scores = []
        for ranks_of, scorer in ((wire, trainer), self.arm(1)):
            tg.dist = ranks_of
            scores.append(scorer.evaluate(self.corpus.val, hp.val_tokens, hp.steps))
        return losses, *scores

    def equal(self) -> None:
        """Twice each: one rank alone (on two GPUs at once), then n ranks."""
        alone = self.gather(self.train(1))
        self.say("equal: 1 rank trained, and compiled")
        for n in self.args.gpus[1:]:
            dist.barrier()
            a, b, c, d = runs = *alone[:2], *self.gather([self.train(n) for _ in "ab"] if self.rank < n else None)[0]
            rows = []
            for what, x, y in (("1 rank, twice", a, b), (f"{n} ranks, twice", c, d), (f"{n} ranks and 1", c, a)):
                gaps = [abs(p - q) for p, q in zip(x[0], y[0])]
                rows.append({"runs": what, "steps": len(gaps), "loss gap, mean": statistics.mean(gaps),
                             "most": max(gaps), "val loss": x[1], "other": y[1], "gap": abs(x[1] - y[1])})
            gap, band = abs(c[1] + d[1] - a[1] - b[1]) / 2, max(row["gap"] for row in rows[:2])
            every = range(0, len(a[0]), math.ceil(len(a[0]) / 16))
            self.report("equal", "training loss", [{"step": i + 1, "1 rank": a[0][i], "again": b[0][i],
                                                    f"{n} ranks": c[0][i], "once more": d[0][i]} for i in every])
            self.report("equal", f"means differ by {gap:.5f}, two runs of one by up to {band:.5f}. Inside that band: "
                                 f"{shown(gap <= band)}; to 1e-3: {shown(gap < 1e-3)}", rows,
                        losses=[run[0] for run in runs])
            self.report("equal", "the same weights scored", [
                {"ranks": n, "val loss": run[1], "on 1 rank": run[2], "gap": abs(run[1] - run[2]),
                 "equal to 1e-3": abs(run[1] - run[2]) < 1e-3, "tokens": self.hp.val_tokens} for run in (c, d)])

    def speed(self) -> None:
        batch, T, gpus = self.hp.sequences_per_step, self.hp.train_seq_len, self.args.gpus
        arms = {(n, each): (n, functools.partial(self.step, *self.arm(n), self.pairs[:each]))
                for n in gpus for each in sorted({1, batch // n, batch})}
        self.gradients()  # all ranks compile at once: else the second begins when the first has its first time
        self.reset()
        ms = self.compare("speed", arms, self.args.count)
        rate = {(n, each): n * each * T / took * 1e3 for (n, each), took in ms.items()}
        kinds = {f"strong, {batch} a step": lambda n: batch // n, "weak, 1 a GPU": lambda n: 1,
                 f"weak, {batch} a GPU": lambda n: batch}
        rows = [{"scaling": kind, "GPUs": n, "sequences a GPU": each(n), "ms a step": ms[n, each(n)],
                 "tokens/s": rate[n, each(n)], "efficiency": efficiency(rate[n, each(n)], n, rate[1, each(1)]),
                 "n": self.args.rounds * self.args.count} for kind, each in kinds.items() for n in gpus]
        self.report("speed", f"strong: one GPU accumulates {batch} sequences, which amortise its optimizer step", rows)

    def gradients(self) -> None:
        """Leave gradients in the model for optimizers timed by themselves. The head is zero before a first step."""
        wire, trainer = self.arm(1)
        self.step(wire, trainer, self.pairs[:1])
        self.model(*(t.to(self.device) for t in self.pairs[0]), trainer.window).backward()

    def update(self, wire: Wire, trainer: tg.Trainer) -> None:
        tg.dist = wire
        list(zip(*(optimizer.parts() for optimizer in trainer.optimizers)))  # in turns, as in training

    def ablate(self) -> None:
        n, batch, gather = self.world, self.hp.sequences_per_step, ranks.COLLECTIVES[-1:]
        how = {"as it is": {}, "one matrix a rank and bucket": dict(grouped=False),
               "all-gather waited for at once": dict(blocking=gather),
               "each collective waited for at once": dict(blocking=ranks.COLLECTIVES),
               "all of these": dict(grouped=False, blocking=ranks.COLLECTIVES), "fp8 gradients": dict(comm="fp8"),
               "no exchange, local copies": dict(local=True)}
        arms = {name: self.arm(n, **knobs) for name, knobs in how.items()}
        steps = {name: (n, functools.partial(self.step, *arm, self.pairs[:1])) for name, arm in arms.items()}
        steps["one"] = 1, functools.partial(self.step, *self.arm(1), self.pairs)
        step = self.compare("ablate, step", steps, self.args.count)
        self.gradients()
        updates = {name: (n, functools.partial(self.update, *arm)) for name, arm in arms.items()}
        own = self.compare("ablate, optimizer", updates, 2 * self.args.count, lead=True)
        base, one = "as it is", step.pop("one")
        self.report("ablate", f"one sequence a GPU; efficiency against one GPU that accumulates {batch}. n: steps, "
                              "and twice as many of the optimizer by itself", [
            {"arm": name, "GPUs": n, "optimizer ms": own[name], "to as it is": own[name] - own[base], "step ms": ms,
             "step to it": ms - step[base], "efficiency": efficiency(n / ms, n, batch / one),
             "n": self.args.rounds * self.args.count} for name, ms in step.items()])

    def traced(self, work) -> dict[str, list]:
        plan = torch.profiler.schedule(wait=0, warmup=1, active=TRACED, repeat=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], schedule=plan,
                                        on_trace_ready=lambda p: p.export_chrome_trace(str(path))) as profile:
                for i in range(TRACED + 1):
                    work()
                    if i in (0, TRACED):  # NCCL's barrier too waits for this GPU: no warm-up reaches into the trace
                        torch.cuda.synchronize() if i else dist.barrier()
                    profile.step()
            return ranks.kernel_spans(json.loads(path.read_text()))

    def exposed(self) -> None:
        n, kernels, sent = self.world, [], []
        for comm in ("bf16", "fp8"):
            wire, trainer = self.arm(n, comm)
            work = functools.partial(self.step, wire, trainer, self.pairs[:1])
            self.timed(work, 1)
            wire.calls.clear()
            before = self.nvlink()
            self.timed(work, TRACED - 1)
            after, calls = self.nvlink(), self.gather(wire.calls)
            part = (n - 1) / n  # of the payload crosses a link
            sent.append({"gradients": comm, "GPUs": n, "plan, bytes sent": ranks.plan_bytes(trainer.optimizers) * part,
                         "counted": sum(size for _, size in calls[0]) / TRACED * part,
                         "NVLink counter": None if None in (before, after) else (after - before) / TRACED,
                         "one order on all ranks": all(c == calls[0] for c in calls), "n": TRACED})
            spans = self.traced(work) if self.cuda else {}
            compute = spans.pop("compute", [])
            spans["all"] = [span for kind in spans.values() for span in kind]
            seen = self.gather({k: (ranks.covered(s), ranks.exposed_time(s, compute)) for k, s in spans.items()})
            for kind in sorted(spans) if self.cuda else ():
                busy, bare = zip(*(s[kind] for s in seen if kind in s))
                kernels.append({"gradients": comm, "NCCL kernels": kind} | {
                    name: value / TRACED for name, value in (("busy ms", min(busy)), ("most busy", max(busy)),
                                                             ("exposed ms", min(bare)), ("most exposed", max(bare)))})
        self.report("exposed", "bytes a rank sends in a step; NVLink's counter has the loss too", sent)
        self.report("exposed", "ms a step on the least and the most affected rank: the first to arrive waits in its "
                               f"kernel. n = {TRACED} steps" if self.cuda else "a CPU has no kernels to trace", kernels)

    def nvlink(self) -> int | None:
        """Bytes that this GPU has ever sent over NVLink, by its own counters."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        try:
            text = subprocess.run(["nvidia-smi", "nvlink", "-gt", "d", "-i", uuid], capture_output=True, text=True,
                                  timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        return sum(int(kib) << 10 for kib in re.findall(r"Data Tx: (\d+) KiB", text)) or None

    def share(self) -> None:
        """Rank 0 plays all 8 ranks, one after another."""
        self.gradients()
        arms = {"whole, bf16": (1, functools.partial(self.update, *self.arm(1)))}
        for comm in ("bf16", "fp8"):
            for rank in range(HOST):
                wire = Wire(None, rank, HOST, local=True)
                arms[rank, comm] = 1, functools.partial(self.update, wire, self.trainer(wire, comm))
        ms = self.compare("share", arms, 2 * self.args.count, lead=True)
        rows = [{"rank": rank, "bf16 ms": ms[rank, "bf16"], "fp8 ms": ms[rank, "fp8"]} for rank in range(HOST)]
        most = {f"{c} ms": max(row[f"{c} ms"] for row in rows) for c in ("bf16", "fp8")}
        whole = ms["whole, bf16"]
        self.report("share", f"one GPU alone {whole:.2f} ms; {HOST} ranks' most {most['bf16 ms']:.2f} ms: "
                             f"{whole / most['bf16 ms']:.2f} times faster, local copies for collectives",
                    [*rows, {"rank": "most"} | most], whole=whole, n=2 * self.args.rounds * self.args.count)


# ---- The launcher's side


def parse(argv: list[str]):
    parser, count = make_parser(__doc__), torch.cuda.device_count() or 2
    parser.add_argument("--part", type=functools.partial(names, PARTS), default=[*PARTS], metavar="A,B",
                        help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--gpus", type=numbers, default=[n for n in (1, 2, 4, 8) if n <= count], metavar="1,2,...")
    parser.add_argument("--steps", type=int, default=128, help="of part equal")
    parser.add_argument("--rounds", type=int, default=3, help="of interleaved arms")
    parser.add_argument("--count", type=int, default=4, help="steps of an arm in a round")
    parser.add_argument("--out", type=os.path.abspath, help="file to which the tables are appended as JSON lines")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    on_paper = "--part=model" in argv
    args = parse_known(parser, [*argv, "--tiny"] if on_paper else argv)
    args.gpus = sorted({1, *args.gpus})
    args.knobs = [*(TINY if args.tiny else ["--val_tokens=2097152"]), *args.knobs, f"--steps={args.steps}"]
    return args


def worker(args) -> int:
    """A rank: how many parts failed."""
    bench, failed = Bench(tg.parse_overrides(plain_batch([*args.knobs, f"--data_dir={args.data_dir}"])), args), []
    for part in args.part:
        if part in ("ablate", "exposed", "equal") and bench.world == 1:
            bench.say(f"{part}: needs two ranks, not run")
            continue
        try:
            bench.reset()
            getattr(bench, part)()
        except Exception:  # the next part may work
            traceback.print_exc()
            failed.append(part)
        bench.meet(part, part in failed)
    if bench.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return len(failed)


def start_ranks(args, argv: list[str], *more: str) -> int:
    """Run this file as every rank, and give back torchrun's exit code."""
    process = subprocess.Popen(launch(args.gpus[-1], __file__, *argv, "--worker", *more))
    try:
        return process.wait()
    finally:
        process.terminate()


def main(argv: list[str]) -> int:
    args, code = parse(argv), 0
    if args.worker:
        return worker(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the ranks
    os.environ.update(environment(args.gpus[-1]))
    with data_option(args) as data:
        read_knobs("scaling", [*args.knobs, data], args.gpus, data=args.part != ["model"])
        if "model" in args.part:
            print(f"model: see records/SCALING.md\n\n{ranks.paper()}\n", flush=True)
        inside = [part for part in args.part if part not in ("faults", "model")]
        if inside:
            code = start_ranks(args, argv, f"--part={','.join(inside)}", data)
        if "faults" in args.part:
            ranks.faults(args, plain_batch([*args.knobs, data]))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
