"""data/tokenize_text.py: shards that decode to their text, the pinned text, every refusal's sentence."""
import base64
import gzip
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "tokenize_text.py"
sys.path.append(str(SCRIPT.parent))
spec = importlib.util.spec_from_file_location("tokenize_text", SCRIPT)
tokenize_text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tokenize_text)
REAL_SHA256 = tokenize_text.GPT2_SHA256


def read_shards(out):
    """{split: tokens}, after checking headers, sizes, names and hashes against the manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    kept = manifest.pop("vocabulary", None)
    assert set(manifest) == {"encoding", "source", "held_out", "files"}
    assert bool(kept) == (manifest["encoding"] == "gpt2")
    if kept:
        assert kept == {"name": "gpt2.tiktoken", "sha256": hashlib.sha256(
            (out / "gpt2.tiktoken").read_bytes()).hexdigest()}
    tokens = {"train": [], "val": []}
    for entry in manifest["files"]:
        raw = (out / entry["name"]).read_bytes()
        assert set(entry) == {"name", "split", "tokens", "sha256"}
        assert entry["name"] == f"{entry['split']}_{len(tokens[entry['split']]):06d}.bin"
        header = np.frombuffer(raw[:1024], dtype="<i4")
        assert header[:3].tolist() == [20240520, 1, entry["tokens"]] and not header[3:].any()
        assert len(raw) == 1024 + 2 * entry["tokens"]
        assert entry["sha256"] == hashlib.sha256(raw[1024:]).hexdigest()
        tokens[entry["split"]].append(np.frombuffer(raw[1024:], dtype="<u2"))
    names = {entry["name"] for entry in [*manifest["files"], *[kept] * bool(kept)]} | {"manifest.json"}
    assert {path.name for path in out.iterdir()} == names
    return manifest, {split: np.concatenate(parts) for split, parts in tokens.items()}


def documents_of(tokens):
    """The documents, as bytes, of a stream in encoding bytes; written without the script's own table."""
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    to_byte = dict(enumerate(printable + [b for b in range(256) if b not in printable]))
    assert tokens[0] == 50256
    documents = []
    for token in tokens.tolist():
        if token == 50256:
            documents.append(bytearray())
        else:
            documents[-1].append(to_byte[token])
    return [bytes(document) for document in documents]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def texts_for_test(count, seed=1):
    rng = random.Random(seed)
    words = ["the", "matrix", "naïve", "日本", "\t", "don't", "\n", "42", "<|endoftext|>", "  ", "x" * 30]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 60))) for i in range(count)]


def sentence(capsys):
    error = capsys.readouterr().err
    assert error.startswith("tokenize_text.py: ") and error.count("\n") == 1 and error.endswith(".\n"), error
    return error


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory):
    """A file in the shape of GPT-2's ranks: its single bytes, then invented pairs and longer tokens."""
    tokens = [bytes([b]) for b in tokenize_text.BYTE_ORDER]
    known, rng = set(tokens), random.Random(5)
    letters = [b"e", b"t", b"a", b"o", b" ", b"n", b"x", b"m", b"r", b"i", b"h", b"\n", b"s", b"d"]
    while len(tokens) < 50256:
        pair = rng.choice(tokens[256:] or letters) + rng.choice(letters) if rng.random() < 0.7 else \
            rng.choice(letters) + rng.choice(letters)
        if pair not in known and len(pair) < 9:
            known.add(pair)
            tokens.append(pair)
    path = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    with pytest.MonkeyPatch.context() as patch:  # for these tests they are GPT-2's
        patch.setattr(tokenize_text, "GPT2_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        yield path, tokens


@pytest.fixture(scope="session")
def program(rank_file, tmp_path_factory):
    """The command of the program to which `rank_file` is GPT-2's, in its workers too."""
    path = tmp_path_factory.mktemp("program") / "tokenize.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport tokenize_text\n"
                    f"tokenize_text.GPT2_SHA256 = {hashlib.sha256(rank_file[0].read_bytes()).hexdigest()!r}\n"
                    "if __name__ == '__main__':\n    sys.exit(tokenize_text.main())\n")
    return [sys.executable, str(path)]


