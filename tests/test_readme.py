"""What README.md and the pages in data/, tests/ and records/ say must be so: their commands parse, their knobs, symbols
and paths exist, the snippet runs, and the limits of the first page hold."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
from functools import lru_cache

import pytest
from conftest import ROOT

import train_gpt as t

sys.path[:0] = [str(ROOT / "records"), str(ROOT / "data")]
import runs  # noqa: E402

import records  # noqa: E402

PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "data/README.md", "tests/README.md", "records/README.md")}
README, RUNNING = PAGES["README.md"], PAGES["data/README.md"]
SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
KNOBS = {f.name for f in dataclasses.fields(t.Hyperparameters)}
LAUNCHER = {"standalone", "nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:[A-Z]+=[\w.]+ )?(?:\./run\.sh|(?:(?:\.venv/bin/)?python|cp|trial) )[^`]*)`")
SNIPPETS = [body for language, body in FENCE.findall(README) if language == "python"]


def commands(markdown):
    """The lines of fences without a language, and what looks like a command inside a sentence or a table."""
    lines = [line for language, body in FENCE.findall(markdown) if not language for line in body.splitlines()]
    lines += INLINE.findall(FENCE.sub("", markdown))
    return {line.split(" #")[0].strip() for line in lines}


COMMANDS = sorted(set().union(*map(commands, PAGES.values())))


def section(markdown, heading):
    """The text from a heading to the next one of any level."""
    return re.split(r"^#+ ", markdown.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.M)[0]


def table(text, first):
    """The cells of the rows of the table whose header begins with `first`."""
    rows = text[text.index(f"| {first} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if row.startswith("|")]


# ---- Techniques: one knob, one symbol, one caller in the recipe half

def recipe(source):
    """The part of a script above the line that begins its harness."""
    assert source.count("\n# ==== HARNESS") == 1
    return source.partition("\n# ==== HARNESS")[0]


class Names(ast.NodeVisitor):
    """What a source defines at its top, and which names are used outside their own definition. Functions, classes and
    constants by name; methods and attributes as Class.name, used where any object's attribute of that name is read.
    Annotations, imports and assignments are no use."""
    def __init__(self, source):
        self.defined, self.used, self.inside = set(), set(), []
        self.visit(ast.parse(source))

    def definition(self, node):
        if not self.inside:
            self.defined.add(node.name)
        elif len(self.inside) == 1:
            self.defined.add(f"{self.inside[0]}.{node.name}")
        defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d] if hasattr(node, "args") else []
        for outer in (*node.decorator_list, *getattr(node, "bases", []), *defaults):
            self.visit(outer)
        self.inside.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.inside.pop()

    visit_FunctionDef = visit_ClassDef = definition

    def visit_AnnAssign(self, node):
        self.visit(node.target)
        if node.value:
            self.visit(node.value)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load):
            self.used |= {node.id} - set(self.inside)
        elif not self.inside:
            self.defined.add(node.id)

    def visit_Attribute(self, node):
        self.visit(node.value)
        if isinstance(node.ctx, ast.Store) and self.inside and ast.unparse(node.value) == "self":
            self.defined.add(f"{self.inside[0]}.{node.attr}")
        elif isinstance(node.ctx, ast.Load):
            self.used |= {f".{node.attr}"} - {f".{name}" for name in self.inside}

    def calls(self, symbol):
        owner, dot, name = symbol.partition(".")
        return dot + name in self.used if dot else owner in self.used


@lru_cache
def names_of(source):
    return Names(recipe(source))


def symbol_problem(symbol, source):
    """Nothing where `symbol` is defined in the recipe half of a script and used there, else what is wrong."""
    names = names_of(source)
    if symbol not in names.defined:
        return f"no symbol {symbol}"
    return "" if names.calls(symbol) else f"nobody calls {symbol}"


def technique_problems(markdown):
    problems, rows = [], table(section(markdown, "Techniques"), "technique")
    for cells in rows:
        if len(cells) != 4 or not all(cells):
            problems.append(f"{cells} are not four filled cells")
            continue
        name, knob, symbol, _ = cells
        quoted = re.fullmatch("`--([a-z0-9_]+)`", knob)
        if not quoted or quoted[1] not in KNOBS:
            problems.append(f"{name}: no knob {knob}")
        found = symbol_problem(symbol.strip("`"), SOURCE)
        if found:
            problems.append(f"{name}: {found}")
    return problems if len(rows) > 15 else problems + ["the table is missing"]


def test_techniques_have_a_knob_a_symbol_and_a_caller():
    assert not technique_problems(README)


@pytest.mark.parametrize("right, wrong", [
    ("`CastedLinear` |", "`CastLinear` |"), ("`GPT.logits` |", "`GPT.logit` |"), ("`--rope_base` |", "`--scale` |"),
    ("`--logit_cap` |", "`--logit_cap`, `--logit_temp` |"), ("`Rotary` | not measured |", "`Rotary` | |"),
    ("`Rotary` |", "`Refused` |"), ("`Mix` |", "`Mix.zero_grad` |")])
def test_a_wrong_technique_is_found(right, wrong):
    assert right in README
    assert len(technique_problems(README.replace(right, wrong))) > len(technique_problems(README))


@pytest.mark.parametrize("symbol, problem", [
    ("called", ""), ("Model", ""), ("Base", ""), ("LIMIT", ""), ("Model.score", ""), ("Model.weights", ""),
    ("helper", "nobody calls helper"), ("annotated", "nobody calls annotated"), ("recursive", "nobody calls recursive"),
    ("below", "nobody calls below"), ("Model.spare", "nobody calls Model.spare"), ("WIDTH", ""),
    ("Model.unread", "nobody calls Model.unread"), ("imported", "no symbol imported"), ("late", "no symbol late"),
    ("Model.logits", "no symbol Model.logits")])
def test_a_symbol_that_nobody_calls_is_found(symbol, problem):
    source = '''
import imported
LIMIT, WIDTH = 3, 4
def called(width=WIDTH): return LIMIT
def helper(): "helper() in a text is no call"
class annotated: pass
def recursive(): recursive()
def below(): pass
class Base: pass
class Model(Base):
    def __init__(self): self.weights, self.unread = called(), 0
    def score(self, x: annotated) -> annotated: return self.weights
    def spare(self): return self.spare()
def run(): return imported, Model().score(1)

# ==== HARNESS: the rest
def late(): below()
late(), helper()
'''
    assert symbol_problem(symbol, source) == problem


# ---- Commands

@lru_cache
def tool(path):
    """A script of data/ or tests/bench/ as a module; each has its own `parse(argv)`."""
    spec = importlib.util.spec_from_file_location("readme_" + re.sub(r"\W", "_", path), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def knobs_of(source):
    """The options that a script's own parser takes, read without running it."""
    return set(re.findall(r'"--([a-z][a-z0-9_-]*)"', source))


