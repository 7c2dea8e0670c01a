"""What only a GPU can show: kernels against references with gradients, FP8, and no recompilation over a whole run."""

import copy
import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from reference import EOT, attention, copied, random_documents, relative_error, visible
from small import small_hp, trainer
from tiny import edited, events, make_corpus, run_folders
from tiny import run as run_script

import train_gpt as tg

pytestmark = pytest.mark.gpu
BLOCK = tg.BLOCK


def small(**knobs) -> tg.Hyperparameters:
    knobs = dict(train_seq_len=16 * BLOCK, val_seq_len=32 * BLOCK, layer_pattern="LSSSLS", value_pattern="01..01",
                 model_dim=256, num_heads=2, sequences_per_step=2, steps=40) | knobs
    return small_hp(**knobs)


def test_flex_attention_forward_and_gradients_equal_the_reference():
    length = 40 * BLOCK

    @torch.compile(fullgraph=True, dynamic=False)
    def run(q, k, v, ids, window):
        return tuple(tg.attend(q, k, v, mask) for mask in tg.create_masks(ids, BLOCK, window, 14))

    for seed, window in enumerate((1, 2, 5, 8, 13, 14)):
        g = torch.Generator().manual_seed(seed)
        ids = random_documents(length, g)
        inputs = [(torch.randn(1, 2, length, 128, generator=g) * s).bfloat16().cuda().requires_grad_()
                  for s in (0.12, 1, 1)]
        outs = run(*inputs, ids.cuda(), torch.tensor(window, dtype=torch.int32, device="cuda"))
        for out, blocks in zip(outs, (window, max(window // 2, 1))):
            want = attention(*inputs, visible(ids, blocks))
            weight = torch.randn(out.shape, generator=g).cuda()
            assert relative_error(out, want) < 1e-2
            got = torch.autograd.grad((out.float() * weight).sum(), inputs, retain_graph=True)
            for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs)):
                assert relative_error(a, b) < 1.5e-2, (window, blocks)


def test_the_pointer_by_flex_attention_and_its_gradients_equal_the_reference():
    """Token by token in float64: documents cut by the reach, rows without a hit, targets that are not scored."""
    hp, length, g = small(copy_reach=2 * BLOCK), 5 * BLOCK, torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    pointer = tg.Pointer(hp)
    own = copy.deepcopy(pointer).cuda()
    ids = torch.randint(0, 40, (length + 1,), generator=g).int()
    ids[[0, 1, 190, 620]] = EOT
    ids, targets = ids[:-1], ids[1:].clone()
    targets[::50] = -100
    x, weight = tg.norm(torch.randn(length, 256, generator=g)).bfloat16(), torch.randn(length, generator=g)
    inputs = [x.cuda().requires_grad_(), *own.parameters()]
    found = torch.compile(own.forward, fullgraph=True, dynamic=False)(inputs[0], ids.cuda(), targets.cuda(), True)
    plain = [x.double().requires_grad_(), *pointer.parameters()]
    want = copied(pointer, plain[0], ids, targets, hp.attn_scale, hp.copy_reach)
    assert not want.all() and relative_error(found.cpu(), want) < 2e-2
    got = torch.autograd.grad((found * weight.cuda()).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), plain)):
        assert b.any() and relative_error(a.cpu(), b) < 3e-2


