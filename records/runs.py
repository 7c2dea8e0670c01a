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
import operator
import re
import stat
import statistics
import time
from collections.abc import Iterator
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
CLAIMS = ("reference", "record", "result", "negative")
TABLE = "<!-- tables: written by records.py, checked by verify -->", "<!-- end of tables -->"
PRIVATE = "**Data: private.** The text cannot be passed on: outsiders can verify this record, but not rerun it."
Problem = tuple[str, str]

class Bad(Exception):
    """What cannot be read, in one sentence; `code` is the check that it failed."""
    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code

# ---- Untrusted bytes

def safe(text, length: int = 2000) -> str:
    """`text` with control, bidirectional and other unprintable characters escaped, cut at `length`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[:length])

def read_bytes(path: Path) -> bytes:
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

def read_text(path: Path) -> str:
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Bad("schema", f"{path.name} is not UTF-8: byte {error.start} is {data[error.start]:#04x}") from None

def strict_json(text: str, what: str):
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


def misfit(value, spec, where: str) -> str | None:
    """Why `value` does not have the shape `spec`: a type, a pattern, a range, a constant, a tuple of alternatives,
    [items], or a dict of exactly these keys; the key `...` stands for all others. None if it fits."""
    if isinstance(spec, tuple):  # of none, where a key is unknown
        reasons = [misfit(value, s, where) for s in spec] or [f"{where} is unknown"]
        return None if None in reasons else reasons[0]
    if isinstance(spec, dict) and isinstance(value, dict):
        rest = spec.get(..., ())
        return first_misfit((value.get(k, MISSING), spec.get(k, rest), f"{where}.{safe(k)[:40]}")
                            for k in value | spec if k is not ...)
    if isinstance(spec, list) and isinstance(value, list):
        return first_misfit((v, spec[0], f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(spec, re.Pattern):
        fine, name = isinstance(value, str) and spec.fullmatch(value), f"of the form {spec.pattern}"
    elif isinstance(spec, range):
        fine, name = type(value) is int and value in spec, f"a count from {spec[0]} to {spec[-1]}"
    elif isinstance(spec, type):
        fine, name = type(value) is spec or (spec, type(value)) == (float, int), f"of type {spec.__name__}"
        fine = fine and not (type(value) in (int, float) and not abs(value) < 2**63)  # which nan is not either
    elif isinstance(spec, (dict, list)):
        fine, name = False, f"of type {type(spec).__name__}"
    else:
        fine, name = type(value) is type(spec) and value == spec, f"{spec!r}"
    return None if fine else f"{where} is {'missing' if value is MISSING else safe(repr(value))[:60]}, and not {name}"

def first_misfit(parts) -> str | None:
    return next(filter(None, (misfit(*part) for part in parts)), None)

def fit(value, spec, where: str):
    reason = misfit(value, spec, where)
    if reason:
        raise Bad("schema", reason)

def moment(text: str) -> float:
    """Seconds since 1970 of a UTC that has the digits YYYYMMDDHHMMSS first. Bad if no calendar or clock has it."""
    try:
        return calendar.timegm(time.strptime("".join(re.findall("[0-9]", text))[:14], "%Y%m%d%H%M%S"))
    except ValueError:
        raise Bad("schema", f"{text} is no time of the calendar") from None

# ---- The knobs of a script, read without running it

UNREAD = object()  # the default of a knob that is no literal
UNREADABLE = (SyntaxError, KeyError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError)
SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
        ast.Pow: math.pow}  # of floats, which overflows at once where a stranger has written 9**9**9

def literal(node: ast.expr | None):
    """The value of a literal, of sums of numbers such as 48 * 1024 or 2.0**9, and of knob(a literal, ...); tuples as
    lists. One of UNREADABLE for all else, and for numbers that are too long to be printed."""
    match node:
        case ast.Call(func=ast.Name(id="knob"), args=[first, *_]):
            return literal(first)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [literal(item) for item in items]
        case ast.BinOp(left=left, op=op, right=right):
            return SUMS[type(op)](1.0 * literal(left), 1.0 * literal(right))  # no text is multiplied by a float
    value = ast.literal_eval(node)
    str(value)
    return value

def defined_in(script: bytes) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """What a script defines at its top, by name, the last of a name."""
    own = (node for node in ast.parse(script).body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    return {node.name: node for node in own}

def script_knobs(script: bytes) -> dict:
    """The knobs of a script by name, with their defaults: the fields of its class Hyperparameters, `name: type = 1` or
    `name: type = knob(1, ...)`. Empty if there is none, or if this is no Python."""
    knobs = {}
    with contextlib.suppress(*UNREADABLE):
        for node in defined_in(script)["Hyperparameters"].body:
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), value=value):
                    knobs[name] = UNREAD
                    with contextlib.suppress(*UNREADABLE):
                        knobs[name] = literal(value)
    return knobs

# ---- Formats, all closed: an unknown key is refused

ID, SHA = re.compile("[0-9]{8}-[0-9]{6}-[0-9a-f]{6}"), re.compile("[0-9a-f]{64}")
DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
NAME = re.compile(f"{DAY.pattern}_[A-Za-z0-9]{{1,40}}")
UTC = re.compile(f"{DAY.pattern}T[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}}Z")
ARM = re.compile("[A-Za-z0-9_-][A-Za-z0-9_.-]{0,39}")
BATCHES = re.compile(r"\s*([1-9][0-9]{0,8}x[1-9][0-9]{0,8}(\s+|$))*")  # SEQUENCES x TOKENS of each stage
RATES = re.compile(r"\s*([0-9]{1,9}([.][0-9]{1,20})?(\s+|$))*")
TEXT, COUNT, LOSS = (str, None), (int, None), (float, "nan", "inf")
REASON, SUMMARY = re.compile(r".*\w.*", re.S), re.compile(".{0,120}", re.S)
KNOBS, CLOCK = {...: (bool, int, float, str, [(int, float, str)])}, dict(train_ms=float, wall_s=float)
ONE_UP, ANY_COUNT = range(1, 10**6 + 1), range(10**6 + 1)  # so that a schedule can be listed
RUN_KNOBS = dict(KNOBS, steps=ONE_UP, epochs=ONE_UP, sequences_per_step=ONE_UP, train_seq_len=ONE_UP,
                 val_tokens=range(1, 2**63), val_every=ANY_COUNT, checkpoint_every=ANY_COUNT,
                 log_norms=(ANY_COUNT, MISSING), batch_stages=(BATCHES, MISSING), lr_stages=(RATES, MISSING))
DATA = dict(encoding=str, val_sha256=SHA, val_tokens=int, train=[dict(name=str, tokens=int, sha256=(SHA, None))])
HARDWARE = dict(gpu=TEXT, count=int, memory_mib=COUNT, driver=TEXT)
SOFTWARE = dict(python=str, torch=str, cuda=TEXT, nccl=TEXT, triton=TEXT, packages={...: str})
STAGE = dict(first=int, sequences=int, seq_len=int, lr=(float, MISSING), doc_cap=(0, MISSING))
START = dict(run_id=ID, script_sha256=SHA, utc=UTC, argv=[str], knobs=RUN_KNOBS, changed=KNOBS, seed=int, device=str,
             gpu=TEXT, gpu_count=int, gpu_memory_mib=COUNT, driver=TEXT, **SOFTWARE, world_size=int,
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
RUN_META = dict(run_id=ID, seed=int, val_loss=float, train_time_ms=float, steps=int, tokens=int, peak_train_mib=COUNT,
                peak_val_mib=COUNT, sha256=(dict(log=SHA, metrics=SHA), MISSING))  # hashes: of older records
META = dict(
    format=1, name=NAME, track=str, claim=CLAIMS, date=DAY, author=str, parent=(NAME, None), summary=SUMMARY,
    script_sha256=SHA, changed=KNOBS, data=dict(DATA, public=bool), hardware=HARDWARE, software=SOFTWARE,
    world_size=int, runs=[RUN_META], baseline=[RUN_META], left_out=[dict(run_id=ID, reason=REASON)],
    arms=[dict(name=ARM, changed=KNOBS, patch_sha256=(SHA, None), runs=[RUN_META])],
    result=dict(n=int, val_loss_mean=float, val_loss_sd=(float, None), p=(float, None), train_time_ms_median=float,
                train_time_ms_sd=(float, None), gain_ms=(float, None), gain_ci_ms=([float], None)))
TRACK = dict(target_loss=(float, None), p=float, min_runs=int, val_sha256=(SHA, None), val_tokens=int,
             train=dict(max_epochs=int, sha256=(SHA, None)), hardware=dict(gpu=TEXT, count=int), clock=str,
             forbidden_text=[str], resumed=False)

def read_tracks() -> dict[str, dict]:
    tracks = {path.stem: strict_json(read_text(path), path.name) for path in sorted(RECORDS.glob("tracks/*.json"))}
    fit(tracks, {...: TRACK}, "tracks")
    return tracks

# ---- Stages: the tokens of every step, from the knobs alone

class Stage(NamedTuple):
    first: int  # step at which it begins
    sequences: int  # of a step, over all ranks
    seq_len: int  # tokens of a sequence
    lr: float  # multiplier of the learning rates, of scripts with the knob lr_stages

    def facts(self, knobs: dict) -> dict:
        """What the start event of a run with these knobs says of it."""
        return {key: value for key, value in self._asdict().items() if key != "lr" or "lr_stages" in knobs}

def stages_of(knobs: dict) -> list[Stage]:
    """Those of a run with these knobs; without `batch_stages`, as in all of format 1, one. Bad if they are not legal.
    """
    batches = knobs.get("batch_stages", "").split() or [f"{knobs['sequences_per_step']}x{knobs['train_seq_len']}"]
    rates, n, steps = knobs.get("lr_stages", "").split() or ["1"] * len(batches), len(batches), knobs["steps"]
    if len(rates) != n or n > min(steps, 1000):
        raise Bad("schema", f"metrics.jsonl: {n} batches and {len(rates)} rates are not stages of {steps} steps")
    return [Stage(k * steps // n, *map(int, batch.split("x")), float(lr))
            for k, (batch, lr) in enumerate(zip(batches, rates))]

def tokens_before(step: int, parts: list[Stage]) -> int:
    """Tokens of all steps before `step`, which are those after so many steps."""
    spans = pairwise([*(min(step, stage.first) for stage in parts), step])
    return sum((end - first) * stage.sequences * stage.seq_len for (first, end), stage in zip(spans, parts))

def stage_at(step: int, parts: list[Stage]) -> Stage:
    return max(stage for stage in parts if stage.first <= max(step, 0))

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
    gpu_count: int = 0
    peak_mib: int | None = None
    planned: int = 0
    digest: str = ""  # of a public log

    @property
    def complete(self) -> bool:
        ended = not self.start or self.end.get("status") == "complete"
        return ended and bool(self.vals) and self.vals[-1][0] == self.total and math.isfinite(self.val_loss)

    resumed = property(lambda self: any(row["event"] == "resume" for row in self.events))
    val_loss = property(lambda self: self.vals[-1][2])
    train_ms = property(lambda self: self.vals[-1][3])
    seed = property(lambda self: self.start.get("seed"))
    val_sha256 = property(lambda self: self.start["data"]["val_sha256"] if self.start else None)

    @cached_property
    def stages(self) -> list[Stage]:
        return stages_of(self.start["knobs"])

    @cached_property
    def knobs(self) -> dict:
        """Those that say what is computed, by name, without the seed; of a public run its steps."""
        own = sorted(self.start.get("knobs", {}).items())
        return {k: v for k, v in own if k not in (*PLACES, "seed")} or dict(steps=self.total)

    @cached_property
    def recipe(self) -> tuple:
        """What runs that differ by their seed alone share: script and knobs."""
        return self.script_sha256, json.dumps(self.knobs)

    def facts(self) -> dict:
        """What all runs of a record share, under meta.json's names."""
        start = self.start
        hardware = dict(gpu=start["gpu"], count=start["gpu_count"], memory_mib=start["gpu_memory_mib"],
                        driver=start["driver"])
        return dict(data=start["data"], hardware=hardware, software={key: start[key] for key in SOFTWARE},
                    world_size=start["world_size"])

    def meta(self) -> dict:
        """Its entry in a record's meta.json."""
        own = dict(run_id=self.name, seed=self.seed, val_loss=self.val_loss, train_time_ms=self.train_ms)
        return own | {k: self.end[k] for k in RUN_META if k in self.end and k not in own}

