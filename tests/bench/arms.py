"""Trains arms in turn and compares their losses, times and memory; an arm is a name, a script and knobs:

    python tests/bench/arms.py --data_dir=DIR --arm=base:train_gpt.py --arm=fast:my.py,--muon_lr=0.02 --seeds=1,2
    ... [--gpus=0,1] [--until=SECONDS] [--knob=value ...]       # these knobs are every arm's; an arm's own win
    ... [--score=DIR [--groups=FILE]]     # also score each final model on DIR's validation stream, as score.py does

Runs go by seed: seed 1 of every arm, then seed 2, so that what drifts in a machine hits all arms alike. A worker a GPU
takes the next run, within a seed one of a script that it has compiled. Each run is that of its script alone, bit for
bit on a CPU, with --save=False; but runs of one script share a process and its compiled code. With --score one may
choose by the runs' own validation and claim on a stream that chose nothing. Run folders go to logs/, as of any run;
what is done is listed in .cache/arms/, and the same command goes on after it; a changed script, knob or score starts
anew. One command at a time in a folder. Exit code 1: a run failed, or is missing; 2: bad input."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, environment, load_script, make_form, numbers, table, tg  # noqa: E402
from score import read_groups, read_text, score  # noqa: E402

sys.path.append(str(ROOT / "records"))
import seeds  # noqa: E402
from decide import Undecided, prediction, welch  # noqa: E402

STATE = Path(".cache", "arms")


class Arm(NamedTuple):
    name: str
    script: Path
    source: bytes
    knobs: list[str]  # all but the seed
    scored: str  # on what, and by which groups

    @property
    def key(self) -> str:
        """What its results depend on beside the seed."""
        return hashlib.sha256(self.source + ("\n".join(sorted(self.knobs)) + self.scored).encode()).hexdigest()[:16]


class Job(NamedTuple):
    """A run to be trained, or that was."""

    name: str
    seed: int
    key: str

    @property
    def claim(self) -> Path:
        """The file that a worker makes when it takes this run; it holds the worker's GPU."""
        return STATE / f"{self.name}.{self.seed}.{self.key}.job"


# ---- The list of runs: those done are lines of results.jsonl, those under way are files


def jobs(args) -> list[Job]:
    return [Job(arm.name, seed, arm.key) for seed in args.seeds for arm in args.arms]


def every_result() -> list[dict]:
    path = STATE / "results.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def results(args) -> dict[Job, dict]:
    """The runs of this command that ended. `val_loss` is None where one failed."""
    done = {Job(row["arm"], row["seed"], row["key"]): row for row in every_result()}
    return {job: done[job] for job in jobs(args) if job in done}


