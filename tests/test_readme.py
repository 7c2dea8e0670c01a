"""What the README says must be so: its commands parse, its knobs, symbols and paths exist, its snippets run."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys

import pytest
from conftest import ROOT

import train_gpt as t

sys.path.insert(0, str(ROOT / "records"))
import records  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
RULES = (ROOT / "records/README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
KNOBS = {f.name for f in dataclasses.fields(t.Hyperparameters)}
LAUNCHER = {"standalone", "nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port"}
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
SNIPPETS = [body for language, body in FENCES if language == "python"]
LINES = [line for language, body in FENCES if not language for line in body.splitlines()]
LINES += re.findall(r"`((?:\./run\.sh|cp|\.venv/bin/python) [^`]*)`", README)  # and those inside a sentence
LINES += re.findall(r"^(python records/.*)$", RULES, re.M)
COMMANDS = sorted({part.strip() for line in LINES for part in line.split(" #")[0].split(";")})


def section(markdown, heading):
    """The text from a heading to the next one of any level."""
    return re.split(r"^#+ ", markdown.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def table(text, first):
    """The cells of the rows of the table whose header begins with `first`."""
    rows = text[text.index(f"| {first} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if row.startswith("|")]


def symbols():
    """Functions, classes, methods (Class.method) and constants of train_gpt.py, without executing it."""
    found = set()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            found |= {f"{node.name}.{n.name}" for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def technique_problems(markdown):
    problems, known = [], symbols()
    rows = table(section(markdown, "Techniques"), "name")
    for cells in rows:
        if len(cells) != 5 or not all(cells):
            problems.append(f"{cells} are not five filled cells")
            continue
        name, symbol, knob = cells[:3]
        problems += [f"{name}: no symbol {s}" for s in re.findall(r"`([^`]*)`", symbol) or [""] if s not in known]
        quoted = re.findall(r"`([^`]*)`", knob)
        problems += [f"{name}: no knob {k}" for k in quoted if k[:2] != "--" or k[2:] not in KNOBS]
        problems += [f"{name}: no knob and not 'none'"] if not quoted and knob != "none" else []
    return problems if len(rows) > 15 else problems + ["the table is missing"]


def test_techniques_exist():
    assert not technique_problems(README)


@pytest.mark.parametrize("right, wrong", [("`CastedLinear`, ", "`CastLinear`, "), ("`GPT.logits` |", "`GPT.logit` |"),
                                          ("`--attn_scale` |", "`--scale` |"), ("not measured |\n", "|\n")])
def test_a_wrong_technique_is_found(right, wrong):
    assert right in README and technique_problems(README.replace(right, wrong))


def script(name):
    spec = importlib.util.spec_from_file_location(f"readme_{name}", ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_command(command):
    program, *words = shlex.split(command)
    if program == "cp" or words[:2] in (["-m", "pip"], ["-m", "venv"]):
        return
    world = 1
    if words[:2] == ["-m", "torch.distributed.run"]:
        at = words.index("train_gpt.py")
        options = dict(word.removeprefix("--").partition("=")[::2] for word in words[2:at])
        assert set(options) <= LAUNCHER, command
        world, words = int(options.get("nnodes", 1)) * int(options["nproc_per_node"]), words[at:]
    if program == "./run.sh":
        words = [] if words[:1] == ["test"] else words[1:] if words[:1] == ["my.py"] else words
    else:
        assert program in ("python", ".venv/bin/python"), command
        name = words.pop(0)
        assert (ROOT / name).is_file(), command
        if name.startswith("data/"):
            return script(name[5:-3]).parse(words)
        if name == "records/records.py":
            args, words = records.parser().parse_known_args(words)
            words = [re.sub("^--[ab][.]", "--", word) for word in words] if args.command == "trial" else words
            assert args.command == "trial" or not words, command
        assert name in ("train_gpt.py", "tests/bench_recipe.py", "records/records.py"), command
    if words != ["--help"]:
        t.check(t.parse_overrides(words), world)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_legal(command):
    check_command(command)


@pytest.mark.parametrize("command", ["./run.sh --step=3", "./run.sh my.py --preset=8gb", "./train.sh",
                                     "python data/fetch.py", "python train_gpt.py --train_seq_len=1000",
                                     "python records/records.py trial a.py b.py --b.muonlr=1"])
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, t.Refused)):
        check_command(command)


def test_every_knob_and_path_named_exists():
    sources = "".join((ROOT / "data" / name).read_text(encoding="utf-8") for name in ("fineweb.py", "tokenize_text.py"))
    known = KNOBS | LAUNCHER | {"preset", "help", "index-url", "name", "runs", "write", "b"}  # --b.knob, of trial
    known |= set(re.findall(r'"--([a-z_-]+)"', sources))
    assert set(re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", README)) <= known
    files = r"(?<![\w/])(?:\./run\.sh|(?:data|tests|records)/\w+\.(?:py|md)|train_gpt\.py|requirements\.\w+)"
    for path in re.findall(files, README):
        assert (ROOT / path).exists(), path
    layout = next(body for language, body in FENCES if language == "text" and body.startswith("train_gpt.py"))
    for path in (line.split()[0] for line in layout.splitlines()):
        assert path.startswith(".") or (ROOT / path).exists(), path
    linked = set(re.findall(r"\]\(#([\w-]+)\)", README))
    assert linked <= {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.M)}
    assert "\n### Sparing the download\n" in README  # run.sh points at it


def test_presets_and_exit_codes_are_those_of_the_script():
    said = {name.strip("`"): sets.strip("`") for name, _, sets, _ in table(README, "preset")}
    assert said == {name: " ".join(f"--{k}={v}".replace(" ", "") for k, v in sets.items()) or "the defaults"
                    for name, sets in t.PRESETS.items()}
    used = {int(code) for code in re.findall(r"Refused\((\d+)", SOURCE)}
    assert {int(code) for code, _ in table(README, "exit code")} == used | {0, 4, 6, 75}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert len(snippet.splitlines()) == 5
    if "head" in names:
        assert names["head"].weight.grad.abs().sum() > 0 and not names["head"].use_fp8
    if "y" in names:
        assert names["y"].shape == names["q"].shape and names["y"].isfinite().all()


def test_three_snippets_and_no_number_left_open():
    assert len(SNIPPETS) == 3 and not re.search(r"@@\w|\bTODO\b|[A-Z]_OUTPUT\b|[A-Z]_MINUTES\b", README)
