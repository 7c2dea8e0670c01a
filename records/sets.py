"""The list of records, and sets of runs that differ by their seed alone: statistics, comparing, drawing, importing."""

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import statistics
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from decide import PAIRS, Duel, Estimate, Undecided, distributions, look, p_below, welch
from runs import (
    ID,
    RECORDS,
    TABLE,
    Bad,
    Record,
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

def runs_in(folders) -> list[Run]:
    """Those of these run folders that can be read, by name."""
    found = []
    for folder in sorted(folders):
        with contextlib.suppress(Bad, OSError):
            found.append(read_run(folder))
    return found

def complete_runs(folders) -> list[Run]:
    """The others died, are still written, or are not of this format."""
    return [run for run in runs_in(folders) if run.complete]

def folders() -> list[Path]:
    """Whatever lies in records/ under a name that is not the tools' own, so that no record goes unread."""
    own = ("tracks", "__pycache__")
    return sorted(p for p in RECORDS.glob("[!.]*") if p.name not in own and (p.is_dir() or p.is_symlink()))

def every_record() -> list[Record]:
    return [read_record(folder) for folder in folders()]

def find_record(name: str) -> Path:
    """A record by its name, the part behind the date, or its path."""
    wanted = Path(name).name
    found = [path for path in folders() if wanted in (path.name, path.name.partition("_")[2])]
    if len(found) != 1:
        names = ", ".join(path.name for path in folders())
        raise Bad("path", f"there is no record, run or log {safe(name, 80)}; the records are {names or 'none'}")
    return found[0]

def find_track(name: str) -> dict:
    tracks = read_tracks()
    if name not in tracks:
        raise Bad("track", f"there is no track {safe(name, 40)}: there are {', '.join(tracks)}")
    return tracks[name]

def parent_of(record: Record) -> Record | None:
    """The record that it names as such, if that is here and another."""
    path = RECORDS / str(record.meta["parent"])
    return read_record(path) if path.is_dir() and path.name != record.folder.name else None

# ---- Tables

def show(value, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)

def listing(only: str | None, records: list[Record]) -> str:
    """Markdown tables by track, best first; other GPUs, or another count of them, make another table."""
    metas, out, empty, clocks = [record.meta for record in records], [LIST_MARKS[0]], [], set()
    for name, track in ({only: find_track(only)} if only else read_tracks()).items():
        timed, goal = track["hardware"]["count"] > 0, track["target_loss"]
        own = [meta for meta in metas if meta["track"] == name]
        title = f"**{name}**, {f'target {goal}' if goal else 'no target, time not ranked'}"
        if not (own or only):
            empty.append(title)
            continue
        out += ["", f"{title}. {'The same clock.' if track['clock'] in clocks else safe(track['clock'])}"]
        clocks.add(track["clock"])
        out += [] if own else ["No record yet."]
        machine = lambda meta: (meta["hardware"]["count"], str(meta["hardware"]["gpu"]))
        own.sort(key=lambda meta: (machine(meta), rank(track, meta)))
        for kind, ranked in groupby(own, machine):
            title = f"{kind[0]} x {safe(kind[1], 60)}" if timed else "CPU"
            out += ["", f"| {title} | claim | time, s | loss | sd | n | p | parent | gain, s |", "|-|-|-|-|-|-|-|-|-|"]
            out += [row(meta, timed) for meta in ranked]
    out += ["", f"No record yet: {'; '.join(empty)}."] if empty else []
    return "\n".join([*out, LIST_MARKS[1]])

def rank(track: dict, meta: dict) -> tuple:
    """By time, or by loss on CPUs; what misses the target, or has none, ranks last, by loss first."""
    result, timed = meta["result"], track["hardware"]["count"] > 0
    late = timed and not (result["p"] or 1) < track["p"]
    return late, late and result["val_loss_mean"], result["train_time_ms_median" if timed else "val_loss_mean"]

def row(meta: dict, timed: bool) -> str:
    r = meta["result"]
    gain = r["gain_ms"] / 1e3 if timed and r["gain_ci_ms"] else None  # only from interleaved runs
    time = f"{r['train_time_ms_median'] / 1e3:.1f}" if timed else "not ranked"
    return (f"| [{meta['name']}](records/{meta['name']}) | {meta['claim']} | {time} | {r['val_loss_mean']:.4f} | "
            f"{show(r['val_loss_sd'], '.4f')} | {r['n']} | {show(r['p'], '.2g')} | {meta['parent'] or 'none'} | "
            f"{show(gain, '.2f')} |")

def write_list(records: list[Record]):
    path, whole = ROOT / "README.md", listing(None, records)
    text, found = re.subn(".*".join(LIST_MARKS), lambda _: whole, path.read_text(encoding="utf-8"), flags=re.S)
    if not found:
        raise Bad("readme", f"README.md lacks the lines '{LIST_MARKS[0]}' and '{LIST_MARKS[1]}'")
    path.write_text(text, encoding="utf-8", newline="\n")

def list_records(args) -> int:
    records = every_record()
    print("\n".join(listing(args.track, records).split("\n")[1:-1]).strip())
    if args.write:
        write_list(records)
    return 0

def tables(meta: dict) -> str:
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
    return "\n".join([TABLE[0], *(safe(row, 10**4) for row in rows), TABLE[1]])

# ---- Sets

def spread(values: list[float], digits: str = ".4f") -> str:
    sd = f"sd {statistics.stdev(values):{digits}}, " if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}} ({sd}n = {len(values)})"

