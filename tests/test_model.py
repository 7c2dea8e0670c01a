"""The model and its schedules: end points, causality, the loss, the U-Net's wiring, and one batch learned by heart."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from reference import EOT, SlowAdam, copied, features, relative_error, rotated
from small import ROWS, documents, small_hp, small_model, trainer, window_tensor

import train_gpt as tg

# ---- Schedules


def test_the_window_grows_from_one_block_to_fourteen():
    windows = [tg.window_scheduler(step, 1770) for step in range(1771)]
    assert windows[0] == 1 and windows[1] == 2 and windows[-1] == 14 and windows == sorted(windows)
    assert set(windows) == set(range(1, 15))
    tokens = [128 + (1792 - 128) * step / 1770 for step in range(1771)]
    assert all(128 * (w - 1) < t <= 128 * w + 1e-6 for w, t in zip(windows, tokens))
    record_21 = [max(1, math.ceil(1728 * step / 1770 / 128)) for step in range(1772)]
    windows = [tg.window_scheduler(step, 1770, 1, 1728) for step in range(1771)]
    assert all(ours in theirs for ours, theirs in zip(windows, zip(record_21, record_21[1:]))), "at most a step earlier"
    assert {tg.window_scheduler(step, 10, 512, 512) for step in range(11)} == {4}, "equal ends: no schedule"
    assert [tg.window_scheduler(step, 2, 100, 300) for step in range(3)] == [1, 2, 3]


def test_spans_are_fractions_up_to_one_and_counts_above():
    assert tg.span(0.4, 200) == 80 and tg.span(1, 200) == 200 and tg.span(80, 200) == 80 and tg.span(0, 200) == 0
    for fraction, count in ((0.4, 80), (0.15, 30)):
        pair = [small_hp(steps=200, cooldown=length, momentum_warmup=length) for length in (fraction, count)]
        for step in range(201):
            assert tg.lr_at(step, pair[0]) == pytest.approx(tg.lr_at(step, pair[1]))
            assert tg.momentum_at(step, pair[0]) == pytest.approx(tg.momentum_at(step, pair[1]))


def test_learning_rate_and_momentum_at_their_end_points():
    hp = small_hp(steps=1770)
    rates = {step: tg.lr_at(step, hp) for step in (0, 1062, 1063, 1416, 1769, 1770)}
    assert rates[0] == rates[1062] == 1 > rates[1063] and rates[1416] == pytest.approx(0.55)
    assert rates[1770] == pytest.approx(0.1) and 0.1 < rates[1769] < 0.102
    warm = dataclasses.replace(hp, momentum_warmup=300 / 1770)
    momenta = {step: tg.momentum_at(step, warm) for step in (0, 150, 300, 1769)}
    assert momenta == pytest.approx({0: 0.85, 150: 0.9, 300: 0.95, 1769: 0.95})
    off = small_hp(cooldown=0.0, momentum_warmup=0.0)
    assert {tg.lr_at(step, off) for step in range(21)} == {1.0}
    assert {tg.momentum_at(step, off) for step in range(21)} == {0.95}


def test_momentum_warms_up_and_cools_down():
    hp = small_hp(steps=1285, momentum_warmup=300.0, momentum_cooldown=50.0)
    momenta = {step: tg.momentum_at(step, hp) for step in (0, 150, 300, 1234, 1235, 1260, 1284)}
    assert momenta == pytest.approx({0: 0.85, 150: 0.9, 300: 0.95, 1234: 0.95, 1235: 0.95, 1260: 0.9, 1284: 0.852})
    for step in range(41):  # spans that overlap: the lower one counts
        up, down = min(step / 30, 1), min((40 - step) / 20, 1)
        short = small_hp(steps=40, momentum_warmup=0.75, momentum_cooldown=20.0)
        assert tg.momentum_at(step, short) == pytest.approx(0.85 + 0.1 * min(up, down))


def test_rates_go_with_the_root_of_the_tokens_of_a_step():
    hp = small_hp(steps=10, batch_stages="1x128 2x128 2x256", lr_batch=128, cooldown=4.0)
    assert [tuple(stage) for stage in tg.stages(hp)] == [(0, 1, 128), (3, 2, 128), (6, 2, 256)]
    rates = [1, 1, 1, 2**0.5, 2**0.5, 2**0.5] + [2 * share for share in (1, 0.775, 0.55, 0.325)]
    assert [tg.lr_at(step, hp) for step in range(10)] == pytest.approx(rates)
    any_batch = dataclasses.replace(hp, lr_batch=0)
    assert [tg.lr_at(step, any_batch) for step in (0, 3, 6)] == [1, 1, 1]
    whole, eighth = tg.Hyperparameters(), tg.parse_overrides(["--preset=eighth"])
    for step in (0, 400, 800, 1292):
        assert tg.lr_at(step, whole) == pytest.approx(8**0.5 * tg.lr_at(step, eighth))


def test_a_short_run_is_a_scaled_run():
    long = small_hp(steps=1770, momentum_warmup=300 / 1770)
    short = dataclasses.replace(long, steps=177)
    for step in range(178):
        assert tg.lr_at(step, short) == pytest.approx(tg.lr_at(10 * step, long))
        assert tg.momentum_at(step, short) == pytest.approx(tg.momentum_at(10 * step, long))
        assert tg.window_scheduler(step, 177) == tg.window_scheduler(10 * step, 1770)


def test_a_step_sets_window_learning_rate_and_momentum():
    hp = small_hp(steps=10, layer_pattern="SS", value_pattern="..", window_min=128, window_max=512)
    model = small_model(hp)
    t = trainer(model, hp)
    muon, adam, down = t.optimizers
    for step in (0, 7, 9):
        t.train_step(step, documents(hp, 2))
        assert int(t.window) == tg.window_scheduler(step, 10, 128, 512)
        lrs = hp.muon_lr, hp.scalar_lr, hp.mix_lr, hp.skip_lr, hp.head_lr, hp.table_lr, hp.muon_lr * hp.down_scale
        found = [float(group["lr"]) for o in t.optimizers for group in o.param_groups]
        assert found == pytest.approx([lr * tg.lr_at(step, hp) for lr in lrs], rel=1e-6)  # fp32
        momenta = [float(group["momentum"]) for group in muon.param_groups + down.param_groups]
        assert momenta == pytest.approx([tg.momentum_at(step, hp)] * 2, rel=1e-6)
        assert all(p.grad is None for p in model.parameters())


# ---- Loss and head


def test_the_loss_at_the_start_is_that_of_guessing():
    hp = small_hp()
    model = small_model(hp)
    (ids, targets), = documents(hp, 1)
    guess = model.losses(model.features(ids, window_tensor(2)), torch.zeros(256), targets).mean().item()
    assert guess == pytest.approx(math.log(ROWS), abs=5e-3), "of a small head"
    assert guess - 0.05 < model(ids, targets, window_tensor(2)).item() < guess, "and copying helps at once"
    logits = model.logits(torch.zeros(3, 64))
    assert torch.allclose(logits, torch.full((3, ROWS), 30 / (1 + math.exp(-5 / 7.5))), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])  # in the last the cap binds on both sides
def test_the_fast_loss_is_cross_entropy_with_its_gradients(scale):
    model = small_model(small_hp(), awake=True)
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(50, 64, generator=g) * scale).requires_grad_()
    targets = torch.randint(0, 257, (50,), generator=g)
    targets[:3] = torch.tensor([0, 255, 256])
    ignored = targets.clone()
    ignored[::7] = -100
    z = F.linear(x, model.lm_head.weight).double()
    logits = 30 * torch.sigmoid((z + 5) / 7.5)
    assert relative_error(model.logits(x), logits) < 1e-6
    for t, found in ((targets, torch.zeros(50)), (ignored, torch.zeros(50)), (ignored, torch.rand(50, generator=g))):
        found = torch.where(t < 0, 0, found).requires_grad_()  # of the share of nobody's row, 257
        shares = logits.softmax(1)
        want = -(shares[torch.arange(50), t.clamp(min=0)] + found * shares[:, 257]).log() * (t >= 0)
        ours = model.losses(x, found, t)
        assert torch.allclose(ours.double(), want, atol=1e-5) and ours.dtype == torch.float32
        weight = torch.rand(50, generator=g)
        inputs = (x, model.lm_head.weight, found)
        got = torch.autograd.grad((ours * weight).sum(), inputs)
        for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs, retain_graph=True)):
            assert relative_error(a, b) < 1e-4
    plain = F.cross_entropy(logits, ignored, reduction="none", ignore_index=-100)
    assert torch.allclose(model.losses(x, torch.zeros(50), ignored).double(), plain, atol=1e-5)
    assert not ours[::7].any() and ours[1:7].all()


@pytest.mark.parametrize("reach", [1, 128, 256, 300, 10_000])
def test_the_pointer_is_the_one_written_out(reach):
    """With gradients, against float64 token by token; over the border of two slices of dense attention too."""
    hp, length = small_hp(copy_reach=reach, attn_scale=0.5), 640
    pointer = small_model(hp, awake=True).pointer
    g = torch.Generator().manual_seed(3)
    x = tg.norm(torch.randn(length, 64, generator=g)).requires_grad_()
    ids = torch.randint(0, 5, (length + 1,), generator=g)
    ids[[0, 1, 190, 191, 333]] = EOT
    ids, targets = ids[:-1].int(), ids[1:]
    inputs, weight = [x, *pointer.parameters()], torch.randn(length, generator=g)
    ours = with_gradients(pointer(x, ids, targets), inputs, weight)
    found = copied(pointer, x, ids, targets, 0.5, reach // 128 * 128 or length)
    for got, want in zip(ours, with_gradients(found, inputs, weight)):
        assert want.any() and relative_error(got, want) < 1e-4
    assert not pointer(x, ids, torch.full_like(targets, -100)).any(), "what is not scored is never found"


def test_the_pointer_sees_its_document_so_far_and_of_the_one_before_only_its_end():
    """What its last token's features hold goes into the key of the next document's first token, and no other."""
    hp = small_hp(train_seq_len=512, layer_pattern="SSSS", window_max=512)
    model = small_model(hp, awake=True)
    ids = torch.randint(0, 100, (512,), generator=torch.Generator().manual_seed(3)).int()
    ids[0] = ids[200] = EOT
    found = []
    for changed in (None, 150):
        if changed:
            ids[changed] = 101
        with torch.no_grad():
            whole = copy_weights(model.pointer, model.features(ids, window_tensor(4)), ids)
        document = (torch.arange(512) >= 200).int()
        reach = torch.arange(512)[None] // 128 > torch.arange(512)[:, None] // 128 - 2
        assert (whole > 0).equal((document[:, None] == document[None]).tril() & reach)
        found.append(whole)
    later = [w[201:, 201:] / w[201:, 201:].sum(1, keepdim=True) for w in found]
    assert torch.allclose(*later, atol=1e-6) and not torch.allclose(found[0][201:264], found[1][201:264], atol=1e-6)


def copy_weights(pointer, x, ids):
    """What each token weighs for each, (T, T): the share that `Pointer` finds where that token alone is the target."""
    marks = torch.arange(len(ids), dtype=ids.dtype)
    q, k, mask = pointer.scored(x, ids)
    with mock.patch.object(pointer, "scored", lambda *_: (q, k, mask)):
        return torch.stack([pointer(x, marks, torch.full_like(marks, at)) for at in range(len(ids))], 1)


def test_all_tokens_and_nobodys_row_have_a_probability_of_one():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    with torch.no_grad():
        x = model.features(ids, window_tensor(2))
        weights = copy_weights(model.pointer, x, ids)
        tokens = torch.tensor([*range(256), EOT])
        for at in (0, 63, 200, 255):
            own = weights[at]
            found = ((ids == tokens[:, None]) * own).sum(1)
            likely = (-model.losses(x[at : at + 1].expand(257, -1), found, tokens)).exp()
            share, *unused = model.logits(x[at : at + 1]).softmax(1)[0, 257:].tolist()
            assert likely.sum().item() + sum(unused) + share * (1 - own.sum().item()) == pytest.approx(1, abs=1e-5)
            assert share > 0 and 0 < own.sum() < 1 and found.max() > 0


@pytest.mark.parametrize("z", [-1e4, -40.0, 0.0, 40.0, 1e4])
def test_the_fast_loss_is_exact_up_to_the_greatest_legal_cap(z):
    """Where all logits are near 0, exp(logit - cap) is smallest; where all are near the cap, its sum is largest."""
    hp = small_hp(logit_cap=87.0)
    tg.check(hp, 1)
    assert math.exp(-hp.logit_cap) > torch.finfo(torch.float32).tiny
    model = small_model(hp, awake=True)
    scores = (z + torch.randn(20, 384, generator=torch.Generator().manual_seed(3))).requires_grad_()
    model.lm_head.forward = lambda x, rows: x
    targets = torch.arange(20)
    want = F.cross_entropy(87 * torch.sigmoid((scores.double() + 5) / 7.5), targets, reduction="none")
    ours = model.losses(scores, torch.zeros(20), targets)
    assert torch.allclose(ours.double(), want, atol=5e-5), (ours - want).abs().max()
    got, exact = (torch.autograd.grad(losses.sum(), scores)[0] for losses in (ours, want))
    assert torch.allclose(got, exact, atol=1e-6) and (exact.any() or abs(z) > 100)


def test_candidates_are_all_targets_and_others_that_stand_for_the_rest(monkeypatch):
    """Over all strides each other row is there equally often, so that the mean of their sum is that of all rows."""
    model = small_model(small_hp(), awake=True)
    needed, counts = {5, 10, 15, 256, 257}, torch.zeros(ROWS)
    monkeypatch.setattr(tg, "CANDIDATES", 220)
    for turn in range(ROWS):  # the sum of the targets decides where a stride begins; here by 5 each turn
        targets = torch.full((204,), 5)
        targets[:4] = torch.tensor([5, 10, 15, EOT])
        targets[4 : 4 + turn // 2] = 15
        targets[-1] += 5 * (turn % 2)
        rows, weights = model.candidates(targets)
        assert len(rows) == len(rows.unique()) == 220 and weights.sum().item() == pytest.approx(ROWS, rel=1e-5)
        assert set(rows[weights == 1].tolist()) == needed
        counts[rows] += 1
    assert all(torch.equal(a, b) for a, b in zip((rows, weights), model.candidates(targets)))
    rest = [row for row in range(ROWS) if row not in needed]
    assert counts[list(needed)].eq(ROWS).all()
    assert counts[rest].max() - counts[rest].min() <= 5, "equal but for the few that the needed ones displace"
    monkeypatch.setattr(tg, "CANDIDATES", 1000)
    rows, weights = model.candidates(torch.arange(257).repeat(2))
    assert sorted(rows.tolist()) == list(range(ROWS)) and weights.eq(1).all(), "all, where there is room"


def test_the_loss_over_candidates_is_the_one_written_out(monkeypatch):
    monkeypatch.setattr(tg, "CANDIDATES", 144)
    hp = small_hp(train_seq_len=128)
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    rows, weights = model.candidates(targets)
    assert 128 < len(rows) < ROWS and weights.max() > 1
    x = (3 * torch.randn(128, 64, generator=torch.Generator().manual_seed(4))).requires_grad_()
    found = torch.rand(128, generator=torch.Generator().manual_seed(5)).requires_grad_()
    shares = weights * torch.exp(30 * torch.sigmoid((F.linear(x, model.lm_head.weight).double()[:, rows] + 5) / 7.5))
    place = (rows == targets.clamp(max=256)[:, None]).int().argmax(1)
    copies = shares[:, (rows == 257).int().argmax()]
    want = (shares.sum(1) / (shares[torch.arange(128), place] + found * copies)).log()
    inputs = x, found, model.lm_head.weight
    ours = model.losses(x, found, targets, rows, weights)
    assert torch.allclose(ours.double(), want, atol=1e-5)
    for got, exact in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(want.sum(), inputs)):
        assert exact.any() and relative_error(got, exact) < 1e-4
    assert model(ids, targets, window_tensor(2), True) != model(ids, targets, window_tensor(2))
    without = torch.isin(targets.clamp(max=256), rows[:40], invert=True)
    scored = model.losses(x, torch.zeros(128), targets, rows[:40], weights[:40])
    assert without.any() and torch.equal(scored.isinf(), without), "a target without room is no other row"


def test_the_mean_over_the_sequence_is_returned():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    x = model.features(ids, window_tensor(2))
    each = model.losses(x, model.pointer(x, ids, targets), targets)
    assert each.shape == (256,) and each.std() > 0.1
    assert model(ids, targets, window_tensor(2)).item() == pytest.approx(each.mean().item(), rel=1e-6)


def test_the_document_token_of_a_byte_model_is_row_256():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    assert EOT in ids and 256 not in ids
    x = model.features(ids, window_tensor(2))
    embeds = [model.embed, *model.value_embeds.values()]
    grads = torch.autograd.grad((x * targets[:, None]).sum(), [e.weight for e in embeds])
    for grad in grads:
        assert grad[256].any() and not grad[257:].any() and not grad[100:256].any()
    ends = torch.full((256,), EOT)
    none = torch.zeros(256)
    assert torch.equal(model.losses(x, none, ends), model.losses(x, none, torch.full((256,), 256)))
    with torch.device("meta"):
        assert tg.GPT(hp, 50304).last_row == EOT, "a GPT-2 model reads it as it is"


# ---- Who sees whom


def every_loss(model, ids, blocks, pointing=False):
    """Loss of each position for a fixed target, so that only the inputs tell."""
    targets = torch.full((len(ids),), 7)
    with torch.no_grad():
        x = model.features(ids, window_tensor(blocks))
        return model.losses(x, pointing * model.pointer(x, ids, targets), targets)


@pytest.mark.parametrize("pattern, pointing", [("SSSS", False), ("LSSS", False), ("SSSS", True)])
def test_no_later_token_moves_a_loss_and_other_documents_only_by_their_last_token(pattern, pointing):
    """Smearing, bigrams and, of long layers and the pointer, keys read the token before, be it another document's."""
    hp = small_hp(train_seq_len=512, window_max=512, layer_pattern=pattern)
    model = small_model(hp, awake=True)
    ids = torch.randint(0, 100, (512,), generator=torch.Generator().manual_seed(3)).int()
    ids[0] = ids[200] = EOT
    before = every_loss(model, ids, 4, pointing)
    for place, document in ((50, 200), (199, 200), (201, 512), (300, 512), (511, 512)):
        changed = ids.clone()
        changed[place] = 101
        moved = (every_loss(model, changed, 4, pointing) - before).abs() > 1e-6
        assert moved[place] and not moved[:place].any(), place
        assert moved[place:document].float().mean() > 0.9, "what may move it does"
        if place == 199:
            assert moved[200:].any()
        elif "L" not in pattern and not pointing:
            assert not moved[document:].any(), place


