"""Muon and Adam: against SVD, against torch's Adam, against slow references, and what they send."""

import copy
import re

import pytest
import torch
from reference import SlowAdam, SlowMuon, normalized, relative_error, subtracted
from small import documents, plan, small_hp, small_model, trainer

import train_gpt as tg


def rand(*shape, seed=0, bf16=True):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return value.bfloat16().float() if bf16 else value  # gradients travel in bf16; values of it lose nothing there


def params(*shapes):
    return [torch.nn.Parameter(rand(*shape, seed=100 + i)) for i, shape in enumerate(shapes)]


def feed(params, step, scale=0.1):
    for i, p in enumerate(params):
        p.grad = (rand(*p.shape, seed=1000 * step + i) * scale * (i + 1)).to(p.dtype)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        feed(params, step)
        optimizer.step()


def moved(after, before):
    return torch.cat([(a.detach() - b.detach()).flatten() for a, b in zip(after, before)])


# ---- Newton-Schulz


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (5, 32, 96), (2, 3, 96, 32), (1, 40)])
def test_newton_schulz_keeps_the_subspaces_and_levels_the_singular_values(shape):
    G = rand(*shape, bf16=False)
    X = tg.zeropower_via_newtonschulz5(G)
    assert X.shape == G.shape and X.dtype == torch.float32
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U.mT @ X @ Vh.mT  # diagonal iff the singular vectors are G's
    values = core.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < values.min() and values.max() < 1.25
    assert (core - torch.diag_embed(values)).abs().max() < 1e-3
    assert relative_error(U @ core @ Vh, X) < 1e-4, "nothing of X lies outside"


def test_newton_schulz_lifts_small_singular_values_and_leaves_zero_alone():
    Q = [torch.linalg.qr(rand(64, 64, seed=i, bf16=False))[0] for i in (1, 2)]
    S = torch.logspace(0, -2, 64)
    values = torch.linalg.svdvals(tg.zeropower_via_newtonschulz5(Q[0] * S @ Q[1]))
    assert 0.5 < values.min() and values.max() < 1.25
    assert not tg.zeropower_via_newtonschulz5(torch.zeros(2, 8, 16)).any()
    for scale in (1e-3, 1e4):
        G = rand(16, 32, bf16=False)
        assert relative_error(tg.zeropower_via_newtonschulz5(G * scale), tg.zeropower_via_newtonschulz5(G)) < 1e-3


# ---- Muon

SHAPES = [(48, 96), (96, 48), (48, 96), (64, 64), (37, 11), (1, 50)]  # most are no multiple of 4,096 values


