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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sets
import trials
from decide import MARGIN, Undecided, p_below, welch
from runs import (
    CLAIMS,
    LIMITS,
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
    decode,
    differing,
    entries,
    fit,
    read_bytes,
    read_record,
    read_run,
    read_tracks,
    safe,
    script_knobs,
    train_sha256,
)
from sets import (
    LIST_MARKS,
    LOGS,
    ROOT,
    find_record,
    folders,
    in_turns,
    listing,
    losses,
    tables,
    times,
    write_list,
)

# ---- Checks of a record

def same(found, wanted, digits: float = 1e-9) -> bool:
    """Equal; floats to `digits`, since a sum may be taken in another order."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(same(f, w, digits) for f, w in zip(found, wanted))
    numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
    return math.isclose(found, wanted, rel_tol=digits, abs_tol=1e-12) if numbers else found == wanted

def plain_result(runs: list[Run], baseline: list[Run]) -> dict:
    """The part of meta.json's result that needs no distribution. The gain stands where both sets ran interleaved."""
    sd = lambda values: statistics.stdev(values) if len(values) > 1 else None
    middle = statistics.median(times(runs))
    return dict(n=len(runs), val_loss_mean=statistics.fmean(losses(runs)), val_loss_sd=sd(losses(runs)),
                train_time_ms_median=middle, train_time_ms_sd=sd(times(runs)),
                gain_ms=statistics.median(times(baseline)) - middle if in_turns(runs, baseline) else None)

def tested_result(runs: list[Run], baseline: list[Run], track: dict) -> dict:
    """The part that needs scipy: p of the mean loss against the target, and the gain's 95 % interval (Welch), in ms."""
    target = track["target_loss"]
    gain = welch(times(runs), times(baseline)) if in_turns(runs, baseline) else None
    p = None if target is None else p_below(losses(runs), target)
    return dict(p=p, gain_ci_ms=list(gain[1:3]) if gain else None)

def changed_knobs(run: Run) -> dict:
    return {k: v for k, v in run.start["changed"].items() if k != "seed"}

def defaults(script: bytes) -> dict:
    """The knobs' defaults that the script writes as literals."""
    return {name: value for name, value in script_knobs(script).items() if value is not UNREAD}

def all_runs(record: Record) -> list[Run]:
    return [run for runs in record.sets.values() for run in runs]

def whole(record: Record) -> bool:
    return all(run.complete for run in all_runs(record))

def check_record(record: Record, tracks: dict[str, dict]) -> Iterator[Problem]:
    """Everything but the duplicates, which need the other records. Undecided if scipy is missing, at the end."""
    meta, name = record.meta, record.folder.name
    if not record.sets["runs"] or meta["track"] not in tracks:
        yield from differing(name, [("track", "the name of a track", meta["track"] in tracks, True),
                                    ("schema", "a list of runs", bool(record.sets["runs"]), True)])
        return
    for label, runs in record.sets.items():
        for run, entry in zip(runs, entries(meta)[label]):
            yield from check_run(run)
            own = run.meta() if run.complete else {}
            yield from differing(run.name, [("headline", f"{k} in its logs", v, entry[k]) for k, v in own.items()])
        yield from check_pauses(runs)
        seeds, recipes = [run.seed for run in runs], {run.recipe for run in runs}
        shared = label != "runs" and record.sets["runs"][0].recipe in recipes
        yield from differing(f"{name}/{label}", [
            ("knobs", "the number of recipes (script and knobs, seed aside)", len(recipes), len(runs[:1])),
            ("knobs", "having the recipe of runs/", shared, False),
            ("seeds", "the list of seeds that come twice", sorted({s for s in seeds if seeds.count(s) > 1}), [])])
    yield from check_meta(record)
    yield from check_parent(record)
    yield from check_track(record, tracks[meta["track"]])
    yield from check_readme(record)
    yield from check_left_out(record)
    yield from check_tests(record, tracks[meta["track"]])