def test_embedded_text_is_the_pinned_one(tmp_path, capsys):
    """The pin: if this fails while numpy is 2.4.6, runs on the embedded text no longer compare."""
    out = tmp_path / "out"
    assert tokenize_text.main(["--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"Next: ./run.sh --data_dir={out}"
    manifest, tokens = read_shards(out)
    assert manifest["encoding"] == "bytes"
    if np.__version__ != "2.4.6":
        assert manifest["source"] == f"numpy {np.__version__} docstrings (unpinned)" and "unpinned" in said
        pytest.skip("the pin belongs to numpy 2.4.6")
    assert manifest["source"] == "numpy 2.4.6 docstrings"
    assert (len(tokens["train"]), len(tokens["val"])) == (1_441_023, 79_147)
    sha256 = lambda raw: hashlib.sha256(raw).hexdigest()
    raw = {split: (out / f"{split}_000000.bin").read_bytes()[1024:] for split in tokens}
    for name in "tiny-cpu", "embedded-1xgpu":
        track = json.loads((SCRIPT.parents[1] / "records" / "tracks" / f"{name}.json").read_text())
        assert track["train"]["sha256"] == sha256(sha256(raw["train"]).encode()), name
        assert track["val_sha256"] == sha256(raw["val"][: 2 * track["val_tokens"] + 2]), name
    documents = list(tokenize_text.numpy_docstrings(Path(np.__file__).parent))
    assert sum(map(len, documents)) == 1_518_940 and min(map(len, documents)) > 200
    assert sorted(documents_of(tokens["train"]) + documents_of(tokens["val"])) == sorted(
        text.encode() for text in documents)


def test_changed_numpy_is_unpinned(monkeypatch):
    monkeypatch.setattr(tokenize_text, "EMBEDDED", (np.__version__, "0" * 64))
    assert tokenize_text.embedded_text()[1] == f"numpy {np.__version__} docstrings (unpinned)"


def test_docstrings_are_found_by_path_and_line(tmp_path):
    long = {name: f"{name} " * 60 for name in "module klass method inner after crlf skipped".split()}
    (tmp_path / "b").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "a_b.py").write_bytes(f'"""{long["crlf"]}\r\n\r\n    indented\r\n    """\r\n'.encode())
    (tmp_path / "b" / "m.py").write_text(
        f'"""{long["module"]}"""\ndef outer():\n    """short"""\n    def inner():\n        """{long["inner"]}"""\n'
        f'class K:\n    """{long["klass"]}"""\n    async def method(self):\n        """{long["method"]}"""\n'
        f'def after():\n    """{long["after"]}"""\n')
    for name in ("tests/t.py", "version.py", "b/__config__.py"):
        (tmp_path / name).write_text(f'"""{long["skipped"]}"""\n')
    found = list(tokenize_text.numpy_docstrings(tmp_path))
    assert [text.split()[0] for text in found] == ["crlf", "module", "inner", "klass", "method", "after"]
    assert found[0].endswith("\n\nindented") and "\r" not in found[0]


def test_bytes_round_trip_and_split(tmp_path):
    texts = texts_for_test(300)
    file = write_jsonl(tmp_path / "a.jsonl", [*texts, "", texts[0]])
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 0
    manifest, tokens = read_shards(tmp_path / "out")
    assert manifest["source"] == "files" and manifest["encoding"] == "bytes"
    train, val = (documents_of(tokens[split]) for split in ("train", "val"))
    assert sorted(train + val) == sorted(text.encode() for text in [*texts, texts[0]])
    assert not set(train) & set(val), "a copy of a document must not lie on the other side"
    assert 5 <= len(val) <= 45
    assert train == [text.encode() for text in [*texts, texts[0]] if text.encode() in set(train)], "order is kept"


def test_split_of_a_document_does_not_depend_on_the_others(tmp_path):
    texts = texts_for_test(400)
    for name, some in (("all", texts), ("half", texts[::-2])):
        file = write_jsonl(tmp_path / f"{name}.jsonl", some)
        assert tokenize_text.main([file, "--out", str(tmp_path / name), "--encoding", "bytes"]) == 0
    val = {name: set(documents_of(read_shards(tmp_path / name)[1]["val"])) for name in ("all", "half")}
    assert val["half"] == val["all"] & {text.encode() for text in texts[::-2]}


def test_text_files_and_standard_input(tmp_path):
    texts = texts_for_test(30)
    files = []
    for i, text in enumerate(texts[:-1]):
        files.append(str(tmp_path / f"{i}.txt"))
        Path(files[-1]).write_bytes((b"\xef\xbb\xbf" if i % 2 else b"") + text.encode())
    run = subprocess.run([sys.executable, str(SCRIPT), *files, "-", "--out", str(tmp_path / "out"), "--encoding",
                          "bytes", "--val-fraction", "0.3"], input=texts[-1].encode(), capture_output=True,
                         timeout=60, check=False)
    assert run.returncode == 0 and run.stderr == b"", run.stderr
    _, tokens = read_shards(tmp_path / "out")
    assert sorted(documents_of(tokens["train"]) + documents_of(tokens["val"])) == sorted(t.encode() for t in texts)


def test_shards_are_cut_at_their_limit_and_replaced_by_the_next_run(tmp_path):
    out, file = tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts_for_test(200))
    assert tokenize_text.main([file, "--out", str(out), "--encoding", "bytes"]) == 0
    _, whole = read_shards(out)
    (out / "train_000000.bin.part").write_bytes(b"left by a killed run")
    assert tokenize_text.main([file, "--out", str(out), "--encoding", "bytes", "--shard_tokens", "1000"]) == 0
    manifest, cut = read_shards(out)
    assert all(np.array_equal(cut[split], whole[split]) for split in whole)
    sizes = [entry["tokens"] for entry in manifest["files"] if entry["split"] == "train"]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    assert tokenize_text.main([file, "--out", str(out), "--encoding", "bytes"]) == 0
    read_shards(out)  # which refuses files that the manifest does not list


