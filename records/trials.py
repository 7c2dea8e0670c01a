"""Running scripts: `rerun` a record, and `trial`, two scripts in turn. No other command executes anything.

Both start what `./run.sh script --knob=value` would start.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from runs import LIMITS, PLACES, RECORDS, Bad, Run, read_bytes, read_record, safe, script_knobs
from sets import (
    LOGS,
    ROOT,
    Set,
    Undecided,
    compare_sets,
    complete_runs,
    describe,
    diff,
    distributions,
    find_record,
    losses,
    prediction,
    times,
    welch,
)

# ---- Starting a script, and finding its run

def runs_of(runs: list[Run], sha: str, knobs: list[str], seed: int) -> list[Run]:
    """Those of this script, seed and arguments, what run.sh adds aside."""
    places, split = {f"--{name}" for name in PLACES}, [knob.partition("=") for knob in knobs]
    wanted = {f"{name}={Path(value).name if name in places else value}" for name, _, value in split}
    added, given = ("--preset=", "--data_dir=", "--bpe_file=", "--save=", "--seed="), lambda run: set(run.start["argv"])
    return [run for run in runs if (run.script_sha256, run.seed) == (sha, seed) and wanted <= given(run)
            and all(argument.startswith(added) for argument in given(run) - wanted)]

def launch(script: Path, knobs: list[str], seed: int, title: str, nproc: int = 0, python: str = "") -> Run:
    """Start `./run.sh script knobs --seed`, show its validations, and return its complete run."""
    python = python or os.environ.get("PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
    env = os.environ | dict(PYTHON=python) | (dict(NPROC=str(nproc)) if nproc else {})
    before, tail, live = set(LOGS.glob("*")), deque(maxlen=25), sys.stdout.isatty()
    print(title, flush=True)
    command = ["sh", str(ROOT / "run.sh"), str(script), *knobs, f"--seed={seed}"]
    text = dict(encoding="utf-8", errors="replace")
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, **text) as child:
        try:
            for line in map(str.strip, child.stdout):
                tail.append(line)
                if "train_loss:" in line:
                    print(f"\r  {safe(line, 70)}  ", end="", flush=True) if live else None
                elif re.match("run.sh: |step:|warning: ", line):
                    print("\r" * live + f"  {safe(line, 110)}", flush=True)
        except BaseException as error:  # an interrupt ends the training too: it must not go on without us
            with contextlib.suppress(BaseException):
                child.send_signal(signal.SIGTERM)
                deque(child.stdout, 0)  # to its end: else its last words would break its pipe
            child.kill()
            if not isinstance(error, KeyboardInterrupt):
                raise
    if child.returncode in (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL):
        raise Undecided("stopped in this run, which will start again; finished runs are kept: give the same command")
    sha = hashlib.sha256(script.read_bytes()).hexdigest()
    new = runs_of(complete_runs(set(LOGS.glob("*")) - before), sha, knobs, seed)
    if child.returncode or not new:
        if child.returncode != 2:  # which comes with one sentence, on the standard error
            print(*map(safe, tail), sep="\n")
        why = " (its loss is not finite)" if child.returncode == 3 else ""
        raise Bad("truncated", f"{safe(script.name)} ended with exit code {child.returncode}{why}: no complete run")
    return new[-1]

# ---- rerun

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

def find_data(data: dict, given: str | None, python: str) -> Path:
    """The folder whose shards are those of a record. Bad, with the hashes needed, if there is none."""
    embedded = ROOT / "data" / "embedded"
    if not given and data["encoding"] == "bytes" and not (embedded / "manifest.json").exists():
        subprocess.run([python, ROOT / "data/tokenize_text.py", "--encoding", "bytes", "--out", embedded], check=False)
    for folder in [Path(given)] if given else sorted((ROOT / "data").glob("*/")):
        train, val = (sorted(folder.glob(f"*{name}*.bin")) for name in ("train", "val"))
        if stream_hash(val, data["val_tokens"] + 1) == data["val_sha256"] and len(train) >= len(data["train"]):
            if all(f["sha256"] is None or f["sha256"] == stream_hash([p]) for f, p in zip(data["train"], train)):
                return folder  # further shards come after those that were read
    where = f"{safe(given, 100)} does not hold" if given else "no folder in data/ holds"
    shards = ", ".join(f"{f['tokens']} tokens {(f['sha256'] or 'of any hash')[:12]}" for f in data["train"])
    raise Bad("data", f"{where} the record's data: val_sha256 {data['val_sha256']} over the first {data['val_tokens']} "
                      f"+ 1 validation tokens, and training shards of {shards}; --data names a folder")

PROBE = """import json, platform, torch
gpu = torch.cuda.is_available()
print(json.dumps(dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
                      gpu=torch.cuda.get_device_name() if gpu else None, count=torch.cuda.device_count())))"""

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
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)])
        wanted = [f"{name}=={version}" for name, version in meta["software"]["packages"].items()]
        odd = [w for w in wanted if not re.fullmatch("[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", w)]
        if odd or subprocess.run([str(python), "-m", "pip", "install", *wanted]).returncode:
            raise Bad("path", f"the recorded versions could not be installed: {safe(odd or wanted, 200)}")
        (folder / "complete").touch()
    return str(python)

def flags(knobs: dict) -> list[str]:
    """Arguments that give these values; a list loses its spaces, a path keeps them."""
    shown = lambda value: str(value).replace(" ", "") if isinstance(value, list) else str(value)
    return [f"--{name}={shown(value)}" for name, value in knobs.items()]

def rerun(args, verify: Callable) -> int:
    """Run a record's own script as it was, after asking; then compare the new run with the recorded ones."""
    code = verify([args.name])
    if code:
        return code
    record = read_record(find_record(args.name))
    meta, runs = record.meta, record.sets["runs"]
    (mean, half), sd = prediction(losses(runs)), statistics.stdev(losses(runs))
    nproc, python = args.nproc or meta["world_size"], os.environ.get("PYTHON") or sys.executable
    if meta["parent"] and (RECORDS / meta["parent"]).is_dir():
        parent = read_record(RECORDS / meta["parent"])
        print(*diff(parent.script, record.script, (meta["parent"], meta["name"])), sep="\n")
    else:
        print(f"scripts: no parent here to show a diff to; all of it is records/{meta['name']}/train_gpt.py")
    data, taken = find_data(meta["data"], args.data, python), {run.seed: run for run in runs}
    seed = args.seed if args.seed is not None else next(s for s in range(1, 10**6) if s not in taken)
    odd = [f"  versions: as recorded, in {ROOT.name}/.cache/rerun"] if args.venv else differences(meta, python)
    print("then and now (Python, torch, CUDA, GPU, driver):", *(odd or ["  the same"]), sep="\n")
    minutes = statistics.median(run.end["wall_s"] for run in runs) / 60
    print(f"data: {safe(data.name)}, the same; seed {seed}; {nproc} processes; a recorded run took "
          f"{minutes:.1f} minutes on its machine")
    try:
        if not args.yes and input("run this script on your machine? [y/N] ").strip().lower() != "y":
            raise EOFError
    except EOFError:
        print("not run")
        return 2
    python = isolated(meta) if args.venv else python
    own = runs[0].start["knobs"]
    # batches are given in one form: a script refuses both
    unused = (*PLACES, "seed", *(("train_seq_len", "sequences_per_step") if own.get("batch_stages") else ()))
    recorded = {k: v for k, v in own.items() if k not in unused and v != ""}
    keep = dict(save=False) if "save" in own else {}
    knobs = flags(recorded | keep | dict(preset="80gb", data_dir=data.resolve()))
    title = f"rerun of {record.folder.name}, seed {seed}"
    new = launch(record.folder / "train_gpt.py", knobs, seed, title, nproc, python)
    kept = LOGS / "reruns" / record.folder.name / new.name  # not among the runs that a record could have left out
    kept.parent.mkdir(parents=True, exist_ok=True)
    new.folder.rename(kept)
    if seed in taken:
        mean, half = taken[seed].val_loss, 3 * sd
    inside = abs(new.val_loss - mean) <= half
    what = f"3 sd of run {taken[seed].name}" if seed in taken else f"the 95 % prediction interval of {len(runs)} runs"
    print(f"loss {new.val_loss:.6f}, {'inside' if inside else 'OUTSIDE'} {what}: {mean:.6f} +- {half:.6f}")
    other = "" if new.hardware() == runs[0].hardware() else " (other hardware: not to be compared)"
    pace = new.train_ms / statistics.median(times(runs))
    print(f"training time {new.train_ms:.0f} ms, x {pace:.3f} of the recorded median{other}; "
          f"kept in {kept.relative_to(ROOT)}")
    return 0 if inside else 1

