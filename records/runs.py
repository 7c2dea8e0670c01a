"""Runs, records, tracks, scripts' knobs and the public speedrun's logs: read and checked with the standard library.

All of it may come from strangers. Nothing is executed, no link is followed, no file is opened before its size is known,
JSON is strict, and what is shown of a stranger's text goes through `safe`. A check yields (code, sentence with both
values); the codes, and what none of them can show, stand in records/README.md.
"""

import ast
import calendar
import contextlib
import hashlib
import json
import math
import re
import stat
import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

RECORDS = Path(__file__).resolve().parent
RUN_FILES = ("log.txt", "metrics.jsonl")
KIB = 1024
FILE_BYTES, RECORD_BYTES, ARMS_BYTES, PICTURES = 8 * KIB * KIB, 400 * KIB, 1024 * KIB, 100 * KIB
# Knobs that say where files lie, never what is computed: not compared. Of every script so far, bpe_file and weights of
# older ones alone.
PLACES = ("data_dir", "resume", "save", "bpe_file", "weights")
NOT_COMPARED = (*PLACES, "seed")
CLAIMS = ("reference", "record", "result", "negative")
TABLE = "<!-- tables: written by records.py, checked by verify -->", "<!-- end of tables -->"
PRIVATE = "**Data: private.** The text cannot be passed on: outsiders can verify this record, but not rerun it."

class Bad(Exception):
    """What cannot be read, in one sentence; `code` is the check that it failed."""
    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code

# ---- Untrusted bytes

def safe(text, length=2000):
    """`text` with control, bidirectional and other unprintable characters escaped, cut at `length`."""
    escaped = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()
    return "".join(map(escaped, str(text)[:length]))

def sha256_of(data):
    return hashlib.sha256(data).hexdigest()

