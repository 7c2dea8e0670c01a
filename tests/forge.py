"""A scratch checkout with real tiny runs and two records in it, and the tools of a forger who knows records.py by
heart: he rewrites events, and computes all headlines and tables anew. The record Toy has runs of the format
that the script writes, the record Fast runs of format 2 and a baseline of format 1."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from unittest import mock

import pytest
from tiny import environment, events, make_corpus

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "records"))
import runs  # noqa: E402

DEFAULTS = runs.script_knobs((ROOT / "train_gpt.py").read_bytes())
# a knob given twice counts as the last says
KNOBS = ("--steps=1 --train_seq_len=128 --val_seq_len=128 --sequences_per_step=2 --val_tokens=600 --epochs=1 "
         "--steps=20 --val_every=10 --model_dim=64 --num_heads=1 --layer_pattern=LS --value_pattern=0. --late_layer=0 "
         "--mixed_layers=0 --bigram_rows=256 --bigram_dim=16 --window_min=128 --window_max=128").split()
COLD = "--b.head_lr=0.0001"  # the other arm learns next to nothing, so that few runs tell it from the first
TARGET, TRACK, README = 5.0, "toy-cpu", "# A toy\n\n{}\nold\n{}\n\nThe end.\n"
COMMON = [f"--track={TRACK}", "--author=a tester", "--summary=a toy"]  # arguments of add
Done = namedtuple("Done", "code out err")
# Answers run.sh's question for the GPUs without torch, whose import is a third of such a run.
PYTHON = f"""#!/bin/sh
case $2 in *'print(n, min('*) echo 0 0 ;; *) exec "{sys.executable}" "$@" ;; esac
"""


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
        out, err, where = io.StringIO(), io.StringIO(), Path.cwd()
        os.chdir(self.root)
        try:
            with (mock.patch.dict(os.environ, self.environment),
                  mock.patch.object(self.records.signal, "signal"),
                  mock.patch.multiple(sys, stdin=io.StringIO(answer), stdout=out, stderr=err)):
                code = self.records.main([*map(str, argv)])
        except SystemExit as error:  # argparse
            code = error.code
        finally:
            os.chdir(where)
        return Done(code, out.getvalue(), err.getvalue())

    def process(self, *argv, lacks=()):
        """The same as a process of its own, in which these packages cannot be imported."""
        missing = self.root / "missing"
        for name in lacks:
            (missing / name).mkdir(parents=True, exist_ok=True)
            (missing / name / "__init__.py").write_text("raise ImportError('it is not here')")
        more = dict(PYTHONPATH=str(missing)) if lacks else {}
        done = subprocess.run([sys.executable, "records/records.py", *map(str, argv)], cwd=self.root,
                              env=self.environment | more, capture_output=True, encoding="utf-8", timeout=300)
        return Done(done.returncode, done.stdout, done.stderr)

    def shell(self, *argv):
        """`./run.sh argv`, which must do well."""
        subprocess.run(["./run.sh", *argv], cwd=self.root, check=True, capture_output=True, env=self.environment)

    def add(self, *argv):
        done = self.main("add", *argv, *COMMON)
        assert done.code == 0, done

    def copy(self, folder, *left_out):
        """A copy in this folder, without the files and folders of these patterns."""
        ignore = shutil.ignore_patterns(*left_out)
        return Box(Path(shutil.copytree(self.root, folder / "checkout", symlinks=True, ignore=ignore)))

    def tree(self):
        """Every file but compiled and cached ones, with its bytes."""
        files = (path for path in self.root.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path: path.read_bytes() for path in files if ".cache" not in path.parts}

    def record(self, name):
        return next((self.root / "records").glob(f"2*_{name}"), None)

    def arms(self):
        """The run folders of logs/, by seed: (those of the recipe, those of the cold arm)."""
        found = sorted(self.logs.glob("2*"), key=lambda folder: events(folder)[0]["seed"])
        cold = [run for run in found if "head_lr" in events(run)[0]["changed"]]
        return [run for run in found if run not in cold], cold

    def meta(self):
        return json.loads((self.victim / "meta.json").read_text())

    def write(self, meta):
        """Make this the meta.json, with the table in README.md that belongs to it."""
        page, (start, end) = self.victim / "README.md", self.runs.TABLE
        page.with_name("meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        with contextlib.suppress(TypeError, ValueError):  # numbers that are none make no table
            text = page.read_text(encoding="utf-8")
            text = text.partition(start)[0] + self.sets.tables(meta) + text.partition(end)[2]
            page.write_text(text, encoding="utf-8", newline="\n")

    def reseal(self):
        """Compute all that meta.json and README.md say anew, if all runs are complete, then put the claims over it."""
        meta = self.meta()
        with contextlib.suppress(self.runs.Bad):
            found = self.runs.read_record(self.victim)
            if found.whole:
                track = self.runs.read_tracks()[meta["track"]]
                meta = overlay(meta, self.records.computed(found.sets))
                meta["result"] = self.records.result_of(found.runs, found.baseline, track)
        self.write(overlay(meta, self.claims))

    def run(self, i=1):
        return sorted((self.victim / "runs").iterdir())[i]

    def edit(self, change):
        edit(self.run(), change)

    def edit_all(self, change, label="**"):
        """Have it made in all runs, or in those of one set."""
        for path in self.victim.glob(f"{label}/*/metrics.jsonl"):
            edit(path.parent, change)

    def replace(self, path, old, new):
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8", newline="\n")

    def move(self, name):
        """Give the record another name, everywhere."""
        self.victim = self.victim.rename(self.victim.with_name(name))
        self.write(self.meta() | dict(name=name, date=name[:10]))

    def remove(self):
        """A run that the record never had."""
        shutil.rmtree(self.run())
        meta = self.meta()
        del meta["runs"][1]
        self.write(meta)

    def expect(self, code, *words):
        """The [code, sentence] of verify, which must fail, without a traceback, and end with its count; one has this
        code and, in its sentence, these words."""
        done = self.main("verify")
        lines = done.out.splitlines()
        assert done.code == 1 and done.err == "" and lines.pop().endswith(" failed"), done
        found = [line.split(" ", 2)[2].split(": ", 1) for line in lines]
        assert any(own == code and all(str(word) in sentence for word in words) for own, sentence in found), found
        return found


# ---- Events of a run, and edits: functions that change them


def rewrite(folder, rows):
    """Make `rows` the events of a run."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), newline="\n")


