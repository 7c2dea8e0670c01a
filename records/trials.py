"""Sets of runs: their statistics, comparing and drawing them, importing the public speedrun's logs, and running more.

`rerun` and `trial` are the only commands that execute anything: what `./run.sh script --knob=value` would start.
"""

import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runs import (
    ID,
    PLACES,
    RECORDS,
    SPEEDRUN_LOG,
    Bad,
    Run,
    check_run,
    read_bytes,
    read_record,
    read_run,
    read_speedrun,
    read_tracks,
    safe,
)

ROOT, LOGS = RECORDS.parent, RECORDS.parent / "logs"

class Undecided(Exception):
    """Exit code 3: more runs, or scipy, are needed."""

# ---- Statistics

def distributions():
    try:
        from scipy import stats
    except ImportError:
        raise Undecided("unchecked: scipy missing") from None
    return stats

def p_below(losses: list[float], target: float) -> float | None:
    """One-sided t-test: how likely a mean this far below `target` is if the true mean lies at it."""
    if len(set(losses)) < 2:
        return None
    return float(distributions().ttest_1samp(losses, target, alternative="less").pvalue)

def welch(a: list[float], b: list[float]) -> tuple[float, float, float, float] | None:
    """(mean b - mean a, low, high, p): the 95 % interval and two-sided p of Welch's t-test; None below two each."""
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    test = distributions().ttest_ind(b, a, equal_var=False)
    interval = test.confidence_interval(0.95)
    return statistics.fmean(b) - statistics.fmean(a), float(interval.low), float(interval.high), float(test.pvalue)

def prediction(losses: list[float]) -> tuple[float, float]:
    """(mean, half width) of the interval that holds the loss of one new run with 95 %."""
    if len(losses) < 2:
        raise Undecided("an interval needs 2 runs at least, and there is 1")
    t = float(distributions().t.ppf(0.975, len(losses) - 1))
    return statistics.fmean(losses), t * statistics.stdev(losses) * math.sqrt(1 + 1 / len(losses))

def runs_needed(a: list[float], b: list[float]) -> int:
    """Runs of each at which this difference, if it is true, would be two standard errors; at least 2."""
    difference, variance = statistics.fmean(b) - statistics.fmean(a), statistics.variance(a) + statistics.variance(b)
    return max(2, math.ceil(4 * variance / difference**2)) if difference else 10**6

def spread(values: list[float], digits: str = ".4f") -> str:
    sd = f"sd {statistics.stdev(values):{digits}}, " if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}} ({sd}n = {len(values)})"

# ---- Sets

@dataclass
class Set:
    """Runs of one recipe that differ by their seed alone."""
    label: str
    runs: list[Run]
    script: bytes | None

    losses = property(lambda self: [run.val_loss for run in self.runs])
    times = property(lambda self: [run.train_ms for run in self.runs])

def runs_at(path: Path) -> list[Run]:
    """All runs of a record, a run folder, a folder of either kind of run, or one log of the public speedrun."""
    if (path / "meta.json").exists():
        return read_record(path).sets["runs"]
    if path.is_file():
        return [read_speedrun(path)]
    if (path / "metrics.jsonl").exists():
        return [read_run(path)]
    inside = sorted(path.glob("*"))
    ours, others = [p for p in inside if ID.fullmatch(p.name)], [p for p in inside if p.suffix == ".txt"]
    return [*map(read_run, ours), *map(read_speedrun, others)]

def load(text: str) -> Set:
    """The set that a name, a path or a list of these with commas stands for. Bad unless it has one recipe."""
    found, script = [], None
    for name in text.split(","):
        path = next((p for p in (Path(name), RECORDS / name, LOGS / name, ROOT / "peers" / name) if p.exists()), None)
        if path is None:
            raise Bad("path", f"there is no record, run or log {safe(name)}")
        found += runs_at(path)
        if (path / "train_gpt.py").exists():
            script = read_bytes(path / "train_gpt.py", SPEEDRUN_LOG)
    runs = [run for run in found if run.complete]
    recipes = {run.recipe for run in runs}
    if len(recipes) != 1:
        raise Bad("knobs", f"{safe(text)} holds {len(found)} runs, {len(runs)} of them complete, of {len(recipes)} "
                           "recipes (script and knobs): name the runs of one")
    for problem in (p for run in runs if run.start for p in check_run(run)):
        raise Bad(*problem)
    return Set(safe(text.rstrip("/").rpartition("/")[2], 40), runs, runs[0].script or script)

