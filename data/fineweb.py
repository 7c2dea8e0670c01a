"""Fetches the FineWeb sample that the recipe trains on, as GPT-2 tokens, 100 million to a shard.

    python data/fineweb.py            the validation shard and 8 training shards, 1.8 GB, into data/fineweb10B
    python data/fineweb.py 103        all 103 training shards, 20.6 GB
    python data/fineweb.py 0          validation only

A file counts only once its SHA-256 equals the one that the hub records for it. What is complete is kept: after a stop
run the same line again, and a run with nothing to fetch only verifies, without a network. A cut connection goes on at
the last 10 MB that came, while a file cut by the end of this program starts anew.

manifest.json, written last, tells the encoding, the source (with the hub's commit) and of each file the name, split,
tokens and sha256: that of its token bytes, without the 1024-byte header. A folder with .bin files of other origin is
refused. No access token is ever printed, nor what an error says of one: only where it was found.

Exit codes: 0 all is here and verified; 2 bad knob, folder or environment, no network; 130 stopped by Ctrl-C.
"""
import argparse
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from urllib.parse import urlsplit

from screen import ROOT, say, say_next, show_any_name

REPO = "kjj0/fineweb10B-gpt2"
LAST_SHARD = 103
THREADS = 4  # files fetched at a time; more do not fill a line better
PAUSES = (1, 2, 4, 8, 16)  # seconds before each new try while the hub or the line fails

# The twin of these constants is in train_gpt.py (and in tokenize_text.py beside this file).
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class Problem(Exception):
    """What stopped us, told in one sentence; exit code 2."""


def shard_names(shards):
    return ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]


def inspect(path):
    """(SHA-256 of the whole file, its entry in the manifest), or (None, None) if it is not there or not a shard."""
    whole, tokens = hashlib.sha256(), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
            whole.update(header)
            while chunk := file.read(1 << 22):
                whole.update(chunk)
                tokens.update(chunk)
            size = file.tell()
    except FileNotFoundError:
        return None, None
    magic, version, count = (int.from_bytes(header[i:i + 4], "little") for i in (0, 4, 8))
    if (magic, version, HEADER_BYTES + 2 * count) != (SHARD_MAGIC, SHARD_VERSION, size):
        return whole.hexdigest(), None
    split = "val" if "_val_" in path.name else "train"
    return whole.hexdigest(), {"name": path.name, "split": split, "tokens": count, "sha256": tokens.hexdigest()}


def read_manifest(out):
    """(commit, {name: entry}) of the manifest in `out`; (None, {}) if there is none of ours."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        repo, _, commit = manifest["source"].partition("@")
        entries = {entry["name"]: entry for entry in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}
    return (commit, entries) if repo == REPO and commit else (None, {})


def write_manifest(out, commit, entries):
    files = sorted(entries.values(), key=lambda entry: (entry["split"] == "train", entry["name"]))
    part = out / "manifest.json.part"
    part.write_text(json.dumps({"encoding": "gpt2", "source": f"{REPO}@{commit}", "files": files}, indent=1) + "\n",
                    encoding="utf-8")
    os.replace(part, out / "manifest.json")


def status_of(error):
    """The HTTP status that an exception of the hub's library, or its cause, carries; None if it never got one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            return status
        error = error.__cause__
    return None


def token_place():
    """Where the hub's library finds an access token: the name of a variable or the path of a file; None if nowhere."""
    from huggingface_hub import constants
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    where = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()), None)
    return where or (constants.HF_TOKEN_PATH if os.path.lexists(constants.HF_TOKEN_PATH) else None)


def check_token():
    """Problem where the access token is none that a header can hold. The library would show it, or blame the network.
    """
    where, advice = token_place(), "or remove it, as the data set needs none"
    if not where:
        return
    try:
        token = os.fsencode(os.environ[where]) if where in os.environ else Path(where).read_bytes()
    except FileNotFoundError:  # a link that leads nowhere: there is none, to the library too
        return
    except OSError as error:
        raise Problem(f"the access token in {where} cannot be read ({error.strerror}); mend it, {advice}") from None
    if not all(32 <= byte < 127 for byte in token.strip().replace(b"\r", b"").replace(b"\n", b"")):
        raise Problem(f"the access token in {where} is not plain ASCII text; write it so, {advice}")


def token_advice():
    """What to do about a hub that answers 401 or 403: its library sends a token from the environment or its file."""
    where = token_place()
    if where:
        return f"renew the access token in {where}, which may have expired, or remove it, as the data set needs none"
    return "no access token was sent, so check HF_ENDPOINT, or set HF_TOKEN if that hub wants one"


def endpoint_advice(before="", after=""):
    """To look at HF_ENDPOINT, between these, where that is set."""
    if not os.environ.get("HF_ENDPOINT"):
        return ""
    return f"{before}check HF_ENDPOINT, the https:// address of a hub, or unset it{after}"


