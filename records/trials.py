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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from decide import LEVEL, Undecided, distributions, prediction, rule
from runs import (
    PLACES,
    RECORDS,
    UNREADABLE,
    Bad,
    Run,
    defined_in,
    read_bytes,
    read_record,
    read_run,
    safe,
    script_knobs,
)
from seeds import MARK
from sets import (
    LOGS,
    ROOT,
    Set,
    compare_sets,
    complete_runs,
    describe,
    diff,
    find_record,
    library_notes,
    losses,
    parent_of,
    runs_in,
    times,
)

# ---- Starting a script, and finding its runs

GRACE = 60  # seconds that a training has to end when it is told to

KEPT = {"Hyperparameters", "train_once", "machine"}  # what a script must have for its seeds to share a process

class Arm:
    """One side of a trial, or a rerun: a script as it is now, with knobs. Its runs share a process, and so their
    compiled code, where a run is of one rank; else each is started by itself. `tail`: the last lines of the process,
    the standard error's among them."""

    def __init__(self, script: Path, label: str, knobs: list[str], nproc: int):
        self.script, self.source, self.label, self.nproc = script, script.read_bytes(), label, nproc
        self.sha, self.process = hashlib.sha256(self.source).hexdigest(), None
        self.surroundings, self.prefix = dict(NPROC=str(nproc)), ""
        self.known = defined_in(self.source).keys() >= KEPT
        self.kept = self.known and nproc == 1
        # a run keeps no weights, and is not sampled, where its script can be told
        chosen = "save" not in script_knobs(self.source) or any(knob.startswith("--save=") for knob in knobs)
        self.arguments = knobs if chosen else [*knobs, "--save=False"]

    def start(self, script: Path, *knobs: str, **surroundings: str):
        """A process that trains, through run.sh."""
        self.tail, self.began = deque(maxlen=25), set(LOGS.glob("*"))
        python = os.environ.get("PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
        self.process = subprocess.Popen(
            ["sh", str(ROOT / "run.sh"), str(script), *self.arguments, *knobs], cwd=ROOT, start_new_session=True,
            env=os.environ | dict(PYTHON=python) | self.surroundings | surroundings, encoding="utf-8", errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read(self) -> str | None:
        """Show its lines until it answers, as seeds.py does; None where it ends."""
        live = sys.stdout.isatty() and not self.prefix
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line[len(MARK) :]
            self.tail.append(line.rstrip())
            line = line.strip()
            if "train_loss:" in line:
                print(f"\r  {safe(line, 70)}  " * live, end="", flush=True)
            elif re.match("run.sh: |step:|warning: ", line):
                print("\r" * live + f"  {self.prefix}{safe(line, 110)}", flush=True)
        return None

    def ask(self, words: str) -> dict:
        """The answer of seeds.py; an exception where it ends instead."""
        if self.process is None:
            self.start(RECORDS / "seeds.py", TRIAL_SCRIPT=str(self.script), NPROC="1")
        self.began = set(LOGS.glob("*"))
        self.tail.clear()
        with contextlib.suppress(OSError, ValueError):  # it, or we, closed the pipe
            self.process.stdin.write(words + "\n")
            self.process.stdin.flush()
        answer = self.read()
        if answer is None:
            raise self.failure()
        return json.loads(answer)

    def train(self, seed: int, title: str) -> Run:
        """Its complete run with this seed, whose validations are shown."""
        print(title, flush=True)
        if self.kept:
            return read_run(LOGS / self.ask(f"train {seed}")["run_id"])
        self.start(self.script, f"--seed={seed}")
        self.read()
        failed = self.process.wait()
        new = [run for run in self.new_runs() if run.complete and run.seed == seed]
        if failed or not new:
            raise self.failure()
        return new[-1]

    def new_runs(self) -> list[Run]:
        """What it has logged of this script."""
        return [run for run in runs_in(set(LOGS.glob("*")) - self.began) if run.script_sha256 == self.sha]

    def failure(self) -> Exception:
        """Why it ended without an answer or a complete run. Prints its last lines, which tell a fault of the script."""
        code, name = self.process.wait(), self.script.name
        ends = [run.end for run in self.new_runs() if run.end.get("status", "complete") != "complete"]
        stopped = any(end["status"] == "stopped" for end in ends)  # torchrun has one code for all
        if stopped or self.process.stdin.closed or code in (75, 130, -signal.SIGINT, -signal.SIGTERM):
            return Undecided("stopped in this run; finished runs are kept, and the same command goes on")
        if code == 2:  # it comes with one sentence
            return Bad("knobs", self.tail[-1] if self.tail else name)
        print(*map(safe, self.tail), sep="\n")
        why = f", {ends[-1]['reason']}" if ends else ""
        return Bad("script", f"{name} ended with exit code {code}{safe(why, 300)}: no complete run")

    def halt(self):
        """Tell the training to end: a step later, or where the run is all but done, after it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # no command comes any more
        self.process.send_signal(signal.SIGTERM)

    def end(self):
        """The training ends, and what it started."""
        if self.process is None:
            return
        self.halt()
        self.process.stdin = None  # communicate would flush it
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process = None

    def context(self) -> dict | None:
        """What a run would say now of data, machine, versions and knobs; None of a script that cannot be asked."""
        if not self.known:
            return None
        now = self.ask("context")
        now |= dict(world_size=self.nproc, gpu_count=self.nproc * (now["gpu"] is not None))
        now["knobs"] = {name: value for name, value in now["knobs"].items() if name not in (*PLACES, "seed")}
        if not self.kept:
            self.end()
        return now

    def earlier(self, logged: list[Run], seeds: list[int], now: dict | None) -> dict[int, Run]:
        """Those of `logged` that this arm would only repeat: of its script, knobs, data, machine, versions."""
        found = {}
        for run in logged if now else ():
            if run.script_sha256 == self.sha and run.seed in seeds and run.knobs == now["knobs"]:
                differ = [key for key in now if key != "knobs" and run.start[key] != now[key]]
                if run.resumed or library_notes([run]):
                    differ.append("its origin (resumed, or called by other code)")
                if differ:
                    print(f"{self.label}: not counted, for {', '.join(differ)}: {run.name}")
                else:
                    found[run.seed] = run
        return found

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
        subprocess.run([python, ROOT / "data/tokenize_text.py", "--encoding", "bytes", "--out", embedded])
    for folder in [Path(given)] if given else sorted((ROOT / "data").glob("*/")):
        shards = {path: re.split("[^a-z]+", path.name.lower()) for path in sorted(folder.glob("*.bin"))}
        train, val = ([path for path in shards if name in shards[path]] for name in ("train", "val"))
        if stream_hash(val, data["val_tokens"] + 1) == data["val_sha256"] and len(train) >= len(data["train"]):
            if all(shard["sha256"] in (None, stream_hash([path])) for path, shard in zip(train, data["train"])):
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

def rerun(args) -> int:
    """Run a verified record's own script as it was, after asking; then compare the new run with the recorded ones."""
    record = read_record(find_record(args.name))
    meta, runs = record.meta, record.sets["runs"]
    (mean, half), nproc = prediction(losses(runs)), args.nproc or meta["world_size"]
    python = os.environ.get("PYTHON") or sys.executable
    if parent := parent_of(record):
        print(*diff(parent.script, record.script, (meta["parent"], meta["name"])), sep="\n")
    else:
        print(f"scripts: no parent here to show a diff to; all of it is records/{meta['name']}/train_gpt.py")
    data, taken = find_data(meta["data"], args.data, python), {run.seed: run for run in runs}
    seed = args.seed if args.seed is not None else min({*range(1, len(runs) + 2)} - taken.keys())
    odd = differences(meta, python)
    print("then and now (Python, torch, CUDA, GPU, driver):", *odd or ["  the same"], sep="\n")
    minutes = statistics.median(run.end["wall_s"] for run in runs) / 60
    print(f"data: {safe(data.name)}, the same; seed {seed}; {nproc} processes; a recorded run took "
          f"{minutes:.1f} minutes on its machine")
    try:
        if not args.yes and input("run this script on your machine? [y/N] ").strip().lower() != "y":
            raise EOFError
    except EOFError:
        print("not run")
        return 2
    own = runs[0].start["knobs"]
    # batches are given in one form: a script refuses both
    unused = (*PLACES, "seed", *(("train_seq_len", "sequences_per_step") if own.get("batch_stages") else ()))
    knobs = {k: v for k, v in own.items() if k not in unused} | dict(preset="80gb", data_dir=data.resolve())
    shown = lambda value: str(value).replace(" ", "") if isinstance(value, list) else value
    arm = Arm(record.folder / "train_gpt.py", meta["name"], [f"--{k}={shown(v)}" for k, v in knobs.items()], nproc)
    arm.kept = False
    try:
        new = arm.train(seed, f"rerun of {meta['name']}, seed {seed}")
    finally:
        arm.end()
    kept = LOGS / "reruns" / meta["name"] / new.name  # not among the runs that a record could have left out
    kept.parent.mkdir(parents=True, exist_ok=True)
    new.folder.rename(kept)
    what = f"the 95 % prediction interval of {len(runs)} runs"
    if seed in taken:
        mean, half, what = taken[seed].val_loss, 3 * statistics.stdev(losses(runs)), f"3 sd of run {taken[seed].name}"
    inside = abs(new.val_loss - mean) <= half
    print(f"loss {new.val_loss:.6f}, {'inside' if inside else 'OUTSIDE'} {what}: {mean:.6f} +- {half:.6f}")
    other = "" if new.facts()["hardware"] == runs[0].facts()["hardware"] else " (other hardware: not to be compared)"
    pace = new.train_ms / statistics.median(times(runs))
    print(f"training time {new.train_ms:.0f} ms, x {pace:.3f} of the recorded median{other}; "
          f"kept in {kept.relative_to(ROOT)}")
    return 0 if inside else 1

# ---- trial

def freeze(name: str) -> Path:
    """A copy of the script as it is now: it may be edited while the trial runs."""
    path = Path(name).resolve()
    if path.suffix != ".py":
        raise Bad("path", f"{safe(name, 80)} is no script: its name does not end in .py")
    source = read_bytes(path)
    try:
        compile(source, path.name, "exec")  # which runs nothing
    except UNREADABLE as error:
        raise Bad("script", f"{safe(path.name, 80)} is no Python that can be compiled: {error}") from None
    if not script_knobs(source):
        raise Bad("script", f"{safe(path.name, 80)} has no class Hyperparameters: a trial takes a copy of train_gpt.py "
                            "with the change in it (cp train_gpt.py my.py, then edit), not a script that imports it")
    copy = ROOT / ".cache" / "trial" / hashlib.sha256(source).hexdigest()[:12] / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(source)
    return copy

def knobs_of_arms(args, knobs: list[str]) -> list[list[str]]:
    for knob in knobs:
        if not re.fullmatch(r"--([ab]\.)?(?!seed=)\w+=.*", knob, re.A | re.S):
            raise Bad("knobs", f"{safe(knob, 80)} is not --knob=value for both scripts, nor --a.knob=value or "
                               "--b.knob=value for one; the seeds are --runs of them from --first-seed on")
    if args.runs < 1 or args.first_seed < 0 or not args.margin > 0:
        raise Bad("knobs", f"--runs {args.runs} must be 1 or more, --first-seed {args.first_seed} 0 or more and "
                           f"--margin {args.margin} above 0")
    common = [k for k in knobs if not re.match(r"--[ab]\.", k)]
    return [common + [f"--{k[4:]}" for k in knobs if k.startswith(f"--{arm}.")] for arm in "ab"]

def labels(typed: list[str], own: list[list[str]]) -> list[str]:
    """What to call the arms: by their scripts, and where that is one by the knobs that differ."""
    only = [" ".join(k[2:] for k in mine if k not in other) for mine, other in (own, own[::-1])]
    names = [knobs if typed[0] == typed[1] and knobs else f"{safe(name, 60)} {knobs}".strip()
             for name, knobs in zip(typed, only)]
    return names if names[0] != names[1] else [f"{names[0]} ({arm})" for arm in "AB"]

def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, without asking torch, which takes seconds."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(len(re.findall("^GPU ", listed, re.M)))]

def in_turn(arms: list[Arm], todo: list[tuple], done: dict, total: int):
    """Train what is to do, one run after the other, into `done`."""
    spent = []
    for i, (arm, seed) in enumerate(todo):
        left = f", about {statistics.fmean(spent) * (len(todo) - i) / 60:.1f} minutes left" if spent else ""
        began, count = time.monotonic(), total - len(todo) + i + 1
        done[arm, seed] = arms[arm].train(seed, f"run {count} of {total}: {arms[arm].label}, seed {seed}{left}")
        spent.append(time.monotonic() - began)

def side_by_side(arms: list[Arm], todo: list[tuple], done: dict):
    """The same with a thread and a GPU for each arm."""
    parts = [[key for key in todo if key[0] == arm] for arm in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        try:
            for ended in as_completed([pool.submit(in_turn, arms, own, done, len(own)) for own in parts]):
                ended.result()
        except BaseException:  # the other arm's thread reads on until its training has ended
            for arm in arms:
                arm.halt()
            raise

def check_arms(arms: list[Arm], now: list[dict | None], floor: bool):
    """Bad before the first run where a verdict could not follow."""
    if None in now:
        return
    shas = [context["data"]["val_sha256"] for context in now]
    if shas[0] != shas[1]:
        raise Bad("data", f"{arms[0].label} would be validated on {shas[0][:12]}, and {arms[1].label} on "
                          f"{shas[1][:12]}: losses on other tokens cannot be compared")
    if not floor and arms[0].sha == arms[1].sha and now[0]["knobs"] == now[1]["knobs"]:
        raise Bad("knobs", "both arms are one recipe, as a knob is given the value that it has: a script against "
                           "itself, without knobs of one arm, gives the noise floor")

def trial(args, knobs: list[str]) -> int:
    """Both arms with the same seeds, on this machine and data; what logs/ already holds is not run again."""
    distributions()  # before hours of training, not after
    own, typed = knobs_of_arms(args, knobs), [args.a, args.b]
    scripts = [freeze(name) for name in typed]
    nproc, gpus = os.environ.get("NPROC") or "1", visible_gpus()
    if not re.fullmatch("[1-9][0-9]{0,3}", nproc):
        raise Bad("knobs", f"NPROC={safe(nproc, 40)} is no count of processes")
    arms = [Arm(*row, int(nproc)) for row in zip(scripts, labels(typed, own), own)]
    floor = arms[0].sha == arms[1].sha and sorted(own[0]) == sorted(own[1])
    # B A A B: an error in B shows first, and a drift of the machine hits both alike
    turns = [(arm, i) for i in range(args.runs) for arm in ((0, 1) if i % 2 else (1, 0))]
    plan = [(arm, args.first_seed + i + floor * arm * args.runs) for arm, i in turns]  # A A: other seeds, else B is A
    print("noise floor: one recipe, and other seeds in B" if floor else f"before the runs: {rule(args.runs)}")
    together = len(gpus) > 1 and all(arm.kept for arm in arms)
    for arm, gpu in zip(arms, gpus if together else ()):
        arm.surroundings["CUDA_VISIBLE_DEVICES"], arm.prefix = gpu, f"{arm.label}: "
    try:
        now, done = [arm.context() for arm in arms], {}
        check_arms(arms, now, floor)
        logged = complete_runs(LOGS.glob("*"))
        for i, arm in enumerate(arms):
            found = arm.earlier(logged, [seed for j, seed in plan if j == i], now[i])
            done |= {(i, seed): run for seed, run in found.items()}
        for (i, seed), run in done.items():
            print(f"already in logs/: {arms[i].label}, seed {seed}: {run.name}")
        reused, todo = len(done), [key for key in plan if key not in done]
        if todo and together:
            print(f"side by side on 2 of {len(gpus)} GPUs; CUDA_VISIBLE_DEVICES={gpus[0]} would have them take turns")
            side_by_side(arms, todo, done)
        else:
            in_turn(arms, todo, done, len(plan))
    except KeyboardInterrupt:
        raise Undecided("stopped: finished runs are kept, and the same command goes on") from None
    finally:
        for arm in arms:
            arm.end()
    runs = [[done[key] for key in sorted(plan) if key[0] == i] for i in (0, 1)]
    a, b = (Set(arm.label, own, arm.source) for arm, own in zip(arms, runs))
    if floor and args.runs > 1:
        print(describe(a), describe(b), noise_floor(a, b), sep="\n")
        return 0
    again = " ".join(",".join(run.name for run in own) for own in runs)
    return compare_sets(a, b, args.margin, f"again: ./run.sh compare {again}\n", fresh=not reused)

def noise_floor(a: Set, b: Set) -> str:
    """How far one recipe differs from itself, by the t of two sets of n runs."""
    gap, took = statistics.fmean(b.losses) - statistics.fmean(a.losses), a.times + b.times
    n, pooled = len(a.runs), math.sqrt((statistics.variance(a.losses) + statistics.variance(b.losses)) / 2)
    noise = float(distributions().t.ppf((1 + LEVEL) / 2, 2 * n - 2)) * pooled * math.sqrt(2 / n)
    jitter = 100 * statistics.stdev(took) / statistics.fmean(took)
    return (f"Noise floor: two sets of {n} runs of one recipe, with other seeds, differ by up to {noise:.4f} in 95 % "
            f"of cases, and these by {gap:+.4f}. A run's loss has sd {pooled:.4f}, its time {jitter:.2f} %. A trial of "
            "two recipes pairs the seeds, and so sees smaller differences")
