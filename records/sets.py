"""The list of records, and sets of runs that differ by their seed alone: statistics, comparing, drawing, importing."""

import contextlib
import difflib
import json
import math
import os
import re
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from decide import MOST_RUNS, PAIRS, Duel, p_below, welch
from runs import (
    RECORDS,
    TABLE,
    Bad,
    Run,
    check_run,
    entries,
    moment,
    read_bytes,
    read_record,
    read_run,
    read_speedrun,
    read_tracks,
    safe,
)

ROOT, LOGS = RECORDS.parent, RECORDS.parent / "logs"
LIST_MARKS = "<!-- records: written by records.py list --write -->", "<!-- end of records -->"

# ---- Runs and records that are here

def complete_runs(folders):
    """Those of these run folders, by name. The others died, are still written, or are not of this format."""
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(Bad, OSError):
            found.append(read_run(folder))
    return [run for run in found if run.complete]

def folders():
    """Whatever lies in records/ under a name that is not the tools' own, so that no record goes unread."""
    found = (p for p in RECORDS.glob("[!.]*") if p.name not in ("tracks", "__pycache__"))
    return sorted(p for p in found if p.is_dir() or p.is_symlink())

def every_record():
    return [read_record(folder) for folder in folders()]

def find_record(name):
    """A record by its name, the part behind the date, or its path."""
    wanted, names = Path(name).name, [path.name for path in folders()]
    found = [own for own in names if wanted in (own, own.partition("_")[2])]
    if len(found) != 1:
        raise Bad("path", f"there is no record, run or log {safe(name, 80)}; the records are {', '.join(names)}")
    return RECORDS / found[0]

def parent_of(record):
    """The record that it names as such, if that is here and another."""
    path = RECORDS / str(record.meta["parent"])
    return read_record(path) if path.is_dir() and path.name != record.folder.name else None

# ---- Tables

def show(value, spec):
    return "n/a" if value is None else format(value, spec)

def listing(records):
    """A Markdown table by track, best first, and the tracks with their targets."""
    head = "| record | track | claim | time, s | loss | sd | n | p |", "|-|-|-|-|-|-|-|-|"
    out, goals = [LIST_MARKS[0], "", *head], []
    for name, track in read_tracks().items():
        own = [record.meta for record in records if record.meta["track"] == name]
        out += [row(meta) for meta in sorted(own, key=lambda meta: rank(track, meta))]
        goals.append(f"{name} {track['target_loss'] or 'none'}{'' if own else ' (no record yet)'}")
    out += ["", f"Targets, and without one times are not ranked: {', '.join(goals)}."]
    return "\n".join([*out, LIST_MARKS[1]])

def rank(track, meta):
    """By time where the target is met; what misses it, or has none, comes behind, by loss."""
    result = meta["result"]
    met = (result["p"] or 1) < track["p"]
    return not met, result["train_time_ms_median" if met else "val_loss_mean"]

def machine(gpu, count):
    return f"{count} x {safe(gpu, 60)}" if gpu else "CPU"

def row(meta):
    r, name = meta["result"], meta["name"]
    return (f"| [{name}](records/{name}) | {meta['track']} | {meta['claim']} | {r['train_time_ms_median'] / 1e3:.1f} | "
            f"{r['val_loss_mean']:.4f} | {show(r['val_loss_sd'], '.4f')} | {r['n']} | {show(r['p'], '.2g')} |")

def write_list(records):
    path, whole = ROOT / "README.md", listing(records)
    text = path.read_text(encoding="utf-8")
    text, found = re.subn(".*".join(LIST_MARKS), lambda _: whole, text, flags=re.S)
    if not found:
        raise Bad("readme", f"README.md lacks the lines '{LIST_MARKS[0]}' and '{LIST_MARKS[1]}'")
    path.write_text(text, encoding="utf-8", newline="\n")

def list_records(args):
    records = every_record()
    print("\n".join(listing(records).split("\n")[2:-1]))
    if args.write:
        write_list(records)
    return 0

