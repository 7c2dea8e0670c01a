"""A tiny corpus, a tiny model and a subprocess to run them in, for the tests of the harness."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(importlib.util.find_spec("train_gpt").origin)  # what tests import: it may be a copy
KNOBS = ("--train_seq_len=256 --val_seq_len=512 --sequences_per_step=4 --val_tokens=1200 --steps=8 --val_every=0 "
         "--model_dim=64 --num_heads=2 --layer_pattern=LSSL --value_pattern=0..0 --late_layer=2 "
         "--mixed_layers=2 --bigram_rows=256 --bigram_dim=16 --window_max=512").split()


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard of uint16 tokens; `count` lies about how many."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def make_corpus(folder, train=(5000, 6000), val=2000, encoding="bytes"):
    """Shards of random bytes with a document start at every 300th token."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in [*((f"train_{i:06d}.bin", n) for i, n in enumerate(train)), ("val_000000.bin", val)]:
        tokens = rng.integers(0, 100, n)
        tokens[::300] = 50256
        write_shard(folder / name, tokens)
    (folder / "manifest.json").write_text(json.dumps(dict(encoding=encoding, files=[])))
    return folder


def command(folder, *knobs, ranks=1, script=SCRIPT):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launch, str(script), f"--data_dir={folder / 'data'}", *KNOBS, *knobs]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def run(folder, *knobs, ranks=1, code=0, script=SCRIPT):
    """A run in `folder` on the corpus in folder/data; asserts its exit code."""
    done = subprocess.run(command(folder, *knobs, ranks=ranks, script=script), cwd=folder, env=environment(),
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def edited(folder, *texts):
    """A copy of the script in `folder`, my.py, in which of each two `texts` the second stands for the first."""
    source = SCRIPT.read_text(encoding="utf-8")
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "my.py").write_text(source, encoding="utf-8")
    return folder / "my.py"


def cut_off(run_folder):
    """Make a complete run one that was killed: without its end."""
    path = run_folder / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"event": "end"' not in line))


def run_folders(folder):
    return sorted((folder / "logs").iterdir())


def events(run_folder, kind=None):
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["event"])]
