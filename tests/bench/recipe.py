"""Times the recipe's parts on one GPU, by themselves:

    python tests/bench/recipe.py [--quick] [--tiny] [--knob=value ...]

bf16 matmul ceiling at 8192^3, forward and backward of one training sequence at four windows, the optimizer step, peak
memory, and without --quick the FP8 head as autograd.Function and as custom operator, arms interleaved. Medians; tokens
are made up. Without CUDA all is --tiny, and there is no ceiling and no FP8 head. Exit code 2: a knob cannot work."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import TINY, make_parser, read_knobs, tg  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# The other way to write the FP8 head: opaque operators, inside which nothing is fused with the neighbours.
@torch.library.custom_op("sprint_bench::fp8_forward", mutates_args=())
def fp8_forward(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, scale)


@torch.compile
def _forward(x, weight, scale):
    x8, w8 = tg.to_fp8(x, scale[0], E4M3), tg.to_fp8(weight, scale[1], E4M3)
    inv = [s.reciprocal() for s in scale.unbind()]
    return torch._scaled_mm(x8, w8.t(), inv[0], inv[1], out_dtype=torch.bfloat16, use_fast_accum=True), x8, w8


@fp8_forward.register_fake
def _(x, weight, scale):
    return x.new_empty(x.size(0), weight.size(0)), x.to(E4M3), weight.to(E4M3)


@torch.library.custom_op("sprint_bench::fp8_backward", mutates_args=())
def fp8_backward(grad: Tensor, x8: Tensor, w8: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, x8, w8, scale)


@torch.compile
def _backward(grad, x8, w8, scale):
    g8 = tg.to_fp8(grad, scale[2], E5M2)
    inv = [s.reciprocal() for s in scale.unbind()]
    grad_x = torch._scaled_mm(g8, tg.column_major(w8), inv[2], inv[1], out_dtype=torch.bfloat16)
    grad_w = torch._scaled_mm(tg.column_major(x8).t(), tg.column_major(g8), inv[0], inv[2], out_dtype=torch.float32)
    return grad_x, grad_w.t().contiguous()


@fp8_backward.register_fake
def _(grad, x8, w8, scale):
    return grad.new_empty(x8.shape), grad.new_empty(w8.shape, dtype=torch.float32)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2], inputs[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, *_):
    return *fp8_backward(grad, *ctx.saved_tensors), None


fp8_forward.register_autograd(_gradients, setup_context=_setup)


def median_ms(work, repeats: int, warm: int = 2) -> float:
    """Median of the ms that work() takes, on the GPU where there is one."""
    cuda, times = torch.cuda.is_available(), []
    for _ in range(warm):
        work()
    for _ in range(repeats):
        if not cuda:
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e3)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def seconds(work) -> float:
    """That work() takes once, compilation and all."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def documents(length: int, generator: torch.Generator, device, mean: int = 500) -> tuple[Tensor, Tensor]:
    """Random tokens cut into documents of exponential length; (input_ids, targets)."""
    ids = torch.randint(0, 50000, (length + 1,), generator=generator)
    ids[torch.rand(length + 1, generator=generator) < 1 / mean] = tg.EOT
    return ids[:-1].int().to(device), ids[1:].to(device)


def ceiling() -> float:
    """TFLOP/s of a large bf16 matmul."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b, 20, 5) / 1e9


def head_arms(model: tg.GPT, length: int) -> dict[str, float]:
    """ms of the head with loss, forward+backward, both ways interleaved three times."""
    x = torch.randn(length, model.embed.embedding_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50000, (length,), device="cuda")
    weight, scale, hp = model.lm_head.weight, model.lm_head.scale, model.hp

    def loss(head):
        logits = hp.logit_cap * torch.sigmoid((head(x).float() + hp.logit_shift) / hp.logit_temp)
        hit = targets[:, None] == torch.arange(logits.size(-1), device=x.device)
        log_total = (logits - hp.logit_cap).exp().sum(-1).log() + hp.logit_cap
        return (log_total - torch.where(hit, logits, 0).sum(-1)).mean()

    heads = {"function": lambda x: tg.FP8Matmul.apply(x, weight, scale),
             "custom op": lambda x: fp8_forward(x, weight, scale)[0]}
    arms = {name: torch.compile(lambda head=head: loss(head), fullgraph=True) for name, head in heads.items()}
    times = {name: [] for name in arms}
    for _ in range(3):
        for name, arm in arms.items():
            times[name].append(median_ms(lambda arm=arm: arm().backward(), 5))
    model.lm_head.weight.grad = None
    return {name: statistics.median(t) for name, t in times.items()}


def parse(argv: list[str]):
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="without the FP8 heads")
    args, args.knobs = parser.parse_known_args(argv)
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    hp = read_knobs("recipe", [*(TINY if args.tiny else []), *args.knobs], data=False)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    print(f"{torch.cuda.get_device_name() if cuda else 'no GPU'}, torch {torch.__version__}")
    if cuda:
        print(f"bf16 8192^3: {ceiling():.0f} TFLOP/s")
    trainer = tg.build(hp, tg.VOCAB["bytes" if args.tiny else "gpt2"], 0, 1, device)
    generator = torch.Generator().manual_seed(0)
    sequences = [documents(hp.train_seq_len, generator, device) for _ in range(4)]
    trainer.set_schedules(0)

    def sequence(pair) -> None:
        trainer.model(*pair, trainer.window).backward()

    def optimize() -> None:
        for optimizer in trainer.optimizers:
            optimizer.step()

    print(f"compile: {seconds(lambda: sequence(sequences[0])):.1f} s")
    print(f"compile optimizers: {seconds(optimize):.1f} s")
    for optimizer in trainer.optimizers:
        kinds = " ".join(group["name"] for group in optimizer.param_groups)
        print(f"{type(optimizer).__name__} step of {kinds}: {median_ms(optimizer.step, 20):.2f} ms")
    print(f"optimizer step: {median_ms(optimize, 20):.2f} ms")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    most = trainer.model.max_window
    for blocks in sorted({1, *(round(most * part) for part in (2 / 7, 4 / 7)), most} - {0}):
        trainer.window.fill_(blocks)
        times = [median_ms(lambda pair=pair: sequence(pair), 5) for pair in sequences]
        print(f"window {blocks:2d} blocks: {statistics.mean(times):.2f} ms a sequence forward+backward")
    if cuda:
        print(f"peak allocated {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
    if trainer.model.lm_head.use_fp8 and not args.quick:
        trainer.model.zero_grad()
        for name, ms in head_arms(trainer.model, hp.train_seq_len).items():
            print(f"head as {name}: {ms:.2f} ms forward+backward with the loss")


if __name__ == "__main__":
    main(sys.argv[1:])