def losses(runs: list[Run]) -> list[float]:
    return [run.val_loss for run in runs]

def times(runs: list[Run]) -> list[float]:
    return [run.train_ms for run in runs]

@dataclass
class Set:
    """Runs of one recipe that differ by their seed alone."""
    label: str
    runs: list[Run]
    script: bytes | None
    track: str | None = None
    named: bool = False  # by the user

    losses = property(lambda self: losses(self.runs))
    times = property(lambda self: times(self.runs))

def runs_at(path: Path) -> list[Run]:
    """The run of a run folder, those of a folder of either kind of run, or that of one log of the public speedrun."""
    if path.suffix == ".py":
        raise Bad("path", f"{safe(path.name, 80)} is a script: compare takes runs; ./run.sh trial A.py B.py makes them")
    if path.is_file():
        return [read_speedrun(path)]
    if (path / "metrics.jsonl").exists():
        return [read_run(path)]
    return [read_run(p) for p in sorted(path.glob("*")) if ID.fullmatch(p.name)] or public_logs([path])

def public_logs(paths: list[Path]) -> list[Run]:
    """Those of files, and of folders with all that lies in them. Says what it skips, and why."""
    found = []
    for path in (p for top in paths for p in (sorted(top.rglob("*.*")) if top.is_dir() else [top])):
        if path in paths or path.suffix in (".txt", ".log"):
            try:
                found.append(read_speedrun(path))
            except Bad as bad:
                print(f"skipped: {bad}")
    return found

NAMED = re.compile("([^/,=]*)=(.+)", re.S)

def load(text: str | Path) -> Set:
    """The set that a name, a path or a list of these with commas stands for. Bad unless it has one recipe; behind a
    name of the user's, NAME=, scripts may differ."""
    text, found, script, track = str(text), [], None, None
    match = NAMED.fullmatch(text)
    named, text = match.groups() if match and not os.path.exists(text) else ("", text)
    for name in text.split(","):
        path = next((p for p in (Path(name), LOGS / name, ROOT / "peers" / name) if p.exists()), None)
        path = path or find_record(name)
        if (path / "meta.json").exists():
            record = read_record(path)
            found, script, track = found + record.runs, record.script, record.meta["track"]
        else:
            found += runs_at(path)
    runs = of_one_recipe(found, safe(text, 200), safe(named, 40))
    first, *more = (safe(Path(name).name, 40) for name in text.split(","))
    label = first + f" and {len(more)} more" * bool(more)
    if home := home_of(path):
        label = label if more else safe(path.resolve().relative_to(home.parent).as_posix(), 80)
        kept = read_bytes(home / "train_gpt.py")
        script = script or (kept if hashlib.sha256(kept).hexdigest() == runs[0].script_sha256 else None)
    return Set(safe(named, 40) or label, runs, runs[0].script or script, track, bool(named))