def read_bytes(path):
    """A plain file. Bad("path") for a link, a folder, a device or nothing, Bad("size") for more than FILE_BYTES."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise Bad("path", f"{safe(path.name)} is a link, or no plain file")
        if found.st_size > FILE_BYTES:
            raise Bad("size", f"{safe(path.name)} has {found.st_size} bytes, and {FILE_BYTES} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise Bad("path", f"{safe(path.name)} cannot be read ({error.strerror})") from None

def read_text(path):
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Bad("schema", f"{path.name} is not UTF-8") from None

def strict_json(text, what):
    """JSON without repeated keys. That a number is finite is for `fit` to say."""
    def pairs(items):
        if len({key for key, _ in items}) < len(items):
            raise Bad("schema", f"{what} has a key twice")
        return dict(items)
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise Bad("schema", f"{what} is not JSON ({safe(error)[:80]})") from None

MISSING = object()  # among the alternatives of a key: it may be absent


def misfit(value, spec, where) -> str | None:
    """Why `value` does not have the shape `spec`: a type, a pattern, a range, a constant, a tuple of alternatives,
    [items], or a dict of exactly these keys; the key `...` stands for all others. None if it fits."""
    if isinstance(spec, tuple):  # of none, where a key is unknown
        reasons = [misfit(value, s, where) for s in spec] or [f"{where} is unknown"]
        return None if None in reasons else reasons[0]
    if isinstance(spec, (dict, list)) and type(value) is type(spec):
        if isinstance(spec, list):
            parts = [(item, spec[0], f"{where}[{i}]") for i, item in enumerate(value)]
        else:
            rest = spec.get(..., ())
            parts = [(value.get(k, MISSING), spec.get(k, rest), f"{where}.{safe(k)[:40]}")
                     for k in value | spec if k is not ...]
        return next(filter(None, (misfit(*part) for part in parts)), None)
    if isinstance(spec, re.Pattern):
        fine, name = isinstance(value, str) and spec.fullmatch(value), spec.pattern
    elif isinstance(spec, type):
        fine, name = type(value) is spec or (spec, type(value)) == (float, int), spec.__name__
        fine = fine and not (type(value) in (int, float) and not abs(value) < 2**63)  # which nan is not either
    elif isinstance(spec, range):
        fine, name = type(value) is int and value in spec, spec
    else:
        fine, name = type(value) is type(spec) and value == spec, spec
    found = "missing" if value is MISSING else safe(repr(value))[:60]
    return None if fine else f"{where} is {found}, and not {safe(name, 80)}"

def fit(value, spec, where):
    reason = misfit(value, spec, where)
    if reason:
        raise Bad("schema", reason)

def moment(text):
    """Seconds since 1970 of a UTC that has the digits YYYYMMDDHHMMSS first. Bad if no calendar or clock has it."""
    try:
        return calendar.timegm(time.strptime("".join(re.findall("[0-9]", text))[:14], "%Y%m%d%H%M%S"))
    except ValueError:
        raise Bad("schema", f"{text} is no time of the calendar") from None

# ---- The knobs of a script, read without running it

UNREAD = object()  # the default of a knob that is no literal
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)

def script_knobs(script):
    """The knobs of a script by name, with their defaults: the fields of its class Hyperparameters, `name: type = 1` or
    `name: type = knob(1, ...)`. Empty if there is none, or if this is no Python."""
    knobs = {}
    with contextlib.suppress(*UNREADABLE):
        own = {node.name: node for node in ast.parse(script).body if isinstance(node, ast.ClassDef)}
        for node in own["Hyperparameters"].body if "Hyperparameters" in own else ():
            match node:
                case ast.AnnAssign(target=ast.Name(id=name),
                                   value=ast.Call(func=ast.Name(id="knob"), args=[default, *_]) | default):
                    knobs[name] = UNREAD
                    with contextlib.suppress(*UNREADABLE):  # as JSON, which turns tuples into lists
                        knobs[name] = json.loads(json.dumps(ast.literal_eval(default)))
    return knobs

# ---- Formats, all closed: an unknown key is refused

ID, SHA = re.compile("[0-9]{8}-[0-9]{6}-[0-9a-f]{6}"), re.compile("[0-9a-f]{64}")
DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
NAME = re.compile(f"{DAY.pattern}_[A-Za-z0-9]{{1,40}}")
UTC = re.compile(f"{DAY.pattern}T[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}Z")
ARM = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}")
BATCHES = re.compile(r"\s*([1-9][0-9]{0,8}x[1-9][0-9]{0,8}(\s+|$))*")  # SEQUENCES x TOKENS of each stage
TEXT, COUNT, LOSS = (str, None), (int, None), (float, "nan", "inf")
REASON, SUMMARY = re.compile(r".*\w.*", re.S), re.compile(".{0,120}", re.S)
KNOBS = {...: (bool, int, float, str, [(int, float, str)])}
CLOCK = dict(train_ms=float, wall_s=float)
ONE_UP, ANY_COUNT = range(1, 10**6 + 1), range(10**6 + 1)  # so that a schedule can be listed
RUN_KNOBS = dict(KNOBS, steps=ONE_UP, epochs=ONE_UP, sequences_per_step=ONE_UP, train_seq_len=ONE_UP,
                 val_tokens=range(1, 2**63), val_every=ANY_COUNT, checkpoint_every=ANY_COUNT,
                 log_norms=(ANY_COUNT, MISSING), batch_stages=(BATCHES, MISSING))
SHARD = dict(name=str, tokens=int, sha256=(SHA, None))
DATA = dict(encoding=str, val_sha256=SHA, val_tokens=int, train=[SHARD])
HARDWARE = dict(gpu=TEXT, count=int, memory_mib=COUNT, driver=TEXT)
SOFTWARE = dict(python=str, torch=str, cuda=TEXT, nccl=TEXT, triton=TEXT,
                packages={...: str})
STAGE = dict(first=int, sequences=int, seq_len=int,
             lr=(float, MISSING), doc_cap=(0, MISSING))  # of older scripts
START = dict(run_id=ID, script_sha256=SHA, utc=UTC, argv=[str], knobs=RUN_KNOBS,
             changed=KNOBS, seed=int, device=str, gpu=TEXT, gpu_count=int,
             gpu_memory_mib=COUNT, driver=TEXT, **SOFTWARE, world_size=int,
             fp8=dict(on=bool, reason=str), attention=str, data=DATA)
STEPPED = dict(step=int, tokens=int, train_loss=(*LOSS, None), **CLOCK)
END = dict(status=("complete", "stopped", "failed"), code=int, reason=str, steps=int, tokens=int,
           val_loss=(*LOSS, None), **CLOCK, tokens_per_s=COUNT, mfu=(float, None, MISSING), peak_train_mib=COUNT,
           peak_val_mib=COUNT, reserved_mib=COUNT)
SHARED = dict(val=dict(step=int, tokens=int, val_loss=LOSS, val_tokens=int, **CLOCK),
              clock=dict(mark=("start", "stop"), **CLOCK), warning=dict(text=str, step=int),
              checkpoint=dict(step=int, bytes=int, ms=float), resume=dict(step=int, from_run_id=ID))
FORMATS = {  # of a run folder: its first event, and the others by their kinds
    1: (dict(START, format=1, grad_accum=int),
        dict(SHARED, step=STEPPED, end=dict(END, mfu_with_attention=(float, None)))),
    2: (dict(START, format=2, stages=[STAGE]),
        dict(SHARED, end=END, val=dict(SHARED["val"], sources=({...: LOSS}, MISSING)),
             step=dict(STEPPED, lr=float, momentum=float, window=int, sequences=int, seq_len=int,
                       norms=({...: LOSS}, MISSING))))}
RUN_META = dict(run_id=ID, seed=int, val_loss=float, train_time_ms=float, steps=int,
                tokens=int, peak_train_mib=COUNT, peak_val_mib=COUNT,
                sha256=(dict(log=SHA, metrics=SHA), MISSING))  # hashes: of older records
META = dict(
    format=1, name=NAME, track=str, claim=CLAIMS, date=DAY, author=str,
    parent=(NAME, None), summary=SUMMARY,
    script_sha256=SHA, changed=KNOBS, data=dict(DATA, public=bool), hardware=HARDWARE, software=SOFTWARE,
    world_size=int, runs=[RUN_META], baseline=[RUN_META],
    left_out=[dict(run_id=ID, reason=REASON)],
    arms=[dict(name=ARM, changed=KNOBS, patch_sha256=(SHA, None), runs=[RUN_META])],
    result=dict(n=int, val_loss_mean=float, val_loss_sd=(float, None),
                p=(float, None), train_time_ms_median=float,
                train_time_ms_sd=(float, None), gain_ms=(float, None), gain_ci_ms=([float], None)))

def read_tracks():
    return {path.stem: strict_json(read_text(path), path.name) for path in sorted(RECORDS.glob("tracks/*.json"))}

# ---- Stages: the tokens of every step, from the knobs alone

class Stage(NamedTuple):
    first: int  # step at which it begins
    sequences: int  # of a step, over all ranks
    seq_len: int  # tokens of a sequence

def stages_of(knobs) -> list[Stage]:
    """Those of a run with these knobs; without `batch_stages`, as in all of format 1, one. Bad if they are not legal.
    """
    batches = knobs.get("batch_stages", "").split() or [f"{knobs['sequences_per_step']}x{knobs['train_seq_len']}"]
    n, steps = len(batches), knobs["steps"]
    if n > min(steps, 1000):
        raise Bad("schema", f"metrics.jsonl: {n} batches are not stages of {steps} steps")
    sizes = [map(int, batch.split("x")) for batch in batches]
    return [Stage(k * steps // n, *size) for k, size in enumerate(sizes)]

def tokens_before(step, parts):
    """Tokens of all steps before `step`, which are those after so many steps."""
    spans = pairwise([*(min(step, stage.first) for stage in parts), step])
    return sum((end - first) * stage.sequences * stage.seq_len
               for (first, end), stage in zip(spans, parts))

# ---- A run

@dataclass
class Run:
    """One run, ours or the public speedrun's. Points are (step, tokens or None, loss or None, train_ms)."""
    name: str
    folder: Path  # that it lies in
    script: bytes | None
    script_sha256: str
    total: int  # steps of the complete schedule; of a public run those it made, of `planned`
    vals: list[tuple]
    steps: list[tuple] = field(default_factory=list)
    start: dict = field(default_factory=dict)  # of metrics.jsonl; empty for the public speedrun
    end: dict = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    gpu: str | None = None
    planned: int = 0
    digest: str = ""  # of a public log

    @property
    def complete(self):
        ended = not self.start or self.end.get("status") == "complete"
        scored = bool(self.vals) and self.vals[-1][0] == self.total
        return ended and scored and math.isfinite(self.val_loss)

    resumed = property(lambda self: any(row["event"] == "resume" for row in self.events))
    val_loss = property(lambda self: self.vals[-1][2])
    train_ms = property(lambda self: self.vals[-1][3])
    seed = property(lambda self: self.start.get("seed"))
    val_sha256 = property(lambda self: self.start["data"]["val_sha256"] if self.start else None)

    stages = cached_property(lambda self: stages_of(self.start["knobs"]))

    @cached_property
    def knobs(self):
        """Those that say what is computed, by name, without the seed; of a public run its steps."""
        own = sorted(self.start.get("knobs", {}).items())
        return {k: v for k, v in own if k not in NOT_COMPARED} or dict(steps=self.total)

    @cached_property
    def recipe(self):
        """What runs that differ by their seed alone share: script and knobs."""
        return self.script_sha256, json.dumps(self.knobs)

    def facts(self):
        """What all runs of a record share, under meta.json's names."""
        start = self.start
        hardware = dict(gpu=start["gpu"], count=start["gpu_count"], memory_mib=start["gpu_memory_mib"],
                        driver=start["driver"])
        return dict(data=start["data"], hardware=hardware, software={key: start[key] for key in SOFTWARE},
                    world_size=start["world_size"])

    def meta(self):
        """Its entry in a record's meta.json."""
        own = dict(run_id=self.name, seed=self.seed, val_loss=self.val_loss, train_time_ms=self.train_ms)
        return own | {k: self.end[k] for k in RUN_META if k in self.end and k not in own}