def read_run(folder: Path) -> Run:
    """A run folder of ours. Bad if a file is missing, a link, too large or not of the format."""
    if folder.is_symlink() or not folder.is_dir():
        raise Bad("path", f"{safe(folder.name)} is a link, or no folder")
    read_bytes(folder / "log.txt")
    metrics = read_text(folder / "metrics.jsonl")
    if not metrics.endswith("\n"):
        raise Bad("truncated", f"{folder.name}: metrics.jsonl ends within a line")
    events = [strict_json(line, f"metrics.jsonl line {i}") for i, line in enumerate(metrics[:-1].split("\n"), 1)]
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
    def curve(kind: str, loss: str) -> list[tuple]:
        rows = [row for row in events if row["event"] == kind]
        return [(row["step"], row["tokens"], row[loss] and float(row[loss]), row["train_ms"]) for row in rows]
    end, script = last if last["event"] == "end" else {}, folder / "train_gpt.py"
    return Run(folder.name, folder, read_bytes(script) if script.exists() else None, start["script_sha256"],
               start["knobs"]["steps"], curve("val", "val_loss"), curve("step", "train_loss"), start, end, events,
               start["gpu"], start["gpu_count"], end.get("peak_train_mib"))

def train_sha256(data: dict) -> str:
    """One hash of all training shards, hex: over the hashes of the files, in order."""
    return hashlib.sha256("".join(f["sha256"] or "" for f in data["train"]).encode()).hexdigest()

