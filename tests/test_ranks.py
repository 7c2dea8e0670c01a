"""1, 2, 4 and 8 ranks over gloo: they train alike, send what the plan says, in one order, and wait for a slow one.

Eight processes are started once; they form groups of 8, 4 and 2, and leave what they saw in files for the tests."""

import copy
import dataclasses
import datetime
import functools
import multiprocessing
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from reference import relative_error
from small import documents, join, plan, small_hp, small_model, trainer, window_tensor

import train_gpt as tg

STEPS, DEADLINE = 4, 240  # seconds, after which the processes are ended
COLLECTIVES = ("all_gather all_gather_into_tensor all_gather_single all_reduce all_to_all all_to_all_single broadcast "
               "reduce reduce_scatter reduce_scatter_tensor reduce_scatter_single").split()
# 11 square matrices, three of them the pointer's, and 2 of each MLP shape: shares of 2 and of 4 ranks need padding
KNOBS = dict(sequences_per_step=4, layer_pattern="LS", value_pattern="0.", late_layer=0, train_seq_len=128,
             val_seq_len=128, window_max=128)
STAGES = dict(batch_stages="4x128 8x128 4x256")
EIGHT = dict(batch_stages="8x128 16x128 8x256")
# As the default: longer sequences, then more of them; candidates until the last step; an average at the end
WHOLE = dict(batch_stages="8x128 8x256 24x128 16x256", average=1.0, sampled=3.0,
             momentum_warmup=2.0, momentum_cooldown=1.0)
STILL = dict(head_decay=0.0, table_decay=0.0, muon_decay=0.0)  # so that norms of updates are those of the change
WAYS = dict(bf16=STILL, fp8=STILL | dict(grad_comm="fp8"), stages=STAGES, eight=EIGHT, whole=WHOLE)
WORLDS = {8: ["eight", "whole"], 4: ["bf16", "fp8", "stages", "whole"], 2: ["bf16", "fp8", "stages", "whole"]}


@mock.patch.object(tg, "CANDIDATES", 200)  # of 384 rows, where a way has candidates
def scenario(way: str, rank: int = 0, world: int = 1, slow: int = -1) -> dict:
    """STEPS training steps of this rank, late by half a second if `slow`; returns what the tests look at."""
    hp = small_hp(**KNOBS, **WAYS[way], steps=STEPS, log_norms=STEPS)
    model = small_model(hp, awake=True)
    t, losses, shares = trainer(model, hp, rank, world), [], []
    optimizers, stream = t.optimizers, tg.TokenStream([t.numpy().astype("uint16") for t in documents_end_to_end()])
    loader = tg.prefetch(stream, hp, rank, world)
    for o in optimizers:
        def watch(bucket, grad, real=o.share_update):
            used = sum(tg.round_up(p.numel(), tg.SCALE_BLOCK) for p in bucket.params)
            shares.append((used, grad.detach().clone()))
            return real(bucket, grad)

        o.share_update = watch
    for step in range(STEPS):
        if rank == slow and step < 2:
            time.sleep(0.5)
        stage = tg.stage_at(step, hp)
        each = stage.sequences // world
        data = documents(dataclasses.replace(hp, train_seq_len=stage.seq_len), stage.sequences, seed=step)
        data = data[rank * each : (rank + 1) * each] if way != "whole" else next(loader)
        before = [p.detach().clone() for p in model.parameters()]
        grads = plain_gradients(hp, model, step, data) if way in ("bf16", "fp8") else None
        losses.append(t.train_step(step, data))
        assert all(len(o.squares) == 2 * (step == STEPS - 1) for o in optimizers)
    unblended = [p.detach().clone() for p in model.parameters()]
    t.blend()
    states = [item for o in optimizers for s in o.state.values() for item in s.items()]
    state = sum(t.numel() for name, t in states if name != "average")
    # all gradients leave first, in the order of the optimizers, then the updates
    calls = [[*call] for o in optimizers for call in plan(o)]
    in_turns = sorted(calls, key=lambda call: "all_gather" in call[0])
    return dict(params=[p.detach().clone() for p in model.parameters()], losses=torch.stack(losses), shares=shares,
                plan=in_turns, state=state, before=before, grads=grads,
                unblended=unblended, squares=torch.cat([o.squares for o in optimizers], 1))