def read_run(folder) -> Run:
    """A run folder of ours. Bad if a file is missing, a link, too large or not of the format."""
    if folder.is_symlink() or not folder.is_dir():
        raise Bad("path", f"{safe(folder.name)} is a link, or no folder")
    read_bytes(folder / "log.txt")
    metrics = read_text(folder / "metrics.jsonl")
    if not metrics.endswith("\n"):
        raise Bad("truncated", f"{folder.name}: metrics.jsonl ends within a line")
    events = [strict_json(line, f"metrics.jsonl line {i}")
              for i, line in enumerate(metrics[:-1].split("\n"), 1)]
    for i, row in enumerate(events, 1):
        where = f"metrics.jsonl line {i}"
        try:
            kind, (first, others) = row["event"], FORMATS[events[0]["format"]]
            spec = dict(others[kind] if i > 1 else first, event=kind if i > 1 else "start")
        except (KeyError, TypeError):
            raise Bad("schema", f"{where} is no event of format 1 or 2, or out of place: {safe(row, 80)}") from None
        fit(row, spec, where)
    start, last = events[0], events[-1]
    moment(start["run_id"])
    stages_of(start["knobs"])
    if start["run_id"] != folder.name:
        raise Bad("path", f"the folder {safe(folder.name)} holds the run {start['run_id']}")
    curves = dict(val=[], step=[])
    for row in (row for row in events if row["event"] in curves):
        loss = row.get("val_loss", row.get("train_loss"))
        point = row["step"], row["tokens"], loss and float(loss), row["train_ms"]
        curves[row["event"]].append(point)
    end, script = last if last["event"] == "end" else {}, folder / "train_gpt.py"
    return Run(folder.name, folder, read_bytes(script) if script.exists() else None, start["script_sha256"],
               start["knobs"]["steps"], *curves.values(), start, end, events, start["gpu"])

