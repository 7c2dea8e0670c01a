"""Measures how training scales over the GPUs of one machine, and prints a table for each part:

    python tests/bench_scaling.py --data_dir=DIR [--gpus=1,2,4,8] [--part=all] [--steps=128] [--out=FILE] [--knob=value]

equal: N ranks against one that accumulates gradients. speed: tokens/s and efficiency, strong and weak. ablate:
grouping, overlap and FP8 exchange, each taken away by a patch made here. exposed: NCCL kernels that run while nothing
computes, and bytes sent. share: each rank's optimizer at 8 ranks, timed on one GPU. faults: SIGKILL, SIGTERM, resume.
model: step time on paper. Without CUDA, or with --tiny, the model is tiny. Ranks see the environment as it is."""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import scaling  # noqa: E402
from tiny import make_corpus  # noqa: E402

import train_gpt as tg  # noqa: E402

PARTS = ("equal", "speed", "ablate", "exposed", "share", "faults", "model")
TINY = ("--train_seq_len=256 --val_seq_len=512 --sequences_per_step=8 --model_dim=64 --num_heads=1 --window_max=256 "
        "--layer_pattern=LS-L --value_pattern=0..0 --val_tokens=1500 --epochs=100").split()
TRACED = 4  # steps of a trace, and of a count of bytes

# ---- The ranks' side