def check_bench(path, words):
    """A bench takes its own options and the recipe's knobs, both by names that exist and values that parse."""
    source = (ROOT / path).read_text(encoding="utf-8")
    own = knobs_of(source) | {"help"}
    options = [word for word in words if word.startswith("--")]
    names = [word.removeprefix("--").partition("=")[0] for word in options]
    unknown = [name for name in names if name not in own | KNOBS | {"preset"}]
    assert not unknown, f"{path} takes no {unknown}"
    check_knobs([word for word, name in zip(options, names) if name in KNOBS - own | {"preset"}])
    if "--help" not in words and "\ndef parse(" in source:
        tool(path).parse(words)


def check_pytest(words):
    """Files that exist, and options that a test run of ours needs."""
    while words:
        word = words.pop(0)
        if word in ("-k", "-m"):
            value = words.pop(0)
            assert word == "-k" or value == "gpu", f"no mark {value}"
        else:
            assert word in ("-x", "-q") or (ROOT / word).exists(), word


def check_knobs(words, world=1):
    if words != ["--help"]:
        t.check(t.parse_overrides(words), world)


def check_module(words, command):
    """python -m ..."""
    module, *words = words
    if module == "pytest":
        return check_pytest(words)
    if module != "torch.distributed.run":
        assert module in ("pip", "venv", "ruff"), command
        return None
    at = words.index("train_gpt.py")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:at])
    assert set(options) <= LAUNCHER, command
    return check_knobs(words[at + 1:], int(options.get("nnodes", 1)) * int(options["nproc_per_node"]))