def check_clock(run):
    """Marks alternate; while they run, training and wall time grow alike; else training time stands still."""
    ticking, idle, before = False, False, {}  # idle: stopped, and nothing validated or saved since
    for row in run.events[1:]:
        kind, mark = row["event"], row.get("mark")
        here = f"{run.name}: at the '{kind}' {row.get('wall_s', 0):.3f} s from its start,"
        if kind in ("val", "checkpoint", "end", "step") and ticking != (kind == "step"):
            yield "clock", f"{here} the clock {'runs' if ticking else 'stands'}, and should not"
        idle = idle and kind not in ("val", "checkpoint")
        if "train_ms" in row:
            before = before or dict(row, train_ms=row["train_ms"] * run.resumed)  # it starts at 0
            grew, wall = row["train_ms"] - before["train_ms"], (row["wall_s"] - before["wall_s"]) * 1e3
            slack = 1 + abs(wall) / 1e3
            if abs(grew - wall * ticking) > slack * ticking:
                yield "clock", (f"{here} training time grew by {grew:.3f} ms, and the wall by {wall:.3f} ms"
                                f"{'' if ticking else ' with the clock stopped'}")
            if wall < -slack:
                yield "clock", f"{here} the wall time has gone back by {-wall:.3f} ms"
            before = row
        if mark and ticking == (mark == "start"):
            yield "clock", f"{here} the mark '{mark}' comes twice"
        if mark == "start" and idle:
            yield "clock", f"{here} the clock had stopped, and nothing was validated or saved"
        if mark:
            ticking, idle = mark == "start", mark == "stop"

