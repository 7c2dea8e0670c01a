"""CastedLinear without a GPU: torch multiplies FP8 on the CPU too, so the numerics of both passes can be seen there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from probe import compiles
from reference import relative_error
from small import small_hp, small_model
from torch._inductor.utils import run_and_get_code

import train_gpt as tg

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class OnFP8Device(torch.Tensor):
    """A CPU tensor that takes the path of a CUDA one."""

    is_cuda = property(lambda self: True)


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """What a tensor core asks and the CPU does not: multiples of 16, A row-major, B column-major."""
    real = torch._scaled_mm

    def checked(a, b, *args, **kwargs):
        assert all(n % 16 == 0 for n in (*a.shape, *b.shape)), (a.shape, b.shape)
        assert a.is_contiguous() and b.t().is_contiguous()
        return real(a, b, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", checked)


def make(rows=(32,), inputs=64, outputs=96, seed=0, **layer):
    """(layer, input, gradient of the output), sized as in the head: small weights, smaller gradients."""
    torch.manual_seed(seed)
    layer = tg.CastedLinear(inputs, outputs, **{"grad_scale": 2.0**10, **layer})
    x = torch.randn(*rows, inputs).bfloat16().as_subclass(OnFP8Device).requires_grad_()
    return layer, x, (torch.randn(*rows, outputs) * 0.02).bfloat16()


def plain(x):
    return x.detach().as_subclass(torch.Tensor)


def exact(layer, x, grad):
    """(output, gradient of x, gradient of the weight) in double precision."""
    x, grad, weight = plain(x).double(), grad.double(), layer.weight.detach().double()
    return x @ weight.t(), grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


# The relative error of rounding is about 2.6 % in e4m3 and 5.2 % in e5m2, and a product has both factors' together.
def test_forward_and_backward_are_fp32s_within_the_formats_rounding():
    layer, x, grad = make((256,))
    out = layer(x)
    got = (out, *torch.autograd.grad(out, (x, layer.weight), grad))
    for name, value, want, low, high in zip(("y", "dx", "dw"), got, exact(layer, x, grad),
                                            (0.025, 0.045, 0.045), (0.045, 0.07, 0.07)):
        assert low < relative_error(value, want) < high, (name, "below: not FP8; above: wrong")
    assert out.dtype == got[1].dtype == torch.bfloat16 and got[2].dtype == torch.float32


def test_each_operand_is_rounded_once_in_its_own_format():
    layer, x, grad = make((32,))
    got = torch.autograd.grad(layer(x), (x, layer.weight), grad)
    x8, w8 = (plain(x).float() * 2).to(E4M3).float() / 2, (layer.weight.detach() * 512).to(E4M3).float() / 512
    g8 = (grad.float() * 2**10).to(E5M2).float() / 2**10
    for value, want in zip((layer(x), *got), (x8 @ w8.t(), g8 @ w8, g8.t() @ x8)):
        assert relative_error(value, want) < 4e-3  # bf16 results


def test_the_gradient_of_the_weight_keeps_fp32():
    layer, x, grad = make((64,))
    weight_grad = torch.autograd.grad(layer(x), layer.weight, grad)[0]
    assert not torch.equal(weight_grad, weight_grad.bfloat16().float()), "this sum over sequences needs its low bits"


@compiles("torch.relu", "torch.ones(8)")
@pytest.mark.parametrize("width, kernels", [(768, 2), (2048, 1)])
def test_a_copy_to_column_major_is_apart_from_the_sum_of_a_narrow_row(width, kernels):
    """Else Inductor joins them, and a GPU writes a byte at a time; the values are those of a plain transposition."""
    def normed(x):
        x8 = tg.to_fp8(tg.norm(x), torch.ones(()), E4M3)
        return x8, tg.column_major(x8)

    torch._dynamo.reset()
    x = torch.randn(32, width)
    (x8, copy_), code = run_and_get_code(torch.compile(normed, fullgraph=True, dynamic=False), x)
    assert torch.equal(copy_.float(), x8.float()) and copy_.stride() == (1, 32)
    assert "".join(code).count("aten.view.dtype(") == 2 * (kernels - 1)


def test_what_is_too_large_saturates():
    for dtype in (E4M3, E5M2):
        limit, one = torch.finfo(dtype).max, torch.ones(())
        wide = torch.tensor([limit, 2 * limit, -1e30, 1.0])
        assert tg.to_fp8(wide, one, dtype).float().tolist() == [limit, limit, -limit, 1.0]
    layer, x, grad = make((16,), grad_scale=2.0**19)
    grad_x, grad_w = torch.autograd.grad(layer(x), (x, layer.weight), grad.sign() * 3.0)
    assert torch.isfinite(grad_x).all() and torch.isfinite(grad_w).all()
    largest = torch.finfo(E5M2).max / 2.0**19
    assert relative_error(grad_x, grad.float().sign() * largest @ layer.weight) < 0.06
    layer, x, _ = make((16,), x_scale=2.0**20)
    assert torch.isfinite(layer(x)).all()


def test_the_gradient_scale_keeps_small_gradients_from_underflow():
    """Of a mean over 48K tokens each logit's gradient is below 1e-7: without its scale e5m2 rounds it to nothing."""
    got, errors = {}, {}
    for scale in (1.0, 2.0**19):
        layer, x, grad = make((48,), grad_scale=scale)
        grad = grad * 5e-7
        got[scale] = torch.autograd.grad(layer(x), layer.weight, grad)[0]
        errors[scale] = relative_error(got[scale], exact(layer, x, grad)[2])
    assert not got[1.0].any(), "all of it is lost"
    assert errors[2.0**19] < 0.15


