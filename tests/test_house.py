"""The readers' budget of train_gpt.py: tokens, line by line, as Python's own tokenizer sees them.

Comments, docstrings and layout are free, and an f-string is one token on every Python. Unpacking a line costs nothing;
only deleting pays. The halves are cut at the line `# ==== HARNESS`.
"""

import ast
import io
import tokenize
from collections import Counter

import pytest
from tiny import SCRIPT

SOURCE = SCRIPT.read_text(encoding="utf-8")
BUDGET = dict(recipe=11_500, harness=6_800)
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FSTRING = [getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END")]  # of Python 3.12 and newer


def docstring_lines(source):
    """The first lines of all docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(ast.parse(source)) if isinstance(node, owners) and node.body]
    texts = [body[0] for body in bodies if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)]
    return {text.lineno for text in texts if isinstance(text.value.value, str)}


def tokens_by_line(source):
    """{line: tokens on it}, without lines that hold none."""
    counts, depth, free = Counter(), 0, docstring_lines(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.type == tokenize.STRING and token.start[0] in free:
            continue
        depth -= token.type == FSTRING[1]
        if depth == 0 and token.type != FSTRING[1]:
            counts[token.start[0]] += 1
        depth += token.type == FSTRING[0]
    return counts


def halves(source):
    """{half: {line: tokens}}"""
    cut = next(i for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ==== HARNESS"))
    counts = tokens_by_line(source)
    recipe = {i: n for i, n in counts.items() if i < cut}
    return dict(recipe=recipe, harness={i: n for i, n in counts.items() if i > cut})


def test_tokens_are_counted_as_said():
    source = '"""Free."""\nx = f"{a + 1} and {b:.2f}"  # free\n\n\n'
    source += 'def f():\n    """Free."""\n    return (x,\n            1)\n'
    assert tokens_by_line(source) == {2: 3, 5: 5, 7: 4, 8: 2}


@pytest.mark.parametrize("half", BUDGET)
def test_a_half_stays_within_its_tokens(half):
    counts = halves(SOURCE)[half]
    assert sum(counts.values()) <= BUDGET[half], "delete something: packing does not help"
    assert sum(counts.values()) / len(counts) < 12.5, "tokens a logic line"
    assert {i: n for i, n in counts.items() if n > 30} == {}, "lines over 30 tokens"


def test_lines_and_functions_are_short():
    assert [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100] == []
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert {node.name: node.lineno for node in functions if node.end_lineno - node.lineno >= 60} == {}


def test_no_module_knows_of_ranks():
    tree = ast.parse(SOURCE)
    modules = [node for node in tree.body if isinstance(node, ast.ClassDef) and any(
        ast.unparse(base).startswith("nn.") for base in node.bases)]
    assert {"GPT", "Block", "CastedLinear"} <= {node.name for node in modules}
    names = {getattr(n, "id", getattr(n, "attr", getattr(n, "arg", ""))) for m in modules for n in ast.walk(m)}
    assert not names & {"rank", "world_size", "dist"}
