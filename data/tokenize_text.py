"""Turns text into token shards that train_gpt.py reads.

    python data/tokenize_text.py                               docstrings of the installed numpy -> data/embedded
    python data/tokenize_text.py book.txt web.jsonl --out DIR  one document a text file, or a line's field "text"
    cat book.txt | python data/tokenize_text.py - --out DIR    standard input, read like a file

Lines of JSON are known by their first, or by the name (.json, .jsonl, .ndjson); what is no text is refused, and so is
a text most of whose first lines are data, as in a piece of such a file.

A shard is 256 int32 (magic, version, token count, zeros), then little-endian uint16 tokens, 50256 before each document,
which may run on into the next shard. manifest.json, written last, tells the encoding, the source, what is held out for
validation, and of each file the name, split, tokens and sha256: that of its token bytes, without the 1024-byte header.
GPT-2's ranks, whose SHA-256 it tells too, are kept beside the shards for data/sample.py. A folder with .bin files of
other origin, or with a val_docs.json, which tells of the documents there, is refused.

Of many documents a hash of each tells whether it is held out. Of few it might take none or half, so the last of them
are held out, or the end of the last as a document of its own; copies among them are left out, as they might lie on
either side.

Exit codes: 0 written; 2 bad knob or input; 6 no memory; 130 stopped by Ctrl-C. But for 0 the folder is as it was.
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
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

from screen import ROOT, end_by, quit_at_ctrl_c, say, say_next, show_any_name

if __name__ == "__main__":
    quit_at_ctrl_c("tokenize_text.py: stopped, nothing was written.")

import numpy as np  # noqa: E402

# The twin of these constants is in train_gpt.py (and in fineweb.py beside this file).
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
END_OF_TEXT = 50256
# GPT-2 numbers its 256 single bytes with the printable ones first; no vocabulary is needed to know that.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]  # token -> byte
BYTE_TO_TOKEN = np.argsort(BYTE_ORDER).astype(np.uint16)  # byte -> token
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The SHA-256 of GPT-2's ranks as `rank_lines` writes them. Whether they are that file's, tiktoken's or another copy's,
# any other ranks would give tokens that no reader of GPT-2's understands.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
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
OWN_SHARD = re.compile(r"(train|val)_\d{6}\.bin")  # the names of our shards, which the next run replaces
MOST_WORKERS, MOST_TOKENS = 4096, 2**31 - 1  # the latter is what a shard's header can hold
JSON_NAMES = ".json", ".jsonl", ".ndjson"
JSON_OBJECT = re.compile(r'\s*\[?\s*\{\s*"[^"\n]*"\s*:')  # how an object begins, alone or as the first of a list
LOOKED_AT = 100  # lines, from the first on, by which data is told from text
INVISIBLE = " \t\r\ufeff\u200b\u200c\u200d\u2060"
# A line that is an object, as JSON or Python write one, perhaps behind a name, time or number: data: {"text": "..."}
OBJECT_START = r"""[^{}"'()=]{0,80}\{\s*(["'])[^"'\n]*\1\s*:"""
OBJECT_LINE = re.compile(OBJECT_START + r".*\},?")
CUT_START = re.compile(OBJECT_START + r'\s*["\[{\d].*')  # the last line of a piece, cut within an object
CUT_END = re.compile(r'.*["\]}\d]\s*\}')  # the first line of a piece
NO_OBJECT = re.compile(r"(event|id|retry):.*|:.*|null|\[|\]")  # lines that come between such lines and tell nothing


class Problem(Exception):
    """A user's mistake or the machine's refusal, told in one sentence; exit code 2."""


def on_ctrl_c(handler):
    """Sets what a Ctrl-C does, and returns what it did; None outside the main thread, which alone may set it."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGINT, handler) or signal.SIG_DFL


@contextmanager
def unstoppable():
    """A moment in which a Ctrl-C is not heard, for what must not be left half done."""
    before = on_ctrl_c(signal.SIG_IGN)
    try:
        yield
    finally:
        on_ctrl_c(before)


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


