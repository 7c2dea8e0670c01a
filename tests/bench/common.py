"""What the benches share: options and knobs, the environment of run.sh, and tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tiny import make_corpus  # noqa: E402

import train_gpt as tg  # noqa: E402

TINY = ("--train_seq_len=256 --val_seq_len=512 --sequences_per_step=8 --model_dim=64 --num_heads=1 --window_max=256 "
        "--layer_pattern=LSSL --value_pattern=0..0 --late_layer=1 --mixed_layers=1 --bigram_rows=256 --bigram_dim=16 "
        "--val_tokens=1500 --epochs=100").split()

# ---- Options


def make_form(doc: str) -> argparse.ArgumentParser:
    """A parser without options that shows `doc` as it is written."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False)


def make_parser(doc: str) -> argparse.ArgumentParser:
    """With the options of every bench that takes the recipe's knobs: the rest of the command line."""
    parser = make_form(doc)
    parser.add_argument("--data_dir", type=os.path.abspath, help="folder with shards; the tiny model does without")
    parser.add_argument("--tiny", action="store_true", default=not torch.cuda.is_available(),
                        help="a tiny model, as always without CUDA: to try the bench, not the recipe")
    return parser


def parse_known(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options, and as `knobs` all other arguments. Exit code 2 with a sentence where data are missing."""
    args, args.knobs = parser.parse_known_args(argv)
    if not (args.tiny or args.data_dir):
        parser.error("--data_dir=DIR is needed: a folder with *train*.bin and *val*.bin shards")
    return args


def names(known: tuple, text: str) -> list[str]:
    """The names that an option asks for: some with commas between, or all. ArgumentTypeError on others."""
    asked = list(known) if text == "all" else text.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} are none of {', '.join(known)}")
    return asked


def numbers(text: str) -> list[int]:
    """Counts with commas between. ArgumentTypeError on anything else."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1,2,4")
    return [int(number) for number in text.split(",")]


@contextlib.contextmanager
def data_option(args):
    """--data_dir=... as a knob: the folder that was named, or a tiny corpus that lives as long as this context."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"--data_dir={args.data_dir or make_corpus(Path(folder, 'data'), train=(70_000,))}"


def plain_batch(knobs: list[str], script=tg) -> list[str]:
    """`knobs` for steps of one shape. Where a script's defaults or a preset set stages, it is that of the last, as a
    rule the largest; a plain knob among `knobs` wins, and stages that they ask for stay."""
    hp = script.parse_overrides(knobs)
    if not getattr(hp, "batch_stages", "") or any(knob.startswith("--batch_stages=") for knob in knobs):
        return knobs
    last = script.stages(hp)[-1]
    rates = ["--lr_batch=0"] if hasattr(hp, "lr_batch") else []  # as at the start, whatever the batch
    return [f"--sequences_per_step={last.sequences}", f"--train_seq_len={last.seq_len}", *rates, *knobs]


def read_knobs(bench: str, knobs: list[str], ranks=(1,), data: bool = True) -> tg.Hyperparameters:
    """Ends with the training script's own sentence and exit code where a knob, or the data, cannot work."""
    try:
        hp = tg.parse_overrides(plain_batch(knobs))
        tg.require(not hp.batch_stages, "--batch_stages is not for benches: they time steps of one shape, as "
                                        "--sequences_per_step and --train_seq_len say it")
        for count in ranks:
            tg.check(hp, count)
        if data:
            tg.load_corpus(hp, thorough=False)
        return hp
    except tg.Refused as refused:
        print(f"{bench}: {refused}", file=sys.stderr)
        sys.exit(refused.code)


def load_script(path: Path):
    """The module of a training script. Refused 2 where the file is none: whatever it raised becomes one sentence."""
    spec = importlib.util.spec_from_file_location("bench_" + re.sub(r"\W", "_", str(path)), path)
    try:
        tg.require(spec, f"{path} is not the name of a Python file: give a script that ends in .py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it may be anything
        if isinstance(error, tg.Refused):
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise tg.Refused(2, f"{path} cannot be loaded ({said}): give a training script") from error
    lacks = [name for name in ("parse_overrides", "check", "load_corpus", "place", "Run") if not hasattr(module, name)]
    tg.require(not lacks, f"{path} is no training script: it lacks {', '.join(lacks)}")
    return module


def environment(processes: int) -> dict[str, str]:
    """That of this process, with the settings of run.sh where it has none."""
    cores = (os.cpu_count() or 1) if torch.cuda.device_count() else 1
    settings = dict(TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD="1",
                    PYTORCH_ALLOC_CONF="expandable_segments:True", OMP_NUM_THREADS=str(max(1, cores // processes)))
    cache = str(ROOT / ".cache")
    if re.fullmatch(r"[A-Za-z0-9_./@%+=:,~-]*", cache):  # else torch's own place: its compilers do not quote paths
        settings |= dict(TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", TRITON_CACHE_DIR=f"{cache}/triton")
    return settings | os.environ


# ---- Tables


def shown(value) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if 0 < size < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.{0 if size >= 1000 else 2 if size >= 10 else 4}f}"


def table(rows: list[dict]) -> str:
    """Rows with the same keys as aligned text under those keys; "nothing" without rows."""
    if not rows:
        return "nothing"
    lines = [list(rows[0])] + [[shown(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = ["<" if isinstance(value, str) else ">" for value in rows[0].values()]
    aligned = (" ".join(f" {cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) for line in lines)
    return "\n".join(line[1:].rstrip() for line in aligned)


def report(args, part: str, title: str, rows: list[dict], **facts) -> None:
    """Print a table and append it to the file of --out, as a JSON line."""
    print(f"\n{part}: {title}\n{table(rows)}\n", flush=True)
    if args.out:
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(part=part, title=title, rows=rows, **facts)) + "\n")
