"""Records: list, verify, add, and, by sets.py and trials.py, compare, plot, import, rerun and trial.

    python records/records.py COMMAND --help

Exit codes: 0 fine; 1 a check failed, or a rerun lies outside the interval; 2 bad usage or unreadable input; 3 not
decidable yet (the number of runs needed is printed, or that scipy is missing). `list` needs the standard library alone;
scipy and matplotlib are imported where they are used.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sets
import trials
from decide import MARGIN, Estimate, Undecided, p_below, welch
from runs import (
    CLAIMS,
    META,
    NAME,
    PRIVATE,
    RECORDS,
    RUN_FILES,
    TABLE,
    UNREAD,
    Bad,
    Problem,
    Record,
    Run,
    check_pauses,
    check_run,
    differing,
    entries,
    fit,
    read_bytes,
    read_record,
    read_run,
    read_text,
    read_tracks,
    safe,
    script_knobs,
    train_sha256,
)
from sets import (
    LIST_MARKS,
    LOGS,
    ROOT,
    every_record,
    find_record,
    find_track,
    folders,
    in_turns,
    listing,
    losses,
    parent_of,
    tables,
    times,
    write_list,
)

# ---- Checks of a record

def same(found, wanted) -> bool:
    """Equal; floats almost, since a sum may be taken in another order, and scipy differ in the last digits."""
    pairs = zip_longest(*(value if isinstance(value, list) else [value] for value in (found, wanted)))
    return all(a == b or None not in (a, b) and math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-12) for a, b in pairs)

def gain(runs: list[Run], baseline: list[Run]) -> Estimate | None:
    """Of time over a baseline that ran interleaved, in ms, by Welch's t."""
    return welch(times(runs), times(baseline)) if in_turns(runs, baseline) else None

def result_of(runs: list[Run], baseline: list[Run], track: dict) -> dict:
    """The result in meta.json: p is that of the mean loss against the target, `ci` the gain's 95 % interval."""
    sd = lambda values: statistics.stdev(values) if len(values) > 1 else None
    target, middle, found = track["target_loss"], statistics.median(times(runs)), gain(runs, baseline)
    return dict(n=len(runs), val_loss_mean=statistics.fmean(losses(runs)), val_loss_sd=sd(losses(runs)),
                p=target and p_below(losses(runs), target), train_time_ms_median=middle,
                train_time_ms_sd=sd(times(runs)), gain_ms=found and statistics.median(times(baseline)) - middle,
                gain_ci_ms=found and [found.low, found.high])

def changed_knobs(run: Run) -> dict:
    return {k: v for k, v in run.start["changed"].items() if k != "seed"}

def check_record(record: Record, tracks: dict[str, dict]) -> Iterator[Problem]:
    """Everything but the duplicates, which need the other records. Undecided if scipy is missing, at the end."""
    meta, name, track = record.meta, record.folder.name, tracks.get(record.meta["track"])
    if not (track and record.runs):
        yield "track", f"{name}: there are no runs, or there is no track {meta['track']}"
        return
    for (label, runs), (_, listed) in zip(record.sets.items(), entries(meta)):
        for run, entry in zip(runs, listed):
            yield from check_run(run)
            own = run.meta() if run.complete else {}
            yield from differing(run.name, [("headline", f"{k} in its logs", v, entry[k]) for k, v in own.items()])
        yield from check_pauses(runs)
        seeds, recipes = [run.seed for run in runs], {run.recipe for run in runs}
        yield from differing(f"{name}/{label}", [
            ("knobs", "the number of recipes (script and knobs, seed aside)", len(recipes), len(runs[:1])),
            ("knobs", "having the recipe of runs/", label != "runs" and record.runs[0].recipe in recipes, False),
            ("seeds", "the list of seeds that come twice", sorted({s for s in seeds if seeds.count(s) > 1}), [])])
    for rows in (rows_of_meta(record), rows_of_recipes(record), rows_of_track(record, track), rows_of_readme(record)):
        yield from differing(name, rows)
    yield from check_left_out(record)
    yield from differing(name, rows_of_tests(record, track) if record.whole else ())

# What follows yields rows (code, what, found, wanted) of a record.