def first_lines(text):
    """The first lines that are not blank, without what cannot be seen at their ends."""
    lines = (match[0].strip(INVISIBLE) for match in re.finditer(r"[^\n]+", text))
    return list(itertools.islice(filter(None, lines), LOOKED_AT))


def is_data_by_lines(lines):
    """Whether most of the lines are objects or lists, or all are strings, though the first may be cut or a comment."""
    lines = [line for line in lines if not NO_OBJECT.fullmatch(line)]
    if len(lines) < 2:
        return False
    data = [line.startswith(('["', "[{")) and isinstance(parsed(line.rstrip(",")), list) or
            bool(OBJECT_LINE.fullmatch(line)) for line in lines]
    data[0] = data[0] or bool(CUT_END.fullmatch(lines[0]))
    data[-1] = data[-1] or bool(CUT_START.fullmatch(lines[-1]))
    # A table within code has such lines too, with commas: there, nearly all must be.
    if sum(data) > len(lines) * (3 / 4 if sum(line.endswith(",") for line in lines) > 1 else 1 / 2):
        return True
    strings = sum(line[0] == '"' and isinstance(parsed(line), str) for line in lines)
    return strings > 20 and strings >= 0.9 * (len(lines) - 1)  # fewer may be a dialogue


def is_data(text):
    """Whether a text is plainly JSON: it begins as an object, is a value, each of its lines is one, or most of the
    first are."""
    seen = text.lstrip(INVISIBLE + "\n")
    if seen[:1] in ("[", "{"):
        if JSON_OBJECT.match(seen) or isinstance(parsed(seen), (dict, list)):
            return True
        if all(isinstance(parsed(line), (dict, list)) for line in seen.splitlines() if line.strip()):
            return True
    return is_data_by_lines(first_lines(seen))


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
        raise Problem(f'{where} is JSON or the like, but not from its first line on lines of {{"text": "..."}}; write '
                      "it so, a line for each document")
    return text


def open_bytes(file):
    if file != "-":
        return open(file, "rb")
    if sys.stdin is None:
        raise Problem("standard input is closed; give it the text, as in `cat book.txt |`, or name a file instead of -")
    return nullcontext(sys.stdin.buffer)


def read_file(file, name):
    """The documents of a file, or of standard input."""
    with open_bytes(file) as stream:
        head = []
        for line in stream:
            head.append(line)
            if line.strip(b"\xef\xbb\xbf \t\r\n"):  # a byte-order mark alone is blank too
                break
        is_json = file.lower().endswith(JSON_NAMES) or isinstance(parsed(b"".join(head)), dict)
        raws = itertools.chain(head, stream) if is_json else [b"".join(head) + stream.read()]
        for number, raw in enumerate(raws, 1):
            yield document(raw, f"{name} line {number}" if is_json else name, is_json)


def read_documents(files):
    """The documents of all files, in the order given."""
    for file in files:
        name, found = "standard input" if file == "-" else file, False
        try:
            for text in read_file(file, name):
                found = found or bool(text)
                yield text
        except OSError as error:
            raise Problem(f"{name} cannot be read ({error.strerror or error}); check its name") from None
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
    enough = math.ceil(min(ENOUGH / min(val_fraction, 1 - val_fraction), MOST_HELD))
    first = list(itertools.islice(documents, enough))
    if len(first) == enough:
        documents = itertools.chain(first, documents)
        return ((split_of(text, val_fraction), text) for text in documents), {"rule": "hash", "asked": val_fraction}
    texts = list(dict.fromkeys(first))  # a copy in the tail would be scored after the other was learnt
    copies = len(first) - len(texts)
    index, at = tail_cut(texts, val_fraction)
    texts[index:index + 1] = [texts[index][:at], texts[index][at:]]
    pairs = [("val" if number > index else "train", text) for number, text in enumerate(texts)]
    return pairs, {"rule": "tail", "asked": val_fraction, "documents": len(pairs) - 1, "from_document": index + 1,
                   "from_character": at + 1, **({"copies_left_out": copies} if copies else {})}