def edit(folder, change):
    """Have change(events) made in a run."""
    rows = events(folder)
    change(rows)
    rewrite(folder, rows)


def extend(script, text):
    """Put `text` behind a script. Returns the edit of a run that it made."""
    script.write_bytes(script.read_bytes() + text.encode())
    return put("start", script_sha256=hashlib.sha256(script.read_bytes()).hexdigest())


def at(rows, where):
    """The event of a kind, at a step if `where` is such as "step 10"; the last of these."""
    return [row for row in rows if where in (row["event"], f"{row['event']} {row.get('step')}")][-1]


def put(where, **change):
    """An edit: lays `change` over that event."""
    return lambda rows: at(rows, where).update(overlay(at(rows, where), change))


def give(**knobs):
    """An edit: the run was given these knobs."""
    def change(rows):
        start = rows[0]
        others = [argument for argument in start["argv"] if argument[2:].partition("=")[0] not in knobs]
        start["argv"] = others + [f"--{key}={value}" for key, value in knobs.items()]
        put("start", knobs=knobs, changed=knobs)(rows)
    return change


def rate(rows):
    """Have the end's rate of tokens follow from its time."""
    end = rows[-1]
    end["tokens_per_s"] = round(end["tokens"] / end["train_ms"] * 1e3)


def shift(rows, by, *keys, first=0):
    """Add `by` to these numbers, or to all losses, of the events from a place on."""
    for row in rows[first:]:
        row |= {key: row[key] + by for key in keys or ("train_loss", "val_loss") if key in row}


def retime(rows, pace):
    """Multiply the training time by `pace`, and have the wall follow."""
    for row in (row for row in rows if "train_ms" in row):
        ms = row["train_ms"]
        row |= dict(train_ms=ms * pace, wall_s=row["wall_s"] - ms * (1 - pace) / 1e3)
    rate(rows)


def in_format_1(rows):
    """Make these events of format 2, of one stage, those of the same run in format 1."""
    start = rows[0]
    del start["stages"]
    start |= dict(format=1, grad_accum=start["knobs"]["sequences_per_step"])  # on one rank
    at(rows, "end").update(mfu=None, mfu_with_attention=None)
    for row in rows:
        for key in ("lr", "momentum", "window", "sequences", "seq_len"):
            row.pop(key, None)


def in_stages(rows, **knobs):
    """Make these, of format 2, the events of a run in the stages that these knobs say."""
    give(**knobs)(rows)
    stages = runs.stages_of(rows[0]["knobs"])
    rows[0]["stages"] = [stage._asdict() for stage in stages]
    for row in (row for row in rows if "tokens" in row):
        done = row.get("step", row.get("steps"))
        stage = max(stage for stage in stages if stage.first < max(done, 1))
        due = dict(stage._asdict(), tokens=runs.tokens_before(done, stages))
        row |= {key: due[key] for key in due if key in row}
    rate(rows)


def clone(source, folder, seconds, seed, pace=1.0, by=0.0, **knobs):
    """A run that never took place, with no contradiction in it: another's, renamed, reseeded, retimed, its losses
    shifted. Nothing in its files can betray it."""
    rows, when = events(source), time.gmtime(runs.moment(source.name) + seconds)
    run_id = time.strftime("%Y%m%d-%H%M%S", when) + source.name[15:]
    rows[0] |= dict(run_id=run_id, utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", when), seed=seed)
    give(seed=seed, **knobs)(rows)
    shift(rows, by)
    retime(rows, pace)
    rewrite(shutil.copytree(source, folder / run_id), rows)
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
    data, tracks = events(base[0])[0]["data"], root / "records" / "tracks"
    shards = hashlib.sha256("".join(shard["sha256"] for shard in data["train"]).encode()).hexdigest()
    track = json.loads((tracks / "tiny-cpu.json").read_text())
    track |= dict(target_loss=TARGET, min_runs=3, val_sha256=data["val_sha256"], val_tokens=600,
                  train=dict(max_epochs=1, sha256=shards))
    (tracks / f"{TRACK}.json").write_text(json.dumps(track))
    checkout.add(*base, "--name=Toy", "--claim=reference", f"--arm=cold={cold[0]},{cold[1]}")
    for i in (1, 2, 3):
        pace, by = 0.01 * i, 4e-3 * i
        clone(base[0], root / "fast", 20 * i - 3600, i, 0.8 + pace, by, mlp_ratio=3)
        slow = clone(base[0], root / "slow", 20 * i - 3590, i, 1 + pace, by + 1e-3)
        edit(slow, in_format_1)
    fast, slow = (sorted((root / name).iterdir()) for name in ("fast", "slow"))
    parent = checkout.record("Toy").name
    checkout.add(*fast, "--name=Fast", "--claim=record", f"--parent={parent}", "--baseline", *slow)
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


def losses(folders):
    return [events(folder)[-1]["val_loss"] for folder in folders]