def test_the_window_limits_how_far_a_layer_looks():
    ids = torch.randint(0, 100, (1024,), generator=torch.Generator().manual_seed(4)).int()
    changed = ids.clone()
    changed[5] = 101

    def moved(model, blocks):
        return (every_loss(model, changed, blocks) - every_loss(model, ids, blocks)).abs() > 1e-6

    for pattern, blocks, reach in (("L", 2, 2), ("S", 2, 1), ("S", 4, 2)):
        hp = small_hp(train_seq_len=1024, val_seq_len=1024, layer_pattern=pattern, value_pattern=".", late_layer=0,
                      mixed_layers="0", window_max=1024)
        model = small_model(hp, awake=True)
        places = moved(model, blocks)
        assert not places[128 * reach :].any() and places[128 * reach - 128 : 128 * reach].any()
        with torch.no_grad():  # without attention: what smear, bigrams and pointer reach
            model.blocks[0].attn.out.zero_()
        assert moved(model, blocks).nonzero().tolist() == [[5], [6]]


# ---- The wiring


def test_rotary_is_a_complex_rotation_of_half_of_the_pairs():
    x = torch.randn(300, 3, 32, generator=torch.Generator().manual_seed(0))
    rotary = tg.Rotary(32, 512, 1024.0)
    assert (rotary(x) - torch.stack([rotated(head, 1024.0) for head in x.unbind(1)], 1)).abs().max() < 2e-4
    assert rotary(x.bfloat16()).dtype == torch.bfloat16 and not rotary.state_dict()
    assert torch.equal(rotary(x)[0], x[0])


