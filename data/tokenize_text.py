"""Turns text into token shards that train_gpt.py reads.

    python data/tokenize_text.py                               docstrings of the installed numpy -> data/embedded
    python data/tokenize_text.py book.txt web.jsonl --out DIR  one document a text file, or a line's field "text"
    cat book.txt | python data/tokenize_text.py - --out DIR    standard input, read like a file

Lines of JSON are known by their first, or by the name (.json, .jsonl, .ndjson); what is no text is refused.

A shard is 256 int32 (magic, version, token count, zeros), then little-endian uint16 tokens, 50256 before each document,
which may run on into the next shard. manifest.json, written last, tells the encoding, the source, what is held out for
validation, and of each file the name, split, tokens and sha256: that of its token bytes, without the 1024-byte header.
GPT-2's ranks, whose SHA-256 it tells too, are kept beside the shards for data/sample.py.

Of many documents a hash of each tells whether it is held out. Of few it might take none or half, so the last of them
are held out, or the end of the last as a document of its own.
"""
import argparse
import ast
import base64
import bisect
import hashlib
import itertools
import json
import math
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from functools import lru_cache, partial
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

# numpy's version and the SHA-256 of its documents joined by NUL: alike for any Python and system, so losses compare.
EMBEDDED = "2.4.6", "1a38f381ee50b30d787830f4bdb2b5d034cdbb975996c1886f0122c17015ae85"
ENOUGH = 14  # documents that a hash gives either split on average, before it is used: none is left, once in a million
MOST_HELD = 100_000  # documents held in memory, at most, to see whether there are so many
WORK_CHARS = 1 << 20  # characters handed to a worker at a time
# GPT-2's pattern always cuts beside a lone newline: a document cut there keeps its tokens, and many workers share it.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")
# tiktoken's engine steps back through blanks one by one and panics at a million in a row, so many are encoded apart.
# Blanks are \s less 0x1c to 0x1f, which are none to it.
LONG = 10_000
LONG_BLANK = re.compile(rf"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{{{LONG},}}")
RANKS = "gpt2.tiktoken"  # the file of ranks beside the shards
JSON_NAMES = ".json", ".jsonl", ".ndjson"
JSON_OBJECT = re.compile(r'\s*\[?\s*\{\s*"[^"\n]*"\s*:')  # how an object begins, alone or as the first of a list


class Problem(Exception):
    """A user's mistake or the machine's refusal, told in one sentence; exit code 2."""


def numpy_docstrings(root):
    """The docstrings over 200 characters, by file and line; each is a document, as 172 whole modules split unevenly."""
    paths = {path.relative_to(root).as_posix(): path for path in Path(root).rglob("*.py")}  # "/" sorts alike anywhere
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name in sorted(paths):
        if {"tests", "distutils", "__config__.py", "version.py"} & set(name.split("/")):
            continue
        tree = ast.parse(paths[name].read_bytes())  # of bytes: newlines and encoding as Python reads them
        nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
        for text in map(ast.get_docstring, sorted(nodes, key=lambda node: getattr(node, "lineno", 0))):
            if text and len(text) > 200:
                yield text


def embedded_text():
    """(documents, source): numpy's docstrings, and whether they are the pinned ones."""
    documents = list(numpy_docstrings(Path(np.__file__).parent))
    found = np.__version__, hashlib.sha256("\0".join(documents).encode("utf-8")).hexdigest()
    return documents, f"numpy {np.__version__} docstrings" + ("" if found == EMBEDDED else " (unpinned)")