def check_clock(run: Run) -> Iterator[Problem]:
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

def pauses(run: Run) -> Iterator[tuple[int, float, bool]]:
    """(step, seconds, was there a validation?) of each stop of the clock, what its checkpoints took left out. Without
    the last of a run that saves its weights, as it does so then."""
    stop, saved, step, scored = 0, 0, 0, False
    for row in run.events:
        if row.get("mark") == "stop":
            stop, saved, scored = row["wall_s"], 0, False
        elif row["event"] in ("val", "checkpoint"):
            step, scored, saved = row["step"], scored or "val_loss" in row, saved + row.get("ms", 0) / 1e3
        elif step and (row.get("mark") == "start" or row["event"] == "end" and not run.start["knobs"].get("save")):
            yield step, row["wall_s"] - stop - saved, scored

def check_pauses(runs: list[Run]) -> Iterator[Problem]:
    """Seconds of training could be moved into a pause. On one kind of GPU validations take alike long; on CPUs, where
    they differ threefold by themselves, nothing can be said."""
    found = [(run.name, *pause) for run in runs if run.gpu for pause in pauses(run)]
    usual = statistics.median_low([seconds for *_, seconds, scored in found if scored] or [math.inf])
    for name, step, seconds, _ in found:
        if seconds > 2 * usual + 0.1:
            yield "clock", f"{name}: the clock stood for {seconds:.3f} s at step {step}, and usually {usual:.3f} s"