def tables(meta):
    """The generated part of a record's README.md."""
    r, h, s = meta["result"], meta["hardware"], meta["software"]
    rows = [f"Track `{meta['track']}`, claim `{meta['claim']}`, parent `{meta['parent'] or 'none'}`, by "
            f"{meta['author']}.", "",
            "| set | run | seed | validation loss | training time, ms | steps | peak MiB, training / validation |",
            "|-|-|-|-|-|-|-|"]
    rows += [f"| {label} | {e['run_id']} | {e['seed']} | {e['val_loss']:.6f} | {e['train_time_ms']:.0f} | {e['steps']} "
             f"| {show(e['peak_train_mib'], 'd')} / {show(e['peak_val_mib'], 'd')} |"
             for label, listed in entries(meta) for e in listed]
    rows += ["", f"- loss {r['val_loss_mean']:.6f} (sd {show(r['val_loss_sd'], '.6f')}, n = {r['n']}), p against the "
             f"target {show(r['p'], '.3g')}", f"- training time, median {r['train_time_ms_median']:.0f} ms (sd "
             f"{show(r['train_time_ms_sd'], '.0f')}), gain over the baseline {show(r['gain_ms'], '.0f')} ms",
             f"- changed knobs: `{json.dumps(meta['changed'])}`",
             *(f"- arm {a['name']}: `{json.dumps(a['changed'])}`" for a in meta["arms"]),
             f"- hardware: {h['count']} x {h['gpu']}, driver {h['driver']}" if h["gpu"] else "- hardware: CPU",
             f"- software: Python {s['python']}, torch {s['torch']}",
             f"- data: {meta['data']['encoding']}, val_sha256 {meta['data']['val_sha256']}",
             *(f"- left out: {x['run_id']}, {x['reason']}" for x in meta["left_out"])]
    return "\n".join([TABLE[0], *map(safe, rows), TABLE[1]])

# ---- Sets

def spread(values, digits=".4f"):
    sd = f"sd {statistics.stdev(values):{digits}}, " if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}} ({sd}n = {len(values)})"

def losses(runs):
    return [run.val_loss for run in runs]

def times(runs):
    return [run.train_ms for run in runs]

@dataclass
class Set:
    """Runs of one recipe that differ by their seed alone."""
    label: str
    runs: list[Run]
    script: bytes | None
    track: str | None = None
    place: Path | None = None  # of the first thing named

def runs_at(path):
    """The run of a run folder, those of a folder of either kind of run, or that of one log of the public speedrun."""
    if (path / "metrics.jsonl").exists():
        return [read_run(path)]
    own = [log.parent for log in sorted(path.glob("*/metrics.jsonl"))]
    return [*map(read_run, own)] or public_logs([path])

def public_logs(paths):
    """Those of files, and of folders with all that lies in them. Says what it skips, and why."""
    found, logs = [], []
    for path in paths:
        inside = sorted(path.rglob("*.*")) if path.is_dir() else []
        logs += [log for log in inside if log.suffix in (".txt", ".log")] or [path]
    for path in logs:
        try:
            found.append(read_speedrun(path))
        except Bad as bad:
            print(f"skipped: {bad}")
    return found

def load(text):
    """The set that a name, a path or a list of these with commas stands for. Bad unless it has one recipe; behind a
    name of the user's, NAME=, scripts may differ."""
    match = None if os.path.exists(text) else re.fullmatch("([^/,=]*)=(.+)", text, re.S)
    named, listed = match.groups() if match else ("", text)
    paths, found, script, track = [], [], None, None
    for name in listed.split(","):
        here = [path for path in (Path(name), LOGS / name, ROOT / "peers" / name) if path.exists()]
        paths.append(here[0] if here else find_record(name))
        if (paths[-1] / "meta.json").exists():
            record = read_record(paths[-1])
            found, script, track = found + record.runs, record.script, record.meta["track"]
        else:
            found += runs_at(paths[-1])
    runs = of_one_recipe(found, safe(listed, 200), safe(named, 40))
    place = os.path.abspath(paths[0]) + f" and {len(paths) - 1} more" * (len(paths) > 1)
    return Set(safe(named, 40), runs, runs[0].script or script, track, Path(place))

def load_all(texts):
    """The sets that these stand for. Those without a name of the user's are called by the knobs that differ, if one
    script ran and these tell them apart, else by the ends of their paths, as long as it takes."""
    sets = [load(text) for text in texts]
    own = [s for s in sets if not s.label]
    tried = [["/".join(s.place.parts[-n:]) for s in own]
             for n in range(1, 9)]
    if len({s.runs[0].script_sha256 for s in own}) == 1:
        typed = [{f"{name}={value}" for name, value in s.runs[0].knobs.items()} for s in own]
        alike = set.intersection(*typed)
        tried.insert(0, [" ".join(sorted(knobs - alike)) for knobs in typed])
    best = max(tried, key=lambda labels: len({*labels} - {""}))  # the first of these
    for s, label in zip(own, best):
        s.label = safe(label)
    return sets

