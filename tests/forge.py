"""A scratch checkout with real tiny runs and two records in it, and the tools of a forger who knows records.py by
heart: he rewrites events, and computes all headlines and tables anew. The record Toy has runs of the format
that the script writes, the record Fast runs of format 2 and a baseline of format 1."""

import contextlib
import datetime
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from tiny import environment, make_corpus

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "records"))
import runs  # noqa: E402

KNOBS = ("--train_seq_len=128 --val_seq_len=128 --sequences_per_step=2 --val_tokens=600 --epochs=1 --steps=20 "
         "--val_every=10 --model_dim=64 --num_heads=1 --layer_pattern=LS --value_pattern=0. --late_layer=0 "
         "--mixed_layers=0 --bigram_rows=256 --bigram_dim=16 --window_min=128 --window_max=128").split()
COLD = "--b.head_lr=0.0001"  # the other arm learns next to nothing, so that few runs tell it from the first
TARGET, TRACK, README = 5.0, "toy-cpu", "# A toy\n\n{}\nold\n{}\n\nThe end.\n"
# Answers run.sh's question for the GPUs without torch, whose import is a third of such a run.
PYTHON = f"""#!/bin/sh
case $2 in *'print(n, min('*) echo 0 0 ;; *) exec "{sys.executable}" "$@" ;; esac
"""


def default_of(knob):
    """Of a number, as the script has it; without importing torch."""
    return re.search(rf"^    {knob}: \w+ = (\S+)", (ROOT / "train_gpt.py").read_text(encoding="utf-8"), re.M)[1]


class Done(NamedTuple):
    code: int
    out: str
    err: str


def load(folder):
    """The modules of a records/ folder, their paths its own; the import system forgets them again."""
    names = "decide", "runs", "seeds", "sets", "trials", "records"
    with mock.patch.object(sys, "path", [str(folder), *sys.path]), mock.patch.dict(sys.modules):
        for name in names:
            sys.modules.pop(name, None)  # of another folder
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in names]