def check_meta(record: Record) -> Iterator[Problem]:
    """meta.json against the script and the runs."""
    meta, first, every = record.meta, record.sets["runs"][0], all_runs(record)
    public = {k: v for k, v in meta["data"].items() if k != "public"}
    rows = [("script", "SHA-256 of train_gpt.py", hashlib.sha256(record.script).hexdigest(), meta["script_sha256"]),
            ("schema", "name in meta.json", meta["name"], record.folder.name),
            ("schema", "date in meta.json", meta["date"], meta["name"][:10]),
            ("schema", f"a date from {max(run.name for run in every)[:8]}, its last run, on",
             meta["date"].replace("-", "") >= max(run.name for run in every)[:8], True),
            ("schema", "a summary of at most 120 characters", len(meta["summary"]) <= 120, True),
            ("headline", "changed", meta["changed"], changed_knobs(first))]
    for run in every:
        rows += [("data", f"data of {run.name}", run.start["data"], public),
                 ("headline", f"world_size of {run.name}", run.start["world_size"], meta["world_size"]),
                 ("headline", f"hardware of {run.name}", run.hardware(), meta["hardware"]),
                 ("headline", f"software of {run.name}", run.software(), meta["software"])]
    known, names = defaults(record.script), script_knobs(record.script).keys()
    rows += [("knobs", f"knobs that {r.name} or train_gpt.py alone has", sorted(r.start["knobs"].keys() ^ names), [])
             for r in every if r.script_sha256 == meta["script_sha256"]]
    left = {row["run_id"] for row in meta["left_out"]}
    rows.append(("left-out", "the list of runs in it and left out", [r.name for r in every if r.name in left], []))
    rows.append(("knobs", "a knob of train_gpt.py whose default can be read", bool(known), True))
    rows += [("knobs", f"{k} in changed, since the script's default is {known[k]}", "missing", v)
             for k, v in json.loads(first.recipe[1]).items() if known.get(k, v) != v and k not in meta["changed"]]
    rows += [("script", f"script of {r.name}", r.script_sha256, meta["script_sha256"]) for r in record.sets["runs"]]
    for arm in meta["arms"]:
        knobs, script = json.loads(first.recipe[1]) | arm["changed"], arm["patch_sha256"] or meta["script_sha256"]
        for run in record.sets[f"arms/{arm['name']}"]:
            rows += [("script", f"script of {run.name}", run.script_sha256, script),
                     ("knobs", f"knobs of {run.name}", json.loads(run.recipe[1]), knobs)]
    if whole(record):
        result, wanted = meta["result"], plain_result(record.sets["runs"], record.sets["baseline"])
        rows += [("headline", f"result.{k}", result[k], v) for k, v in wanted.items() if not same(result[k], v)]
    yield from differing(record.folder.name, rows)

def check_parent(record: Record) -> Iterator[Problem]:
    """A parent is an older record of this track; the baseline has its script and its knobs."""
    meta, baseline = record.meta, record.sets["baseline"]
    if not (meta["parent"] or baseline or meta["claim"] == "record"):
        return
    path = RECORDS / str(meta["parent"])
    parent = read_record(path) if path.is_dir() and path.name != meta["name"] else None
    found = parent and parent.meta
    rows = [("script", f"the parent {meta['parent']}, as an older record of this track,",
             bool(found and found["track"] == meta["track"] and found["date"] <= meta["date"]), True)]
    if found:
        rows += [("script", f"script of baseline {r.name}", r.script_sha256, found["script_sha256"]) for r in baseline]
        knobs = json.loads(parent.sets["runs"][0].recipe[1]) if parent.sets["runs"] else None
        rows += [("knobs", f"knobs of {r.name}, the parent's,", json.loads(r.recipe[1]), knobs) for r in baseline]
    yield from differing(record.folder.name, rows)

