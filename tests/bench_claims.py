"""Trains the loss arms behind the table of the Claims record, the default beside each technique taken away or changed:

    python tests/bench_claims.py --data_dir=DIR [--arms=a,b] [--also=a:2] [--steps=64] [--until=SECONDS] [--knob=value]
    python tests/bench_claims.py --data_dir=DIR --base=FILE          # arms of that script, for example a record's
    python tests/bench_claims.py --script=skips_none > my.py         # the script of an arm, to read or to run by itself
    python tests/bench_claims.py --draw=FOLDER                       # the pictures

One run of each arm first; two more where it lies beyond 2 sd of the default's three. A worker a GPU (--gpus=0,1: these
alone) takes the next run; runs whose scripts are equal share one process and one compilation. Run folders go to logs/,
as of any run; what is done is listed in .cache/claims/, and the same command goes on after it; a changed script or knob
starts anew. `instrumented` is the default with probes on the clock (`claims.py`). Without CUDA, or with --tiny, the
model is tiny. Exit code 1: a run failed or is missing."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
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
from sets import prediction, welch  # noqa: E402

# patch: whose text replacements make this arm's script of train_gpt.py; knobs: what it changes beside
Arm = namedtuple("Arm", "knobs patch", defaults=("", ""))
ALL_OFF = ("--train_seq_len={long} --sequences_per_step=6 --fp8=False --window_min={window_max} "
           "--window_max={window_max} --skip_lr=0 --momentum_warmup=0")
ARMS = {
    "default": Arm(),
    "instrumented": Arm(),
    "skips_fixed": Arm("--skip_lr=0"),
    "momentum_warmup": Arm(f"--momentum_warmup={300 / 1770}"),  # off by default since it was measured
    "window_fixed": Arm("--window_min={window_max} --window_max={window_max}"),
    "window_published": Arm("--window_min=128 --window_max={window_max}"),  # the default until it was measured
    "window_record_21": Arm("--window_min=1 --window_max={rounded}"),  # the default since
    "grad_comm_fp8": Arm("--grad_comm=fp8"),
    "grad_sums_fp32": Arm("--grad_comm=fp8", "grad_sums_fp32"),  # as the arm before sums them, without its e5m2
    **{f"grad_scale_2_{e}": Arm(f"--grad_scale={2.0**e}") for e in (17, 18, 20, 21)},
    **{f"w_scale_2_{e}": Arm(f"--w_scale={2.0**e}") for e in (8, 10)},
    "fp8_off": Arm("--fp8=False"),
    "cooldown_1.5": Arm("", "cooldown_1.5"),
    "skips_none": Arm("--skip_lr=0", "skips_none"),
    "sequences_64k": Arm("--train_seq_len={long} --sequences_per_step=6"),
    "all_off": Arm(ALL_OFF),
    "all_off_cooldown_1.5": Arm(ALL_OFF, "cooldown_1.5"),
}
PATCHES = {  # (regular expression, replacement)
    "grad_sums_fp32": [(r"gradient = .*bucket\.pack\(\).*", "gradient = bucket.pack().float()")],
    "skips_none": [(r"torch\.ones\(depth // 2\)", "torch.zeros(depth // 2)")],
    "cooldown_1.5": [(r"( +return 1\.0 if left >= 1 else )(left .*)", r"\1min(1.0, 1.5 * (\2))")],
}
SEEDS = (1, 2, 3)  # of the default, and of an arm that its first run sets apart
STATE = Path(".cache", "claims")
COMMON = "--val_tokens=2097152 --val_every=64 --save=False"


def script(arm: str, base: Path = ROOT / "train_gpt.py") -> bytes:
    """`base` with the arm's patch. ValueError if what it replaces does not occur exactly once."""
    text = base.read_text(encoding="utf-8")
    for old, new in PATCHES.get(ARMS[arm].patch, []):
        text, count = re.subn(old, new, text)
        if count != 1:
            raise ValueError(f"what the arm {arm} replaces, {old}, is there {count} times, and not once")
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

def arguments(args, arm: str) -> list[str]:
    """All knobs of an arm's runs but the seed."""
    knobs = ARMS[arm].knobs.format(**args.sizes).split()
    return [*{argument.partition("=")[0]: argument for argument in (*args.common, *knobs)}.values()]  # a later one wins