def pauses(run):
    """(sentence, seconds, was there a validation?) of each stop of the clock, what its checkpoints took left out.
    Without the last of a run that saves its weights, as it does so then."""
    stop, saved, step, scored = 0, 0, 0, False
    last = None if run.start["knobs"].get("save") else "end"
    for row in run.events:
        if row.get("mark") == "stop":
            stop, saved, scored = row["wall_s"], 0, False
        elif row["event"] in ("val", "checkpoint"):
            step, scored, saved = row["step"], scored or "val_loss" in row, saved + row.get("ms", 0) / 1e3
        elif step and (row.get("mark") == "start" or row["event"] == last):
            seconds = row["wall_s"] - stop - saved
            yield f"{run.name}: the clock stood for {seconds:.3f} s at step {step}", seconds, scored

def check_pauses(runs):
    """Seconds of training could be moved into a pause. On one kind of GPU validations take alike long; on CPUs, where
    they differ threefold by themselves, nothing can be said."""
    found = [pause for run in runs if run.gpu for pause in pauses(run)]
    usual = statistics.median_low([seconds for _, seconds, scored in found if scored] or [math.inf])
    for sentence, seconds, _ in found:
        if seconds > 2 * usual + 0.1:
            yield "clock", f"{sentence}, and usually {usual:.3f} s"