def test_bytes_decode_to_their_text():
    encode, decode = tokenize_text.codec("bytes")
    text = "".join(texts_for_test(30)) + "".join(map(chr, range(256)))
    assert decode([50256, *encode(text).tolist(), 50256]) == text
    assert decode(encode("é").tolist()[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_gpt2_tokens_decode_to_their_text(rank_file):
    pytest.importorskip("tiktoken")
    encode, decode = tokenize_text.codec("gpt2", str(rank_file[0]))
    text = "".join(texts_for_test(30))
    assert decode([50256, *encode(text).tolist(), 50256]) == text


def test_gpt2_tokens_are_those_of_the_whole_document(tmp_path, rank_file, monkeypatch):
    """Cutting long documents for the workers changes no token, and "<|endoftext|>" in a text is text."""
    tiktoken = pytest.importorskip("tiktoken")
    path, tokens_of_rank = rank_file
    texts = texts_for_test(100) + ["one line\nanother  \n\n  three\r\nfour\x1c\nfive don't\n" * 40]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(tokenize_text, "WORK_CHARS", 50)
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--bpe_file", str(path), "--workers", "1",
                               "--val_fraction", "0.2"]) == 0
    manifest, tokens = read_shards(tmp_path / "out")
    assert manifest["encoding"] == "gpt2"
    codec = tiktoken.Encoding("test", pat_str=tokenize_text.GPT2_PATTERN, special_tokens={},
                              mergeable_ranks={token: rank for rank, token in enumerate(tokens_of_rank)})
    expected = {"train": [], "val": []}
    for text in texts:
        expected[tokenize_text.split_of(text, 0.2)] += [50256, *codec.encode_ordinary(text)]
    assert {split: part.tolist() for split, part in tokens.items()} == expected
    units = list(tokenize_text.work_units([("train", text) for text in texts]))
    assert len(units) > 100, "the long document was meant to be cut"
    assert max(expected["train"][1:]) > 256 and len(expected["train"]) < sum(map(len, texts))


BLANKS = [" ", "\n", "\t", " \n", "\r\n", "\xa0", "\u3000 ", "\x85", "\x1c ", "\x1f"]