def test_fp8_linear_forward_and_gradients():
    torch.manual_seed(0)
    layer = tg.CastedLinear(256, 512, grad_scale=2.0**10, device="cuda")
    x = torch.randn(3, 37, 256, device="cuda").bfloat16().requires_grad_()  # rows are no multiple of 16
    grad = (torch.randn(3, 37, 512, device="cuda") * 0.02).bfloat16()
    assert tg.fp8_supported("cuda")[0]
    for run in (layer, torch.compile(layer, fullgraph=True)):
        out = run(x)
        got = torch.autograd.grad(out, (x, layer.weight), grad)
        exact = x.double() @ layer.weight.double().t()
        want = grad.double() @ layer.weight.double(), grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
        assert 1e-4 < relative_error(out, exact) < 0.06, "outside: not FP8, or wrong"
        assert relative_error(got[0], want[0]) < 0.1 and relative_error(got[1], want[1]) < 0.1
    layer.eval()
    assert relative_error(layer(x), exact) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_compiled_cast_saturates_as_the_plain_one_does(dtype):
    """Inside a fused kernel, as in training, and as the whole of one; what is no number stays none. Before Hopper
    Triton rounds twice, so that what is not saturated may differ by a step."""
    x = torch.cat((torch.logspace(-8, 12, 5000), torch.tensor([0.0, math.inf, math.nan]))).cuda()
    x, scale = torch.cat((x, -x)), torch.tensor(3.0, device="cuda")
    plain = tg.to_fp8(x, scale, dtype).float()
    sure = (plain.abs() == plain.abs().nan_to_num(0).max()) | plain.isnan()
    sure |= torch.cuda.get_device_capability() >= (9, 0)
    assert plain.nan_to_num(0).abs().max() == torch.finfo(dtype).max and plain.isnan().sum() == 2

    @torch.compile(fullgraph=True, dynamic=False)
    def cast(x, y):
        return tg.to_fp8(x, scale, dtype), tg.to_fp8(x + y, scale, dtype)

    for fused in cast(x, torch.zeros_like(x)):
        assert torch.equal(fused.float().nan_to_num(-1)[sure], plain.nan_to_num(-1)[sure])


def test_the_compiled_loss_over_candidates_and_its_gradients_equal_the_plain_ones():
    """Both with a head in FP8: without compiler each sum, quotient and cast is a kernel of its own."""
    torch.manual_seed(0)
    model, length = tg.place(tg.GPT(small(), 384), "cuda").train(), 512
    model.set_grad_scale(length)
    torch.nn.init.normal_(model.embed.weight, std=0.2)
    targets = torch.randint(0, 200, (length,), device="cuda").int()
    targets[:3] = torch.tensor([EOT, -100, 256])
    x = torch.randn(length, 256, device="cuda").bfloat16().requires_grad_()
    found = torch.rand(length, device="cuda").requires_grad_()
    inputs, weight = (x, found, model.embed.weight), torch.rand(length, device="cuda") / length
    with mock.patch.object(tg, "CANDIDATES", 320):
        rows, weights = model.candidates(targets)
    assert len(rows) == 320 and weights.max() > 1
    ends = []
    for run in (model.sums, torch.compile(model.sums, fullgraph=True, dynamic=False)):
        with mock.patch.object(model, "sums", run):
            losses = model.losses(x, found, targets, rows, weights)
        ends.append((losses, *torch.autograd.grad((losses * weight).sum(), inputs)))
    for plain, fused in zip(*ends):
        assert plain.any() and relative_error(fused, plain) < 3e-2


def test_training_and_validation_never_recompile_and_follow_the_uncompiled_model():
    torch._dynamo.reset()
    hp = small()
    torch.manual_seed(0)
    model = tg.place(tg.GPT(hp, 384), "cuda").train()
    t = trainer(model, hp)
    t.compile()
    ids = [random_documents(hp.train_seq_len + 1, torch.Generator().manual_seed(i)).cuda() for i in range(2)]
    data = torch.stack([torch.stack((t[:-1], t[1:])) for t in ids]).int()
    long = random_documents(hp.val_seq_len, torch.Generator().manual_seed(9)).int().cuda()
    targets = long.roll(-1).long()

    def validate():
        with torch.no_grad():
            x = model.features(long, t.window)
            return x, model.pointer(x, long, targets, True)

    first = float(t.train_step(0, data))
    model.eval()
    validate()
    model.train()
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(hp.steps):
            loss = float(t.train_step(step, data))
            seen.add(int(t.window))
            model.eval()
            out, found = validate()
            model.train()
    assert seen == set(range(1, 15)) and loss < first - 2, (seen, first, loss)
    model.eval()
    model.use_flex = False
    with torch.no_grad():
        assert relative_error(out, tg.GPT.features(model, long, t.window)) < 3e-2
        assert found.any() and relative_error(found, tg.Pointer.forward(model.pointer, out, long, targets)) < 3e-2