@pytest.mark.parametrize("pattern, values, late", [
    ("LSSS", "0..0", 1), ("SLS", "0.1", 0), ("LL", "..", 0), ("SSSLSSSSSL", ".01....234", 6), ("SSL", ".00", 1)])
def test_the_model_is_the_one_written_out(pattern, values, late):
    """Features and the gradients of all parameters, against float64 layer by layer."""
    mixed = " ".join(map(str, range(0, len(pattern), 2)))
    hp = small_hp(train_seq_len=512, window_max=512, num_heads=2, layer_pattern=pattern, value_pattern=values,
                  late_layer=late, mixed_layers=mixed, attn_scale=0.3)
    model = small_model(hp, awake=True)
    with torch.no_grad():
        model.embed.weight.normal_()
    ids, weight = documents(hp, 1)[0][0], torch.randn(512, 64, generator=torch.Generator().manual_seed(6))
    ids[150:300] = 7  # one document over a block's border
    names, params = zip(*[pair for pair in model.named_parameters() if "pointer" not in pair[0]])
    fast, slow = (with_gradients(x, params, weight)
                  for x in (model.features(ids, window_tensor(4)), features(model, hp, ids, 4)))
    single = [i for i, p in enumerate(params, 1) if p.numel() == 1]  # one alone may be next to zero
    fast, slow = ([*grads, torch.cat([grads[i].flatten() for i in single])] for grads in (fast, slow))
    for i, (name, got, want) in enumerate(zip(("features", *names, "single values"), fast, slow)):
        assert want.any() and (i in single or relative_error(got, want) < 1e-3), name