def of_one_recipe(found: list[Run], text: str, named: str) -> list[Run]:
    """The complete ones, each once, and what is said of the others. Bad unless they make a set; `text` is what the user
    has typed, behind the name `named`, if any."""
    once = {run.digest or id(run): run for run in found}.values()
    if len(once) < len(found):
        print(f"note: {text} holds {len(found) - len(once)} logs twice, which count once")
    runs = [run for run in once if run.complete]
    lacking = "".join(f"; {safe(run.name, 60)} {how_it_ended(run)}" for run in once if not run.complete)
    recipes = {run.recipe for run in runs}
    if len(recipes) != 1 and not (named and len({knobs for _, knobs in recipes}) == 1):
        for recipe in sorted(recipes):
            own = [run for run in runs if run.recipe == recipe]
            print(f"script {recipe[0][:12]}, {differing_knobs(own[0], runs)}:", *(safe(run.name) for run in own))
        advice = "name the runs of one, with commas between; NAME=A,B joins what scripts alone keep apart"
        raise Bad("knobs", f"{text} holds {len(once)} runs, and no complete one{lacking}" if not runs else
                           f"{text} holds {len(runs)} complete runs, {len(once)} in all, of {len(recipes)} recipes "
                           f"(script and knobs): {advice}{lacking}")
    seeds = [run.seed for run in runs if run.start]
    if len({*seeds}) < len(seeds):
        raise Bad("seeds", f"{text} has a seed twice, in {sorted(seeds)}")
    if lacking:
        print(f"note: only complete runs count{lacking}")
    for problem in (p for run in runs if run.start for p in check_run(run)):
        raise Bad(*problem)
    if len(recipes) > 1:
        print(f"note: {named} joins runs of {len(recipes)} scripts, by your word that they are one")
    return runs

def home_of(path: Path) -> Path | None:
    """The record that a folder of runs lies in."""
    return next((folder for folder in path.resolve().parents[:3]
                 if (folder / "meta.json").is_file() and (folder / "train_gpt.py").is_file()), None)

def diff(a: bytes, b: bytes, names: tuple[str, str], limit: int = 120) -> list[str]:
    texts = [script.decode("utf-8", "replace").split("\n") for script in (a, b)]
    lines = [safe(line) for line in difflib.unified_diff(*texts, *names, lineterm="", n=2)]
    if len(lines) > limit:
        lines[limit:] = [f"... and {len(lines) - limit} lines more"]
    return lines or ["scripts: the same"]

def machine(run: Run) -> str:
    return f"{run.gpu_count} x {safe(run.gpu, 60)}" if run.gpu else "CPU" if run.start else "GPU unknown"

def target_of(s: Set) -> float | None:
    return read_tracks().get(s.track, {}).get("target_loss")

def describe(s: Set, target: float | None = None) -> str:
    """Its loss, time and memory, and p against a target, by default its track's."""
    target = target or target_of(s)
    goal = f" (p of a mean below {target:g}: {show(p_below(s.losses, target), '.2g')})" if target else ""
    peaks, pace = [run.peak_mib for run in s.runs if run.peak_mib], [run.train_ms / run.total for run in s.runs]
    seconds, (total, planned) = [t / 1e3 for t in s.times], max((run.total, run.planned) for run in s.runs)
    steps = f"stopped at step {total} of {planned} planned," if total < planned else f"{total} steps"
    return (f"{s.label}: loss {spread(s.losses)}{goal}; {steps} in {spread(seconds, '.2f')} s, "
            f"{spread(pace, '.2f')} ms a step; {f'peak {max(peaks)} MiB; ' if peaks else ''}{machine(s.runs[0])}")

def how_it_ended(run: Run) -> str:
    if not run.end:
        return "died, or is still running" if run.start else f"ends at step {run.total} without a validation loss"
    how = "was stopped" if run.end["status"] == "stopped" else "failed"
    return f"{how} at step {run.end['steps']} of {run.total} ({safe(run.end['reason'], 200)})"

def differing_knobs(run: Run, others: list[Run]) -> str:
    """Its knobs that not all of the others have alike."""
    moved = {k: v for k, v in run.knobs.items() if any(other.knobs.get(k, v) != v for other in others)}
    return " ".join(f"{name}={safe(value)}" for name, value in moved.items())

def changes(a: Run, b: Run) -> str:
    """What of the knobs changed, and what one script alone has."""
    values = [(k, a.knobs.get(k, "absent"), b.knobs.get(k, "absent")) for k in sorted(a.knobs.keys() | b.knobs)]
    return safe(", ".join(f"{k} {old} -> {new}" for k, old, new in values if old != new) or "none")