def documents_end_to_end() -> list[torch.Tensor]:
    """Two shards, 8,000 and 9,000 tokens, in documents of 20 to 200."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 100, (17_000,), generator=g)
    ids[torch.randint(20, 200, (400,), generator=g).cumsum(0).clamp(max=16_999)] = tg.EOT
    ids[0] = tg.EOT
    return ids.split((8000, 9000))


def plain_gradients(hp, model, step: int, data) -> list[torch.Tensor]:
    """Of the sum of the losses of `data`, in a copy of the model."""
    twin = copy.deepcopy(model)
    t = tg.Trainer(hp, twin, [])
    t.set_schedules(step)
    twin.zero_grad()
    for pair in data:
        twin(*pair, t.window).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]


def recorded(calls: list):
    """Put a recorder in front of each collective: (name, bytes of the whole payload)."""
    def record(name, real, *args, **kwargs):
        calls.append([name, max(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))])
        return real(*args, **kwargs)

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, functools.partial(record, name, getattr(dist, name)))


def worker(rank: int, folder: str, go) -> None:
    torch.set_num_threads(1)
    calls = []
    recorded(calls)
    timeout = datetime.timedelta(seconds=60)
    for world, ways in WORLDS.items():
        if rank >= world:
            continue
        store = dist.FileStore(f"{folder}/store{world}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        for comm in ways:
            calls.clear()
            seen = scenario(comm, rank, world, slow=1)
            torch.save({**seen, "calls": list(calls)}, f"{folder}/{comm}-{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    go.wait(DEADLINE)  # all leave together: nobody's exit may disturb a neighbour


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """seen[comm, world]: what each rank of it saw."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(8)
    processes = [context.Process(target=worker, args=(rank, str(folder), barrier), daemon=True) for rank in range(8)]
    for process in processes:
        process.start()
    alone = {(comm, 1): [scenario(comm)] for comm in WAYS}
    join(processes, DEADLINE)
    load = {(comm, world): [torch.load(folder / f"{comm}-{world}-{rank}.pt") for rank in range(world)]
            for world, ways in WORLDS.items() for comm in ways}
    return alone | load


def gradients(ranks, step=0):
    """The summed gradient of each bucket in a step, put together from the shares of the ranks."""
    count = len(ranks[0]["shares"]) // STEPS
    parts = zip(*(r["shares"][step * count : (step + 1) * count] for r in ranks))
    return [torch.cat([share.float() for _, share in bucket])[: bucket[0][0]] for bucket in parts]


def movement(seen, key):
    """How far each matrix went, and all that is less in one vector: a gate alone may owe its way to roundings."""
    start = small_model(small_hp(**KNOBS), awake=True)
    return joined([p - q.detach() for p, q in zip(seen[key][0]["params"], start.parameters())])


def joined(tensors):
    """The large ones, and at the end one vector of all that is less, if anything is."""
    large, few = ([t for t in tensors if (t.count_nonzero() > 1000) == much] for much in (True, False))
    return large + ([torch.cat([t.flatten() for t in few])] if few else [])


@pytest.mark.parametrize("comm,world", [("bf16", 2), ("bf16", 4), ("fp8", 2), ("fp8", 4), ("eight", 8), ("whole", 2),
                                        ("whole", 4), ("whole", 8)])
def test_all_ranks_hold_the_same_bits(seen, comm, world):
    first, *others = (rank["params"] for rank in seen[comm, world])
    for params in others:
        assert all(torch.equal(a, b) for a, b in zip(first, params))
    shares = [sum(share.numel() for _, share in rank["shares"]) for rank in seen[comm, world]]
    assert len(set(shares)) == 1 and shares[0] < 0.65 * sum(s.numel() for _, s in seen[comm, 1][0]["shares"])
    assert all(rank["state"] < 0.65 * seen[comm, 1][0]["state"] for rank in seen[comm, world]), "state is sharded"
    blended = [not torch.equal(a, b) for a, b in zip(seen[comm, world][0]["unblended"], first)]
    assert any(blended) == (comm == "whole")


@pytest.mark.parametrize("world", [2, 4])
def test_bf16_trains_alike_on_any_count_of_ranks(seen, world):
    ranks, alone = seen["bf16", world], seen["bf16", 1]
    for a, b in zip(gradients(ranks), gradients(alone)):
        assert b.any() and relative_error(a, b) < 8e-3  # a few roundings of 2^-9
    total = sum(rank["losses"] for rank in ranks)
    assert torch.allclose(total, alone[0]["losses"], atol=2e-3) and total[-1] < total[0] - 0.1
    for a, b in zip(movement(seen, ("bf16", world)), movement(seen, ("bf16", 1))):
        # Adam's first steps are signs, which a rounding may flip; Muon lifts the smallest directions, which roundings
        # decide. The gradients above are compared more strictly.
        assert b.any() and relative_error(a, b) < 0.15


@pytest.mark.parametrize("way, world", [("stages", 2), ("stages", 4), ("eight", 8), ("whole", 2), ("whole", 4),
                                        ("whole", 8)])
