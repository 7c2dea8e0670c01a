"""Records: list, verify, add, and, by trials.py, rerun, compare, plot, import and trial.

    python records/records.py COMMAND --help

Exit codes: 0 fine; 1 a check failed, or a rerun lies outside the interval; 2 bad usage or unreadable input; 3 not
decidable yet (the number of runs needed is printed, or that scipy is missing). `list` needs the standard library alone;
scipy and matplotlib are imported where they are used.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import trials
from runs import (
    CLAIMS,
    ID,
    LIMITS,
    NAME,
    PRIVATE,
    RECORDS,
    RUN_FILES,
    TABLE,
    Bad,
    Problem,
    Record,
    Run,
    check_run,
    differing,
    entries,
    read_bytes,
    read_record,
    read_run,
    read_tracks,
    safe,
)
from trials import LOGS, ROOT, Undecided, p_below, welch

LIST_MARKS = "<!-- records: written by records.py list --write -->", "<!-- end of records -->"

# ---- Checks of a record

def same(found, wanted, digits: float = 1e-9) -> bool:
    """Equal; floats to `digits`, since a sum may be taken in another order."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(same(f, w, digits) for f, w in zip(found, wanted))
    numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
    return math.isclose(found, wanted, rel_tol=digits, abs_tol=1e-12) if numbers else found == wanted

def losses(runs: list[Run]) -> list[float]:
    return [run.val_loss for run in runs]

def times(runs: list[Run]) -> list[float]:
    return [run.train_ms for run in runs]

def interleaved(a: list[Run], b: list[Run]) -> bool:
    """Did these runs alternate, on one kind of machine? Run ids begin with the start time."""
    order = [which for _, which in sorted([(run.name, "a") for run in a] + [(run.name, "b") for run in b])]
    alike = {json.dumps([run.hardware(), run.software()], sort_keys=True) for run in a + b}
    return len(alike) == 1 and sum(x != y for x, y in zip(order, order[1:])) >= 2

def plain_result(runs: list[Run], baseline: list[Run]) -> dict:
    """The part of meta.json's result that needs no distribution. The gain stands where both sets ran interleaved."""
    sd = lambda values: statistics.stdev(values) if len(values) > 1 else None
    middle = statistics.median(times(runs))
    return dict(n=len(runs), val_loss_mean=statistics.fmean(losses(runs)), val_loss_sd=sd(losses(runs)),
                train_time_ms_median=middle, train_time_ms_sd=sd(times(runs)),
                gain_ms=statistics.median(times(baseline)) - middle if interleaved(runs, baseline) else None)

def tested_result(runs: list[Run], baseline: list[Run], track: dict) -> dict:
    """The part that needs scipy: p of the mean loss against the target, and the gain's 95 % interval (Welch), in ms."""
    target = track["target_loss"]
    gain = welch(times(runs), times(baseline)) if interleaved(runs, baseline) else None
    p = None if target is None else p_below(losses(runs), target)
    return dict(p=p, gain_ci_ms=list(gain[1:3]) if gain else None)

def changed_knobs(run: Run) -> dict:
    return {k: v for k, v in run.start["changed"].items() if k != "seed"}

def whole(record: Record) -> bool:
    return all(run.complete for runs in record.sets.values() for run in runs)

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
            rows = [("seal", f"SHA-256 of its {k}", run.sha256[k], v) for k, v in entry["sha256"].items()]
            own = run.meta() if run.complete else entry
            rows += [("headline", f"{k} in its logs", own[k], entry[k]) for k in entry if k != "sha256"]
            yield from differing(run.name, rows)
        seeds = sorted(run.seed for run in runs)
        recipes = len({run.recipe for run in runs})
        yield from differing(f"{name}/{label}", [
            ("knobs", "the number of recipes (script and knobs, seed aside)", recipes, len(runs[:1])),
            ("seeds", "the list of distinct seeds", sorted(set(seeds)), seeds)])
    yield from check_meta(record)
    yield from check_track(record, tracks[meta["track"]])
    yield from check_readme(record)
    yield from check_left_out(record)
    yield from check_tests(record, tracks[meta["track"]])