class Box:
    """A scratch checkout, its records.py loaded into this process. `victim` is the record that a forger works on,
    `claims` what he writes over meta.json."""

    def __init__(self, root):
        self.root, self.logs, self.claims = root, root / "logs", {}
        self.victim = self.record("Fast") or self.record("Toy")
        self.decide, self.runs, _, self.sets, self.trials, self.records = load(root / "records")
        self.environment = environment() | dict(PYTHON=str(root / "python"), CUDA_VISIBLE_DEVICES="")

    def main(self, *argv, answer=""):
        """`python records/records.py argv` in this process."""
        out, err, where, patch = io.StringIO(), io.StringIO(), Path.cwd(), mock.patch.object
        os.chdir(self.root)
        try:
            with (mock.patch.dict(os.environ, self.environment), patch(sys, "stdin", io.StringIO(answer)),
                  patch(self.records.signal, "signal"), contextlib.redirect_stdout(out),
                  contextlib.redirect_stderr(err)):
                code = self.records.main([*map(str, argv)])
        except SystemExit as error:  # argparse
            code = error.code
        finally:
            os.chdir(where)
        return Done(code, out.getvalue(), err.getvalue())

    def process(self, *argv, **more):
        """The same as a process of its own."""
        done = subprocess.run([sys.executable, "records/records.py", *map(str, argv)], cwd=self.root,
                              env=self.environment | more, capture_output=True, encoding="utf-8", timeout=300)
        return Done(done.returncode, done.stdout, done.stderr)

    def shell(self, *argv):
        """`./run.sh argv`, which must do well."""
        subprocess.run(["./run.sh", *argv], cwd=self.root, check=True, capture_output=True, env=self.environment)

    def add(self, name, folders, claim, *argv):
        done = self.main("add", *folders, "--name", name, "--claim", claim, "--summary", "a toy", "--track", TRACK,
                         "--author", "a tester", *argv)
        assert done.code == 0, done

    def tree(self):
        """Every file but compiled ones, with its bytes."""
        files = (path for path in self.root.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path: path.read_bytes() for path in files}

    def record(self, name):
        return next((self.root / "records").glob(f"2*_{name}"), None)

    def arms(self):
        """The run folders of logs/, by seed: (those of the recipe, those of the cold arm)."""
        found = [self.runs.read_run(folder) for folder in self.logs.glob("2*")]
        found.sort(key=lambda run: run.seed)
        return [[run.folder for run in found if ("head_lr" in run.start["changed"]) == cold] for cold in (False, True)]

    def events(self, folder):
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def rewrite(self, folder, rows):
        """Make `rows` the events of a run."""
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), newline="\n")

    def change(self, folder, change):
        """Have change(events) made in a run; returns what `change` does."""
        rows = self.events(folder)
        answer = change(rows)
        self.rewrite(folder, rows)
        return answer

    def rescript(self, folder, text):
        """Have a run made by its script with `text` at the end, which lies beside it."""
        script = (folder / "train_gpt.py").read_bytes() + text.encode()
        (folder / "train_gpt.py").write_bytes(script)
        self.change(folder, put("start", script_sha256=hashlib.sha256(script).hexdigest()))

    def reseal(self, record, **claims):
        """Compute all that meta.json and README.md say anew, if all runs are complete, then put `claims` over it."""
        meta = json.loads((record / "meta.json").read_text())
        with contextlib.suppress(self.runs.Bad):
            found = self.runs.read_record(record)
            if found.whole:
                track, public = self.runs.read_tracks()[meta["track"]], meta["data"]["public"]
                meta |= self.records.computed(found.sets)
                meta["data"]["public"] = public
                meta["result"] = self.records.result_of(found.runs, found.baseline, track)
        self.write(record, overlay(meta, claims))

    def write(self, record, meta):
        (record / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        with contextlib.suppress(TypeError, ValueError):  # numbers that are none make no table
            text, (start, end) = (record / "README.md").read_text(encoding="utf-8"), self.runs.TABLE
            text = text.partition(start)[0] + self.sets.tables(meta) + text.partition(end)[2]
            (record / "README.md").write_text(text, encoding="utf-8", newline="\n")

    def run(self, i=1, label="runs"):
        return sorted((self.victim / label).iterdir())[i]

    def edit(self, change, i=1, label="runs"):
        return self.change(self.run(i, label), change)

    def edit_all(self, change, *labels):
        for label in labels or dict(self.runs.entries(self.meta())):
            for i in range(len(list((self.victim / label).glob("*")))):
                self.edit(change, i, label)

    def meta(self):
        return json.loads((self.victim / "meta.json").read_text())

    def extend_script(self, text, *labels):
        """Have the runs, of all sets or of some, made by a script that ends in `text`."""
        script = (self.victim / "train_gpt.py").read_bytes() + text.encode()
        self.edit_all(put("start", script_sha256=hashlib.sha256(script).hexdigest()), *labels)
        return script

    def replace(self, path, old, new):
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8", newline="\n")

    def move(self, name):
        """Give the record another name, everywhere."""
        self.victim = self.victim.rename(self.victim.with_name(name))
        self.write(self.victim, self.meta() | dict(name=name, date=name[:10]))

    def remove(self, i=1, label="runs"):
        """A run that the record never had."""
        shutil.rmtree(self.run(i, label))
        meta = self.meta()
        del meta[label][i]
        self.write(self.victim, meta)

    def expect(self, code, *words):
        """The [code, sentence] of verify, which must fail, without a traceback, and end with its count; one has this
        code and, in its sentence, these words."""
        done = self.main("verify")
        lines = done.out.splitlines()
        assert done.code == 1 and done.err == "" and lines.pop().endswith(" failed"), done
        found = [line.split(" ", 2)[2].split(": ", 1) for line in lines]
        assert any(own == code and all(str(word) in sentence for word in words) for own, sentence in found), found
        return found


def later(run_id, seconds):
    """A run id `seconds` after another, and its start as the log writes it."""
    when = datetime.datetime.strptime(run_id[:15], "%Y%m%d-%H%M%S") + datetime.timedelta(seconds=seconds)
    digits = hashlib.sha256(f"{run_id} {when}".encode()).hexdigest()[:6]
    return f"{when:%Y%m%d-%H%M%S}-{digits}", f"{when:%Y-%m-%dT%H:%M:%SZ}"


def at(rows, where):
    """The event of a kind, at a step if `where` is such as "step 10"; the last of these."""
    kind, _, step = where.partition(" ")
    return [row for row in rows if row["event"] == kind and step in ("", str(row.get("step")))][-1]


def put(where, **change):
    """An edit of events: lays `change` over that one."""
    return lambda rows: at(rows, where).update(overlay(at(rows, where), change))


def lower(rows, by=0.125):
    """The final loss made lower wherever metrics.jsonl writes it."""
    loss = at(rows, "val")["val_loss"] - by
    at(rows, "val")["val_loss"] = at(rows, "end")["val_loss"] = loss
    return loss


def swap(rows, mark, kind):
    """Where to insert a stop mark, taken from the front of step 10's validation or its step, on the other side."""
    place = next(i for i, row in enumerate(rows) if row["event"] == kind and row["step"] == 10)
    stop = rows.pop(place + (1 if kind == "step" else -1))
    assert stop["event"] == mark and stop["mark"] == "stop"
    return place, stop


def rate(rows):
    """Have the end's rate of tokens follow from its time."""
    rows[-1]["tokens_per_s"] = round(rows[-1]["tokens"] / rows[-1]["train_ms"] * 1e3)


def shift(rows, by):
    """Add `by` to all losses."""
    for row in rows:
        row |= {key: row[key] + by for key in ("train_loss", "val_loss") if key in row}


def retime(rows, pace):
    """Multiply the training time by `pace`, and have the wall follow."""
    saved, before = 0.0, 0.0
    for row in (row for row in rows if "train_ms" in row):
        saved += (row["train_ms"] - before) * (1 - pace)
        before = row["train_ms"]
        row |= dict(train_ms=before * pace, wall_s=row["wall_s"] - saved / 1e3)
    rate(rows)


def in_format_1(rows):
    """Make these events of format 2, of one stage, those of the same run in format 1."""
    start, knobs = rows[0], rows[0]["knobs"]
    del start["stages"]
    start |= dict(format=1, grad_accum=knobs["sequences_per_step"] // start["world_size"])
    at(rows, "end").update(mfu=None, mfu_with_attention=None)
    for row in rows:
        for key in ("lr", "momentum", "window", "sequences", "seq_len"):
            row.pop(key, None)


def in_stages(rows, **knobs):
    """Make these, of format 2, the events of a run in the stages that these knobs say."""
    start = rows[0]
    for key in ("knobs", "changed"):
        start[key] |= knobs
    start["argv"] += [f"--{key}={value}" for key, value in knobs.items()]
    stages = runs.stages_of(start["knobs"])
    start["stages"] = [stage._asdict() for stage in stages]
    for row in (row for row in rows if "tokens" in row):
        done = row.get("step", row.get("steps"))
        row["tokens"] = runs.tokens_before(done, stages)
        if row["event"] == "step":
            stage = max(stage for stage in stages if stage.first < max(done, 1))
            row |= dict(sequences=stage.sequences, seq_len=stage.seq_len)
    rate(rows)


def clone(checkout, source, folder, seconds, seed, pace=1.0, by=0.0, **knobs):
    """A run that never took place, with no contradiction in it: another's, renamed, reseeded, retimed, its losses
    shifted. Nothing in its files can betray it."""
    rows, (run_id, utc) = checkout.events(source), later(source.name, seconds)
    start = rows[0]
    start |= dict(run_id=run_id, utc=utc, seed=seed)
    moved = knobs | dict(seed=seed)
    start["argv"] = [a for a in start["argv"] if a[2:].partition("=")[0] not in moved]
    start["argv"] += [f"--{key}={value}" for key, value in moved.items()]
    start["knobs"] |= moved
    start["changed"] |= moved
    if seed == 1:
        del start["changed"]["seed"]
    shift(rows, by)
    retime(rows, pace)
    (folder / run_id).mkdir(parents=True)
    for name in ("train_gpt.py", "log.txt"):
        shutil.copy(source / name, folder / run_id)
    checkout.rewrite(folder / run_id, rows)
    return folder / run_id


def build(root):
    """The checkout: runs by trial and run.sh, a record of them, and a faster one whose runs are all clones."""
    for pattern in ("data/*.py", "records/*.py", "records/tracks/*.json", "train_gpt.py", "run.sh", "requirements.*"):
        for path in ROOT.glob(pattern):
            (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to(ROOT))
    make_corpus(root / "data" / "embedded", train=(4000, 3000))
    (root / "python").write_text(PYTHON)
    (root / "python").chmod(0o755)
    checkout = Box(root)
    (root / "README.md").write_text(README.format(*checkout.sets.LIST_MARKS))
    done = checkout.process("trial", "train_gpt.py", "train_gpt.py", "--runs=2", COLD, *KNOBS)
    assert done.code == 0, done
    (root / "trial.txt").write_text(done.out)
    checkout.shell(*KNOBS, "--save=False", "--seed=3")
    base, cold = checkout.arms()
    data, tracks = checkout.events(base[0])[0]["data"], root / "records" / "tracks"
    shards = hashlib.sha256("".join(shard["sha256"] for shard in data["train"]).encode()).hexdigest()
    track = json.loads((tracks / "tiny-cpu.json").read_text())
    track |= dict(target_loss=TARGET, min_runs=3, val_sha256=data["val_sha256"], val_tokens=600,
                  train=dict(max_epochs=1, sha256=shards))
    (tracks / f"{TRACK}.json").write_text(json.dumps(track))
    checkout.add("Toy", base, "reference", "--arm", f"cold={cold[0]},{cold[1]}")
    fast = [clone(checkout, base[0], root / "made", 20 * i - 3600, i, 0.8 + 0.01 * i, 4e-3 * i, mlp_ratio=3)
            for i in (1, 2, 3)]
    slow = [clone(checkout, base[0], root / "made", 20 * i - 3590, i, 1 + 0.01 * i, 4e-3 * i + 1e-3)
            for i in (1, 2, 3)]
    for folder in slow:
        checkout.change(folder, in_format_1)
    checkout.add("Fast", fast, "record", "--parent", checkout.record("Toy").name, "--baseline", *slow)
    assert checkout.main("list", "--write").code == 0


def overlay(value, change):
    """`change` put over `value`, key by key and deeper; over its first, if a list; an empty object replaces all."""
    if isinstance(value, list):
        return [overlay(value[0], change), *value[1:]]
    deeper = {key: overlay(value[key], new) for key, new in change.items() if new and isinstance(new, dict)}
    return value | change | deeper


def made(tmp_path_factory):
    """The checkout, built once for all tests."""
    if os.name != "posix":
        pytest.skip("needs a POSIX shell")
    root = tmp_path_factory.getbasetemp() / "checkout"
    if not root.exists():
        part = root.with_name("checkout.part")
        build(part)
        part.rename(root)
    return Box(root)


def names(folders):
    return ",".join(folder.name for folder in folders)


def losses(checkout, folders):
    return [checkout.events(folder)[-1]["val_loss"] for folder in folders]


def without(folder, *packages):
    """A PYTHONPATH on which these packages cannot be imported."""
    for name in packages:
        (folder / "missing" / name).mkdir(parents=True)
        (folder / "missing" / name / "__init__.py").write_text("raise ImportError('it is not here')")
    return str(folder / "missing")


def box(tmp_path_factory, folder, *left_out):
    """A copy of the checkout without the files and folders of these patterns."""
    root, ignore = made(tmp_path_factory).root, shutil.ignore_patterns(*left_out)
    return Box(Path(shutil.copytree(root, folder / "checkout", symlinks=True, ignore=ignore)))
