"""data/fineweb.py against a stand-in of the hub on the loopback: no network, shards of a few kilobytes."""
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "fineweb.py"
sys.path.append(str(SCRIPT.parent))
REPO = "kjj0/fineweb10B-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def shard(seed, tokens=3000):
    body = b"".join(struct.pack("<H", (50256 if i == 0 else seed * 7919 + i * 31) % 50257) for i in range(tokens))
    return struct.pack("<256i", 20240520, 1, tokens, *[0] * 253) + body


class Hub:
    """What the hub answers, and how badly: `faults` holds one function a file, called once with the handler."""

    def __init__(self):
        self.files = {name: shard(i) for i, name in enumerate(NAMES)}
        self.commits = {"main": COMMIT, COMMIT: COMMIT}
        self.faults, self.gets, self.ranges, self.api_failures, self.delay = {}, Counter(), [], 0, 0.0
        self.refusal = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # of a client that hangs up: it would print
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, handler, status, headers, content, body=True):
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if body:
            handler.wfile.write(content)

    def answer(self, handler, body):
        path = handler.path.partition("?")[0]
        if path.startswith(f"/api/datasets/{REPO}"):
            return self.api(handler, path)
        parts = path.split("/")  # "", "datasets", owner, name, "resolve", commit, file
        name = parts[-1]
        if len(parts) != 7 or parts[5] != COMMIT or name not in self.files:
            return self.reply(handler, 404, {"X-Error-Code": "EntryNotFound"}, b"", body)
        content = self.files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)),
                   "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not body:
            return self.reply(handler, 200, headers, content, body=False)
        self.gets[name] += 1
        time.sleep(self.delay)
        fault = self.faults.get(name)
        if fault and fault(self, handler, headers, content):
            return None
        wanted = handler.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.ranges.append((name, start))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(handler, 206, headers, content[start:])
        return self.reply(handler, 200, headers, content)

    def api(self, handler, path):
        if self.refusal:
            return self.reply(handler, self.refusal, {}, b'{"error": "Invalid username or password."}')
        if self.api_failures:
            self.api_failures -= 1
            return self.reply(handler, 500, {}, b"busy")
        revision = path.partition("/revision/")[2] or "main"
        if revision not in self.commits:
            return self.reply(handler, 404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        siblings = [{"rfilename": name, "size": len(content), "blobId": "0" * 40,
                     "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                    for name, content in self.files.items()]
        info = {"id": REPO, "sha": self.commits[revision], "siblings": siblings, "tags": [], "private": False,
                "downloads": 0, "likes": 0}
        return self.reply(handler, 200, {"Content-Type": "application/json"}, json.dumps(info).encode())


def times(count, fault):
    """`fault` for the first `count` GETs of a file, then all is well."""
    left = [count]

    def maybe(*args):
        left[0] -= 1
        if left[0] >= 0:
            fault(*args)
        return left[0] >= 0
    return maybe


def status_500(hub, handler, headers, content):
    hub.reply(handler, 500, {}, b"oops")


def status_401(hub, handler, headers, content):
    hub.reply(handler, 401, {}, b"{}")


def corrupt(hub, handler, headers, content):
    """One flipped bit and a correct length: nothing but a hash can tell."""
    hub.reply(handler, 200, headers, content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])


def cut(hub, handler, headers, content):
    handler.send_response(200)
    for key, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(key, value)
    handler.end_headers()
    handler.wfile.write(content[:1500])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def trickle(hub, handler, headers, content):
    handler.send_response(200)
    for key, value in {**headers, "Content-Length": str(len(content))}.items():
        handler.send_header(key, value)
    handler.end_headers()
    for start in range(0, len(content), 1000):
        handler.wfile.write(content[start:start + 1000])
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def fineweb(monkeypatch, tmp_path):
    for key, value in {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(key, value)
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    for key in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    spec = importlib.util.spec_from_file_location("fineweb_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01, 0.01))
    return module


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "shards"


def complete(hub, out, names=NAMES):
    """Every file is the hub's, the manifest describes them, and nothing else is left lying about."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["encoding"] == "gpt2" and manifest["source"] == f"{REPO}@{COMMIT}"
    assert [entry["name"] for entry in manifest["files"]] == names
    for entry in manifest["files"]:
        content = (out / entry["name"]).read_bytes()
        assert content == hub.files[entry["name"]]
        assert entry == {"name": entry["name"], "split": "val" if "_val_" in entry["name"] else "train",
                         "tokens": 3000, "sha256": hashlib.sha256(content[1024:]).hexdigest()}
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "manifest.json"])
    return True


def sentence(capsys):
    error = capsys.readouterr().err
    assert error.startswith("fineweb.py: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_fetches_verifies_and_says_what_is_next(fineweb, hub, out, capsys):
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert complete(hub, out)
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"Next: ./run.sh --data_dir={out}" and COMMIT in said
    assert set(hub.gets.values()) == {1}


def test_zero_shards_is_validation_only(fineweb, hub, out):
    assert fineweb.main(["0", "--out", str(out)]) == 0
    assert complete(hub, out, NAMES[:1])


def test_rerun_only_verifies_even_offline(fineweb, hub, out, capsys):
    assert fineweb.main(["2", "--out", str(out)]) == 0
    hub.close()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert "3 files verified against manifest.json" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert fineweb.main(["1", "--out", str(out)]) == 0, "fewer shards than are here are here as well"
    assert fineweb.main(["2", "--out", str(out), "--revision", COMMIT]) == 0


def test_rerun_repairs_only_what_is_bad(fineweb, hub, out):
    assert fineweb.main(["2", "--out", str(out)]) == 0
    path = out / NAMES[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (out / NAMES[2]).unlink()
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert complete(hub, out) and hub.gets == {NAMES[0]: 1, NAMES[1]: 2, NAMES[2]: 2}


def test_more_shards_keep_what_is_here(fineweb, hub, out):
    assert fineweb.main(["1", "--out", str(out)]) == 0
    hub.commits["main"] = "f" * 40  # the branch moves on: a set of shards stays with the commit that it began with
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert complete(hub, out) and set(hub.gets.values()) == {1}


def test_repair_of_a_few_keeps_the_others_in_the_manifest(fineweb, hub, out):
    assert fineweb.main(["2", "--out", str(out)]) == 0
    (out / NAMES[0]).unlink()
    assert fineweb.main(["0", "--out", str(out)]) == 0
    assert complete(hub, out)


def test_files_without_a_manifest_are_not_fetched_again(fineweb, hub, out):
    out.mkdir()
    (out / NAMES[0]).write_bytes(hub.files[NAMES[0]])
    (out / NAMES[1]).write_bytes(hub.files[NAMES[1]][:-2])
    assert fineweb.main(["1", "--out", str(out)]) == 0
    assert complete(hub, out, NAMES[:2]) and hub.gets == {NAMES[1]: 1}


@pytest.mark.parametrize("manifest", ["{", "[]", '{"source": 3, "files": []}', '{"source": "files", "files": [{}]}'])
def test_a_manifest_that_is_not_ours_is_written_anew(fineweb, hub, out, manifest):
    out.mkdir()
    (out / "manifest.json").write_text(manifest)
    assert fineweb.main(["0", "--out", str(out)]) == 0
    assert complete(hub, out, NAMES[:1])


def test_slow_hub(fineweb, hub, out):
    hub.faults = {name: trickle_once for name, trickle_once in ((n, times(1, trickle)) for n in NAMES)}
    start = time.monotonic()
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert complete(hub, out)
    assert time.monotonic() - start < 3 * 7 * 0.05 + 5


def test_files_come_in_parallel(fineweb, hub, out):
    hub.delay = 0.5
    start = time.monotonic()
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert time.monotonic() - start < 1.4, "three files of half a second each, one after another, take 1.5"


def test_cut_connection_goes_on_where_it_broke(fineweb, hub, out, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # its 10 MB would hold the whole file
    hub.faults[NAMES[1]] = times(1, cut)
    assert fineweb.main(["1", "--out", str(out)]) == 0
    assert complete(hub, out, NAMES[:2])
    assert hub.ranges == [(NAMES[1], 1500)]


def test_500_then_fine(fineweb, hub, out):
    hub.faults[NAMES[0]], hub.api_failures = times(2, status_500), 2
    assert fineweb.main(["0", "--out", str(out)]) == 0
    assert complete(hub, out, NAMES[:1]) and hub.gets[NAMES[0]] == 3


def test_500_for_ever(fineweb, hub, out, capsys):
    hub.faults[NAMES[0]] = times(100, status_500)
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "HTTP 500" in sentence(capsys) and not (out / "manifest.json").exists()
    assert hub.gets[NAMES[0]] == len(fineweb.PAUSES) + 1


def test_corrupt_once_is_fetched_again(fineweb, hub, out):
    hub.faults[NAMES[1]] = times(1, corrupt)
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert complete(hub, out) and hub.gets[NAMES[1]] == 2


def test_corrupt_twice_is_a_sentence(fineweb, hub, out, capsys):
    hub.faults[NAMES[1]] = times(2, corrupt)
    assert fineweb.main(["1", "--out", str(out)]) == 2
    error = sentence(capsys)
    assert NAMES[1] in error and "SHA-256" in error
    assert not (out / NAMES[1]).exists() and not (out / "manifest.json").exists()
    assert fineweb.main(["1", "--out", str(out)]) == 0, "the next run goes on from there"
    assert complete(hub, out, NAMES[:2]) and hub.gets[NAMES[0]] == 1


def test_a_file_that_is_no_shard(fineweb, hub, out, capsys):
    hub.files[NAMES[0]] = b"\0" * 2048
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "not a token shard" in sentence(capsys) and not (out / NAMES[0]).exists()


def test_wrong_revision(fineweb, hub, out, capsys):
    assert fineweb.main(["0", "--out", str(out), "--revision", "no-such"]) == 2
    assert "no-such" in (error := sentence(capsys)) and "--revision" in error


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("place", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file", None])
def test_a_refused_token_is_named_and_not_shown(fineweb, hub, out, capsys, monkeypatch, status, place, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.refusal = status
    if place == "file":
        (tmp_path / "token").write_text("hf_expired")
    elif place:
        monkeypatch.setenv(place, "hf_expired")
    assert fineweb.main(["1", "--out", str(out)]) == 2
    error = sentence(capsys)
    assert f"HTTP {status}" in error and "hf_expired" not in error and "--revision" not in error
    named = {"file": f"token in {tmp_path / 'token'},", None: "no access token was sent"}
    assert named.get(place, f"token in {place},") in error and not out.exists()


def test_a_token_refused_at_a_file(fineweb, hub, out, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    monkeypatch.setattr(hub, "answer", lambda handler, body, answer=hub.answer: answer(handler, body) if "/api/" in
                        handler.path else status_401(hub, handler, {}, b""))
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "HTTP 401" in (error := sentence(capsys)) and "HF_TOKEN" in error and not out.exists()


def test_a_token_that_no_header_can_hold(fineweb, hub, out, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\xe9")
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "access token in HF_TOKEN" in sentence(capsys) and not out.exists()


SECRET = "hf_Geheim"
TOKENS = {"utf-16-le": SECRET.encode("utf-16-le"), "utf-16": SECRET.encode("utf-16"), "latin-1": b"hf_Geheim\xe9",
          "utf-8": "hf_Geheim\u20ac".encode(), "zero": b"hf_Geheim\0", "folder": None, "loop": None}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_file_that_holds_none_is_named_and_not_shown(fineweb, hub, out, capsys, monkeypatch, tmp_path, kind):
    from huggingface_hub import constants
    path = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(path))
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(TOKENS[kind])
    assert fineweb.main(["1", "--out", str(out)]) == 2
    error = sentence(capsys)
    assert f"the access token in {path} " in error and "network" not in error
    assert "G" not in error.replace(str(path), "") and "hf_" not in error.replace(str(path), "") and not out.exists()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert fineweb.main(["0", "--out", str(out)]) == 0, "it is not read"


def test_a_token_file_with_line_ends_serves(fineweb, hub, out, monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(b" hf_good\r\n")
    assert fineweb.main(["0", "--out", str(out)]) == 0


@pytest.mark.parametrize("message", ["Illegal header value b'Bearer h\\x00f_Geheim'", "Invalid port: 'Geheim@host'"])
def test_what_an_error_says_is_not_shown(fineweb, capsys, message):
    def call():
        raise RuntimeError(message)
    with pytest.raises(fineweb.Problem) as told:
        fineweb.patiently(call, "a file", "advice", wait_for_network=False)
    assert "Geheim" not in str(told.value) and "(RuntimeError)" in str(told.value)


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_another_variable_that_the_library_refuses_is_named(out, tmp_path, name):
    environment = {**os.environ, name: "Geheim", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, str(SCRIPT), "0", "--out", str(out)], env=environment, text=True,
                         capture_output=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert name in run.stderr and "Geheim" not in run.stderr and not out.exists()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:99999", "http://user:Geheim/x@host", "http://[::1", "not a url",
                                      "ftp://127.0.0.1", "http://"])
def test_an_address_that_is_none_is_named_by_its_variable(out, tmp_path, endpoint):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run([sys.executable, str(SCRIPT), "0", "--out", str(out)], env=environment, text=True,
                         capture_output=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1), run.stderr
    assert "HF_ENDPOINT is no address; check" in run.stderr and "Geheim" not in run.stderr and not out.exists()


@pytest.mark.parametrize("status", [400, 404, 410, 451])
def test_a_hub_that_has_it_not_is_named_where_it_was_chosen(fineweb, hub, out, capsys, monkeypatch, status):
    hub.refusal = status
    assert fineweb.main(["0", "--out", str(out)]) == 2
    error = sentence(capsys)
    assert f"HTTP {status}" in error and "check HF_ENDPOINT" in error and "--revision" not in error
    assert fineweb.main(["0", "--out", str(out), "--revision", "x"]) == 2
    assert "check --revision" in (error := sentence(capsys)) and "check HF_ENDPOINT" in error
    monkeypatch.delenv("HF_ENDPOINT")
    assert "HF_ENDPOINT" not in fineweb.revision_advice(None, out, None) + fineweb.revision_advice("x", out, None)


def test_a_commit_of_the_manifest_that_the_hub_lacks(fineweb, hub, out, capsys):
    assert fineweb.main(["0", "--out", str(out)]) == 0
    capsys.readouterr()
    del hub.commits[COMMIT]
    assert fineweb.main(["1", "--out", str(out)]) == 2
    error = sentence(capsys)
    assert f"the commit is that of {out / 'manifest.json'}, and --revision=main takes the newest" in error
    assert "leave it out" not in error
    assert fineweb.main(["1", "--out", str(out), "--revision=main"]) == 0, "as it says"


@pytest.mark.parametrize("name", ["train_000000.bin", "fineweb_train_000104.bin", "fineweb_train_1.bin", "books.bin"])
def test_shards_of_another_origin_are_not_mixed_with(fineweb, hub, out, capsys, name):
    out.mkdir()
    (out / name).write_bytes(b"")
    assert fineweb.main(["1", "--out", str(out)]) == 2
    assert str(out / name) in sentence(capsys) and not hub.gets and [path.name for path in out.iterdir()] == [name]


def test_shards_that_were_not_verified_are_told(fineweb, hub, out, capsys):
    assert fineweb.main(["2", "--out", str(out)]) == 0
    assert "not verified" not in capsys.readouterr().out
    (out / "manifest.json").unlink()
    for _ in range(2):
        assert fineweb.main(["1", "--out", str(out)]) == 0
        assert f"not verified: {NAMES[2]};" in capsys.readouterr().out
    shutil.copy(out / NAMES[2], out / "fineweb_train_000003.bin")
    assert fineweb.main(["1", "--out", str(out)]) == 0
    assert f"not verified: {NAMES[2]} and 1 more;" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("more", ["| true", ">/dev/full", ">&-"])
def test_nobody_has_to_listen(hub, out, tmp_path, more):
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    line = f'{{ "$@"; echo $? >code; }} {more}'
    run = subprocess.run(["sh", "-c", line, "sh", sys.executable, str(SCRIPT), "1", "--out", str(out)], cwd=tmp_path,
                         env=environment, text=True, capture_output=True, timeout=60, check=False)
    assert run.stderr == "" and (tmp_path / "code").read_text() == "0\n" and complete(hub, out, NAMES[:2])


@pytest.mark.skipif(os.name != "posix", reason="needs names of any bytes")
@pytest.mark.parametrize("encoding, name", [("ascii", "o\xe9 x".encode()), ("utf-8:strict", b"o\xff x")])
def test_a_name_that_the_screen_cannot_show(hub, tmp_path, encoding, name):
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1",
                   "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    run = subprocess.run([sys.executable, str(SCRIPT), "0", "--out", name], cwd=tmp_path, env=environment,
                         capture_output=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, b"")
    last = run.stdout.splitlines()[-1]
    assert last.startswith(b"Next: ./run.sh --data_dir='") and last.endswith(b" x'"), "a blank is quoted"


def test_a_failed_download_leaves_only_what_is_whole(fineweb, hub, out, capsys, tmp_path):
    hub.faults[NAMES[1]] = times(100, corrupt)
    assert fineweb.main(["1", "--out", str(out / "deeper")]) == 2
    assert NAMES[1] in sentence(capsys)
    assert [path.name for path in (out / "deeper").iterdir()] == [NAMES[0]]
    hub.faults[NAMES[0]] = times(100, status_500)
    for folder in (out / "other", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        assert fineweb.main(["1", "--out", str(folder)]) == 2
    assert not (out / "other").exists() and not list((tmp_path / "there").iterdir()), "a folder of the user's stays"


def test_a_stopped_download_leaves_nothing(hub, out, tmp_path):
    hub.delay = 30
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    run = subprocess.Popen([sys.executable, str(SCRIPT), "1", "--out", str(out)], env=environment, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(hub.gets) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    said, error = run.communicate(timeout=20)
    assert (run.returncode, error) == (130, "") and "the same line again" in said and not out.exists()


def test_shards_that_the_hub_lacks(fineweb, hub, out, capsys):
    assert fineweb.main(["3", "--out", str(out)]) == 2
    assert "fineweb_train_000003.bin" in sentence(capsys) and not hub.gets


def test_disk_full_is_told_before_the_first_byte(fineweb, hub, out, capsys, monkeypatch):
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 7023))
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "GB are free" in sentence(capsys) and not hub.gets
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 7024))
    assert fineweb.main(["0", "--out", str(out)]) == 0, "7,024 bytes is what the file takes"


def test_network_down(fineweb, out, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert fineweb.main(["0", "--out", str(out)]) == 2
    assert "cannot be reached" in sentence(capsys)


@pytest.mark.parametrize("arguments, word", [(["104"], "103"), (["-1"], "0 to 103"), (["many"], "many"),
                                             (["--shards=3"], "--shards")])
def test_bad_knobs(fineweb, capsys, arguments, word):
    assert fineweb.main(arguments) == 2
    assert word in sentence(capsys)


def test_out_is_a_file(fineweb, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    assert fineweb.main(["0", "--out", str(tmp_path / "taken")]) == 2
    assert "--out" in sentence(capsys)


def test_as_a_program(hub, out, tmp_path):
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    run = subprocess.run([sys.executable, str(SCRIPT), "1", "--out", str(out)], env=environment, text=True,
                         capture_output=True, timeout=60, check=False)
    assert run.returncode == 0 and complete(hub, out, NAMES[:2]), run.stderr
    assert run.stderr == ""
    run = subprocess.run([sys.executable, str(SCRIPT), "999"], env=environment, text=True, capture_output=True,
                         timeout=60, check=False)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
