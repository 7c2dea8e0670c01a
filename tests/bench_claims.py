"""Trains the loss arms behind the table of the Claims record, the default beside each technique taken away or changed:

    python tests/bench_claims.py --data_dir=DIR [--arms=a,b] [--steps=64] [--gpus=0,1] [--until=SECONDS] [--knob=value]
    python tests/bench_claims.py --script=skips_none > my.py         # the script of an arm, to read or to run by itself
    python tests/bench_claims.py --draw=FOLDER                       # the pictures

One run of each arm first; two more where it lies beyond 2 sd of the default's three. A worker a GPU takes the next run;
runs whose scripts are equal share one process and one compilation. Run folders go to logs/, as of any run; what is done
is listed in .cache/claims/, and the same command goes on after it. `instrumented` is the default with probes on the
clock (`claims.py`). Without CUDA, or with --tiny, the model is tiny."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict, namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]
import claims  # noqa: E402
import scaling  # noqa: E402
from bench_scaling import TINY  # noqa: E402
from sets import welch  # noqa: E402

# patch: whose text replacements make this arm's script of train_gpt.py; knobs: what it changes beside
Arm = namedtuple("Arm", "knobs patch", defaults=("", ""))
ALL_OFF = "--train_seq_len={long} --sequences_per_step=6 --fp8=False --window_min={window_max} --skip_lr=0"
ARMS = {
    "default": Arm(),
    "instrumented": Arm(),
    "skips_fixed": Arm("--skip_lr=0"),
    "momentum_warmup": Arm(f"--momentum_warmup={300 / 1770}"),  # off by default since it was measured
    "window_fixed": Arm("--window_min={window_max}"),
    "grad_comm_fp8": Arm("--grad_comm=fp8"),
    **{f"grad_scale_2_{e}": Arm(f"--grad_scale={2.0**e}") for e in (17, 18, 20, 21)},
    **{f"w_scale_2_{e}": Arm(f"--w_scale={2.0**e}") for e in (8, 10)},
    "fp8_off": Arm("--fp8=False"),
    "cooldown_1.5": Arm("", "cooldown_1.5"),
    "skips_none": Arm("--skip_lr=0", "skips_none"),
    "sequences_64k": Arm("--train_seq_len={long} --sequences_per_step=6"),
    "all_off": Arm(ALL_OFF),
    "all_off_cooldown_1.5": Arm(ALL_OFF, "cooldown_1.5"),
}
PATCHES = {
    "skips_none": [("torch.ones(depth // 2)", "torch.zeros(depth // 2)")],
    "cooldown_1.5": [("    return 1.0 if left >= 1 else left + (1 - left) * hp.lr_floor",
                      "    return 1.0 if left >= 1 else min(1.0, 1.5 * (left + (1 - left) * hp.lr_floor))")],
}
SEEDS = (1, 2, 3)  # of the default, and of an arm that its first run sets apart
STATE = Path(".cache", "claims")
BASE = "--val_tokens=2097152 --val_every=64 --save=False"


def script(arm: str) -> bytes:
    """train_gpt.py with the arm's patch. ValueError if a text to replace does not occur exactly once."""
    text = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    for old, new in PATCHES.get(ARMS[arm].patch, []):
        if text.count(old) != 1:
            raise ValueError(f"bench_claims: {old!r} occurs {text.count(old)} times in train_gpt.py, and not once")
        text = text.replace(old, new)
    return text.encode()