@pytest.fixture(scope="module")
def as_tiktoken(rank_file):
    """text -> tokens by tiktoken alone, which a million blanks would stop, and the ranks."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(rank_file[1])}
    return tiktoken.Encoding("alone", pat_str=tokenize_text.GPT2_PATTERN, special_tokens={},
                             mergeable_ranks=ranks).encode_ordinary, ranks


@pytest.mark.parametrize("run", [*BLANKS, "a", "7", "!", "日", "e\u0301", "' ", " !"])
def test_a_long_run_has_the_tokens_that_tiktoken_gives(rank_file, as_tiktoken, run):
    encode = tokenize_text.codec("gpt2", str(rank_file[0]))[0]
    for count in (tokenize_text.LONG - 1, tokenize_text.LONG, tokenize_text.LONG + 1, 3 * tokenize_text.LONG):
        long = (run * count)[:count]
        for before, after in (("", ""), ("no 7", "end"), ("no.", "\nend"), ("x\x1c", "\x1fx"), ("\u200b", "'s" + long)):
            assert encode(before + long + after).tolist() == as_tiktoken[0](before + long + after)


@pytest.mark.parametrize("blank", BLANKS[:3])
def test_a_million_blanks_are_text(tmp_path, rank_file, as_tiktoken, blank):
    """All blanks but the last are one piece, as in shorter runs."""
    tiktoken, (words, ranks) = pytest.importorskip("tiktoken"), as_tiktoken
    piece = tiktoken.Encoding("piece", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={}).encode_ordinary
    file = write_jsonl(tmp_path / "a.jsonl", [*texts_for_test(100), "no 7" + blank * 10**6 + "end"])
    out = tmp_path / "out"
    assert tokenize_text.main([file, "--out", str(out), "--bpe_file", str(rank_file[0]), "--workers", "1",
                               "--val_fraction", "0.3"]) == 0
    expected = np.array([50256, *words("no 7"), *piece(blank * (10**6 - 1)), *words(blank + "end")], np.uint16)
    assert any(expected.tobytes() in part.tobytes() for part in read_shards(out)[1].values())


def test_many_runs_of_blanks_take_no_longer_than_text(rank_file):
    encode = tokenize_text.codec("gpt2", str(rank_file[0]))[0]
    start = time.monotonic()
    encode((" " * (tokenize_text.LONG - 1) + "x") * 100)
    assert time.monotonic() - start < 5, "a search that begins anew at each blank takes minutes"


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, rank_file, program):
    pytest.importorskip("tiktoken")
    texts = texts_for_test(200)
    big = tmp_path / "big.txt"
    big.write_text("".join(f"line {i} of a long document, the next\n" for i in range(70000)))
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    made = {}
    for workers in ("1", "2"):
        run = subprocess.run([*program, file, str(big), "--out", str(tmp_path / workers),
                              "--bpe_file", str(rank_file[0]), "--workers", workers, "--shard_tokens", "300000"],
                             capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        read_shards(tmp_path / workers)
        made[workers] = {path.name: path.read_bytes() for path in (tmp_path / workers).iterdir()}
    assert made["1"] == made["2"] and len(made["1"]) > 3


def test_without_semaphores_one_process_does_the_work(tmp_path, rank_file, monkeypatch, capsys):
    pytest.importorskip("tiktoken")

    def no_pool(*args, **kwargs):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(tokenize_text, "ProcessPoolExecutor", no_pool)
    monkeypatch.setattr(tokenize_text, "WORK_CHARS", 100)
    file = write_jsonl(tmp_path / "a.jsonl", texts_for_test(60))
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--bpe_file", str(rank_file[0]), "--workers",
                               "2"]) == 0
    assert "one process" in capsys.readouterr().out
    read_shards(tmp_path / "out")


def test_tiktoken_without_a_network(tmp_path, monkeypatch, capsys):
    tiktoken = pytest.importorskip("tiktoken")

    def unreachable(name):
        raise OSError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    tokenize_text.codec.cache_clear()
    file = write_jsonl(tmp_path / "a.jsonl", texts_for_test(5))
    assert tokenize_text.main([file, "--out", str(tmp_path / "out")]) == 2
    error = sentence(capsys)
    assert "--bpe_file" in error and "--encoding bytes" in error
    assert not (tmp_path / "out").exists()


BAD_INPUTS = {
    "bad_json.jsonl": (b'{"text": "a"}\n\n{"text": \n', "bad_json.jsonl line 3"),
    "no_field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "no_field.jsonl line 2"),
    "not_text.jsonl": (b'{"text": 3}\n', "not_text.jsonl line 1"),
    "list.jsonl": (b'["text"]\n', "list.jsonl line 1"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl line 2 is not UTF-8"),
    "latin.txt": ("caf\xe9".encode("latin-1"), "latin.txt is not UTF-8 text (byte 3"),
    "gzip.txt": (gzip.compress(b"some text", mtime=0), "gzip.txt is not UTF-8 text (byte 1 of it); unpack"),
    "gzip.jsonl": (gzip.compress(b"some text", mtime=0), "gzip.jsonl line 1 is not UTF-8 text (byte 1 of it); unpack"),
    "binary.txt": (b"abc\0def", "binary.txt is not UTF-8 text (byte 3 of it is zero)"),
    "utf16.md": ("words".encode("utf-16-le"), "utf16.md is not UTF-8 text (byte 1"),
    "array.json": (b'[{"text": "a"}, {"text": "b"}]', "array.json line 1 is not JSON"),
    "array.txt": (b'[\n {"text": "a"},\n {"text": "b"}\n]\n', "array.txt is JSON"),
    "cut_array.txt": (b'[{"text": "a"},\n {"text": ', "cut_array.txt is JSON"),
    "list.txt": (b'\n["a", "b"]', "list.txt is JSON"),
    "lists.md": (b'["a", 1]\n\n["b", 2]\n', "lists.md is JSON"),
    "pretty.html": (b'{\n  "text": "a"\n}\n', "pretty.html is JSON"),
    "pretty.json": (b'{\n  "text": "a"\n}\n', "pretty.json line 1 is not JSON"),
    "broken.txt": (b'{"text": "a"}\n{"text": \n', "broken.txt line 2"),
    "other.data": (b'\xef\xbb\xbf\n{"body": "a"}\n', "other.data line 2 is not JSON with a string"),
    "prose.JSON": (b"once upon a time\n", "prose.JSON line 1 is not JSON"),
    "cut_first.txt": (b'rest of it"}\n{"text": "b"}\n', "cut_first.txt is JSON or the like"),
    "cut_both.txt": (b'rest of it"}\n{"text": "b', "cut_both.txt is JSON"),
    "comment.txt": (b'# the web\n{"text": "a"}\n{"text": "b"}\n', "comment.txt is JSON"),
    "logged.txt": (b'2026-01-01 12:00 begun\n{"text": "a"}\n{"text": "b"}\n', "logged.txt is JSON"),
    "null.txt": (b'null\n{"text": "a"}\n{"text": "b"}\n', "null.txt is JSON"),
    "two_marks.txt": (b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}\n', "two_marks.txt is JSON"),
    "no_width.txt": ('\u200b{"text": "a"}\n'.encode(), "no_width.txt is JSON"),
    "events.txt": (b'event: x\ndata: {"text": "a"}\n\nevent: x\ndata: {"text": "b"}\n', "events.txt is JSON"),
    "table.txt": (b'1\t{"text": "a"}\n2\t{"text": "b"}\n', "table.txt is JSON"),
    "python.txt": (b"{'text': 'a'}\n{'text': 'b'}\n", "python.txt is JSON"),
    "strings.txt": (b'"one"\n"two"\n"three"\n' * 10, "strings.txt is JSON"),
    "of_array.txt": (b' {"text": "a"},\n {"text": "b"},\n {"text": "c"}\n', "of_array.txt is JSON"),
    "of_lists.txt": (b'"b", 1]\n["a", 1]\n["b", 2]\n', "of_lists.txt is JSON"),
    "deep.txt": (b'{"a": [' + b"[" * 100_000, "deep.txt is JSON"),
    "empty.txt": (b"", "empty.txt is empty"),
    "empty.jsonl": (b'\n{"text": ""}\n', "empty.jsonl is empty"),
}


@pytest.mark.parametrize("name", ["c.json", "c.txt", "c.JSONL", "c.ndjson", "c", "-"])
def test_lines_of_json_are_known_by_what_they_hold(tmp_path, name):
    texts = [*texts_for_test(210), "\n{}", "[1] a note"]
    lines = "\ufeff\n \n" + "".join(json.dumps({"id": i, "text": text}) + "\r\n" for i, text in enumerate(texts))
    (tmp_path / name).write_bytes(lines.encode())
    run = subprocess.run([sys.executable, str(SCRIPT), "-" if name == "-" else str(tmp_path / name), "--out",
                          str(tmp_path / "out"), "--encoding", "bytes"], input=lines.encode(), capture_output=True,
                         timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    _, tokens = read_shards(tmp_path / "out")
    assert sorted(documents_of(tokens["train"]) + documents_of(tokens["val"])) == sorted(t.encode() for t in texts)


@pytest.mark.parametrize("text", ["[1] a note\n[2] another\n", "{{template}}\n", "[1]\nOne\n", "{ \"quoted\" words }",
                                  "1\n2\n3\n", "\"Yes,\" he said.\n", "[" * 100_000, "null\n", "a rose\nis a rose\n",
                                  "\"Yes.\"\n\"No.\"\n", "see {\"a\": \"b\"}", "[[A note]]\n[[Another]]\n[[Third]]\n",
                                  "Ask:\n{\"a\": 1}\nIt says:\n{\"b\": 2}\n", "One:\n\n```json\n{\"a\": 1}\n```\n",
                                  "WORDS = [\n    \"a\",\n    \"b\",\n    \"c\",\n    \"d\",\n]\n",
                                  "import re\nRULES = [\n    {\"a\": 1},\n    {\"a\": 2},\n    {\"a\": 3},\n]\n",
                                  "a = {\"x\": 1}\nb = {\"y\": 2}\nc = {\"z\": 3}\n", "p { color: red }\nq { x: y }\n"])
def test_prose_that_looks_a_little_like_json_is_prose(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert list(tokenize_text.read_documents([str(tmp_path / "a.txt")])) == [text]


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, name):
    content, words = BAD_INPUTS[name]
    good, out = write_jsonl(tmp_path / "good.jsonl", texts_for_test(100)), tmp_path / "out"
    (tmp_path / name).write_bytes(content)
    assert tokenize_text.main([good, str(tmp_path / name), "--out", str(out), "--encoding", "bytes",
                               "--shard_tokens", "500"]) == 2
    assert words in sentence(capsys)
    assert not out.exists()


def test_a_failed_run_leaves_the_last_good_one(tmp_path, capsys):
    good, out = write_jsonl(tmp_path / "good.jsonl", texts_for_test(100)), tmp_path / "out"
    assert tokenize_text.main([good, "--out", str(out), "--encoding", "bytes"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert tokenize_text.main([good, str(tmp_path / "absent.txt"), "--out", str(out), "--encoding", "bytes"]) == 2
    assert "absent.txt" in sentence(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_copies_alone_leave_a_split_empty(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", ["the same"] * 300)
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 2
    error = sentence(capsys)
    assert "no document fell to val" in error and "--val_fraction" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texts, fraction, val", [
    (["abcde fghij\n" * 100], 0.07, "abcde fghij\n" * 7),  # at a line's start
    (["abcde " * 200], 0.1, " abcde" * 20 + " "),  # at a word's
    (["x" * 1000], 0.2, "x" * 200),
    (["ab"], 0.07, "b"), (["ab"], 0.9999, "b"), (["a", "b"], 0.07, "b"),
    ([c * 100 for c in "abcdefghij"], 0.1, "j" * 100), ([c * 100 for c in "abcdefghij"], 0.07, "j" * 100),
    ([c * 100 for c in "abcdefghij"], 0.3, "h" * 100 + "i" * 100 + "j" * 100),
    (["x" * 10, "y" * 10, "z" * 10], 0.07, "zz"), (["x" * 990, "y" * 10], 0.5, "x" * 490 + "y" * 10),
])
def test_of_few_documents_the_tail_is_held_out(tmp_path, capsys, texts, fraction, val):
    """Without a loss, near the share asked, told on the screen and in the manifest."""
    files = [tmp_path / f"{i}.txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    assert tokenize_text.main([*map(str, files), "--out", str(tmp_path / "out"), "--encoding", "bytes",
                               "--val_fraction", str(fraction)]) == 0
    said = capsys.readouterr().out
    manifest, tokens = read_shards(tmp_path / "out")
    parts = {split: [part.decode() for part in documents_of(tokens[split])] for split in tokens}
    assert "".join(parts["train"] + parts["val"]) == "".join(texts) and "".join(parts["val"]) == val
    held = manifest["held_out"]
    cut = sum(map(len, texts[:held["from_document"] - 1])) + held["from_character"] - 1
    assert "".join(texts)[cut:] == val
    assert (held["rule"], held["asked"], held["documents"]) == ("tail", fraction, len(texts))
    share = len(tokens["val"]) / sum(map(len, tokens.values()))
    assert f" {share:.3%} of all ({fraction:.3%} asked)" in said
    assert f"({len(texts)}), so val is their tail, from character {held['from_character']:,} of document" in said


def test_any_number_of_documents_works_at_once(tmp_path, capsys):
    """From one to more than the fewest for which a hash decides; then the share is near the one asked too."""
    texts, shares, rules = texts_for_test(220, seed=3), [], []
    for count in (*range(1, 25), 60, 199, 200, 220):
        file = write_jsonl(tmp_path / "a.jsonl", texts[:count])
        assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 0
        manifest, tokens = read_shards(tmp_path / "out")
        shares.append(len(tokens["val"]) / sum(map(len, tokens.values())))
        rules.append(manifest["held_out"]["rule"])
    assert rules == ["tail"] * 26 + ["hash"] * 2
    assert 0.03 < min(shares) and max(shares) < 0.12, shares
    assert "% of all (7.000% asked)" in capsys.readouterr().out


def test_standard_input_alone_and_a_single_character(tmp_path):
    run = partial(subprocess.run, [sys.executable, str(SCRIPT), "-", "--out", str(tmp_path / "out"), "--encoding",
                                   "bytes"], capture_output=True, timeout=60, check=False)
    assert run(input=b"a").returncode == 2 and not (tmp_path / "out").exists()
    assert run(input=b"words and words\n" * 50).returncode == 0
    assert len(read_shards(tmp_path / "out")[1]["val"]) == 1 + 16 * 4


@pytest.mark.parametrize("arguments, words", [
    (["a.txt"], "--out"), (["--val_fraction", "1"], "--val_fraction"), (["--workers", "0"], "--workers"),
    (["--shard_tokens", "0"], "--shard_tokens"), (["--shard_tokens", "many"], "many"), (["--outt", "x"], "--outt"),
    (["--val_fraction", "nan"], "--val_fraction"), (["--workers", "9" * 20], "--workers"),
    (["--shard_tokens", "9" * 20], "--shard_tokens"), (["-", "-", "--out", "x"], "- is given twice"),
    (["--encoding", "utf8"], "utf8"), (["--encoding", "bytes", "--bpe_file", "x"], "--bpe_file"),
])
def test_bad_knobs(capsys, arguments, words):
    assert tokenize_text.main(arguments) == 2
    assert words in sentence(capsys)


@pytest.mark.parametrize("content", [None, b"", b"IQ== 0\n", b"what is this\n", b"@ x\n"])
def test_bad_rank_file(tmp_path, capsys, content):
    pytest.importorskip("tiktoken")
    path = tmp_path / "ranks"
    if content is not None:
        path.write_bytes(content)
    file = write_jsonl(tmp_path / "a.jsonl", texts_for_test(5))
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--bpe_file", str(path)]) == 2
    assert str(path) in (error := sentence(capsys)) and "--bpe_file" in error


def test_other_ranks_than_gpt2s_are_refused(tmp_path, rank_file, capsys):
    """Each has 50,256 ranks in order, and begins with GPT-2's bytes, or has a line too many."""
    pytest.importorskip("tiktoken")
    tokens = [base64.b64encode(token) for token in rank_file[1]]
    swapped = [*tokens[:300], tokens[301], tokens[300], *tokens[302:]]
    lines = [b"%b %d" % (token, rank) for rank, token in enumerate(tokens)]
    bad = tmp_path / "bad"
    for others in ([b"%b %d" % (token, rank) for rank, token in enumerate(swapped)], [*lines, lines[-1]], lines[::-1]):
        bad.write_bytes(b"\n".join(others))
        with pytest.raises(tokenize_text.Problem, match="bad does not give GPT-2's vocabulary .its ranks are others"):
            tokenize_text.gpt2_ranks(bad)
    bad.write_bytes(b"\r\n".join(lines))
    assert [*tokenize_text.gpt2_ranks(bad)] == rank_file[1], "line ends do not matter"


