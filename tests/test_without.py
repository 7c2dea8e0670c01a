"""tests/bench/without.py: each technique can be taken out of train_gpt.py, and the rest still trains."""

import math
import sys
from pathlib import Path

import pytest
import torch
from small import documents

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import arms  # noqa: E402
import without  # noqa: E402
from common import ROOT, TINY, load_script  # noqa: E402

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def three_losses(path):
    script = load_script(path)
    hp = script.parse_overrides([*TINY, "--steps=3", "--num_heads=2"])
    script.check(hp, 1)
    trainer = script.build(hp, 384, 0, 1, torch.device("cpu"))
    return [float(trainer.train_step(step, documents(hp, hp.sequences_per_step, seed=step))) for step in range(3)]


@pytest.fixture(scope="module")
def whole():
    return three_losses(ROOT / "train_gpt.py")


@pytest.mark.parametrize("name", without.LINES)
def test_a_technique_can_be_taken_out(name, whole, tmp_path):
    """The script trains, and otherwise than with it."""
    path = tmp_path / "train_gpt.py"
    path.write_text(without.without(SOURCE, [name])[0], encoding="utf-8")
    losses = three_losses(path)
    assert all(map(math.isfinite, losses)) and losses != whole


def test_what_knobs_take_out_is_legal_and_names_can_be_joined(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert without.main(["softcap", "smear+batch_stages+decay", *without.KNOBS]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(without.KNOBS)
    for line in printed:
        name, path, knobs = arms.arm_of(line.removeprefix("--arm="))
        script = load_script(path)
        hp, default = (script.parse_overrides(["--preset=eighth", *more]) for more in (knobs, ()))
        script.check(hp, 1)
        assert name.startswith("no-") and hp != default
        assert script.tokens_before(hp.steps, hp) == pytest.approx(script.tokens_before(hp.steps, default), rel=1e-2)
    assert "self.smear" not in Path(".cache/without/smear-batch_stages-decay.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("argument, word", [("everything", "--list"), ("smear+nothing", "nothing cannot"),
                                            ("smear+smear", "0 times")])
def test_what_cannot_be_taken_out_gets_a_sentence(argument, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        without.main([argument])
    assert caught.value.code == 2 and word in capsys.readouterr().err and not (tmp_path / ".cache").exists()