def of_one_recipe(found, text, named):
    """The complete ones, each once, and what is said of the others. Bad unless they make a set; `text` is what the user
    has typed, behind the name `named`, if any."""
    once = {run.digest or run.name: run for run in found}.values()
    runs, died = ([run for run in once if run.complete == whole] for whole in (True, False))
    if not runs:
        raise Bad("knobs", f"{text} holds {len(once)} runs, and no complete one")
    scripts, knobs = {run.script_sha256 for run in runs}, {json.dumps(run.knobs) for run in runs}
    if len(knobs) > 1 or len(scripts) > 1 and not named:
        for run in runs:
            print(f"{safe(run.name)}: script {run.script_sha256[:12]}, {safe(run.start.get('changed', run.knobs))}")
        raise Bad("knobs", f"{text} holds runs of {len(scripts)} scripts with {len(knobs)} sets of knobs: name those "
                           "of one, with commas between; NAME=A,B joins what scripts alone keep apart")
    seeds = [run.seed for run in runs if run.start]
    if len({*seeds}) < len(seeds):
        raise Bad("seeds", f"{text} has a seed twice, in {sorted(seeds)}")
    if died:
        print("note: only complete runs count, and these are not:", *(safe(run.name, 60) for run in died))
    for problem in (p for run in runs if run.start for p in check_run(run)):
        raise Bad(*problem)
    if len(scripts) > 1:
        print(f"note: {named} joins runs of {len(scripts)} scripts, by your word that they are one")
    return runs

def diff(a, b, names, limit=120):
    texts = [script.decode("utf-8", "replace").split("\n") for script in (a, b)]
    lines = [safe(line) for line in difflib.unified_diff(*texts, *names, lineterm="", n=2)]
    if len(lines) > limit:
        lines[limit:] = [f"... and {len(lines) - limit} lines more"]
    return lines or ["scripts: the same"]

def describe(s, target=None):
    """Its loss, time and memory, and p against a target, by default its track's."""
    target = target or read_tracks().get(s.track, {}).get("target_loss")
    goal = f" (p of a mean below {target:g}: {show(p_below(losses(s.runs), target), '.2g')})" if target else ""
    first = s.runs[0]
    steps, peak = f"{first.total} steps", first.end.get("peak_train_mib")
    if first.total < first.planned:
        steps = f"stopped at step {first.total} of {first.planned} planned,"
    where = machine(first.gpu, first.start["gpu_count"]) if first.start else safe(first.gpu or "GPU unknown", 60)
    took = spread([ms / 1e3 for ms in times(s.runs)], ".2f")
    return (f"{s.label}: loss {spread(losses(s.runs))}{goal}; {steps} in {took} s; "
            f"{f'peak {peak} MiB; ' if peak else ''}{where}")

def changes(a, b):
    """What of the knobs changed, and what one script alone has."""
    found = []
    for name in sorted(a.knobs | b.knobs):
        old, new = (run.knobs.get(name, "absent") for run in (a, b))
        if old != new:
            found.append(f"{name} {old} -> {new}")
    return safe(", ".join(found) or "none")

# ---- compare

PAUSE = 900  # seconds between runs that take turns: a start and a compilation, but no night

def in_turns(a, b):
    """Did these runs alternate, one at a time, on one kind of machine? Run ids begin with the start time."""
    if not all(run.start for run in a + b):
        return False
    neighbours = [*pairwise(sorted(a + b, key=lambda run: run.name))]
    pauses = [moment(y.name) - moment(x.name) - x.end["wall_s"] for x, y in neighbours]
    apart = all(-2 < pause < PAUSE for pause in pauses)  # ids are good to a second
    kinds = {json.dumps(dict(run.facts(), data=None)) for run in a + b}
    switches = sum((x in a) != (y in a) for x, y in neighbours)
    return apart and len(kinds) == 1 and switches >= max(2, min(len(a), len(b)))

