"""Probes and pictures of bench_claims.py: gradient norms by depth, what FP8 scales do to the head's tensors, and the
same weights scored in pieces of two lengths; FP8 products by kind of scale for bench_parts.py."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt as tg

STATS_AT = (2, 4, 8, 16, 32, 48, 64)  # steps after which FP8 statistics are taken
WATCHED = ("instrumented", "skips_fixed", "skips_none")  # the arms with probes
ROWS = 8192  # tokens of a sequence whose logit gradients are looked at
EXPONENTS = dict(gradient=range(15, 24), weight=range(6, 13), input=range(-1, 5))  # of the scales tried


def block_norms(model) -> Tensor:
    """L2 norm of each block's gradient, (layers,) fp32."""
    blocks = (*model.encoder, *model.decoder)
    grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in blocks]
    return torch.stack([torch.stack(torch._foreach_norm(g)).norm() for g in grads])


def fp8_stats(x: Tensor, scale: float, dtype: torch.dtype) -> dict[str, float]:
    """Of x * scale in this format: share of values that become 0 though they were not (`lost`), share of all zeros,
    share beyond the largest value (`clamped`), entropy of the bytes in bits, and the relative error after undoing the
    scale. The cast saturates, as the recipe's does."""
    limit = torch.finfo(dtype).max
    scaled = x.float() * scale
    values = tg.to_fp8(x, scale, dtype)
    back = values.float()
    counts = torch.bincount(values.view(torch.uint8).flatten().int(), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    zero, count = back == 0, x.numel()
    return dict(zeros=float(zero.sum() / count), lost=float((zero & (scaled != 0)).sum() / count),
                clamped=float((scaled.abs() > limit).sum() / count), bits=float(-(p * p.log2()).sum()),
                error=float((back - scaled).norm() / scaled.norm()))


def logit_gradient(model, x: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Gradient of a mean over `tokens` tokens with respect to the head's output for these rows, as backward gets it.
    x: (n, D) -> (n, V) in the dtype of x."""
    z = model.lm_head(x).detach().requires_grad_()
    with torch.enable_grad(), mock.patch.object(model.lm_head, "forward", lambda z: z):
        return torch.autograd.grad(model.losses(z, targets).sum() / tokens, z)[0]


def scale_rows(run) -> list[dict]:
    """fp8_stats of the head's three tensors on training tokens, over a range of scales."""
    hp, model = run.hp, run.model
    tokens = torch.from_numpy(run.corpus.train.read(0, hp.val_seq_len + 1))
    count = min(ROWS, hp.train_seq_len)
    input_ids, targets = tokens[:-1].to(run.device), tokens[1 : count + 1].long().to(run.device)
    model.eval()
    with torch.no_grad():
        x = run.features(input_ids, run.window)[:count].clone()
    model.train()
    in_use = model.lm_head.scale.tolist()  # the gradient's follows the length of a sequence
    gradient = logit_gradient(model, x, targets, hp.train_seq_len)
    cases = [("gradient", gradient, torch.float8_e5m2, hp.grad_scale, in_use[2]),
             ("weight", model.lm_head.weight.detach(), torch.float8_e4m3fn, hp.w_scale, in_use[1]),
             ("input", x, torch.float8_e4m3fn, hp.x_scale, in_use[0])]
    return [dict(probe="scale", tensor=name, exponent=e, own=knob == 2.0**e,
                 **fp8_stats(values, 2.0**e * used / knob, dtype))
            for name, values, dtype, knob, used in cases for e in EXPONENTS[name]]


class Watch:
    """Has every optimizer step of a run note the blocks' gradient norms and, in the arm `instrumented`, at STATS_AT
    the FP8 statistics. The norms stay on the GPU until `rows`: reading them at once would make it wait."""
    def __init__(self, run, arm: str):
        self.run, self.arm, self.norms, self.scales = run, arm, [], []
        self.real = [optimizer.step for optimizer in run.optimizers]
        run.optimizers[0].step, run.optimizers[-1].step = self.first, self.last

    def first(self) -> None:
        self.norms.append(block_norms(self.run.model) / self.run.hp.sequences_per_step)
        self.real[0]()

    def last(self) -> None:
        self.real[-1]()
        if self.arm == "instrumented" and len(self.norms) in STATS_AT:
            self.scales += [dict(row, step=len(self.norms)) for row in scale_rows(self.run)]

    def rows(self) -> list[dict]:
        rows = [dict(probe="gradient", step=i, norms=norms.tolist()) for i, norms in enumerate(self.norms, 1)]
        rows += self.scales + (lengths(self.run) if self.arm == "instrumented" else [])
        return [dict(arm=self.arm, seed=self.run.hp.seed, **row) for row in rows]


def lengths(run) -> list[dict]:
    """The validation tokens scored by the weights of the end, in pieces of validation's and of training's length."""
    rows = []
    for length in (run.hp.val_seq_len, run.hp.train_seq_len):
        loss = run.evaluate(run.corpus.val, dataclasses.replace(run.hp, val_seq_len=length))
        rows.append(dict(probe="length", length=length, val_loss=loss, val_tokens=run.hp.val_tokens))
    return rows


# ---- FP8 products by kind of scale, for bench_parts.py

def quantise(x: Tensor, dtype: torch.dtype, tile: tuple[int, int], scale: Tensor | None = None) -> tuple:
    """x with a scale for each tile (0: all), by default of its largest value: (values, factors that undo it, fp32)."""
    rows, columns = (n or size for n, size in zip(tile, x.shape))
    tiles = x.float().view(x.size(0) // rows, rows, x.size(1) // columns, columns)
    if scale is None:
        scale = torch.finfo(dtype).max / tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    values = tg.to_fp8(tiles, scale, dtype).reshape(x.shape).contiguous()
    return values, scale.reciprocal().view(scale.size(0) if scale.ndim else 1, -1)


def dequantise(values: Tensor, factors: Tensor) -> Tensor:
    rows, columns = (a // b for a, b in zip(values.shape, factors.shape))
    tiles = values.float().view(factors.size(0), rows, factors.size(1), columns)
    return (tiles * factors[:, None, :, None]).view(values.shape)


def multiply(scheme: str, kinds: str, out: torch.dtype, a: Tensor, fa: Tensor, b: Tensor, fb: Tensor) -> Tensor:
    """A B^T by the kernel of the scheme; operands and factors as `quantise` gives them."""
    if scheme == "bf16":
        return a @ b.t()
    if scheme == "block":
        if not a.is_cuda:
            raise NotImplementedError("needs CUDA")
        by_column, kind = lambda f: f.t().contiguous().t(), F.ScalingType
        second, how = by_column(fb), kind.BlockWise1x128
        if kinds[1] == "w":  # cuBLASLt reads four factors at a time
            second, how = F.pad(fb, (0, -fb.size(1) % 4)).contiguous().t(), kind.BlockWise128x128
        return F.scaled_mm(a, b.t(), by_column(fa), kind.BlockWise1x128, second, how, output_dtype=out)
    shapes = ((-1, 1), (1, -1)) if scheme == "row" else ((), ())
    factors = [f.reshape(shape).contiguous() for f, shape in zip((fa, fb), shapes)]
    return torch._scaled_mm(a, b.t(), *factors, out_dtype=out, use_fast_accum=kinds == "xw")  # as the recipe


def pieces(total: int, rows: int = 4096) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, total, rows)]


def product_error(a: Tensor, b: Tensor, out) -> float:
    """||out - A B^T|| / ||A B^T||, the reference in fp32. out(rows): these rows of the product."""
    b, sums = b.float(), torch.zeros(2, dtype=torch.float64, device=b.device)
    for rows in pieces(len(a)):
        exact = a[rows].float() @ b.t()
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in (out(rows).float() - exact, exact)]
        sums += torch.stack(norms).square()
    return float((sums[0] / sums[1]).sqrt())


def emulated_error(a: Tensor, b: Tensor, a8: Tensor, fa: Tensor, b8: Tensor, fb: Tensor) -> float:
    """The same of the rounded operands, multiplied in fp32: what rounding alone costs, whatever the kernel does."""
    rounded = dequantise(b8, fb).t()
    return product_error(a, b, lambda rows: dequantise(a8[rows], fa if len(fa) == 1 else fa[rows]) @ rounded)


# ---- Pictures

def read_probes(state: Path) -> list[dict]:
    """The rows of every arm's probes, all seeds: of each arm, those of the script and knobs probed last."""
    paths, keys = sorted(state.glob("probes_*.*.*.jsonl"), key=lambda path: path.stat().st_mtime), {}
    for path in paths:
        arm, _, keys[arm] = path.stem.split(".")  # written by bench_claims: arm, seed, key of script and knobs
    return [json.loads(line) for path in paths if keys[path.stem.split(".")[0]] == path.stem.split(".")[2]
            for line in path.read_text(encoding="utf-8").splitlines()]


def draw(folder: Path, state: Path) -> None:
    """gradients.png and scales.png from the probes; where the folder is a record of these arms, curve.png too."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_probes(state)
    if {row["arm"] for row in rows} != set(WATCHED):
        sys.exit(f"bench_claims: {state} lacks the probes of some of {', '.join(WATCHED)}: train these arms first")
    folder.mkdir(parents=True, exist_ok=True)
    draw_gradients(plt, [r for r in rows if r["probe"] == "gradient"], folder / "gradients.png")
    scales = [r for r in rows if r["probe"] == "scale"]
    draw_scales(plt, [r for r in scales if r["seed"] == min(r["seed"] for r in scales)], folder / "scales.png")
    if (folder / "arms" / "all_off").is_dir():
        draw_curve(plt, folder, folder / "curve.png")


def save(plt, figure, path: Path) -> None:
    """As a PNG of 64 colours: a record's pictures share 100 KB."""
    from PIL import Image  # which matplotlib brings
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def draw_gradients(plt, rows: list[dict], path: Path) -> None:
    """The norms of every run; a seed has a shade, and the arms a colour and a line."""
    arms = dict(instrumented=("learned skips", "C0-"), skips_fixed=("fixed at 1", "C1:"),
                skips_none=("no skips", "C2--"))
    seeds = sorted({r["seed"] for r in rows})
    steps = sorted({r["step"] for r in rows})
    steps = [min(steps, key=lambda s: abs(s - wanted)) for wanted in (2, 4, 16, steps[-1])]
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=True)
    for axis, step in zip(axes, steps):
        for arm, (label, line) in arms.items():
            for row in (r for r in rows if (r["arm"], r["step"]) == (arm, step)):
                shade, name = 1 - 0.6 * seeds.index(row["seed"]) / len(seeds), f"{label}, seed {row['seed']}"
                axis.plot(range(len(row["norms"])), row["norms"], line, marker="o", markersize=3, alpha=shade,
                          label=name)
        axis.set(title=f"step {step}", xlabel="layer", yscale="log", xticks=range(0, len(rows[0]["norms"]), 2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("L2 norm of the layer's gradient")
    axes[-1].legend(fontsize=8)
    save(plt, figure, path)


def draw_scales(plt, rows: list[dict], path: Path) -> None:
    last, groups = max(r["step"] for r in rows), defaultdict(list)
    for row in sorted(rows, key=lambda r: r["exponent"]):
        if row["step"] == last:
            groups[row["tensor"]].append(row)
    figure, axes = plt.subplots(1, len(groups), figsize=(11, 3.2))
    for axis, (tensor, found) in zip(axes, groups.items()):
        x = [r["exponent"] for r in found]
        for key, label in dict(zeros="share of zeros", clamped="share clamped", error="relative error").items():
            drawn = [r[key] or math.nan for r in found]
            none = " (none)" if all(map(math.isnan, drawn)) else ""
            axis.plot(x, drawn, marker="o", markersize=3, label=label + none)
        axis.axvline(next(r["exponent"] for r in found if r["own"]), color="gray", linestyle="--", linewidth=1)
        axis.set(title=f"head's {tensor}, {'e5m2' if tensor == 'gradient' else 'e4m3'}, step {last}", yscale="log",
                 xlabel="log2 of the scale (dashed: the default)", ylim=(1e-6, 2))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("share of values, or error")
    save(plt, figure, path)


def draw_curve(plt, record: Path, path: Path) -> None:
    """Training loss against training time; circles are the validation losses of the ends."""
    sets = {"all off": "arms/all_off", "default": "runs", "default, no momentum warm-up": "arms/momentum_warmup_off"}
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for color, (label, place) in zip(("C1", "C0", "C2"), sets.items()):
        folders = sorted((record / place).glob("*/metrics.jsonl"))
        for i, events in enumerate([json.loads(line) for line in file.read_text().splitlines()] for file in folders):
            points = [(e["train_ms"] / 1e3, e["train_loss"]) for e in events if e["event"] == "step"]
            name = f"{label}, n = {len(folders)}" if i == 0 else None
            axis.plot(*zip(*points), color=color, linewidth=1, label=name)
            axis.plot(points[-1][0], events[-1]["val_loss"], "o", color=color, markerfacecolor="none")
    axis.set(xlabel="training time, s", ylabel="loss, nats per token (circles: validation)", ylim=(4.7, 6.5))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save(plt, figure, path)