def parsed(raw):
    """The value of JSON in bytes or a string; None if it is not JSON."""
    try:
        return json.loads(raw if isinstance(raw, str) else raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def is_data(text):
    """Whether a text is plainly JSON: it begins as an object, is a value, or each of its lines is one."""
    if not re.match(r"\s*[\[{]", text):
        return False
    if JSON_OBJECT.match(text) or isinstance(parsed(text), (dict, list)):
        return True
    return all(isinstance(parsed(line), (dict, list)) for line in text.splitlines() if line.strip())


def document(raw, where, is_json):
    """The text of a file or of a JSON line; a blank line has none."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
        if is_json:
            return json.loads(text)["text"] + "" if text.strip() else ""
    except UnicodeDecodeError as error:
        raise Problem(f"{where} is not UTF-8 text (byte {error.start} of it); unpack it if it is packed, else convert "
                      "it to UTF-8 first") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Problem(f'{where} is not JSON with a string "text"; write each line as {{"text": "..."}}') from None
    if "\0" in text:
        raise Problem(f"{where} is not UTF-8 text (byte {raw.index(0)} of it is zero); unpack it if it is packed, else "
                      "convert it to UTF-8 first")
    if is_data(text):
        raise Problem(f'{where} is JSON, but no lines of {{"text": "..."}}; write it so, a line for each document')
    return text


def read_documents(files):
    """The documents of all files, in the order given."""
    for file in files:
        name, found, head = "standard input" if file == "-" else file, False, []
        with (sys.stdin.buffer if file == "-" else open(file, "rb")) as stream:
            for line in stream:
                head.append(line)
                if line.strip(b"\xef\xbb\xbf \t\r\n"):  # a byte-order mark alone is blank too
                    break
            is_json = file.lower().endswith(JSON_NAMES) or isinstance(parsed(b"".join(head)), dict)
            raws = itertools.chain(head, stream) if is_json else [b"".join(head) + stream.read()]
            for number, raw in enumerate(raws, 1):
                text = document(raw, f"{name} line {number}" if is_json else name, is_json)
                found = found or bool(text)
                yield text
        if not found:
            raise Problem(f"{name} is empty; leave it out or give a file with text")


def split_of(text, val_fraction):
    """'val' or 'train', by the text alone: a document and its copies land on the same side in any run."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def tail_cut(texts, val_fraction):
    """(index of the document, character in it) where the held-out tail begins, neither side of which is empty.

    It is a document's start, if one gives half to one and a half times the share asked, else a line's or word's.
    """
    starts = [0, *itertools.accumulate(map(len, texts))]
    total = starts.pop()
    if total < 2:
        raise Problem("the text is a single character, of which none can be held out for validation; give more")
    target = min(max(round(total * (1 - val_fraction)), 1), total - 1)
    slack = total * min(val_fraction, 1 - val_fraction) / 2
    nearest = min(starts[1:], key=lambda start: abs(start - target), default=0)
    if nearest and abs(nearest - target) <= slack:
        return starts.index(nearest), 0
    index = bisect.bisect_right(starts, target) - 1
    at, text = target - starts[index], texts[index]
    low = max(1, at - int(slack))
    return index, text.rfind("\n", low - 1, at) + 1 or max(text.rfind(" ", low, at), 0) or at


def hold_out(documents, val_fraction):
    """((split, text) of each document that is not empty, and how they were split, as the manifest tells it)."""
    documents = filter(None, documents)
    enough = min(math.ceil(ENOUGH / min(val_fraction, 1 - val_fraction)), MOST_HELD)
    first = list(itertools.islice(documents, enough))
    if len(first) == enough:
        documents = itertools.chain(first, documents)
        return ((split_of(text, val_fraction), text) for text in documents), {"rule": "hash", "asked": val_fraction}
    index, at = tail_cut(first, val_fraction)
    first[index:index + 1] = [first[index][:at], first[index][at:]]
    pairs = [("val" if number > index else "train", text) for number, text in enumerate(first)]
    return pairs, {"rule": "tail", "asked": val_fraction, "documents": len(pairs) - 1, "from_document": index + 1,
                   "from_character": at + 1}


def gpt2_ranks(bpe_file=None):
    """{bytes: token} of GPT-2, from a rank file, or from tiktoken's own copy, which it fetches once."""
    try:
        import tiktoken
        if not bpe_file:
            own = tiktoken.get_encoding("gpt2")
            return {own.decode_single_token_bytes(rank): rank for rank in range(END_OF_TEXT)}
        pairs = [line.split() for line in Path(bpe_file).read_bytes().splitlines()]  # a token in base64, its rank
        ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        if [*ranks.values()] != [*range(END_OF_TEXT)] or [*ranks][:256] != [bytes([b]) for b in BYTE_ORDER]:
            raise ValueError
        return ranks
    except (ImportError, OSError, ValueError) as error:  # no package, no network, no such file, or not these ranks
        raise Problem(f"{bpe_file or 'tiktoken'} does not give GPT-2's vocabulary ({type(error).__name__}); name its "
                      "rank file as --bpe_file") from None


def kept_ranks(folder):
    """The path of the ranks beside a folder's shards, after a look at their SHA-256; None where none were kept."""
    try:
        expected = json.loads((folder / "manifest.json").read_bytes())["vocabulary"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    path, found = folder / RANKS, None
    with suppress(OSError):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise Problem(f"{path} is missing or not as its manifest.json says; make the shards again, or name GPT-2's "
                      "rank file as --bpe_file")
    return path


def gpt2_encoder(ranks):
    """text -> list of tokens, with blanks in any number."""
    import tiktoken
    # encode_ordinary: a "<|endoftext|>" spelt out in the text is text, not the end of a document.
    words, blanks = (tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                                       special_tokens={}).encode_ordinary for pattern in (GPT2_PATTERN, r"\s+"))

    def encode(text):
        tokens, start = [], 0
        # The pattern is slower than a look at one place in 5,000, which no long run escapes.
        if any(text[i:i + 99].isspace() for i in range(0, len(text), LONG // 2)):
            for run in LONG_BLANK.finditer(text):
                stop = run.end() - (run.end() < len(text))  # the last blank goes with what follows, the others are one
                tokens += words(text[start:run.start()]) + blanks(text[run.start():stop])
                start = stop
        return tokens + words(text[start:])
    return encode


@lru_cache(maxsize=1)  # a worker process makes its own, once
def codec(encoding, bpe_file=None):
    """(encode: text -> uint16 tokens, decode: tokens -> text, that passes over the end of a document).

    Problem where GPT-2's vocabulary cannot be had. data/sample.py uses it too.
    """
    if encoding == "bytes":
        return (lambda text: BYTE_TO_TOKEN[np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)],
                lambda tokens: bytes(BYTE_ORDER[t] for t in tokens if t < 256).decode("utf-8", "replace"))
    ranks = gpt2_ranks(bpe_file)
    encode, pieces = gpt2_encoder(ranks), [*ranks]
    return (lambda text: np.array(encode(text), dtype=np.uint16),
            lambda tokens: b"".join(pieces[t] for t in tokens if t < END_OF_TEXT).decode("utf-8", "replace"))


def work_units(pairs):
    """{split: [(starts a document, text)]} of (split, text), each of about WORK_CHARS characters."""
    unit, size = {"train": [], "val": []}, 0
    for split, text in pairs:
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + WORK_CHARS)
            end = cut.end() if cut else len(text)
            unit[split].append((start == 0, text[start:end]))
            size, start = size + end - start, end
            if size >= WORK_CHARS:
                yield unit
                unit, size = {"train": [], "val": []}, 0
    yield unit


def encode_unit(unit, encoding, bpe_file):
    """{split: tokens} of a unit."""
    (encode, _), head = codec(encoding, bpe_file), np.array([END_OF_TEXT], dtype=np.uint16)
    return {split: np.concatenate([head[:0]] + [np.append(head[:int(starts)], encode(text)) for starts, text in texts])
            for split, texts in unit.items()}


def encode_all(units, encoding, bpe_file, workers):
    """The units' tokens in order. Processes are spawned only where they pay: GPT-2's merges, more than one unit."""
    try:
        codec(encoding, bpe_file)  # what is wrong with the vocabulary is told here, not by every worker
    except Problem as problem:
        raise Problem(f"{problem}, or use --encoding bytes, which needs none") from None
    work, pool = partial(encode_unit, encoding=encoding, bpe_file=bpe_file), None
    wave = list(itertools.islice(units, 4 * workers))  # what is in memory at a time
    if workers > 1 and len(wave) > 1 and encoding == "gpt2":
        try:
            pool = ProcessPoolExecutor(min(workers, len(wave)), get_context("spawn"))
        except (ImportError, NotImplementedError, OSError) as error:  # no semaphores, for example no shared memory
            print(f"No worker processes here ({error}): one process does the work.")
    try:
        with pool or nullcontext():
            while wave:
                yield from (pool.map if pool else map)(work, wave)
                wave = list(itertools.islice(units, 4 * workers))
    except BrokenProcessPool:
        raise Problem(f"a worker process died; lower --workers (now {workers})") from None


def write_shards(out, encoded, limit):
    """Cuts the tokens into shards of `limit`, the last of a split shorter; {split: lines of the manifest}."""
    waiting, files = {"train": [], "val": []}, {"train": [], "val": []}
    for part in itertools.chain(encoded, [None]):  # None: no more comes, so what waits goes out
        for split, arrays in waiting.items():
            arrays.extend([part[split]] if part else [])
            while sum(map(len, arrays)) >= (limit if part else 1):
                whole = np.concatenate(arrays)
                arrays[:] = [whole[limit:]]
                name, raw = f"{split}_{len(files[split]):06d}.bin", whole[:limit].astype("<u2").tobytes()
                header = np.array([SHARD_MAGIC, SHARD_VERSION, len(raw) // 2] + [0] * (HEADER_INTS - 3), dtype="<i4")
                (out / (name + ".part")).write_bytes(header.tobytes() + raw)
                files[split].append({"name": name, "split": split, "tokens": len(raw) // 2,
                                     "sha256": hashlib.sha256(raw).hexdigest()})
    return files


def keep_ranks(out, bpe_file):
    """Writes GPT-2's ranks as a part; what the manifest tells of them."""
    raw = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in gpt2_ranks(bpe_file).items())
    (out / (RANKS + ".part")).write_bytes(raw)
    return {"name": RANKS, "sha256": hashlib.sha256(raw).hexdigest()}


def commit(out, facts, files):
    """Gives the parts their names; without a manifest, from the first rename to the last, the folder is unfinished."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in [*out.glob("train_??????.bin"), *out.glob("val_??????.bin")]:  # a longer run's would mix with these
        path.unlink()
    for entry in files + ([facts["vocabulary"]] if "vocabulary" in facts else []):
        os.replace(out / (entry["name"] + ".part"), out / entry["name"])
    manifest = json.dumps({**facts, "files": files}, indent=1) + "\n"
    (out / "manifest.json.part").write_text(manifest, encoding="utf-8")
    os.replace(out / "manifest.json.part", out / "manifest.json")


class Knobs(argparse.ArgumentParser):
    """A command line that says what is wrong in one sentence, not in argparse's usage block."""

    def error(self, message):
        raise Problem(f"{message}; --help lists the knobs")


def parse(argv):
    parser = Knobs(description="Text to token shards for train_gpt.py.", allow_abbrev=False)
    add, refuse = parser.add_argument, parser.error
    add("files", nargs="*", metavar="FILES", help="text or .jsonl, - for standard input; none: numpy's docstrings")
    add("--out", help="folder for shards and ranks; those there are replaced (with no FILES: data/embedded)")
    add("--encoding", choices=("gpt2", "bytes"), help="default: gpt2, with no FILES bytes; bytes needs no vocabulary")
    add("--bpe_file", "--bpe-file", help="local rank file of GPT-2 instead of tiktoken's own")
    add("--val_fraction", "--val-fraction", type=float, default=0.07, help="share held out for validation (0.07)")
    add("--shard_tokens", "--shard-tokens", type=int, default=100_000_000, help="most tokens in a shard (100,000,000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes for GPT-2's encoding (all cores)")
    args = parser.parse_args(argv)
    args.encoding = args.encoding or ("gpt2" if args.files or args.bpe_file else "bytes")
    if not (0 < args.val_fraction < 1 and args.shard_tokens > 0 and args.workers > 0):
        refuse("--val_fraction must lie between 0 and 1, --shard_tokens and --workers be at least 1")
    if args.bpe_file and args.encoding == "bytes":
        refuse("--bpe_file is for --encoding gpt2, not for bytes")
    if args.files and not args.out:
        refuse("--out is missing, the folder for the shards")
    args.out = Path(args.out or ROOT / "data" / "embedded").resolve()
    return args


def run(args):
    documents, source = (read_documents(args.files), "files") if args.files else embedded_text()
    made = [folder for folder in (args.out, *args.out.parents) if not folder.exists()]
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        pairs, held_out = hold_out(documents, args.val_fraction)
        encoded = encode_all(work_units(pairs), args.encoding, args.bpe_file, args.workers)
        files = write_shards(args.out, encoded, args.shard_tokens)
        for split, entries in files.items():
            if not entries:
                raise Problem(f"no document fell to {split}; give more that differ (copies fall together) or another "
                              "--val_fraction")
        facts = {"encoding": args.encoding, "source": source, "held_out": held_out}
        if args.encoding == "gpt2":
            facts["vocabulary"] = keep_ranks(args.out, args.bpe_file)
        commit(args.out, facts, files["train"] + files["val"])
    finally:
        for path in [*args.out.glob("*_??????.bin.part"), *args.out.glob(RANKS + ".part")]:
            path.unlink()
        with suppress(OSError):  # it holds something, unless nothing came of it
            for folder in made:
                folder.rmdir()
    print(f"Tokenized {source}, encoding {args.encoding}, into {args.out}:")
    tokens = {split: sum(entry["tokens"] for entry in entries) for split, entries in files.items()}
    share = tokens["val"] / sum(tokens.values())
    print(f"train: {tokens['train']:,} tokens in {len(files['train'])} shard(s)")
    print(f"val: {tokens['val']:,} tokens in {len(files['val'])} shard(s), {share:.3%} of all "
          f"({args.val_fraction:.3%} asked)")
    if held_out["rule"] == "tail":
        print("Documents are few ({documents:,}), so val is their tail, from character {from_character:,} of document "
              "{from_document:,} on.".format_map(held_out))
    print(f"Next: ./run.sh --data_dir={args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out}")
    return 0


def main(argv=None):
    try:
        return run(parse(argv))
    except Problem as problem:
        message = problem
    except OSError as error:
        message = f"{error.filename or '--out'} cannot be used ({error.strerror}); check its name and the free space"
    print(f"tokenize_text.py: {message}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