def orthogonalized(G):
    """A matrix's quintics on its singular values alone, in float64."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    S = S / (1.02 * S.norm() + 1e-6)
    for a, b, c in tg.QUINTICS:
        S = a * S + b * S**3 + c * S**5
    return U * S @ Vh


@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("shape", [(3, 24, 64), (64, 24), (1, 40)])
def test_newton_schulz_is_the_quintics_on_the_singular_values(shape, steps, monkeypatch):
    monkeypatch.setattr(tg, "QUINTICS", tg.QUINTICS[:steps])
    G = rand(*shape, bf16=False)
    want = torch.stack([orthogonalized(m) for m in G.view(-1, *G.shape[-2:])]).view(shape)
    assert relative_error(tg.zeropower_via_newtonschulz5(G), want) < 1e-4


def test_the_quintics_bring_singular_values_close_to_one_step_by_step():
    S = torch.logspace(-3, 0, 2000, dtype=torch.float64) / 1.02
    spreads = []
    for a, b, c in tg.QUINTICS:
        S = a * S + b * S**3 + c * S**5
        spreads.append(float((S - 1).abs().max()))
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.2, spreads


@pytest.mark.parametrize("shape", [(3, 20, 12), (2, 12, 20), (2, 16, 16), (1, 1, 50)])
def test_neurons_are_normalized_as_by_loops(shape):
    ours = torch.zeros(shape[0], max(shape[1:]))
    theirs = [[0.0] * max(shape[1:]) for _ in range(shape[0])]
    for step in range(4):
        update = rand(*shape, seed=step, bf16=False) * torch.logspace(-1, 1, shape[1])[:, None]
        got = tg.normalize_neurons(update, ours, 0.9)
        want = torch.stack([normalized(m, second, 0.9) for m, second in zip(update.double(), theirs)])
        assert relative_error(got, want) < 1e-5 and relative_error(ours, torch.tensor(theirs)) < 1e-5
        assert torch.allclose(got.norm(dim=(1, 2)), update.norm(dim=(1, 2)), rtol=1e-5)
    assert not tg.normalize_neurons(torch.zeros(shape), torch.zeros_like(ours), 0.9).any(), "what fills a share up"


def test_decay_is_cautious():
    ours = [p.detach() for p in params((7, 9), (3, 5, 4))]
    steps = [rand(*p.shape, seed=i) * 0.1 for i, p in enumerate(ours)]
    want = [subtracted(p, step, 0.25) for p, step in zip(ours, steps)]
    kept = [p - step for p, step in zip(ours, steps)]
    tg.subtract(ours, steps, torch.tensor(0.25))
    for got, exact, plain in zip(ours, want, kept):
        assert torch.allclose(got.double(), exact, atol=1e-6)
        assert 0.2 < (got != plain).float().mean() < 0.8, "and about half of the values are spared"


@pytest.mark.parametrize("divisor, decay", [(1, 0.0), (8, 0.0), (1, 10.0), (8, 10.0)])
def test_muon_equals_a_reference(divisor, decay):
    ours = params(*SHAPES)
    before = copy.deepcopy(ours)
    train(tg.Muon(ours, lr=0.03, momentum=0.9, beta2=0.8, decay=decay, grad_divisor=divisor), ours, 6)
    for i, (p, start) in enumerate(zip(ours, before)):
        slow, plain = (SlowMuon(start, 0.03, 0.9, 0.8, off, orthogonalized) for off in (decay, 0.0))
        for step in range(6):
            grad = (rand(*p.shape, seed=1000 * step + i) * 0.1 * (i + 1)).bfloat16().double() / divisor
            want, other = slow.step(grad), plain.step(grad)
        assert relative_error(p - start, want - start) < 1e-2, SHAPES[i]
        assert not decay or relative_error(p - start, other - start) > 0.1, "decay is seen"


def test_a_stack_of_matrices_is_its_matrices():
    stack = torch.nn.Parameter(rand(3, 64, 128))
    alone = [torch.nn.Parameter(m.clone()) for m in stack.detach()]
    optimizers = tg.Muon([stack]), tg.Muon(alone)
    for step in range(3):
        stack.grad = rand(3, 64, 128, seed=step)
        for p, g in zip(alone, stack.grad):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(stack, torch.stack([p.detach() for p in alone]))


def test_matrices_of_one_shape_are_one_batch(monkeypatch):
    seen, real = [], tg.zeropower_via_newtonschulz5
    watch = lambda G: seen.append(tuple(G.shape)) or real(G)
    monkeypatch.setattr(tg, "zeropower_via_newtonschulz5", watch)
    ours = params(*SHAPES)
    train(tg.Muon(ours), ours, 1)
    assert sorted(seen) == sorted([(2, 48, 96), (1, 96, 48), (1, 64, 64), (1, 37, 11), (1, 1, 50)])


def test_muon_refuses_what_is_no_matrix():
    for shape in ((7,), (), (3, 5, 5)):
        with pytest.raises(ValueError, match="no matrix"):
            tg.Muon([torch.nn.Parameter(torch.zeros(shape))])


# ---- Adam


def test_adam_equals_torchs():
    shapes = [(33, 70), (5,), (), (64, 64), (2, 3, 4)]
    ours = params(*shapes)
    before, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    hyper = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-10)
    train(tg.Adam(ours, grad_divisor=1, **hyper), ours, 8)
    train(torch.optim.Adam(theirs, **hyper), theirs, 8)
    for a, b, c in zip(ours, theirs, before):
        assert relative_error(a - c, b - c) < 4e-3, tuple(a.shape)  # updates are rounded to bf16


def test_each_group_decays_by_its_own_rate():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = tg.Adam([dict(params=[p], lr=lr) for p, lr in zip(weights, (1e-3, 1e-1))], decay=1.0)
    for p in weights:
        p.grad = torch.ones(3)
    optimizer.step()
    for p, lr in zip(weights, (1e-3, 1e-1)):  # Adam's first step is the rate
        assert torch.allclose(p, torch.full((3,), 1 - lr - lr**2), atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 10.0])
def test_adam_equals_a_reference_with_cautious_decay(decay):
    ours = params((33, 70), (64, 64), (2, 3, 4), (9,))
    slow = [SlowAdam(p, 0.03, (0.5, 0.95), decay=decay) for p in ours]
    before = copy.deepcopy(ours)
    train(tg.Adam(ours, lr=0.03, betas=(0.5, 0.95), eps=1e-10, decay=decay, grad_divisor=2), ours, 6)
    for i, (p, reference, start) in enumerate(zip(ours, slow, before)):
        for step in range(6):
            want = reference.step((rand(*p.shape, seed=1000 * step + i) * 0.1 * (i + 1)).bfloat16().double() / 2)
        assert relative_error(p - start, want - start) < 4e-3, tuple(p.shape)


def test_adam_divides_the_summed_gradient():
    """Adam forgets scales but for eps, so a large eps shows the divisor."""
    ours = params((8, 8), (3,))
    before, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    train(tg.Adam(ours, lr=0.1, eps=1.0, grad_divisor=4), ours, 3)
    optimizer = torch.optim.Adam(theirs, lr=0.1, eps=1.0)
    for step in range(3):
        feed(theirs, step)
        for p in theirs:
            p.grad /= 4
        optimizer.step()
    assert relative_error(moved(ours, before), moved(theirs, before)) < 5e-3


def test_small_tensors_of_a_group_share_a_bucket():
    ours = params((5,), (), (7,), (8, 8), (80, 80))
    groups = [dict(params=ours[:2], lr=0.5), dict(params=ours[2:4], lr=0.25), dict(params=ours[4:])]
    optimizer = tg.Adam(groups, lr=0.125)
    assert [len(b.params) for b in optimizer.buckets] == [2, 2, 1] and [b.group for b in optimizer.buckets] == [0, 1, 2]
    before = copy.deepcopy(ours)
    train(optimizer, ours, 1)
    for p, start, lr in zip(ours, before, (0.5, 0.5, 0.25, 0.25, 0.125)):  # Adam's first step is lr for every value
        assert torch.allclose((p - start).abs(), torch.full_like(p, lr), rtol=1e-2)


# ---- Both, as any torch.optim.Optimizer


def both():
    """Two cases: (make an optimizer of parameters, their shapes)."""
    return [pytest.param(lambda ps: tg.Muon(ps, lr=0.02), SHAPES, id="muon"),
            pytest.param(lambda ps: tg.Adam(ps, lr=0.02), [(5,), (33, 70), (), (64, 64)], id="adam")]


@pytest.mark.parametrize("make,shapes", both())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_state_of_parameters_of_any_dtype_goes_on(make, shapes, dtype):
    """torch loads all of it in the parameter's dtype."""
    ours = [p.data.to(dtype).requires_grad_() for p in params(*shapes)]
    optimizer = make(ours)
    for first in (0, 3):
        before = [p.detach().clone() for p in ours]
        train(optimizer, ours, 3, first=first)
        assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(ours, before))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("make,shapes", both())
