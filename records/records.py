"""Records: list, verify, add, and, by sets.py and trials.py, compare, plot, import, rerun and trial.

    python records/records.py COMMAND --help

Exit codes: 0 fine; 1 a check failed, or a rerun lies outside the interval; 2 bad usage or unreadable input; 3 not
decidable yet (the number of runs needed is printed, or what library is missing). `list` needs the standard library
alone; scipy and matplotlib are imported where they are used.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import sets
import trials
from decide import MARGIN, Undecided, p_below, welch
from runs import (
    CLAIMS,
    DATA,
    META,
    NAME,
    PRIVATE,
    RECORDS,
    RUN_FILES,
    TABLE,
    UNREAD,
    Bad,
    check_pauses,
    check_run,
    differing,
    fit,
    read_bytes,
    read_record,
    read_run,
    read_text,
    read_tracks,
    safe,
    script_knobs,
    sha256_of,
)
from sets import (
    LOGS,
    ROOT,
    complete_runs,
    every_record,
    find_record,
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

def rounded(value):
    """Floats to 7 digits, as a sum may be taken in another order, and scipy differ in the last."""
    if isinstance(value, list):
        return [*map(rounded, value)]
    return float(f"{value:.7g}") if isinstance(value, float) else value

def gain(runs, baseline):
    """Of time over a baseline that ran interleaved, in ms, by Welch's t."""
    return welch(times(runs), times(baseline)) if in_turns(runs, baseline) else None

def result_of(runs, baseline, track):
    """The result in meta.json: p is that of the mean loss against the target, `ci` the gain's 95 % interval."""
    sd = lambda values: statistics.stdev(values) if len(values) > 1 else None
    target, middle, found = track["target_loss"], statistics.median(times(runs)), gain(runs, baseline)
    return dict(n=len(runs), val_loss_mean=statistics.fmean(losses(runs)),
                val_loss_sd=sd(losses(runs)),
                p=target and p_below(losses(runs), target), train_time_ms_median=middle,
                train_time_ms_sd=sd(times(runs)), gain_ms=found and statistics.median(times(baseline)) - middle,
                gain_ci_ms=found and [found.low, found.high])

def computed(sets):
    """What meta.json says of its runs, by the folders that they lie in; not the result, nor what its author says."""
    first, arms = sets["runs"][0], []
    listed = {label: [run.meta() for run in own] for label, own in sets.items()}
    for label in [*sets][2:]:
        sha, knobs = sets[label][0].script_sha256, sets[label][0].knobs
        moved = {k: v for k, v in knobs.items() if first.knobs.get(k, ...) != v}
        arms.append(dict(name=label.removeprefix("arms/"), changed=moved, runs=listed[label],
                         patch_sha256=None if sha == first.script_sha256 else sha))
    changed = {k: v for k, v in first.start["changed"].items() if k != "seed"}
    return dict(first.facts(), script_sha256=first.script_sha256, changed=changed, runs=listed["runs"],
                baseline=listed["baseline"], arms=arms)

def check_record(record, tracks, logged):
    """Everything but the duplicates, which need the other records; `logged`: the complete runs of logs/. Undecided if
    scipy is missing, at the end."""
    meta, name, track = record.meta, record.folder.name, tracks.get(record.meta["track"])
    if not (track and record.runs and all(arm["runs"] for arm in meta["arms"])):
        yield "track", f"{name}: there are no runs, or there is no track {meta['track']}"
        return
    for label, runs in record.sets.items():
        for run in runs:
            yield from check_run(run)
        yield from check_pauses(runs)
        seeds, recipes = [run.seed for run in runs], {run.recipe for run in runs}
        yield from differing(f"{name}/{label}", [
            ("knobs", "the number of recipes (script and knobs, seed aside)", len(recipes), len(runs[:1])),
            ("knobs", "having the recipe of runs/", label != "runs" and record.runs[0].recipe in recipes, False),
            ("seeds", "the list of seeds that come twice", sorted({s for s in seeds if seeds.count(s) > 1}), [])])
    tested = rows_of_tests(record, track) if record.whole else ()
    for rows in (rows_of_meta(record, logged), rows_of_recipes(record), rows_of_track(record, track),
                 rows_of_readme(record), tested):
        yield from differing(name, rows)

# What follows yields rows (code, what, found, wanted) of a record.