def name_by_difference(sets: list[Set]):
    """Have sets of one script called by the knobs that differ, as they would be typed, and those of one record by their
    folders in it, unless the user named them."""
    firsts, homes = [s.runs[0] for s in sets], {s.label.partition("/")[0] for s in sets}
    one_script = all(run.start for run in firsts) and len({run.script_sha256 for run in firsts}) == 1
    for s in sets:
        if not s.named:
            short = s.label.partition("/")[2] if len(homes) == 1 < len(sets) else ""
            s.label = one_script and differing_knobs(s.runs[0], firsts) or short or s.label

PAUSE = 900  # seconds between runs that take turns: a start and a compilation, but no night

def in_turns(a: list[Run], b: list[Run]) -> bool:
    """Did these runs alternate, one at a time, on one kind of machine? Run ids begin with the start time."""
    if not all(run.start for run in a + b):
        return False
    neighbours = [*pairwise(sorted(a + b, key=lambda run: run.name))]
    pauses = [moment(y.name) - moment(x.name) - x.end.get("wall_s", math.inf) for x, y in neighbours]
    apart = all(-2 < pause < PAUSE for pause in pauses)  # ids are good to a second
    kinds = {json.dumps(dict(run.facts(), data=None)) for run in a + b}
    switches = sum((x in a) != (y in a) for x, y in neighbours)
    return apart and len(kinds) == 1 and switches >= max(2, min(len(a), len(b)))

def time_sentence(duel: Duel, equal: str, fresh: bool) -> str:
    """How long B takes beside A; `equal`: in what sense their losses are, or nothing."""
    if not all(run.train_ms for run in duel.a + duel.b):
        return "no time was measured"
    pace = duel.decide(lambda run: math.log(run.train_ms))
    plain = f"no verdict on time (x {statistics.fmean(times(duel.b)) / statistics.fmean(times(duel.a)):.3f}):"
    if pace is None:
        return f"{plain} one run of each has no interval"
    if not fresh:
        return f"{plain} some of these runs are of an earlier trial"
    if not in_turns(duel.a, duel.b):
        return f"{plain} these runs did not all take turns on one machine"
    ratio, low, high = (math.exp(x) for x in pace[:3])
    what = f"time to equal loss, {equal}," if equal else "training time, not at equal loss,"
    return f"{what} x {ratio:.3f} (95 % interval x {low:.3f} to {high:.3f})"

def signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) >= 5e-4 or not value else f"{value:+.1e}"

def interval_of(found: Estimate) -> str:
    return f"95 % interval {signed(found.low)} to {signed(found.high)}"

def verdict(a: Set, b: Set, margin: float, fresh: bool) -> int:
    """Prints what the losses and times say, the verdict in the last line; exit code as `compare_sets`."""
    duel = Duel(a.runs, b.runs)
    gap, by_welch = duel.decide(lambda run: run.val_loss), welch(a.losses, b.losses)
    if duel.identical:
        seeds = f"each of {len(duel.pairs)} seeds" if len(duel.pairs) > 1 else "the one seed that both have"
        print(time_sentence(duel, "to the last digit", fresh))
        print(f"{b.label}: identical losses, to the last digit, with {seeds}: what is computed did not change")
        return 0
    if gap is None:
        old, new = (statistics.fmean(losses(runs)) for runs in (zip(*duel.pairs) if duel.pairs else (a.runs, b.runs)))
        plain, how = new - old, "by runs of one seed" if duel.pairs else duel.size
        print(f"{b.label}: its loss is {signed(plain)} from {a.label}'s ({how}). Whether that is noise takes an "
              f"interval to say, and so {PAIRS} runs of each, with the same seeds")
        return 3
    tests = [(gap, duel.size if duel.by_pairs else "Welch", ", which decides")]
    tests += [(by_welch, "Welch", "")] if duel.by_pairs and by_welch else []
    for found, how, role in tests:
        print(f"loss, {b.label} - {a.label}: {signed(found.gap)}, {interval_of(found)} ({how}), p = {found.p:.2g}"
              f"{role}")
    looks = look(LOGS / "looks.jsonl", duel)
    for sentence in looks.sentences(duel.by_pairs):
        print(sentence)
    equal = f"within {margin:g}" if gap.inside(margin) else ""
    word = ("helped" if gap.gap < 0 else "hurt") + f", by less than {margin:g}" * bool(equal)
    if gap.apart:
        said = f"{b.label} {word}: its loss is"
    elif equal:
        said = f"{b.label}: equal to {a.label} {equal},"
    else:
        print(f"the losses are not separated: {duel.runs_still_needed()}")
        said = f"{b.label}: no effect on the loss that could be told from noise,"
    nth = f", look {len(looks.seen)}" if len(looks.seen) > 1 else ""
    print(f"{said} {signed(gap.gap)} ({interval_of(gap)}, {duel.size}, p = {gap.p:.2g}{nth}); "
          f"{time_sentence(duel, equal, fresh)}")
    return 0 if gap.apart or equal else 3