def revision_advice(asked, out, old_commit):
    """What to do about a hub that has no such revision."""
    if asked:
        return "check --revision, or leave it out" + endpoint_advice("; ")
    if old_commit:
        manifest = out / "manifest.json"
        return f"the commit is that of {manifest}, and --revision=main takes the newest{endpoint_advice('; ')}"
    return endpoint_advice() or "try again later, or train on your own text with data/tokenize_text.py"


def reason_of(error):
    """The type of an error, with its first line where that comes from the system, and cannot hold a token or password.
    """
    words = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {words}" if words.startswith("[") else type(error).__name__


def patiently(call, what, advice, wait_for_network):
    """call(), tried again while the hub answers 5xx or 429 (its library retries no 500) and, if asked, while the line
    is down. Which classes the library raises differs from version to version, so all are read by status."""
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:  # noqa: BLE001
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise Problem(f"the disk is full while fetching {what}; free some space and run this again") from None
            status = status_of(error)
            if status and 400 <= status < 500 and status not in (408, 429):
                advice = token_advice() if status in (401, 403) else advice
                raise Problem(f"the hub refuses {what} (HTTP {status}); {advice}") from None
            if pause is None or not (status or wait_for_network):
                reason = f"HTTP {status}" if status else reason_of(error)
                raise Problem(f"the hub cannot be reached for {what} ({reason}); {endpoint_advice(after=', ')}run this "
                              "again with a network, or train on your own text with data/tokenize_text.py") from None
            time.sleep(pause)


def hub_files(names, revision, advice, endpoint):
    """(commit, {name: (bytes, SHA-256)}) as the hub records them; advice: what to do where it has no such revision."""
    from huggingface_hub import HfApi
    what = f"{REPO} at revision {revision or 'main'}"
    info = patiently(lambda: HfApi(endpoint=endpoint).dataset_info(REPO, revision=revision, files_metadata=True,
                                                                   timeout=30), what, advice, wait_for_network=False)
    listed = {file.rfilename: (file.lfs.size, file.lfs.sha256) for file in info.siblings or [] if file.lfs}
    missing = [name for name in names if name not in listed]
    if missing:
        raise Problem(f"{what} has no {missing[0]} with a SHA-256; ask for fewer shards or another --revision")
    return info.sha, {name: listed[name] for name in names}


def fetch(out, name, commit, sha256, endpoint):
    """Fetches one file beside `out`'s, compares it with the hub's hash, then puts it into place; its manifest entry."""
    from huggingface_hub import hf_hub_download
    staging = out / ".download"
    for attempt in range(2):
        path = Path(patiently(lambda again=attempt > 0: hf_hub_download(
            REPO, name, repo_type="dataset", revision=commit, local_dir=staging, endpoint=endpoint,
            force_download=again), name, revision_advice(None, out, None), wait_for_network=True))
        found, entry = inspect(path)
        if found == sha256:
            break
        path.unlink()
    else:
        raise Problem(f"{name} came with another SHA-256 than the hub's, twice; something on the way changes files, "
                      "so try again later or over another network")
    if entry is None:
        raise Problem(f"{name} is as the hub has it, but not a token shard; use another --revision")
    os.replace(path, out / name)
    return entry


def in_threads(work, names, told):
    """{name: work(name)}; prints a line as each ends."""
    results, pool = {}, ThreadPoolExecutor(THREADS)
    jobs = {pool.submit(work, name): name for name in names}
    try:
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            told(jobs[job], results[jobs[job]], len(results))
    except BaseException as error:  # Ctrl-C does not wait for the files under way
        pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    pool.shutdown()
    return results


@contextmanager
def folder(path):
    """Makes a folder. When the work in it fails, files under way go, and what was made of folders and is empty."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(path / ".download", ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def check_folder(out):
    """Problem where a folder holds what training may read beside FineWeb's shards."""
    known = shard_names(LAST_SHARD)
    for path in sorted(out.glob("*.bin")):
        if path.name not in known:
            raise Problem(f"{path} is none of FineWeb's files, and training may read it beside them; name another "
                          "--out, or move it away")


def tell_of_others(out):
    """Says which shards are here that no hash was compared of: of another commit, or copied here."""
    _, entries = read_manifest(out)
    others = [path.name for path in sorted(out.glob("*.bin")) if path.name not in entries]
    if others:
        them = f"{others[0]} and {len(others) - 1} more" if others[1:] else others[0]
        say(f"Here, but not verified: {them}; training reads it too, so ask for more shards, or remove it")


def check_space(out, needed):
    free = shutil.disk_usage(out).free
    if free < needed:
        raise Problem(f"{needed / 1e9:.2f} GB are needed in {out}, but only {free / 1e9:.2f} GB are free; "
                      "free some space, ask for fewer shards or name another --out")


def verify_only(out, names, entries):
    """Whether all files are as the manifest says."""
    if not all(name in entries for name in names):
        return False
    bad = []

    def told(name, result, _):
        if result[1] != entries[name]:
            bad.append(name)
            say(f"{name}: missing or not as manifest.json says; fetching it again")
    in_threads(lambda name: inspect(out / name), names, told)
    return not bad


def download(out, names, asked, old_commit, endpoint):
    """Brings `out` to what the hub has under `names`; the commit and the manifest's entries for them."""
    advice = revision_advice(asked, out, old_commit)
    commit, wanted = hub_files(names, asked or old_commit, advice, endpoint)
    say(f"{REPO} at commit {commit}")
    present = in_threads(lambda name: inspect(out / name), names, lambda *_: None)
    entries = {name: entry for name, (sha256, entry) in present.items() if entry and sha256 == wanted[name][1]}
    todo = [name for name in names if name not in entries]
    total = sum(wanted[name][0] for name in todo)
    check_space(out, total)
    say(f"{len(entries)} of {len(names)} files are here and verified, {len(todo)} to fetch, {total / 1e9:.2f} GB")

    def told(name, entry, done):
        say(f"{name}: {entry['tokens']:,} tokens, SHA-256 as the hub's ({done} of {len(todo)})")
    entries.update(in_threads(lambda name: fetch(out, name, commit, wanted[name][1], endpoint), todo, told))
    return commit, entries


def parse(argv):
    parser = argparse.ArgumentParser(description="FineWeb as GPT-2 tokens for train_gpt.py.", allow_abbrev=False)
    parser.add_argument("shards", nargs="?", type=int, default=8, help="training shards, 0 to 103 (8), 0.2 GB each")
    parser.add_argument("--out", default=ROOT / "data" / "fineweb10B", help="folder for the shards (data/fineweb10B)")
    parser.add_argument("--revision", help="branch, tag or commit of the hub (that of the manifest, else main)")

    def refuse(message):
        raise Problem(f"{message}; --help lists the knobs")
    parser.error = refuse  # one sentence, not argparse's usage block
    args = parser.parse_args(argv)
    if not 0 <= args.shards <= LAST_SHARD:
        refuse(f"shards is {args.shards}, but the sample has 0 to {LAST_SHARD}")
    args.out = Path(args.out).resolve()
    return args


def check_endpoint():
    """Problem where HF_ENDPOINT is no address, which the library would show, with the password that may be in it."""
    fine = False
    with suppress(ValueError):  # as asking for a port that is none
        parts = urlsplit(os.environ.get("HF_ENDPOINT") or "https://default")
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not fine:
        raise Problem(f"HF_ENDPOINT is no address; {endpoint_advice()}")


def import_hub():
    """Imports the hub's library, which reads the environment then, and lets it print no more than a progress bar."""
    check_endpoint()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            import huggingface_hub.utils
            from huggingface_hub import HfApi, hf_hub_download  # noqa: F401  read from their modules only now
    except ValueError as error:
        names = ", ".join(name for name in sorted(os.environ) if name.startswith("HF_"))
        raise Problem(f"the hub's library cannot start ({type(error).__name__}); check {names or 'its variables'}, or "
                      "unset what is not needed") from None
    huggingface_hub.utils.logging.set_verbosity_error()  # its warnings of a retry are many lines long
    if sys.stderr is None or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


def run(args):
    names, out = shard_names(args.shards), args.out
    check_folder(out)
    old_commit, entries = read_manifest(out)
    if args.revision in (None, old_commit) and verify_only(out, names, entries):
        say(f"{len(names)} files verified against manifest.json of {REPO} at commit {old_commit}; nothing to fetch")
    else:
        import_hub()
        check_token()
        commit, fresh = download(out, names, args.revision, old_commit, os.environ.get("HF_ENDPOINT") or None)
        write_manifest(out, commit, {**(entries if commit == old_commit else {}), **fresh})
        shutil.rmtree(out / ".download", ignore_errors=True)
        say(f"{len(names)} files verified against the hub; manifest.json written")
    tell_of_others(out)
    say_next(out)
    return 0


def main(argv=None):
    show_any_name()
    try:
        args = parse(argv)
        with folder(args.out):
            return run(args)
    except KeyboardInterrupt:
        say("\nStopped; the same line again goes on with what is missing.")
        os._exit(130)  # a plain exit would wait for the files under way
    except Problem as problem:
        message = str(problem)
    except ImportError as error:
        message = f"{error.name} is not installed; install requirements.txt or start by ./run.sh"
    except OSError as error:
        message = f"{error.filename or '--out'} cannot be used ({error.strerror or error}); choose another --out"
    say(f"fineweb.py: {message}.", sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