def test_a_model_by_itself_trains_on_a_cpu():
    """As other code would build it: nothing needs to be switched off first."""
    hp = small_hp()
    torch.manual_seed(0)
    model, same = tg.GPT(hp, ROWS), small_model(hp)
    pair, = documents(hp, 1)
    loss = model(*pair, window_tensor(2))
    loss.backward()
    assert model.use_flex and torch.equal(loss, same(*pair, window_tensor(2)))
    assert all(p.grad is not None for p in model.parameters())


def test_what_a_model_starts_with():
    model = small_model(small_hp())
    starts = dict(smear=0.0, copy_scale=1.0, v_scale=0.5, value_gate=0.0, network_out=0.0)
    assert model.skip_weights.tolist() == [1, 1] and model.mix_head.skip_weights.tolist() == [0, 0, -0.5, 0]
    assert not model.mix_input.skip_weights.any()
    for name, p in model.named_parameters():
        want = starts.get(name.split(".")[-1])
        assert want is None or torch.equal(p, torch.full_like(p, want)), name
    assert all(block.lambdas.tolist() == pytest.approx([1.1, 0, 0.05]) for block in model.blocks)
    assert model.embed.weight is model.lm_head.weight and not model.bigrams.weight.any()
    assert not any(block.mlp.down.weight.any() for block in model.blocks)
    for matrix, std in ((model.embed.weight, 0.005), (model.value_embeds["0"].weight, 0.01),
                        (model.blocks[0].attn.qkv, 0.5 / 8), (model.blocks[0].mlp.up.weight, 0.5 / 8),
                        (model.pointer.key, 0.5 / 8)):
        assert matrix.std().item() == pytest.approx(std, rel=0.03) and matrix.mean().abs() < 0.03 * std