def test_the_state_goes_on_where_it_was_saved(make, shapes, tmp_path):
    ours = params(*shapes)
    optimizer = make(ours)
    train(optimizer, ours, 3)
    torch.save([optimizer.state_dict(), ours], tmp_path / "state.pt")
    state, loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, fresh = make(loaded), make(copy.deepcopy(ours))
    resumed.load_state_dict(state)
    forgotten = fresh.param_groups[0]["params"]
    for opt, ps in ((optimizer, ours), (resumed, loaded), (fresh, forgotten)):
        train(opt, ps, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(ours, loaded))
    assert not all(torch.equal(a, b) for a, b in zip(ours, forgotten)), "the state matters"


@pytest.mark.parametrize("make,shapes", both())
def test_learning_rate_schedulers(make, shapes):
    ours = params(*shapes)
    optimizer = make(ours)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 1 else 1.0)
    for still in (False, True, False):
        before = copy.deepcopy(ours)
        train(optimizer, ours, 1)
        scheduler.step()
        assert (not moved(ours, before).any()) == still
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    sizes = []
    for step in range(10):
        before = copy.deepcopy(ours)
        train(optimizer, ours, 1, first=step)
        sizes.append(float(moved(ours, before).norm()))
        if step < 9:
            cycle.step()
    assert max(sizes) == max(sizes[2:5]) > 5 * sizes[0] and sizes[-1] < 1e-2 * sizes[0]


@pytest.mark.parametrize("make,shapes", both())
@pytest.mark.parametrize("first", [0, 2])
def test_a_copy_steps_like_the_original(make, shapes, first):
    """With its parameters or, as torch's own, with copies of its own; before any step and after some."""
    ours = params(*shapes)
    optimizer = make(ours)
    train(optimizer, ours, first)
    alone, (together, theirs) = copy.deepcopy(optimizer), copy.deepcopy((optimizer, ours))
    own = [p for group in alone.param_groups for p in group["params"]]
    for which, tensors in ((optimizer, ours), (alone, own), (together, theirs)):
        train(which, tensors, 2, first)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(ours, own, theirs))
    assert all(a is not b and a is not c for a, b, c in zip(ours, own, theirs))