def check_records(words, command):
    args, rest = records.parser().parse_known_args(words)
    if args.command == "trial":
        return check_knobs([re.sub("^--[ab][.]", "--", word) for word in rest])
    assert not rest, command
    for name in [getattr(args, "name", None), *getattr(args, "names", [])]:
        assert args.command == "add" or not name or (ROOT / "records" / name).is_dir(), f"no record {name}"
    return None


def check_script(path, words, command):
    """python FILE ..."""
    assert (ROOT / path).is_file(), f"{command}: there is no {path}"
    if path.startswith("data/"):
        return tool(path).parse(words)
    if path.startswith("tests/bench/"):
        return check_bench(path, words)
    if path == "records/records.py":
        return check_records(words, command)
    assert path == "train_gpt.py", command
    return check_knobs(words)


def check_command(command):
    """Raises where a command names a program, file, option, knob or value that does not exist."""
    program, *words = shlex.split(re.sub("<[^>]*>", "", command))
    if re.match("(PYTHON|NPROC|SCRIPT)=", program):
        assert not program.startswith("SCRIPT=") or words[:2] == ["./run.sh", "test"], command
        program, *words = words
    if program == "cp":
        return None
    if program == "trial":  # a command of records.py, inside a sentence
        return check_records([program, *words], command)
    if program == "./run.sh":
        if words[:1] == ["test"]:
            return check_pytest(words[1:])
        if words[:1] == ["sample"]:
            return tool("data/sample.py").parse(words[1:])
        if words and not words[0].startswith("--") and words[0] != "my.py":
            return check_records(words, command)
        return check_knobs(words[words[:1] == ["my.py"]:])
    assert re.fullmatch(r"(\.venv/bin/)?python3?", program), command
    return check_module(words[1:], command) if words[0] == "-m" else check_script(words[0], words[1:], command)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_legal(command):
    check_command(command)


def test_commands_are_found_in_every_page():
    assert all(len(commands(page)) > 3 for page in PAGES.values())
    assert "./run.sh my.py" in commands(README) and "./run.sh test -m gpu" in commands(PAGES["tests/README.md"])


@pytest.mark.parametrize("command", [
    "./run.sh --step=3", "./run.sh my.py --preset=8gb", "./train.sh", "python data/fetch.py", "./run.sh test -m gpus",
    "python train_gpt.py --train_seq_len=1000", "python records/records.py trial a.py b.py --b.muonlr=1",
    "python records/records.py verify 2026-11-24_Nowhere", "trial a.py b.py --step=3", "./run.sh test tests/test_no.py",
    "python data/fineweb.py --shard=3", "python -m torch.run train_gpt.py", "python tests/bench/none.py",
    "python tests/bench/recipe.py --stepps=3", "GPUS=1 ./run.sh", "./run.sh tria a.py b.py",
    "./run.sh sample --token=3", "./run.sh trial a.py b.py --b.muonlr=1", "./run.sh verify 2026-11-24_Nowhere",
    "./run.sh list --all", "SCRIPT=my.py ./run.sh"])
def test_a_wrong_command_is_found(command):
    problems = tool("data/fineweb.py").Problem, tool("data/sample.py").Problem
    with pytest.raises((AssertionError, SystemExit, t.Refused, *problems)) as found:
        check_command(command)
    assert not isinstance(found.value, SystemExit) or found.value.code == 2


WALK = sorted(commands(section(PAGES["records/README.md"], "From a clone to a first record on FineWeb")))


@pytest.mark.parametrize("track, command, count", [
    ("tiny-cpu", "./run.sh --preset=cpu", 1_441_023), ("embedded-1xgpu", "./run.sh --preset=tiny", 1_441_023),
    ("fineweb-8xh100", "./run.sh --save=False --seed=1", 8 * 10**8),
    ("fineweb-1xh100-eighth", "./run.sh --preset=eighth --val_tokens=10485760 --save=False --seed=1", 10**8)])
def test_a_track_takes_what_its_command_runs(track, command, count):
    """Validation tokens as the track says, and no more of the `count` training tokens than its epochs have."""
    assert command in WALK or "fineweb" not in track
    rules, hp = records.read_tracks()[track], t.parse_overrides(shlex.split(command)[1:])
    parts = runs.stages_of(dataclasses.asdict(hp))
    assert hp.val_tokens == rules["val_tokens"] and hp.epochs <= rules["train"]["max_epochs"]
    assert runs.tokens_before(hp.steps, parts) <= rules["train"]["max_epochs"] * count