def first_gap(found, wanted, where):
    """(where, found, wanted) of the first place in which two values differ, keys of dicts and items of lists going on
    behind `where`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        pairs = {key: (found.get(key, "missing"), wanted.get(key, "missing"))
                 for key in found | wanted}
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = dict(enumerate(zip(found, wanted)))
    else:
        return where, found, wanted
    key = next(key for key, (old, new) in pairs.items() if old != new)
    return first_gap(*pairs[key], f"{where} {key}")

def differing(name, rows):
    """Problems among (code, what, found, wanted)."""
    for code, what, found, wanted in rows:
        if found != wanted:
            where, old, new = first_gap(found, wanted, what)
            yield code, f"{name}: {safe(where, 200)} is {safe(old, 160)}, and should be {safe(new, 160)}"

def says(argument, knobs):
    """May a run with these knobs have had this command-line argument?"""
    name, _, text = argument.removeprefix("--").partition("=")
    if name in (*PLACES, "preset") or isinstance(knobs.get(name), list):
        return True
    with contextlib.suppress(ValueError):
        return name in knobs and (text == str(knobs[name]) or float(text) == knobs[name])
    return False

def check_run(run):
    """Everything that a run's own files can contradict, the script included if it lies beside them."""
    for rows in rows_of_start(run), rows_of_schedule(run), rows_of_events(run), rows_of_end(run):
        yield from differing(run.name, rows)
    yield from check_clock(run)

# What follows yields rows (code, what, found, wanted) of a run.

def rows_of_start(run):
    """The start event against itself, and against the script."""
    start, knobs, data = run.start, run.start["knobs"], run.start["data"]
    ranks = start["world_size"]
    if run.script is not None:
        yield "script", "SHA-256 of train_gpt.py", sha256_of(run.script), run.script_sha256
    last = {argument.partition("=")[0]: argument for argument in start["argv"]}  # the last one of a name counts
    yield "path", f"a run id at {start['utc']}, to a minute", abs(moment(start["utc"]) - moment(run.name)) < 60, True
    yield "data", "gpu_count", start["gpu_count"], ranks if start["device"] == "cuda" else 0
    yield "knobs", "the list of arguments unlike the knobs", [a for a in last.values() if not says(a, knobs)], []
    said = start["changed"] | dict(seed=run.seed, val_tokens=data["val_tokens"])
    yield "knobs", "of knobs,", {name: knobs.get(name) for name in said}, said
    torch, _, build = start["torch"].partition("+")
    package = start["packages"].get("torch", torch).partition("+")[0]
    yield "schema", "torch, by its package,", torch, package
    if build.startswith("cu"):
        yield "schema", "torch's build, by cuda,", build, f"cu{start['cuda']}".replace(".", "")
    read = tokens_before(run.total, run.stages)
    stream = knobs["epochs"] * sum(shard["tokens"] for shard in data["train"])
    yield "tokens", f"reading {read} tokens from {stream} in all epochs", read <= stream, True
    if start["format"] == 1:
        yield "tokens", "ranks x accumulation", ranks * start["grad_accum"], knobs["sequences_per_step"]
        return
    said = [tuple(stage[key] for key in Stage._fields) for stage in start["stages"]]
    yield "tokens", "what stages says of first step, sequences and length", said, [*map(tuple, run.stages)]
    odd = [stage.sequences for stage in run.stages if ranks < 1 or stage.sequences % ranks]
    yield "tokens", f"the list of batches that {ranks} ranks do not divide", odd, []

def multiples(count, most):
    """Of `count`, up to `most`; none of 0."""
    return range(count or most + 1, most + 1, count or 1)

def normed_steps(run):
    """After which norms are written."""
    return multiples(run.start["knobs"].get("log_norms", 0), run.total)

def rows_of_schedule(run):
    """The events there are against those that the knobs imply."""
    n, knobs = run.total, run.start["knobs"]
    due = dict(status="complete", code=0, steps=n)
    yield "truncated", "the end", {key: run.end.get(key) for key in due}, due
    order = [row["step"] for row in run.events if "step" in row]
    yield "truncated", "the order of steps", order, sorted(order)
    steps = {1, n, *multiples(math.ceil(n / 48), n), *normed_steps(run)}
    for kind, due in dict(step=steps, val={0, n, *multiples(knobs["val_every"], n)},
                          checkpoint=multiples(knobs["checkpoint_every"], n), end=[n]).items():
        found = [row.get("step", n) for row in run.events if row["event"] == kind]
        if kind == "end" or not run.resumed:
            yield "truncated", f"the list of '{kind}' events", found, sorted(due)