def rank_lines(pairs):
    """The lines of a rank file, for pairs of token and rank."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in pairs)


def gpt2_ranks(bpe_file=None):
    """{bytes: token} of GPT-2, from a rank file, or from tiktoken's own copy, which it fetches once."""
    try:
        import tiktoken
        if bpe_file:
            lines = [line.split() for line in Path(bpe_file).read_bytes().splitlines()]  # a token in base64, its rank
            pairs = [(base64.b64decode(token), int(rank)) for token, rank in lines]
        else:
            own = tiktoken.get_encoding("gpt2")
            pairs = [(own.decode_single_token_bytes(rank), rank) for rank in range(END_OF_TEXT)]
        found = hashlib.sha256(rank_lines(pairs)).hexdigest()
        reason = "" if found == GPT2_SHA256 else f"its ranks are others, with SHA-256 {found:.12}"
    except (ImportError, OSError, ValueError) as error:  # no package, no network, no such file, or no ranks in it
        reason = type(error).__name__
    if reason:
        raise Problem(f"{bpe_file or 'tiktoken'} does not give GPT-2's vocabulary ({reason}); name its rank file as "
                      "--bpe_file")
    return dict(pairs)


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


@contextmanager
def deaf_children():
    """Processes started meanwhile hear no Ctrl-C, not even while they start: this process ends them, with one line. It
    hears it afterwards, as half a start could not be ended."""
    heard = []
    before = on_ctrl_c(lambda *_: heard.append(True))
    if hasattr(signal, "pthread_sigmask"):  # what is blocked here is so in children; Windows has no such thing
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        on_ctrl_c(before)
        if heard:
            raise KeyboardInterrupt


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
            most = 61 if os.name == "nt" else workers  # Windows waits for no more at a time
            pool = ProcessPoolExecutor(min(workers, len(wave), most), get_context("spawn"),
                                       signal.signal, (signal.SIGINT, signal.SIG_IGN))
        except (ImportError, NotImplementedError, OSError) as error:  # no semaphores, for example no shared memory
            say(f"No worker processes here ({error}): one process does the work.")
    try:
        while wave:
            with deaf_children():
                results = (pool.map if pool else map)(work, wave)
            yield from results
            wave = list(itertools.islice(units, 4 * workers))
    except BrokenProcessPool:
        raise Problem(f"a worker process died; lower --workers (now {workers})") from None
    finally:
        with unstoppable():
            if pool:
                pool.shutdown(cancel_futures=True)


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
    raw = rank_lines(gpt2_ranks(bpe_file).items())
    (out / (RANKS + ".part")).write_bytes(raw)
    return {"name": RANKS, "sha256": hashlib.sha256(raw).hexdigest()}


def check_folder(out):
    """Problem where a folder holds what training may read beside the new shards, and what tells of the old ones."""
    for path in sorted(out.glob("*.bin")):
        if not OWN_SHARD.fullmatch(path.name):
            raise Problem(f"{path} was not made by this program, and training may read it beside the new shards; "
                          "name another --out, or move it away")
    if os.path.lexists(out / "val_docs.json"):
        raise Problem(f"{out / 'val_docs.json'} tells the sources of the validation documents that are there, and the "
                      "new ones may be others; move it away, or name another --out")


def commit(out, facts, files):
    """Gives the parts their names; without a manifest, from the first rename to the last, the folder is unfinished."""
    (out / "manifest.json").unlink(missing_ok=True)
    for path in sorted(out.glob("*.bin")):
        if OWN_SHARD.fullmatch(path.name):  # a longer run's would mix with these
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

    def print_help(self, file=None):
        say(self.format_help(), file)