@pytest.mark.parametrize("make,shapes", both())
def test_missing_gradients_count_as_zero_and_a_closure_is_called(make, shapes):
    ours = params(*shapes)
    optimizer, before = make(ours), copy.deepcopy(ours)
    optimizer.step()
    assert not moved(ours, before).any()
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = ours[0].square().sum()  # the others stay without one
        loss.backward()
        calls.append(loss.detach())
        return loss

    with torch.no_grad():  # which a closure's backward must not see
        assert optimizer.step(closure) is not None and len(calls) == 1
    assert torch.is_grad_enabled()
    assert [bool(moved([a], [b]).any()) for a, b in zip(ours, before)] == [True] + [False] * (len(ours) - 1)


@pytest.mark.parametrize("make", [tg.Muon, tg.Adam])
def test_bf16_parameters_with_bf16_gradients(make):
    narrow, wide = torch.nn.Parameter(rand(64, 64).bfloat16()), torch.nn.Parameter(rand(64, 64))
    for p in (narrow, wide):
        optimizer = make([p], lr=0.25)
        p.grad = rand(64, 64, seed=1).to(p.dtype)
        kept = p.grad.clone()
        optimizer.step()
        assert torch.equal(kept, p.grad), "a step leaves gradients as they are"
    assert narrow.dtype == torch.bfloat16
    error = relative_error(narrow.float() - rand(64, 64), wide - rand(64, 64))
    assert error < 0.1, "beyond what rounding the parameter explains"


# ---- The exchange


KINDS = {  # pattern of names: kind, and its optimizer, rate, betas and decay in tests/small.py
    r"embed.weight": ("embed", tg.Adam, 0.008, (0.5, 0.95), 0.75),
    r"value_embeds.0.weight": ("value_embeds", tg.Adam, 0.3, (0.75, 0.9), 0.025),
    r"bigrams.weight": ("bigrams", tg.Adam, 0.3, (0.75, 0.9), 0.025),
    r"smear|pointer.copy_scale|blocks.\d.(lambdas|attn.v_scale)": ("scalars", tg.Adam, 0.04, (0.9, 0.99), 0.0),
    r"mix_(v|input|head).network_(in|out)": ("mixes", tg.Adam, 0.002, (0.9, 0.99), 0.0),
    r"(mix_(input|head).)?skip_weights|blocks.\d.attn.value_gate": ("skip_weights", tg.Adam, 0.01, (0.9, 0.99), 0.0),
    r"blocks.\d.(attn.qkv|attn.out|mlp.up.weight)|pointer.(query|key|key_before)": (
        "matrices", tg.Muon, 0.025, None, 1.2),
    r"blocks.\d.mlp.down.weight": ("down", tg.Muon, 0.05, None, 0.6)}


def test_every_parameter_is_in_one_group_and_by_its_rule():
    hp = small_hp()
    model = small_model(hp)
    muon, adam, down = optimizers = tg.build_optimizers(model, hp)
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for o in optimizers:
        for group in o.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                found[names[p]] = group["name"], type(o), group["lr"], group.get("betas"), group["decay"]
    assert set(found) == set(names.values())
    for name, got in found.items():
        rules = [rule for pattern, rule in KINDS.items() if re.fullmatch(pattern, name)]
        assert rules == [got], name
    assert {rule[0] for rule in found.values()} == {rule[0] for rule in KINDS.values()}, "and no kind is empty"
    groups = [group for o in optimizers for group in o.param_groups]
    assert all(g["initial_lr"] == g["lr"] for g in groups) and {g["eps"] for g in adam.param_groups} == {1e-10}
    assert all(g["momentum"] == 0.95 and g["beta2"] == 0.9 for g in muon.param_groups + down.param_groups)
    t = trainer(model, hp)
    t.set_schedules(0)
    assert [float(o.grad_divisor) for o in t.optimizers] == [2.0, 2.0, 2.0]
    model.extra = model.embed  # a second name for the same parameter is no second parameter
    tg.build_optimizers(model, hp)
    for block in model.blocks:  # as a copy of the script may have it
        block.mlp.second = block.mlp._modules.pop("down")
    muon, adam = tg.build_optimizers(model, hp)
    assert [group["name"] for group in muon.param_groups] == ["matrices"] and isinstance(adam, tg.Adam)
    assert sum(len(group["params"]) for o in (muon, adam) for group in o.param_groups) == len(set(model.parameters()))