def load_script(source: bytes, name: str):
    """The module of these bytes, whose models all use the memory, and so the compiled code, of its first one."""
    path = STATE / "scripts" / name / "train_gpt.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source)
    spec = importlib.util.spec_from_file_location("train_gpt_" + name.replace(".", "_"), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    placed, first = module.place, []

    def place(model, device):
        model = placed(model, device)
        if not first:
            return first.append(model) or model
        with torch.no_grad():
            for old, new in zip(tensors(first[0]), tensors(model), strict=True):
                old.copy_(new)
        first[0].zero_grad()
        return first[0].train()

    module.place = place
    return module


def tensors(model):
    return itertools.chain(model.parameters(), model.buffers())


# ---- The list of runs: done ones are lines of results.jsonl, those under way are files

def results() -> list[dict]:
    """The loss is None where a run failed."""
    path = STATE / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(done: list[dict]) -> list[dict]:
    return [row for row in done if row["val_loss"] is not None and math.isfinite(row["val_loss"])]


def wanted(arms: list[str], done: list[dict]) -> list[tuple[str, int]]:
    """(arm, seed) of every run that the plan asks for, given what is known of the losses."""
    jobs = [("default", seed) for seed in SEEDS] + [(arm, 1) for arm in arms if arm != "default"]
    done = trained(done)
    known = [r["val_loss"] for r in done if r["arm"] == "default"]
    if len(known) < len(SEEDS):
        return jobs
    mean, sd = statistics.fmean(known), statistics.stdev(known)
    apart = {r["arm"]: abs(r["val_loss"] - mean) for r in done if r["seed"] == 1}
    far = sorted((arm for arm in arms if apart.get(arm, 0) > 2 * sd and arm not in ("default", "instrumented")),
                 key=lambda arm: "all_off" not in arm)  # the pair that most depends on it comes first
    return jobs + [(arm, seed) for seed in SEEDS[1:] for arm in far]


def take(args, compiled: set, mine: list) -> tuple[str, int] | None:
    """Claim the next run, one whose program this worker has compiled where there is one. None: nothing left."""
    while time.time() + args.longest < args.end:
        done = results()
        finished, under_way = {(r["arm"], r["seed"]) for r in done}, {p.name for p in STATE.glob("*.job")}
        left = [job for job in wanted(args.arms, done) if job not in finished and job not in mine]
        free = [job for job in left if "{}.{}.job".format(*job) not in under_way]
        free.sort(key=lambda job: job[0] != "default" and program(job[0]) not in compiled)
        for arm, seed in free:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(STATE / f"{arm}.{seed}.job", os.O_CREAT | os.O_EXCL))
                return arm, seed
        if not left and not under_way - {"{}.{}.job".format(*job) for job in finished | set(mine)}:
            return None
        time.sleep(2)  # another worker's result may ask for more runs
    return None


def program(arm: str) -> tuple:
    """Arms with the same program differ in values alone."""
    shapes = ("--train_seq_len", "--fp8=")
    return ARMS[arm].patch, *(knob for knob in ARMS[arm].knobs.split() if knob.startswith(shapes))


# ---- A worker

def one_run(args, module, source: bytes, arm: str, seed: int) -> dict:
    """Train one run into a run folder of logs/, and return its line of results.jsonl."""
    knobs = ARMS[arm].knobs.format(window_max=args.window_max, long=args.long).split()
    argv = {a.partition("=")[0]: a for a in (*args.base, *knobs, f"--seed={seed}")}  # a later one wins
    argv = [*argv.values()]
    hp, cuda = module.parse_overrides(argv), torch.cuda.is_available()
    module.check(hp, 1)
    run = module.Run(hp, 0, 1, torch.device("cuda" if cuda else "cpu"), argv, source)
    watch = claims.Watch(run, module, arm, seed) if arm in claims.WATCHED and seed == 1 else None
    try:
        run.train()
        run.close(0, "complete")
    except module.Refused as refused:
        run.close(refused.code, str(refused))
    if watch:
        with open(STATE / "probes.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in watch.rows())
    peaks = [v >> 20 for v in (run.clock.peak, run.peak_val)] if cuda else [None, None]
    return dict(arm=arm, seed=seed, run_id=run.log.run_id, val_loss=run.val_loss, train_ms=run.clock.train_ms,
                steps=run.step, peak_train_mib=peaks[0], peak_val_mib=peaks[1])


def work(args) -> None:
    """Take runs until none is left or time is short."""
    torch._dynamo.config.recompile_limit = 64  # several sequence lengths and heads in one process
    modules, compiled, mine = {}, set(), []
    while job := take(args, compiled, mine):
        arm, seed = job
        began, patch = time.time(), ARMS[arm].patch
        mine.append(job)
        if patch not in modules:
            source = script(arm)
            modules[patch] = load_script(source, patch or "default"), source
        try:
            row = one_run(args, *modules[patch], arm, seed)
        except Exception:  # the other arms still count
            traceback.print_exc()
            row = dict(arm=arm, seed=seed, val_loss=None, train_ms=0.0)
        finally:
            gc.unfreeze()  # Run.warm_up froze the run before
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        compiled.add(program(arm))
        with open(STATE / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{time.time() - args.began:5.0f} s] {arm} seed {seed}: loss {row['val_loss']}, "
              f"{row['train_ms'] / 1e3:.1f} s of training, {time.time() - began:.0f} s in all",
              file=sys.stderr, flush=True)