def test_the_walk_adds_to_tracks_that_are_there():
    tracks, added = records.read_tracks(), [records.parser().parse_args(shlex.split(line)[1:])
                                            for line in WALK if line.startswith("./run.sh add")]
    assert {args.track for args in added} == {"fineweb-1xh100-eighth", "fineweb-8xh100"} <= set(tracks)
    assert all(args.claim != "record" and len(args.summary) <= 120 and args.name.isalnum() for args in added)


# ---- Knobs, paths, links

SOURCES = ["data/*.py", "records/records.py", "tests/bench/*.py"]
NOT_OURS = LAUNCHER | {"preset", "help", "index-url", "a", "b", "knob"}  # torchrun's, pip's; --a.knob=value, of trial
PATH = re.compile(r"(?<![\w/.-])((?:data|tests|records)/[\w/.-]*\.\w+|train_gpt\.py|run\.sh|requirements\.\w+)(?!\w)")


@pytest.mark.parametrize("page", PAGES)
def test_every_knob_named_exists(page):
    known = KNOBS | NOT_OURS
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            known |= knobs_of(path.read_text(encoding="utf-8"))
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)", PAGES[page]))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES)
def test_every_path_named_exists(page):
    for path in PATH.findall(PAGES[page]):
        assert (ROOT / path).exists(), path


def anchors(markdown):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        path = folder / target if target else ROOT / page
        assert target.startswith("https:") or path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_layout_is_that_of_the_tree():
    texts = [body for language, body in FENCE.findall(README) if language == "text"]
    layout = next(text for text in texts if text.startswith("train_gpt.py"))
    for line in layout.splitlines():
        path = line.split()[0]
        assert path.startswith(".") or (ROOT / path).exists(), path


def test_run_sh_points_at_the_section_that_spares_the_download():
    page = re.search(r'Sparing the download\\" in ([\w/.]+\.md)', (ROOT / "run.sh").read_text(encoding="utf-8"))[1]
    assert "\n## Sparing the download\n" in PAGES[page]


# ---- The first page, and the tables that the script knows better

def test_the_first_page_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 2000


def test_the_first_screen_says_what_it_is_with_a_result_a_picture_and_three_commands():
    screen = "\n".join(README.splitlines()[:25])
    assert len(re.findall(r"^!\[.*\]\(.*\.png\)$", screen, re.M)) == 1
    commands = FENCE.search(screen)[2].splitlines()
    assert [line.split()[0] for line in commands] == ["./run.sh", "./run.sh", "cp", "./run.sh"]
    assert re.search(r"\bn = \d", screen) and re.search(r"\bsd\s\d", screen) and "H100" in screen


def test_presets_are_those_of_the_script():
    said = {name.strip("`"): sets.strip("`") for name, _, sets, _ in table(RUNNING, "preset")}
    helped = {name: " ".join(words) or "the defaults"
              for name, *words in (row.split() for row in re.findall(r"^ *--preset=(\S.*)$", t.help_text(), re.M))}
    assert said == helped and set(said) == set(t.PRESETS)


def test_exit_codes_are_those_of_the_script():
    used = {int(code) for code in re.findall(r"(?:Refused\(|RunEnd\(|\bcode=)(\d+)", SOURCE)}
    documented = {int(code) for code in re.findall(r"\b(\d+) [a-z]", " ".join(t.RunEnd.__doc__.split()))}
    said = {int(code) for code, _ in table(RUNNING, "exit code")}
    assert said == documented | {0} and said >= used


def test_the_snippet_runs():
    assert len(SNIPPETS) == 1
    names = {}
    exec(compile(SNIPPETS[0], "README.md", "exec"), names)
    assert names["head"].weight.grad.abs().sum() > 0 and not names["head"].use_fp8
    assert names["y"].shape == (512, 64) and names["y"].isfinite().all()
    assert names["qkv"].weight.isfinite().all() and names["embed"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("page", PAGES)
def test_no_number_is_left_open(page):
    assert not re.search(r"@@\w|\bTODO\b|[A-Z]_OUTPUT\b|[A-Z]_MINUTES\b", PAGES[page])