def key(args, arm: str) -> str:
    """What a run of this arm depends on beside its seed."""
    return hashlib.sha256(args.scripts[arm] + " ".join(sorted(arguments(args, arm))).encode()).hexdigest()[:16]


def every_result() -> list[dict]:
    path = STATE / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(args) -> list[dict]:
    """Runs of these scripts and knobs. The loss is None where one failed."""
    return [row for row in every_result() if row["arm"] in args.keys and row["key"] == args.keys[row["arm"]]]


def note(row: dict) -> None:
    with open(STATE / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def trained(done: list[dict]) -> list[dict]:
    return [row for row in done if row["val_loss"] is not None]


def job_file(args, arm: str, seed: int) -> Path:
    return STATE / f"{arm}.{seed}.{args.keys[arm]}.job"


def arm_seeds(text: str) -> list[tuple[str, int]]:
    """"arm:seed,arm:seed" as pairs. ArgumentTypeError on another text."""
    pairs = re.findall(r"([^:,]+):(\d+)(?:,|$)", text)
    if ",".join(map(":".join, pairs)) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form arm:seed,arm:seed")
    scaling.known_names(tuple(ARMS), [arm for arm, _ in pairs])
    return [(arm, int(seed)) for arm, seed in pairs]


def wanted(arms: list[str], done: list[dict], also=()) -> list[tuple[str, int]]:
    """(arm, seed) of every run that the plan asks for, given what is known of the losses, then of those in `also`."""
    jobs = [("default", seed) for seed in SEEDS] + [(arm, 1) for arm in arms if arm != "default"]
    done = trained(done)
    known = [r["val_loss"] for r in done if r["arm"] == "default" and r["seed"] in SEEDS]
    if len(known) < len(SEEDS):
        return [*dict.fromkeys([*jobs, *also])]
    mean, sd = statistics.fmean(known), statistics.stdev(known)
    apart = {r["arm"]: abs(r["val_loss"] - mean) for r in done if r["seed"] == 1}
    far = sorted((arm for arm in arms if apart.get(arm, 0) > 2 * sd and arm not in ("default", "instrumented")),
                 key=lambda arm: "all_off" not in arm)  # the pair that most depends on it comes first
    return [*dict.fromkeys([*jobs, *((arm, seed) for seed in SEEDS[1:] for arm in far), *also])]


def take(args, compiled: set) -> tuple[str, int] | None:
    """Claim the next run, one whose program this worker has compiled where there is one. None: nothing left."""
    while time.time() + args.longest < args.end:
        done = results(args)
        finished = {(r["arm"], r["seed"]) for r in done}
        left = [job for job in wanted(args.arms, done, args.also) if job not in finished]
        free = [job for job in left if not job_file(args, *job).exists()]
        free.sort(key=lambda job: job[0] != "default" and program(job[0]) not in compiled)
        for arm, seed in free:
            with contextlib.suppress(FileExistsError), open(job_file(args, arm, seed), "x") as file:
                file.write(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
                return arm, seed
        if not left:
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
    argv = [*arguments(args, arm), f"--seed={seed}"]
    hp, cuda = module.parse_overrides(argv), torch.cuda.is_available()
    module.check(hp, 1)
    run = module.Run(hp, 0, 1, torch.device("cuda" if cuda else "cpu"), argv, source)
    watch = claims.Watch(run, arm) if arm in claims.WATCHED else None
    try:
        run.train()
        run.close(0, "complete")
    except module.Refused as refused:
        run.close(refused.code, str(refused))
    if watch:
        rows = (json.dumps(row) + "\n" for row in watch.rows())
        (STATE / f"probes_{arm}.{seed}.{args.keys[arm]}.jsonl").write_text("".join(rows), encoding="utf-8")
    peaks = [v >> 20 for v in (run.clock.peak, run.peak_val)] if cuda else [None, None]
    loss = run.val_loss if run.step == hp.steps and math.isfinite(run.val_loss) else None
    return dict(arm=arm, seed=seed, run_id=run.log.run_id, val_loss=loss, train_ms=run.clock.train_ms,
                steps=run.step, peak_train_mib=peaks[0], peak_val_mib=peaks[1])


def work(args) -> None:
    """Take runs until none is left or time is short."""
    torch._dynamo.config.recompile_limit = 64  # several sequence lengths and heads in one process
    modules, compiled = {}, set()
    while job := take(args, compiled):
        arm, seed = job
        began, patch, source = time.time(), ARMS[arm].patch, args.scripts[arm]
        if patch not in modules:
            modules[patch] = load_script(source, patch or "default")
        try:
            row = one_run(args, modules[patch], source, arm, seed)
        except Exception:  # the other arms still count
            traceback.print_exc()
            row = dict(arm=arm, seed=seed, val_loss=None, train_ms=0.0)
        note(row | dict(key=args.keys[arm]))
        compiled.add(program(arm))
        gc.unfreeze()  # Run.warm_up froze the run before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"[{time.time() - args.began:5.0f} s] {arm} seed {seed}: loss {row['val_loss']}, "
              f"{row['train_ms'] / 1e3:.1f} s of training, {time.time() - began:.0f} s in all",
              file=sys.stderr, flush=True)


# ---- Tables

def summary(done: list[dict]) -> list[dict]:
    """A row an arm, with the difference of its mean loss to the default's: Welch's 95 % interval, and that of the mean
    over pairs of runs with the same seed, which start from equal weights."""
    sets, rows = defaultdict(list), []
    for row in sorted(trained(done), key=lambda r: r["seed"]):
        sets[row["arm"]].append(row)
    same = {r["seed"]: r["val_loss"] for r in sets["default"]}
    base = [*same.values()]
    for arm in filter(sets.get, ARMS):
        found = [r["val_loss"] for r in sets[arm]]
        test = arm != "default" and welch(base, found)
        pairs = [r["val_loss"] - same[r["seed"]] for r in sets[arm] if r["seed"] in same and arm != "default"]
        half = prediction(pairs)[1] / math.sqrt(len(pairs) + 1) if len(pairs) > 1 else None  # of their mean
        rows.append({"arm": arm, "n": len(found), "failed": sum(r["arm"] == arm for r in done) - len(found),
                     "loss": statistics.fmean(found),
                     "sd": statistics.stdev(found) if len(found) > 1 else None,
                     "to default": statistics.fmean(found) - statistics.fmean(base) if base else None,
                     "low": test[1] if test else None, "high": test[2] if test else None,
                     "p": test[3] if test else None, "same seed": statistics.fmean(pairs) if pairs else None,
                     "+-": half,
                     "training s": statistics.median(r["train_ms"] for r in sets[arm]) / 1e3,
                     "peak MiB": sets[arm][0]["peak_train_mib"]})
    return rows


def packing(done: list[dict]) -> str:
    """The arguments of records.py add; nothing without runs of the default."""
    ids = defaultdict(list)
    for row in trained(done):
        ids[row["arm"]].append(row["run_id"])
    probe = "=instrumented: gradient norms and FP8 statistics were taken on the clock"
    arms = [f"--arm {arm}={' '.join(runs)}" for arm, runs in ids.items() if arm not in ("default", "instrumented")]
    left_out = [f"--leave-out '{run}{probe}'" for run in ids["instrumented"]]
    return " ".join(["records.py add", *ids["default"], *arms, *left_out]) if ids["default"] else ""


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data_dir", default="data/fineweb10B", help="folder of shards")
    parser.add_argument("--arms", default=[*ARMS], type=functools.partial(scaling.names, tuple(ARMS)), metavar="A,B",
                        help=f"of {', '.join(ARMS)}; the default is always trained")
    parser.add_argument("--also", default=[], type=arm_seeds, metavar="A:SEED,...",
                        help="runs beyond the plan's; of an arm that --arms does not name, only these")
    parser.add_argument("--base", type=Path, default=ROOT / "train_gpt.py", metavar="FILE",
                        help="the script whose arms are trained")
    parser.add_argument("--steps", type=int, default=64, help="length of every run")
    parser.add_argument("--gpus", default="", help="numbers of the GPUs to use; empty = all")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds after which no run starts")
    parser.add_argument("--longest", type=float, default=120.0, help="seconds that a run may take, for --until")
    parser.add_argument("--script", choices=ARMS, metavar="ARM", help="print this arm's script, and train nothing")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the probes of the arms "
                        f"{', '.join(claims.WATCHED)}, trained before")
    parser.add_argument("--join", action="store_true", help="with other GPUs, while this command runs already")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the bench and not the claims")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args, knobs = parser.parse_known_args(argv)
    tiny = args.tiny or not torch.cuda.is_available()
    args.common = [f"--data_dir={args.data_dir}", *(TINY if tiny else COMMON.split()), f"--steps={args.steps}", *knobs]
    args.sizes = dict(zip(("window_max", "rounded", "long"), (256, 192, 384) if tiny else (1792, 1728, 65536)))
    args.began = args.worker or time.time()
    args.end = args.began + args.until
    try:  # now, so that an edit meanwhile changes no run
        named = [args.script] if args.script else ["default", *args.arms, *(arm for arm, _ in args.also)]
        args.scripts = {arm: script(arm, args.base) for arm in named}
    except (OSError, ValueError) as error:
        parser.error(f"--base={args.base}: {error}")
    args.keys = {arm: key(args, arm) for arm in args.scripts}
    return args


