"""run.sh: its shell dialect, and what it decides on machines that stand-ins for python and nvidia-smi describe."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import PLAIN, ROOT
from tiny import make_corpus, write_shard

RUN_SH = (ROOT / "run.sh").read_text(encoding="utf-8")
CODE = "\n".join(line for line in RUN_SH.splitlines() if not line.lstrip().startswith("#"))
SHELLS = [shell for shell in ("bash", "dash", "ksh") if shutil.which(shell)]
pytestmark = pytest.mark.skipif(os.name != "posix" or not shutil.which("sh"), reason="needs a POSIX shell")

# Plays python and, in .venv, what python made there. Snippets about torch get the answers that the test has set; any
# other snippet runs in the real interpreter; everything else is written down, one line a call.
INTERPRETER = r"""#!/bin/sh
if [ "$1" = -c ]; then
    case $2 in
        "") exit 0 ;;
        *'import torch'*) [ -n "$GPUS" ] && echo "$GPUS"; exit ;;
        *'version("torch")'*) [ ! -e "${0%/bin/*}/torch" ] || { cat "${0%/bin/*}/torch"; exit 0; }; exit 1 ;;
        *'"%d.%d"'*) echo "${VERSION:-3.11}"; exit ;;
        *ensurepip*) exit "${NO_VENV:-0}" ;;
        *'sys.exit'*) exit "${TOO_OLD:-0}" ;;
        *get_path*) mkdir -p "${0%/bin/*}/site"; echo "${0%/bin/*}/site"; exit ;;
        *locate_file*) echo /elsewhere; exit ;;
        *) exec "$REAL" "$@" ;;
    esac
fi
case $1 in data/then_sample.py|data/check.py) exec "$REAL" "$@" ;; esac
echo "$*" >> "$CALLS"
case "$1 $2" in
    '-m venv')
        for folder in "$@"; do :; done
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        case $* in *--system-site-packages*) [ -n "$HIDDEN" ] || cp "${0%/bin/*}/torch" "$folder/torch" ;; esac ;;
    '-m pip') [ -z "$NO_PIP" ] || exit 1; [ -e "${0%/bin/*}/torch" ] || echo 2.13.0 > "${0%/bin/*}/torch"
        case $* in *needs.txt*) cp "${0%/bin/*}/constraints.txt" "${0%/bin/*}/needs.txt" "$KEPT" ;; esac ;;
    'data/fineweb.py '*) exit "${FINEWEB:-0}" ;;
    *'/data/sample.py '*) echo "sample: some words"; exit "${SAMPLE:-0}" ;;
    'data/tokenize_text.py '*) mkdir -p data/embedded; echo '{}' > data/embedded/manifest.json ;;
    '-m pytest') echo "tested: ${SCRIPT:-all}"; exit 7 ;;
    'records/records.py '*|'data/sample.py '*)
        read -r line; echo "heard $line"; echo complaint >&2; exit "${TOOL:-0}" ;;
    *'.py --'*|'-m torch'*)
        env > "$KEPT/environment"
        [ -n "$NO_RUN" ] || mkdir -p "logs/of process $$"
        [ -z "$WEIGHTS" ] || { mkdir -p "logs/$WEIGHTS"; echo weights > "logs/$WEIGHTS/weights.pt"; }
        [ -z "$SIGNALS" ] || exec "$REAL" -c "$LISTENER"
        exit "${CODE:-0}" ;;
esac
"""

# A training that says which signals it gets, and ends with $CODE after so many as $SIGNALS says.
LISTENER = """
import os, signal, time
def say(text):
    os.write(1, (text + os.linesep).encode())  # print must not be interrupted by itself
say(f"heard before: {signal.getsignal(signal.SIGINT) == signal.default_int_handler}")
got = []
def note(number, frame):
    got.append(number)
    say("got " + signal.Signals(number).name)
for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
    signal.signal(number, note)
say("ready")
while len(got) < int(os.environ["SIGNALS"]):
    time.sleep(0.01)  # signal.pause would miss a signal that came just before it