def check_track(record: Record, track: dict) -> Iterator[Problem]:
    data, hardware = record.meta["data"], record.meta["hardware"]
    stream, runs, most = train_sha256(data), all_runs(record), track["train"]["max_epochs"]
    read, held = max(run.end.get("tokens", 0) for run in runs), sum(f["tokens"] for f in data["train"])
    epochs = read / max(held, 1)
    allowed = track["hardware"]["gpu"]
    rows = [("data", "val_sha256", data["val_sha256"], track["val_sha256"] or data["val_sha256"]),
            ("data", "val_tokens", data["val_tokens"], track["val_tokens"]),
            ("data", "SHA-256 over the training shards", stream, track["train"]["sha256"] or stream),
            ("track", f"'{hardware['gpu']}' as a GPU of the form {allowed}",
             bool(re.fullmatch(allowed, hardware["gpu"] or "")) if allowed else hardware["gpu"] is None, True),
            ("track", "the number of GPUs", hardware["count"], track["hardware"]["count"]),
            ("track", f"reading {epochs:.3f} epochs where {most} are allowed", epochs <= most, True),
            ("track", "the list of resumed runs", [run.name for run in runs if run.resumed], [])]
    text = record.script.decode("utf-8", "replace").lower()  # os.environ spells such flags in capitals
    rows += [("forbidden", f"'{word}' in train_gpt.py", word in text, False) for word in track["forbidden_text"]]
    yield from differing(record.folder.name, rows)

def check_left_out(record: Record) -> Iterator[Problem]:
    """Complete runs in `logs/` of this script and these knobs. Runs of a later day cannot have been left out."""
    known = {run.name for run in all_runs(record)} | {r["run_id"] for r in record.meta["left_out"]}
    recipe, last = record.sets["runs"][0].recipe, record.meta["date"].replace("-", "")
    for run in complete_runs():
        if run.name not in known and run.name[:8] <= last and run.recipe == recipe:
            yield "left-out", (f"{record.folder.name}: logs/{run.name} (seed {run.seed}, loss {run.val_loss:.6f}) has "
                               "this script and these knobs, and is neither in it nor left out with a reason")

@functools.cache
def complete_runs() -> list[Run]:
    """Those of `logs/`, read once for all records."""
    return sets.complete_runs(LOGS.glob("*"))

def check_tests(record: Record, track: dict) -> Iterator[Problem]:
    """p, target and gain: what needs scipy, and what the claim asserts."""
    if not whole(record):
        return
    runs, baseline, meta, result = record.sets["runs"], record.sets["baseline"], record.meta, record.meta["result"]
    rows = [("headline", f"result.{k}", result[k], v) for k, v in tested_result(runs, baseline, track).items()
            if not same(result[k], v, 1e-6)]
    if meta["claim"] == "record":
        time = welch(times(runs), times(baseline)) if in_turns(runs, baseline) else None
        rows.append(("gain", f"faster than an interleaved baseline, at p < 0.01 (p is {time and time[3]})",
                     bool(time and time[0] > 0 and time[3] < 0.01 and (result["gain_ms"] or 0) > 0), True))
        fine = len(runs) >= track["min_runs"] and result["p"] is not None and result["p"] < track["p"]
        rows.append(("target", f"a mean below {track['target_loss']}, the track's target, at p < {track['p']} with "
                     f"n >= {track['min_runs']} (it is {result['val_loss_mean']:.6f}, p = {result['p']}, n = "
                     f"{len(runs)})", fine, True))
    yield from differing(record.folder.name, rows)

NEAR = 2e-3  # nats: no two seeds came as near at every point, by a factor of ten