@pytest.mark.parametrize("rows", [(1,), (15,), (16,), (17,), (3, 37), (2, 5, 7), (), (0,)])
def test_any_leading_shape_and_row_count(rows):
    layer, x, grad = make(rows)
    out = layer(x)
    assert out.shape == (*rows, 96)
    grad_x, grad_w = torch.autograd.grad(out, (x, layer.weight), grad)
    assert grad_x.shape == x.shape and grad_w.shape == layer.weight.shape
    count = max(1, x.numel() // 64)
    if x.numel():  # what a batch without padding gives; a kernel may choose its order of sums by the count of rows
        filled = plain(x).reshape(count, 64).repeat(16, 1).as_subclass(OnFP8Device).requires_grad_()
        many = layer(filled)
        assert relative_error(plain(many)[:count], plain(out).reshape(count, 96)) < 4e-3
        repeated = torch.autograd.grad(many, (filled, layer.weight), grad.reshape(count, 96).repeat(16, 1))
        assert relative_error(plain(repeated[0])[:count], plain(grad_x).reshape(count, 64)) < 4e-3
        assert relative_error(repeated[1] / 16, grad_w) < 1e-5
    else:
        assert not grad_w.any()


@pytest.mark.parametrize("why", ["eval", "switch", "cpu", "features"])
def test_where_fp8_is_off_it_is_plain_linear(why):
    layer, x, _ = make(inputs=40 if why == "features" else 64)
    layer.train(why != "eval")
    layer.use_fp8 = why != "switch"
    out = layer(plain(x) if why == "cpu" else x)
    assert torch.equal(plain(out), F.linear(plain(x), layer.weight.bfloat16()))
    wide = plain(x).float()
    assert torch.equal(layer(wide), F.linear(wide, layer.weight)), "fp32 stays fp32 on the CPU"


@pytest.mark.parametrize("fp8", [True, False])
def test_some_of_the_outputs_are_those_of_all_and_so_are_their_gradients(fp8):
    layer, x, grad = make((32,), bias=True)
    layer.use_fp8 = fp8
    chosen, few = torch.arange(95, -1, -3), layer(x, torch.arange(95, -1, -3))  # 32 of 96
    others = torch.zeros_like(grad)
    others[:, chosen] = grad[:, chosen]
    assert torch.equal(plain(few), plain(layer(x))[:, chosen])
    inputs = x, layer.weight, layer.bias
    want = torch.autograd.grad(layer(x), inputs, others)
    for a, b in zip(torch.autograd.grad(few, inputs, grad[:, chosen]), want):
        assert b.any() and relative_error(plain(a), plain(b)) < 4e-3


@pytest.mark.parametrize("index", range(3))
def test_the_scale_tensor_is_what_is_used(index):
    layer, x, grad = make((32,))
    assert layer.scale.tolist() == [2.0, 512.0, 2.0**10] and layer.scale.dtype == torch.float32
    before = layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), grad)
    layer.scale[index] *= 4
    after = layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), grad)
    for a, b in zip(before, after):  # the scale is divided out again: powers of two change nothing in normal range
        assert relative_error(b, a) < 0.03
    layer.scale[index] = 2.0**-40  # everything underflows, which the results that use this operand show
    lost = layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), grad)
    users = [(0, 2), (0, 1), (1, 2)][index]
    assert [not bool(value.any()) for value in lost] == [i in users for i in range(3)]


def test_the_default_scales_and_where_they_live():
    layer = tg.CastedLinear(32, 16, dtype=torch.bfloat16, device="meta")
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.is_meta and layer.scale.is_meta and layer.bias is None
    assert tg.CastedLinear(32, 16).scale.tolist() == [2.0, 512.0, 524288.0]
    assert tg.CastedLinear(32, 16, 4.0, 8.0, 16.0).scale.tolist() == [4.0, 8.0, 16.0]
    assert list(tg.CastedLinear(32, 16).state_dict()) == ["weight"]


@pytest.mark.parametrize("cast", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16), lambda m: m.type(torch.half), lambda m: copy.deepcopy(m).half()])
def test_scales_keep_fp32_under_any_cast_of_the_model(cast):
    """2^19 is infinite in fp16, and both FP8 gradients were zero."""
    layer = cast(torch.nn.Sequential(tg.CastedLinear(64, 64, 4.48, 280.0)))[0]
    assert torch.equal(layer.scale, torch.tensor([4.48, 280.0, 2.0**19])) and layer.weight.dtype != torch.float32
    assert layer(torch.zeros(2, 64)).dtype == layer.scale.dtype == torch.float32