def rows_of_meta(record: Record) -> Iterator[tuple]:
    """meta.json against the script and the runs."""
    meta, every = record.meta, record.every
    day, last = meta["date"].replace("-", ""), max(run.name for run in every)[:8]
    left = {row["run_id"] for row in meta["left_out"]}
    own = record.folder.name
    yield "schema", "name and date in meta.json", (meta["name"], meta["date"]), (own, own[:10])
    yield "schema", f"a date from {last}, its last run, on", day >= last, True
    yield "headline", "changed", meta["changed"], changed_knobs(record.runs[0])
    yield "left-out", "the list of runs in it and left out", [r.name for r in every if r.name in left], []
    public = meta["data"]["public"]
    for run in every:
        facts = run.facts()
        yield "data", f"data of {run.name}", dict(facts.pop("data"), public=public), meta["data"]
        for key, value in facts.items():
            yield "headline", f"{key} of {run.name}", value, meta[key]

def rows_of_recipes(record: Record) -> Iterator[tuple]:
    """Scripts and knobs, as meta.json, the script and the parent say: this is an older record of the track, with the
    script and the knobs of the baseline."""
    meta, first, sha = record.meta, record.runs[0], record.meta["script_sha256"]
    yield "script", "SHA-256 of train_gpt.py", hashlib.sha256(record.script).hexdigest(), sha
    knobs = script_knobs(record.script)
    known = {name: default for name, default in knobs.items() if default is not UNREAD}
    yield "knobs", "a knob of train_gpt.py whose default can be read", bool(known), True
    for name, value in first.knobs.items():
        if known.get(name, value) != value and name not in meta["changed"]:
            yield "knobs", f"{name} in changed, since the script's default is {known[name]}", "missing", value
    for run in record.every:
        if run.script_sha256 == sha:
            odd = sorted(run.start["knobs"].keys() ^ knobs.keys())
            yield "knobs", f"knobs that {run.name} or train_gpt.py alone has", odd, []
    wanted = {"runs": (sha, first.knobs)}
    for arm in meta["arms"]:
        wanted[f"arms/{arm['name']}"] = arm["patch_sha256"] or sha, first.knobs | arm["changed"]
    if meta["parent"] or record.baseline or meta["claim"] == "record":
        parent = parent_of(record)
        older = parent and parent.runs and parent.meta["track"] == meta["track"] and parent.meta["date"] <= meta["date"]
        yield "script", f"the parent {meta['parent']}, as an older record of this track,", bool(older), True
        if older:
            wanted["baseline"] = parent.meta["script_sha256"], parent.runs[0].knobs
    for label, (script, knobs) in wanted.items():
        for run in record.sets[label]:
            yield "script", f"script of {label}/{run.name}", run.script_sha256, script
            yield "knobs", f"knobs of {label}/{run.name}", run.knobs, knobs

def rows_of_track(record: Record, track: dict) -> Iterator[tuple]:
    data, gpu, count = record.meta["data"], record.meta["hardware"]["gpu"], record.meta["hardware"]["count"]
    for key in ("val_sha256", "val_tokens"):
        yield "data", key, data[key], track[key] or data[key]
    stream = train_sha256(data)
    yield "data", "SHA-256 over the training shards", stream, track["train"]["sha256"] or stream
    allowed, most = track["hardware"]["gpu"], track["train"]["max_epochs"]
    yield "track", f"'{gpu}' as a GPU of the form {allowed}", bool(re.fullmatch(allowed or "", gpu or "")), True
    yield "track", "the number of GPUs", count, track["hardware"]["count"]
    read, held = max(run.end.get("tokens", 0) for run in record.every), sum(f["tokens"] for f in data["train"])
    epochs = read / max(held, 1)
    yield "track", f"reading {epochs:.3f} epochs where {most} are allowed", epochs <= most, True
    yield "track", "the list of resumed runs", [run.name for run in record.every if run.resumed], []
    text = record.script.decode("utf-8", "replace").lower()  # os.environ spells such flags in capitals
    for word in track["forbidden_text"]:
        yield "forbidden", f"'{word}' in train_gpt.py", word in text, False

