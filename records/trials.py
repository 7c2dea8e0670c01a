"""Running scripts: `rerun` a record, and `trial`, two scripts in turn. No other command executes anything.

Both start what `./run.sh script --knob=value` would start.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections import deque
from pathlib import Path

from decide import Duel, distributions, look, prediction, rule
from runs import (
    NOT_COMPARED,
    RECORDS,
    SOFTWARE,
    Bad,
    read_bytes,
    read_record,
    read_run,
    safe,
    sha256_of,
)
from seeds import MARK
from sets import (
    LOGS,
    ROOT,
    Set,
    compare_sets,
    complete_runs,
    diff,
    find_record,
    losses,
    parent_of,
    times,
)

# ---- A training as a process

GRACE = 60  # seconds that a training has to end when it is told to

class Training:
    """A process started through run.sh. `tail`: its last lines, the standard error's among them."""

    def __init__(self, script, knobs, **environment: str):
        python = os.environ.get("PYTHON") or (sys.executable if importlib.util.find_spec("torch") else "")
        self.name, self.tail = script.name, deque(maxlen=25)
        self.process = subprocess.Popen(
            ["sh", str(ROOT / "run.sh"), str(script), *knobs], cwd=ROOT, start_new_session=True,
            env=os.environ | dict(PYTHON=python) | environment, encoding="utf-8", errors="replace",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def read(self):
        """Show its lines until it answers, as seeds.py does; None where it ends."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line[len(MARK) :].strip()
            self.tail.append(line.rstrip())
            if re.match("run.sh: |step:.* val_loss:|warning: ", line):
                print(f"  {safe(line.strip(), 110)}", flush=True)
        return None

    def ask(self, line):
        """Its answer to a line; an exception where it ends instead."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()
        answer = self.read()
        if answer is None:
            raise self.failure()
        return answer

    def failure(self):
        """Why it ended without an answer or a complete run. Prints its last lines, which tell a fault of the script."""
        code = self.process.wait()
        if code == 2:  # it comes with one sentence
            return Bad("knobs", self.tail[-1] if self.tail else self.name)
        print(*map(safe, self.tail), sep="\n")
        return Bad("script", f"{self.name} ended with exit code {code}: no complete run")

    def end(self):
        """As by Ctrl-C: a step later, or where the run is all but done, after it. What is left then is killed."""
        self.process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=GRACE)  # which closes its standard input: no seed comes any more
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

def run_alone(script, knobs, seed, nproc):
    """The complete run of a process of its own."""
    before = set(LOGS.glob("*"))
    training = Training(script, [*knobs, f"--seed={seed}"], NPROC=str(nproc))
    try:
        training.read()
        failed = training.process.wait()
    finally:
        training.end()
    new = [run for run in complete_runs(set(LOGS.glob("*")) - before) if run.seed == seed]
    if failed or not new:
        raise training.failure()
    return new[-1]

# ---- rerun

def stream_hash(paths, tokens=None):
    """SHA-256 of the first `tokens` (default all) of shards without headers, hex. None without shards."""
    import numpy as np

    shards = [np.fromfile(path, "<u2", offset=1024) for path in paths]
    return sha256_of(np.concatenate(shards)[:tokens]) if shards else None

def find_data(data, given):
    """The folder with a record's data; further shards would not be read. Bad, with the hash needed, if it has others.
    """
    folder = Path(given) if given else ROOT / "data" / dict(bytes="embedded").get(data["encoding"], "fineweb10B")
    if folder == ROOT / "data" / "embedded" and not (folder / "manifest.json").exists():
        python = os.environ.get("PYTHON") or sys.executable
        subprocess.run([python, ROOT / "data/tokenize_text.py", "--encoding", "bytes", "--out", folder])
    shards = sorted(folder.glob("*.bin"))
    holds = lambda path, word: word in re.split("[^a-z]+", path.name.lower())
    train, val = ([path for path in shards if holds(path, split)] for split in ("train", "val"))
    same = all(shard["sha256"] in (None, stream_hash([path]))
               for path, shard in zip(train, data["train"]))
    if not same or stream_hash(val, data["val_tokens"] + 1) != data["val_sha256"]:
        raise Bad("data", f"{safe(folder, 100)} does not hold the record's data, val_sha256 {data['val_sha256']} over "
                          f"the first {data['val_tokens']} + 1 validation tokens; --data names a folder")
    return folder