def differing(name: str, rows) -> Iterator[Problem]:
    """Problems among (code, what, found, wanted)."""
    for code, what, found, wanted in rows:
        if found != wanted:
            if isinstance(found, dict) and isinstance(wanted, dict):  # only what differs fits into a sentence
                found, wanted = ({k: v for k, v in a.items() if k not in b or b[k] != v}
                                 for a, b in ((found, wanted), (wanted, found)))
            yield code, f"{name}: {safe(what, 200)} is {safe(found, 160)}, and should be {safe(wanted, 160)}"

def says(argument: str, knobs: dict) -> bool:
    """May a run with these knobs have had this command-line argument?"""
    name, _, text = argument.removeprefix("--").partition("=")
    if name in (*PLACES, "preset") or isinstance(knobs.get(name), list):
        return True
    with contextlib.suppress(ValueError):
        return name in knobs and (text == str(knobs[name]) or float(text) == knobs[name])
    return False

def check_run(run: Run) -> Iterator[Problem]:
    """Everything that a run's own files can contradict, the script included if it lies beside them."""
    for rows in rows_of_start(run), rows_of_schedule(run), rows_of_events(run), rows_of_end(run):
        yield from differing(run.name, rows)
    yield from check_clock(run)

# What follows yields rows (code, what, found, wanted) of a run.