def renamed_default(args) -> set[str]:
    """The arms that are the default by another name. Ends with one sentence and the script's exit code where a script,
    a knob or the data cannot work."""
    modules, recipes = {}, {}
    for arm, source in args.scripts.items():
        try:
            module = modules[source] = modules.get(source) or load_script(source, ARMS[arm].patch or "default")
            recipes[arm] = source, module.parse_overrides(arguments(args, arm))
            module.check(recipes[arm][1], 1)
            if arm == "default":
                module.load_corpus(recipes[arm][1], thorough=False)
        except (Exception, SystemExit) as error:  # a base may be anything
            where = [f"--base={args.base}"] * (type(error).__name__ != "Refused") + [f"arm {arm}"] * (arm != "default")
            print(": ".join(["bench_claims", *where, str(error)]), file=sys.stderr)
            sys.exit(getattr(error, "code", 2) or 2)
    same = {arm for arm in recipes if recipes[arm] == recipes["default"]} - {"default", "instrumented"}
    if same:
        print(f"not trained, since with this script they are the default: {', '.join(sorted(same))}", file=sys.stderr)
    return same


def watch_over(args, workers: dict) -> list[int]:
    """Wait for the workers {gpu: process}; the run that one was at when it died is noted as failed."""
    waiting = dict(workers)
    while waiting:
        time.sleep(0.5)
        for gpu in [gpu for gpu, worker in waiting.items() if worker.poll() is not None]:
            if waiting.pop(gpu).returncode:
                finished = {(r["arm"], r["seed"]) for r in results(args)}
                for arm, seed in {*itertools.product(args.keys, SEEDS), *args.also} - finished:
                    path = job_file(args, arm, seed)
                    if path.exists() and path.read_text() == gpu:
                        note(dict(arm=arm, seed=seed, val_loss=None, train_ms=0.0, key=args.keys[arm]))
    return [worker.returncode for worker in workers.values()]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.script:
        return sys.stdout.write(args.scripts[args.script].decode()) and None
    if args.draw:
        return claims.draw(args.draw, STATE)
    if args.worker:
        return work(args)
    same = renamed_default(args)
    args.arms = [arm for arm in args.arms if arm not in same] or ["default"]
    args.also = [run for run in args.also if run[0] not in same]
    if not args.join:
        for claimed in STATE.glob("*.job"):
            claimed.unlink()
        rows = trained(every_result())  # those that failed are tried again
        (STATE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpus = args.gpus.split(",") if args.gpus else [str(i) for i in range(torch.cuda.device_count())] or [""]
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), f"--worker={args.began}",
               f"--arms={','.join(args.arms)}", f"--also={','.join(f'{arm}:{seed}' for arm, seed in args.also)}"]
    environment, workers = scaling.environment(len(gpus)), {}
    for gpu in gpus:
        with open(STATE / f"worker_{gpu}.txt", "w") as output:
            workers[gpu] = subprocess.Popen(command, env=environment | dict(CUDA_VISIBLE_DEVICES=gpu), stdout=output)
    codes, done = watch_over(args, workers), results(args)
    print(f"workers ended with {codes} after {time.time() - args.began:.0f} s")
    print(scaling.table(summary(done)))
    print(packing(done))
    missing = {*wanted(args.arms, done, args.also)} - {(r["arm"], r["seed"]) for r in trained(done)}
    if missing:
        print("missing:", ", ".join(f"{arm} seed {seed}" for arm, seed in sorted(missing)), file=sys.stderr)
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