@pytest.mark.parametrize("rows", [2, 256, 250_000])
def test_bigrams_are_hashed_as_python_does(rows):
    g = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 50304, (5000,), generator=g, dtype=torch.int32)
    ids[:3] = torch.tensor([50303, 50303, 0])
    found, tokens = tg.bigram_index(ids, rows), ids.tolist()
    want = [((36313 * b) ^ (27191 * a)) % rows for a, b in zip(tokens[:1] + tokens, tokens)]
    assert found.tolist() == want and found.dtype == torch.int32
    assert rows != 256 or len(set(want)) == 256, "every row is used"


def test_the_token_before_and_keys_from_there():
    k = torch.randn(5, 2, 8, requires_grad=True)
    want = torch.stack([torch.stack([torch.stack([
        k[t if c % 4 < 2 else max(t - 1, 0), h, c] for c in range(8)]) for h in range(2)]) for t in range(5)])
    weight = torch.randn(5, 2, 8)
    for got, exact in zip(with_gradients(tg.offset_keys(k), [k], weight), with_gradients(want, [k], weight)):
        assert torch.equal(got, exact)
    assert tg.previous(torch.tensor([4, 5, 6])).tolist() == [4, 4, 5]


def test_the_default_model_has_the_stated_size():
    hp = tg.Hyperparameters()
    with torch.device("meta"):
        model = tg.GPT(hp, 50304)
    total = sum(p.numel() for p in model.parameters())
    square, mlp, table, pairs = 768 * 768, 768 * 3072, 50304 * 768, 249_856 * 192
    mixes, pointer = 2 * (768 + 4) * 64, 3 * 128 * 768
    gates, scalars = 5 * 6 * 12, sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert total == 10 * 4 * square + 10 * 2 * mlp + 6 * table + pairs + gates + scalars + mixes + pointer
    assert round(total / 1e6, 1) == 350.9
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert embeddings == 6 * table + pairs
    assert total - embeddings + table - gates - scalars - mixes == 109_707_264, "in matmuls"
    assert (len(model.skip_weights), len(model.blocks)) == (5, 10)
    assert hp.num_heads * hp.head_dim == 768 == 6 * hp.head_dim