def rows_of_meta(record, logged):
    """meta.json against its folder, its runs and those of logs/, where those of a later day cannot be left out."""
    meta, every, own = record.meta, record.every, record.folder.name
    day, last = meta["date"].replace("-", ""), max(run.name for run in every)[:8]
    left = {row["run_id"] for row in meta["left_out"]}
    yield "schema", "name and date in meta.json", (meta["name"], meta["date"]), (own, own[:10])
    yield "schema", f"a date from {last}, its last run, on", day >= last, True
    yield "left-out", "the list of runs in it and left out", [r.name for r in every if r.name in left], []
    mine = {run.name for run in logged if run.recipe == record.runs[0].recipe}
    lacks = sorted(mine - left - {run.name for run in every})
    yield "left-out", "the list of runs in logs/ that it lacks, with no reason given,", [
        name for name in lacks if name[:8] <= day], []
    said = meta | dict(data={key: meta["data"][key] for key in DATA})
    for run in every:
        for key, value in run.facts().items():
            yield "data" if key == "data" else "headline", f"{key} of {run.name}", value, said[key]
    for key, value in computed(record.sets).items() if record.whole else ():
        yield "headline", f"{key} in meta.json", said[key], value

def rows_of_recipes(record):
    """Scripts and knobs, as meta.json, the script and the parent say: this is an older record of the track, with the
    script and the knobs of the baseline."""
    meta, sha = record.meta, record.meta["script_sha256"]
    yield "script", "SHA-256 of train_gpt.py", sha256_of(record.script), sha
    knobs = script_knobs(record.script)
    known = {name: default for name, default in knobs.items() if default is not UNREAD}
    yield "knobs", "a knob of train_gpt.py whose default can be read", bool(known), True
    for name, value in record.runs[0].knobs.items():
        if known.get(name, value) != value and name not in meta["changed"]:
            yield "knobs", f"{name} in changed, since the script's default is {known[name]}", "missing", value
    for run in record.every:
        if run.script_sha256 == sha:
            odd = sorted(run.start["knobs"].keys() ^ knobs.keys())
            yield "knobs", f"knobs that {run.name} or train_gpt.py alone has", odd, []
    if meta["parent"] or record.baseline or meta["claim"] == "record":
        parent = parent_of(record)
        older = parent and parent.runs and parent.meta["track"] == meta["track"]
        older = older and parent.meta["date"] <= meta["date"]
        yield "script", f"the parent {meta['parent']}, as an older record of this track,", bool(older), True
        for run in record.baseline if older else ():
            yield "script", f"script of baseline/{run.name}", run.script_sha256, parent.meta["script_sha256"]
            yield "knobs", f"knobs of baseline/{run.name}", run.knobs, parent.runs[0].knobs

def rows_of_track(record, track):
    data, hardware = record.meta["data"], record.meta["hardware"]
    for key in ("val_sha256", "val_tokens"):
        yield "data", key, data[key], track[key] or data[key]
    stream = sha256_of("".join(shard["sha256"] or "" for shard in data["train"]).encode())
    yield "data", "SHA-256 over those of the training shards, in order,", stream, track["train"]["sha256"] or stream
    allowed, most, gpu = track["hardware"]["gpu"] or "", track["train"]["max_epochs"], hardware["gpu"] or ""
    yield "track", f"'{gpu}' as a GPU of the form '{allowed}'", bool(re.fullmatch(allowed, gpu)), True
    yield "track", "the number of GPUs", hardware["count"], track["hardware"]["count"]
    read = max(run.end.get("tokens", 0) for run in record.every)
    epochs = read / max(1, sum(shard["tokens"] for shard in data["train"]))
    yield "track", f"reading {epochs:.3f} epochs where {most} are allowed", epochs <= most, True
    yield "track", "the list of resumed runs", [run.name for run in record.every if run.resumed], []
    text = record.script.decode("utf-8", "replace").lower()  # os.environ spells such flags in capitals
    for word in track["forbidden_text"]:
        yield "forbidden", f"'{word}' in train_gpt.py", word in text, False

def rows_of_readme(record):
    (start, end), text = TABLE, record.readme
    found = start + text.partition(start)[2].rpartition(end)[0] + end
    yield "readme", "line by line its generated table", found.split("\n"), tables(record.meta).split("\n")
    if not record.meta["data"]["public"]:
        yield "readme", "the first line, where data are private,", text.partition("\n")[0], PRIVATE

def rows_of_tests(record, track):
    """What needs scipy: the result, and what the claim asserts of it."""
    result, n = record.meta["result"], len(record.runs)
    for key, wanted in result_of(record.runs, record.baseline, track).items():
        yield "headline", f"result.{key}", rounded(result[key]), rounded(wanted)
    if record.meta["claim"] != "record":
        return
    time, p = gain(record.runs, record.baseline), result["p"]
    faster = time and time.gap > 0 and time.p < 0.01 and (result["gain_ms"] or 0) > 0
    yield "gain", f"faster than an interleaved baseline, at p < 0.01 (p is {time and time.p})", bool(faster), True
    below = n >= track["min_runs"] and p is not None and p < track["p"]
    yield ("target", f"a mean below {track['target_loss']}, the track's target, at p < {track['p']} with n >= "
           f"{track['min_runs']} (it is {result['val_loss_mean']:.6f}, p = {p}, n = {n})", below, True)