def time_sentence(duel, equal):
    """How long B takes beside A; `equal`: in what sense their losses are, or nothing."""
    if not all(times(duel.a + duel.b)):
        return "no time was measured"
    pace = duel.decide(lambda run: math.log(run.train_ms))
    if pace is None or not in_turns(duel.a, duel.b):
        ratio = statistics.fmean(times(duel.b)) / statistics.fmean(times(duel.a))
        return f"no verdict on time (x {ratio:.3f}): that takes two runs of each, all in turns on one machine"
    ratio, low, high = map(math.exp, pace[:3])
    what = f"time to equal loss, {equal}," if equal else "training time, not at equal loss,"
    return f"{what} x {ratio:.3f} (95 % interval x {low:.3f} to {high:.3f})"

def signed(value):
    return f"{value:+.4f}" if abs(value) >= 5e-4 or not value else f"{value:+.1e}"

def said(found, how):
    interval = f"95 % interval {signed(found.low)} to {signed(found.high)}"
    return f"{signed(found.gap)} ({interval}, {how}, p = {found.p:.2g})"

def verdict(a, b, margin):
    """Prints what the losses and times say, the verdict in the last line; exit code as `compare_sets`."""
    duel = Duel(a.runs, b.runs)
    gap = duel.decide(lambda run: run.val_loss)
    by_welch = welch(losses(a.runs), losses(b.runs))
    if duel.identical:
        print(f"{b.label}: identical losses, to the last digit, with each seed of both ({len(duel.pairs)}): what is "
              f"computed did not change; {time_sentence(duel, 'to the last digit')}")
        return 0
    if gap is None:
        plain = statistics.fmean(losses(b.runs)) - statistics.fmean(losses(a.runs))
        print(f"{b.label}: its loss is {signed(plain)} from {a.label}'s ({duel.size}). Whether that is noise takes an "
              f"interval to say, and so {PAIRS} runs of each, with the same seeds")
        return 3
    if duel.by_pairs and by_welch:
        print(f"by Welch's t, which does not decide: {said(by_welch, f'n = {len(a.runs)} and {len(b.runs)}')}")
    equal = f"within {margin:g}" if -margin < gap.low and gap.high < margin else ""
    if gap.apart:
        word = "helped" if gap.gap < 0 else "hurt"
        start = f"{b.label} {word}{f', by less than {margin:g}' if equal else ''}: its loss is"
    elif equal:
        start = f"{b.label}: equal to {a.label} {equal},"
    else:
        needed = duel.needed()
        print(f"the losses are not separated: if {gap.gap:+.4f} is the true difference, to tell it with a chance of "
              f"80 % takes {f'n = {needed}' if needed else f'over {MOST_RUNS} runs'}")
        start = f"{b.label}: no effect on the loss that could be told from noise,"
    print(f"{start} {said(gap, duel.size)}; {time_sentence(duel, equal)}")
    return 0 if gap.apart or equal else 3

def compare_sets(a, b, margin, target=None):
    """Prints the diff of the scripts, what differs, and the verdict. Exit code: 0 where the losses differ, are
    identical, or are equal within `margin`, 3 where more runs are needed to say so."""
    first, other = a.runs[0], b.runs[0]
    public = None in (first.val_sha256, other.val_sha256)
    if public:
        print("note: public logs do not name their validation tokens; losses compare only if they were the same")
    elif first.val_sha256 != other.val_sha256:
        raise Bad("data", f"{a.label} was validated on the tokens {first.val_sha256[:12]} and {b.label} on "
                          f"{other.val_sha256[:12]}: their losses cannot be compared")
    if first.script_sha256 == other.script_sha256:
        print("scripts: the same")
    elif a.script and b.script:
        print(*diff(a.script, b.script, (a.label, b.label)), sep="\n")
    else:
        print("scripts: not the same, and one is not kept beside its runs: no diff")
    print(f"changed knobs: {'not known of public logs' if public else changes(first, other)}",
          describe(a, target), describe(b, target), sep="\n")
    machines = {f"{run.gpu}, torch {run.start.get('torch')}, driver {run.start.get('driver')}"
                for run in a.runs + b.runs}
    if len(machines) > 1:
        print(f"note: not one kind of machine, so the times say little: {safe(' and '.join(sorted(machines)))}")
    return verdict(a, b, margin)

def compare(args):
    return compare_sets(*load_all([args.a, args.b]), args.margin, args.target)

# ---- plot

AXES = dict(time=(3, 1e3, "training time, s"), tokens=(1, 1e6, "tokens, millions"),
            steps=(0, 1, "steps"))