def with_gradients(output, inputs, weight):
    return output, *torch.autograd.grad((output * weight).sum(), inputs)


def test_the_mlp_is_relu_squared_between_two_matrices():
    mlp = small_model(small_hp(mlp_ratio=3), awake=True).blocks[0].mlp
    up, down = mlp.up.weight, mlp.down.weight
    assert up.shape == (192, 64) and down.shape == (64, 192)
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(20, 64, generator=g).requires_grad_(), torch.randn(20, 64, generator=g)
    inputs = x, up, down
    slow = torch.zeros(20, 64, dtype=torch.float64)
    for hidden in range(192):
        z = x.double() @ up[hidden].double()
        slow = slow + torch.outer(torch.where(z > 0, z * z, 0), down[:, hidden].double())
    for got, want in zip(with_gradients(mlp(x), inputs, weight), with_gradients(slow, inputs, weight)):
        assert want.any() and relative_error(got, want) < 1e-5


# ---- The step


def watched(t, monkeypatch):
    """{name: the divided gradient that its optimizer got}, anew in each step."""
    names, got = {p: name for name, p in t.model.named_parameters()}, {}
    for o in t.optimizers:
        def watch(bucket, grad, o=o, real=o.share_update):
            got.update({names[p]: g.float() / o.grad_divisor for p, g in zip(bucket.params, bucket.views(grad))})
            return real(bucket, grad)

        monkeypatch.setattr(o, "share_update", watch)
    return got


