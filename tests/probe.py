"""Whether torch can compile on this machine, asked of torch's own functions: a failure of ours stays a failure."""

import functools
import os
import subprocess
import sys
import tempfile

import pytest

PROGRAM = """
import torch
from torch.nn.attention.flex_attention import flex_attention
try:
    torch.compile({function}, fullgraph=True, dynamic=False)({inputs})
except Exception as error:  # of a type that depends on torch's version
    raise SystemExit(" ".join(str(error).split())[:200])
"""


def refusal(function: str, inputs: str) -> str:
    """Why torch does not compile its `function` here (no C++ compiler; for FlexAttention, a CPU without AVX2), or "".

    Asked in another process with an empty cache: what this one has put in a wrong place is no excuse."""
    command = [sys.executable, "-c", PROGRAM.format(function=function, inputs=inputs)]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    why = done.stderr.strip().rpartition("\n")[2]
    return f"torch cannot compile {function} here: {why}" if done.returncode else ""


def compiles(function: str, inputs: str):
    """Decorates a test of compiled code: one that fails is skipped where torch cannot compile `function` either."""

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **keywords):
            try:
                test(*args, **keywords)
            except Exception:
                if why := refusal(function, inputs):
                    pytest.skip(why)
                raise

        return run

    return decorate
