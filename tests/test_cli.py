"""The command line: what it takes, what it refuses and in which words."""

import dataclasses

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
    hp = t.parse_overrides(["--logit_cap=15", "--adam_betas=(0,0.9)", "--fp8=False", "--prompt=a=b", "--steps=7"])
    assert (hp.logit_cap, hp.adam_betas, hp.fp8, hp.prompt, hp.steps) == (15.0, (0.0, 0.9), False, "a=b", 7)
    assert type(hp.logit_cap) is float and type(hp.adam_betas[0]) is float


@pytest.mark.parametrize("argument, words", [
    ("--num_step=3", ["unknown argument", "--num_heads"]),
    ("--stepss=3", ["--steps"]),
    ("--steps", ["--steps=value"]),
    ("steps=3", ["--steps=value"]),
    ("--steps=3.5", ["--steps takes", "int", "'3.5'"]),
    ("--steps=True", ["--steps takes"]),
    ("--steps=many", ["--steps takes", "'many'"]),
    ("--fp8=0", ["--fp8", "True or False"]),
    ("--fp8=yes", ["--fp8", "True or False"]),
    ("--logit_cap=1e999", ["--logit_cap takes"]),
    ("--adam_betas=(0.9,)", ["--adam_betas takes", "tuple"]),
    ("--adam_betas=0.9", ["--adam_betas takes"]),
    ("--preset=81gb", ["unknown preset", "80gb"]),
    ("--train_seq_len=1000", ["--train_seq_len", "multiple of 128", "896", "1024"]),
    ("--val_seq_len=100", ["--val_seq_len", "multiple of 128"]),
    ("--steps=0", ["--steps must be above 0"]),
    ("--val_tokens=0", ["--val_tokens must be above 0"]),
    ("--val_every=-1", ["--val_every must not be below 0"]),
    ("--model_dim=100", ["--model_dim", "multiple of 64"]),
    ("--layer_pattern=LSL", ["--layer_pattern has 3 layers", "12"]),
    ("--layer_pattern=XSSSLSS-SSSL", ["L, S and -"]),
    ("--window_min=4096", ["--window_min", "--window_max"]),
    ("--grad_comm=fp16", ["bf16 or fp8"]),
])
def test_refusals(argument, words):
    sentence = refusal(argument)
    assert all(word in sentence for word in words), sentence


def test_ranks_that_do_not_divide_the_step_name_those_that_do():
    assert "1, 2, 4, 8" in refusal(world=3)
    t.check(t.parse_overrides(["--sequences_per_step=16"]), 16)


def test_help_names_every_knob_and_preset(capsys):
    t.main(["--help"])
    text = capsys.readouterr().out
    for f in dataclasses.fields(t.Hyperparameters):
        assert f"--{f.name}=" in text and f.metadata["meaning"] in text and f.metadata["unit"] in text
    for preset in t.PRESETS:
        assert f"--preset={preset}" in text


def test_main_says_one_sentence_and_exits_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        t.main(["--step=3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