def diff(a: bytes | None, b: bytes | None, names: tuple[str, str], limit: int = 300) -> list[str]:
    texts = [(script or b"").decode("utf-8", "replace").split("\n") for script in (a, b)]
    lines = [safe(line) for line in difflib.unified_diff(*texts, *names, lineterm="", n=2)]
    more = [f"... and {len(lines) - limit} lines more"] if len(lines) > limit else []
    return lines[:limit] + more or ["scripts: the same"]

def describe(s: Set) -> str:
    peaks, pace = [run.peak_mib for run in s.runs if run.peak_mib], [run.train_ms / run.total for run in s.runs]
    seconds = [t / 1e3 for t in s.times]
    return (f"{s.label}: loss {spread(s.losses)}; {s.runs[0].total} steps in {spread(seconds, '.2f')} s, "
            f"{spread(pace, '.2f')} ms a step; peak {max(peaks) if peaks else 'n/a'} MiB; "
            f"{s.runs[0].gpu_count or ''} {safe(s.runs[0].gpu or 'CPU')}")

def compare_sets(a: Set, b: Set) -> tuple[list[str], int]:
    """(report, exit code): 0 where a difference of the losses is established, 3 where more runs are needed."""
    first, other, lines = a.runs[0], b.runs[0], []
    if None in (first.val_sha256, other.val_sha256):
        lines.append("note: public logs do not name their validation tokens; losses compare only if they were the same")
    elif first.val_sha256 != other.val_sha256:
        raise Bad("data", f"{a.label} was validated on the tokens {first.val_sha256[:12]} and {b.label} on "
                          f"{other.val_sha256[:12]}: their losses cannot be compared")
    knobs = [json.loads(run.recipe[1]) for run in (first, other)]
    moved = [f"{k} {knobs[0].get(k)} -> {knobs[1].get(k)}" for k in sorted(knobs[0].keys() | knobs[1].keys())
             if knobs[0].get(k) != knobs[1].get(k)]
    lines += [f"changed knobs: {safe(', '.join(moved)) or 'none'}", describe(a), describe(b)]
    machines = {json.dumps([r.gpu, r.gpu_count, r.start.get("torch"), r.start.get("driver")]) for r in a.runs + b.runs}
    if len(machines) > 1:
        lines.append(f"note: not one kind of machine, so the times say little: {safe(' and '.join(sorted(machines)))}")
    gap, pace = welch(a.losses, b.losses), statistics.median(b.times) / statistics.median(a.times)
    if gap is None:
        return [*lines, "not decidable: an interval needs at least 2 runs of each, with distinct seeds"], 3
    lines.append(f"loss, {b.label} - {a.label}: {gap[0]:+.4f}, 95 % interval {gap[1]:+.4f} to {gap[2]:+.4f} (Welch), "
                 f"p = {gap[3]:.2g}")
    if not gap[1] <= 0 <= gap[2]:
        return [*lines, f"no time at equal loss, since the losses at the ends differ; the schedules have {first.total} "
                        f"and {other.total} steps ({other.total - first.total:+d}), and the time is x {pace:.3f}"], 0
    need = runs_needed(a.losses, b.losses)
    return [*lines, f"time at equal loss, between ends of complete schedules: x {pace:.3f}",
            f"the losses are not separated: if {abs(gap[0]):.4f} is the true difference, 2 standard errors take {need} "
            f"runs of each, {max(0, need - min(len(a.runs), len(b.runs)))} more"], 3

def compare(args) -> int:
    a, b = load(args.a), load(args.b)
    lines, code = compare_sets(a, b)
    print(*diff(a.script, b.script, (a.label, b.label)), *lines, sep="\n")
    return code