def rows_of_events(run):
    """Each event against the knobs."""
    start, normed = run.start, normed_steps(run)
    losses = [p[2] or 0 for p in run.vals + run.steps]
    losses += [float(loss) for row in run.events for loss in row.get("sources", {}).values()]
    yield "nan", "losses below 0 or not finite", [loss for loss in losses if not 0 <= loss < math.inf], []
    for row in (row for row in run.events if "tokens" in row):
        done = row.get("step", row.get("steps"))
        stage = max(stage for stage in run.stages if stage.first < max(done, 1))
        due = stage._asdict() | dict(tokens=tokens_before(done, run.stages),
                                        val_tokens=start["data"]["val_tokens"])
        found = {key: row[key] for key in due if key in row}
        yield "tokens", f"'{row['event']}' of step {done}:", found, {key: due[key] for key in found}
        if row["event"] == "step" and "log_norms" in start["knobs"]:
            yield "truncated", f"whether step {done} has norms", "norms" in row, done in normed

def rows_of_end(run):
    """The end's own figures, if it has come."""
    end, room = run.end, run.start["gpu_memory_mib"] or 0
    if not end:
        return
    taken = {k: v for k, v in end.items()
             if k.endswith("_mib") and not 0 <= (v or 0) <= room}
    yield "track", f"memory that a GPU of {room} MiB does not have,", taken, {}
    rate = round(end["tokens"] / end["train_ms"] * 1e3) if end["train_ms"] > 1e-6 else None
    yield "tokens", "tokens_per_s", end["tokens_per_s"], rate
    scored = [row["val_loss"] for row in run.events if row["event"] == "val"] or [None]
    due = scored[-1] if run.start["format"] == 1 or end["status"] == "complete" else None
    yield "headline", "the end's loss", end["val_loss"], due

# ---- The public speedrun's logs: the script's own source, a line of 100 '=', versions and the GPUs, then the steps

STEP = re.compile(r"^step:(\d{1,9})/(\d{1,9})(?: .*)? train_time:(\d{1,12}(?:\.\d{1,9})?)(m?s)(?: .*)?$", re.A | re.M)
LOSS_WORD = re.compile(r"(?<= )(val|train)_loss:(\d{1,9}\.\d{1,20}|nan|inf)(?= )", re.A)
GPU = re.compile(r"^(?:\|\s+\d+\s+|Running .*?)(NVIDIA [\w .()-]*?)(?:\s{2,}| with world_size)", re.A | re.M)

def read_speedrun(path):
    """A log of one run. Most of 2024 have a rule above the source as well. Lines of the source may look like steps:
    reading starts behind it. A run may stop before its schedule ends, at a validation."""
    text, name = read_bytes(path).decode("utf-8", "replace").replace("\r\n", "\n"), safe(path.name)
    source, *parts = re.split("^={100}\n", text, flags=re.M)
    if parts and not source.strip():
        source, *parts = parts
    if not parts:
        raise Bad("schema", f"{name} has no line of 100 '=' below a source: no log of the public speedrun")
    if "import" not in source:
        raise Bad("schema", f"{name} has no source above its versions: what ran is not known")
    rest, script = "".join(parts), source[:-1].encode()
    points, curves = [], dict(val=[], train=[])
    for found in STEP.finditer(rest):
        points.append((int(found[1]), int(found[2])))
        ms = float(found[3]) * (1 if found[4] == "ms" else 1e3)
        for kind, loss in LOSS_WORD.findall(f"{found[0]} "):
            curves[kind].append((points[-1][0], None, float(loss), ms))
    for before, after in pairwise(points):
        if after < before or after[1] != before[1]:
            raise Bad("schema", f"{name} holds several runs, as step:{after[0]}/{after[1]} comes after "
                                f"step:{before[0]}/{before[1]}: give each a log")
    if not curves["val"] or points[0][1] == 0:
        raise Bad("schema", f"{name} has no validation loss with its train_time behind the source")
    gpu, digest = GPU.search(rest), sha256_of(text.encode())[:12]
    return Run(path.stem, path, script, sha256_of(script), points[-1][0],
               *curves.values(), gpu=gpu and gpu[1], planned=points[0][1], digest=digest)

