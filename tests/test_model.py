"""The model and its schedules: end points, causality, the loss, the U-Net's wiring, and one batch learned by heart."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import EOT, attention, relative_error, visible
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


def test_a_short_run_is_a_scaled_run():
    long = small_hp(steps=1770, momentum_warmup=300 / 1770)
    short = dataclasses.replace(long, steps=177)
    for step in range(178):
        assert tg.lr_at(step, short) == pytest.approx(tg.lr_at(10 * step, long))
        assert tg.momentum_at(step, short) == pytest.approx(tg.momentum_at(10 * step, long))
        assert tg.window_scheduler(step, 177) == tg.window_scheduler(10 * step, 1770)


def test_a_step_sets_window_learning_rate_and_momentum():
    hp = small_hp(steps=10, layer_pattern="--", value_pattern="..", window_min=128, window_max=512)
    model = small_model(hp)
    t = trainer(model, hp)
    adam, muon = t.optimizers
    for step in (0, 7, 9):
        t.train_step(step, documents(hp, 2))
        assert int(t.window) == tg.window_scheduler(step, 10, 128, 512)
        lrs = hp.head_lr, hp.embed_lr, hp.embed_lr, hp.scalar_lr, hp.skip_lr
        found = [group["lr"] for group in adam.param_groups]
        assert found == pytest.approx([lr * tg.lr_at(step, hp) for lr in lrs], rel=1e-12)
        group = muon.param_groups[0]
        assert group["lr"] == hp.muon_lr * tg.lr_at(step, hp) and group["momentum"] == tg.momentum_at(step, hp)
        assert all(p.grad is None for p in model.parameters())


# ---- Loss and head


def test_the_loss_at_the_start_is_that_of_guessing():
    hp = small_hp()
    model = small_model(hp)
    (ids, targets), = documents(hp, 1)
    assert model(ids, targets, window_tensor(2)).item() == pytest.approx(math.log(ROWS), abs=1e-5)
    assert torch.equal(model.logits(torch.randn(3, 64)), torch.full((3, ROWS), hp.logit_cap / 2))


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
    logits = 30 * torch.sigmoid(z / 7.5)
    assert relative_error(model.logits(x), logits) < 1e-6
    for t in (targets, ignored):
        ours, want = model.losses(x, t), F.cross_entropy(logits, t, reduction="none", ignore_index=-100)
        assert torch.allclose(ours.double(), want, atol=1e-5) and ours.dtype == torch.float32
        weight = torch.rand(50, generator=g)
        inputs = (x, model.lm_head.weight)
        got = torch.autograd.grad((ours * weight).sum(), inputs)
        for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs, retain_graph=True)):
            assert relative_error(a, b) < 1e-4
    assert not ours[::7].any() and ours[1:7].all()


@pytest.mark.parametrize("z", [-1e4, -40.0, 0.0, 40.0, 1e4])
def test_the_fast_loss_is_exact_up_to_the_greatest_legal_cap(z):
    """Where all logits are near 0, exp(logit - cap) is smallest; where all are near the cap, its sum is largest."""
    hp = small_hp(logit_cap=87.0)
    tg.check(hp, 1)
    assert math.exp(-hp.logit_cap) > torch.finfo(torch.float32).tiny
    model = small_model(hp, awake=True)
    scores = (z + torch.randn(20, 384, generator=torch.Generator().manual_seed(3))).requires_grad_()
    model.lm_head.forward = lambda x: x
    targets = torch.arange(20)
    want = F.cross_entropy(87 * torch.sigmoid(scores.double() / 7.5), targets, reduction="none")
    ours = model.losses(scores, targets)
    assert torch.allclose(ours.double(), want, atol=5e-5), (ours - want).abs().max()
    got, exact = (torch.autograd.grad(losses.sum(), scores)[0] for losses in (ours, want))
    assert torch.allclose(got, exact, atol=1e-6) and (exact.any() or abs(z) > 100)


def test_the_mean_over_the_sequence_is_returned():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    each = model.losses(model.features(ids, window_tensor(2)), targets)
    assert each.shape == (256,) and each.std() > 0.1
    assert model(ids, targets, window_tensor(2)).item() == pytest.approx(each.mean().item(), rel=1e-6)


def test_the_document_token_of_a_byte_model_is_row_256():
    hp = small_hp()
    model = small_model(hp, awake=True)
    (ids, targets), = documents(hp, 1)
    assert EOT in ids and 256 not in ids
    x = model.features(ids, window_tensor(2))
    embeds = [model.embed, *model.value_embeds.values()]
    grads = torch.autograd.grad(model.losses(x, targets).sum(), [e.weight for e in embeds])
    for grad in grads:
        assert grad[256].any() and not grad[257:].any() and not grad[100:256].any()
    ends = torch.full((256,), EOT)
    assert torch.equal(model.losses(x, ends), model.losses(x, torch.full((256,), 256)))
    with torch.device("meta"):
        assert tg.GPT(hp, 50304).last_row == EOT, "a GPT-2 model reads it as it is"


# ---- Who sees whom


def every_loss(model, ids, blocks):
    """Loss of each position for a fixed target, so that only the inputs tell."""
    with torch.no_grad():
        return model.losses(model.features(ids, window_tensor(blocks)), torch.full((len(ids),), 7))


def test_no_later_token_and_no_other_document_moves_a_loss():
    hp = small_hp(train_seq_len=512, window_max=512)
    model = small_model(hp, awake=True)
    ids = torch.randint(0, 100, (512,), generator=torch.Generator().manual_seed(3)).int()
    ids[0] = ids[200] = EOT
    before = every_loss(model, ids, 4)
    for place, first, last in ((50, 50, 200), (199, 199, 200), (201, 201, 512), (300, 300, 512), (511, 511, 512)):
        changed = ids.clone()
        changed[place] = 101
        moved = (every_loss(model, changed, 4) - before).abs() > 1e-6
        assert moved[first] and not moved[:first].any() and not moved[last:].any(), place
        assert moved[first:last].float().mean() > 0.9, "what may move it does"


def test_the_window_limits_how_far_a_layer_looks():
    ids = torch.randint(0, 100, (1024,), generator=torch.Generator().manual_seed(4)).int()
    changed = ids.clone()
    changed[5] = 101
    for pattern, blocks, reach in (("L-", 2, 2), ("S-", 2, 1), ("S-", 4, 2), ("--", 4, 0)):
        hp = small_hp(train_seq_len=1024, val_seq_len=1024, layer_pattern=pattern, value_pattern="..", window_max=1024)
        model = small_model(hp, awake=True)
        moved = (every_loss(model, changed, blocks) - every_loss(model, ids, blocks)).abs() > 1e-6
        assert not moved[max(6, 128 * reach) :].any() if reach else moved.nonzero().tolist() == [[5]]
        assert not reach or moved[128 * reach - 128 : 128 * reach].any()


# ---- The wiring


def test_rotary_is_a_complex_rotation_of_half_of_the_pairs():
    length, width, base = 300, 32, 1024.0
    x = torch.randn(length, 3, width, generator=torch.Generator().manual_seed(0))
    frequencies = [base ** (-i / (width // 4 - 1)) for i in range(width // 4)] + [0.0] * (width // 4)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), -angle)[:, None]
    want = torch.cat((z.real, z.imag), dim=-1)
    rotary = tg.Rotary(width, 512, base)
    assert (rotary(x) - want).abs().max() < 2e-4
    assert rotary(x.bfloat16()).dtype == torch.bfloat16 and not rotary.state_dict()
    assert torch.equal(rotary(x)[0], x[0])


@pytest.mark.parametrize("pattern", ["LSSSLSS-SSSL", "LS-S", "SLS"])
def test_each_decoder_layer_gets_its_mirrored_encoder_layer(pattern):
    hp = small_hp(layer_pattern=pattern, value_pattern="0" + "." * (len(pattern) - 1))
    model = small_model(hp, awake=True)
    inputs, outputs = {}, {}
    assert [*model.encoder, *model.decoder] == [*model.blocks]
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
        block.register_forward_hook(lambda _, args, out, i=i: outputs.update({i: out}))
    ids = documents(hp, 1)[0][0]
    model.features(ids, window_tensor(2))
    depth, half = len(pattern), len(pattern) // 2
    assert torch.equal(inputs[0], tg.norm(model.embed(ids.clamp(max=256))))
    for i in range(1, depth):
        want, partner = outputs[i - 1], 2 * half - 1 - i
        if half <= i < 2 * half:
            want = want + model.skip_weights[i - half] * outputs[partner]
        assert torch.allclose(inputs[i], want, atol=1e-5), i
    assert torch.equal(small_model(hp).skip_weights, torch.ones(half))


def test_each_layer_gets_its_window_and_value_table(monkeypatch):
    hp = small_hp(train_seq_len=512, layer_pattern="LSSSLSS-SSSL", value_pattern="012......012", window_max=512)
    model, seen, real = small_model(hp, awake=True), [], tg.CausalSelfAttention.forward
    assert model.decoder[1].attn is None and sum(block.attn is None for block in model.blocks) == 1
    ids = torch.arange(512, dtype=torch.int32) % 100  # one document: the windows alone differ
    tables = [table(ids.clamp(max=256)) for table in model.value_embeds.values()]

    def watch(self, x, value_embed, rotary, mask):
        which = [i for i, table in enumerate(tables) if value_embed is not None and torch.equal(table, value_embed)]
        seen.append((int(torch.stack([visible.sum() for _, _, visible in mask]).sum()), *which))
        return real(self, x, value_embed, rotary, mask)

    monkeypatch.setattr(tg.CausalSelfAttention, "forward", watch)
    model.features(ids, window_tensor(4))
    long, short = (sum(int(v.sum()) for _, _, v in tg.dense_chunks(mask))
                   for mask in tg.create_masks(ids, 128, window_tensor(4), 4))
    assert long > short
    windows = dict(L=long, S=short)
    want = [(windows[w], *([int(t)] if t != "." else []))
            for w, t in zip(hp.layer_pattern, hp.value_pattern) if w != "-"]
    assert seen == want


def test_a_block_starts_as_the_identity_and_x0_is_mixed_in():
    hp = small_hp()
    block = small_model(hp).encoder[0]
    x, x0 = torch.randn(2, 256, 64)
    mask = tg.dense_chunks(tg.create_masks(torch.zeros(256, dtype=torch.int32))[0])
    rotary, values = tg.Rotary(64, 256, 1024.0), torch.randn(256, 64)
    args = {"0": values}, rotary, {"L": mask}
    assert torch.equal(block(x, x0, *args), x)
    with torch.no_grad():
        block.lambdas.copy_(torch.tensor([0.5, 2.0]))
    assert torch.allclose(block(x, x0, *args), 0.5 * x + 2 * x0)


def test_the_default_model_has_the_stated_size():
    hp = tg.Hyperparameters()
    with torch.device("meta"):
        model = tg.GPT(hp, 50304)
    total = sum(p.numel() for p in model.parameters())
    square, mlp, table = 768 * 768, 768 * 3072, 50304 * 768
    scalars = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert total == 11 * 4 * square + 12 * 2 * mlp + 5 * table + scalars and round(total / 1e6, 1) == 275.7
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert embeddings == 4 * table and total - embeddings - scalars == 121_208_832, "in matmuls"
    assert len(model.encoder) == len(model.decoder) == 6 and hp.num_heads * hp.head_dim == 768 and hp.head_dim == 128


def with_gradients(output, inputs, weight):
    return output, *torch.autograd.grad((output * weight).sum(), inputs)


def test_the_mlp_is_relu_squared_between_two_matrices():
    mlp = small_model(small_hp(mlp_ratio=3), awake=True).blocks[0].mlp
    assert mlp.up.shape == (192, 64) and mlp.down.shape == (64, 192)
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(20, 64, generator=g).requires_grad_(), torch.randn(20, 64, generator=g)
    inputs = x, mlp.up, mlp.down
    slow = torch.zeros(20, 64, dtype=torch.float64)
    for hidden in range(192):
        z = x.double() @ mlp.up[hidden].double()
        slow = slow + torch.outer(torch.where(z > 0, z * z, 0), mlp.down[:, hidden].double())
    for got, want in zip(with_gradients(mlp(x), inputs, weight), with_gradients(slow, inputs, weight)):
        assert want.any() and relative_error(got, want) < 1e-5


@pytest.mark.parametrize("table", ["0", "."])
def test_attention_mixes_the_value_embedding_into_v(table):
    """Against attention written out in float64: merged QKV, QK-norm, temperature, rotary, mixing, output."""
    hp = small_hp(num_heads=2, value_pattern="0" + table + "..", layer_pattern="LLLL", attn_scale=0.3)
    attn = small_model(hp, awake=True).blocks[1].attn
    assert attn.lambdas.shape == ((2,) if table == "0" else (1,))
    g = torch.Generator().manual_seed(6)
    x, values, weight = (torch.randn(256, 64, generator=g) for _ in range(3))
    x.requires_grad_(), values.requires_grad_()
    ids = documents(hp, 1)[0][0]
    mask, rotary = tg.create_masks(ids, window=2)[0], tg.Rotary(32, 256, hp.rope_base)
    q, k, v = (x.double() @ attn.qkv[i].double().T for i in range(3))
    v = attn.lambdas[0] * v + (attn.lambdas[1] * values if table == "0" else 0)
    heads = [t.view(256, 2, 32) for t in (q, k, v)]
    q, k = (rotary(t / t.square().mean(-1, keepdim=True).sqrt()) for t in heads[:2])
    q, k, v = (t.transpose(0, 1)[None] for t in (q * 0.3, k, heads[2]))
    slow = attention(q, k, v, visible(ids, 2))[0].transpose(0, 1).reshape(256, 64) @ attn.out.double().T
    fast = attn(x, values if table == "0" else None, rotary, tg.dense_chunks(mask))
    inputs = [x, attn.qkv, attn.out, attn.lambdas] + [values] * (table == "0")
    for got, want in zip(with_gradients(fast, inputs, weight), with_gradients(slow, inputs, weight)):
        assert want.any() and relative_error(got, want) < 1e-4


# ---- The step


def test_the_gradient_of_two_sequences_is_the_mean_of_both(monkeypatch):
    hp = small_hp(window_max=256)
    model, data = small_model(hp, awake=True), documents(hp, 2)
    t, got = trainer(model, hp), {}
    for o in t.optimizers:
        def watch(bucket, grad, o=o, real=o.share_update):
            got.update({id(p): g.float() / o.grad_divisor for p, g in zip(bucket.params, bucket.views(grad))})
            return real(bucket, grad)

        monkeypatch.setattr(o, "share_update", watch)
    loss = sum(model(*pair, window_tensor(1)) for pair in data) / 2
    want = torch.autograd.grad(loss, list(model.parameters()))
    params = list(model.named_parameters())
    total = t.train_step(0, data)
    assert float(total) == pytest.approx(loss.item(), rel=1e-6)
    for (name, p), grad in zip(params, want):
        assert grad.any() and relative_error(got[id(p)], grad) < 4e-3, name  # gradients travel in bf16


def test_a_tiny_model_learns_one_batch_by_heart():
    hp = small_hp(steps=30)
    t, data = trainer(small_model(hp), hp), documents(hp, 2)
    losses = [float(t.train_step(step, data)) for step in range(hp.steps)]
    assert losses[0] == pytest.approx(math.log(ROWS), abs=1e-5) and losses[-1] < 0.5, losses


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