def test_accumulated_sequences_equal_one_batch_of_them():
    """FP8 on: the gradient that the optimizers see is the mean over sequences, however many there are."""
    hp = small()
    torch.manual_seed(0)
    model = tg.place(tg.GPT(hp, 384), "cuda").train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    window = torch.full((), 4, dtype=torch.int32, device="cuda")
    ids = random_documents(hp.train_seq_len + 1, torch.Generator().manual_seed(1)).cuda()
    grads = []
    for copies in (1, 4):
        model.zero_grad()
        for _ in range(copies):
            model(ids[:-1].int(), ids[1:], window).backward()
        t = trainer(model, dataclasses.replace(hp, sequences_per_step=copies))
        t.set_schedules(0)
        muon = t.optimizers[0]
        grads.append(muon.buckets[0].pack().float() / muon.grad_divisor)
    assert grads[0].norm() > 0 and relative_error(grads[1], grads[0]) < 1e-2


def test_newton_schulz_in_bf16_orthogonalizes():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(tg.zeropower_via_newtonschulz5(torch.randn(3, 768, 3072, device="cuda")).float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_stages_never_recompile_and_follow_the_uncompiled_model():
    """Three stages of two lengths, one of them with both kinds of softmax, with a tied table and an average: warm-up
    compiles and captures all, the run nothing; the losses are those of dense attention without a compiler."""
    torch._dynamo.reset()
    hp = small(batch_stages=f"2x{8 * BLOCK} 4x{8 * BLOCK} 2x{16 * BLOCK}", steps=9, fp8=False,
               average=1.0, sampled=0.5)
    losses = []
    for fast in (True, False):
        if fast:
            t = tg.build(hp, 384, 0, 1, torch.device("cuda"))
            assert t.warm_up() > 2**20, "what a step uses and gives back"
        else:
            torch.manual_seed(hp.seed)
            with torch.device("cuda"):
                model = tg.place(tg.GPT(hp, 384), "cuda")
            model.use_flex = False
            t = trainer(model, hp)
        with torch._dynamo.config.patch(error_on_recompile=fast):
            tokens = np.random.default_rng(0).integers(0, 100, 60_000).astype(np.uint16)
            tokens[::180] = tg.EOT
            stream = tg.TokenStream([tokens])
            losses.append([float(t.train_step(step, batch)) for step, batch in enumerate(tg.prefetch(stream, hp))])
        assert len(t.graphs) == 4 * fast
    assert losses[0] == pytest.approx(losses[1], abs=0.03) and losses[0][-1] < losses[0][0] - 0.3, losses


def test_graphs_train_as_their_kernels_one_by_one_and_go_on_from_a_checkpoint(tmp_path):
    """Runs of the command, since its checkpoints go into tensors that graphs read where they are. Sums by atomics make
    each run a little different."""
    make_corpus(tmp_path / "data", train=(60_000,), val=4000)
    knobs = ["--train_seq_len=1024", "--val_seq_len=2048", "--val_tokens=3000", "--steps=16", "--model_dim=256",
             "--sequences_per_step=2", "--lr_batch=2048", "--save=False", "--average=1", "--sampled=0.8"]
    plain = edited(tmp_path, "if self.cuda and not self.hp.log_norms else 0", "if False else 0")
    run_script(tmp_path, *knobs, script=plain)
    run_script(tmp_path, *knobs, "--checkpoint_every=12")
    checkpoint = next(tmp_path.glob("logs/*/checkpoints/step_000012.pt"))
    run_script(tmp_path, *knobs, f"--resume={checkpoint}")
    ends = [events(folder, "end")[0] for folder in run_folders(tmp_path)]
    losses = [end["val_loss"] for end in ends]
    assert losses == pytest.approx([losses[0]] * 3, abs=0.02), losses
    first = [events(folder, "step")[0]["train_loss"] for folder in run_folders(tmp_path)[:2]]
    assert losses[0] < first[0] - 0.3 and first[0] == pytest.approx(first[1], abs=0.01)