# ---- Tables

def summary(done: list[dict]) -> list[dict]:
    """A row an arm, with the difference of its mean loss to the default's and Welch's 95 % interval."""
    sets, rows = defaultdict(list), []
    for row in sorted(trained(done), key=lambda r: r["seed"]):
        sets[row["arm"]].append(row)
    base = [r["val_loss"] for r in sets["default"]]
    for arm in filter(sets.get, ARMS):
        found = [r["val_loss"] for r in sets[arm]]
        test = arm != "default" and welch(base, found)
        rows.append({"arm": arm, "n": len(found), "loss": statistics.fmean(found),
                     "sd": statistics.stdev(found) if len(found) > 1 else None,
                     "to default": statistics.fmean(found) - statistics.fmean(base) if base else None,
                     "low": test[1] if test else None, "high": test[2] if test else None,
                     "p": test[3] if test else None,
                     "training s": statistics.median(r["train_ms"] for r in sets[arm]) / 1e3,
                     "peak MiB": sets[arm][0]["peak_train_mib"]})
    return rows


def packing(done: list[dict]) -> str:
    """The arguments of records.py add."""
    ids = defaultdict(list)
    for row in trained(done):
        ids[row["arm"]].append(row["run_id"])
    probe = "=instrumented: gradient norms and FP8 statistics were taken on the clock"
    arms = [f"--arm {arm}={' '.join(runs)}" for arm, runs in ids.items() if arm not in ("default", "instrumented")]
    return " ".join(["records.py add", *ids["default"], *arms,
                     *(f"--leave-out '{run}{probe}'" for run in ids["instrumented"])])


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default="data/fineweb10B")
    parser.add_argument("--arms", default=",".join(ARMS), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--gpus", default="", help="numbers of the GPUs to use; empty = all")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no run starts")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds that a run may take, for --until")
    parser.add_argument("--script", choices=ARMS)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--join", action="store_true", help="with other GPUs, while this command runs already")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args, knobs = parser.parse_known_args(argv)
    tiny = args.tiny or not torch.cuda.is_available()
    args.base = [f"--data_dir={args.data_dir}", *(TINY if tiny else BASE.split()), f"--steps={args.steps}", *knobs]
    args.window_max, args.long = (256, 384) if tiny else (1792, 65536)
    args.began = args.worker or time.time()
    args.end = args.began + args.until
    if missing := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms: {', '.join(missing)} are none of {', '.join(ARMS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.script:
        return sys.stdout.write(script(args.script).decode()) and None
    if args.draw:
        return claims.draw(args.draw, STATE / "probes.jsonl")
    if args.worker:
        return work(args)
    STATE.mkdir(parents=True, exist_ok=True)
    if not args.join:
        for claimed in STATE.glob("*.job"):
            claimed.unlink()
        (STATE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained(results())))
    gpus = args.gpus.split(",") if args.gpus else [str(i) for i in range(torch.cuda.device_count())] or [""]
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), f"--worker={args.began}"]
    environment, workers = scaling.environment(len(gpus)), []
    for gpu in gpus:
        with open(STATE / f"worker_{gpu}.txt", "w") as output:
            workers.append(subprocess.Popen(command, env=environment | dict(CUDA_VISIBLE_DEVICES=gpu), stdout=output))
    codes = [worker.wait() for worker in workers]
    print(f"workers ended with {codes} after {time.time() - args.began:.0f} s")
    print(scaling.table(summary(results())))
    print(packing(results()))


if __name__ == "__main__":
    main()