def note(job: Job, **facts) -> None:
    row = dict(arm=job.name, seed=job.seed, key=job.key, **facts)
    with open(STATE / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def take(args, compiled: set[str]) -> Job | None:
    """Claim the next run: of the first seed that has a free one, and there one whose arm's script is in `compiled`
    (hashes) if possible. None: nothing is left, or time is up."""
    if time.time() >= args.end:
        return None
    done, scripts = results(args), {arm.name: digest(arm) for arm in args.arms}
    free = [job for job in jobs(args) if job not in done and not job.claim.exists()]
    free.sort(key=lambda job: (args.seeds.index(job.seed), scripts[job.name] not in compiled))
    for job in free:
        with contextlib.suppress(FileExistsError), open(job.claim, "x") as file:
            file.write(args.gpu)
            return job
    return None


def digest(arm: Arm) -> str:
    return hashlib.sha256(arm.source).hexdigest()[:16]


# ---- A worker


def load(arm: Arm):
    """The module of the arm's script, from a copy: an edit meanwhile changes no run."""
    path = STATE / "scripts" / digest(arm) / "train_gpt.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # another worker may be reading it
        part = path.with_name(f"{os.getpid()}.part")
        part.write_bytes(arm.source)
        part.replace(path)
    return load_script(path)


def facts(run, args) -> dict:
    """What is noted of a complete run."""
    noted = dict(run_id=run.log.run_id, val_loss=run.val_loss, train_ms=run.clock.train_ms, steps=run.step,
                 peak_train_mib=run.clock.peak >> 20 or None, peak_val_mib=run.peak_val >> 20 or None)
    if args.score:
        found = score(run.trainer, run.hp, args.score, args.groups)
        noted |= dict(score=found["val_loss"], score_sources=found["sources"])
    return noted


def work(args) -> None:
    """Take runs until none is left, time is up, or a signal comes. A model's tensors are inputs of its compiled code,
    which thus serves every run of a script whose knobs are alike in what the code holds as constants."""
    torch._dynamo.config.recompile_limit = 64  # arms may differ in shapes
    arms, loaded = {arm.name: arm for arm in args.arms}, {}
    while job := take(args, set(loaded)):
        arm, began = arms[job.name], time.time()
        module = loaded[digest(arm)] = loaded.get(digest(arm)) or load(arm)
        code, noted = seeds.train(module, arm.knobs, arm.source, job.seed, lambda run: facts(run, args))
        if code in (75, 130):  # a signal
            break
        noted = noted or dict(val_loss=None, train_ms=0.0)  # the other arms still count
        note(job, gpu=args.gpu, **noted)
        print(f"[{time.time() - args.began:5.0f} s] {job.name} seed {job.seed}: loss {noted['val_loss']}, "
              f"{noted['train_ms'] / 1e3:.1f} s of training, {time.time() - began:.0f} s in all",
              file=sys.stderr, flush=True)


# ---- Tables


def compared(base: list[dict], runs: list[dict], key: str = "val_loss") -> dict:
    """Of the losses under `key`: mean and sd, and the difference to the mean of `base` with Welch's 95 % interval and
    that of the mean over pairs of runs of one seed."""
    losses = [[row[key] for row in rows] for rows in (base, runs)]
    same = {row["seed"]: row[key] for row in base}
    pairs = [row[key] - same[row["seed"]] for row in runs if row["seed"] in same]
    mean = lambda values: statistics.fmean(values) if values else None
    found = {"loss": mean(losses[1]), "sd": statistics.stdev(losses[1]) if len(runs) > 1 else None,
             "difference": mean(losses[1]) - mean(losses[0]) if all(losses) else None, "low": None, "high": None,
             "same seed": mean(pairs), "+-": None}
    with contextlib.suppress(Undecided):  # scipy is not there
        if test := welch(*losses):
            found |= dict(low=test[1], high=test[2])
        if len(pairs) > 1:
            found["+-"] = prediction(pairs)[1] / math.sqrt(len(pairs) + 1)  # of their mean, not of a new one
    return found


def sets(args, done: dict[Job, dict]) -> dict[str, list[dict]]:
    """The complete runs of each arm."""
    rows = [(job.name, row) for job, row in done.items() if row["val_loss"] is not None]
    return {arm.name: [row for name, row in rows if name == arm.name] for arm in args.arms}


def summary(args, done: dict[Job, dict]) -> list[dict]:
    """A row an arm; differences are to the first arm."""
    runs_of, rows, middle = sets(args, done), [], lambda values: statistics.median(values) if values else None
    for name, runs in runs_of.items():
        base = runs_of[args.arms[0].name] if rows else []
        row = {"arm": name, "n": len(runs), "failed": sum(job.name == name for job in done) - len(runs)}
        row |= compared(base, runs)
        if args.score:
            scored = compared(base, runs, "score")
            row |= {"score": scored["loss"], **{f"score {key}": scored[key] for key in ("sd", "same seed", "+-")}}
        rows.append(row | {"training s": middle([run["train_ms"] / 1e3 for run in runs]),
                           "ms a step": middle([run["train_ms"] / run["steps"] for run in runs]),
                           "peak MiB": max((run["peak_train_mib"] or 0 for run in runs), default=0) or None})
    return rows


def by_group(args, done: dict[Job, dict]) -> list[dict]:
    """A row an arm that was scored by groups of sources: their mean losses."""
    scored = {name: [row["score_sources"] for row in runs] for name, runs in sets(args, done).items() if runs}
    return [{"arm": name} | {group: statistics.fmean(row[group] for row in rows) for group in rows[0]}
            for name, rows in scored.items() if rows[0]]


# ---- The command


def arm_of(text: str) -> tuple[str, Path, list[str]]:
    """(name, script, knobs) of NAME:SCRIPT,--knob=value,... ArgumentTypeError on another text."""
    found = re.fullmatch(r"([\w-]+):(.+?)((?:,--.*)?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME:SCRIPT or NAME:SCRIPT,--knob=value,...")
    name, script, knobs = found.groups()
    return name, Path(script), re.split(",(?=--)", knobs)[1:]


def parse(argv: list[str]):
    parser = make_form(__doc__)
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--arm", type=arm_of, action="append", required=True, metavar="NAME:SCRIPT[,--knob=value...]",
                        help="once for each arm; differences are to the first")
    parser.add_argument("--seeds", type=numbers, default=[1], metavar="1,2,...", help="of every arm")
    parser.add_argument("--gpus", type=numbers, metavar="0,1,...", help="to use; default all")
    parser.add_argument("--until", type=float, default=math.inf, metavar="SECONDS", help="after which no run starts")
    parser.add_argument("--score", type=Path, metavar="DIR", help="folder on whose validation stream to score as well")
    parser.add_argument("--groups", type=Path, metavar="FILE", help="of the score's sources, as for score.py")
    parser.add_argument("--worker", nargs=2, metavar=("GPU", "BEGAN"), help=argparse.SUPPRESS)
    args, common = parser.parse_known_args(argv)
    names = [name for name, *_ in args.arm]
    if len(set(names)) < len(names):
        parser.error(f"--arm: two arms have one name, of {', '.join(names)}")
    if args.groups and not args.score:
        parser.error("--groups are those of --score=DIR, which is missing")
    try:
        args.groups = read_groups(args.groups)
    except tg.Refused as refused:
        parser.error(str(refused))
    scored = f"\n--score={args.score} {json.dumps(args.groups)}" if args.score else ""
    args.seeds, args.arms = [*dict.fromkeys(args.seeds)], []
    for name, script, own in args.arm:
        given = [f"--data_dir={args.data_dir}", "--save=False", *common, *own]
        knobs = {argument.partition("=")[0]: argument for argument in given}  # a later one wins
        if "--seed" in knobs:
            parser.error(f"arm {name}: {knobs['--seed']} is no knob of an arm: give --seeds=1,2 for all of them")
        try:
            args.arms.append(Arm(name, script, script.read_bytes(), [*knobs.values()], scored))
        except OSError as error:
            parser.error(f"arm {name}: {script} cannot be read: {error.strerror}")
    args.gpu, args.began = (args.worker[0], float(args.worker[1])) if args.worker else ("", time.time())
    args.end = args.began + args.until
    return args