def draw(axis, column: int, scale: float, s: Set, color: str, lift: int, dense: bool) -> list[float]:
    """One set on one axis; returns the means that the axis must show."""
    points = [run.steps if dense else run.vals for run in s.runs]
    xs, ys = ([[p[i] / k if p[i] is not None else math.nan for p in curve] for curve in points]
              for i, k in ((column, scale), (2, 1)))
    for x, y in zip(xs, ys):
        axis.plot(x, y, color=color, lw=0.4, alpha=0.6)
    x, columns = [statistics.fmean(v) for v in zip(*xs)], list(zip(*ys))
    mean, sd = [statistics.fmean(v) for v in columns], [statistics.pstdev(v) for v in columns]
    axis.plot(x, mean, color=color, lw=1.4)
    axis.fill_between(x, *([m + k * d for m, d in zip(mean, sd)] for k in (-1, 1)), color=color, alpha=0.25, lw=0)
    ends = [(run.vals[-1][column] or 0) / scale for run in s.runs]
    axis.plot(ends, s.losses, "o", color=color, ms=3, mfc="none")
    axis.annotate(f"{s.label}\n{spread(s.losses)}", (min(ends), max(s.losses)), xytext=(-8, 30 + lift), fontsize=7,
                  ha="right", color=color, textcoords="offset points",
                  arrowprops=dict(arrowstyle="-", lw=0.5, color=color))
    return [*mean[math.ceil(len(mean) / 8) :], *s.losses]