def smooth(values):
    """A running mean over an eighth of the values, fewer at the ends."""
    half = len(values) // 16
    spans = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - k : i + k + 1]) for i, k in enumerate(spans)]

def mean_curve(curves, column, scale):
    """(x, loss) of the points that all curves have, by step."""
    by_step = [{p[0]: p for p in points if p[2] is not None} for points in curves]
    shared = [step for step in by_step[0] if all(step in points for points in by_step)]
    mean = lambda step, i: statistics.fmean(points[step][i] for points in by_step)
    return [mean(step, column) / scale for step in shared], [mean(step, 2) for step in shared]

def picture(sets, x, marks):
    """The losses of sets in one panel: each run's training faint, the smoothed mean over it, validation dashed.
    `marks`: (name, x, loss) of what no log is here for."""
    from matplotlib.figure import Figure

    column, scale, label = AXES[x]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis, thin = figure.subplots(), dict(lw=1, ms=4, mfc="none")
    for i, s in enumerate(sets):
        curves, color = [run.steps for run in s.runs], f"C{i}"
        for points in curves:
            axis.plot(*mean_curve([points], column, scale), color=color, lw=0.6, alpha=0.4)
        xs, ys = mean_curve(curves, column, scale)
        axis.plot(xs, smooth(ys), color=color, label=f"{s.label[:40]}: {spread(losses(s.runs))}")
        later = [run.vals[1:] or run.vals for run in s.runs]  # before training all are alike
        axis.plot(*mean_curve(later, column, scale), "o--", color=color, **thin)
    axis.plot([], [], "o--", color="gray", **thin, label="validation")
    for i, (name, at, loss) in enumerate(marks):
        axis.plot(at, loss, "Dsv^<>PX*p"[i % 10], color=f"C{len(sets) + i}", label=f"{name[:40]}: {loss}")
    points = [point for line in axis.lines for point in zip(*line.get_data())]
    start = 0.1 * axis.dataLim.x1  # behind the first fall
    shown = [loss for at, loss in points if at >= start and math.isfinite(loss)]
    shown += [loss for *_, loss in marks]
    axis.set(xlabel=label, ylabel="loss (solid: training, smoothed)", xlim=(0, None),
             ylim=(min(shown) - 0.1, max(shown) + 0.1))
    axis.grid(alpha=0.2)
    axis.legend(fontsize=min(7, 140 / (len(sets) + len(marks) + 1)))  # so that it fits into the axes
    return figure

def plot(args):
    sets = load_all(args.sets)
    shas = {run.val_sha256 for s in sets for run in s.runs}
    if len(shas - {None}) > 1:
        raise Bad("data", "the sets were validated on other tokens: their losses do not belong into one picture")
    if args.x == "tokens" and None in shas:
        raise Bad("tokens", "public logs say nothing of tokens: take --x time or --x steps")
    figure = picture(sets, args.x, args.mark)
    figure.savefig(args.out, dpi=84, format="png")
    print(f"{safe(args.out)}: {Path(args.out).stat().st_size} bytes")
    return 0

# ---- import

def import_logs(args):
    """Copy logs of the public speedrun into peers/<hash of their source>/, each a set for `compare` and `plot`, with
    an origins.tsv: a copy's name and where it came from, a line each."""
    found = {run.digest: run for run in public_logs([*map(Path, args.paths)])}.values()
    for sha in sorted({run.script_sha256[:12] for run in found}):
        own = [run for run in found if run.script_sha256.startswith(sha)]
        whole, folder = [run for run in own if run.complete], ROOT / "peers" / sha
        folder.mkdir(parents=True, exist_ok=True)
        for run in own:
            copy = folder / f"{run.digest}.txt"
            if copy.exists():
                continue
            copy.write_bytes(read_bytes(run.folder))
            with open(folder / "origins.tsv", "a", encoding="utf-8") as origins:
                origins.write(f"{copy.name}\t{safe(run.folder.resolve())}\n")
        print(f"peers/{sha}: {len(own)} logs, {len(whole)} complete")
        for total in sorted({run.total for run in whole}):
            print("  " + describe(Set(sha, [run for run in whole if run.total == total], None)))
    if not found:
        raise Bad("path", f"no log of a run of the public speedrun in {safe(' '.join(args.paths), 200)}")
    return 0
