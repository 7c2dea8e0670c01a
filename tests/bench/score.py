"""Scores weights on the validation stream of a folder, be it another than that of their run: no weights need to travel.

    python tests/bench/score.py WEIGHTS [WEIGHTS ...] --data=DIR [--groups=FILE] [--val_tokens=N]

WEIGHTS is weights.pt of a run folder. The train_gpt.py beside it, which is run as Python, builds the model, or without
one the project's; its own `Trainer.evaluate` scores, with the knobs of the run and the window of its end. Scored are
the first N tokens, or all but the last, which has no next one; DIR needs no training shards. FILE is JSON, {"group":
["source", ...]}, with sources that DIR/val_docs.json names; a source in no group is in "other". Without FILE each
source is a group. Exit code 2: bad input."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, load_script, make_form, table, tg  # noqa: E402

sys.path.append(str(ROOT / "data"))
import sample  # noqa: E402


class Text(NamedTuple):
    """What is scored."""

    encoding: str
    stream: tg.TokenStream
    val_tokens: int
    groups: list[str]
    group_of: np.ndarray  # (val_tokens,) index of the group of each token's source, or (0,) if no source is told


def read_groups(path: Path | None) -> dict[str, list[str]] | None:
    """{group: sources} of a file. Refused 2 if it holds anything else."""
    if path is None:
        return None
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        fine = all(isinstance(s, list) and all(isinstance(name, str) for name in s) for s in groups.values())
        tg.require(fine, "a group is no list of names")
    except Exception as error:  # of the file, of its encoding, of JSON, of another kind of value
        raise tg.Refused(2, f'--groups={path} cannot be used ({error!r:.80}): give JSON, {{"group": ["source", ...]}}'
                         ) from error
    listed = [name for sources in groups.values() for name in sources]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    tg.require(not twice, f"--groups={path} lists {', '.join(twice)} twice: a source is in one group")
    return groups


def read_text(folder, groups: dict | None = None, val_tokens: int | None = None) -> Text:
    """The validation stream of a folder, every token checked. Refused 2 if it, or its sources, cannot be used."""
    folder = Path(folder)
    encoding, known, (_, paths), _ = tg.read_manifest(folder)
    shards = {path: tg.open_shard(path) for path in paths}
    tg.require(shards, f"{folder} is not a folder with *val*.bin shards")
    for path, tokens in shards.items():
        tg.scan_shard(path, tokens, encoding, known)
    stream = tg.TokenStream([*shards.values()])
    most = stream.total - 1
    val_tokens = most if val_tokens is None else val_tokens
    tg.require(0 < val_tokens <= most, f"--val_tokens={val_tokens} must lie from 1 to {most}, what {folder} can score")
    sources, source_of = tg.read_sources(folder, stream.read(0, val_tokens + 1).astype("<u2"))
    if groups is None:
        return Text(encoding, stream, val_tokens, sources, source_of)
    tg.require(sources, f"groups need sources, and {folder} has no val_docs.json, which tells those of its documents")
    group_of = {source: group for group, listed in groups.items() for source in listed}
    unknown = ", ".join(sorted(group_of.keys() - set(sources)))
    tg.require(not unknown, f"{folder} has no source of the name {unknown}: there are {', '.join(map(str, sources))}")
    names = [*dict.fromkeys([*groups, "other"])]
    index = np.array([names.index(group_of.get(source, "other")) for source in sources])
    return Text(encoding, stream, val_tokens, names, index[source_of])


def score(trainer, hp, folder, groups: dict | None = None, val_tokens: int | None = None) -> dict:
    """{val_loss, val_tokens, sources: {group: loss}} of a model at the end of a run with these knobs, as the run's own
    validation reports them. A group of which no token is scored is left out. groups: {group: sources}, or each source
    by itself. Refused 2 where the folder cannot be used, or is of another encoding than the model."""
    text = read_text(folder, groups, val_tokens)
    count, kind = text.val_tokens, {tg.EOT: "gpt2", tg.BYTE_EOT: "bytes"}.get(trainer.model.last_row)
    tg.require(kind == text.encoding, f"{folder} holds {text.encoding} tokens, and the model was trained on {kind}")
    shape = math.ceil(count / hp.val_seq_len), hp.val_seq_len
    each = [torch.zeros(shape, device=trainer.device)] if text.groups else []
    found = dict(val_loss=trainer.evaluate(text.stream, count, hp.steps, *each), val_tokens=count, sources={})
    for losses in each:
        found["sources"] = tg.by_source(text.groups, text.group_of, losses)
    return found


# ---- The command


@contextlib.contextmanager
def fitting(path: Path):
    """Refused 2 where weights and script are none of one another, whatever the script raises."""
    try:
        yield
    except (tg.Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = sample.reason(error)
        raise tg.Refused(2, f"{path} does not fit its script ({said}): put its own beside it") from error


def load(path: Path, modules: dict):
    """(trainer, knobs) of a weights file. modules: {source: module}, so that weights of one script share its compiled
    code. Refused 2, or sample.Problem, where the file cannot be used."""
    saved, script = sample.load(path), path.with_name("train_gpt.py")
    script = script if script.exists() else ROOT / "train_gpt.py"
    source = script.read_bytes()
    if source not in modules:
        with mock.patch.object(sys, "dont_write_bytecode", True):  # a run folder keeps what the run left there
            modules[source] = load_script(script)
    module, device = modules[source], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with fitting(path):
        hp = module.Hyperparameters(**saved["knobs"])
        trainer = module.build(hp, saved["vocab_size"], 0, 1, device)
        trainer.model.load_state_dict(saved["model"])
    return trainer, hp


def score_file(path: Path, modules: dict, args, groups: dict | None) -> dict:
    """A row of the table."""
    trainer, hp = load(path, modules)
    with fitting(path):
        found = score(trainer, hp, args.data, groups, args.val_tokens)
    return dict(weights=str(path), tokens=found["val_tokens"], loss=found["val_loss"], **found["sources"])


def parse(argv: list[str]):
    parser = make_form(__doc__)
    parser.add_argument("weights", nargs="+", type=Path, metavar="WEIGHTS", help="weights.pt of a run folder")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder with *val*.bin shards")
    parser.add_argument("--groups", type=Path, metavar="FILE", help='JSON: {"group": ["source", ...]}')
    parser.add_argument("--val_tokens", type=int, metavar="N", help="default: all")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args, rows, modules = parse(argv), [], {}
    torch._dynamo.config.recompile_limit = 64  # weights may differ in shapes
    try:
        groups = read_groups(args.groups)
        read_text(args.data, groups, args.val_tokens)  # before a model is built
        for path in args.weights:
            rows.append(score_file(path, modules, args, groups))
            gc.collect()  # the model before
        return 0
    except (tg.Refused, sample.Problem) as problem:
        print(f"score: {problem}", file=sys.stderr)
        return 2
    finally:
        if rows:
            print(table(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
