"""A run that is killed, stopped and damaged again and again ends in the weights of one that nothing disturbed."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import command, environment, events, make_corpus, run_folders

KNOBS = ("--steps=90", "--epochs=20", "--checkpoint_every=3", "--val_every=10")
SECONDS = 30  # of disturbances


def start(folder, *knobs):
    return subprocess.Popen(command(folder, *KNOBS, *knobs), cwd=folder, env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8")


def weights(folder):
    return torch.load(folder / "weights.pt")["model"]


def damage(path, rng):
    """Cut a file short, flip one of its bits, or leave it."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "leave"])
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return kind


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_the_weights_are_those_of_an_undisturbed_run_bit_for_bit(tmp_path):
    rng, end, disturbed, seen = random.Random(7), time.monotonic() + SECONDS, tmp_path / "disturbed", []
    for folder in (tmp_path, disturbed):
        make_corpus(folder / "data")
    whole = start(tmp_path)
    while True:
        saved = any(disturbed.glob("logs/*/checkpoints/*.pt"))
        process = start(disturbed, *["--resume=latest"] * saved)
        calm = time.monotonic() > end
        left = rng.randrange(1, 12)
        for line in process.stdout:
            left -= "train_loss" in line
            if left == 0 and not calm:
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        code, said = process.wait(), process.stderr.read()
        assert code in (0, 75, 5, -signal.SIGKILL) and "Traceback" not in said, said
        if code == 0:
            break
        newest = max(disturbed.glob("logs/*/checkpoints/*.pt"), default=None)
        seen.append((code, newest and damage(newest, rng)))
        if code == 5:  # nothing usable is left: start afresh
            for path in disturbed.glob("logs/*/checkpoints/*.pt"):
                path.unlink()
    assert len(seen) >= 2 and whole.wait() == 0, seen
    ends = [events(run_folders(folder)[-1], "end")[0] for folder in (tmp_path, disturbed)]
    assert ends[0]["val_loss"] == ends[1]["val_loss"]
    one, other = (weights(run_folders(folder)[-1]) for folder in (tmp_path, disturbed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