def parse(argv):
    parser = Knobs(description="Text to token shards for train_gpt.py.", allow_abbrev=False)
    add, refuse = parser.add_argument, parser.error
    add("files", nargs="*", metavar="FILES", help="text or .jsonl, - for standard input; none: numpy's docstrings")
    add("--out", help="folder for shards and ranks; an earlier run's are replaced (with no FILES: data/embedded)")
    add("--encoding", choices=("gpt2", "bytes"), help="default: gpt2, with no FILES bytes; bytes needs no vocabulary")
    add("--bpe_file", "--bpe-file", help="local rank file of GPT-2 instead of tiktoken's own")
    add("--val_fraction", "--val-fraction", type=float, default=0.07, help="share held out for validation (0.07)")
    add("--shard_tokens", "--shard-tokens", type=int, default=100_000_000, help="most tokens in a shard (100,000,000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes for GPT-2's encoding (all cores)")
    args = parser.parse_args(argv)
    args.encoding = args.encoding or ("gpt2" if args.files or args.bpe_file else "bytes")
    if not 0 < args.val_fraction < 1:
        refuse(f"--val_fraction must lie between 0 and 1, and is {args.val_fraction}")
    for name, most in (("shard_tokens", MOST_TOKENS), ("workers", MOST_WORKERS)):
        if not 1 <= getattr(args, name) <= most:
            refuse(f"--{name} must lie between 1 and {most}, and is {getattr(args, name)}")
    if args.files.count("-") > 1:
        refuse("- is given twice, and standard input can be read but once")
    if args.bpe_file and args.encoding == "bytes":
        refuse("--bpe_file is for --encoding gpt2, not for bytes")
    if args.files and not args.out:
        refuse("--out is missing, the folder for the shards")
    args.out = Path(args.out or ROOT / "data" / "embedded").resolve()
    return args


def run(args):
    check_folder(args.out)
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
        if len({entry["sha256"] for entries in files.values() for entry in entries}) < sum(map(len, files.values())):
            raise Problem(f"two shards would hold the same tokens, which training refuses; raise --shard_tokens (now "
                          f"{args.shard_tokens}), or give a text that repeats itself less")
        facts = {"encoding": args.encoding, "source": source, "held_out": held_out}
        if args.encoding == "gpt2":
            facts["vocabulary"] = keep_ranks(args.out, args.bpe_file)
        with unstoppable():
            commit(args.out, facts, files["train"] + files["val"])
    finally:
        with unstoppable():
            for name in ("*_??????.bin", RANKS, "manifest.json"):
                for path in sorted(args.out.glob(name + ".part")):
                    path.unlink()
            with suppress(OSError):  # it holds something, unless nothing came of it
                for folder in made:
                    folder.rmdir()
    tell(args, source, held_out, files)
    return 0


def tell(args, source, held_out, files):
    """Prints what was made."""
    say(f"Tokenized {source}, encoding {args.encoding}, into {args.out}:")
    tokens = {split: sum(entry["tokens"] for entry in entries) for split, entries in files.items()}
    share = tokens["val"] / sum(tokens.values())
    say(f"train: {tokens['train']:,} tokens in {len(files['train'])} shard(s)")
    say(f"val: {tokens['val']:,} tokens in {len(files['val'])} shard(s), {share:.3%} of all "
        f"({args.val_fraction:.3%} asked)")
    if held_out["rule"] == "tail":
        say("Documents are few ({documents:,}), so val is their tail, from character {from_character:,} of document "
            "{from_document:,} on.".format_map(held_out))
    if "copies_left_out" in held_out:
        say(f"Left out: {held_out['copies_left_out']:,} equal to an earlier one, as a copy of what is learnt would be "
            "scored.")
    say_next(args.out)


def main(argv=None):
    show_any_name()
    code = 2
    try:
        return run(parse(argv))
    except KeyboardInterrupt:
        code, message = 130, "stopped, nothing was written"
    except MemoryError:
        code, message = 6, "memory ran out; cut the text into smaller files, or lower --workers"
    except Problem as problem:
        message = problem
    except OSError as error:
        message = f"{error.filename or '--out'} cannot be used ({error.strerror}); check its name and the free space"
    say(f"tokenize_text.py: {message}.", sys.stderr)
    return code


if __name__ == "__main__":
    end_by(main)
