"""The command line: what it takes, what it refuses and in which words."""

import dataclasses
import re

import pytest

import train_gpt as t


def refusal(*argv, world=1):
    with pytest.raises(t.Refused) as caught:
        t.check(t.parse_overrides(list(argv)), world)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_full_run_and_pass():
    assert t.parse_overrides([]) == t.Hyperparameters()
    for world in (1, 2, 4, 8):
        t.check(t.Hyperparameters(), world)


@pytest.mark.parametrize("preset", t.PRESETS)
def test_presets_pass(preset):
    t.check(t.parse_overrides([f"--preset={preset}"]), 1)


def test_explicit_knobs_win_over_a_preset_in_any_order():
    for argv in (["--preset=24gb", "--train_seq_len=1280"], ["--train_seq_len=1280", "--preset=24gb"]):
        hp = t.parse_overrides(argv)
        assert hp.train_seq_len == 1280 and hp.val_seq_len == t.PRESETS["24gb"]["val_seq_len"]


def test_types():
    hp = t.parse_overrides(["--logit_cap=15", "--head_betas=(0,0.9)", "--fp8=False", "--resume=a=b", "--steps=7"])
    assert (hp.logit_cap, hp.head_betas, hp.fp8, hp.resume, hp.steps) == (15.0, (0.0, 0.9), False, "a=b", 7)
    assert type(hp.logit_cap) is float and type(hp.head_betas[0]) is float


@pytest.mark.parametrize("argument, words", [
    ("--num_step=3", ["unknown argument", "--num_heads"]),
    ("--stepss=3", ["--steps"]),
    ("--steps", ["--steps=value"]),
    ("steps=3", ["--steps=value"]),
    ("--steps=3.5", ["--steps takes", "int", "'3.5'"]),
    ("--steps=True", ["--steps takes"]),
    ("--steps=many", ["--steps takes", "'many'"]),
    ("--fp8=0", ["--fp8", "--fp8=True"]),
    ("--fp8=yes", ["--fp8", "--fp8=True"]),
    ("--logit_cap=1e999", ["--logit_cap takes"]),
    ("--logit_cap=200", ["--logit_cap=200", "87 is the greatest"]),
    ("--logit_cap=1000", ["--logit_cap=1000", "fp32"]),
    ("--logit_cap=87.01", ["--logit_cap=87.01", "87 is the greatest"]),
    ("--log_norms=-1", ["--log_norms=-1 is too small"]),
    ("--head_betas=(0.9,)", ["--head_betas takes", "tuple"]),
    ("--head_betas=0.9", ["--head_betas takes"]),
    ("--head_betas=0.9,x", ["--head_betas takes", "tuple", "({},{})".format(*t.Hyperparameters().head_betas)]),
    ("--head_betas=0.9,1.0", ["--head_betas", "below 1"]),
    ("--table_betas=-0.1,0.9", ["--table_betas", "below 1"]),
    ("--scalar_betas=0.9,1", ["--scalar_betas", "below 1"]),
    ("--late_layer=99", ["--late_layer=99", "layers"]),
    ("--bigram_dim=1000", ["--bigram_dim=1000", "--model_dim=768"]),
    ("--bigram_rows=0", ["--bigram_rows=0 is too small"]),
    ("--average=-1", ["--average=-1.0 is too small"]),
    ("--mixed_layers=3 11", ["--mixed_layers", "layers"]),
    ("--mixed_layers=1.5", ["--mixed_layers", "layers"]),
    ("--seed=99999999999999999999", ["--seed takes"]),
    ("--window_max=1000000000000", ["--window_max takes"]),
    ("--preset=81gb", ["unknown preset", "80gb"]),
    ("--train_seq_len=1000", ["--train_seq_len", "multiple of 128", "1000"]),
    ("--val_seq_len=100", ["--val_seq_len", "multiple of 128"]),
    ("--steps=0", ["--steps=0 is too small"]),
    ("--val_tokens=0", ["--val_tokens=0 is too small"]),
    ("--val_every=-1", ["--val_every=-1 is too small"]),
    ("--model_dim=100", ["--model_dim", "multiple of 64"]),
    ("--layer_pattern=LSL", ["--layer_pattern", "'LSL' and '.01....234'"]),
    ("--layer_pattern=XSSSLSSSSL", ["L and S"]),
    ("--window_min=4096", ["--window_min", "--window_max"]),
    ("--grad_comm=fp16", ["bf16 or fp8"]),
    ("--weights=latest", ["unknown argument"]),
    ("--batch_stages=8x128 16", ["--batch_stages", "SEQUENCESxTOKENS"]),
    ("--batch_stages=8x128,16x128", ["--batch_stages", "SEQUENCESxTOKENS"]),
    ("--batch_stages=0x128", ["--batch_stages", "SEQUENCESxTOKENS"]),
    ("--batch_stages=8x128 8x130",
     ["--batch_stages: 130 tokens", "multiple of 128"]),
])
def test_refusals(argument, words):
    sentence = refusal(*argument.split("|"))
    assert all(word in sentence for word in words), sentence