def refuse(args) -> None:
    """Refused 2, with one sentence, where a script, a knob or the data of an arm cannot work."""
    modules, text = {}, read_text(args.score, args.groups) if args.score else None
    for arm in args.arms:
        try:
            module = modules[arm.source] = modules.get(arm.source) or load_script(arm.script)
            hp = module.parse_overrides(arm.knobs)
            module.check(hp, 1)
            tg.require(hasattr(module, "train_once"), f"{arm.script} lacks train_once, which trains again and again")
            own = module.load_corpus(hp, thorough=False).encoding
            tg.require(not text or own == text.encoding, f"it trains on {own}, and --score={args.score} is of another")
        except Exception as error:
            if not hasattr(error, "code"):
                raise
            raise tg.Refused(2, f"arm {arm.name}: {error}") from error


def forget_failures() -> None:
    """They are tried again, and no worker is at work."""
    STATE.mkdir(parents=True, exist_ok=True)
    for claimed in STATE.glob("*.job"):
        claimed.unlink()
    kept = [json.dumps(row) + "\n" for row in every_result() if row["val_loss"] is not None]
    (STATE / "results.jsonl").write_text("".join(kept), encoding="utf-8")


def devices(args) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be for each worker. Refused 2 for a GPU that is not there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    for gpu in args.gpus or ():
        tg.require(gpu < count, f"--gpus={gpu} is not there: {count} GPUs are, numbered from 0")
    chosen = args.gpus or range(count)
    return [visible[i] if i < len(visible) and visible[i] else str(i) for i in chosen] or [""]


def start(args, argv: list[str]) -> list[int]:
    """A worker a GPU, until all have ended: their exit codes."""
    gpus, workers = devices(args), {}
    try:
        for gpu in gpus:
            command = [sys.executable, __file__, *argv, "--worker", gpu, str(args.began)]
            surroundings = environment(len(gpus)) | dict(CUDA_VISIBLE_DEVICES=gpu)
            with open(STATE / f"worker_{gpu}.txt", "w") as output:
                workers[gpu] = subprocess.Popen(command, env=surroundings, stdout=output)
        return [worker.wait() for worker in workers.values()]
    finally:  # where a signal ended the wait
        for worker in workers.values():
            worker.terminate()
            worker.wait()


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.worker:
        return work(args) or 0
    try:
        refuse(args)
        devices(args)
    except tg.Refused as refused:
        print(f"arms: {refused}", file=sys.stderr)
        return refused.code
    for number in (signal.SIGTERM, signal.SIGINT):  # so that `start` ends the workers
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    forget_failures()
    codes = start(args, argv)
    done = results(args)
    print(f"workers ended with {codes} after {time.time() - args.began:.0f} s")
    print(table(summary(args, done)))
    if args.score and (rows := by_group(args, done)):
        print(f"mean scores by group\n{table(rows)}")
    for arm in args.arms:
        print(f"{arm.name}:", *(row["run_id"] for job, row in done.items() if job.name == arm.name and "run_id" in row))
    missing = [job for job in jobs(args) if done.get(job, {}).get("val_loss") is None]
    if missing:
        print("missing:", ", ".join(f"{job.name} seed {job.seed}" for job in missing), file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