def check_meta(record: Record) -> Iterator[Problem]:
    """meta.json against the script and the runs."""
    meta, first, every = record.meta, record.sets["runs"][0], [run for runs in record.sets.values() for run in runs]
    public = {k: v for k, v in meta["data"].items() if k != "public"}
    rows = [("script", "SHA-256 of train_gpt.py", hashlib.sha256(record.script).hexdigest(), meta["script_sha256"]),
            ("schema", "name in meta.json", meta["name"], record.folder.name),
            ("schema", "date in meta.json", meta["date"], meta["name"][:10]),
            ("schema", "a summary of at most 120 characters", len(meta["summary"]) <= 120, True),
            ("headline", "changed", meta["changed"], changed_knobs(first)),
            ("headline", "world_size", meta["world_size"], first.start["world_size"])]
    for run in every:
        rows += [("data", f"data of {run.name}", run.start["data"], public),
                 ("headline", f"hardware of {run.name}", run.hardware(), meta["hardware"]),
                 ("headline", f"software of {run.name}", run.software(), meta["software"])]
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

def check_track(record: Record, track: dict) -> Iterator[Problem]:
    data, hardware = record.meta["data"], record.meta["hardware"]
    stream = hashlib.sha256("".join(f["sha256"] or "" for f in data["train"]).encode()).hexdigest()
    runs, most = [run for runs in record.sets.values() for run in runs], track["train"]["max_epochs"]
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
    text = record.script.decode("utf-8", "replace")
    rows += [("forbidden", f"'{word}' in train_gpt.py", word in text, False) for word in track["forbidden_text"]]
    yield from differing(record.folder.name, rows)

def check_left_out(record: Record) -> Iterator[Problem]:
    """Complete runs in `logs/` of this script and these knobs. Runs of a later day cannot have been left out."""
    known = {run.name for runs in record.sets.values() for run in runs} | {r["run_id"] for r in record.meta["left_out"]}
    recipe, last = record.sets["runs"][0].recipe, record.meta["date"].replace("-", "")
    for folder in sorted(LOGS.glob("*")):
        if ID.fullmatch(folder.name) and folder.name not in known and folder.name[:8] <= last:
            try:
                run = read_run(folder)
            except Bad:
                continue  # it died, so it is not complete
            if run.complete and run.recipe == recipe:
                yield "left-out", (f"{record.folder.name}: logs/{run.name} (seed {run.seed}, loss {run.val_loss:.6f}) "
                                   "has this script and these knobs, and is neither in it nor left out with a reason")

def check_tests(record: Record, track: dict) -> Iterator[Problem]:
    """p, target and gain: what needs scipy, and what the claim asserts."""
    if not whole(record):
        return
    runs, baseline, meta, result = record.sets["runs"], record.sets["baseline"], record.meta, record.meta["result"]
    rows = [("headline", f"result.{k}", result[k], v) for k, v in tested_result(runs, baseline, track).items()
            if not same(result[k], v, 1e-6)]
    if meta["claim"] in ("record", "systems"):
        time = welch(times(runs), times(baseline)) if interleaved(runs, baseline) else None
        rows.append(("gain", f"faster than an interleaved baseline, at p < 0.01 (p is {time and time[3]})",
                     bool(time and time[0] > 0 and time[3] < 0.01 and result["gain_ms"] > 0), True))
    if meta["claim"] == "record":
        fine = len(runs) >= track["min_runs"] and result["p"] is not None and result["p"] < track["p"]
        rows.append(("target", f"a mean below {track['target_loss']} at p < {track['p']} with n >= {track['min_runs']} "
                     f"(it is {result['val_loss_mean']:.6f}, p = {result['p']}, n = {len(runs)})", fine, True))
    if meta["claim"] == "systems":
        gap = welch(losses(runs), losses(baseline))
        rows.append(("target", f"a loss difference inside +-0.003 (its 95 % interval is {gap and gap[1:3]})",
                     bool(gap and -0.003 < gap[1] and gap[2] < 0.003), True))
    if meta["claim"] == "reproduction":
        parent = RECORDS / str(meta["parent"]) / "train_gpt.py"
        found = hashlib.sha256(read_bytes(parent, LIMITS[parent.name])).hexdigest() if parent.exists() else None
        rows.append(("script", "SHA-256 of the parent's script, which this repeats,", found, meta["script_sha256"]))
    yield from differing(record.folder.name, rows)

