"""Before any test imports torch: the root on sys.path and an environment that suits small machines."""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = re.compile(r"[A-Za-z0-9_./@%+=:,~-]*")  # a path that no compiler's command has to quote, as in run.sh
sys.path.insert(0, str(ROOT))

# Tests run up to four ranks at once, and threads that wait for a busy core spin: steps took up to 80 times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One small graph at a time: a pool of compile workers takes longer to start than the compilation itself.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if PLAIN.fullmatch(str(ROOT)):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped without one")


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return  # torch need not be imported
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