def test_ranks_that_do_not_divide_the_step_name_those_that_do():
    assert "divisors of 8" in refusal(world=3)
    assert "divisors of 1000000000" in refusal("--sequences_per_step=1000000000", world=3)
    t.check(t.parse_overrides(["--sequences_per_step=16"]), 16)


def test_ranks_must_divide_every_stage():
    argument = "--batch_stages=4x128 8x256 12x128"
    assert "divisors of 4" in refusal(argument, world=8) and argument in refusal(argument, world=8)
    t.check(t.parse_overrides([argument]), 4)
    assert "--steps=2" in refusal(argument, "--steps=2")
    assert "3 --batch_stages" in refusal(argument, "--steps=2")


def test_both_forms_of_a_batch_are_refused_and_a_preset_gives_way(monkeypatch):
    stages = "--batch_stages=4x128 8x256"
    for plain in ("--train_seq_len=128", "--sequences_per_step=4"):
        assert plain.partition("=")[0] in refusal(stages, plain) and "--batch_stages" in refusal(stages, plain)
    hp = t.parse_overrides(["--preset=24gb", stages])
    assert [tuple(s) for s in t.stages(hp)] == [(0, 4, 128), (hp.steps // 2, 8, 256)]
    monkeypatch.setitem(t.PRESETS, "staged", dict(batch_stages="4x128 8x256"))
    assert len(t.stages(t.parse_overrides(["--preset=staged"]))) == 2
    alone = t.parse_overrides(["--preset=staged", "--train_seq_len=1280"])
    assert [tuple(s) for s in t.stages(alone)] == [(0, alone.sequences_per_step, 1280)]


def test_what_may_be_zero_is_what_has_an_off_value_or_a_rate():
    """The list is data of its own: it must agree with what the knobs say of themselves."""
    names = {*notes()}
    assert {*t.MAY_BE_ZERO} <= names
    for name, (_, unit, meaning) in notes().items():
        if "0 = " in meaning or unit == "lr":
            assert name in t.MAY_BE_ZERO, name
    assert set(t.FIXED) <= names and set(t.PLACES) <= set(t.ASIDE) <= names
    assert set(t.ASIDE) - {"data_dir"} == {name for name, (group, *_) in notes().items() if group == "run"} - {"seed"}
    t.check(t.parse_overrides(["--logit_cap=87"]), 1)
    assert set(t.FIXED) >= {name for name, (group, *_) in notes().items() if group == "model"}


def notes():
    """{knob: (group, unit, meaning)} as --help shows them."""
    found, group = {}, ""
    for row in t.help_text().partition("\npresets")[0].splitlines()[1:]:
        knob = re.fullmatch(r"  --(\w+)=.*? +\[(.*?)\] (.*)", row)
        if knob:
            found[knob[1]] = group, knob[2], knob[3]
        group = group if knob or not row else row
    return found


def test_help_names_every_knob_and_preset(capsys):
    t.main(["--help"])
    text = capsys.readouterr().out
    assert text == t.help_text() + "\n" and [*notes()] == [f.name for f in dataclasses.fields(t.Hyperparameters)]
    for group, unit, meaning in notes().values():
        assert group and unit and len(meaning) > 10
    for preset in t.PRESETS:
        assert f"--preset={preset}" in text


def test_main_says_one_sentence_and_exits_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        t.main(["--step=3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