def check_duplicates(records: list[Record]) -> Iterator[tuple[str, str, str]]:
    """(record, code, sentence): a run id or a whole curve of times anywhere twice, or of losses within a record."""
    seen = {}
    for record in records:
        for label, run in ((label, run) for label, runs in record.sets.items() for run in runs):
            here, points = f"{record.folder.name}/{label}/{run.name}", run.vals + run.steps
            for what, key in (("run id", run.name), ("curve of training times", tuple(p[3] for p in points)),
                              ("curve of losses", (record.folder.name, *(p[2] for p in points)))):
                other = seen.setdefault((what, key), here)
                if other != here:
                    yield record.folder.name, "duplicate", f"{here}: its {what} is that of {other}, not its own"

def tables(meta: dict) -> str:
    """The generated part of a record's README.md."""
    r, h, s = meta["result"], meta["hardware"], meta["software"]
    show = lambda value, spec: "n/a" if value is None else format(value, spec)
    rows = [f"Track `{meta['track']}`, claim `{meta['claim']}`, parent `{meta['parent'] or 'none'}`, by "
            f"{meta['author']}.", "",
            "| set | run | seed | validation loss | training time, ms | steps | peak MiB, training / validation |",
            "|-|-|-|-|-|-|-|"]
    rows += [f"| {label} | {e['run_id']} | {e['seed']} | {e['val_loss']:.6f} | {e['train_time_ms']:.0f} | {e['steps']} "
             f"| {show(e['peak_train_mib'], 'd')} / {show(e['peak_val_mib'], 'd')} |"
             for label, listed in entries(meta).items() for e in listed]
    rows += ["", f"- loss {r['val_loss_mean']:.6f} (sd {show(r['val_loss_sd'], '.6f')}, n = {r['n']}), p against the "
             f"target {show(r['p'], '.3g')}", f"- training time, median {r['train_time_ms_median']:.0f} ms (sd "
             f"{show(r['train_time_ms_sd'], '.0f')}), gain over the baseline {show(r['gain_ms'], '.0f')} ms",
             f"- changed knobs: `{json.dumps(meta['changed'])}`",
             *(f"- arm {a['name']}: `{json.dumps(a['changed'])}`" for a in meta["arms"]),
             f"- hardware: {h['count'] or ''} {h['gpu'] or 'CPU'}, driver {h['driver'] or 'n/a'}",
             f"- software: Python {s['python']}, torch {s['torch']}",
             f"- data: {meta['data']['encoding']}, val_sha256 {meta['data']['val_sha256']}",
             *(f"- left out: {x['run_id']}, {x['reason']}" for x in meta["left_out"])]
    return "\n".join([TABLE[0], *(safe(row, 10**4) for row in rows), TABLE[1]])

def check_readme(record: Record) -> Iterator[Problem]:
    text, wanted = record.readme, tables(record.meta)
    found = text[max(text.find(TABLE[0]), 0) : text.find(TABLE[1]) + len(TABLE[1])]
    gap = next(((a, b) for a, b in zip(found.split("\n"), wanted.split("\n")) if a != b), (len(found), len(wanted)))
    rows = [("readme", "its generated table", *gap)] if found != wanted else []
    if not record.meta["data"]["public"]:
        rows.append(("readme", "the first line, where data are private,", text.partition("\n")[0], PRIVATE))
    yield from differing(record.folder.name, rows)

# ---- verify and list

def folders() -> list[Path]:
    return sorted(path for path in RECORDS.glob("[0-9]*") if path.is_dir() or path.is_symlink())