def rows_of_readme(record: Record) -> Iterator[tuple]:
    text, wanted = record.readme, tables(record.meta)
    for mark in TABLE:
        yield "readme", f"the count of '{mark}'", text.count(mark), 1
    if wanted not in text:
        lacks = [line for line in wanted.split("\n") if line not in text]
        yield "readme", "what its generated table lacks, order aside,", lacks, "nothing"
    if not record.meta["data"]["public"]:
        yield "readme", "the first line, where data are private,", text.partition("\n")[0], PRIVATE

def rows_of_tests(record: Record, track: dict) -> Iterator[tuple]:
    """What needs scipy: the result, and what the claim asserts of it."""
    result, n = record.meta["result"], len(record.runs)
    for key, wanted in result_of(record.runs, record.baseline, track).items():
        yield "headline", f"result.{key}", result[key], result[key] if same(result[key], wanted) else wanted
    if record.meta["claim"] != "record":
        return
    time, p = gain(record.runs, record.baseline), result["p"]
    faster = time and time.gap > 0 and time.p < 0.01 and (result["gain_ms"] or 0) > 0
    yield "gain", f"faster than an interleaved baseline, at p < 0.01 (p is {time and time.p})", bool(faster), True
    below = n >= track["min_runs"] and p is not None and p < track["p"]
    yield ("target", f"a mean below {track['target_loss']}, the track's target, at p < {track['p']} with n >= "
           f"{track['min_runs']} (it is {result['val_loss_mean']:.6f}, p = {p}, n = {n})", below, True)

def check_left_out(record: Record) -> Iterator[Problem]:
    """Complete runs in `logs/` of this script and these knobs. Runs of a later day cannot have been left out."""
    known = {run.name for run in record.every} | {row["run_id"] for row in record.meta["left_out"]}
    last = record.meta["date"].replace("-", "")
    for run in complete_runs():
        if run.name not in known and run.name[:8] <= last and run.recipe == record.runs[0].recipe:
            yield "left-out", (f"{record.folder.name}: logs/{run.name} (seed {run.seed}, loss {run.val_loss:.6f}) has "
                               "this script and these knobs, and is neither in it nor left out with a reason")

@functools.cache
def complete_runs() -> list[Run]:
    """Those of `logs/`, read once for all records."""
    return sets.complete_runs(LOGS.glob("*"))

NEAR = 2e-3  # nats: no two seeds came as near at every point, by a factor of ten

def check_duplicates(records: list[Record]) -> Iterator[tuple[str, str, str]]:
    """(record, code, sentence): a run id or a whole curve of times anywhere twice; a curve of losses too, noise aside,
    unless the seeds are equal and the sets are not: a change of speed alone leaves the losses as they were."""
    seen, curves = {}, []
    runs = [(record.folder.name, label, run) for record in records for label, runs in record.sets.items()
            for run in runs]
    for name, label, run in runs:
        points, own = run.vals + run.steps, f"{name}/{label}/{run.name}"
        curve = [(step, loss or 0) for step, _, loss, _ in reversed(points)]  # late points differ most
        doubles = [("run id", seen.setdefault(run.name, own)),
                   ("curve of training times", seen.setdefault(tuple(p[3] for p in points), own))]
        doubles += [("curve of losses", other) for other, seed, place, there in curves
                    if (seed != run.seed or place == (name, label)) and alike(curve, there)]
        curves.append((own, run.seed, (name, label), curve))
        for what, other in doubles:
            if other != own:
                yield name, "duplicate", f"{own}: its {what} is that of {other}, not its own"

def alike(a: list[tuple], b: list[tuple]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and abs(x[1] - y[1]) < NEAR for x, y in zip(a, b))

# ---- verify

def report(problems: list[tuple[str, str, str]]):
    for name, code, sentence in problems:
        print(f"FAIL {safe(name, 80)} {code}: {safe(sentence)}")

def verify(names: list[str]) -> int:
    """Recompute everything from raw logs, and print a line a problem. Names limit what is reported, not what is read.
    """
    tracks, problems, read, missing = read_tracks(), [], [], None
    names = [find_record(name).name for name in names]
    for folder in folders():
        try:
            read.append(read_record(folder))
            for problem in check_record(read[-1], tracks):
                problems.append((folder.name, *problem))
        except Bad as bad:
            problems.append((folder.name, bad.code, str(bad)))
        except Undecided as undecided:
            missing = missing if names and folder.name not in names else undecided
    problems = [row for row in [*problems, *check_duplicates(read)] if not names or row[0] in names]
    failed = {name for name, *_ in problems}
    text = read_text(ROOT / "README.md")
    if not names and not problems and (
            listing(None, read) not in text or any(text.count(mark) != 1 for mark in LIST_MARKS)):
        problems.append(("README.md", "readme", "its list of records is not what list --write writes"))
    report(problems)
    if missing:
        print(missing)
    print(f"{len(names or folders())} records, {len(failed)} failed")
    return 1 if problems else 3 if missing else 0