# ---- trial

def sentence(a: Set, b: Set) -> str:
    """Whether B helped, by how much, and how sure."""
    gap, pace, mean = welch(a.losses, b.losses), welch(a.times, b.times), statistics.fmean(a.times)
    if gap is None:
        return "One run of each says nothing about a difference: take --runs 3 or more."
    time_ = f"its training time is x {statistics.fmean(b.times) / mean:.3f}" if mean else "no time was measured"
    if pace and mean and (pace[2] - pace[1]) / mean < 0.4:
        time_ += f" (95 % interval x {1 + pace[1] / mean:.3f} to {1 + pace[2] / mean:.3f})"
    elif pace and mean:
        time_ += ", but the times scatter too much to say (did other programs run?)"
    sure = f"95 % interval {gap[1]:+.4f} to {gap[2]:+.4f}, n = {len(a.runs)} and {len(b.runs)}, p = {gap[3]:.2g}"
    if gap[1] <= 0 <= gap[2]:
        return f"{b.label}: no effect on the loss that could be told from noise, {gap[0]:+.4f} ({sure}); {time_}."
    return f"{b.label} {'helped' if gap[0] < 0 else 'hurt'}: its loss is {gap[0]:+.4f} ({sure}); {time_}."

def noise_floor(a: Set, b: Set) -> str:
    gap, times = statistics.fmean(b.losses) - statistics.fmean(a.losses), a.times + b.times
    pooled = math.sqrt((statistics.variance(a.losses) + statistics.variance(b.losses)) / 2)
    noise, jitter = 2 * pooled * math.sqrt(2 / len(a.runs)), 100 * statistics.stdev(times) / statistics.fmean(times)
    return (f"Noise floor: with {len(a.runs)} runs of each, loss differences below {noise:.4f} (two standard errors) "
            f"are within the noise. A run's loss has sd {pooled:.4f}, its time {jitter:.2f} %; these two sets of one "
            f"recipe differ by {gap:+.4f}.")