def verify(names: list[str]) -> int:
    """Recompute everything from raw logs, and print a line a problem. Names limit what is reported, not what is read.
    """
    tracks, problems, read, missing = read_tracks(), [], [], None
    for name in names:
        if not NAME.fullmatch(name) or not (RECORDS / name).is_dir():
            raise Bad("path", f"there is no record {safe(name, 80)} in records/")
    for folder in folders():
        try:
            read.append(read_record(folder))
            for problem in check_record(read[-1], tracks):
                problems.append((folder.name, *problem))
        except Bad as bad:
            problems.append((folder.name, bad.code, str(bad)))
        except Undecided as undecided:
            missing = str(undecided)
    problems += check_duplicates(read)
    if not names and not problems and listing(None) not in (ROOT / "README.md").read_text(encoding="utf-8"):
        problems.append(("README.md", "readme", "its table of records is old, and should be written by list --write"))
    problems = [row for row in problems if not names or row[0] in names]
    for name, code, sentence in problems:
        print(f"FAIL {safe(name, 80)} {code}: {sentence}")
    if missing:
        print(missing)
    print(f"{len(names or folders())} records, {len({row[0] for row in problems})} failed")
    return 1 if problems else 3 if missing else 0

def listing(only: str | None) -> str:
    """Markdown tables by track, best first; other GPUs, or another count of them, make another table."""
    tracks, metas, out = read_tracks(), [read_record(folder).meta for folder in folders()], [LIST_MARKS[0]]
    if only and only not in tracks:
        raise Bad("track", f"there is no track {safe(only, 40)}: there are {', '.join(tracks)}")
    for name, track in tracks.items():
        timed, goal = track["hardware"]["count"] > 0, track["target_loss"]
        own = [meta for meta in metas if meta["track"] == name]
        if only not in (None, name):
            continue
        out += ["", f"**{name}**, {f'target {goal}' if goal else 'no target, time not ranked'}. {safe(track['clock'])}"]
        out += [] if own else ["No record: nobody has run ours there."]
        machine = lambda meta: (meta["hardware"]["count"], str(meta["hardware"]["gpu"]))
        key = "train_time_ms_median" if timed else "val_loss_mean"
        for kind in sorted({machine(meta) for meta in own}):
            title = f"{kind[0]} x {safe(kind[1], 60)}" if timed else "CPU"
            out += ["", f"| {title} | claim | time, s | loss | sd | n | p | parent | gain, s |", "|-|-|-|-|-|-|-|-|-|"]
            here = sorted((m["result"][key], m["name"], row(m, timed)) for m in own if machine(m) == kind)
            out += [cells for *_, cells in here]
    return "\n".join([*out, LIST_MARKS[1]])

def row(meta: dict, timed: bool) -> str:
    r, show = meta["result"], lambda value, spec: "n/a" if value is None else format(value, spec)
    gain = r["gain_ms"] / 1e3 if timed and r["gain_ci_ms"] else None  # only from interleaved runs
    time = f"{r['train_time_ms_median'] / 1e3:.1f}" if timed else "not ranked"
    cells = [f"[{meta['name']}](records/{meta['name']})", meta["claim"], time, f"{r['val_loss_mean']:.4f}",
             show(r["val_loss_sd"], ".4f"), str(r["n"]), show(r["p"], ".2g"), meta["parent"] or "none",
             show(gain, ".2f")]
    return f"| {' | '.join(cells)} |"

def list_records(args) -> int:
    text, path = listing(args.track), ROOT / "README.md"
    print("\n".join(text.split("\n")[1:-1]).strip())
    if args.write:
        readme = path.read_text(encoding="utf-8")
        (before, _, rest), whole_list = readme.partition(LIST_MARKS[0]), listing(None)
        if LIST_MARKS[1] not in rest:
            raise Bad("readme", f"README.md lacks the lines '{LIST_MARKS[0]}' and '{LIST_MARKS[1]}'")
        path.write_text(before + whole_list + rest.partition(LIST_MARKS[1])[2], encoding="utf-8", newline="\n")
    return 0

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
        left_out=[dict(zip(("run_id", "reason"), text.split("=", 1))) for text in args.leave_out],
        result={key: result[key] for key in order})

