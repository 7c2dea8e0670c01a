"""SCRIPT=my.py: the tests of the script run on a copy of it, whichever process imports it."""

import os
import subprocess
import sys

import pytest
from conftest import OF_THE_SCRIPT, ROOT

TESTS = ROOT / "tests"
# Stands for a copy of the script, and needs no torch.
COPY = """
import os
NAME = "a copy"
if __name__ == "__main__":
    print(NAME, os.path.basename(__file__))
"""
# Stands for a test of the script, by whose name it is collected.
PROBE = """
import multiprocessing, os, subprocess, sys
import tiny, train_gpt

def in_a_rank():
    import tiny, train_gpt
    assert train_gpt.NAME == "a copy" and str(tiny.SCRIPT) == train_gpt.__file__

def test_this_process():
    in_a_rank()

def test_a_spawned_rank():
    rank = multiprocessing.get_context("spawn").Process(target=in_a_rank)
    rank.start()
    rank.join(60)
    assert rank.exitcode == 0

def test_a_process_of_its_own(tmp_path):
    for command in tiny.command(tmp_path), [sys.executable, "-c", "import train_gpt; print(train_gpt.NAME)"]:
        done = subprocess.run(command, cwd=tmp_path, env=tiny.environment(), capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("a copy"), done.stderr
"""


def pytest_on(script, *arguments, code, **environment):
    """What the tests say about a script, in a process of their own; asserts the exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    environment = os.environ | environment | dict(SCRIPT=str(script))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy with one change that a test sees: a preset of its own, with a value that is refused."""
    path = tmp_path / "my.py"
    path.write_bytes((ROOT / "train_gpt.py").read_bytes() + b"\nPRESETS['mine'] = dict(steps=0)\n")
    return path


def test_every_process_gets_the_copy(tmp_path):
    (tmp_path / "my.py").write_text(COPY)
    (tmp_path / "test_ranks.py").write_text(PROBE)
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    said = pytest_on(tmp_path / "my.py", "-p", "conftest", tmp_path / "test_ranks.py", code=0, PYTHONPATH=path)
    assert "3 passed" in said


def test_a_changed_copy_fails_where_a_test_is_about_the_change(copy):
    said = pytest_on(copy, "tests/test_cli.py", "-k", "presets_pass or types", code=1)
    assert "FAILED tests/test_cli.py::test_presets_pass[mine]" in said and "1 failed, 9 passed" in said


def test_only_the_tests_of_the_script_are_collected(copy):
    said = pytest_on(copy, "--collect-only", "tests", code=0)
    assert {line.split("::")[0] for line in said.splitlines() if "::" in line} == {f"tests/{n}" for n in OF_THE_SCRIPT}
    assert "test_presets_pass[mine]" in said


def test_they_are_the_files_that_import_it():
    texts = {path.name: path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py")}
    importing = {name for name, text in texts.items() if "\nimport train_gpt" in text}
    assert importing - {"test_readme.py"} == OF_THE_SCRIPT


def test_refusals_are_one_sentence(tmp_path, copy):
    assert "none.py cannot be tested: " in pytest_on(tmp_path / "none.py", code=2)
    (tmp_path / "bad.py").write_text("def (")
    assert "bad.py cannot be tested: " in pytest_on(tmp_path / "bad.py", code=2)
    said = pytest_on(copy, "tests/test_cli.py", "tests/test_readme.py::test_the_first_page_is_short", code=2)
    assert "tests/test_readme.py is not about the script" in said and said.count("\n") == 1