def test_scales_go_where_the_input_is_and_copies_have_their_own():
    layer, x, grad = make((32,))
    layer.half()
    other = copy.deepcopy(layer)
    other.scale[2] = 0.0
    assert layer.scale.tolist() == [2.0, 512.0, 2.0**10]
    assert all(part.any() for part in torch.autograd.grad(layer(x), (x, layer.weight), grad))


@pytest.mark.parametrize("bias", [False, True])
def test_weights_load_strictly_from_nn_linear_and_back(bias):
    ours, theirs = tg.CastedLinear(32, 16, bias=bias), torch.nn.Linear(32, 16, bias=bias)
    x = torch.randn(5, 32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(x), theirs(x))
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours(x), theirs(x))


def test_bias_is_a_keyword_and_is_added_on_both_paths():
    with pytest.raises(TypeError, match="x_scale.*bias=True by keyword"):
        tg.CastedLinear(32, 16, True)
    with pytest.raises(TypeError, match="x_scale.*bias=True by keyword"):
        tg.CastedLinear(32, 16, False)
    with pytest.raises(TypeError):
        tg.CastedLinear(32, 16, 2.0, 512.0, 1.0, True)
    layer, x, grad = make((4, 5), bias=True)
    out = layer(x)
    without = layer.bias.detach().clone()
    grad_bias = torch.autograd.grad(out, layer.bias, grad)[0]
    assert relative_error(grad_bias, grad.flatten(0, 1).float().sum(0)) < 1e-2
    torch.nn.init.zeros_(layer.bias)
    assert without.abs().max() > 0.05
    assert relative_error(plain(out) - plain(layer(x)), without.expand(4, 5, 96)) < 2e-2


def test_the_model_scales_its_gradient_by_the_length_of_a_sequence():
    """2^19 belongs to the mean over 48K tokens: a shorter mean has larger gradients, and a smaller scale."""
    for length in (256, 1024):
        model = small_model(small_hp(train_seq_len=length, x_scale=3.0, w_scale=64.0))
        head = model.lm_head
        assert head.scale.tolist() == pytest.approx([3.0, 64.0, 2.0**19 * length / (48 * 1024)])
        assert len(model.fp8_layers) == 2 * len(model.blocks) + 1 and head in model.fp8_layers
        assert all(layer.scale[2] == head.scale[2] for layer in model.fp8_layers)
    head = small_model(small_hp(train_seq_len=48 * 1024, layer_pattern="SS", value_pattern="..")).lm_head
    assert head.scale[2] == 2.0**19


@pytest.mark.parametrize("large", [False, True])
def test_an_mlp_in_fp8_is_that_in_bf16_up_to_rounding(large):
    """At the scales that it has. Small: weights sized as `up`'s begin, so that most squares are below 0.25; scaled four
    times further down they would miss the limits. Large: weights of up to 5 and squares of some 2,000, which four and
    sixteen times the scales clip. Gradients are those of a mean over 48K tokens, or, in the large case, a hundredth of
    that, so that those between the matrices do not saturate."""
    hp = small_hp(train_seq_len=48 * 1024, grad_scale=2.0**25)
    mlp = small_model(hp, awake=True).blocks[0].mlp.train()
    generator = torch.Generator().manual_seed(1)
    for weight in (mlp.up.weight, mlp.down.weight):
        size = 1.3 if large else 0.5 * weight.size(1) ** -0.5
        weight.data = torch.empty(weight.shape).normal_(0, size, generator=generator).clamp(-5, 5)
    x = tg.norm(torch.randn(256, 64, generator=generator)).bfloat16()
    squares = F.relu(F.linear(x.float(), mlp.up.weight)).square()
    if large:
        assert 1000 < squares.max() < 5000 and min(mlp.up.weight.max(), mlp.down.weight.max()) > 4
    else:
        assert squares.median() < 0.25 and squares.max() < 10
    grad = torch.randn(256, 64, generator=generator) / (48 * 1024) / (100 if large else 1)
    x, grad = x.as_subclass(OnFP8Device).requires_grad_(), grad.bfloat16()
    inputs, found = (x, mlp.up.weight, mlp.down.weight), []
    for fp8 in (True, False):
        mlp.up.use_fp8 = mlp.down.use_fp8 = fp8
        y = mlp(x)
        found.append([plain(t) for t in (y, *torch.autograd.grad(y, inputs, grad))])
    for a, b, limit in zip(*found, (0.08, 0.12, 0.12, 0.09)):
        assert b.any() and 0.02 < relative_error(a, b) < limit


def test_without_cuda_the_reason_is_said():
    assert tg.fp8_supported("cpu") == (False, "no CUDA device")


def test_a_probe_that_fails_says_why(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr(tg, "CastedLinear", refuse)
    assert tg.fp8_supported("cuda") == (False, "probe failed: no such kernel")


def test_scales_move_with_their_module():
    """To the device of the weight, and not anew in each forward; without data there is nothing to move."""
    layer = tg.CastedLinear(16, 32)
    assert layer.to("meta").scale.is_meta and layer.scale.dtype == torch.float32
    assert layer.to_empty(device="cpu").weight.device.type == "cpu"