def test_the_gradient_of_two_sequences_is_the_mean_of_both(monkeypatch):
    hp = small_hp(window_max=256)
    model, data = small_model(hp, awake=True), documents(hp, 2)
    t = trainer(model, hp)
    got = watched(t, monkeypatch)
    loss = sum(model(*pair, window_tensor(1)) for pair in data) / 2
    want = torch.autograd.grad(loss, list(model.parameters()))
    params = list(model.named_parameters())
    total = t.train_step(0, data)
    assert float(total) == pytest.approx(loss.item(), rel=1e-6)
    for (name, _), grad in zip(params, want):
        assert grad.any() and relative_error(got[name], grad) < 4e-3, name  # gradients travel in bf16


def test_head_and_embedding_are_one_parameter_with_the_gradients_of_two(monkeypatch):
    """Against a twin with two parameters, and against Adam of one tensor."""
    hp = small_hp(steps=4, window_max=256, head_decay=20.0)
    model = small_model(hp, awake=True)
    t, head = trainer(model, hp), model.lm_head.weight
    assert head is model.embed.weight
    start = head.detach().clone()
    got, slow = watched(t, monkeypatch), SlowAdam(head, hp.head_lr, hp.head_betas, hp.adam_eps, hp.head_decay)
    for step in range(hp.steps):
        data = documents(hp, 2, seed=step)
        twin = copy.deepcopy(model)
        twin.lm_head.weight = torch.nn.Parameter(head.detach().clone())
        sum(twin(*pair, window_tensor(tg.window_at(step, hp))) / 2 for pair in data).backward()
        assert twin.lm_head.weight.grad.any() and twin.embed.weight.grad.any()
        t.train_step(step, data)
        assert relative_error(got["embed.weight"], twin.lm_head.weight.grad + twin.embed.weight.grad) < 4e-3
        want = slow.step(got["embed.weight"], tg.lr_at(step, hp))
        assert relative_error(head - start, want - start) < 1e-3  # some roundings to bf16 fall otherwise