def plot(args) -> int:
    """Loss against training time, tokens and steps: thin lines are runs, thick ones means, bands one sd."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sets = [load(name) for name in args.sets]
    dense = all(s.runs[0].steps and len(s.runs[0].vals) < 8 for s in sets)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    hashes = {run.val_sha256 for s in sets for run in s.runs} - {None}
    targets = {t["target_loss"] for t in read_tracks().values() if t["val_sha256"] in hashes} - {None}
    columns = (3, 1e3, "training time, s"), (1, 1e6, "tokens, millions"), (0, 1, "steps")
    for axis, (column, scale, label) in zip(axes, columns):
        seen = [v for i, s in enumerate(sets) for v in draw(axis, column, scale, s, f"C{i}", 28 * i, dense)]
        low, high = min([*seen, *targets]), max(seen)
        for target in targets:
            axis.axhline(target, color="gray", lw=0.7, ls="--")
            axis.annotate(f"target {target}", (0.02, target), xycoords=("axes fraction", "data"), fontsize=7)
        axis.set(xlabel=label, ylim=(low - 0.06 * (high - low), high), xlim=(0, None))
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("training loss (circles: validation)" if dense else "validation loss")
    figure.savefig(args.out, dpi=80)
    print(f"{safe(args.out)}: {Path(args.out).stat().st_size} bytes")
    return 0

def import_logs(args) -> int:
    """Copy logs of the public speedrun into peers/<hash of their source>/, each a set for `compare` and `plot`."""
    groups = {}
    for path in (p for n in args.paths for p in (sorted(Path(n).rglob("*.txt")) if Path(n).is_dir() else [Path(n)])):
        try:
            run = read_speedrun(path)
            groups.setdefault(run.script_sha256, []).append(run)
        except Bad as bad:
            print(f"skipped: {bad}")
    for sha, found in groups.items():
        folder = ROOT / "peers" / sha[:12]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_gpt.py").write_bytes(found[0].script)
        for run in found:
            data = read_bytes(run.folder, SPEEDRUN_LOG)
            (folder / f"{hashlib.sha256(data).hexdigest()[:12]}.txt").write_bytes(data)
        whole = [run for run in found if run.complete]
        print(f"peers/{sha[:12]}: {len(found)} logs, {len(whole)} complete")
        if whole:
            print("  " + describe(Set(sha[:12], whole, None)))
    return 0 if groups else 2

# ---- Running scripts

def launch(script: Path, knobs: list[str], title: str, nproc: int = 0, python: str = "") -> Run:
    """Start what `./run.sh script knobs` starts, show its validations, and return its complete run."""
    python = python or os.environ.get("PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
    env = os.environ | dict(PYTHON=python) | (dict(NPROC=str(nproc)) if nproc else {})
    before, tail, live = set(LOGS.glob("*")), deque(maxlen=25), sys.stdout.isatty()
    print(title, flush=True)
    command = ["sh", str(ROOT / "run.sh"), str(script), *knobs]
    text = dict(encoding="utf-8", errors="replace")
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, **text) as child:
        for line in map(str.strip, child.stdout):
            tail.append(line)
            if "train_loss:" in line:
                print(f"\r  {safe(line, 70)}  ", end="", flush=True) if live else None
            elif re.match("run.sh: |step:|warning: ", line):
                print("\r" * live + f"  {safe(line, 110)}", flush=True)
    sha = hashlib.sha256(script.read_bytes()).hexdigest()
    new = [read_run(p) for p in sorted(LOGS.glob("*")) if p not in before and (p / "metrics.jsonl").exists()]
    done = [run for run in new if run.complete and run.script_sha256 == sha]
    if child.returncode in (75, 130, -2):
        raise Undecided("interrupted: the same command goes on")
    if child.returncode or not done:
        print(*(safe(line) for line in tail), sep="\n")
        raise Bad("truncated", f"{safe(script.name)} ended with exit code {child.returncode}, without a complete run")
    return done[-1]

def stream_hash(paths: list[Path], tokens: int | None = None) -> str | None:
    """SHA-256 of the first `tokens` (default all) of shards without headers, hex. None if they hold fewer."""
    digest, left = hashlib.sha256(), 2 * tokens if tokens else sum(p.stat().st_size - 1024 for p in paths)
    for path in paths:
        with open(path, "rb") as file:
            file.seek(1024)
            while left and (piece := file.read(min(left, 1 << 22))):
                digest.update(piece)
                left -= len(piece)
    return None if left or not paths else digest.hexdigest()

def find_data(data: dict, given: str | None) -> Path:
    """The folder whose shards are those of a record. Bad, with the hashes needed, if there is none."""
    embedded = ROOT / "data" / "embedded"
    if not given and data["encoding"] == "bytes" and not (embedded / "manifest.json").exists():
        python = os.environ.get("PYTHON") or sys.executable
        subprocess.run([python, ROOT / "data/tokenize_text.py", "--encoding", "bytes", "--out", embedded], check=False)
    for folder in [Path(given)] if given else sorted((ROOT / "data").glob("*/")):
        train, val = (sorted(folder.glob(f"*{name}*.bin")) for name in ("train", "val"))
        if stream_hash(val, data["val_tokens"] + 1) == data["val_sha256"] and len(train) == len(data["train"]):
            if all(f["sha256"] in (None, stream_hash([path])) for f, path in zip(data["train"], train)):
                return folder
    where = f"{safe(given, 100)} does not hold" if given else "no folder in data/ holds"
    shards = ", ".join(f"{f['tokens']} tokens {(f['sha256'] or 'of any hash')[:12]}" for f in data["train"])
    raise Bad("data", f"{where} the record's data: val_sha256 {data['val_sha256']} over the first {data['val_tokens']} "
                      f"+ 1 validation tokens, and training shards of {shards}; --data names a folder")

PROBE = """import json, platform, torch
gpu = torch.cuda.is_available()
print(json.dumps(dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                      gpu=torch.cuda.get_device_name() if gpu else None)))"""

def differences(meta: dict, python: str) -> list[str]:
    """What is not now as it was then."""
    answer = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if answer.returncode:
        raise Bad("path", f"{python} has no torch: ./run.sh installs one, and PYTHON names another interpreter")
    now, then = json.loads(answer.stdout), meta["hardware"] | meta["software"]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        now["driver"] = (subprocess.run(query, capture_output=True, text=True).stdout.split() or [None])[0]
    return [f"  {key}: {safe(then[key], 60)} then, {safe(now[key], 60)} now" for key in now if now[key] != then[key]]

def isolated(meta: dict) -> str:
    """The interpreter of a virtual environment with the recorded versions, made at the first call."""
    folder = ROOT / ".cache" / "rerun" / meta["name"]
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = [f"{name}=={version}" for name, version in meta["software"]["packages"].items()]
        odd = [w for w in wanted if not re.fullmatch("[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", w)]
        if odd or subprocess.run([str(python), "-m", "pip", "install", *wanted]).returncode:
            shutil.rmtree(folder)
            raise Bad("path", f"the recorded versions could not be installed: {safe(odd or wanted, 200)}")
    return str(python)

def flags(knobs: dict) -> list[str]:
    return [f"--{name}={value}".replace(" ", "") for name, value in knobs.items()]

def rerun(args, verify: Callable) -> int:
    """Run a record's own script as it was, after asking; then compare the new run with the recorded ones."""
    if verify([args.name]):
        return 1
    record = read_record(RECORDS / args.name)
    meta, runs = record.meta, record.sets["runs"]
    if meta["parent"] and (RECORDS / meta["parent"]).is_dir():
        parent = read_record(RECORDS / meta["parent"])
        print(*diff(parent.script, record.script, (meta["parent"], meta["name"])), sep="\n")
    else:
        print(f"scripts: no parent here to show a diff to; all of it is records/{meta['name']}/train_gpt.py")
    data, taken = find_data(meta["data"], args.data), {run.seed: run for run in runs}
    seed = args.seed if args.seed is not None else next(s for s in range(1, 10**6) if s not in taken)
    python = os.environ.get("PYTHON") or sys.executable
    odd = [f"  versions: as recorded, in {ROOT.name}/.cache/rerun"] if args.venv else differences(meta, python)
    print("differences:", *(odd or ["  none"]), sep="\n")
    minutes = statistics.median(run.end["wall_s"] for run in runs) / 60
    print(f"data: {safe(data.name)}, the same; seed {seed}; a recorded run took {minutes:.1f} minutes")
    if not args.yes and input("run this script on your machine? [y/N] ").strip().lower() != "y":
        return 2
    python = isolated(meta) if args.venv else python
    keep = dict(save=False) if "save" in runs[0].start["knobs"] else {}
    knobs = flags(meta["changed"] | dict(seed=seed, preset="80gb", data_dir=data.resolve(), **keep))
    title, nproc = f"rerun of {args.name}, seed {seed}", args.nproc or meta["world_size"]
    new = launch(record.folder / "train_gpt.py", knobs, title, nproc, python)
    kept = LOGS / "reruns" / args.name / new.name  # not among the runs that a record could have left out
    kept.parent.mkdir(parents=True, exist_ok=True)
    new.folder.rename(kept)
    losses, times = [run.val_loss for run in runs], [run.train_ms for run in runs]
    (mean, half), sd = prediction(losses), statistics.stdev(losses)
    if seed in taken:
        mean, half = taken[seed].val_loss, 3 * sd
    inside = abs(new.val_loss - mean) <= half
    what = f"3 sd of run {taken[seed].name}" if seed in taken else f"the 95 % prediction interval of {len(runs)} runs"
    print(f"loss {new.val_loss:.6f}, {'inside' if inside else 'OUTSIDE'} {what}: {mean:.6f} +- {half:.6f}")
    print(f"training time {new.train_ms:.0f} ms, x {new.train_ms / statistics.median(times):.3f} of the recorded median; "
          f"kept in {kept.relative_to(ROOT)}")
    return 0 if inside else 1