class Bench:
    """One rank: the model compiled once, its weights at the start, and optimizers for every count of ranks."""
    def __init__(self, hp: tg.Hyperparameters, args):
        self.args, self.began, self.made = args, time.perf_counter(), {}
        self.rank, self.world, self.device = tg.init_distributed()
        self.cuda, self.hp, self.corpus = self.device.type == "cuda", hp, tg.load_corpus(hp, thorough=False)
        torch._dynamo.config.recompile_limit = 256  # one update serves every bucket of every count of ranks
        torch.manual_seed(hp.seed)
        with self.device:
            self.model = tg.place(tg.GPT(hp, tg.VOCAB[self.corpus.encoding]), self.device)
        self.model.use_flex = tg.flex_supported(self.device)
        self.model.lm_head.use_fp8 = hp.fp8 and tg.fp8_supported(self.device)[0]
        self.tensors = list(self.model.state_dict().values())
        for tensor in self.tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)
        self.first = [t.clone() for t in self.tensors]
        self.window, self.flag = (torch.zeros((), dtype=torch.int32, device=self.device) for _ in "wf")
        parts = self.model, self.model.features, self.model.losses
        self.forward, self.features, self.losses = [
            torch.compile(part, dynamic=False, fullgraph=True) if self.cuda else part for part in parts]
        self.groups = {n: dist.new_group(list(range(n))) for n in args.gpus if 1 < n < self.world}
        stream, T, count = self.corpus.train, hp.train_seq_len, hp.sequences_per_step
        starts = [(self.rank * count + i) % ((stream.total - 1) // T) * T for i in range(count)]
        tokens = [torch.from_numpy(stream.read(start, T + 1)) for start in starts]
        self.pairs = [(t[:-1].clone(), t[1:].long()) for t in tokens]
        if self.cuda:
            self.pairs = [tuple(t.pin_memory() for t in pair) for pair in self.pairs]
        self.facts = dict(gpu=torch.cuda.get_device_name() if self.cuda else "CPU, gloo", torch=torch.__version__,
                          ranks=self.world, steps=hp.steps, fp8=self.model.lm_head.use_fp8)
        self.say(" ".join(f"{k}: {v}" for k, v in self.facts.items()))

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", flush=True)

    def report(self, part: str, title: str, rows: list[dict], **hidden) -> None:
        if self.rank == 0:
            scaling.report(self.args, part, f"{title} ({self.facts['gpu']})", rows, **self.facts, **hidden)

    def gather(self, value) -> list:
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def reset(self) -> None:
        self.model.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, self.first)

    def wire(self, n: int, **how) -> scaling.Wire:
        return scaling.Wire(self.groups.get(n), self.rank if n > 1 else 0, n, **how)

    def optimizers(self, wire: scaling.Wire, comm: str = "bf16", grouped: bool = True) -> list:
        """Made once for each kind, and compiled."""
        key, tg.dist = (wire.world, wire.rank, comm, grouped), wire
        if key not in self.made:
            make = tg.Muon.make_buckets if grouped else scaling.ungrouped(wire.world)
            hp = dataclasses.replace(self.hp, grad_comm=comm)
            with mock.patch.object(tg.Muon, "make_buckets", make):
                self.made[key] = tg.build_optimizers(self.model, hp, wire.world)
            for optimizer in self.made[key] if self.cuda else ():
                optimizer.compile()
        return self.made[key]

    def step(self, wire: scaling.Wire, optimizers: list, pairs: list, step: int | None = None):
        """What Run.launch does on the GPU: copy tokens, train, sum the loss over ranks. Default: at half the run."""
        tg.dist = wire
        sequences = ([t.to(self.device, non_blocking=True) for t in pair] for pair in pairs)
        loss = tg.train_step(self.forward, self.model, optimizers, sequences, self.hp,
                             self.hp.steps // 2 if step is None else step, self.window)
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
        wire, hp = self.wire(n), self.hp
        optimizers = self.optimizers(wire)
        self.reset()
        for optimizer in optimizers:
            optimizer.state.clear()
        batches = tg.prefetch(self.corpus.train, hp, wire.rank, n, 0, self.cuda)
        losses = torch.stack([self.step(wire, optimizers, pairs, i) for i, pairs in enumerate(batches)]).tolist()
        self.window.fill_(tg.window_scheduler(hp.steps, hp.steps, hp.window_min, hp.window_max))
        self.model.eval()
        scores = []
        for ranks in (wire, self.wire(1)):
            tg.dist = ranks
            scores.append(tg.evaluate(self.features, self.losses, self.corpus.val, hp, ranks.rank, ranks.world,
                                      self.window))
        self.model.train()
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
                                 f"{scaling.shown(gap <= band)}; to 1e-3: {scaling.shown(gap < 1e-3)}", rows,
                        losses=[run[0] for run in runs])
            self.report("equal", "the same weights scored", [
                {"ranks": n, "val loss": run[1], "on 1 rank": run[2], "gap": abs(run[1] - run[2]),
                 "equal to 1e-3": abs(run[1] - run[2]) < 1e-3, "tokens": self.hp.val_tokens} for run in (c, d)])

    def arm(self, n: int, comm: str = "bf16", grouped: bool = True, **how) -> tuple[scaling.Wire, list]:
        wire = self.wire(n, **how)
        return wire, self.optimizers(wire, comm, grouped)

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
                 "tokens/s": rate[n, each(n)], "efficiency": scaling.efficiency(rate[n, each(n)], n, rate[1, each(1)]),
                 "n": self.args.rounds * self.args.count} for kind, each in kinds.items() for n in gpus]
        self.report("speed", f"strong: one GPU accumulates {batch} sequences, which amortise its optimizer step", rows)

    def gradients(self) -> None:
        """Leave gradients in the model for optimizers timed by themselves. The head is zero before a first step."""
        self.step(*self.arm(1), self.pairs[:1])
        self.forward(*(t.to(self.device) for t in self.pairs[0]), self.window).backward()

    def update(self, wire: scaling.Wire, optimizers: list) -> None:
        tg.dist = wire
        for optimizer in optimizers:
            optimizer.step()

    def ablate(self) -> None:
        n, batch, gather = self.world, self.hp.sequences_per_step, scaling.COLLECTIVES[-1:]
        how = {"as it is": {}, "one matrix a rank and bucket": dict(grouped=False),
               "all-gather waited for at once": dict(blocking=gather),
               "each collective waited for at once": dict(blocking=scaling.COLLECTIVES),
               "all of these": dict(grouped=False, blocking=scaling.COLLECTIVES), "fp8 gradients": dict(comm="fp8"),
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
             "step to it": ms - step[base], "efficiency": scaling.efficiency(n / ms, n, batch / one),
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
            return scaling.kernel_spans(json.loads(path.read_text()))

    def exposed(self) -> None:
        n, kernels, sent = self.world, [], []
        for comm in ("bf16", "fp8"):
            wire, optimizers = self.arm(n, comm)
            work = functools.partial(self.step, wire, optimizers, self.pairs[:1])
            self.timed(work, 1)
            wire.calls.clear()
            before = self.nvlink()
            self.timed(work, TRACED - 1)
            after, calls = self.nvlink(), self.gather(wire.calls)
            sent.append({"gradients": comm, "GPUs": n, "plan, bytes sent": scaling.plan_bytes(optimizers) * (n - 1) / n,
                         "counted": sum(b for _, b in calls[0]) / TRACED * (n - 1) / n,
                         "NVLink counter": None if None in (before, after) else (after - before) / TRACED,
                         "one order on all ranks": all(c == calls[0] for c in calls), "n": TRACED})
            spans = self.traced(work) if self.cuda else {}
            compute = spans.pop("compute", [])
            spans["all"] = [span for kind in spans.values() for span in kind]
            seen = self.gather({k: (scaling.covered(s), scaling.exposed_time(s, compute)) for k, s in spans.items()})
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
            for rank in range(scaling.HOST):
                wire = scaling.Wire(None, rank, scaling.HOST, local=True)
                arms[rank, comm] = 1, functools.partial(self.update, wire, self.optimizers(wire, comm))
        ms = self.compare("share", arms, 2 * self.args.count, lead=True)
        rows = [{"rank": rank, "bf16 ms": ms[rank, "bf16"], "fp8 ms": ms[rank, "fp8"]} for rank in range(scaling.HOST)]
        most = {f"{c} ms": max(row[f"{c} ms"] for row in rows) for c in ("bf16", "fp8")}
        whole = ms["whole, bf16"]
        self.report("share", f"one GPU alone {whole:.2f} ms; {scaling.HOST} ranks' most {most['bf16 ms']:.2f} ms: "
                             f"{whole / most['bf16 ms']:.2f} times faster, local copies for collectives",
                    [*rows, {"rank": "most"} | most], whole=whole, n=2 * self.args.rounds * self.args.count)

# ---- The launcher's side

def parse(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    names = functools.partial(scaling.names, PARTS)
    counts = lambda text: [int(n) for n in text.split(",")]
    gpus = torch.cuda.device_count()
    parser.add_argument("--part", type=names, default=PARTS, help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--gpus", type=counts, default=[n for n in (1, 2, 4, 8) if n <= (gpus or 2)])
    parser.add_argument("--steps", type=int, default=128, help="of part equal")
    parser.add_argument("--rounds", type=int, default=3, help="of interleaved arms")
    parser.add_argument("--count", type=int, default=4, help="steps of an arm in a round")
    scaling.data_options(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, given = parser.parse_known_args(argv)
    if not (args.tiny or args.data_dir or args.part == ["model"]):
        parser.error("--data_dir=DIR is needed: a folder with *train*.bin and *val*.bin shards")
    args.gpus = sorted({1, *args.gpus})
    return args, [*(TINY if args.tiny else ["--val_tokens=2097152"]), *given, f"--steps={args.steps}"]

def worker(args, knobs: list[str]) -> None:
    bench, failed = Bench(tg.parse_overrides(knobs), args), []
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
    sys.exit(len(failed))

def main() -> None:
    args, knobs = parse(sys.argv[1:])
    if args.worker:
        return worker(args, [*knobs, f"--data_dir={args.data_dir}"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the ranks
    os.environ.update(scaling.environment(args.gpus[-1]))
    with tempfile.TemporaryDirectory() as folder:
        data = f"--data_dir={args.data_dir or make_corpus(Path(folder, 'data'), train=(70_000,))}"
        inside, code = [part for part in args.part if part not in ("faults", "model")], 0
        if "model" in args.part:
            print(f"model: see records/SCALING.md\n\n{scaling.paper()}\n", flush=True)
        scaling.check("bench_scaling", [*knobs, data], args.gpus, data=args.part != ["model"])
        if inside:
            own = __file__, *sys.argv[1:], "--worker", f"--part={','.join(inside)}", data
            ranks = subprocess.Popen(scaling.launch(args.gpus[-1], *own))
            try:
                code = ranks.wait()
            finally:
                ranks.terminate()
        if "faults" in args.part:
            scaling.faults(args, [*knobs, data])
    sys.exit(code)

if __name__ == "__main__":
    main()