def test_the_skip_weights_move_by_their_own_learning_rate():
    for lr in (0.01, 0.0):
        hp = small_hp(skip_lr=lr)
        model = small_model(hp, awake=True)
        before = model.skip_weights.detach().clone()
        trainer(model, hp).train_step(0, documents(hp, 2))
        assert torch.allclose((model.skip_weights - before).abs(), torch.full_like(before, lr), rtol=1e-2)


def test_e5m2_blocks_have_their_own_scales():
    n = tg.SCALE_BLOCK
    x = rand(4 * n, bf16=False) * torch.tensor([1e-6, 1.0, 3e4, 0.0]).repeat_interleave(n)
    values, scales = tg.quantize_e5m2(x)
    assert values.dtype == torch.float8_e5m2 and values.shape == (4 * n,) and scales.shape == (4,)
    back = tg.dequantize_e5m2(values, scales)
    for a, b in zip(back[: 3 * n].view(3, n), x.view(4, n)):
        assert 0.03 < relative_error(a, b) < 0.07 and relative_error(a.abs().max(), b.abs().max()) < 1e-6
        assert ((a - b).abs() <= b.abs() / 8 + b.abs().max() * 2.0**-31).all(), "2 bits of mantissa"
    assert torch.equal(back[3 * n :], torch.zeros(n)), "a block of zeros stays one, and is no 0 / 0"


def test_on_one_rank_nothing_is_rounded():
    ends = []
    for comm in ("bf16", "fp8"):
        ours = params((64, 64), (100,))
        optimizer = tg.Adam(ours, lr=1.0, eps=1.0, grad_divisor=2, grad_comm=comm)
        for step in range(2):
            feed(ours, step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in ours]))
    assert torch.equal(*ends)


def test_what_a_rank_of_two_gets_in_e5m2_is_the_sum_of_what_both_round():
    """Here each gets its own back, and so half of its buffer twice."""
    ours = params((64, 64), (64, 64))
    optimizer = tg.Muon(ours, lr=0.1, grad_divisor=2, grad_comm="fp8", world_size=2)
    exchange, (bucket,) = optimizer.exchange, optimizer.buckets
    exchange.start = lambda collective, sent, size: lambda: sent
    feed(ours, 0)
    want = tg.dequantize_e5m2(*tg.quantize_e5m2(bucket.pack())).view(2, -1).sum(0)
    assert torch.equal(exchange.receive(exchange.send(bucket)), want) and want.any()


def default_optimizers(world_size, **knobs):
    hp = tg.Hyperparameters(**knobs)
    with torch.device("meta"):
        model = tg.GPT(hp, 50304)
    return tg.build_optimizers(model, hp, world_size=world_size)


def test_what_a_step_of_the_default_model_sends():
    """Eight ranks; worked out from the shapes: what is padded to equal shares of matrices or of 4,096 values."""
    square, mlp, table = 768 * 768, 3072 * 768, 50304 * 768
    # 40 squares, 10 of each MLP shape and three of the pointer's, up to eights; the head and five tables; 249,856
    # rows of bigrams
    matrices = 40 * square + 2 * 16 * mlp + 8 * 128 * 768 + 6 * table + 249_856 * 192
    # Small tensors take a block of 4,096 each, as many of a group on every rank: 22 scalars, 5 gates with 3 kinds
    # of skip weights, and the second layers of both mixes' networks. The first layers, 64 x 768, are 12 blocks each.
    values = matrices + (24 + 8 + 8 + 2 * 16) * 4096
    sent = {}
    for comm in ("bf16", "fp8"):
        calls = [call for o in default_optimizers(8, grad_comm=comm) for call in plan(o)]
        sent[comm] = {name: sum(n for kind, n in calls if kind == name) for name in {kind for kind, _ in calls}}
    assert sent["bf16"] == dict(reduce_scatter_tensor=2 * values, all_gather_into_tensor=2 * values)
    assert sent["fp8"] == dict(all_to_all_single=values + values // 4096 * 4, all_gather_into_tensor=2 * values)
    assert 4 * matrices == 1518600192, "bytes of both ways in bf16"
    assert sum(sent["fp8"].values()) < 0.78 * sum(sent["bf16"].values())


def test_shares_are_whole_units_and_cover_everything():
    for world in (1, 2, 3, 8, 16, 64):
        for optimizer in default_optimizers(world):
            for b in optimizer.buckets:
                used = sum(-(-p.numel() // tg.SCALE_BLOCK) * tg.SCALE_BLOCK for p in b.params)
                assert b.size == b.share * world == sum(b.strides) and 0 <= b.size - used < b.unit * world
                assert b.share % b.unit == 0 and b.unit % tg.SCALE_BLOCK == 0
                assert all(stride % tg.SCALE_BLOCK == 0 for stride in b.strides)