def check_duplicates(records: list[Record]) -> Iterator[tuple[str, str, str]]:
    """(record, code, sentence): a run id or a whole curve of times anywhere twice; a curve of losses too, noise aside,
    unless the seeds are equal and the sets are not: a change of speed alone leaves the losses as they were."""
    seen, curves = {}, []
    for record in records:
        for label, run in ((label, run) for label, runs in record.sets.items() for run in runs):
            place, points = f"{record.folder.name}/{label}/", run.vals + run.steps
            curve, doubles = [(p[0], p[2] or 0) for p in reversed(points)], []  # late points differ most
            for what, key in ("run id", run.name), ("curve of training times", tuple(p[3] for p in points)):
                doubles.append((what, seen.setdefault((what, key), place + run.name)))
            doubles += [("curve of losses", where + name) for where, name, seed, other in curves
                        if (seed != run.seed or where == place) and alike(curve, other)]
            curves.append((place, run.name, run.seed, curve))
            for what, other in doubles:
                if other != place + run.name:
                    sentence = f"{place}{run.name}: its {what} is that of {other}, not its own"
                    yield record.folder.name, "duplicate", sentence

def alike(a: list[tuple], b: list[tuple]) -> bool:
    return len(a) == len(b) and all(x[0] == y[0] and abs(x[1] - y[1]) < NEAR for x, y in zip(a, b))

def check_readme(record: Record) -> Iterator[Problem]:
    text, wanted = record.readme, tables(record.meta)
    found = text[max(text.find(TABLE[0]), 0) : text.find(TABLE[1]) + len(TABLE[1])]
    gap = next(((a, b) for a, b in zip(found.split("\n"), wanted.split("\n")) if a != b), (len(found), len(wanted)))
    rows = [("readme", "its generated table", *gap)] if found != wanted else []
    rows += [("readme", f"the count of '{mark}'", text.count(mark), 1) for mark in TABLE]
    if not record.meta["data"]["public"]:
        rows.append(("readme", "the first line, where data are private,", text.partition("\n")[0], PRIVATE))
    yield from differing(record.folder.name, rows)

# ---- verify

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
        except (Bad, OSError) as bad:
            problems.append((folder.name, getattr(bad, "code", "path"), str(bad)))
        except Undecided as undecided:
            missing = str(undecided) if not names or folder.name in names else missing
    problems += check_duplicates(read)
    failed = {name for name, *_ in problems}
    if not names and not problems:
        text = decode(read_bytes(ROOT / "README.md", LIMITS["README.md"]), "README.md", "utf-8")
        if listing(None, read) not in text or any(text.count(mark) != 1 for mark in LIST_MARKS):
            problems.append(("README.md", "readme", "its list of records is not what list --write writes"))
    problems = [row for row in problems if not names or row[0] in names]
    for name, code, sentence in problems:
        print(f"FAIL {safe(name, 80)} {code}: {safe(sentence)}")
    if missing:
        print(missing)
    print(f"{len(names or folders())} records, {len(failed & {*names} if names else failed)} failed")
    return 1 if problems else 3 if missing else 0

# ---- add

def find_run(name: str) -> Run:
    return read_run(Path(name) if (Path(name) / "metrics.jsonl").exists() else LOGS / name)

def arm_meta(name: str, runs: list[Run], first: Run) -> dict:
    knobs, own = json.loads(first.recipe[1]), json.loads(runs[0].recipe[1])
    patch = None if runs[0].script_sha256 == first.script_sha256 else runs[0].script_sha256
    changed = {k: v for k, v in own.items() if k not in knobs or knobs[k] != v}
    return dict(name=name, changed=changed, patch_sha256=patch, runs=[run.meta() for run in runs])

def make_meta(args, name: str, runs: list[Run], baseline: list[Run], arms: dict[str, list[Run]], track: dict) -> dict:
    first = runs[0]
    result = plain_result(runs, baseline) | tested_result(runs, baseline, track)
    order = ("n val_loss_mean val_loss_sd p train_time_ms_median train_time_ms_sd gain_ms gain_ci_ms").split()
    return dict(
        format=1, name=name, track=args.track, claim=args.claim, date=name[:10], author=args.author, parent=args.parent,
        summary=args.summary, script_sha256=first.script_sha256, changed=changed_knobs(first),
        data=dict(first.start["data"], public=not args.private), hardware=first.hardware(), software=first.software(),
        world_size=first.start["world_size"], runs=[run.meta() for run in runs],
        baseline=[run.meta() for run in baseline],
        arms=[arm_meta(arm, own, first) for arm, own in arms.items()],
        left_out=[dict(run_id=Path(t.partition("=")[0]).name, reason=t.partition("=")[2]) for t in args.leave_out],
        result={key: result[key] for key in order})