def context(run: Run) -> str:
    """What all runs of a trial share: the machine, versions, data, and what run.sh chose."""
    preset = sorted(argument for argument in run.start["argv"] if argument.startswith("--preset="))
    return json.dumps([run.hardware(), run.software(), run.start["data"], run.start["world_size"], preset])

def freeze(name: str) -> tuple[Path, bytes]:
    """A copy of the script as it is now: it may be edited while the trial runs."""
    path = Path(name).resolve()
    if path.suffix != ".py":
        raise Bad("path", f"{safe(name, 80)} is no script: its name does not end in .py")
    source = read_bytes(path, LIMITS["train_gpt.py"])
    try:
        compile(source, path.name, "exec")  # which runs nothing
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Bad("script", f"{safe(path.name, 80)} is no Python that can be compiled: {error}") from None
    copy = ROOT / ".cache" / "trial" / hashlib.sha256(source).hexdigest()[:12] / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(source)
    return copy, source

def arms_of(args, knobs: list[str]) -> list[list[str]]:
    """The knobs of both arms."""
    for knob in knobs:
        if not re.fullmatch(r"--([ab]\.)?\w+=.*", knob, re.A | re.S):
            raise Bad("knobs", f"{safe(knob, 80)} is not --runs N, nor --knob=value for both scripts, --a.knob=value "
                               "or --b.knob=value for one")
        if re.match(r"--([ab]\.)?seed=", knob):
            raise Bad("knobs", f"{safe(knob, 80)}: trial chooses the seeds itself, 1 to --runs")
    if args.runs < 1:
        raise Bad("knobs", f"--runs {args.runs} is not 1 or more")
    common = [k for k in knobs if not re.match(r"--[ab]\.", k)]
    return [common + [f"--{k[4:]}" for k in knobs if k.startswith(f"--{arm}.")] for arm in "ab"]

