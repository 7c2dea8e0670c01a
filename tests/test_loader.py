"""Shards, streams and the thread that reads ahead."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from tiny import make_corpus, write_shard

import train_gpt as t

PLAIN = dict(batch_stages="")  # one stage


def knobs(folder, **changed):
    return dataclasses.replace(t.Hyperparameters(), data_dir=str(folder), **{
        **PLAIN, **dict(train_seq_len=256, val_seq_len=512, sequences_per_step=4, val_tokens=1200, steps=8), **changed})


def refusal(folder, **changed):
    with pytest.raises(t.Refused) as caught:
        t.load_corpus(knobs(folder, **changed), thorough=True)
    assert caught.value.code == 2
    return str(caught.value)


@pytest.mark.parametrize("damage, words", [
    (dict(magic=1), "not a token shard"),
    (dict(version=2), "not a token shard"),
    (dict(count=2**31 - 1), "should begin with 20240520 1"),
    (dict(count=-5), "should begin with 20240520 1"),
    (dict(count=499), "should begin with 20240520 1"),
])
def test_bad_headers(tmp_path, damage, words):
    make_corpus(tmp_path)
    write_shard(tmp_path / "train_000001.bin", np.arange(500) % 100, **damage)
    sentence = refusal(tmp_path)
    assert words in sentence and "train_000001.bin" in sentence


def test_other_bad_data(tmp_path):
    assert "not a folder" in refusal(tmp_path / "nowhere")
    folder = make_corpus(tmp_path / "data")
    assert "--val_tokens=1999 is the most" in refusal(folder, val_tokens=5000)
    sentence = refusal(folder, steps=100)
    assert "--epochs=10" in sentence and "enough for 10 of these steps" in sentence
    sentence = refusal(folder, batch_stages="4x256 8x512", steps=10)  # 5 x 1,024, then 5 x 4,096 of 11,000
    assert "reads 25600 tokens" in sentence and "--epochs=3" in sentence and "for 6 of" in sentence
    assert "--epochs=" in refusal(folder, steps=2**30), "and it answers at once"
    assert "has 11000 tokens, too few" in refusal(folder, train_seq_len=11008)
    good = (folder / "train_000001.bin").read_bytes()
    (folder / "train_000001.bin").write_bytes(good[:-100])
    assert "cut short" in refusal(folder)
    (folder / "train_000001.bin").write_bytes(b"")
    assert "not a token shard" in refusal(folder)
    write_shard(folder / "train_000001.bin", [5, 256])
    assert "token 256 at 1" in refusal(folder, steps=1)
    (folder / "manifest.json").unlink()
    write_shard(folder / "train_000001.bin", [5, 50257])
    assert "token 50257 at 1" in refusal(folder, steps=1)
    (folder / "val_000000.bin").unlink()
    assert "*val*.bin" in refusal(folder)


def test_manifest(tmp_path):
    folder = make_corpus(tmp_path)
    corpus = t.load_corpus(knobs(folder), thorough=True)
    hashes = {f["name"]: f["sha256"] for f in corpus.facts["train"]}
    val = (folder / "val_000000.bin").read_bytes()[1024:]
    assert corpus.facts["val_sha256"] == hashlib.sha256(val[: 2 * 1201]).hexdigest()
    assert hashes["train_000000.bin"] == hashlib.sha256((folder / "train_000000.bin").read_bytes()[1024:]).hexdigest()

    def manifest(**fields):
        (folder / "manifest.json").write_text(json.dumps({"encoding": "bytes", **fields}))

    manifest(files=[dict(name="train_000000.bin", sha256=hashes["train_000000.bin"])])
    t.load_corpus(knobs(folder), thorough=True)
    manifest(files=[dict(name="train_000000.bin", sha256="0" * 64)])
    assert "manifest says 000000000000" in refusal(folder)
    manifest(encoding="utf-16")
    assert "'utf-16'" in refusal(folder)
    (folder / "manifest.json").write_text("{")
    assert "cannot be used" in refusal(folder)


@pytest.mark.parametrize("told", [
    "", "[]", "{}", '{"sources": ["a"]}', '{"sources": ["a"], "doc_source": [0, 0, 0]}',
    '{"sources": ["a"], "doc_source": [0, 0, 0, 1]}', '{"sources": ["a"], "doc_source": [0, 0, 0, -1]}',
    '{"sources": ["a"], "doc_source": [0, 0, 0, 0.5]}', '{"sources": ["a"], "doc_source": [0, 0, 0, "a"]}',
    '{"sources": ["a"], "doc_source": {"0": 0}}', '{"sources": ["a"], "doc_source": 0}',
    '{"sources": 1, "doc_source": [0, 0, 0, 0]}', '{"sources": ["a", "a"], "doc_source": [0, 0, 1, 0]}',
    '{"sources": [["a"], ["b"]], "doc_source": [0, 1, 0, 0]}', '{"sources": null, "doc_source": [0, 0, 0, 0]}',
    '{"sources": [], "doc_source": []}', "\xff"])
def test_sources_that_cannot_be_used(tmp_path, told):
    """1,200 tokens are scored, of 4 documents."""
    folder = make_corpus(tmp_path)
    (folder / "val_docs.json").write_text(told, encoding="latin-1")
    sentence = refusal(folder)
    assert "val_docs.json" in sentence and "4 documents" in sentence and "\n" not in sentence


def test_sources_of_tokens(tmp_path):
    """The document is that of the input, and the first one may begin without its token."""
    scored = np.array([7, 7, t.EOT, 7, t.EOT, t.EOT, 7, t.EOT])
    for tokens, want in ((scored, [1, 1, 0, 0, 1, 2, 2]), (scored[2:], [1, 1, 0, 1, 1])):
        (tmp_path / "val_docs.json").write_text(json.dumps(dict(sources=["a", "b", "c"], doc_source=[1, 0, 1, 2])))
        names, found = t.read_sources(tmp_path, tokens)
        assert names == ["a", "b", "c"] and found.tolist() == want
    (tmp_path / "val_docs.json").unlink()
    assert t.read_sources(tmp_path, scored)[0] == []


def test_stream_crosses_shards_and_keeps_the_document_start():
    parts = [np.array(p, np.uint16) for p in ([1, 2, 50256], [3], [4, 5])]
    assert t.TokenStream(parts).read(1, 4).tolist() == [2, 50256, 3, 4]
    stream = t.TokenStream(parts)
    assert stream.read(0, 6).tolist() == [1, 2, 50256, 3, 4, 5] and stream.total == 6
    for start, length in ((3, 4), (-1, 2)):
        with pytest.raises(IndexError):
            stream.read(start, length)


def test_ranks_partition_every_step_and_the_stream_wraps():
    stream = t.TokenStream([np.arange(n, n + 700, dtype=np.uint16) for n in (0, 700)])
    hp = dataclasses.replace(t.Hyperparameters(), **PLAIN, train_seq_len=128, sequences_per_step=4, steps=4)
    alone = t.prefetch(stream, hp, 0, 1)
    ranks = [t.prefetch(stream, hp, rank, 2) for rank in (0, 1)]
    for step in range(4):
        firsts = [int(ids[0]) for ids, _ in next(alone)]
        assert firsts == [(step * 4 + i) % 10 * 128 for i in range(4)]  # 1,399 targets are 10 whole sequences
        dealt = [[int(ids[0]) for ids, _ in next(loader)] for loader in ranks]
        assert dealt == [firsts[0::2], firsts[1::2]]
    ids, targets = next(t.prefetch(stream, hp, 0, 1, first_step=3))[0]
    assert ids[0] == 2 * 128 and (targets[:-1] == ids[1:]).all()
    assert ids.dtype is targets.dtype is torch.int32


def random_stages(rng, steps):
    """Knobs of a run of up to four stages."""
    batches = [f"{rng.integers(1, 5)}x{128 * rng.integers(1, 4)}" for _ in range(rng.integers(1, 5))]
    return dataclasses.replace(t.Hyperparameters(), batch_stages=" ".join(batches), steps=steps)


@pytest.mark.parametrize("seed", range(30))
def test_stages_against_a_walk_written_out(seed):
    """Where each sequence begins, what was read before a step, and how often the stream was begun."""
    rng = np.random.default_rng(seed)
    hp, total = random_stages(rng, steps=int(rng.integers(4, 30))), int(rng.integers(400, 3000))
    batches = [tuple(map(int, batch.split("x"))) for batch in hp.batch_stages.split()]
    firsts = [k * hp.steps // len(batches) for k in range(len(batches))]
    place, read, passes, walked = 0, 0, 1, []
    for step in range(hp.steps):
        stage = max(k for k, first in enumerate(firsts) if first <= step)
        sequences, seq_len = batches[stage]
        assert t.stage_at(step, hp) == (firsts[stage], sequences, seq_len) and t.tokens_before(step, hp) == read
        starts = []
        for _ in range(sequences):
            if place + seq_len + 1 > total:  # with its last target
                place, passes = 0, passes + 1
            starts.append((place, seq_len))
            place, read = place + seq_len, read + seq_len
        walked.append((starts, passes))
    assert list(t.sequences(hp, total)) == walked and t.tokens_before(hp.steps, hp) == read
    assert t.count_passes(dataclasses.replace(hp, epochs=passes), total) == passes


@pytest.mark.parametrize("seed", range(5))
def test_ranks_together_read_what_one_does_and_resume_where_they_were(seed):
    stream = t.TokenStream(np.split(np.arange(9000, dtype=np.uint16), [100 * seed + 1, 5000]))
    hp = dataclasses.replace(t.Hyperparameters(), batch_stages="8x128 16x128 24x256", steps=6)
    whole = [*t.prefetch(stream, hp)]
    for world, first in ((2, 0), (4, 1), (8, 2), (8, 3), (2, 5)):
        ranks = [t.prefetch(stream, hp, rank, world, first) for rank in range(world)]
        for step in range(first, 6):
            dealt = [pair for turn in zip(*map(next, ranks)) for pair in turn]
            assert len(dealt) == len(whole[step])
            assert torch.equal(torch.stack(dealt), whole[step])


def test_ranks_partition_the_steps_of_every_stage():
    stream = t.TokenStream([np.arange(3000, dtype=np.uint16)])
    hp = dataclasses.replace(t.Hyperparameters(), batch_stages="2x128 4x256 4x128", steps=7)
    whole = list(t.prefetch(stream, hp))
    assert [[len(ids) for ids, _ in step] for step in whole] == [[128] * 2] * 2 + [[256] * 4] * 2 + [[128] * 4] * 3
    for world in (2, 4):
        hp = dataclasses.replace(hp, batch_stages=f"{world}x128 4x256 4x128")
        whole = list(t.prefetch(stream, hp))
        ranks = [list(t.prefetch(stream, hp, rank, world, first_step=1)) for rank in range(world)]
        for step in range(1, 7):
            dealt = [int(ids[0]) for i in range(len(whole[step]) // world) for ids, _ in
                     (ranks[rank][step - 1][i] for rank in range(world))]
            assert dealt == [int(ids[0]) for ids, _ in whole[step]]


def test_a_failure_of_the_thread_reaches_the_consumer_and_a_hang_has_a_deadline(monkeypatch):
    hp = dataclasses.replace(t.Hyperparameters(), **PLAIN, train_seq_len=128, sequences_per_step=1, steps=4)

    class Broken(t.TokenStream):
        def read(self, start, length):
            raise OSError("the disk is gone")

    class Hanging(t.TokenStream):
        def read(self, start, length):
            t.threading.Event().wait()

    tokens = [np.zeros(500, np.uint16)]
    with pytest.raises(t.RunEnd, match="the disk is gone") as caught:
        next(t.prefetch(Broken(tokens), hp, 0, 1))
    assert caught.value.code == 4
    monkeypatch.setattr(t, "LOADER_DEADLINE", 0.2)
    with pytest.raises(t.RunEnd, match="nothing came") as caught:
        next(t.prefetch(Hanging(tokens), hp, 0, 1))
    assert caught.value.code == 4