os._exit(int(os.environ["CODE"]))  # at once: an ordinary end might meet a late signal
"""


class Machine:
    """A copy of run.sh in an empty checkout, with a PATH that holds nothing but POSIX tools and the stand-ins."""

    def __init__(self, folder):
        self.root, self.tools, self.kept = folder / "a checkout", folder / "python" / "bin", folder / "kept"
        for path in (self.root / "data", self.tools, self.kept):
            path.mkdir(parents=True)
        for name in ("run.sh", "requirements.txt", "requirements.lock", "data/then_sample.py", "data/check.py"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "train_gpt.py").write_text("pass\n")
        for tool in "sh cat cp sed awk grep cksum dirname ls mkdir env rm uname getconf".split():
            (self.tools / tool).symlink_to(shutil.which(tool))
        self.put("python3", INTERPRETER)
        self.disk(100)
        self.environment = {"PATH": str(self.tools), "CALLS": str(self.kept / "calls"), "KEPT": str(self.kept),
                            "REAL": sys.executable, "GPUS": "0 0", "LISTENER": LISTENER}  # fmt: skip
        self.shell = shutil.which("sh")

    def put(self, name, text):
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)

    def disk(self, gib):  # free, whatever this machine has left
        self.put("df", f"#!/bin/sh\necho Filesystem\necho /dev/disk 0 0 {int(gib * 2**20)} 0% /\n")
        return self

    def torch(self, version):  # the interpreter comes with this torch
        (self.tools.parent / "torch").write_text(version + "\n")
        return self

    def gpu(self, count, mib):
        self.put("nvidia-smi", f"#!/bin/sh\necho 'GPU 0: {count} of {mib} MiB'\n")
        self.environment["GPUS"] = f"{count} {mib}"
        return self

    def fineweb(self):
        (self.root / "data/fineweb10B").mkdir()
        (self.root / "data/fineweb10B/manifest.json").touch()
        return self

    def run(self, *arguments, code=0, stdin="", script=None, **environment):
        """Runs run.sh, or a link to it, from another folder; returns the calls to the interpreter since the last run.
        """
        (self.kept / "calls").write_text("")
        command = [self.shell, str(script or self.root / "run.sh"), *arguments]
        done = subprocess.run(command, cwd=self.kept, env={**self.environment, **environment}, text=True,
                              input=stdin, capture_output=True, timeout=60)  # fmt: skip
        self.out, self.err = done.stdout, done.stderr
        assert done.returncode == code, (done.returncode, self.out, self.err)
        return (self.kept / "calls").read_text().replace(f"{self.root}/", "").splitlines()

    def as_is(self, *arguments, **keywords):
        """The same with PYTHON=python3, so that only what happens after the installation is left."""
        if not (self.tools.parent / "torch").exists():
            self.torch("2.13.0")
        return self.run(*arguments, PYTHON="python3", **keywords)

    def weights(self, run_id):
        """Saved weights of an earlier run."""
        folder = self.root / "logs" / run_id
        folder.mkdir(parents=True)
        (folder / "weights.pt").touch()
        os.utime(folder / "weights.pt", (1, 1))

    def start(self, **environment):
        """run.sh in a session of its own, thus without a terminal, whose training is LISTENER and has begun."""
        environment = {**self.environment, "PYTHON": "python3", "SIGNALS": "1", "CODE": "75", **environment}
        self.torch("2.13.0")
        command = [self.shell, str(self.root / "run.sh")]
        process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self.out = said(process.stdout, "ready")
        return process

    def seen(self):  # the environment of the training process
        return dict(line.split("=", 1) for line in (self.kept / "environment").read_text().splitlines() if "=" in line)


def said(stream, word):
    """What a stream says up to the first line that holds this word."""
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            return "".join(lines)
    raise AssertionError(f"{word!r} never came: {''.join(lines)}")


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """Children inherit what is ignored: after `nohup`, or in the background of a script, they would hear nothing."""
    ignored = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


# --- the shell dialect


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("file", ["run.sh", ".ci/run"])
def test_every_shell_parses_it(shell, file):
    subprocess.run([shell, "-n", ROOT / file], check=True, timeout=20)


def test_lines_are_short_and_it_is_executable():
    assert max(map(len, RUN_SH.splitlines())) <= 120
    assert os.access(ROOT / "run.sh", os.X_OK) and os.access(ROOT / ".ci/run", os.X_OK)
    assert RUN_SH.startswith("#!/bin/sh\n")


@pytest.mark.parametrize(
    "pattern",
    [r"\[\[", r"\bdeclare\b", r"\blocal\b", r"\bmapfile\b|\breadarray\b", r"\$\{\w+[,^]", r"\$\{\w+//?", r"\$\{\w+:\d",
     r"<<<", r"[<>]\(", r"&>", r"\|&", r"=\(", r"\bfunction\b", r"\bsource\b", r"pipefail", r"\$'", r"\becho -",
     r" == "],
)  # fmt: skip
def test_nothing_that_bash_3_2_or_posix_lacks(pattern):
    in_awk = [line for line in CODE.splitlines() if "awk" not in line]
    assert not [line for line in in_awk if re.search(pattern, line)]


@pytest.mark.parametrize(
    "pattern",
    [r"\bnproc\b", r"readlink", r"realpath", r"sed -[ir]", r"grep -[PoR]", r"\bseq\b", r"\bstat\b", r"sha256sum",
     r"timeout ", r"mktemp", r"df -\w*h", r"xargs -r", r"sort -V", r"date -", r"\bfree -", r"cp -\w*[aT]",
     r"\s--(quiet|silent)\b"],
)  # fmt: skip
def test_no_tool_or_flag_that_only_linux_has(pattern):
    assert not [line for line in CODE.splitlines() if re.search(pattern, line)]


def test_range_and_lock_agree_with_run_sh():
    ranges, lock = (ROOT / "requirements.txt").read_text(), (ROOT / "requirements.lock").read_text()
    assert "torch>=2.11,<2.15" in ranges and "2.1[1-4].*" in RUN_SH
    assert "torch==2.13.0\n" in lock and "numpy==2.4.6\n" in lock
    names = re.findall(r"^([\w-]+)[>=<]", ranges, re.MULTILINE)
    assert names[:4] == ["torch", "numpy", "tiktoken", "huggingface_hub"]
    for name in names:
        assert re.search(rf"^{name}==[\d.]+$", lock, re.MULTILINE), name
    assert not re.search(r"^(nvidia|triton|cuda)", lock, re.MULTILINE)
    assert re.search(r"^# Tests and records", ranges, re.MULTILINE), "run.sh cuts requirements.txt at this line"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_clone_of_windows_keeps_line_ends(tmp_path):
    """core.autocrlf=true, as git for Windows asks for by default: it would change hashes, and sh reads no CR."""
    files = ["run.sh", ".ci/run", "requirements.lock", "train_gpt.py", "records/records.py"]
    files += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("records/2*/*.*"))]
    for name in (".gitattributes", *files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in ("init -q", "add .", "checkout-index --all --prefix=clone/"):
        subprocess.run(["git", "-c", "core.autocrlf=true", *command.split()], cwd=tmp_path, check=True, timeout=60)
    for name in files:
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes(), name


# --- data, preset and processes


@pytest.mark.parametrize("shell", SHELLS)
def test_without_gpu_the_cpu_preset_learns_the_embedded_text(machine, shell):
    machine.shell = shutil.which(shell)
    calls = machine.as_is("--steps=3", "--prompt=two words")
    assert calls == [
        "data/tokenize_text.py --encoding bytes --out data/embedded",
        "train_gpt.py --preset=cpu --data_dir=data/embedded --steps=3 --prompt=two words",
    ]
    assert machine.as_is("--steps=3")[0].startswith("train_gpt.py")  # the text is made once
    assert "preset: cpu, data: data/embedded" in machine.out


@pytest.mark.parametrize(
    "gib, preset",
    [(139, "80gb"), (79, "80gb"), (75, "80gb"), (74, "40gb"), (47, "40gb"), (39, "40gb"), (38, "40gb"), (37, "24gb"),
     (23, "24gb"), (22, "24gb"), (16, "24gb")],
)  # fmt: skip
def test_the_smallest_gpu_picks_the_preset(machine, gib, preset):
    calls = machine.gpu(1, gib * 1024).fineweb().as_is()
    assert calls == [f"train_gpt.py --preset={preset} --data_dir=data/fineweb10B"]
    assert ("less than any preset was measured on" in machine.out) == (gib < 22)
    assert f"1 GPUs of at least {gib} GiB" in machine.out and f"preset: {preset}" in machine.out


@pytest.mark.parametrize("gpus, processes", [(2, 2), (3, 2), (4, 4), (5, 4), (7, 4), (8, 8), (9, 8), (16, 8)])
def test_one_process_per_gpu_as_far_as_eight_sequences_divide(machine, gpus, processes):
    calls = machine.gpu(gpus, 81000).fineweb().as_is("--lr=0.1")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes} train_gpt.py"
    assert calls == [f"{launch} --preset=80gb --data_dir=data/fineweb10B --lr=0.1"]
    assert (f"using {processes} of {gpus} GPUs" in machine.out) == (gpus != processes)
    assert int(machine.seen()["OMP_NUM_THREADS"]) >= 1


def test_what_the_user_names_wins(machine):
    machine.gpu(1, 81000)
    assert machine.as_is("--data_dir=/mine") == ["train_gpt.py --preset=80gb --data_dir=/mine"]
    assert machine.as_is("--preset=24gb", "--data_dir=/mine") == ["train_gpt.py --preset=24gb --data_dir=/mine"]
    assert machine.as_is("--preset=tiny")[-1] == "train_gpt.py --data_dir=data/embedded --preset=tiny"
    assert machine.fineweb().as_is("--preset=24gb") == ["train_gpt.py --data_dir=data/fineweb10B --preset=24gb"]


def test_fineweb_is_fetched_once(machine):
    calls = machine.gpu(1, 81000).as_is()
    assert calls == ["data/fineweb.py", "train_gpt.py --preset=80gb --data_dir=data/fineweb10B"]
    machine.fineweb()
    assert len(machine.as_is()) == 1


def test_without_fineweb_and_network_a_tiny_model_is_trained(machine):
    calls = machine.gpu(1, 81000).as_is(FINEWEB="2")
    assert calls[-1] == "train_gpt.py --preset=tiny --data_dir=data/embedded"
    assert "cannot be fetched" in machine.out
    machine.as_is("--preset=40gb", FINEWEB="2", code=2)
    assert machine.err == "run.sh: --preset=40gb needs FineWeb, or other data named by --data_dir=DIR.\n"
    assert machine.as_is(FINEWEB="130", code=130) == ["data/fineweb.py"]  # stopped by the user


def test_shards_without_a_manifest_serve_where_there_is_no_network(machine):
    folder = machine.gpu(1, 81000).root / "data/fineweb10B"
    folder.mkdir()
    (folder / "fineweb_val_000000.bin").touch()
    assert machine.as_is(FINEWEB="2")[-1].endswith("--preset=tiny --data_dir=data/embedded")
    (folder / "fineweb_train_000001.bin").touch()
    assert machine.as_is(FINEWEB="2")[-1].endswith("--preset=80gb --data_dir=data/fineweb10B")


def test_another_script(machine):
    machine.as_is("my.py", code=2)
    assert machine.err == "run.sh: there is no script my.py.\n"
    (machine.root / "my.py").write_text("pass\n")
    assert machine.as_is("my.py", "--lr=1")[-1] == "my.py --preset=cpu --data_dir=data/embedded --lr=1"


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 75])
def test_exit_codes_of_one_process_pass_through(machine, code):
    machine.as_is(CODE=str(code), code=code)


@pytest.mark.parametrize("text", ["", "\n", "# words\n", '"""words"""\n', "..."])
def test_a_script_without_a_statement_is_refused(machine, text):
    (machine.root / "my.py").write_text(text)
    assert machine.as_is("my.py", code=2) == []
    assert machine.err.startswith("train_gpt: my.py holds no statement") and machine.err.count("\n") == 1


def test_a_training_that_left_no_run_is_no_success(machine):
    """A script that no longer calls main(), or ends itself."""
    calls = machine.as_is(NO_RUN="1", code=1)
    assert calls[-1].startswith("train_gpt.py") and "nothing was trained" in machine.err
    assert machine.err.startswith("run.sh: ") and machine.err.count("\n") == 1
    for code in (2, 75):
        machine.as_is(NO_RUN="1", CODE=str(code), code=code)
        assert machine.err == "", "it says itself why"
    machine.as_is("--resume=latest", NO_RUN="1")  # the run is complete
    machine.as_is(TRIAL_SCRIPT="my.py", NO_RUN="1")  # its seeds have been run


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("more", ["| true", ">/dev/full", ">&-"])
def test_nobody_has_to_listen(machine, shell, more):
    if "full" in more and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = [shutil.which("sh"), "-c", f'{{ "$@"; echo $? >code; }} {more}', "sh", shutil.which(shell),
               str(machine.root / "run.sh")]
    environment = {**machine.torch("2.13.0").environment, "PYTHON": "python3"}
    done = subprocess.run(command, cwd=machine.kept, env=environment, text=True, capture_output=True, timeout=60)
    assert (machine.kept / "code").read_text() == "0\n" and done.stderr == ""
    assert "train_gpt.py --preset=cpu" in (machine.kept / "calls").read_text(), "it ran"


def test_a_gpu_that_torch_cannot_use_is_said(machine):
    machine.gpu(1, 81000).as_is(GPUS="0 0")
    assert "torch 2.13.0 cannot use this machine's GPU" in machine.out and "preset: cpu" in machine.out


@pytest.mark.parametrize("name", ["checkout", "a checkout", "it's", "back\\slash"])
def test_caches_lie_in_the_checkout_where_compilers_can_read_its_path(machine, name):
    machine.root = machine.root.rename(machine.root.with_name(name))
    machine.as_is()
    places = {key: value for key, value in machine.seen().items() if key.endswith("_CACHE_DIR")}
    inside = dict(TORCHINDUCTOR_CACHE_DIR=f"{machine.root}/.cache/inductor",
                  TRITON_CACHE_DIR=f"{machine.root}/.cache/triton")  # fmt: skip
    plain = PLAIN.fullmatch(str(machine.root))
    assert places == (inside if plain else {}) and (name == "checkout" or not plain)


def test_environment_of_training_unless_the_user_sets_it(machine):
    machine.as_is()
    seen = machine.seen()
    assert seen["TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"] == "1"
    assert not [name for name in seen if "ALLOC_CONF" in name or "NCCL" in name]
    machine.gpu(2, 81000).fineweb().as_is(TRITON_CACHE_DIR="/mine", OMP_NUM_THREADS="3")
    seen = machine.seen()
    assert (seen["TRITON_CACHE_DIR"], seen["OMP_NUM_THREADS"]) == ("/mine", "3")
    assert seen["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    machine.as_is(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")
    assert "PYTORCH_ALLOC_CONF" not in machine.seen()


# --- the interpreter and .venv


def test_installs_once_and_again_when_the_lock_changes(machine):
    calls = machine.run()
    assert calls[0] == "-m venv --clear .venv" and calls[1].startswith("-m pip install") and len(calls) == 4
    assert "torch==2.13.0" in (machine.kept / "constraints.txt").read_text()
    needs = (machine.kept / "needs.txt").read_text()
    assert "torch>=" in needs and "pytest" not in needs
    if sys.platform == "linux":
        assert "3 GB to download" in machine.out and "Sparing the download" in machine.out
    assert [call.split()[0] for call in machine.run()] == ["train_gpt.py"]
    with open(machine.root / "requirements.lock", "a") as lock:
        lock.write("more==1\n")
    calls = machine.run()
    assert calls[0].startswith("-m pip install") and "to download" not in machine.out
    assert "torch==2.13.0" in (machine.kept / "constraints.txt").read_text()  # its own torch follows the lock


def test_the_tests_get_their_needs_and_their_exit_code_passes(machine):
    machine.run()
    calls = machine.run("test", "-k", "a or b", code=7)
    assert calls[0].startswith("-m pip install") and calls[1] == "-m pytest -q -k a or b"
    assert "pytest" in (machine.kept / "needs.txt").read_text()
    assert machine.run("test", code=7) == ["-m pytest -q"]
    assert len(machine.run()) == 1


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cpu", "2.12.0a0+0123456.nv26"])
def test_the_interpreters_own_torch_is_reused(machine, version):
    calls = machine.torch(version).run()
    assert calls[0] == "-m venv --clear --system-site-packages .venv"
    constraints = (machine.kept / "constraints.txt").read_text()
    assert f"reusing torch {version}" in machine.out and "numpy==" in constraints and "torch==" not in constraints
    assert "to download" not in machine.out


def test_a_torch_of_an_activated_venv_is_reused(machine):
    machine.torch("2.13.0").run(HIDDEN="1")
    assert (machine.root / ".venv/site/reused_torch.pth").read_text() == "/elsewhere\n"


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0", "2.1.0", "3.0.0"])
def test_a_torch_out_of_range_is_not(machine, version):
    assert machine.torch(version).run()[0] == "-m venv --clear .venv"
    assert f"torch {version} of python3 does not suit" in machine.out


def test_a_cpu_only_torch_does_not_serve_a_gpu(machine):
    assert machine.gpu(1, 81000).torch("2.13.0+cpu").fineweb().run()[0] == "-m venv --clear .venv"


def test_a_gpu_needs_more_disk(machine):
    machine.gpu(1, 81000).disk(8).run(code=2)
    assert "9 GB of disk are needed for .venv, and only 8 GB are free" in machine.err


def test_a_torch_put_into_venv_after_a_stopped_start_is_reused(machine):
    machine.run(NO_PIP="1", code=2)
    (machine.root / ".venv/torch").write_text("2.14.0+cpu\n")
    assert machine.run()[0].startswith("-m pip install") and "reusing torch 2.14.0+cpu" in machine.out


def test_a_torch_installed_for_the_interpreter_after_a_stopped_start_is_reused(machine):
    machine.run(NO_PIP="1", code=2)
    assert machine.torch("2.13.0+cpu").run()[0] == "-m venv --system-site-packages .venv"


def test_python_is_taken_as_it_is(machine):
    assert [call.split()[0] for call in machine.as_is()] == ["data/tokenize_text.py", "train_gpt.py"]
    assert not (machine.root / ".venv").exists()
    assert machine.as_is("test", "tests/test_x.py", code=7) == ["-m pytest -q tests/test_x.py"]


def test_each_refusal_is_one_sentence_and_exit_code_2(machine):
    def refused(*arguments, **environment):
        assert not [call for call in machine.run(*arguments, code=2, **environment) if "train_gpt" in call]
        assert machine.err.startswith("run.sh: ") and machine.err.count("\n") == 1
        return machine.err

    assert "has no torch" in refused(PYTHON="python3")
    assert "not a Python of version 3.10 or newer" in refused(PYTHON="python3", TOO_OLD="1")
    assert "PYTHON=missing is not a Python" in refused(PYTHON="missing")
    assert "Python 3.10 to 3.14 is needed, python3 is 3.9." in refused(VERSION="3.9")
    assert "Python 3.10 to 3.14 is needed, python3 is 3.15." in refused(VERSION="3.15")
    assert "python3 lacks venv" in refused(NO_VENV="1")
    assert "pip could not install" in refused(NO_PIP="1")
    machine.disk(0.95)
    assert "2 GB of disk are needed for .venv, and only 0 GB are free" in refused()
    (machine.tools / "python3").unlink()
    shutil.rmtree(machine.root / ".venv")
    assert "there is no python3 on the PATH" in refused()


def test_python_3_10_gets_the_ranges(machine):
    machine.run(VERSION="3.10")
    assert (machine.kept / "constraints.txt").read_text() == "" and "starts at Python 3.11" in machine.out


def test_the_count_of_processes_can_be_given(machine):
    machine.gpu(4, 81000).fineweb()
    assert machine.as_is(NPROC="1")[-1].startswith("train_gpt.py ") and "processes: 1" in machine.out
    assert "--nproc_per_node=4 " in machine.as_is("--preset=cpu", "--data_dir=here", NPROC="4")[-1]
    machine.as_is("--preset=cpu", code=2, NPROC="5")
    assert machine.err == "run.sh: NPROC=5 is more than the 4 GPUs that torch sees.\n"
    for wrong in ("0", "two", "-1", "9" * 30):
        assert machine.run(code=2, NPROC=wrong) == [] and not (machine.root / ".venv").exists()
        assert f"NPROC={wrong} is no count" in machine.err


# --- what is refused before anything is installed, fetched or started

# Of one sequence, so that any preset of the script takes it.
TINY = ("--train_seq_len=128 --val_seq_len=128 --sequences_per_step=2 --val_tokens=600 --steps=5 --model_dim=64 "
        "--num_heads=1 --layer_pattern=LS --value_pattern=0. --late_layer=0 --mixed_layers=0 --bigram_rows=256 "
        "--bigram_dim=16 --window_max=128").split()  # fmt: skip


@pytest.fixture
def real(machine):
    """The machine with the very script, which answers in a real interpreter, and shards in data/mine."""
    shutil.copy(ROOT / "train_gpt.py", machine.root)
    make_corpus(machine.root / "data/mine")
    return machine


def refused(machine, *arguments, code=2, **environment):
    """The one sentence of a refusal that nothing was started for, whatever may have been found out."""
    assert machine.run(*arguments, code=code, **environment) == []
    assert machine.err.startswith("train_gpt: ") and machine.err.count("\n") == 1, machine.err
    return machine.err


@pytest.mark.parametrize("argument, words, code", [
    ("--stpes=5", "unknown argument '--stpes=5': the nearest legal ones are --steps=value", 2),
    ("steps=5", "unknown argument", 2), ("--steps", "unknown argument", 2), ("--preset", "unknown argument", 2),
    ("--preset=80bg", "unknown preset '80bg'", 2), ("--preset=", "unknown preset ''", 2),
    ("--preset=.*", "unknown preset", 2),
    ("--steps=0", "--steps=0 is too small", 2), ("--steps=many", "--steps takes", 2),
    ("--train_seq_len=1000", "multiple of 128", 2), ("--layer_pattern=LX", "--layer_pattern", 2),
    ("--data_dir=nowhere", "--data_dir=nowhere is not a folder with", 2), ("--data_dir=", "--data_dir= is not", 2),
    ("--data_dir=run.sh", "--data_dir=run.sh is not a folder", 2),
    ("--resume=nowhere.pt", "nowhere.pt is not usable", 5), ("--resume=latest", "finds no usable checkpoint", 5)])
def test_a_bad_knob_installs_fetches_and_starts_nothing(real, argument, words, code):
    argv = [argument] if "=" in argument and not argument.startswith("steps") else ["--seed=1", argument]
    assert words in refused(real, *argv, code=code)
    assert not (real.root / ".venv").exists() and real.out == ""
    assert words in refused(real.torch("2.13.0").gpu(8, 81000), *argv, code=code, PYTHON="python3")


def test_the_machine_and_what_was_given_decide_what_is_refused(real):
    """A value counts with the preset that comes to be, and with the ranks."""
    fits = "--layer_pattern=LSLL"
    assert real.as_is(fits)[-1].endswith(fits), "the preset for CPUs has four layers"
    assert real.gpu(1, 81000).as_is(fits, code=2) == [] and "--layer_pattern" in real.err, "the full run has not"
    assert real.as_is(fits, "--preset=cpu")[-1].endswith(f"{fits} --preset=cpu")
    assert "cannot be dealt to 3 ranks" in refused(real, NPROC="3")
    real.as_is("--data_dir=data/mine", "--sequences_per_step=4", code=2)  # beside the default's val_tokens
    assert "--val_tokens=10485760 is more than" in real.err and real.err.count("\n") == 1


def test_the_check_costs_no_import_of_torch(real):
    """Where torch cannot be imported all is said the same; and good knobs pass."""
    (real.root / "torch.py").write_text("raise RuntimeError('imported')\n")
    assert "unknown argument" in refused(real, "--stpes=5")
    assert real.as_is("--data_dir=data/mine", *TINY)[-1].startswith("train_gpt.py --preset=cpu --data_dir=data/mine")


def test_several_ranks_start_only_with_good_data_and_a_checkpoint(real):
    def refused_with(words, *argv, code=2):
        assert real.as_is("--data_dir=data/mine", *TINY, *argv, NPROC="2", code=code) == []
        assert words in real.err and real.err.count("\n") == 1, real.err

    assert "-m torch.distributed.run" in real.as_is("--data_dir=data/mine", *TINY, NPROC="2")[0]
    manifest = dict(encoding="bytes", files=[dict(name="train_000001.bin", sha256="0" * 64)])
    (real.root / "data/mine/manifest.json").write_text(json.dumps(manifest))
    refused_with("train_000001.bin has SHA-256")
    assert len(real.as_is("--data_dir=data/mine", *TINY)) == 1, "a single process says it itself"
    make_corpus(real.root / "data/mine", encoding="gpt2")
    (real.root / "cut.pt").write_bytes(b"PK")
    refused_with("cut.pt is not usable", "--resume=cut.pt", code=5)
    write_shard(real.root / "data/mine/val_000001.bin", [60000] * 10)
    refused_with("holds token 60000")


@pytest.mark.parametrize("odd, more", [
    ("raise ValueError('embedded null byte')", ""), ("raise ValueError('embedded null byte')", "x = torch.ones(1)\n"),
    ("raise TypeError('unsupported')", ""), ("raise KeyError('name')", ""),
    ("raise OSError(5, 'Input/output error')", "")])
def test_data_on_which_the_checks_fail_start_nothing(real, odd, more):
    """What nobody foresaw of a manifest is one sentence still, not a page of every rank."""
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    source = source.replace("\ndef load_corpus(", f"\ndef load_corpus(hp, thorough):\n    {odd}\n\n\ndef usual(")
    (real.root / "odd.py").write_text(source.replace("\nif __name__", f"\n{more}if __name__"))
    sentence = refused(real.torch("2.13.0"), "odd.py", "--data_dir=data/mine", *TINY, PYTHON="python3", NPROC="2")
    assert "--data_dir=data/mine holds a manifest.json" in sentence and "Error: " in sentence


def test_a_fault_of_the_script_is_not_the_datas(real):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    odd = source.replace("\ndef load_corpus(", "\ndef load_corpus(hp, thorough):\n    no_such_name\n\n\ndef usual(")
    (real.root / "odd.py").write_text(odd)
    assert real.as_is("odd.py", "--data_dir=data/mine", *TINY)[-1].startswith("odd.py "), "it tells that itself"


def test_help_is_shown_on_any_terminal(real):
    (real.root / "mine.py").write_text((ROOT / "train_gpt.py").read_text(encoding="utf-8").replace(
        'steps: int', 'steps: int', 1).replace("def help_text(", "def help_text():\n    return 'é'\n\n\ndef usual("))
    assert real.as_is("mine.py", "--help", PYTHONIOENCODING="ascii") == [] and "\\xe9" in real.out


def test_several_ranks_are_checked_on_data_that_were_just_fetched(real):
    """The stand-in fetches nothing."""
    assert real.gpu(2, 81000).as_is(code=2) == ["data/fineweb.py"]
    assert real.err.startswith("train_gpt: --data_dir=data/fineweb10B is not a folder with")


def test_each_script_says_what_it_refuses(real):
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    real.gpu(1, 81000).fineweb()
    odd = dict(mine="PRESETS['words'] = dict(steps=7)\nprint('loaded')\n", odd="x = torch.ones(1)\n")
    for name, more in odd.items():
        (real.root / f"{name}.py").write_text(source.replace("\nif __name__", f"\n{more}if __name__"))
    assert real.as_is("mine.py", "--preset=words")[-1].startswith("mine.py ") and "loaded" not in real.out
    assert "unknown preset 'words'" in refused(real, "train_gpt.py", "--preset=words")
    assert "unknown argument" in refused(real, "odd.py", "--stpes=5"), "it is imported whole before that counts"
    (real.root / "other.py").write_text("open('started', 'w')\n")
    assert real.as_is("other.py", "--stpes=5")[-1].startswith("other.py ")
    assert not (real.root / "started").exists(), "what is no copy of the script runs once, by itself"
    (real.root / "broken.py").write_text(f"{source}\nx = = 1\n")
    assert "broken.py is no Python that can run" in refused(real, "broken.py", code=1)
    (real.root / "records").mkdir()
    (real.root / "records/seeds.py").write_text("pass\n")
    assert "unknown argument" in refused(real, "records/seeds.py", "--stpes=5", TRIAL_SCRIPT="mine.py")
    assert real.as_is("records/seeds.py", "--preset=words", TRIAL_SCRIPT="mine.py")[-1].startswith("records/seeds.py ")


# --- where the user stands


@pytest.mark.parametrize("shell", SHELLS)
def test_it_works_through_symbolic_links_and_from_any_folder(real, shell):
    real.shell = shutil.which(shell)
    (real.kept / "bin -> x").mkdir()
    (real.kept / "bin -> x/sprint").symlink_to(os.path.relpath(real.root / "run.sh", real.kept / "bin -> x"))
    (real.kept / "link").symlink_to(real.kept / "bin -> x/sprint")
    calls = real.torch("2.13.0").run("--steps=3", script=real.kept / "link", PYTHON="python3")
    assert calls[-1].startswith("train_gpt.py --preset=cpu") and (real.root / "data/embedded").exists()
    assert real.run("--steps=3", script="link", PYTHON="python3", CDPATH="/")[-1].startswith("train_gpt.py")
    assert "unknown argument" in refused(real, "--stpes=5", script="bin -> x/sprint")


def test_paths_start_where_the_user_stands_then_at_its_folder(real):
    make_corpus(real.kept / "here data")
    shutil.copy(ROOT / "train_gpt.py", real.kept / "mine.py")
    for name in ("a.pt", "latest"):
        (real.kept / name).touch()
    calls = real.as_is("mine.py", "--data_dir=here data", "--resume=a.pt", *TINY)
    there = str(real.kept)
    knobs = f"--preset=cpu --data_dir={there}/here data --resume={there}/a.pt {' '.join(TINY)}"
    assert calls == [f"{there}/mine.py {knobs}"]
    assert "--data_dir=data/mine" in real.as_is("--data_dir=data/mine", *TINY)[-1]
    (real.root / "logs/x").mkdir(parents=True)
    assert real.as_is("--resume=latest")[-1].endswith(" --resume=latest")
    (real.kept / "b.pt").touch()
    assert real.as_is(f"--resume={there}/b.pt")[-1].endswith(f" --resume={there}/b.pt")
    assert "--data_dir=none is not" in refused(real, "mine.py", "--data_dir=none")
    real.as_is("none.py", code=2)
    assert real.err == "run.sh: there is no script none.py.\n"
    (real.kept / "bin").mkdir()
    (real.kept / "bin/python").symlink_to(real.tools / "python3")
    (real.kept / "torch").write_text("2.13.0\n")
    assert real.run("--steps=3", PYTHON="bin/python")[-1].startswith("train_gpt.py")
    assert real.as_is("test", SCRIPT="mine.py", code=7) and f"tested: {there}/mine.py" in real.out


@pytest.mark.parametrize("typed, handed", [
    ("trial mine.py my.py --runs 3 --a.data_dir=folder", "trial @/mine.py my.py --runs 3 --a.data_dir=@/folder"),
    ("compare folder 2026-11-26_TinyCpu", "compare @/folder 2026-11-26_TinyCpu"),
    ("plot folder --out curve.png", "plot @/folder --out @/curve.png"),
    ("plot folder --out=/x/curve.png", "plot @/folder --out=/x/curve.png"),
    ("plot folder --out=curve.png", "plot @/folder --out=@/curve.png"),
    ("rerun TinyCpu --data folder --yes", "rerun TinyCpu --data @/folder --yes"),
    ("import folder none", "import @/folder none"),
    ("add folder --name folder --summary folder", "add @/folder --name folder --summary folder"),
    ("sample --weights=folder --prompt folder", "--weights=@/folder --prompt folder"),
    ("sample --weights latest --prompt=folder", "--weights latest --prompt=folder"),
    ("test -k folder folder::test_x", "-k folder @/folder::test_x"),
    ("list list", "list list")])
def test_so_do_the_paths_of_commands(machine, typed, handed):
    for name in ("folder", "mine.py", "latest", "test", "plot"):
        (machine.kept / name).mkdir()
    word = typed.split()[0]
    calls = machine.as_is(*typed.split(), code=7 if word == "test" else 0)
    program = dict(test="-m pytest -q", sample="data/sample.py").get(word, "records/records.py")
    assert calls == [f"{program} {handed.replace('@', str(machine.kept))}"]


# --- the commands of other programs

COMMANDS = {name: f"records/records.py {name}" for name in "trial compare plot rerun verify list add import".split()}
COMMANDS["sample"] = "data/sample.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_handed_to_its_program_as_it_stands(machine, name):
    calls = machine.as_is(name, "my.py", "two words", "--knob=value", stdin="an answer\n")
    assert calls == [f"{COMMANDS[name]} my.py two words --knob=value"]
    assert (machine.out, machine.err) == ("heard an answer\n", "complaint\n")
    for code in (1, 2, 3, 5, 143):
        machine.as_is(name, TOOL=str(code), code=code)


def test_the_commands_are_those_of_the_program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "records"))
    import records

    own = next(action.choices for action in records.parser()._actions if action.choices)
    assert set(own) == set(COMMANDS) - {"sample"}
    usage = RUN_SH.partition("\n\n")[0]
    assert all(re.search(rf"\b{name}\b", usage) for name in COMMANDS), "the comment at the top names each"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_installs_what_it_needs_and_says_so_aside(machine, name):
    calls = machine.run(name, "one")
    assert calls[0] == "-m venv --clear .venv" and calls[1].startswith("-m pip install"), calls
    assert calls[2:] == [f"{COMMANDS[name]} one"]
    assert ("scipy" in (machine.kept / "needs.txt").read_text()) == (name not in ("list", "sample"))
    assert machine.out == "heard \n", "what it prints may be kept in a file"
    assert machine.run(name) == [COMMANDS[name]]
    assert machine.run("list") == ["records/records.py list"], "it needs no more than any other"


@pytest.mark.parametrize("name", ["trial", "sample"])
def test_a_command_does_not_start_without_its_needs(machine, name):
    assert machine.run(name, NO_PIP="1", code=2)[-1].startswith("-m pip install")
    assert machine.run(name, PYTHON="python3", code=2) == [] and "has no torch" in machine.err


@pytest.mark.parametrize("word, nearest", [
    ("tria", "trial"), ("trail", "trial"), ("tests", "test"), ("verfiy", "verify"), ("ls", "list"), ("run", "rerun"),
    ("samples", "sample"), ("Compare", "compare"), ("hepl", "help"), ("my", "my.py"), ("my_idea", "my_ideas.py"),
    ("yuor_ideas", "your_ideas.py"),
    ("train", "trial"), ("train_gpt", "train_gpt.py"), ("steps=3", "--steps=3"), ("-steps=3", "--steps=3")])
def test_a_word_that_is_nothing_gets_the_nearest_and_installs_nothing(machine, word, nearest):
    for name in ("my.py", "my_ideas.py"):
        (machine.root / name).touch()
    (machine.kept / "your_ideas.py").touch()
    assert machine.run(word, "my.py", code=2) == [] and not (machine.root / ".venv").exists()
    assert machine.err.startswith(f"run.sh: '{word}' is no command, script.py or --knob=value: ") and machine.out == ""
    assert f" {nearest}" in machine.err.partition(": ")[2] and machine.err.count("\n") == 1


@pytest.mark.parametrize("word", ["", " ", "-x", "a'b", "*", "a" * 5000])
def test_odd_words_are_refused_too(machine, word):
    assert machine.run(word, code=2) == [] and machine.err.count("\n") == 1


def test_help_names_all_words_and_installs_nothing(real):
    assert real.run("help") == real.run("help", "trial") == []
    words = real.out
    named = set(re.findall(r"[\w.]+", words))
    assert {*COMMANDS, "test", "help", "my.py", "NPROC", "PYTHON", "SCRIPT", "CUDA_VISIBLE_DEVICES"} <= named
    assert "#" not in words and words.startswith("Train on") and words.endswith("downloads.\n")
    for ask in ("--help", "-h"):
        assert real.run(ask) == real.run("--steps=3", ask) == []
        assert real.out.startswith(words) and "\n  --steps=" in real.out and "\n  --preset=cpu" in real.out
    assert not (real.root / ".venv").exists()
    (real.root / "other.py").write_text("pass\n")
    assert real.as_is("other.py", "--help") == ["other.py --help"] and real.out.startswith(words), "its own answer"


# --- what SECURITY.md says


def test_files_are_loaded_as_security_md_says():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:data/|requirements|train_gpt)[\w.]*\.\w+)`", page))
    ours = [ROOT / "train_gpt.py", *(ROOT / "data").glob("*.py"), *(ROOT / "records").glob("*.py")]
    loads = [line for path in ours for line in path.read_text(encoding="utf-8").splitlines() if "torch.load(" in line]
    assert len(loads) == 2 and all("weights_only=True" in line for line in loads)


# --- the tests of a copy

def test_a_copy_to_test_is_checked_before_the_installation(machine):
    (machine.root / "my.py").write_text("class Hyperparameters: pass\n")
    assert machine.run("test", SCRIPT="none.py", code=2) == []
    assert machine.err.startswith("run.sh: there is no script SCRIPT=none.py") and machine.err.count("\n") == 1
    assert machine.run("test", SCRIPT="my.py", code=2) == []
    assert machine.err == "run.sh: SCRIPT=my.py is no copy of train_gpt.py.\n"
    assert not (machine.root / ".venv").exists()
    shutil.copy(ROOT / "train_gpt.py", machine.root / "my.py")
    assert machine.as_is("test", "-x", SCRIPT="my.py", code=7) == ["-m pytest -q -x"]
    assert "testing my.py" in machine.out and machine.out.endswith("tested: my.py\n")
    assert machine.as_is(SCRIPT="none.py")[-1].startswith("train_gpt.py"), "it is about the tests alone"


# --- signals and the exit code


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_to_run_sh_alone_is_handed_on(machine, shell, name):
    machine.shell = shutil.which(shell)
    process = machine.start()
    assert "heard before: True" in machine.out, "a Ctrl-C must end a training that has not begun"
    process.send_signal(getattr(signal, name))
    assert f"got {name}\n" in process.communicate(timeout=60)[0]
    assert process.returncode == 75


@pytest.mark.parametrize("shell", SHELLS)
def test_so_is_a_second_one(machine, shell):
    machine.shell = shutil.which(shell)
    process = machine.start(SIGNALS="3", CODE="4")
    for name in ("SIGTERM", "SIGINT"):
        process.send_signal(getattr(signal, name))
        said(process.stdout, f"got {name}")
        assert process.poll() is None, "run.sh left its training alone"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 4
    process.communicate()


@pytest.mark.parametrize("shell", SHELLS)
def test_ctrl_c_in_a_terminal_reaches_the_training_once(machine, shell):
    pty = pytest.importorskip("pty")
    environment = {**machine.torch("2.13.0").environment, "PYTHON": "python3", "SIGNALS": "2", "CODE": "75"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(shutil.which(shell), [shell, str(machine.root / "run.sh")], environment)
    with open(terminal, "r+b", buffering=0) as stream:
        lines = io.TextIOWrapper(stream, errors="replace")
        said(lines, "ready")
        stream.write(b"\x03")
        said(lines, "got SIGINT")
        os.kill(pid, signal.SIGTERM)
        assert said(lines, "got SIG").endswith("got SIGTERM\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_training_that_a_signal_killed_is_told_by_it(machine, number):
    listener = f"import os; os.kill(os.getpid(), {int(number)})"
    machine.as_is(SIGNALS="1", LISTENER=listener, code=-number)


def test_the_training_keeps_its_standard_input(machine):
    listener = "import sys; print('ready', flush=True); print('read', sys.stdin.readline())"
    process = machine.start(LISTENER=listener)
    assert "read a line" in process.communicate("a line\n", timeout=60)[0]


# --- the sample


@pytest.mark.parametrize("shell", SHELLS)
def test_new_weights_are_sampled(machine, shell):
    machine.shell = shutil.which(shell)
    machine.weights("99990101-000000-abcdef")  # by a machine whose clock was wrong
    calls = machine.as_is("--steps=3", WEIGHTS="20260101-000000-abcdef")
    assert calls[-2].startswith("train_gpt.py") and calls[-2].endswith("--steps=3")
    assert calls[-1] == "data/sample.py --weights=logs/20260101-000000-abcdef/weights.pt"
    assert machine.out.endswith("sample: some words\n") and machine.err == ""


def test_one_process_samples_what_several_trained(machine):
    calls = machine.gpu(2, 81000).fineweb().as_is(WEIGHTS="20260101-000000-abcdef")
    assert [call.split()[:2] for call in calls] == [
        ["-m", "torch.distributed.run"], ["data/sample.py", "--weights=logs/20260101-000000-abcdef/weights.pt"]
    ]  # fmt: skip


def test_without_new_weights_there_is_no_sample(machine):
    assert machine.as_is()[-1].startswith("train_gpt.py")
    assert machine.as_is(WEIGHTS="20260101-000000-abcdef", CODE="3", code=3)[-1].startswith("train_gpt.py")
    assert machine.as_is()[-1].startswith("train_gpt.py"), "those of an earlier run"


def test_a_failed_sample_is_no_failed_run(machine):
    for number, code in enumerate((1, 2, 5, 75)):
        calls = machine.as_is(WEIGHTS=f"20260101-00000{number}-abcdef", SAMPLE=str(code))
        assert calls[-1].startswith("data/sample.py")


def test_a_run_that_ends_while_it_is_stopped_is_not_sampled(machine):
    process = machine.start(WEIGHTS="20260101-000000-abcdef", CODE="0")
    process.send_signal(signal.SIGTERM)
    assert "sample:" not in process.communicate(timeout=60)[0] and process.returncode == 0


def test_nvidia_smi_spares_the_start_of_torch_unless_that_is_for_cpus(machine):
    machine.put("nvidia-smi", "#!/bin/sh\ncase $* in *query*) echo 81559; echo 40960 ;; *) echo 'GPU 0: two' ;; esac\n")
    calls = machine.fineweb().as_is()
    assert "2 GPUs of at least 40 GiB, processes: 2, preset: 40gb" in machine.out
    assert not [call for call in calls if "import torch" in call]
    for preset in ("tiny", "eighth", "long", "quick"):
        machine.as_is(f"--preset={preset}", "--data_dir=here")
        assert f"processes: 1, preset: {preset}" in machine.out
    machine.torch("2.13.0+cpu").as_is()
    assert "cannot use this machine's GPU" in machine.out and "preset: cpu" in machine.out
