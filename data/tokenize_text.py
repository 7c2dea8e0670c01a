"""Turns text into token shards that train_gpt.py reads.

    python data/tokenize_text.py                               docstrings of the installed numpy -> data/embedded
    python data/tokenize_text.py book.txt web.jsonl --out DIR  one document a text file, or a line's field "text"
    cat book.txt | python data/tokenize_text.py - --out DIR    standard input, one document

A shard is 256 int32 (magic, version, token count, zeros), then little-endian uint16 tokens, 50256 before each document;
a long document may run on into the next shard. DIR/manifest.json, written last, tells the encoding, the source and of
each file the name, split, tokens and sha256: that of its token bytes, without the 1024-byte header.
"""
import argparse
import ast
import base64
import hashlib
import itertools
import json
import os
import re
import sys
import warnings
from collections import Counter
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# The twin of these constants is in train_gpt.py (and in fineweb.py beside this file).
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
END_OF_TEXT = 50256

# GPT-2 numbers its 256 single bytes with the printable ones first; no vocabulary is needed to know that.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]  # token -> byte
BYTE_TO_TOKEN = np.argsort(BYTE_ORDER).astype(np.uint16)  # byte -> token
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SHA-256 of the embedded documents joined by NUL: the same for any Python and system, so losses on them compare.
EMBEDDED_NUMPY = "2.4.6"
EMBEDDED_SHA256 = "1a38f381ee50b30d787830f4bdb2b5d034cdbb975996c1886f0122c17015ae85"

WORK_CHARS = 1 << 20  # characters handed to a worker at a time
# Between a newline and a non-space on either side GPT-2's pattern always cuts, so a document cut there keeps its tokens
# and many workers can share one large file.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Problem(Exception):
    """A user's mistake or the machine's refusal, told in one sentence; exit code 2."""


def numpy_docstrings(root):
    """The docstrings over 200 characters, by file and line; each is a document, as 172 whole modules split unevenly."""
    paths = {path.relative_to(root).as_posix(): path for path in Path(root).rglob("*.py")}  # "/" sorts alike anywhere
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in sorted(paths):
        *folders, file = name.split("/")
        if {"tests", "distutils"} & set(folders) or file in ("__config__.py", "version.py"):
            continue
        tree = ast.parse(paths[name].read_bytes())  # of bytes: newlines and encoding as Python reads them
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            text = ast.get_docstring(node)
            if text and len(text) > 200:
                yield text