def test_the_hash_of_gpt2s_ranks_is_tiktokens():
    """Its r50k_base has the same ranks, in a file with this hash."""
    source = pytest.importorskip("tiktoken_ext.openai_public").__loader__.get_source("tiktoken_ext.openai_public")
    assert f'r50k_base.tiktoken",\n        expected_hash="{REAL_SHA256}"' in source


def test_ranks_are_kept_beside_the_shards(tmp_path, rank_file, capsys):
    pytest.importorskip("tiktoken")
    file, out = write_jsonl(tmp_path / "a.jsonl", texts_for_test(5)), tmp_path / "out"
    make = partial(tokenize_text.main, [file, "--out", str(out), "--bpe_file", str(rank_file[0])])
    assert tokenize_text.kept_ranks(out) is None and make() == 0
    read_shards(out)
    assert tokenize_text.kept_ranks(out) == out / "gpt2.tiktoken"
    assert tokenize_text.gpt2_ranks(out / "gpt2.tiktoken") == tokenize_text.gpt2_ranks(rank_file[0])
    raw = (out / "gpt2.tiktoken").read_bytes()
    for damage in (raw[:-9], raw[:50] + bytes([raw[50] ^ 1]) + raw[51:], None):
        (out / "gpt2.tiktoken").unlink()
        if damage:
            (out / "gpt2.tiktoken").write_bytes(damage)
        with pytest.raises(tokenize_text.Problem, match="gpt2.tiktoken is missing or not as its manifest.json says"):
            tokenize_text.kept_ranks(out)
        assert make() == 0, "the next run writes it anew"
    assert tokenize_text.main([file, "--out", str(out), "--encoding", "bytes"]) == 0
    assert tokenize_text.kept_ranks(out) is None and (out / "gpt2.tiktoken").exists(), "it may be the user's own"