# ---- add


def make_meta(args, name: str, sets: dict[str, list[Run]], track: dict) -> dict:
    """meta.json of a record of these sets, by the folders that they get."""
    runs, baseline, *others = sets.values()
    first, arms = runs[0], []
    for label, own in zip([*sets][2:], others):
        sha, knobs = own[0].script_sha256, own[0].knobs
        arms.append(dict(name=label.removeprefix("arms/"), patch_sha256=None if sha == first.script_sha256 else sha,
                         changed={k: v for k, v in knobs.items() if first.knobs.get(k, ...) != v},
                         runs=[run.meta() for run in own]))
    facts = first.facts()
    facts["data"] = dict(facts["data"], public=not args.private)
    left = [dict(run_id=Path(run).name, reason=reason) for run, _, reason in
            (text.partition("=") for text in args.leave_out)]
    return dict(
        format=1, name=name, track=args.track, claim=args.claim, date=name[:10], author=args.author, parent=args.parent,
        summary=args.summary, script_sha256=first.script_sha256, changed=changed_knobs(first), **facts,
        runs=[run.meta() for run in runs], baseline=[run.meta() for run in baseline], arms=arms, left_out=left,
        result=result_of(runs, baseline, track))

def add(args) -> int:
    """Pack run folders into a record: built aside, checked as `verify` would, and only then put in place."""
    track, name = find_track(args.track), f"{time.strftime('%Y-%m-%d', time.gmtime())}_{args.name}"
    if not NAME.fullmatch(name) or (RECORDS / name).exists():
        raise Bad("path", f"--name={safe(args.name, 80)} is taken today, or is not 1 to 40 letters and digits")
    args.parent = find_record(args.parent).name if args.parent else None
    given = dict(runs=args.runs, baseline=args.baseline)
    for first, *rest in args.arm:
        arm, _, run = first.partition("=")
        given[f"arms/{arm}"] = [run, *rest]
    if len(given) < 2 + len(args.arm) or any("=" not in text for text in args.leave_out):
        raise Bad("schema", "--arm takes NAME=RUN..., each name once, and --leave-out takes RUN=REASON")
    found = lambda run: Path(run) if (Path(run) / "metrics.jsonl").exists() else LOGS / run
    sets = {label: [read_run(found(run)) for run in own] for label, own in given.items()}
    problems = [(name, *problem) for own in sets.values() for run in own for problem in check_run(run)]
    if sets["runs"][0].script is None:
        raise Bad("script", "the first run's folder holds no train_gpt.py, and a record needs the script that ran")
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=RECORDS)) / name
    try:
        if not problems:
            write_record(part, sets, make_meta(args, name, sets, track))
            record = read_record(part)
            problems = [(name, *problem) for problem in check_record(record, {args.track: track})]
            problems += [row for row in check_duplicates([*every_record(), record]) if row[0] == name]
        report(problems)
        if problems:
            print("nothing was added")
            return 1
        part.rename(RECORDS / name)
        print(f"records/{name} is made. Say in its README.md, below the table, what changed and why.")
        write_list(every_record())
        return 0
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)

def write_record(folder: Path, sets: dict[str, list[Run]], meta: dict):
    fit(meta, META, "meta.json")  # before files are written under names that it gives
    for label, run in ((label, run) for label, own in sets.items() for run in own):
        (folder / label / run.name).mkdir(parents=True, exist_ok=True)
        for file in RUN_FILES:
            (folder / label / run.name / file).write_bytes(read_bytes(run.folder / file))
    (folder / "train_gpt.py").write_bytes(sets["runs"][0].script)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(skeleton(meta), encoding="utf-8", newline="\n")