def rows_of_start(run: Run) -> Iterator[tuple]:
    """The start event against itself, and against the script."""
    start, knobs, data, ranks = run.start, run.start["knobs"], run.start["data"], run.start["world_size"]
    if run.script is not None:
        yield "script", "SHA-256 of train_gpt.py", hashlib.sha256(run.script).hexdigest(), run.script_sha256
    near = abs(moment(start["utc"]) - moment(run.name)) < 60
    yield "path", f"a run id within a minute of utc {start['utc']}", near, True
    yield "data", "gpu_count", start["gpu_count"], ranks if start["gpu_count"] else 0
    yield "data", "the knob val_tokens", knobs["val_tokens"], data["val_tokens"]
    yield "seeds", "the knob seed", knobs.get("seed"), run.seed
    yield "knobs", "the list of arguments unlike the knobs", [a for a in start["argv"] if not says(a, knobs)], []
    yield "knobs", "what changed says", start["changed"], {name: knobs.get(name) for name in start["changed"]}
    versions = start["torch"], start["packages"].get("torch", start["torch"])
    yield "schema", "torch, by its package,", *(version.partition("+")[0] for version in versions)
    read, stream = tokens_before(run.total, run.stages), knobs["epochs"] * sum(f["tokens"] for f in data["train"])
    yield "tokens", f"reading {read} tokens from {stream} in all epochs", read <= stream, True
    if start["format"] == 1:
        yield "tokens", "ranks x accumulation", ranks * start["grad_accum"], knobs["sequences_per_step"]
        return
    said = ({key: found[key] for key in Stage._fields if key in found} for found in start["stages"])
    own = (stage.facts(knobs) for stage in run.stages)
    yield "tokens", "what stages says, by number,", dict(enumerate(said)), dict(enumerate(own))
    yield ("tokens", f"the list of batches that {ranks} ranks do not divide",
           [stage.sequences for stage in run.stages if ranks < 1 or stage.sequences % ranks], [])

def multiples(count: int, most: int) -> range:
    """Of `count`, up to `most`; none of 0."""
    return range(count or most + 1, most + 1, count or 1)

def normed_steps(run: Run) -> range:
    """After which norms are written."""
    return multiples(run.start["knobs"].get("log_norms", 0), run.total)

def rows_of_schedule(run: Run) -> Iterator[tuple]:
    """The events there are against those that the knobs imply."""
    n, knobs = run.total, run.start["knobs"]
    yield "truncated", "the end", run.end and tuple(run.end[k] for k in ("status", "code", "steps")), ("complete", 0, n)
    order = [row["step"] for row in run.events if "step" in row]
    yield "truncated", "the order of steps", order, sorted(order)
    steps = {1, n, *multiples(math.ceil(n / 48), n), *normed_steps(run)}
    for kind, due in dict(step=steps, val={0, n, *multiples(knobs["val_every"], n)},
                          checkpoint=multiples(knobs["checkpoint_every"], n), end=[n]).items():
        found = [row.get("step", n) for row in run.events if row["event"] == kind]
        if kind == "end" or not run.resumed:
            yield "truncated", f"the list of '{kind}' events", found, sorted(due)

def rows_of_events(run: Run) -> Iterator[tuple]:
    """Each event against the knobs."""
    start, normed = run.start, normed_steps(run)
    losses = [p[2] or 0 for p in run.vals + run.steps]
    losses += [float(loss) for row in run.events for loss in row.get("sources", {}).values()]
    yield "nan", "losses below 0 or not finite", [loss for loss in losses if not 0 <= loss < math.inf], []
    for row in run.events:
        done = row.get("step", row.get("steps"))
        if "tokens" in row:
            yield "tokens", f"tokens after step {done}", row["tokens"], tokens_before(done, run.stages)
        if "val_tokens" in row:
            yield "data", f"val_tokens of step {done}", row["val_tokens"], start["data"]["val_tokens"]
        if row["event"] == "step" and "log_norms" in start["knobs"]:
            yield "truncated", f"whether step {done} has norms", "norms" in row, done in normed
        if row["event"] == "step" and start["format"] == 2:
            stage, found = stage_at(done - 1, run.stages), (row["sequences"], row["seq_len"])
            yield "tokens", f"sequences and length of step {done}", found, (stage.sequences, stage.seq_len)
            below = {key: row[key] for key in ("lr", "momentum", "window") if row[key] < 0}
            yield "schema", f"what is below 0 at step {done}", below, {}

def rows_of_end(run: Run) -> Iterator[tuple]:
    """The end's own figures, if it has come."""
    end, room = run.end, run.start["gpu_memory_mib"] or 0
    if not end:
        return
    taken = {k: v for k, v in end.items() if k.endswith("_mib") and not 0 <= (v or 0) <= room}
    yield "track", f"memory that a GPU of {room} MiB does not have", taken, {}
    rate = round(end["tokens"] / end["train_ms"] * 1e3) if end["train_ms"] > 1e-6 else None
    yield "tokens", "tokens_per_s", end["tokens_per_s"], rate
    scored = [row["val_loss"] for row in run.events if row["event"] == "val"] or [None]
    due = scored[-1] if run.start["format"] == 1 or end["status"] == "complete" else None
    yield "headline", "the end's loss", end["val_loss"], due