NEAR = 2e-3  # nats: no two seeds came as near at every point, by a factor of ten

def check_duplicates(records):
    """(record, code, sentence): a run id or a whole curve of times anywhere twice; a curve of losses too, noise aside,
    unless the seeds are equal and the sets are not: a change of speed alone leaves the losses as they were."""
    seen, curves = {}, []
    runs = [(f"{record.folder.name}/{label}", run) for record in records
            for label, runs in record.sets.items() for run in runs]
    for place, run in runs:
        points, own = run.vals + run.steps, f"{place}/{run.name}"
        curve = [p[0] for p in points], [p[2] or 0 for p in points]
        doubles = [("run id", seen.setdefault(run.name, own)),
                   ("curve of training times", seen.setdefault(tuple(p[3] for p in points), own))]
        doubles += [("curve of losses", other) for other, seed, there, known in curves
                    if (seed != run.seed or there == place) and alike(curve, known)]
        curves.append((own, run.seed, place, curve))
        for what, other in doubles:
            if other != own:
                yield place.partition("/")[0], "duplicate", f"{own}: its {what} is that of {other}, not its own"

def alike(a, b):
    if a[0] != b[0]:
        return False
    gaps = sorted(abs(x - y) for x, y in zip(a[1], b[1]))
    # at every point, or, where some were moved, far nearer at most of them
    return gaps[-1] < NEAR or gaps[len(gaps) // 2] < NEAR / 20

# ---- verify

def report(problems):
    for name, code, sentence in problems:
        print(f"FAIL {safe(name, 80)} {code}: {safe(sentence)}")

def verify(names):
    """Recompute everything from raw logs, and print a line a problem. Names limit what is reported, not what is read.
    """
    tracks, logged = read_tracks(), complete_runs(LOGS.glob("*"))
    problems, read, missing = [], [], None
    names = [find_record(name).name for name in names]
    for folder in folders():
        try:
            read.append(read_record(folder))
            for problem in check_record(read[-1], tracks, logged):
                problems.append((folder.name, *problem))
        except Bad as bad:
            problems.append((folder.name, bad.code, str(bad)))
        except Undecided as undecided:
            missing = undecided
    problems = [row for row in [*problems, *check_duplicates(read)] if not names or row[0] in names]
    failed = {name for name, *_ in problems}
    if not names and not problems and listing(read) not in read_text(ROOT / "README.md"):
        problems.append(("README.md", "readme", "its list of records is not what list --write writes"))
    report(problems)
    if missing:
        print(missing)
    print(f"{len(names or folders())} records, {len(failed)} failed")
    return 1 if problems else 3 if missing else 0

# ---- add

def add(args):
    """Pack run folders into a record: built aside, checked as `verify` would, and only then put in place."""
    tracks, name = read_tracks(), f"{time.strftime('%Y-%m-%d', time.gmtime())}_{args.name}"
    if args.track not in tracks:
        raise Bad("track", f"there is no track {safe(args.track, 40)}: there are {', '.join(tracks)}")
    if not NAME.fullmatch(name) or (RECORDS / name).exists():
        raise Bad("path", f"--name={safe(args.name, 80)} is taken today, or is not 1 to 40 letters and digits")
    args.parent = find_record(args.parent).name if args.parent else None
    given = dict(runs=args.runs, baseline=args.baseline)
    for arm, _, listed in (text.partition("=") for text in args.arm):
        given.setdefault(f"arms/{arm}", []).extend(listed.split(","))
    found = lambda run: Path(run) if (Path(run) / "metrics.jsonl").exists() else LOGS / run
    sets = {label: [read_run(found(run)) for run in own] for label, own in given.items()}
    for run in sum(sets.values(), []):
        if not (run.complete and run.script):
            raise Bad("truncated", f"{run.name} is no complete run with the script that ran in its folder")
    reasons = [text.partition("=") for text in args.leave_out]
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=RECORDS)) / name
    try:
        own = {key: getattr(args, key) for key in ("track", "claim", "author", "parent", "summary")}
        meta = dict(own, format=1, name=name, date=name[:10], **computed(sets))
        meta["left_out"] = [dict(run_id=run, reason=reason) for run, _, reason in reasons]
        meta["data"] = dict(meta["data"], public=not args.private)
        meta["result"] = result_of(sets["runs"], sets["baseline"], tracks[args.track])
        write_record(part, sets, meta)
        record = read_record(part)
        problems = [(name, *problem) for problem in check_record(record, tracks, complete_runs(LOGS.glob("*")))]
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