def skeleton(meta: dict) -> str:
    """A record's README.md, whose text is still to be written."""
    private, name = "" if meta["data"]["public"] else f"{PRIVATE}\n\n", meta["name"]
    return f"""{private}# {name}

{safe(meta["summary"])}

{tables(meta)}

```
python records/records.py verify {name}
python records/records.py rerun {name}
```
"""

# ---- Command line

def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="records.py", description="Work with records; see records/README.md.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    several, switch = dict(nargs="+", action="extend", default=[]), dict(action="store_true")
    a_set = dict(help="a record, a run folder, a folder of runs or public logs, one log, or several with commas; "
                 "NAME=A,B joins runs of several scripts under a name of yours")
    margin = dict(type=float, default=MARGIN, help="losses count as equal where the interval of their difference holds "
                  f"0 and lies within this; {MARGIN} nats by default")
    target = dict(type=float, help="print p of a mean loss below it; default: that of a record's track")
    command = lambda name, text: commands.add_parser(
        name, help=text, description=text, allow_abbrev=False).add_argument
    option = command("list", "records by track, best first")
    option("track", nargs="?")
    option("--write", **switch, help="put the tables between the marks of README.md")
    option = command("verify", "recompute everything from raw logs; a line a problem")
    option("names", nargs="*")
    option = command("add", "pack run folders into a record, if verify would pass it")
    option("runs", nargs="+", help="folders of logs/, or their names")
    option("--name", required=True, help="1 to 40 letters and digits; today's date comes before it")
    option("--track", required=True)
    option("--claim", required=True, choices=CLAIMS)
    option("--author", required=True)
    option("--summary", required=True, help="at most 120 characters")
    option("--parent", help="the record that this one starts from")
    option("--baseline", **several, metavar="RUN", help="runs of the parent's script, in turns with these")
    option("--arm", nargs="+", action="append", default=[], metavar="NAME=RUN", help="runs with other knobs")
    option("--leave-out", **several, metavar="RUN=REASON", help="runs of this script and knobs, and why")
    option("--private", **switch, help="the text cannot be passed on")
    option = command("rerun", "run a record's own script again, and compare")
    option("name")
    option("--yes", **switch, help="do not ask")
    option("--data", help="folder with the record's shards; default: looked for in data/")
    option("--nproc", type=int, help="ranks; default: as recorded")
    option("--seed", type=int, help="a recorded one, to compare with that run; default: the next unused")
    option = command("compare", "two sets of runs")
    option("a", **a_set)
    option("b", **a_set)
    option("--margin", **margin)
    option("--target", **target)
    option = command("plot", "losses of training and validation")
    option("sets", nargs="+", **a_set)
    option("--x", choices=sets.AXES, default="time", help="against what, time by default")
    option("--mark", **several, metavar="NAME=X,LOSS", help="points of which no log is here")
    option("--out", default="plot.png", help="the picture, plot.png by default")
    option = command("import", "sort logs of the public speedrun into peers/")
    option("paths", nargs="+")
    option("--target", **target)
    option = command("trial", "does B help? Other arguments are knobs: --knob=value, --a.knob=value, --b.knob=value")
    option("a", help="a script")
    option("b", help="a script")
    option("--runs", type=int, default=3, help="of each arm, 3 by default")
    option("--margin", **margin)
    option("--first-seed", type=int, default=1, help="seeds go on from this one; 1 by default")
    return top

def main(argv: list[str]) -> int:
    for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:  # so that a training under way is ended too
        signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    top = parser()
    args, knobs = top.parse_known_args(argv)
    if knobs and args.command != "trial":
        top.error(f"unknown: {safe(' '.join(knobs))}")
    commands = {"list": sets.list_records, "verify": lambda args: verify(args.names), "add": add,
                "rerun": lambda args: verify([args.name]) or trials.rerun(args), "compare": sets.compare,
                "plot": sets.plot, "import": sets.import_logs, "trial": lambda args: trials.trial(args, knobs)}
    try:
        return commands[args.command](args)
    except Undecided as undecided:
        print(undecided)
        return 3
    except (Bad, OSError, UnicodeError, re.error) as bad:
        if isinstance(bad, BrokenPipeError):  # nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 3
        code = f" ({bad.code})" if isinstance(bad, Bad) else ""
        print(f"records.py: {safe(bad)}{code}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("records.py: stopped", file=sys.stderr)
        return 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