# ---- The public speedrun's logs: the script's own source, a line of 100 '=', versions and the GPUs, then the steps

RULE = "=" * 100
STEP = re.compile(r"^step:(\d{1,9})/(\d{1,9})(?: .*)? train_time:(\d{1,12}(?:\.\d{1,9})?)(m?s)(?: .*)?$", re.A | re.M)
LOSS_WORD = re.compile(r"(?<= )(val|train)_loss:(\d{1,9}\.\d{1,20}|nan|inf)(?= )", re.A)
PEAK = re.compile(r"^peak memory(?: allocated| consumption)?:? (\d{1,9}) MiB", re.A | re.M)
GPU_ROW = re.compile(r"^\|\s+\d+\s+(NVIDIA [\w .()-]*?)\s{2,}", re.A | re.M)  # of nvidia-smi
GPU_LINE = re.compile(r"^Running .*?(NVIDIA [\w .()-]*) with world_size[= ](\d{1,4})$", re.A | re.M)

def read_speedrun(path: Path) -> Run:
    """A log of one run. Most of 2024 have a rule above the source as well. Lines of the source may look like steps:
    reading starts behind it. A run may stop before its schedule ends, at a validation."""
    text, name = read_bytes(path).decode("utf-8", "replace").replace("\r\n", "\n"), safe(path.name)
    source, *parts = re.split(f"^{RULE}\n", text, flags=re.M)
    if parts and not source.strip():
        source, *parts = parts
    if not parts:
        raise Bad("schema", f"{name} has no line of 100 '=' below a source: no log of the public speedrun")
    if "import" not in source:
        raise Bad("schema", f"{name} has no source above its versions: what ran is not known")
    rest, script = "".join(parts), source[:-1].encode()
    points, curves, gpus = [], dict(val=[], train=[]), GPU_ROW.findall(rest)
    for found in STEP.finditer(rest):
        points.append((int(found[1]), int(found[2])))
        ms = float(found[3]) * (1 if found[4] == "ms" else 1e3)
        for kind, loss in LOSS_WORD.findall(f"{found[0]} "):
            curves[kind].append((points[-1][0], None, float(loss), ms))
    for before, after in pairwise(points):
        if after < before or after[1] != before[1]:
            a, b = (f"step:{step}/{total}" for step, total in (before, after))
            raise Bad("schema", f"{name} holds several runs, as {b} comes after {a}: give each a log")
    if not curves["val"] or points[0][1] == 0:
        raise Bad("schema", f"{name} has no validation loss with its train_time behind the source")
    for gpu, count in GPU_LINE.findall(rest):
        gpus = gpus or [gpu] * int(count)
    return Run(path.stem, path, script, hashlib.sha256(script).hexdigest(), points[-1][0], *curves.values(),
               gpu=gpus[0] if gpus else None, gpu_count=len(gpus), planned=points[0][1],
               peak_mib=max(map(int, PEAK.findall(rest)), default=None),
               digest=hashlib.sha256(text.encode()).hexdigest()[:12])

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

def entries(meta: dict) -> list[tuple[str, list[dict]]]:
    """What meta.json says of the runs, beside the folder they lie in."""
    sets = [(label, meta[label]) for label in ("runs", "baseline")]
    return sets + [(f"arms/{arm['name']}", arm["runs"]) for arm in meta["arms"]]

def read_record(folder: Path) -> Record:
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
    for what, size, limit in (("the record", sum(sizes.values()), most), ("its pictures", pictures, PICTURES)):
        if size > limit:
            raise Bad("size", f"{what}: {size} bytes, and {limit} are allowed")
    meta, readme = strict_json(read_text(folder / "meta.json"), "meta.json"), read_text(folder / "README.md")
    fit(meta, META, "meta.json")
    moment(f"{meta['date']} 000000")
    found = {inside.rpartition("/")[0] for inside in sizes if "/" in inside}
    listed = {f"{label}/{entry['run_id']}" for label, own in entries(meta) for entry in own}
    labels = [label for label, _ in entries(meta)]
    if odd := sorted(found ^ listed) or [label for label in labels if labels.count(label) > 1]:
        raise Bad("path", f"its folders hold, or meta.json lists, alone or twice: {safe(odd, 160)}")
    sets = {label: [read_run(folder / label / entry["run_id"]) for entry in own] for label, own in entries(meta)}
    return Record(folder, meta, read_bytes(folder / "train_gpt.py"), readme, sets)
