"""data/sample.py: the text is the model's, weights of any age go with their script, every refusal's sentence."""

import base64
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import KNOBS, SCRIPT, make_corpus, run, run_folders

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "data"))
import sample  # noqa: E402
import then_sample  # noqa: E402
import tokenize_text  # noqa: E402

OLD_SCRIPTS = sorted(ROOT.glob("records/20*/train_gpt.py"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def make_run(folder, script=SCRIPT, encoding="bytes"):
    """A run folder whose weights are random and large, so that each token depends on all before it; its weights.pt."""
    folder.mkdir(parents=True)
    shutil.copy(script, folder / "train_gpt.py")
    t = sample.load_script(folder / "train_gpt.py")
    known = {field.name for field in dataclasses.fields(t.Hyperparameters)}
    hp = t.parse_overrides([knob for knob in KNOBS if knob[2:].partition("=")[0] in known])
    torch.manual_seed(1)
    model = t.GPT(hp, t.VOCAB[encoding])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    saved = dict(model=model.state_dict(), knobs=dataclasses.asdict(hp))
    torch.save(saved | dict(encoding=encoding, vocab_size=t.VOCAB[encoding]), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("lively") / "run")


@pytest.fixture
def logs(lively, tmp_path, monkeypatch):
    """A folder with one run in logs/, as the current one; the run's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lively.parent, tmp_path / "logs/20260101-000000-abcdef")
    return tmp_path / "logs/20260101-000000-abcdef"


def said(capsys, *arguments):
    """The standard output of a sample that comes without complaint."""
    code = sample.main(list(arguments))
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    return captured.out


def refusal(capsys, code, *arguments):
    """The one sentence with which it ends with this code."""
    assert sample.main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("no sample: "), captured.err
    assert captured.err.count("\n") == 1 and captured.err.endswith(".\n")
    return captured.err


def resave(path, **change):
    torch.save(torch.load(path) | change, path)


# --- what is printed


def behind(model, hp, text, first, chosen):
    """How far, in logits, each chosen token is behind the likeliest after text[: first + 1], text[: first + 2] and so
    on, by one pass over the whole text."""
    padded = torch.tensor(text + [50256] * (512 - len(text)), dtype=torch.int32)
    window = torch.tensor(math.ceil(hp.window_max / 128), dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(model.features(padded, window))[first : first + len(chosen), : model.last_row + 1]
    return logits.max(1).values - logits.gather(1, torch.tensor(chosen)[:, None])[:, 0]


def test_temperature_0_takes_the_likeliest_token_each_time(lively):
    script = sample.load_script(lively.with_name("train_gpt.py"))
    hp, model = sample.build(script, torch.load(lively))
    ids = [50256, *range(40, 140)]
    new = sample.generate(script, hp, model, ids, 60, 0, 1)
    assert len(new) == 60 and new == sample.generate(script, hp, model, ids, 60, 0, 2), "nothing is left to chance"
    last = len(ids) - 1
    assert behind(model, hp, ids + new, last, new).max() < 1e-3
    for wrong in (last - 1, last + 1):
        assert behind(model, hp, ids + new, wrong, new).median() > 1e-3, "this model tells neighbours apart"


def test_the_next_token_has_the_probability_that_training_gives_it(lively):
    """Copied or not: as by the loss with each token as the target."""
    script = sample.load_script(lively.with_name("train_gpt.py"))
    hp, model = sample.build(script, torch.load(lively))
    ids, at = torch.tensor(([50256] + [*range(40, 70)] * 9)[:256], dtype=torch.int32), 200
    window, tokens = torch.tensor(4, dtype=torch.int32), torch.tensor([*range(256), 50256])
    with torch.no_grad():
        x = model.features(ids, window)
        model.lm_head.weight[257] = x[at]  # so that copying is likely; no token reads this row
        targets, want = torch.zeros(256, dtype=torch.int64), []
        for token in tokens:
            targets[at] = token
            want.append((-model.losses(x, model.pointer(x, ids, targets), targets)[at]).exp())
        got = sample.next_logits(model, ids, window, at).exp()
    assert torch.allclose(got[:257], torch.stack(want), rtol=1e-4, atol=1e-7)
    assert got[40:70].sum() > 2 * model.logits(x[at : at + 1]).softmax(1)[0, 40:70].sum(), "what was there is copied"


def test_a_long_prompt_is_cut_to_the_training_length(lively, monkeypatch):
    script = sample.load_script(lively.with_name("train_gpt.py"))
    hp, model = sample.build(script, torch.load(lively))
    features, seen = model.features, []
    monkeypatch.setattr(model, "features", lambda ids, window: seen.append(ids.tolist()) or features(ids, window))
    prompt = [i % 251 for i in range(400)]
    new = sample.generate(script, hp, model, prompt, 2, 0, 1)
    assert seen == [prompt[-256:], [*prompt[-255:], new[0]]]
    seen.clear()
    sample.generate(script, hp, model, prompt[:130], 1, 0, 1)
    assert seen == [prompt[:130] + [50256] * 126]


def test_the_end_of_the_document_ends_the_text(lively, monkeypatch):
    script = sample.load_script(lively.with_name("train_gpt.py"))
    hp, model = sample.build(script, torch.load(lively))
    ahead = torch.zeros(1, 384)
    ahead[0, 7], ahead[0, 256], ahead[0, 300] = 1, 2, 3  # a byte, the document's end, a row that is no token
    monkeypatch.setattr(model, "logits", lambda x: ahead)
    assert sample.generate(script, hp, model, [50256, 5], 9, 0, 1) == [256]
    assert sample.generate(script, hp, model, [50256], 9, 0, 1) == [7, 256], "no text begins with its end"
    ahead[0, 256] = 0
    assert sample.generate(script, hp, model, [50256], 9, 0, 1) == [7] * 9


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_tokens_are_drawn_in_proportion(temperature):
    logits, count = torch.tensor([0.0, 1.0, 0.5]), 3000
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([sample.choose(logits, temperature, generator) for _ in range(count)]).bincount(minlength=3)
    weights = [math.exp(logit / temperature) for logit in logits.tolist()]
    for n, weight in zip(drawn.tolist(), weights, strict=True):
        p = weight / sum(weights)
        assert abs(n - count * p) < 5 * math.sqrt(count * p * (1 - p))


def test_the_prompt_is_repeated_and_the_seed_decides(logs, capsys):
    first = said(capsys, "--prompt=two words", "--tokens=40")
    assert first.startswith("sample: two words")
    assert said(capsys, "--prompt=two words", "--tokens=40", "--weights=latest", "--seed=1") == first
    assert said(capsys, "--prompt=two words", "--tokens=40", f"--weights={logs / 'weights.pt'}") == first
    assert said(capsys, "--prompt=two words", "--tokens=40", "--seed=2") != first
    assert sorted(path.name for path in logs.iterdir()) == ["train_gpt.py", "weights.pt"]


def test_bytes_become_text(logs, capsys, monkeypatch):
    """Tokens of the bytes of a word, an incomplete character, and the document's end, which is not printed."""
    new = [*tokenize_text.codec("bytes")[0]("日本é").tolist()[:-1], 256]
    monkeypatch.setattr(sample, "generate", lambda *_: new)
    assert said(capsys, "--prompt=<") == "sample: <日本\N{REPLACEMENT CHARACTER}\n"


@pytest.fixture
def rank_file(tmp_path, monkeypatch):
    """A file in the shape of GPT-2's ranks: its single bytes, then numbers; and its tokens."""
    pytest.importorskip("tiktoken")
    ranks = [bytes([b]) for b in tokenize_text.BYTE_ORDER] + [b"<%05d>" % i for i in range(256, 50256)]
    file = tmp_path / "ranks"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    monkeypatch.setattr(tokenize_text, "GPT2_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file, ranks


def test_gpt2_tokens_become_text(tmp_path, capsys, rank_file):
    file, ranks = rank_file
    weights = make_run(tmp_path / "run", encoding="gpt2")
    arguments = f"--weights={weights}", f"--bpe_file={file}", "--temperature=0", "--tokens=6", "--prompt=ab"
    text = said(capsys, *arguments)
    script = sample.load_script(weights.with_name("train_gpt.py"))
    hp, model = sample.build(script, torch.load(weights))
    new = sample.generate(script, hp, model, [50256, ranks.index(b"a"), ranks.index(b"b")], 6, 0, 1)
    words = b"".join(ranks[token] for token in new if token < 50256)
    assert text == f"sample: ab{words.decode('utf-8', 'replace')}\n"


def test_ranks_beside_the_shards_need_no_second_bpe_file(tmp_path, capsys, monkeypatch, rank_file):
    """Where the folder's name leads to them, or --data_dir does; damaged ones are refused before they mislead."""
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: None / name)  # the network is not asked
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "ROOT", tmp_path)
    (tmp_path / "a.txt").write_text("words of a text " * 20)
    weights = make_run(tmp_path / "run", encoding="gpt2")
    expected = said(capsys, f"--weights={weights}", f"--bpe_file={rank_file[0]}", "--tokens=6", "--prompt=ab")
    plain = f"--weights={weights}", "--tokens=6", "--prompt=ab"
    for out, more in (("mine", []), ("data/mine", []), ("else/where", ["--data_dir=else/where"])):
        assert tokenize_text.main(["a.txt", "--out", out, f"--bpe_file={rank_file[0]}", "--workers=1"]) == 0
        capsys.readouterr()
        resave(weights, knobs=torch.load(weights)["knobs"] | dict(data_dir="mine"))
        tokenize_text.codec.cache_clear()
        assert said(capsys, *plain, *more) == expected
        (tmp_path / out / "gpt2.tiktoken").write_bytes(rank_file[0].read_bytes()[:-1])
        assert "gpt2.tiktoken is missing or not as" in refusal(capsys, 2, *plain, *more)
        assert said(capsys, *plain, *more, f"--bpe_file={rank_file[0]}") == expected
        shutil.rmtree(tmp_path / out)


def test_the_sample_after_a_run_finds_the_ranks(tmp_path):
    (tmp_path / "gpt2.tiktoken").touch()
    last = f"--data_dir={tmp_path}"
    assert then_sample.ranks_of(["python", "t.py", "--data_dir=no", last]) == [last]
    assert then_sample.ranks_of(["python", "t.py", "--data_dir=no"]) == then_sample.ranks_of(["python", "t.py"]) == []


@pytest.mark.parametrize("encoding, count", [("bytes", 200), ("gpt2", 50)])
def test_it_is_about_200_characters_unless_told(logs, capsys, monkeypatch, encoding, count):
    asked = []
    monkeypatch.setattr(sample, "generate", lambda script, hp, model, ids, count, *_: asked.append(count) or [])
    monkeypatch.setattr(tokenize_text, "codec", lambda *_: (lambda text: torch.zeros(0), lambda ids: "words"))
    resave(logs / "weights.pt", encoding=encoding)
    said(capsys)
    said(capsys, "--tokens=7")
    assert asked == [count, 7]


def test_weights_of_a_run_and_a_terminal_that_lacks_letters(tmp_path):
    make_corpus(tmp_path / "data")
    run(tmp_path, "--steps=2")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, ROOT / "data/sample.py", "--prompt=日 a", "--tokens=30"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("sample: ? a")
    names = {path.name for path in run_folders(tmp_path)[0].iterdir()}
    assert names == {"log.txt", "metrics.jsonl", "train_gpt.py", "weights.pt"}


@pytest.mark.parametrize("script", OLD_SCRIPTS, ids=lambda path: path.parent.name)
def test_weights_of_old_scripts(tmp_path, capsys, script):
    weights = make_run(tmp_path / "run", script)
    assert said(capsys, f"--weights={weights}", "--prompt=abc", "--tokens=5").startswith("sample: abc")


# --- what is refused


def test_the_example_for_safetensors(lively, tmp_path, monkeypatch):
    """Written and read back: the head and its embedding are one, bf16 tables exact, the facts kept."""
    code = (ROOT / "data" / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    saved = torch.load(lively)
    saved["model"] |= {key: table.bfloat16() for key, table in saved["model"].items() if "value_embeds" in key}
    torch.save(saved, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["safe.py", "weights.pt"])
    names = {}
    exec(code, names)
    found, model = names["weights"], saved["model"]
    assert found.keys() == model.keys() and found["lm_head.weight"] is found["embed.weight"]
    assert {tensor.dtype for tensor in model.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(torch.from_numpy(found[key]), tensor.float()) for key, tensor in model.items())
    raw = (tmp_path / "weights.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header, sizes = json.loads(raw[8:start]), {key: tensor.nbytes for key, tensor in model.items()}
    assert start % 8 == 0 and len(raw) - start == sum(sizes.values()) - sizes["lm_head.weight"]
    assert json.loads(header.pop("__metadata__")["knobs"]) == {
        key: list(value) if isinstance(value, tuple) else value for key, value in saved["knobs"].items()}
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in ends] == [0, *(end for _, end in ends[:-1])], "the format allows no gap"
    untied = model | {"lm_head.weight": model["embed.weight"] + 1}  # as scripts before had it
    names["write"](dict(model=untied), "untied")
    assert torch.equal(torch.from_numpy(names["read"]("untied")["lm_head.weight"]), untied["lm_head.weight"])


def test_damaged_weights_are_passed_over(logs, capsys):
    newest = shutil.copytree(logs, logs.with_name("20260102-000000-abcdef")) / "weights.pt"
    flipped = bytearray(newest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newest.write_bytes(flipped)
    (logs.with_name("20260103-000000-abcdef")).mkdir()
    (logs.with_name("20260103-000000-abcdef") / "weights.pt").write_bytes(flipped[:1000])
    assert sample.main(["--tokens=5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("sample: ")
    cut, checksum = captured.err.splitlines()
    assert "20260103" in cut and "20260102" in checksum and "a checksum is wrong" in checksum
    assert all(line.endswith("the next older one is tried.") for line in (cut, checksum))
    assert "a checksum is wrong" in refusal(capsys, 5, f"--weights={newest}")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_do_not_load(logs, capsys, value, dtype):
    model = torch.load(logs / "weights.pt")["model"]
    name = next(key for key, tensor in model.items() if tensor.ndim == 2)
    model[name] = model[name].to(dtype)
    model[name][1, 1] = value
    resave(logs / "weights.pt", model=model)
    assert f"{name} holds NaN or infinity" in refusal(capsys, 5, f"--weights={logs / 'weights.pt'}")
    assert sample.main([]) == 5 and "the next older one is tried" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(knobs=None), dict(knobs=[1]), dict(model=None), dict(model=dict(a=1)),
                                    dict(encoding=[]), dict(encoding=None)])
def test_weights_of_another_shape_are_none(logs, capsys, change):
    resave(logs / "weights.pt", **change)
    assert "is missing, damaged or no weights" in refusal(capsys, 5, f"--weights={logs / 'weights.pt'}")


@pytest.mark.parametrize("line, words", [
    ("import sys; sys.exit(0)\n", "cannot be imported (SystemExit"),
    ("\nclass GPT:\n    def __init__(self, *_):\n        raise SystemExit\n", "does not fit the train_gpt.py")])
def test_a_script_that_ends_itself_is_no_sample(logs, capsys, line, words):
    with open(logs / "train_gpt.py", "a") as script:
        script.write(line)
    assert words in refusal(capsys, 5)


def test_a_link_to_weights_finds_their_script(logs, capsys, tmp_path):
    expected = said(capsys, "--tokens=5")
    (tmp_path / "train_gpt.py").write_text("raise ValueError('another script')\n")
    (tmp_path / "link.pt").symlink_to(logs / "weights.pt")
    assert said(capsys, "--tokens=5", "--weights=link.pt") == expected
    shutil.copy(logs / "train_gpt.py", tmp_path)
    (logs / "train_gpt.py").unlink()
    assert said(capsys, "--tokens=5", "--weights=link.pt") == expected, "a folder of links has it beside the link"


def test_ctrl_c_is_one_line(logs, capsys, monkeypatch):
    """While torch is imported as well as later."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", stop)
    assert "stopped" in refusal(capsys, 130)
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / "data/sample.py"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "numpy" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and "no sample: stopped.\n" in err and "Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("more", [">/dev/full", "| true"])
def test_nobody_has_to_listen(logs, more):
    line = f'{{ "$@"; echo $? >code; }} {more}'
    command = ["sh", "-c", line, "sh", sys.executable, ROOT / "data/sample.py", "--tokens=2"]
    done = subprocess.run(command, cwd=logs.parents[1], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and (logs.parents[1] / "code").read_text() == "0\n"


def test_no_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no usable logs/*/weights.pt" in refusal(capsys, 5)
    assert "nowhere.pt is missing" in refusal(capsys, 5, "--weights=nowhere.pt")
    torch.save(dict(model={}), tmp_path / "other.pt")
    assert "does not hold" in refusal(capsys, 5, "--weights=other.pt")
    torch.save([1], tmp_path / "list.pt")
    assert "list.pt" in refusal(capsys, 5, "--weights=list.pt")


def test_no_script_or_one_that_cannot_be_imported(logs, capsys):
    (logs / "train_gpt.py").write_text("import nothing_of_this_name")
    assert "cannot be imported (ModuleNotFoundError" in refusal(capsys, 5)
    (logs / "train_gpt.py").write_text("def")
    assert "cannot be imported (SyntaxError" in refusal(capsys, 5)
    (logs / "train_gpt.py").unlink()
    assert "train_gpt.py is missing" in refusal(capsys, 5)


def test_a_script_that_does_not_fit(logs, capsys):
    weights, script = logs / "weights.pt", logs / "train_gpt.py"
    saved = torch.load(weights)
    name, tensor = list(saved["model"].items())[-1]
    resave(weights, model={key: value for key, value in saved["model"].items() if key != name})
    assert f'Missing key(s) in state_dict: "{name}"' in refusal(capsys, 5)
    resave(weights, model=saved["model"] | {name: tensor[:-1]})
    assert "size mismatch" in refusal(capsys, 5)
    resave(weights, model=saved["model"], knobs=saved["knobs"] | dict(no_such_knob=1))
    assert "no_such_knob" in refusal(capsys, 5)
    resave(weights, knobs=saved["knobs"], encoding="morse")
    assert "'morse' is none of" in refusal(capsys, 5, f"--weights={weights}")
    resave(weights, encoding="bytes")
    script.write_text(script.read_text().replace("last_row", "last_token"))
    assert "does not fit the train_gpt.py beside it (AttributeError" in refusal(capsys, 5)


def test_no_vocabulary(logs, capsys):
    pytest.importorskip("tiktoken")
    resave(logs / "weights.pt", encoding="gpt2")
    sentence = refusal(capsys, 2, "--bpe_file=absent")
    assert "absent does not give GPT-2's vocabulary" in sentence and "--data_dir" in sentence
    assert "--encoding" not in sentence


@pytest.mark.parametrize("place", ["torch.load", "build", "generate"])
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_memory(logs, capsys, monkeypatch, place, error):
    def full(*_, **__):
        raise error

    owner = sample.torch if place == "torch.load" else sample
    monkeypatch.setattr(owner, place.removeprefix("torch."), full)
    assert "memory ran out" in refusal(capsys, 6)


@pytest.mark.parametrize("argument", [
    "--tokens=0", "--tokens=many", "--temperature=-1", "--temperature=nan", "--temperature=0.001", "--temperature=inf",
    "--seed=-1", "--seed=9223372036854775808", "--temp=1", "words", "--data_dir=/nope", "--data_dir=run.sh",
])  # fmt: skip
def test_bad_knobs(capsys, argument):
    sentence = refusal(capsys, 2, argument)
    assert argument.partition("=")[0] in sentence and "--help" in sentence