@pytest.mark.parametrize("length, first", [(0.1, 14), (4.0, 8), (0.01, 20), (10.0, 0)])
def test_weights_are_averaged_and_blended_as_in_float64(length, first):
    """Steps 0 to 19; the average begins three time constants before the end, with the weights of that step."""
    hp = small_hp(steps=20, average=length, average_share=0.4, train_seq_len=128, window_max=128)
    model = small_model(hp, awake=True)
    t, slow, tau = trainer(model, hp), {}, max(length * 20 if length <= 1 else length, 1)
    kinds = {p: group["name"] for o in t.optimizers for group in o.param_groups for p in group["params"]}
    own = {p for p, kind in kinds.items() if kind in ("embed", "matrices", "down")}
    for step in range(20):
        t.train_step(step, documents(hp, 1, seed=step))
        for p in own if step >= first else ():
            slow[p] = slow[p] + (p.detach().double() - slow[p]) / tau if p in slow else p.detach().double()
    averages = {p: state["average"] for o in t.optimizers for p, state in o.state.items() if "average" in state}
    assert averages.keys() == slow.keys() and (first == 20) == (not slow)
    for p, average in averages.items():
        assert relative_error(average, slow[p]) < 1e-6
    before = {p: p.detach().clone() for p in model.parameters()}
    t.blend()
    for p, old in before.items():
        if p not in slow:
            assert torch.equal(p, old)
            continue
        for new, start, average in zip(*(x.detach().double().flatten(0, -3) if x.ndim > 2 else x[None].detach().double()
                                         for x in (p, old, slow[p]))):
            mixed = 0.6 * start + 0.4 * average
            assert relative_error(new, mixed * (start.norm() / mixed.norm())) < 1e-5 and not torch.equal(new, start)
            assert new.norm().item() == pytest.approx(start.norm().item(), rel=1e-5)


def test_without_an_average_nothing_is_kept_or_blended():
    hp = small_hp(steps=3, average=0.0, window_max=256)
    model = small_model(hp)
    t = trainer(model, hp)
    for step in range(3):
        t.train_step(step, documents(hp, 2))
    before = copy.deepcopy(model.state_dict())
    t.blend()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("average" in state for o in t.optimizers for state in o.state.values())


def test_blending_leaves_a_matrix_of_zeros_alone():
    hp = small_hp(steps=3, average=1.0, muon_lr=0.0, window_max=256)
    model = small_model(hp)  # the second matrices of its MLPs are zero, and stay so
    t = trainer(model, hp)
    for step in range(3):
        t.train_step(step, documents(hp, 2))
    t.blend()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_tiny_model_learns_one_batch_by_heart():
    hp = small_hp(steps=40)
    t, data = trainer(small_model(hp), hp), documents(hp, 2)
    losses = [float(t.train_step(step, data)) for step in range(hp.steps)]
    assert losses[0] == pytest.approx(math.log(ROWS), abs=2e-2) and losses[-1] < 0.5, losses


def test_a_seed_gives_the_same_weights_and_another_one_others():
    hp = small_hp()
    first, again, other = (small_model(hp, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


IMPORT = """
import sys, os, threading
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
before = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
def refuse(event, args):
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and "pycache" not in str(args[0]):
        raise AssertionError(f"importing opens {args[0]} to write")
    if event in ("socket.connect", "socket.bind", "subprocess.Popen", "os.mkdir"):
        raise AssertionError(f"importing does {event} {args}")
sys.addaudithook(refuse)
sys.argv = ["x", "--no_such_knob=1"]
import train_gpt
after = dict(os.environ), torch.get_rng_state(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2:] == after[2:]
assert not torch.cuda.is_initialized() and not dist.is_initialized() and threading.active_count() == 1
assert not os.listdir("."), os.listdir(".")
"""


def test_importing_the_script_does_nothing(tmp_path):
    root = Path(tg.__file__).resolve().parent
    fresh = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TEMP", "TMPDIR") if name in os.environ}
    done = subprocess.run([sys.executable, "-B", "-c", IMPORT, str(root)], cwd=tmp_path, env=fresh, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stdout + done.stderr