def unsaved(knobs: list[str], source: bytes) -> list[str]:
    """The argument by which a run keeps no weights, and so is not sampled: nothing for a script without that knob."""
    given = any(knob.startswith("--save=") for knob in knobs)
    return ["--save=False"] if "save" in script_knobs(source) and not given else []

def trial(args, knobs: list[str]) -> int:
    """Both arms in turn with the same seeds, on this machine and data; what logs/ already holds is not run again."""
    distributions()  # before hours of training, not after
    own, scripts = arms_of(args, knobs), [freeze(args.a), freeze(args.b)]
    sources = [hashlib.sha256(source).hexdigest() for _, source in scripts]
    floor = sources[0] == sources[1] and sorted(own[0]) == sorted(own[1])
    # B A A B: an error in B shows first, and a drift of the machine hits both alike
    turns = [(arm, seed) for seed in range(1, args.runs + 1) for arm in ((1, 0) if seed % 2 else (0, 1))]
    plan = [(arm, seed + args.runs if floor and arm else seed) for arm, seed in turns]  # A A: other seeds, else B is A
    labels = [" ".join([path.name, *(k for k in own[i] if k not in own[1 - i])]) for i, (path, _) in enumerate(scripts)]
    if labels[0] == labels[1]:
        labels = [label + tag for label, tag in zip(labels, (" (A)", " (B)"))]
    logged = complete_runs(LOGS.glob("*"))
    done = {key: found[-1] for key in plan if (found := runs_of(logged, sources[key[0]], own[key[0]], key[1]))}
    newest, spent = max(done.values(), key=lambda run: run.name, default=None), []
    done = {key: run for key, run in done.items() if context(run) == context(newest)}
    for (arm, seed), run in done.items():
        print(f"already in logs/: {labels[arm]}, seed {seed}: {run.name}")
    while todo := [key for key in plan if key not in done]:
        arm, seed = todo[0]
        left = f", about {statistics.fmean(spent) * len(todo) / 60:.1f} minutes left" if spent else ""
        began, save = time.monotonic(), unsaved(own[arm], scripts[arm][1])
        title = f"run {len(plan) - len(todo) + 1} of {len(plan)}: {labels[arm]}, seed {seed}{left}"
        new = launch(scripts[arm][0], [*own[arm], *save], seed, title)
        for key, run in [*done.items()]:
            if context(run) != context(new):
                print(f"not counted, since machine, data, versions or preset differ now: {run.name}")
                del done[key]
        done[arm, seed] = new
        spent.append(time.monotonic() - began)
    a, b = (Set(labels[i], [done[key] for key in sorted(plan) if key[0] == i], scripts[i][1]) for i in (0, 1))
    if any(len({run.recipe for run in s.runs}) > 1 for s in (a, b)):
        raise Bad("knobs", "the runs of an arm differ in more than their seeds: give --preset and --steps by name")
    if floor and args.runs > 1:
        print(describe(a), describe(b), noise_floor(a, b), sep="\n")
        return 0
    lines, code = compare_sets(a, b)
    print(*diff(a.script, b.script, (a.label, b.label)), *lines, sentence(a, b), sep="\n")
    return code