def knobs_of(run, data):
    """What gives its knobs again, on data in another place; batches in one form, as a script refuses both."""
    unused = ("train_seq_len", "sequences_per_step") if run.knobs.get("batch_stages") else ()
    own = [f"--{name}={value}" for name, value in run.knobs.items() if name not in unused]
    return ["--preset=80gb", f"--data_dir={data.resolve()}", "--save=False", *own]

def rerun(args):
    """Run a verified record's own script as it was, after asking; then compare the new run with the recorded ones."""
    record = read_record(find_record(args.name))
    meta, runs = record.meta, record.runs
    mean, half = prediction(losses(runs))
    if parent := parent_of(record):
        print(*diff(parent.script, record.script, (meta["parent"], meta["name"])), sep="\n")
    else:
        print(f"scripts: no parent here to show a diff to; all of it is records/{meta['name']}/train_gpt.py")
    data = find_data(meta["data"], args.data)
    unused = {*range(1, len(runs) + 2)} - {run.seed for run in runs}
    seed = min(unused) if args.seed is None else args.seed
    minutes = runs[0].end["wall_s"] / 60
    print(f"data: {safe(data.name)}, the same; seed {seed}; a recorded run took {minutes:.1f} minutes")
    if not args.yes and input("run this script on your machine? [y/N] ").strip().lower() != "y":
        print("not run")
        return 2
    new = run_alone(record.folder / "train_gpt.py", knobs_of(runs[0], data), seed, meta["world_size"])
    kept = LOGS / "reruns" / meta["name"] / new.name  # not among the runs that a record could have left out
    kept.parent.mkdir(parents=True, exist_ok=True)
    new.folder.rename(kept)
    for key in ("gpu", "gpu_count", "driver", *SOFTWARE):
        then, now = runs[0].start[key], new.start[key]
        if now != then:
            print(f"  {key}: {safe(then, 60)} then, {safe(now, 60)} now")
    inside, pace = abs(new.val_loss - mean) <= half, new.train_ms / statistics.median(times(runs))
    print(f"training time {new.train_ms:.0f} ms, x {pace:.3f} of the recorded median; kept in {kept.relative_to(ROOT)}")
    print(f"loss {new.val_loss:.6f}, {'inside' if inside else 'OUTSIDE'} the 95 % prediction interval of {len(runs)} "
          f"runs: {mean:.6f} +- {half:.6f}")
    return 0 if inside else 1

# ---- trial

class Arm:
    """One side of a trial. Where a run is of one rank its runs share a process, and so their compiled code."""

    def __init__(self, name, own, common, nproc):
        self.label = safe(" ".join([name, *(knob[2:] for knob in own)]), 400)
        self.script, self.nproc, self.training = freeze(name), nproc, None
        self.source, self.knobs = read_bytes(self.script), ["--save=False", *common, *own]  # no weights, no sample
        self.sha = sha256_of(self.source)

    def ask(self, line=""):
        """The next answer of seeds.py, which first says what a run would say."""
        if self.training is None:
            self.training = Training(RECORDS / "seeds.py", self.knobs, TRIAL_SCRIPT=str(self.script), NPROC="1")
        return self.training.ask(line)

    def context(self):
        """What a run would say now of data, machine and versions, and the knobs that say what is computed."""
        now = json.loads(self.ask())
        now |= dict(world_size=self.nproc, gpu_count=self.nproc * (now["gpu"] is not None))
        now["knobs"] = {k: v for k, v in now["knobs"].items() if k not in NOT_COMPARED}
        if self.nproc > 1:
            self.end()
        return now

    def made(self, run, now):
        """Is it what this arm would only repeat: of its script, knobs, data, machine and versions?"""
        facts = dict(run.start, knobs=run.knobs)
        odd = run.resumed or any("not be the script kept" in row.get("text", "") for row in run.events)
        return not odd and facts | now | dict(script_sha256=self.sha) == facts

    def train(self, seed):
        if self.nproc > 1:
            return run_alone(self.script, self.knobs, seed, self.nproc)
        return read_run(LOGS / self.ask(f"{seed}\n"))

    def end(self):
        if self.training:
            self.training.end()
        self.training = None