# ---- A record

SETS = f"(runs|baseline|arms/{ARM.pattern})"
FILES = re.compile(rf"train_gpt[.]py|meta[.]json|README[.]md|[A-Za-z0-9_-]{{1,40}}[.]png|"
                   rf"{SETS}/{ID.pattern}/(log[.]txt|metrics[.]jsonl)")
FOLDERS = re.compile(rf"arms|{SETS}(/{ID.pattern})?")

class Record(NamedTuple):
    folder: Path
    meta: dict
    script: bytes
    readme: str
    sets: dict[str, list[Run]]  # runs, baseline, arms/<name>

    runs = property(lambda self: self.sets["runs"])
    baseline = property(lambda self: self.sets["baseline"])
    every = property(lambda self: sum(self.sets.values(), []))
    whole = property(lambda self: all(run.complete for run in self.every))

def entries(meta):
    """What meta.json says of the runs, beside the folder they lie in."""
    sets = [(label, meta[label]) for label in ("runs", "baseline")]
    return sets + [(f"arms/{arm['name']}", arm["runs"]) for arm in meta["arms"]]

def read_record(folder):
    """Bad on the first thing that cannot be read, is a link, too large, or has no place in a record."""
    if folder.is_symlink() or not folder.is_dir() or not NAME.fullmatch(folder.name):
        raise Bad("path", f"{safe(folder.name)} is no folder named like YYYY-MM-DD_ShortName")
    sizes = {}
    for path in folder.rglob("*"):
        inside, found = path.relative_to(folder).as_posix(), path.lstat()
        if stat.S_ISREG(found.st_mode) and FILES.fullmatch(inside):
            sizes[inside] = found.st_size
        elif not (stat.S_ISDIR(found.st_mode) and FOLDERS.fullmatch(inside)):
            raise Bad("path", f"{safe(inside)} is a link, or has no place in a record")
    pictures = sum(size for name, size in sizes.items() if name.endswith(".png"))
    most = ARMS_BYTES if (folder / "arms").exists() else RECORD_BYTES
    for size, limit in ((sum(sizes.values()), most), (pictures, PICTURES)):
        if size > limit:
            raise Bad("size", f"{size} bytes, and {limit} are allowed")
    meta, readme = strict_json(read_text(folder / "meta.json"), "meta.json"), read_text(folder / "README.md")
    fit(meta, META, "meta.json")
    for _, own in entries(meta):
        for entry in own:
            entry.pop("sha256", None)
    moment(f"{meta['date']} 000000")
    found = {inside.rpartition("/")[0] for inside in sizes if "/" in inside}
    listed = {f"{label}/{entry['run_id']}" for label, own in entries(meta) for entry in own}
    labels = [label for label, _ in entries(meta)]
    if odd := sorted(found ^ listed) or [label for label in labels if labels.count(label) > 1]:
        raise Bad("path", f"its folders hold, or meta.json lists, alone or twice: {safe(odd, 160)}")
    sets = {label: [read_run(folder / label / entry["run_id"]) for entry in own]
            for label, own in entries(meta)}
    return Record(folder, meta, read_bytes(folder / "train_gpt.py"), readme, sets)
