"""Asks a script what it would refuse, without starting it: ./run.sh does so before it installs or fetches anything.

    python data/check.py train_gpt.py RANKS [--all] --knob=value ...

The checks are the script's own: of the knobs, of a given --data_dir, and whether there is anything to --resume. With
--all every token is read and the checkpoint is loaded too. It prints the sentence that the script would, and ends with
its exit code; 0 also where a script has no such checks, being no copy of train_gpt.py. Data on which the script's own
checks fail, without a sentence, are refused with 2, and so is a script that holds nothing to run.

    python data/check.py train_gpt.py --help

prints the script's knobs; exit code 1 where it cannot be asked.
"""
import __future__

import ast
import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

# Statements that may fail for want of a package: who needs what they define fails too, and then nothing is refused.
DEFINITIONS = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


# What a manifest or shard that nobody foresaw makes a script raise; any other fault is the script's own to tell.
BAD_DATA = ValueError, TypeError, LookupError, ArithmeticError, OSError, RecursionError


class Odd(Exception):
    """Data on which the script's own check fails."""
    code = 2


def given(knobs, name):
    return any(knob.startswith(f"--{name}=") for knob in knobs)


def load(path, tree, absent):
    """(the script as a module, whether more failed than definitions). Its statements run one by one without the
    packages `absent`: they take long to import, or are not installed yet, and its checks may need none of them."""
    script, doubt = ModuleType("script"), False
    script.__file__, sys.modules["script"] = path, script
    sys.path[0] = os.path.dirname(path)
    sys.modules.update(dict.fromkeys(absent))  # None: their import fails at once
    for statement in tree.body:
        code = compile(ast.Module([statement], []), path, "exec", __future__.annotations.compiler_flag)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                exec(code, vars(script))
        except (Exception, SystemExit):
            doubt = doubt or not isinstance(statement, DEFINITIONS)
    for name in absent:
        del sys.modules[name]
    return script, doubt


def read_data(script, hp, thorough):
    try:
        return script.load_corpus(hp, thorough=thorough)
    except BAD_DATA as error:
        if isinstance(error, getattr(script, "Refused", ())):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise Odd(f"--data_dir={hp.data_dir} holds a manifest.json, val_docs.json or shard on which load_corpus of the "
                  f"script fails ({reason}): make the data again, or mend the script") from None


def refusal(script, source, knobs, ranks, thorough):
    """What the script refuses, an exception with a code; None where that is nothing or cannot be told."""
    try:
        hp = script.parse_overrides(knobs)
        script.check(hp, ranks)
        if thorough or given(knobs, "data_dir"):
            corpus = read_data(script, hp, thorough)
        if hp.resume == "latest" and not any(Path("logs").glob("*")):
            raise script.Refused(*script.find_latest({}, []))
        if hp.resume not in ("", "latest") and not os.path.isfile(hp.resume):
            script.load_file(Path(hp.resume))  # which says so
        if hp.resume and thorough:
            script.dist = SimpleNamespace(broadcast_object_list=lambda *_: None)  # there are no other ranks yet
            facts = dict(script_sha256=hashlib.sha256(source).hexdigest(), knobs=script.public_knobs(hp),
                         data=corpus.facts)
            script.Run.find_saved(SimpleNamespace(hp=hp, rank=0, world_size=ranks, facts=facts, notes=[]))
    except Exception as error:
        return error if isinstance(error, (Odd, getattr(script, "Refused", Odd))) and error.code else None


def judge(script, source, knobs, *rest):
    """The refusal; without a --preset, which is then not known yet, only where the knobs are refused with every one."""
    presets = [[f"--preset={name}"] for name in getattr(script, "PRESETS", ()) if not given(knobs, "preset")]
    refusals = []
    for preset in presets or [[]]:
        refusals.append(refusal(script, source, [*preset, *knobs], *rest))
        if not refusals[-1]:
            return None
    return refusals[0 if shutil.which("nvidia-smi") else -1]  # the first preset is a large GPU's, the last a CPU's


def say_error(sentence):
    with contextlib.suppress(OSError):  # nobody listens; the exit code tells the same
        print(f"train_gpt: {sentence}", file=sys.stderr, flush=True)


def main(path, *argv):
    try:
        source = Path(path).read_bytes()
        tree = ast.parse(source)
    except OSError as error:
        say_error(f"{path} cannot be read: {error.strerror}")
        return 2
    except (SyntaxError, ValueError) as error:
        say_error(f"{path} is no Python that can run: {error}")
        return 1
    if "--help" not in argv and all(isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                                    for statement in tree.body):
        say_error(f"{path} holds no statement: nothing would run; copy train_gpt.py, and edit the copy")
        return 2
    if not {"parse_overrides", "check"} <= {getattr(statement, "name", "") for statement in tree.body}:
        return int("--help" in argv)  # whatever it is, nothing of it runs here
    if "--help" in argv:
        script, _ = load(path, tree, ["numpy", "torch"])
        try:
            script.say(script.help_text())
            return 0
        except Exception:
            return 1
    ranks, *knobs = argv
    thorough = knobs[:1] == ["--all"]
    knobs = knobs[thorough:]
    absent = ["numpy"] * (not given(knobs, "data_dir")) + ["torch"] * (not (thorough and given(knobs, "resume")))
    script, doubt = load(path, tree, absent)
    refused = judge(script, source, knobs, int(ranks), thorough)
    if refused and (doubt or isinstance(refused, Odd)):
        script, doubt = load(path, tree, [])
        refused = None if doubt else judge(script, source, knobs, int(ranks), thorough)
    if refused:
        say_error(refused)
        return refused.code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C has nothing to tidy up
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # knobs and paths may hold what the screen cannot show
    sys.exit(main(*sys.argv[1:]))