def test_stages_train_alike_on_any_count_of_ranks(seen, way, world):
    """Steps of 4 x 128, of 8 x 128, and two of 4 x 256 tokens; of twice as many sequences for eight ranks. And steps of
    8 and 16 sequences of documents, as `tg.prefetch` deals them, with all that the default does besides."""
    ranks, alone = seen[way, world], seen[way, 1]
    for step in range(STEPS):
        for a, b in zip(joined(gradients(ranks, step)), joined(gradients(alone, step))):
            # sums of more and more different weights: a rounding in a step is met again in the next
            assert b.any() and relative_error(a, b) < (8e-3 if step == 0 else 0.05)
    gap = (sum(rank["losses"] for rank in ranks) - alone[0]["losses"]).abs().max()
    assert gap < (2e-3 if way != "eight" else 5e-3)
    for a, b in zip(movement(seen, (way, world)), movement(seen, (way, 1))):
        assert b.any() and relative_error(a, b) < 0.15
    assert not torch.equal(alone[0]["losses"], seen["bf16", 1][0]["losses"])


def test_fp8_on_four_ranks_rounds_and_no_more(seen):
    pairs = [*zip(gradients(seen["fp8", 4]), gradients(seen["bf16", 4]))]
    assert all(relative_error(a, b) < 0.07 for a, b in pairs)
    # a bucket of small tensors may be lucky, where a few scalars are most of it
    large = [(a, b) for a, b in pairs if b.count_nonzero() > 1000]
    assert all(relative_error(a, b) > 0.01 for a, b in large) and len(large) > 3, "and it is FP8"


@pytest.mark.parametrize("world", [2, 4])
def test_fp8_rounds_once_what_each_rank_sends(seen, world):
    hp = small_hp(**KNOBS, grad_comm="fp8")
    model, data, want = small_model(hp, awake=True), documents(hp, hp.sequences_per_step), 0.0
    buckets = [b for o in tg.build_optimizers(model, hp) for b in o.buckets]
    each = hp.sequences_per_step // world
    for first in range(0, hp.sequences_per_step, each):
        model.zero_grad()
        for ids, targets in data[first : first + each]:
            model(ids, targets, window_tensor(1)).backward()
        want += torch.cat([tg.dequantize_e5m2(*tg.quantize_e5m2(b.pack())) for b in buckets])
    assert relative_error(torch.cat(gradients(seen["fp8", world])), want) < 1e-6


@pytest.mark.parametrize("comm", ["bf16", "fp8"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_norms_are_those_of_the_summed_gradients_and_of_the_change_of_the_weights(seen, comm, world):
    """Of the last step, kind by kind, however the shares of the ranks lie."""
    ranks = seen[comm, world]
    model = small_model(small_hp(**KNOBS), awake=True)
    groups = [group for o in tg.build_optimizers(model, small_hp(**KNOBS)) for group in o.param_groups]
    kinds = {p: group["name"] for group in groups for p in group["params"]}
    assert [group["name"] for group in groups] == [
        "matrices", "scalars", "mixes", "skip_weights", "embed", "value_embeds", "bigrams", "down"]
    outcome = tg.Outcome(torch.tensor(1.5), False, 1, [SimpleNamespace(squares=sum(rank["squares"] for rank in ranks))])
    loss, stop, squares = outcome.wait()
    assert (loss, stop, len(squares)) == (1.5, False, 2 * len(groups))
    for group, grad, update in zip(groups, squares[::2], squares[1::2]):
        own = [i for i, p in enumerate(model.parameters()) if kinds[p] == group["name"]]
        want = torch.cat([sum(rank["grads"][i] for rank in ranks).flatten() for i in own]).double().norm()
        assert grad**0.5 == pytest.approx(float(want), rel=0.008 if comm == "bf16" else 0.03), group["name"]
        moved = torch.cat([(ranks[0]["before"][i] - ranks[0]["params"][i]).flatten() for i in own]).double().norm()
        assert 0 < update**0.5 == pytest.approx(float(moved), rel=1e-3), group["name"]


@pytest.mark.parametrize("comm", ["bf16", "fp8"])
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_sent_is_the_plan_in_one_order_on_every_rank(seen, comm, world):
    ranks = seen[comm, world]
    for rank in ranks:
        assert rank["calls"] == ranks[0]["calls"] and len(rank["calls"]) == STEPS * len(rank["plan"])
        assert rank["calls"] == STEPS * rank["plan"]
    kinds = {kind for kind, _ in ranks[0]["plan"]}
    assert kinds == {"all_gather_into_tensor", "all_to_all_single" if comm == "fp8" else "reduce_scatter_tensor"}
    total = {c: sum(size for _, size in seen[c, world][0]["plan"]) for c in ("bf16", "fp8")}
    assert total["fp8"] < 0.78 * total["bf16"]
