"""Data that is not what it seems: each case is refused with one sentence and exit code 2, or read as it is meant."""

import json
import os

import numpy as np
import pytest
from tiny import make_corpus, write_shard

import train_gpt as t

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 200001024\n"


def load(folder):
    hp = t.Hyperparameters(data_dir=str(folder), batch_stages="", train_seq_len=256, val_seq_len=512, val_tokens=600,
                           steps=2, sequences_per_step=1)
    return t.load_corpus(hp, thorough=True)


def refusal(folder):
    with pytest.raises(t.Refused) as caught:
        load(folder)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def shards(folder, *names):
    """Shards by name, each of 3,000 tokens of its own: 0, 1, 2, ..."""
    folder.mkdir(exist_ok=True)
    for token, name in enumerate(names):
        write_shard(folder / name, np.full(3000, token))
    return folder


def listed(folder, *files):
    (folder / "manifest.json").write_text(json.dumps(dict(encoding="bytes", files=files)))


def read(folder):
    """The tokens of ([training shards], validation shards)."""
    corpus = load(folder)
    return [[int(shard[0]) for shard in stream.shards] for stream in (corpus.train, corpus.val)]


@pytest.mark.parametrize("names", [
    ["medieval_train_000000.bin", "medieval_val_000000.bin"], ["train.bin", "val.bin"], ["0train1.bin", "0val1.bin"],
    ["x-train-interval.bin", "x-val-strain.bin"], ["Train.1.bin", "VAL.1.bin"]])
def test_the_split_is_a_word_of_the_name(tmp_path, names):
    assert read(shards(tmp_path, *names)) == [[0], [1]]


def test_the_split_is_the_manifests_where_it_tells_one(tmp_path):
    shards(tmp_path, "train_a.bin", "train_b.bin", "books.bin", "test.bin", "more_val.bin")
    listed(tmp_path, dict(name="train_a.bin", split="val"), dict(name="train_b.bin"),
           dict(name="books.bin", split="train"), dict(name="test.bin", split="test"))
    assert read(tmp_path) == [[2, 1], [4, 0]]
    assert load(tmp_path).notes == ["test.bin is left out: it says neither train nor val"]


@pytest.mark.parametrize("make", [
    lambda old, new: new.write_bytes(old.read_bytes()), lambda old, new: new.symlink_to(old),
    lambda old, new: listed(new.parent, dict(name=f"../{new.parent.name}/{old.name}"))])
def test_the_same_tokens_twice_are_refused(tmp_path, make):
    """As training and validation, or as two of either: a copy, a link, a name that says it another way."""
    shards(tmp_path / "data", "train_0.bin", "val_0.bin")
    make(tmp_path / "data/train_0.bin", tmp_path / "data/val_1.bin")
    sentence = refusal(tmp_path / "data")
    assert "holds the same tokens as" in sentence and sentence.count("train_0.bin") + sentence.count("val_1.bin") == 2


def test_a_hash_may_have_capitals_and_must_be_text(tmp_path):
    shards(tmp_path, "train_0.bin", "val_0.bin")
    digest = load(tmp_path).facts["train"][0]["sha256"]
    listed(tmp_path, dict(name="train_0.bin", sha256=digest.upper()))
    assert load(tmp_path).facts["train"][0]["sha256"] == digest
    for other in (12345, ["a"], True):
        listed(tmp_path, dict(name="train_0.bin", sha256=other))
        assert "its manifest says" in refusal(tmp_path)


def test_names_without_the_words_are_no_shards(tmp_path):
    assert "whole words" in refusal(shards(tmp_path, "training_0.bin", "validation_0.bin"))
    shards(tmp_path, "train_0.bin", "val_0.bin")
    assert [note.split()[0] for note in load(tmp_path).notes] == ["training_0.bin", "validation_0.bin"]


def test_a_shard_of_both_splits_is_refused(tmp_path):
    sentence = refusal(shards(tmp_path, "train_0.bin", "val_0.bin", "train_val_1.bin"))
    assert "train_val_1.bin says both" in sentence
    for split in ("train", "val"):
        listed(tmp_path, dict(name="train_val_1.bin", split=split))
        assert len(read(tmp_path)[split == "val"]) == 2
    listed(tmp_path, *(dict(name="train_val_1.bin", split=split) for split in ("train", "val")))
    assert "lists train_val_1.bin twice" in refusal(tmp_path)
    listed(tmp_path, *(dict(name=f"{dot}train_val_1.bin", split="train") for dot in ("", "./")))
    assert "lists train_val_1.bin twice" in refusal(tmp_path)


@pytest.mark.parametrize("file", [
    5, "train_0.bin", {}, dict(split="train"), dict(name=5), dict(name="x.bin", split=5),
    dict(name="x.bin", split=None)])
def test_a_manifest_that_cannot_be_read_as_one(tmp_path, file):
    listed(shards(tmp_path, "train_0.bin", "val_0.bin"), file)
    assert "manifest.json cannot be used" in refusal(tmp_path)


def test_a_listed_shard_that_is_missing_is_named(tmp_path):
    make_corpus(tmp_path)
    files = [dict(name=f"train_{i:06d}.bin", split="train") for i in range(3)]
    for given in (files, [dict(name=file["name"]) for file in files]):
        listed(tmp_path, *given)
        sentence = refusal(tmp_path)
        assert f"{tmp_path / 'train_000002.bin'} is a shard by its name or by manifest.json" in sentence
        assert "No such file" in sentence


def test_a_shard_that_cannot_be_opened(tmp_path):
    shard = make_corpus(tmp_path) / "val_000000.bin"
    shard.unlink()
    shard.mkdir()
    assert "val_000000.bin is a shard" in refusal(tmp_path) and "Is a directory" in refusal(tmp_path)
    shard.rmdir()
    shard.symlink_to(tmp_path / "nowhere")
    assert "No such file" in refusal(tmp_path)
    shard.unlink()
    shard.symlink_to(shard)
    assert "symbolic links" in refusal(tmp_path)
    shard.unlink()
    write_shard(shard, np.zeros(2000))
    shard.chmod(0)
    if hasattr(os, "geteuid") and os.geteuid():
        assert "Permission denied" in refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files there")
@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/null")])
def test_a_shard_without_bytes_is_not_waited_for(tmp_path, make):
    shard = make_corpus(tmp_path) / "val_000000.bin"
    shard.unlink()
    make(shard)
    assert "val_000000.bin is not a token shard" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800.bin"])
def test_a_listed_name_that_no_file_can_have(tmp_path, name):
    listed(make_corpus(tmp_path), dict(name=name, split="train"))
    assert "cannot be read" in refusal(tmp_path)


def test_a_folder_whose_name_is_too_long():
    assert "x" * 300 in refusal("x" * 300)


@pytest.mark.parametrize("name", ["manifest.json", "val_docs.json"])
def test_a_link_that_leads_nowhere_is_no_absence(tmp_path, name):
    """Bytes would be taken for GPT-2's tokens, in silence."""
    (make_corpus(tmp_path) / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert f"{name} cannot be used" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["train_000001.bin", "val_000000.bin"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    (make_corpus(tmp_path) / name).write_bytes(POINTER)
    sentence = refusal(tmp_path)
    assert name in sentence and "Git LFS" in sentence and "git lfs pull" in sentence