def test_ranks_of_tiktoken_itself_are_kept_too(tmp_path, rank_file, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = tokenize_text.gpt2_ranks(rank_file[0])
    own = tiktoken.Encoding("gpt2", pat_str=tokenize_text.GPT2_PATTERN, mergeable_ranks=ranks,
                            special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": own}.get)
    tokenize_text.codec.cache_clear()
    file, out = write_jsonl(tmp_path / "a.jsonl", texts_for_test(5)), tmp_path / "out"
    assert tokenize_text.main([file, "--out", str(out), "--workers", "1"]) == 0
    read_shards(out)
    assert tokenize_text.gpt2_ranks(tokenize_text.kept_ranks(out)) == ranks
    tokenize_text.codec.cache_clear()


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "deeper", tmp_path / "there"):
        assert tokenize_text.main([str(tmp_path / "absent.txt"), "--out", str(out), "--encoding", "bytes"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "a folder of the user's stays"


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    assert tokenize_text.main(["--out", str(tmp_path / "taken")]) == 2
    assert "taken" in sentence(capsys)


@pytest.mark.parametrize("name", ["fineweb_train_000001.bin", "train_second.bin", "books.bin", "train_1.bin"])
def test_shards_of_another_origin_are_not_mixed_with(tmp_path, capsys, name):
    (tmp_path / "a.txt").write_text("words and words\n" * 50)
    make = partial(tokenize_text.main, [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes"])
    assert make() == 0 and make() == 0, "its own it replaces"
    (tmp_path / "out" / name).write_bytes(b"")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert make() == 2 and name in sentence(capsys)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_sources_of_earlier_documents_are_not_taken_for_those_of_new_ones(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val_docs.json").write_text("{}")
    assert tokenize_text.main(["--out", str(tmp_path / "out")]) == 2
    assert "val_docs.json tells the sources" in sentence(capsys) and len([*(tmp_path / "out").iterdir()]) == 1


@pytest.mark.parametrize("texts, left", [("aa", "a"), ("aba", "ab"), ("abcabc", "abc")])
def test_of_few_documents_copies_are_left_out(tmp_path, capsys, texts, left):
    """A copy in the tail would be scored after the other was learnt."""
    texts, left = ([f"{name} words of it\n" * 20 for name in names] for names in (texts, left))
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    assert tokenize_text.main([file, "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 0
    assert f"Left out: {len(texts) - len(left)} equal to an earlier one" in capsys.readouterr().out
    manifest, tokens = read_shards(tmp_path / "out")
    assert b"".join(documents_of(np.concatenate([*tokens.values()]))).decode() == "".join(left)
    assert manifest["held_out"]["copies_left_out"] == len(texts) - len(left)
    assert manifest["held_out"]["documents"] == len(left)


def run_program(tmp_path, *arguments, program=(sys.executable, str(SCRIPT)), more="", **keywords):
    """The program on a.txt; `more`: of the shell's line."""
    if not (tmp_path / "a.txt").exists():
        (tmp_path / "a.txt").write_text("words and words\n" * 50)
    line = f'"$@" {more}'
    return subprocess.run(["sh", "-c", line, "sh", *program, "a.txt", *arguments], cwd=tmp_path, capture_output=True,
                          timeout=60, check=False, **keywords)


needs_sh = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@needs_sh
@pytest.mark.parametrize("more", ["| true", ">/dev/full", ">&-", "2>&-", "| head -1"])
def test_nobody_has_to_listen(tmp_path, more):
    if "full" in more and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    line = "; echo $? >code" if "|" not in more else ""
    program = "sh", "-c", '"$@"; echo $? >code', "sh", sys.executable, str(SCRIPT)
    done = run_program(tmp_path, "--encoding", "bytes", "--out", "out", program=program, more=more + line)
    assert (tmp_path / "code").read_text() == "0\n" and b"Error" not in done.stderr, done.stderr
    read_shards(tmp_path / "out")


@needs_sh
@pytest.mark.parametrize("encoding, name", [("ascii", "o\xe9 x".encode()), ("utf-8:strict", b"o\xff x")])
def test_a_name_that_the_screen_cannot_show(tmp_path, encoding, name):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = run_program(tmp_path, "--encoding", "bytes", "--out", name, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    last = done.stdout.splitlines()[-1]
    assert last.startswith(b"Next: ./run.sh --data_dir='") and last.endswith(b" x'"), "a blank is quoted"


@needs_sh
def test_a_closed_standard_input_is_said(tmp_path):
    done = run_program(tmp_path, "-", "--out", "out", more="<&-")
    assert done.returncode == 2 and done.stderr.startswith(b"tokenize_text.py: standard input is closed")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert tokenize_text.main([str(tmp_path / "folder"), "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 2
    assert "folder cannot be read (Is a directory)" in sentence(capsys)


def test_the_smallest_share_is_one_character(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    assert tokenize_text.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes",
                               "--val_fraction", "1e-320"]) == 0
    assert documents_of(read_shards(tmp_path / "out")[1]["val"]) == [b"s"]


def test_no_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise MemoryError
    monkeypatch.setattr(tokenize_text, "document", full)
    (tmp_path / "a.txt").write_text("words")
    assert tokenize_text.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes"]) == 6
    assert "memory ran out" in sentence(capsys) and not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a Ctrl-C for a group of processes")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path, rank_file, program, workers):
    """The terminal gives it to the workers too, while they start or work."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a long document, the next\n" for i in range(1_500_000)))
    arguments = "a.txt", "--out", "new/out", "--bpe_file", str(rank_file[0]), "--workers", workers
    run = subprocess.Popen([*program, *arguments],
                           cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "new/out").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.8)  # the workers of two are there, more or less
    os.killpg(run.pid, signal.SIGINT)
    said, error = run.communicate(timeout=60)
    assert (run.returncode, said, error) == (130, b"", b"tokenize_text.py: stopped, nothing was written.\n")
    assert not (tmp_path / "new").exists()


def test_shards_of_the_same_tokens_are_not_written(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("0123456789" * 1000)
    code = tokenize_text.main([str(tmp_path / "a.txt"), "--encoding", "bytes", "--out", str(tmp_path / "out"),
                               "--shard_tokens", "1000"])
    assert code == 2 and "--shard_tokens (now 1000)" in sentence(capsys) and not (tmp_path / "out").exists()


def test_a_thread_may_tokenize(tmp_path):
    """Handlers of signals belong to the main one."""
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(99)))
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(tokenize_text.main, [str(tmp_path / "a.txt"), "--encoding", "bytes", "--out",
                                                str(tmp_path / "out")]).result()
    assert not code and (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("lines", [
    ['"No."', '"Yes."', '"Why?"', '"I must go," she said.'], ['"To be."', '"Or not."', '"So."']])
def test_a_dialogue_is_no_data(lines):
    assert not tokenize_text.is_data("\n".join(lines))


def test_importing_does_nothing(tmp_path):
    command = [sys.executable, "-c", "import tokenize_text, fineweb, then_sample"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"},
                         timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])