def already(sha: str, knobs: list[str], seed: int) -> Run | None:
    """A complete run in logs/ of this script with these arguments, what run.sh adds aside."""
    places = {f"--{name}" for name in PLACES}
    split = [knob.partition("=") for knob in knobs]
    wanted = {f"{name}={Path(value).name if name in places else value}" for name, _, value in split}
    added = ("--preset=", "--data_dir=", "--bpe_file=", "--save=", "--seed=")
    for folder in sorted(LOGS.glob("*"), reverse=True):
        try:
            run = read_run(folder)
        except Bad:
            continue
        extra = set(run.start["argv"]) - wanted
        if (run.complete and (run.script_sha256, run.seed) == (sha, seed) and wanted <= set(run.start["argv"])
                and all(knob.startswith(added) for knob in extra)):
            return run
    return None

def sentence(a: Set, b: Set) -> str:
    """Whether B helped, by how much, and how sure."""
    gap, pace = welch(a.losses, b.losses), welch(a.times, b.times)
    time_ = f"; its training time is x {statistics.fmean(b.times) / statistics.fmean(a.times):.3f}" + (
        f" (95 % interval x {1 + pace[1] / statistics.fmean(a.times):.3f} to "
        f"{1 + pace[2] / statistics.fmean(a.times):.3f})" if pace else "")
    if gap is None:
        return "One run of each says nothing about a difference: take --runs 3 or more" + time_ + "."
    sure = f"95 % interval {gap[1]:+.4f} to {gap[2]:+.4f}, n = {len(a.runs)} and {len(b.runs)}, p = {gap[3]:.2g}"
    if gap[1] <= 0 <= gap[2]:
        return (f"{b.label} shows no effect on the loss that could be told from noise: {gap[0]:+.4f} ({sure}); "
                f"{runs_needed(a.losses, b.losses)} runs of each would tell if that were its true size{time_}.")
    return f"{b.label} {'helped' if gap[0] < 0 else 'hurt'}: its loss is {gap[0]:+.4f} ({sure}){time_}."