def embedded_text():
    """(documents, source): numpy's docstrings, and whether they are the pinned ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in numpy's sources are no concern of ours
        documents = list(numpy_docstrings(Path(np.__file__).parent))
    digest = hashlib.sha256("\0".join(documents).encode("utf-8")).hexdigest()
    pinned = np.__version__ == EMBEDDED_NUMPY and digest == EMBEDDED_SHA256
    return documents, f"numpy {np.__version__} docstrings" + ("" if pinned else " (unpinned)")


def document(raw, where, is_json):
    """The text of a file, or of a JSON line; a blank line has none."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        if is_json:
            text = json.loads(text)["text"] if text.strip() else ""
    except UnicodeDecodeError as error:
        raise Problem(f"{where} is not UTF-8 text (byte {error.start} of it); convert it to UTF-8 first") from None
    except (ValueError, RecursionError):
        raise Problem(f'{where} is not JSON; write each line as {{"text": "..."}}') from None
    except (KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Problem(f'{where} has no field "text" that is a string; write each line as {{"text": "..."}}')
    return text


def read_documents(files):
    """The documents of all files, in the order given."""
    for file in files:
        name, is_json, found = "standard input" if file == "-" else file, file.endswith(".jsonl"), False
        try:
            with (sys.stdin.buffer if file == "-" else open(file, "rb")) as stream:
                for number, raw in enumerate(stream if is_json else [stream.read()], 1):
                    text = document(raw, f"{name} line {number}" if is_json else name, is_json)
                    found = found or bool(text)
                    yield text
        except OSError as error:
            raise Problem(f"{name} cannot be read ({error.strerror}); give the names of text or .jsonl files") from None
        if not found:
            raise Problem(f"{name} is empty; leave it out or give a file with text")


def split_of(text, val_fraction):
    """'val' or 'train', by the text alone: a document and its copies land on the same side in any run."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def read_ranks(bpe_file):
    """GPT-2's ranks from a local file: a line is a token in base64, a space, its rank."""
    try:
        pairs = [line.split() for line in Path(bpe_file).read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    except OSError as error:
        raise Problem(f"--bpe_file {bpe_file} cannot be read ({error.strerror}); give GPT-2's rank file") from None
    except ValueError:
        ranks = {}
    in_order = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    if len(ranks) != END_OF_TEXT or in_order[:256] != [bytes([b]) for b in BYTE_ORDER]:
        raise Problem(f"--bpe_file {bpe_file} is not GPT-2's {END_OF_TEXT} lines 'base64 rank'; give that file")
    return ranks


def make_encoder(encoding, bpe_file=None):
    """A function from text to its uint16 tokens."""
    if encoding == "bytes":
        return lambda text: BYTE_TO_TOKEN[np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)]
    ranks = bpe_file and read_ranks(bpe_file)
    try:
        import tiktoken
        codec = tiktoken.get_encoding("gpt2") if not ranks else tiktoken.Encoding(
            "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})
    except (ImportError, OSError, ValueError) as error:  # no package, no network, or not the vocabulary that came
        raise Problem(f"tiktoken cannot get GPT-2's vocabulary ({type(error).__name__}); give it as --bpe_file FILE, "
                      "or use --encoding bytes, which needs none") from None
    # encode_ordinary: a "<|endoftext|>" spelt out in the text is text, not the end of a document.
    return lambda text: np.array(codec.encode_ordinary(text), dtype=np.uint16)


def work_units(documents, val_fraction):
    """Lists of (split, starts a document, text), each of about WORK_CHARS characters."""
    unit, size = [], 0
    for text in documents:
        split, start = split_of(text, val_fraction), 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + WORK_CHARS)
            end = cut.end() if cut else len(text)
            unit.append((split, start == 0, text[start:end]))
            size, start = size + end - start, end
            if size >= WORK_CHARS:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def start_worker(encoding, bpe_file):
    encode_unit.encode = make_encoder(encoding, bpe_file)


def encode_unit(unit):
    """(split, tokens) of each text of a unit."""
    return [(split, np.concatenate([np.array([END_OF_TEXT] * starts, np.uint16), encode_unit.encode(text)]))
            for split, starts, text in unit]


def encode_all(units, args):
    """The units' parts in order. Processes are spawned only where they pay: GPT-2's merges, more than one unit."""
    knobs, pool, ahead = (args.encoding, args.bpe_file), None, 4 * args.workers  # units in memory at a time
    start_worker(*knobs)
    wave = list(itertools.islice(units, ahead))
    if args.workers > 1 and len(wave) > 1 and args.encoding == "gpt2":
        try:
            pool = ProcessPoolExecutor(min(args.workers, len(wave)), get_context("spawn"), start_worker, knobs)
        except (ImportError, NotImplementedError, OSError) as error:  # no semaphores, for example no shared memory
            print(f"No worker processes here ({error}): one process does the work.")
    try:
        while wave:
            yield from itertools.chain.from_iterable((pool.map if pool else map)(encode_unit, wave))
            wave = list(itertools.islice(units, ahead))
    except BrokenProcessPool:
        raise Problem(f"a worker process died; lower --workers (now {args.workers})") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def cut_shards(parts, limit):
    """(split, tokens) of each shard, from the (split, tokens) of parts; the last of a split may be short."""
    waiting, size = {"train": [], "val": []}, Counter()
    for split, tokens in itertools.chain(parts, [("train", None), ("val", None)]):
        if tokens is not None:
            waiting[split].append(tokens)
            size[split] += len(tokens)
        while size[split] >= limit or (tokens is None and size[split]):
            whole = np.concatenate(waiting[split])
            yield split, whole[:limit]
            waiting[split] = [whole[limit:]]
            size[split] = len(whole[limit:])


def write_shard(out, name, split, tokens):
    """Writes NAME.part; its line of the manifest."""
    header, raw = np.zeros(HEADER_INTS, dtype="<i4"), tokens.astype("<u2").tobytes()
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    (out / (name + ".part")).write_bytes(header.tobytes() + raw)
    return {"name": name, "split": split, "tokens": len(tokens), "sha256": hashlib.sha256(raw).hexdigest()}


def commit(out, encoding, source, files):
    """Gives the parts their names; without a manifest, from the first rename to the last, the folder is unfinished."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in out.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6}\.bin", path.name):  # shards of a longer run would mix with these
            path.unlink()
    for entry in files:
        os.replace(out / (entry["name"] + ".part"), out / entry["name"])
    manifest = {"encoding": encoding, "source": source, "files": sorted(files, key=lambda entry: entry["name"])}
    (out / "manifest.json.part").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(out / "manifest.json.part", out / "manifest.json")


def parse(argv):
    parser = argparse.ArgumentParser(description="Text to token shards for train_gpt.py.", allow_abbrev=False)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILES", help="text or .jsonl, - for standard input; none: numpy's docstrings")
    add("--out", help="folder, whose train_*.bin and val_*.bin are replaced (with no FILES: data/embedded)")
    add("--encoding", choices=("gpt2", "bytes"), help="default: gpt2, with no FILES bytes; bytes needs no vocabulary")
    add("--bpe_file", "--bpe-file", help="local rank file of GPT-2 instead of tiktoken's own")
    add("--val_fraction", "--val-fraction", type=float, default=0.07, help="share of documents for validation (0.07)")
    add("--shard_tokens", "--shard-tokens", type=int, default=100_000_000, help="most tokens in a shard (100,000,000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes for GPT-2's encoding (all cores)")

    def refuse(message):
        raise Problem(f"{message}; --help lists the knobs")
    parser.error = refuse  # one sentence, not argparse's usage block
    args = parser.parse_args(argv)
    args.encoding = args.encoding or ("gpt2" if args.files or args.bpe_file else "bytes")
    if not (0 < args.val_fraction < 1 and args.shard_tokens > 0 and args.workers > 0):
        refuse("--val_fraction must lie between 0 and 1, --shard_tokens and --workers be at least 1")
    if args.bpe_file and args.encoding == "bytes":
        refuse("--bpe_file is for --encoding gpt2, not for bytes")
    if args.files and not args.out:
        refuse("--out is missing: name the folder for the shards")
    args.out = Path(args.out or ROOT / "data" / "embedded").resolve()
    return args


def run(args):
    documents, source = (read_documents(args.files), "files") if args.files else embedded_text()
    args.out.mkdir(parents=True, exist_ok=True)
    units = work_units(documents, args.val_fraction)
    files, made = [], Counter()
    try:
        for split, tokens in cut_shards(encode_all(units, args), args.shard_tokens):
            files.append(write_shard(args.out, f"{split}_{made[split]:06d}.bin", split, tokens))
            made[split] += 1
        for split in ("train", "val"):
            if not made[split]:
                raise Problem(f"no document fell to {split} at --val_fraction {args.val_fraction}; "
                              "give more documents (a text file is one) or another fraction")
        commit(args.out, args.encoding, source, files)
    finally:
        for entry in files:
            (args.out / (entry["name"] + ".part")).unlink(missing_ok=True)
    print(f"Tokenized {source}, encoding {args.encoding}, into {args.out}.")
    for split in ("train", "val"):
        print(f"{split}: {sum(f['tokens'] for f in files if f['split'] == split):,} tokens in {made[split]} shard(s)")
    print(f"Next: ./run.sh --data_dir={args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out}")
    return 0


def main(argv=None):
    try:
        return run(parse(argv))
    except Problem as problem:
        message = str(problem)
    except OSError as error:
        message = f"{error.filename or 'a shard'} cannot be written ({error.strerror}); free space or change --out"
    print(f"tokenize_text.py: {message}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