def add(args) -> int:
    """Pack run folders into a record: built aside, checked as `verify` would, and only then put in place."""
    tracks, name = read_tracks(), f"{time.strftime('%Y-%m-%d', time.gmtime())}_{args.name}"
    if not NAME.fullmatch(name):
        raise Bad("path", f"--name={safe(args.name, 80)} is not 1 to 40 letters and digits")
    if (RECORDS / name).exists():
        raise Bad("path", f"records/{name} is there already: take another --name")
    args.parent = find_record(args.parent).name if args.parent else None
    if args.track not in tracks:
        raise Bad("track", f"there is no track {safe(args.track, 40)}: there are {', '.join(tracks)}")
    runs, baseline = ([find_run(run) for run in given] for given in (args.runs, args.baseline))
    split = [(first.partition("="), rest) for first, *rest in args.arm]
    arms = {arm: [find_run(run) for run in [run, *rest]] for (arm, _, run), rest in split}
    if len(arms) < len(split) or any("=" not in text for text in args.leave_out):
        raise Bad("schema", "--arm takes NAME=RUN..., each name once, and --leave-out takes RUN=REASON")
    broken = [p for run in [*runs, *baseline, *sum(arms.values(), [])] for p in check_run(run)]
    if runs[0].script is None:
        broken.append(("script", f"{runs[0].name} holds no train_gpt.py, and a record needs the script that ran"))
    if broken:
        print(*(f"FAIL {name} {code}: {safe(text)}" for code, text in broken), "nothing was added", sep="\n")
        return 1
    meta = make_meta(args, name, runs, baseline, arms, tracks[args.track])
    fit(meta, META, "meta.json")  # before files are written under names that it gives
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=RECORDS)) / name
    try:
        for label, own in dict(runs=runs, baseline=baseline, **{f"arms/{a}": own for a, own in arms.items()}).items():
            for run, file in ((run, file) for run in own for file in RUN_FILES):
                (part / label / run.name).mkdir(parents=True, exist_ok=True)
                (part / label / run.name / file).write_bytes(read_bytes(run.folder / file, LIMITS[file]))
        (part / "train_gpt.py").write_bytes(runs[0].script)
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(skeleton(meta), encoding="utf-8", newline="\n")
        record, others = read_record(part), [read_record(folder) for folder in folders()]
        doubled = check_duplicates([*others, record])
        problems = [*check_record(record, tracks), *(problem for where, *problem in doubled if where == name)]
        for code, sentence in problems:
            print(f"FAIL {name} {code}: {safe(sentence)}")
        if problems:
            print("nothing was added")
            return 1
        part.rename(RECORDS / name)
        print(f"records/{name} is made. Say in its README.md, below the table, what changed and why.")
        write_list(sorted([*others, record], key=lambda r: r.folder.name))
        return 0
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)

def skeleton(meta: dict) -> str:
    private = [] if meta["data"]["public"] else [PRIVATE, ""]
    commands = [f"python records/records.py {command} {meta['name']}" for command in ("verify", "rerun")]
    text = [*private, f"# {meta['name']}", "", safe(meta["summary"]), "", tables(meta), "", "```", *commands, "```", ""]
    return "\n".join(text)

# ---- Command line

