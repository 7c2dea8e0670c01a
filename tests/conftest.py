"""Before any test imports torch: the root on sys.path, an environment that suits small machines, and with SCRIPT=my.py
that copy of the script in its place."""

import hashlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = re.compile(r"[A-Za-z0-9_./@%+=:,~-]*")  # a path that no compiler's command has to quote, as in run.sh
OF_THE_SCRIPT = {f"test_{name}.py" for name in "cli fp8 gpu graphs loader masks model muon ranks run".split()}
sys.path.insert(0, str(ROOT))

# A shell's job in the background ignores Ctrl-C, and would hand that on to the processes that tests stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run up to four ranks at once, and threads that wait for a busy core spin: steps took up to 80 times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One small graph at a time: a pool of compile workers takes longer to start than the compilation itself.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if PLAIN.fullmatch(str(ROOT)):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))


def put_in_place(name):
    """Lets `import train_gpt` find a copy of the script, also in processes that do not load this file.

    It lies in a folder named by its bytes: what is edited meanwhile does not reach a rank that starts later."""
    try:
        source = (ROOT / name).read_bytes()
        compile(source, name, "exec")
    except (OSError, SyntaxError, ValueError) as error:
        pytest.exit(f"SCRIPT={name} cannot be tested: {error}", returncode=2)
    folder = ROOT / ".cache" / "tested" / hashlib.sha256(source).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"part{os.getpid()}"
    part.write_bytes(source)
    part.replace(folder / "train_gpt.py")  # at once: other tests of the same bytes may be running
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped without one")
    if os.environ.get("SCRIPT"):
        for path in (Path(argument.partition("::")[0]) for argument in config.args):  # these would not be ignored
            if is_elsewhere(path):
                pytest.exit(f"{path} is not about the script: leave out the file, or SCRIPT.", returncode=2)
        put_in_place(os.environ["SCRIPT"])


def is_elsewhere(path):
    """Whether a file tests something else than the script."""
    return path.suffix == ".py" and path.name not in OF_THE_SCRIPT


def pytest_ignore_collect(collection_path):
    return True if os.environ.get("SCRIPT") and is_elsewhere(collection_path) else None  # None: pytest decides


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return  # torch need not be imported
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def toy(tmp_path_factory):
    """The checkout of forge.py, only to be read."""
    import forge

    return forge.made(tmp_path_factory)


@pytest.fixture
def box(toy, tmp_path, request):
    """A copy of it, without what the module's LEFT_OUT names."""
    return toy.copy(tmp_path, *getattr(request.module, "LEFT_OUT", ()))