def compare_sets(a: Set, b: Set, margin: float, more: str = "", fresh: bool = True, target: float | None = None) -> int:
    """Prints the diff of the scripts, `more`, what differs, and the verdict. Exit code: 0 where the losses differ, are
    identical, or are equal within `margin`, 3 where more runs are needed to say so. `fresh`: all are of one trial."""
    first, other, notes = a.runs[0], b.runs[0], []
    public = None in (first.val_sha256, other.val_sha256)
    if public:
        notes.append("public logs do not name their validation tokens; losses compare only if they were the same")
    elif first.val_sha256 != other.val_sha256:
        raise Bad("data", f"{a.label} was validated on the tokens {first.val_sha256[:12]} and {b.label} on "
                          f"{other.val_sha256[:12]}: their losses cannot be compared")
    if first.script_sha256 == other.script_sha256:
        print("scripts: the same")
    elif a.script and b.script:
        print(*diff(a.script, b.script, (a.label, b.label)), sep="\n")
    else:
        print("scripts: not the same, and one is not kept beside its runs: no diff")
    print(f"{more}changed knobs: {'not known of public logs' if public else changes(first, other)}",
          describe(a, target), describe(b, target), sep="\n")
    machines = {json.dumps([r.gpu, r.gpu_count, r.start.get("torch"), r.start.get("driver")]) for r in a.runs + b.runs}
    if len(machines) > 1:
        notes.append(f"not one kind of machine, so the times say little: {safe(' and '.join(sorted(machines)))}")
    notes += [f"{s.label}: {safe(text)}" for s in (a, b) for text in library_notes(s.runs)]
    read = [run.end.get("tokens") for run in (first, other)]
    if None not in read and read[0] != read[1]:
        notes.append(f"{a.label} read {read[0]} tokens, and {b.label} {read[1]}")
    for note in notes:
        print(f"note: {note}")
    return verdict(a, b, margin, fresh)

def library_notes(runs: list[Run]) -> list[str]:
    """What the runs warn of that makes the script kept beside them no proof of what ran."""
    return sorted({row["text"] for run in runs for row in run.events if row["event"] == "warning"
                   and "not be the script kept" in row["text"]})

def compare(args) -> int:
    a, b = load(args.a), load(args.b)
    name_by_difference([a, b])
    return compare_sets(a, b, args.margin, target=args.target)

AXES = dict(time=(3, 1e3, "training time, s"), tokens=(1, 1e6, "tokens, millions"), steps=(0, 1, "steps"))

def smooth(values: list[float]) -> list[float]:
    """A running mean over an eighth of the values, fewer at the ends."""
    half = len(values) // 16
    spans = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [statistics.fmean(values[i - k : i + k + 1]) for i, k in enumerate(spans)]

def mean_curve(curves: list[list[tuple]]) -> list[list[float]]:
    """Of the points that all curves have, by step."""
    by_step = [{p[0]: p for p in points} for points in curves]
    shared = [step for step in by_step[0] if all(step in points for points in by_step)]
    return [[statistics.fmean(points[step][i] or 0 for points in by_step) for i in range(4)] for step in shared]

def draw(axis, column: int, scale: float, s: Set, color: str):
    """One set: its runs' losses of training faint, their mean smoothed, validation dashed."""
    curves = [[p for p in run.steps if p[2] is not None] for run in s.runs]
    xs = lambda points: [p[column] / scale for p in points]
    vals = [[p for p in run.vals if p[0]] or run.vals for run in s.runs]  # before the first step all are alike
    trained, scored = mean_curve(curves), mean_curve(vals)
    for points in curves:
        axis.plot(xs(points), [p[2] for p in points], color=color, lw=0.6, alpha=0.3)
    axis.plot(xs(trained), smooth([p[2] for p in trained]), color=color, lw=1.6)
    axis.plot(xs(scored), [p[2] for p in scored], "--", color=color, lw=1)
    for points in vals:
        axis.plot(xs(points), [p[2] for p in points], "o", color=color, ms=4, mfc="none")
    axis.plot([], [], color=color, lw=4, label=f"{s.label[:48]}: {spread(s.losses)}")