def add(args) -> int:
    """Pack run folders into a record: built aside, checked as `verify` would, and only then put in place."""
    tracks, name = read_tracks(), f"{time.strftime('%Y-%m-%d', time.gmtime())}_{args.name}"
    if not NAME.fullmatch(name) or (RECORDS / name).exists():
        raise Bad("path", f"{safe(name, 80)} is there already, or --name is not 1 to 40 letters and digits")
    if args.track not in tracks:
        raise Bad("track", f"there is no track {safe(args.track, 40)}: there are {', '.join(tracks)}")
    runs, baseline = ([find_run(run) for run in given] for given in (args.runs, args.baseline))
    split = [(first.partition("="), rest) for first, *rest in args.arm]
    arms = {arm: [find_run(run) for run in [run, *rest]] for (arm, _, run), rest in split}
    broken = [p for run in [*runs, *baseline, *sum(arms.values(), [])] for p in check_run(run)]
    if runs[0].script is None:
        broken.append(("script", f"{runs[0].name} holds no train_gpt.py, and a record needs the script that ran"))
    if broken:
        print(*(f"FAIL {name} {code}: {text}" for code, text in broken), sep="\n")
        return 1
    meta, part = make_meta(args, name, runs, baseline, arms, tracks[args.track]), RECORDS / ".part" / name
    try:
        for label, own in dict(runs=runs, baseline=baseline, **{f"arms/{a}": own for a, own in arms.items()}).items():
            for run, file in ((run, file) for run in own for file in RUN_FILES):
                (part / label / run.name).mkdir(parents=True, exist_ok=True)
                (part / label / run.name / file).write_bytes(read_bytes(run.folder / file, LIMITS[file]))
        (part / "train_gpt.py").write_bytes(runs[0].script)
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(skeleton(meta), encoding="utf-8", newline="\n")
        record = read_record(part)
        doubled = check_duplicates([*map(read_record, folders()), record])
        problems = [*check_record(record, tracks), *(problem for where, *problem in doubled if where == name)]
        for code, sentence in problems:
            print(f"FAIL {name} {code}: {sentence}")
        if not problems:
            part.rename(RECORDS / name)
            print(f"records/{name} is made. Say in its README.md what changed and why, then: records.py list --write")
        return 1 if problems else 0
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
    several, switch = dict(nargs="+", default=[]), dict(action="store_true")
    command("list", "records by track, best first", ("track", dict(nargs="?")), ("--write", switch))
    command("verify", "recompute everything from raw logs", ("names", dict(nargs="*")))
    command("add", "pack run folders into a record", ("runs", dict(nargs="+")), ("--name", dict(required=True)),
            ("--track", dict(required=True)), ("--claim", dict(required=True, choices=CLAIMS)),
            ("--author", dict(required=True)), ("--summary", dict(required=True)), ("--parent", {}),
            ("--baseline", several), ("--arm", dict(nargs="+", action="append", default=[], metavar="NAME=RUN")),
            ("--leave-out", dict(several, metavar="RUN=REASON")), ("--private", switch))
    command("rerun", "run a record's own script again", ("name", {}), ("--yes", switch), ("--data", {}),
            ("--nproc", dict(type=int, default=0)), ("--venv", switch), ("--seed", dict(type=int)))
    command("compare", "two sets of runs", ("a", {}), ("b", {}))
    command("plot", "loss against time, tokens and steps", ("sets", dict(nargs="+")),
            ("--out", dict(default="plot.png")))
    command("import", "sort logs of the public speedrun into peers/", ("paths", dict(nargs="+")))
    command("trial", "does B help? All other arguments are knobs: --knob=value, --a.knob=value, --b.knob=value",
            ("a", {}), ("b", {}), ("--runs", dict(type=int, default=3)))
    return top

def main(argv: list[str]) -> int:
    args, rest = parser().parse_known_args(argv)
    if rest and args.command != "trial":
        parser().error(f"unknown: {safe(' '.join(rest))}")
    commands = {"list": list_records, "verify": lambda args: verify(args.names), "add": add,
                "rerun": lambda args: trials.rerun(args, verify), "compare": trials.compare, "plot": trials.plot,
                "import": trials.import_logs, "trial": lambda args: trials.trial(args, rest)}
    try:
        return commands[args.command](args)
    except Undecided as undecided:
        print(undecided)
        return 3
    except Bad as bad:
        print(f"records.py: {bad} ({bad.code})", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print("records.py: stopped; the same command goes on", file=sys.stderr)
        return 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