def freeze(name):
    """A copy of the script as it is now: it may be edited while the trial runs."""
    path = Path(name).resolve()
    source = read_bytes(path)
    if b"\ndef train_once(" not in source:
        raise Bad("script", f"{safe(path.name, 80)} has no train_once: a trial takes a copy of train_gpt.py with the "
                            "change in it (cp train_gpt.py my.py, then edit), not a script that imports it")
    copy = ROOT / ".cache" / "trial" / sha256_of(source)[:12] / path.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(source)
    return copy

def arms_of(args):
    """A and B, as the command line has them."""
    knobs, nproc = args.knobs, os.environ.get("NPROC") or "1"
    for knob in knobs:
        if not re.fullmatch(r"--([ab]\.)?(?!seed=)\w+=.*", knob, re.A | re.S):
            raise Bad("knobs", f"{safe(knob, 80)} is not --knob=value for both scripts, nor --a.knob=value or "
                               "--b.knob=value for one; the seeds are --runs of them from --first-seed on")
    if args.runs < 1 or args.first_seed < 0 or not nproc.isdecimal():
        raise Bad("knobs", f"--runs {args.runs} must be 1 or more, --first-seed {args.first_seed} 0 or more, and "
                           f"NPROC={safe(nproc, 40)} a count of processes")
    common = [knob for knob in knobs if not re.match(r"--[ab]\.", knob)]
    arms = []
    for name, side in ((args.a, "--a."), (args.b, "--b.")):
        own = [knob.replace(side, "--", 1) for knob in knobs if knob.startswith(side)]
        arms.append(Arm(name, own, common, int(nproc)))
    return arms

def train_all(arms, plan):
    """The runs of each arm, by the seeds of `plan`; those that logs/ already holds are not made again."""
    now = [arm.context() for arm in arms]
    if now[0]["data"]["val_sha256"] != now[1]["data"]["val_sha256"]:
        raise Bad("data", "both would be validated on other tokens: such losses cannot be compared")
    if arms[0].sha == arms[1].sha and now[0] == now[1]:
        raise Bad("knobs", "both arms are one script with the same knobs: there is nothing to compare")
    done = {}
    for run in complete_runs(LOGS.glob("*")):
        for i in (0, 1):
            if arms[i].made(run, now[i]):
                done[i, run.seed] = run
    for count, key in enumerate(plan, 1):
        title = f"{arms[key[0]].label}, seed {key[1]}"
        if key in done:
            print(f"already in logs/: {title}: {done[key].name}")
            continue
        print(f"run {count} of {len(plan)}: {title}", flush=True)
        done[key] = arms[key[0]].train(key[1])
    return [[done[key] for key in plan if key[0] == i] for i in (0, 1)]

def trial(args):
    """Both arms with the same seeds, on this machine and data; what logs/ already holds is not run again."""
    distributions()  # before hours of training, not after
    arms = arms_of(args)
    plan = []  # B A A B: an error in B shows first, and a drift of the machine hits both alike
    for i in range(args.runs):
        turn = [(1, args.first_seed + i), (0, args.first_seed + i)]
        plan += turn[::-1] if i % 2 else turn
    print(f"before the runs: {rule(args.runs)}")
    try:
        runs = train_all(arms, plan)
    finally:
        for arm in arms:
            arm.end()
    names = [",".join(run.name for run in own) for own in runs]
    print(f"again: ./run.sh compare A={names[0]} B={names[1]}")
    for sentence in look(LOGS / "looks.jsonl", Duel(*runs)):
        print(sentence)
    a, b = (Set(arm.label, own, arm.source) for arm, own in zip(arms, runs))
    return compare_sets(a, b, args.margin)