def noise_floor(a: Set, b: Set) -> str:
    pooled, times = math.sqrt((statistics.variance(a.losses) + statistics.variance(b.losses)) / 2), a.times + b.times
    gap, noise = statistics.fmean(b.losses) - statistics.fmean(a.losses), 2 * pooled * math.sqrt(2 / len(a.runs))
    return (f"Noise floor: one recipe differs from itself by {gap:+.4f}; a run's loss has sd {pooled:.4f}, its time sd "
            f"{100 * statistics.stdev(times) / statistics.fmean(times):.2f} %. With {len(a.runs)} runs of each, two "
            f"standard errors of a loss difference are {noise:.4f}: what is smaller cannot be told from noise.")

def trial(args, knobs: list[str]) -> int:
    """Both arms in turn with the same seeds, on this machine and data; what logs/ already holds is not run again."""
    distributions()  # before hours of training, not after
    scripts, own = [Path(args.a).resolve(), Path(args.b).resolve()], []
    for script in scripts:
        if not script.is_file() or script.suffix != ".py":
            raise Bad("path", f"there is no script {safe(script.name)}")
    for arm in ("a", "b"):
        mine = [f"--{k[4:]}" for k in knobs if k.startswith(f"--{arm}.")]
        own.append([k for k in knobs if not re.match(r"--[ab]\.", k)] + mine)
    odd = [k for k in knobs if not re.fullmatch(r"--([ab]\.)?\w+=.*", k, re.A | re.S) or k.startswith("--seed=")]
    if odd or args.runs < 1:
        raise Bad("knobs", f"{safe(odd[0]) if odd else '--runs'} cannot be used: knobs are --knob=value for both arms, "
                           "--a.knob=value or --b.knob=value for one; the seeds are 1 to --runs, 1 at least")
    sources = [hashlib.sha256(script.read_bytes()).hexdigest() for script in scripts]
    floor = sources[0] == sources[1] and sorted(own[0]) == sorted(own[1])
    plan = [(arm, seed + floor * arm * args.runs) for seed in range(1, args.runs + 1) for arm in (0, 1)]
    labels = [" ".join([script.name, *(k for k in own[i] if k not in own[1 - i])]) for i, script in enumerate(scripts)]
    if labels[0] == labels[1]:
        labels = [label + tag for label, tag in zip(labels, (" (A)", " (B)"))]
    done = {(arm, seed): already(sources[arm], own[arm], seed) for arm, seed in plan}
    spent, todo = [], [key for key, run in done.items() if run is None]
    for (arm, seed), run in done.items():
        if run:
            print(f"already in logs/: {labels[arm]}, seed {seed}: {run.name}")
    for count, (arm, seed) in enumerate(todo):
        left = f", about {statistics.fmean(spent) * (len(todo) - count) / 60:.1f} minutes left" if spent else ""
        began, save = time.monotonic(), [] if any(k.startswith("--save=") for k in own[arm]) else ["--save=False"]
        title = f"run {len(plan) - len(todo) + count + 1} of {len(plan)}: {labels[arm]}, seed {seed}{left}"
        done[arm, seed] = launch(scripts[arm], [*own[arm], *save, f"--seed={seed}"], title)
        spent.append(time.monotonic() - began)
    sets = [[run for (arm, _), run in done.items() if arm == i] for i in (0, 1)]
    a, b = (Set(label, runs, script.read_bytes()) for label, runs, script in zip(labels, sets, scripts))
    lines, code = compare_sets(a, b)
    print(*diff(a.script, b.script, (a.label, b.label)), *lines, sep="\n")
    if floor:
        print(noise_floor(a, b) if args.runs > 1 else sentence(a, b))
        return 0 if args.runs > 1 else 3
    print(sentence(a, b))
    return code