def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="records.py", description="Work with records; see records/README.md.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    def command(name, text, *arguments):
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        for names, options in arguments:
            sub.add_argument(*names.split(), **options)
    several, need = dict(nargs="+", action="extend", default=[]), dict(required=True)
    switch = lambda text: dict(action="store_true", help=text)
    a_set = dict(help="a record, a run folder, a folder of runs or public logs, one log, or several with commas; "
                 "NAME=A,B joins runs of several scripts under a name of yours")
    command("list", "records by track, best first", ("track", dict(nargs="?")),
            ("--write", switch("put the tables between the marks of README.md")))
    command("verify", "recompute everything from raw logs; a line a problem", ("names", dict(nargs="*")))
    command("add", "pack run folders into a record, if verify would pass it",
            ("runs", dict(nargs="+", help="folders of logs/, or their names")),
            ("--name", need | dict(help="1 to 40 letters and digits; today's date comes before it")), ("--track", need),
            ("--claim", need | dict(choices=CLAIMS)), ("--author", need),
            ("--summary", need | dict(help="at most 120 characters")),
            ("--parent", dict(help="the record that this one starts from")),
            ("--baseline", several | dict(metavar="RUN", help="runs of the parent's script, in turns with these")),
            ("--arm", dict(nargs="+", action="append", default=[], metavar="NAME=RUN", help="runs with other knobs")),
            ("--leave-out", several | dict(metavar="RUN=REASON", help="runs of this script and knobs, and why")),
            ("--private", switch("the text cannot be passed on")))
    command("rerun", "run a record's own script again, and compare", ("name", {}),
            ("--yes", switch("do not ask")),
            ("--data", dict(help="folder with the record's shards; default: looked for in data/")),
            ("--nproc", dict(type=int, default=0, help="ranks; default: as recorded")),
            ("--seed", dict(type=int, help="a recorded one, to compare with that run; default: the next unused")))
    margin = ("--margin", dict(type=float, default=MARGIN, help="losses count as equal where the interval of their "
                               f"difference holds 0 and lies within this; {MARGIN} nats by default"))
    target = ("--target", dict(type=float, help="print p of a mean loss below it; default: that of a record's track"))
    command("compare", "two sets of runs", ("a", a_set), ("b", a_set), margin, target)
    command("plot", "losses of training and validation", ("sets", a_set | dict(nargs="+")),
            ("--x", dict(choices=sets.AXES, default="time", help="against what, time by default")),
            ("--mark", several | dict(metavar="NAME=X,LOSS", help="points of which no log is here")),
            ("--out", dict(default="plot.png", help="the picture, plot.png by default")))
    command("import", "sort logs of the public speedrun into peers/", ("paths", dict(nargs="+")), target)
    command("trial", "does B help? All other arguments are knobs: --knob=value, --a.knob=value, --b.knob=value",
            ("a", dict(help="a script")), ("b", dict(help="a script")),
            ("--runs", dict(type=int, default=3, help="of each arm, 3 by default")), margin,
            ("--first-seed", dict(type=int, default=1, help="seeds go on from this one; 1 by default")))
    return top

def main(argv: list[str]) -> int:
    for number, code in ((signal.SIGTERM, 143), (getattr(signal, "SIGHUP", signal.SIGTERM), 129)):
        signal.signal(number, lambda *_, code=code: sys.exit(code))  # so that a training under way is ended too
    top = parser()
    args, rest = top.parse_known_args(argv)
    if rest and args.command != "trial":
        top.error(f"unknown: {safe(' '.join(rest))}")
    commands = {"list": sets.list_records, "verify": lambda args: verify(args.names), "add": add,
                "rerun": lambda args: trials.rerun(args, verify), "compare": sets.compare, "plot": sets.plot,
                "import": sets.import_logs, "trial": lambda args: trials.trial(args, rest)}
    try:
        return commands[args.command](args)
    except Undecided as undecided:
        print(undecided)
        return 3
    except Bad as bad:
        print(f"records.py: {safe(bad)} ({bad.code})", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 3
    except (OSError, UnicodeError) as error:
        print(f"records.py: {safe(error, 300)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("records.py: stopped", file=sys.stderr)
        return 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