def write_record(folder, sets, meta):
    fit(meta, META, "meta.json")  # before files are written under names that it gives
    for label, own in sets.items():
        for run in own:
            place = folder / label / run.name
            place.mkdir(parents=True, exist_ok=True)
            for file in RUN_FILES:
                (place / file).write_bytes(read_bytes(run.folder / file))
    (folder / "train_gpt.py").write_bytes(sets["runs"][0].script)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    private, name = "" if meta["data"]["public"] else f"{PRIVATE}\n\n", meta["name"]
    text = f"""{private}# {name}

{safe(meta["summary"])}

{tables(meta)}

```
python records/records.py verify {name}
python records/records.py rerun {name}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")

# ---- Command line

def mark(text):
    name, _, point = text.rpartition("=")
    at, loss = map(float, point.split(","))
    return name, at, loss

def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="records.py", description="Work with records; see records/README.md.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    several = dict(nargs="+", action="extend", default=[])
    a_set = dict(help="a record, a run folder, a folder of runs or public logs, one log, or several with commas; "
                 "NAME=A,B joins runs of several scripts under a name of yours; others are called by what differs")
    margin = dict(type=float, default=MARGIN, help="losses count as equal where the interval of their difference holds "
                  f"0 and lies within this; {MARGIN} nats by default")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added.add_argument

    option = command("list", sets.list_records, "records by track, best first")
    option("--write", action="store_true", help="put the tables between the marks of README.md")
    option = command("verify", lambda args: verify(args.names), "recompute everything from raw logs; a line a problem")
    option("names", nargs="*")
    option = command("add", add, "pack run folders into a record, if verify would pass it")
    option("runs", nargs="+", help="folders of logs/, or their names")
    option("--name", required=True, help="1 to 40 letters and digits; today's date comes before it")
    option("--track", required=True)
    option("--claim", required=True, choices=CLAIMS)
    option("--author", required=True)
    option("--summary", required=True, help="at most 120 characters")
    option("--parent", help="the record that this one starts from")
    option("--baseline", **several, metavar="RUN", help="runs of the parent's script, in turns with these")
    option("--arm", **several, metavar="NAME=RUN,RUN", help="runs with other knobs")
    option("--leave-out", **several, metavar="RUN=REASON", help="runs of this script and knobs, and why")
    option("--private", action="store_true", help="the text cannot be passed on")
    option = command("rerun", lambda args: verify([args.name]) or trials.rerun(args),
                     "run a record's own script again, and compare")
    option("name")
    option("--yes", action="store_true", help="do not ask")
    option("--data", help="folder with the record's shards; default: looked for in data/")
    option("--seed", type=int, help="default: the next unused")
    option = command("compare", sets.compare, "two sets of runs")
    option("a", **a_set)
    option("b", **a_set)
    option("--margin", **margin)
    option("--target", type=float, help="print p of a mean loss below it; default: that of a record's track")
    option = command("plot", sets.plot, "each run's training losses faint, their mean smoothed, validation dashed")
    option("sets", nargs="+", **a_set)
    option("--x", choices=sets.AXES, default="time", help="against what, time by default")
    option("--mark", **several, type=mark, metavar="NAME=X,LOSS", help="points of which no log is here")
    option("--out", default="plot.png", help="the picture, plot.png by default")
    option = command("import", sets.import_logs, "sort logs of the public speedrun into peers/, with their origins")
    option("paths", nargs="+")
    option = command("trial", trials.trial,
                     "does B help? Other arguments are knobs: --knob=value, --a.knob=value, --b.knob=value")
    option("a", help="a script")
    option("b", help="a script")
    option("--runs", type=int, default=3, help="of each arm, 3 by default")
    option("--margin", **margin)
    option("--first-seed", type=int, default=1, help="seeds go on from this one; 1 by default")
    return top

def main(argv):
    for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:  # so that a training under way is ended too
        signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    top = parser()
    args, args.knobs = top.parse_known_args(argv)
    if args.knobs and args.command != "trial":
        top.error(f"unknown: {safe(' '.join(args.knobs))}")
    try:
        return args.run(args)
    except (Undecided, ImportError) as undecided:
        print(undecided)
        return 3
    except (Bad, OSError, UnicodeError) as bad:
        print(f"records.py: {safe(bad)}{f' ({bad.code})' if isinstance(bad, Bad) else ''}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("records.py: stopped; finished runs are kept", file=sys.stderr)
        return 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