MARK = re.compile(r"(.+)=([0-9]{1,9}(?:\.[0-9]+)?),([0-9]{1,4}(?:\.[0-9]+)?)")

def picture(plt, sets: list[Set], x: str, marks: tuple = ()):
    """Losses of up to ten sets in one panel. `marks`: (name, x, loss) of what no log is here for."""
    column, scale, label = AXES[x]
    if any(p[column] is None for s in sets for run in s.runs for p in run.vals):
        raise Bad("tokens", "public logs say nothing of tokens: take --x time or --x steps")
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, s in enumerate(sets):
        draw(axis, column, scale, s, f"C{i}")
    seen = [(p[column] / scale, p[2]) for s in sets for run in s.runs for p in run.vals + run.steps
            if p[2] is not None and math.isfinite(p[2])]
    end = max(at for at, _ in seen)
    shown = [loss for at, loss in seen if at > 0.1 * end]
    for target in {*map(target_of, sets)} - {None}:
        shown.append(target)
        axis.axhline(target, color="gray", lw=0.8, ls=":")
        axis.annotate(f"target {target}", (0.01, target), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    if any(run.steps for s in sets for run in s.runs):
        axis.plot([], [], color="gray", lw=1.6, label="training, smoothed")
    axis.plot([], [], "o--", color="gray", lw=1, ms=4, mfc="none", label="validation")
    for i, (name, at, loss) in enumerate(marks):
        axis.plot(float(at), float(loss), "Dsv^<>PX*p"[i % 10], color=f"C{len(sets) + i}", label=f"{name[:48]}: {loss}")
        shown.append(float(loss))
    low, high = min(shown, default=0), max(shown, default=1)
    edge = 0.05 * (high - low) or 0.05
    machines = {machine(run) for s in sets for run in s.runs}
    axis.set(xlabel=f"{label} ({machines.pop()})" if len(machines) == 1 else label, ylabel="loss", xlim=(0, None),
             ylim=(low - edge, high + edge))
    axis.grid(alpha=0.2)
    axis.legend(loc="best", fontsize=8 if len(sets) + len(marks) < 5 else 6.5)
    return figure

def plot(args) -> int:
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Undecided("not drawn: matplotlib missing") from None
    if not args.out.endswith(".png") or len(args.sets) > 10:
        raise Bad("path", f"--out={safe(args.out, 80)} must end in .png, and {len(args.sets)} sets be at most 10")
    sets = [load(name) for name in args.sets]
    if len({run.val_sha256 for s in sets for run in s.runs} - {None}) > 1:
        raise Bad("data", "the sets were validated on other tokens: their losses do not belong into one picture")
    name_by_difference(sets)
    marks = [MARK.fullmatch(text) for text in args.mark]
    if None in marks:
        raise Bad("schema", f"--mark {safe(args.mark, 200)}: each is NAME=X,LOSS in numbers, X as on the axis")
    picture(plt, sets, args.x, [m.groups() for m in marks]).savefig(args.out, dpi=84, pil_kwargs=dict(optimize=True))
    print(f"{safe(args.out)}: {Path(args.out).stat().st_size} bytes")
    return 0

def import_logs(args) -> int:
    """Copy logs of the public speedrun into peers/<hash of their source>/, each a set for `compare` and `plot`."""
    groups = {}
    if args.target:
        distributions()  # which may be missing: before anything is written
    for run in {run.digest: run for run in public_logs([*map(Path, args.paths)])}.values():
        groups.setdefault(run.script_sha256[:12], []).append(run)
    for sha, found in groups.items():
        folder = ROOT / "peers" / sha
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_gpt.py").write_bytes(found[0].script)
        for run in found:
            copy = folder / f"{run.digest}.txt"
            if not copy.exists():
                copy.write_bytes(read_bytes(run.folder))
                with open(folder / "origins.tsv", "a", encoding="utf-8") as origins:
                    origins.write(f"{copy.name}\t{safe(run.folder.resolve())}\n")
        whole = [run for run in found if run.complete]
        print(f"peers/{sha}: {len(found)} logs, {len(whole)} complete")
        for recipe in sorted({run.recipe for run in whole}):
            print("  " + describe(Set(sha, [run for run in whole if run.recipe == recipe], None), args.target))
    if not groups:
        raise Bad("path", f"no log of a run of the public speedrun in {safe(' '.join(args.paths), 200)}")
    return 0
