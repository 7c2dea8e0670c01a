"""GPT Sprint: train a GPT-2-class language model (275 M parameters, 121 M of them in matmuls) as fast as possible.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # the full FineWeb run, 8 H100s
    python train_gpt.py --preset=80gb                          # the same steps on one GPU, by gradient accumulation
    python train_gpt.py --steps=20 --val_tokens=262144         # a 20-step smoke run: every schedule scales
    python train_gpt.py --preset=cpu --data_dir=data/embedded  # three minutes on a laptop's CPU
    python train_gpt.py --help                                 # every knob: default, unit, meaning

The file has two halves. The RECIPE is all that moves the loss or the clock, and can be read alone:
 1 hyperparameters   2 schedules   3 FP8 matmul   4 attention masks   5 optimizers   6 modules   7 GPT and the step
The HARNESS makes it safe and pleasant:
 8 command line   9 data   10 run folder, clock, checkpoints   11 text   12 main

The recipe is public record 21 of the NanoGPT speedrun (github.com/KellerJordan/modded-nanogpt, 2025-01-26). Letters:
B = query blocks, C = block size, D = model width, H = heads, K = head width, L = layers, T = tokens of a sequence,
V = vocabulary rows, W = window in blocks, S = sequences a step. Hard stop: recipe 900 lines, harness 600.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import json
import math
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# ======================================================================================================================
# RECIPE: all that moves the loss or the clock
# ======================================================================================================================

# ----------------------------------------------------------------------------------------------------------------------
# 1. Hyperparameters: every knob, once. A span (unit "span") is a fraction of the run up to 1, a count of steps above 1.
# ----------------------------------------------------------------------------------------------------------------------


def knob(default, group: str, unit: str, meaning: str, place: bool = False):
    """A dataclass field that `--help` can print. `place`: says where things lie, never what is computed."""
    return field(default=default, metadata=dict(group=group, unit=unit, meaning=meaning, place=place))


@dataclass(frozen=True)
class Hyperparameters:
    """The defaults are the full FineWeb run on 8 ranks. Derived values are properties, not knobs."""

    # data
    data_dir: str = knob("data/fineweb10B", "data", "path", "folder with *train*.bin and *val*.bin shards", place=True)
    train_seq_len: int = knob(48 * 1024, "data", "tokens", "packed training sequence, a multiple of 128")
    val_seq_len: int = knob(4 * 64 * 1024, "data", "tokens", "packed validation sequence, a multiple of 128")
    sequences_per_step: int = knob(8, "data", "sequences", "batch of one optimizer step, over all ranks")
    val_tokens: int = knob(10_485_760, "data", "tokens", "scored from the start of the validation stream")
    epochs: int = knob(1, "data", "passes", "how often the training stream may be read; 1 = never repeat")
    # schedule
    steps: int = knob(1770, "schedule", "steps", "length of the run; every span scales with it")
    cooldown: float = knob(0.4, "schedule", "span", "linear learning-rate decay at the end; 0 = off")
    lr_floor: float = knob(0.1, "schedule", "x lr", "what the decay ends at")
    momentum_warmup: float = knob(300 / 1770, "schedule", "span", "Muon momentum rises to its value; 0 = off")
    window_min: int = knob(128, "schedule", "tokens", "attention window at step 0; = window_max: no schedule")
    window_max: int = knob(1792, "schedule", "tokens", "attention window at the end")
    # model
    layer_pattern: str = knob("LSSSLSS-SSSL", "model", "one a layer", "attention window: L long, S half, - no attention")
    value_pattern: str = knob("012......012", "model", "one a layer", "value-embedding table added to v; . none")
    model_dim: int = knob(768, "model", "channels", "width D of the residual stream")
    num_heads: int = knob(6, "model", "heads", "attention heads H, each model_dim / num_heads wide")
    mlp_ratio: int = knob(4, "model", "x width", "hidden width of the MLP")
    attn_scale: float = knob(0.12, "model", "x q.k", "softmax temperature: QK-norm makes 1/sqrt(K) too cold")
    rope_base: float = knob(1024.0, "model", "1", "slowest rotary frequency is 1 / rope_base")
    logit_cap: float = knob(30.0, "model", "nats", "logits = cap * sigmoid(z / logit_temp)")
    logit_temp: float = knob(7.5, "model", "1", "see logit_cap")
    # Adam
    adam_betas: tuple = knob((0.8, 0.95), "adam", "1", "decay of both moments")
    adam_eps: float = knob(1e-10, "adam", "1", "added to the root of the second moment")
    head_lr: float = knob(0.008, "adam", "lr", "output head")
    embed_lr: float = knob(0.6, "adam", "lr", "token and value embeddings")
    scalar_lr: float = knob(0.04, "adam", "lr", "residual and value mixing scalars")
    skip_lr: float = knob(0.01, "adam", "lr", "skip weights of the U-Net; 0 = fixed at 1")
    # Muon
    muon_lr: float = knob(0.05, "muon", "lr", "matrices of the blocks")
    muon_momentum: float = knob(0.95, "muon", "1", "Nesterov momentum after its warm-up")
    muon_momentum_start: float = knob(0.85, "muon", "1", "momentum at step 0")
    newton_schulz_steps: int = knob(5, "muon", "iterations", "of the quintic that orthogonalizes an update")
    # techniques and communication
    fp8: bool = knob(True, "fp8", "switch", "FP8 output head where the GPU passes a probe; False = bf16")
    x_scale: float = knob(2.0, "fp8", "x", "head input is multiplied by this before its e4m3 cast")
    w_scale: float = knob(2.0**9, "fp8", "x", "head weight is multiplied by this before its e4m3 cast")
    grad_scale: float = knob(2.0**19, "fp8", "x", "logit gradient of a 48K-token mean before its e5m2 cast")
    grad_comm: str = knob("bf16", "fp8", "bf16|fp8", "what gradients travel in between ranks")
    # run
    seed: int = knob(1, "run", "integer", "of the initial weights")
    val_every: int = knob(125, "run", "steps", "between validations; 0 = only the first and the last")
    checkpoint_every: int = knob(0, "run", "steps", "between checkpoints; 0 = none")
    resume: str = knob("", "run", "path", "checkpoint to go on from, or latest; empty = start afresh", place=True)
    save: bool = knob(True, "run", "switch", "write the final weights to the run folder", place=True)
    weights: str = knob("", "run", "path", "with --prompt: weights.pt to sample from, or latest; no training", place=True)
    prompt: str = knob("", "run", "text", "print a continuation of this at the end; empty = of a document's start")
    bpe_file: str = knob("", "run", "path", "GPT-2 rank file for text; empty = tiktoken's own copy", place=True)
    target_loss: float = knob(0.0, "run", "nats", "say at the end whether it was met; 0 = none")
    profile: int = knob(0, "run", "steps", "torch.profiler trace of so many steps; 0 = off")
    peak_tflops: float = knob(0.0, "run", "TFLOP/s", "dense bf16 peak of one GPU for MFU; 0 = known GPUs only")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def window_blocks_max(self) -> int:
        return math.ceil(self.window_max / BLOCK)


BLOCK = 128  # tokens of a mask block: FlexAttention's tile on every GPU that we know, and the unit of a window
EOT = 50256  # GPT-2's <|endoftext|>, the first token of every document
BYTE_EOT = 256  # its row in a model of byte shards, which has 384 rows instead of 50,304

# What a preset changes; a knob on the command line wins. Peaks: see the README.
PRESETS: dict[str, dict] = {
    "80gb": dict(),
    "40gb": dict(),
    "24gb": dict(train_seq_len=24 * 1024, sequences_per_step=16, val_seq_len=64 * 1024),
    "tiny": dict(train_seq_len=8 * 1024),
    "cpu": dict(train_seq_len=1024),
}

# ----------------------------------------------------------------------------------------------------------------------
# 2. Schedules: pure functions of the step
# ----------------------------------------------------------------------------------------------------------------------


def span(length: float, total_steps: int) -> float:
    """Length of a span in steps: up to 1 it is a fraction of the run, above 1 a count of steps."""
    return length * total_steps if length <= 1 else float(length)


def lr_at(step: int, hp: Hyperparameters) -> float:
    """Multiplier of every learning rate: 1, then linear to `lr_floor` over the cool-down."""
    cooldown = span(hp.cooldown, hp.steps)
    left = (hp.steps - step) / cooldown if cooldown else 1.0
    return 1.0 if left >= 1 else left + (1 - left) * hp.lr_floor


def momentum_at(step: int, hp: Hyperparameters) -> float:
    """Muon's momentum: linear from `muon_momentum_start` to `muon_momentum` over its warm-up."""
    warmup = span(hp.momentum_warmup, hp.steps)
    done = min(step / warmup, 1.0) if warmup else 1.0
    return (1 - done) * hp.muon_momentum_start + done * hp.muon_momentum


def window_scheduler(step: int, total_steps: int, window_min: int = 128, window_max: int = 1792) -> int:
    """Sliding window in blocks of 128 tokens: ceil((min + (max - min) * step / total) / 128), 1 to 14 by default."""
    tokens = window_min + (window_max - window_min) * step / total_steps
    return math.ceil(tokens / BLOCK)


# ----------------------------------------------------------------------------------------------------------------------
# 3. FP8 matmul. A linear layer is three matmuls: y = x W^T, dx = dy W and dW = dy^T x. Tensor cores multiply FP8 at twice
# the rate of bf16. Two formats: e4m3 (3 mantissa bits, to 448) for values, e5m2 (2 bits, to 57,344) for gradients. Each
# tensor is multiplied by one fixed scale that centres it in its format, and the product is divided by both. The
# hardware takes one layout only, A row-major times B column-major, hence the transposed copies in backward.
# ----------------------------------------------------------------------------------------------------------------------


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x * scale) in `dtype`, saturated: torch's e5m2 cast turns what is too large into inf."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def column_major(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


class FP8Matmul(torch.autograd.Function):
    """y = x W^T in FP8, forward and backward. As a Function, and not as a custom operator, Inductor fuses the casts
    into their neighbours. x: (N, in) bf16, weight: (out, in) fp32, scale: (3,) fp32; N, in and out multiples of 16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        x8, w8 = to_fp8(x, scale[0], torch.float8_e4m3fn), to_fp8(weight, scale[1], torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8, scale)
        ctx.weight_dtype = weight.dtype
        # one by one: cuBLASLt of CUDA 13 refuses a scale that lies at a 4-byte offset inside another tensor
        inv = [s.reciprocal() for s in scale.unbind()]
        return torch._scaled_mm(x8, w8.t(), inv[0], inv[1], out_dtype=torch.bfloat16, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x8, w8, scale = ctx.saved_tensors
        g8 = to_fp8(grad, scale[2], torch.float8_e5m2)
        inv = [s.reciprocal() for s in scale.unbind()]
        grad_x = torch._scaled_mm(g8, column_major(w8), inv[2], inv[1], out_dtype=torch.bfloat16)
        # (in, N) x (N, out): the small operand goes first; fp32 out, since this gradient is summed over sequences
        grad_w = torch._scaled_mm(x8.t().contiguous(), column_major(g8), inv[0], inv[2], out_dtype=torch.float32).t()
        return grad_x, grad_w.to(ctx.weight_dtype), None


class CastedLinear(nn.Linear):
    """nn.Linear that trains in FP8 with static per-tensor scales and evaluates in the dtype of its input.

    x: (..., in_features) -> (..., out_features), any number of rows. `x_scale`, `w_scale` and `grad_scale` multiply the
    input, the weight and the incoming gradient before their casts; products are divided by them again. FP8 needs CUDA,
    training mode, `use_fp8` (see `fp8_supported`) and features divisible by 16; otherwise the weight is cast to the
    input's dtype. Scales: NanoGPT speedrun, 2025-01-26_BatchSize."""

    def __init__(self, in_features: int, out_features: int, x_scale: float = 2.0, w_scale: float = 512.0,
                 grad_scale: float = 524288.0, *, bias: bool = False, device=None, dtype=None):
        if isinstance(x_scale, bool):
            raise TypeError("CastedLinear: the third argument is x_scale, a number; pass bias=True by keyword")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        scale = torch.tensor([x_scale, w_scale, grad_scale], dtype=torch.float32, device=device)
        self.register_buffer("scale", scale, persistent=False)  # not saved: loads into nn.Linear and back, strictly
        self.use_fp8 = True

    def forward(self, x: Tensor) -> Tensor:
        fp8 = self.use_fp8 and self.training and x.is_cuda and self.in_features % 16 == self.out_features % 16 == 0
        if not fp8:
            return F.linear(x, self.weight.type_as(x), None if self.bias is None else self.bias.type_as(x))
        rows = x.reshape(-1, self.in_features)
        pad = -rows.size(0) % 16
        y = FP8Matmul.apply(F.pad(rows, (0, 0, 0, pad)) if pad else rows, self.weight, self.scale)
        y = y[: rows.size(0)].view(*x.shape[:-1], self.out_features).type_as(x)
        return y if self.bias is None else y + self.bias.type_as(x)


def fp8_supported(device: torch.device | str) -> tuple[bool, str]:
    """(whether FP8 works on `device`, why), by one forward and backward through `CastedLinear`."""
    if torch.device(device).type != "cuda":
        return False, "no CUDA device"
    try:
        layer = CastedLinear(64, 64, grad_scale=1.0, device=device)
        x = torch.randn(32, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        layer(x).float().square().mean().backward()
        ok = bool(torch.isfinite(x.grad).all() and torch.isfinite(layer.weight.grad).all())
        return ok, "probe passed" if ok else "probe gave non-finite gradients"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return False, "probe failed: " + (str(error).splitlines() or [type(error).__name__])[0][:120]


# ----------------------------------------------------------------------------------------------------------------------
# 4. Attention masks. Key k is visible to query q iff k <= q, doc(k) == doc(q) and q // 128 - k // 128 < window.
# ----------------------------------------------------------------------------------------------------------------------


def block_table(low: Tensor, high: Tensor, window: Tensor, width: int, side: int) -> tuple[Tensor, ...]:
    """Which blocks each block meets: (partial count (B,), partial indices (B, width), full count, full indices).

    low, high: (B,) int32, documents of a block's first and last token. side: -1 lists the key blocks of each query
    block (to its left), +1 the query blocks of each key block. Documents are in order, so the visible blocks are
    the nearest ones, and after the diagonal the full ones (a single document in both) come first: counts give the
    indices, nothing is sorted and no table is wider than the widest window. The diagonal leads the partial list."""
    own = torch.arange(low.size(0), device=low.device, dtype=torch.int32)[:, None]  # (B, 1)
    distance = torch.arange(width, device=low.device, dtype=torch.int32)  # (width,)
    other = own + side * distance  # (B, width)
    inside = (other >= 0) & (other < low.size(0))
    other = other.clamp(0, low.size(0) - 1)
    left, right = (other, own) if side < 0 else (own, other)
    visible = inside & (distance < window) & (high[left] >= low[right])
    full = visible & (distance > 0) & (low[left] == high[right])
    n_full = full.sum(1, dtype=torch.int32)
    n_partial = visible.sum(1, dtype=torch.int32) - n_full
    partial = own + side * torch.where(distance > 0, n_full[:, None] + distance, 0)
    last = low.size(0) - 1
    return n_partial, partial.clamp(0, last), n_full, (own + side * (1 + distance)).clamp(0, last)


def create_masks(input_ids: Tensor, block_size: int = BLOCK, window: Tensor | int | None = None,
                 max_window: int | None = None) -> tuple[BlockMask, BlockMask]:
    """Document-causal sliding-window masks of a packed sequence: (with the whole window, with half of it).

    input_ids: (T,) integers, T a multiple of block_size; a document starts at each token 50256. window: in blocks,
    a 0-d integer tensor on the same device (as an int it would recompile); None = unlimited. max_window: the widest
    window that will come, which fixes the tables' width. O(B x max_window) memory, never T x T. The half window is
    rounded down; the block of a query is always visible. Raises ValueError for a length that is no multiple."""
    if input_ids.size(0) % block_size:
        raise ValueError(f"create_masks: {input_ids.size(0)} tokens are no multiple of block_size {block_size}")
    blocks = input_ids.size(0) // block_size
    width = min(max_window or blocks, blocks)
    window = torch.as_tensor(blocks if window is None else window, dtype=torch.int32, device=input_ids.device)
    docs = (input_ids == EOT).cumsum(0, dtype=torch.int32)  # (T,)
    low, high = docs[::block_size].contiguous(), docs[block_size - 1 :: block_size].contiguous()  # (B,)

    def build(window: Tensor) -> BlockMask:
        def visible(batch, head, q, k):
            return (q >= k) & (docs[q] == docs[k]) & (q // block_size - k // block_size < window)

        kv, q = (block_table(low, high, window, width, side) for side in (-1, 1))
        return BlockMask((input_ids.size(0),) * 2, *(t[None, None] for t in (*kv, *q)),
                         BLOCK_SIZE=(block_size, block_size), mask_mod=visible)

    return build(window.clamp(1, width)), build((window // 2).clamp(1, width))


CHUNK = 512  # queries of one dense attention call: its mask is (CHUNK, CHUNK + window), never T x T


def dense_chunks(mask: BlockMask) -> list[tuple[slice, slice, Tensor]]:
    """A BlockMask as (queries, keys, (queries, keys) bool) pieces for dense attention, each over the key range of the
    widest window: the current window only masks, so that shapes never change."""
    length, (block, _) = mask.seq_lengths[0], mask.BLOCK_SIZE
    reach = (mask.kv_indices.size(-1) - 1) * block
    device, pieces = mask.kv_indices.device, []
    for start in range(0, length, CHUNK):
        first, end = max(0, start - reach), min(start + CHUNK, length)
        q, k = torch.arange(start, end, device=device), torch.arange(first, end, device=device)
        pieces.append((slice(start, end), slice(first, end), mask.mask_mod(0, 0, q[:, None], k)))
    return pieces


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Attention of q, k, v (1, H, T, K) with q already scaled; mask: a BlockMask, or `dense_chunks` of one where
    FlexAttention has no backward (CPU)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=1.0)
    pieces = [F.scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=visible, scale=1.0)
              for rows, keys, visible in mask]
    return torch.cat(pieces, dim=2)


def flex_supported(device: torch.device | str) -> tuple[bool, str]:
    """(whether FlexAttention's kernels can train on `device`, why)."""
    if torch.device(device).type != "cuda":
        return False, "FlexAttention has no backward here"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "bf16 kernels need compute capability 8.0"
    try:
        import triton  # noqa: F401
    except ImportError:
        return False, "Triton is not installed"
    return True, "CUDA and Triton"


def visible_keys(input_ids: np.ndarray, window: int) -> float:
    """Mean number of keys that a query of this sequence sees under a window in blocks; for MFU."""
    position = np.arange(len(input_ids))
    document = np.maximum.accumulate(np.where(input_ids == EOT, position, 0))
    first = np.maximum(document, (position // BLOCK - max(window, 1) + 1) * BLOCK)
    return float(np.mean(position - first + 1))


# ----------------------------------------------------------------------------------------------------------------------
# 5. Optimizers. Muon (kellerjordan.github.io/posts/muon) for the matrices, Adam for the rest. Each rank owns a share of
# every bucket: gradients are summed to their owner, the owner computes the update, updates are gathered in bf16.
# ----------------------------------------------------------------------------------------------------------------------

SCALE_BLOCK = 4096  # values that share one fp32 scale in an FP8 exchange; parameters start at multiples of it


def zeropower_via_newtonschulz5(G: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix G = U S V^T by a quintic Newton-Schulz iteration whose coefficients maximise the
    slope at zero: singular values end between about 0.7 and 1.2. G: (..., R, C) -> same shape, bf16 (fp32 on CPU)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.reshape(-1, *G.shape[-2:])
    X = X.bfloat16() if G.is_cuda else X.float()
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X.mT if tall else X).reshape(G.shape)


def muon_update(grad: Tensor, momentum_buffer: Tensor, momentum: Tensor, lr: Tensor, ns_steps: int, divisor: int):
    """Nesterov momentum of grad / divisor, orthogonalized, times lr * sqrt(max(1, R / C)). grad, momentum_buffer
    (changed in place): (N, R, C); momentum, lr: 0-d tensors. Returns the bf16 step to subtract."""
    grad = grad.float() / divisor
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = zeropower_via_newtonschulz5(grad.lerp(momentum_buffer, momentum), ns_steps)
    return (update * (lr * max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5)).bfloat16()


def adam_update(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, betas, eps, divisor: int):
    """Adam without weight decay (arXiv:1412.6980) on grad / divisor. grad, exp_avg, exp_avg_sq (changed in place):
    (n, 4096); step: 0-d, from 1; lr: (n, 1). Returns the bf16 step to subtract."""
    grad = grad.float() / divisor
    m = torch.lerp(exp_avg.float(), grad, 1 - betas[0])
    v = torch.lerp(exp_avg_sq.float(), grad.square(), 1 - betas[1])
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    return (lr * (m / (1 - betas[0] ** step)) / denominator).bfloat16()


def quantize_e5m2(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (n * 4096,) -> (e5m2 values of the same shape, fp32 scales (n,)): each block of 4,096 fills e5m2's range."""
    limit = torch.finfo(torch.float8_e5m2).max
    blocks = x.float().view(-1, SCALE_BLOCK)
    scales = blocks.abs().amax(1).clamp(min=1e-30) / limit
    return (blocks / scales[:, None]).clamp(-limit, limit).to(torch.float8_e5m2).flatten(), scales


def dequantize_e5m2(values: Tensor, scales: Tensor) -> Tensor:
    return (values.float().view(-1, SCALE_BLOCK) * scales[:, None]).flatten()


class Bucket:
    """Parameters that travel together: one buffer in which each matrix or tensor starts at a multiple of 4,096 values, cut
    into equal shares of whole units (a matrix, or 4,096 values), one a rank. `groups`: index of each one's param_group."""

    def __init__(self, params: list[Tensor], groups: list[int], unit: int, world_size: int):
        self.params, self.groups, self.unit = params, groups, unit
        self.strides = [-(-p.numel() // SCALE_BLOCK) * SCALE_BLOCK for p in params]
        self.used = sum(self.strides)
        self.share = -(-self.used // (unit * world_size)) * unit  # values of one rank
        self.size = self.share * world_size

    def views(self, buffer: Tensor) -> list[Tensor]:
        pieces = buffer[: self.used].split(self.strides)
        return [piece[: p.numel()].view(p.shape) for piece, p in zip(pieces, self.params)]

    def pack(self) -> Tensor:
        """Gradients as one bf16 buffer (size,); a parameter without a gradient counts as zero."""
        grads = [p.grad for p in self.params]
        if len(grads) == 1 and grads[0] is not None and grads[0].dtype == torch.bfloat16 and grads[0].numel() == self.size:
            return grads[0].reshape(-1)
        exact = None not in grads and self.size == sum(p.numel() for p in self.params)
        buffer = (torch.empty if exact else torch.zeros)(self.size, dtype=torch.bfloat16, device=self.params[0].device)
        pairs = [(view, grad) for view, grad in zip(self.views(buffer), grads) if grad is not None]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs)))
        return buffer


class ShardedOptimizer(torch.optim.Optimizer):
    """What Muon and Adam share: the exchange. One code path for 1 and N ranks; without a process group the collectives
    drop out. `grad_divisor` divides the summed gradient, `grad_comm` is the format in which it travels: bf16 by
    reduce-scatter, or fp8 by all-to-all, e5m2 with a scale for every 4,096 values, summed in fp32 by the owner. On one
    rank fp8 quantizes each sequence's gradient the same way (`accumulate` after its backward)."""

    def __init__(self, params, defaults: dict, grad_divisor: int = 1, grad_comm: str = "bf16", world_size=None):
        super().__init__(params, defaults)
        alone = not (dist.is_available() and dist.is_initialized())
        self.world_size = world_size or (1 if alone else dist.get_world_size())
        self.rank = 0 if alone else dist.get_rank()
        self.grad_divisor, self.grad_comm = grad_divisor, grad_comm
        self.buckets, self.sums = self.make_buckets(), {}

    def compile(self):
        """Let Inductor fuse the update of each bucket; what changes in a run is a tensor, so one compilation serves."""
        self.update = torch.compile(self.update, dynamic=False, fullgraph=True)

    def plan(self) -> list[tuple[str, int]]:
        """(collective, payload in bytes) of one step; a rank sends (world_size - 1) / world_size of it."""
        if self.grad_comm == "fp8":
            sent = [("all_to_all_single", n) for b in self.buckets for n in (b.size, b.size // SCALE_BLOCK * 4)]
        else:
            sent = [("reduce_scatter_tensor", 2 * b.size) for b in self.buckets]
        return sent + [("all_gather_into_tensor", 2 * b.size) for b in self.buckets]

    @torch.no_grad()
    def accumulate(self):
        """After each backward: on one rank with fp8 gradients, do to this sequence's what the wire would do."""
        if self.grad_comm != "fp8" or self.world_size > 1:
            return
        for i, bucket in enumerate(self.buckets):
            if any(p.grad is not None for p in bucket.params):
                gradient = dequantize_e5m2(*quantize_e5m2(bucket.pack()))
                self.sums[i] = self.sums[i].add_(gradient) if i in self.sums else gradient
                for p in bucket.params:
                    p.grad = None

    def send_gradient(self, i: int, bucket: Bucket):
        """Start the exchange of one bucket; returns a function that waits for this rank's summed share (share,)."""
        packed = self.sums.pop(i) if i in self.sums else bucket.pack()
        if self.world_size == 1:
            return lambda: packed
        if self.grad_comm == "fp8":
            values, scales = quantize_e5m2(packed)
            values = values.view(torch.uint8)  # gloo knows no float8
            got = torch.empty_like(values), torch.empty_like(scales)
            work = [dist.all_to_all_single(out, x, async_op=True) for out, x in zip(got, (values, scales))]

            def wait():
                for handle in work:
                    handle.wait()
                return dequantize_e5m2(got[0].view(torch.float8_e5m2), got[1]).view(self.world_size, -1).sum(0)

            return wait
        own = packed.new_empty(bucket.share)
        handle = dist.reduce_scatter_tensor(own, packed, async_op=True)
        return lambda: (handle.wait(), packed, own)[2]  # names packed, so that it lives until it was sent

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.accumulate()
        arriving = [self.send_gradient(i, bucket) for i, bucket in enumerate(self.buckets)]
        departing = []
        for bucket, wait in zip(self.buckets, arriving):
            own = every = self.share_update(bucket, wait())  # (share,) bf16; it travels while the next one is computed
            work = None
            if self.world_size > 1:
                every = own.new_empty(bucket.size)
                work = dist.all_gather_into_tensor(every, own, async_op=True)
            departing.append((bucket, own, every, work))
        for bucket, _, every, work in departing:
            if work is not None:
                work.wait()
            torch._foreach_sub_(bucket.params, bucket.views(every))
        return loss

    def moments(self, bucket: Bucket, *names: str) -> list[Tensor]:
        """This rank's share of the named state, of the parameters' dtype, kept under the bucket's first parameter."""
        first = bucket.params[0]
        for name in names:
            if name not in self.state[first]:
                self.state[first][name] = torch.zeros(bucket.share, dtype=first.dtype, device=first.device)
        return [self.state[first][name] for name in names]

    def full_state(self) -> dict[str, Tensor]:
        """Moments of every bucket, gathered over ranks; the same whatever the world size. Call it on all ranks."""
        full = {}
        for i, bucket in enumerate(self.buckets):
            for name, own in self.state[bucket.params[0]].items():
                if name != "step" and self.world_size > 1:
                    every = own.new_empty(bucket.size)
                    dist.all_gather_into_tensor(every, own)
                    own = every
                full[f"{i}.{name}"] = own if name == "step" else own[: bucket.used]
        return full

    def load_full_state(self, full: dict[str, Tensor]):
        """The inverse; an empty dict forgets all state."""
        self.state.clear()
        for key, value in full.items():
            index, name = key.split(".")
            bucket = self.buckets[int(index)]
            if name != "step":
                value = F.pad(value, (0, bucket.size - bucket.used)).split(bucket.share)[self.rank]
            self.state[bucket.params[0]][name] = value.to(bucket.params[0].device, copy=True)


class Muon(ShardedOptimizer):
    """Momentum, orthogonalized by Newton-Schulz. params: matrices (..., R, C), leading dimensions are separate ones; equal
    shapes are orthogonalized in one batch, each rank its share of it. `lr` and `momentum` may change every step.
    Works as any torch.optim.Optimizer, without a process group and under any LR scheduler."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, ns_steps: int = 5, **exchange):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps), **exchange)
        self.update = muon_update

    def make_buckets(self) -> list[Bucket]:
        by_shape = defaultdict(list)
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.ndim < 2 or (p.ndim > 2 and p.shape[-2:].numel() % SCALE_BLOCK):
                    raise ValueError(f"Muon: shape {tuple(p.shape)} is no matrix, nor a stack of matrices of {SCALE_BLOCK} "
                                     "values or a multiple of it; give it to Adam, or give its matrices one by one")
                by_shape[g, p.shape[-2:], p.dtype].append(p)
        return [Bucket(params, [g] * len(params), -(-shape.numel() // SCALE_BLOCK) * SCALE_BLOCK, self.world_size)
                for (g, shape, _), params in by_shape.items()]

    def share_update(self, bucket: Bucket, grad: Tensor) -> Tensor:
        group, (rows, cols) = self.param_groups[bucket.groups[0]], bucket.params[0].shape[-2:]
        matrices = [t.view(-1, bucket.unit)[:, : rows * cols].unflatten(1, (rows, cols))
                    for t in (grad, *self.moments(bucket, "momentum_buffer"))]
        momentum, lr = (torch.full((), group[name], device=grad.device) for name in ("momentum", "lr"))
        update = self.update(*matrices, momentum, lr, group["ns_steps"], self.grad_divisor).flatten(1)
        return F.pad(update, (0, bucket.unit - rows * cols)).flatten() if rows * cols < bucket.unit else update.flatten()


class Adam(ShardedOptimizer):
    """Adam, sharded over ranks. Tensors of 2 and more dimensions have a bucket each, the small ones share one."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, **exchange):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps), **exchange)
        self.update = adam_update

    def make_buckets(self) -> list[Bucket]:
        by_key = defaultdict(lambda: ([], []))
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                params, groups = by_key[id(p) if p.ndim >= 2 else (p.dtype, tuple(group["betas"]), group["eps"])]
                params.append(p)
                groups.append(g)
        buckets = [Bucket(params, groups, SCALE_BLOCK, self.world_size) for params, groups in by_key.values()]
        for b in buckets:  # the param_group of each block of 4,096 values in this rank's share
            blocks = [g for g, stride in zip(b.groups, b.strides) for _ in range(stride // SCALE_BLOCK)]
            blocks += [0] * (b.size // SCALE_BLOCK - len(blocks))
            share = b.share // SCALE_BLOCK
            b.group_of_block = torch.tensor(blocks[self.rank * share :][:share], device=b.params[0].device)
        return buckets

    def share_update(self, bucket: Bucket, grad: Tensor) -> Tensor:
        group, state = self.param_groups[bucket.groups[0]], self.state[bucket.params[0]]
        moments = [t.view(-1, SCALE_BLOCK) for t in self.moments(bucket, "exp_avg", "exp_avg_sq")]
        step = state.setdefault("step", torch.zeros((), device=grad.device)).add_(1)
        lr = torch.stack([torch.full((), g["lr"], device=grad.device) for g in self.param_groups])
        lr = lr[bucket.group_of_block][:, None]
        return self.update(grad.view(-1, SCALE_BLOCK), *moments, step, lr, group["betas"], group["eps"],
                           self.grad_divisor).flatten()


def build_optimizers(model: GPT, hp: Hyperparameters, world_size: int | None = None) -> list[ShardedOptimizer]:
    """[Adam, Muon] with every parameter in exactly one group, by name and number of dimensions."""
    groups = defaultdict(list)
    for name, p in model.named_parameters():
        kind = {"embed": "embed", "value_embeds": "embed", "lm_head": "head", "skip_weights": "skip"}.get(name.split(".")[0])
        groups[kind or ("scalar" if p.ndim < 2 else "muon")].append(p)
    lrs = dict(head=hp.head_lr, embed=hp.embed_lr, scalar=hp.scalar_lr, skip=hp.skip_lr)
    exchange = dict(grad_divisor=hp.sequences_per_step, grad_comm=hp.grad_comm, world_size=world_size)
    adam = Adam([dict(params=groups[kind], lr=lr) for kind, lr in lrs.items()], betas=hp.adam_betas, eps=hp.adam_eps, **exchange)
    muon = Muon(groups["muon"], lr=hp.muon_lr, momentum=hp.muon_momentum, ns_steps=hp.newton_schulz_steps, **exchange)
    for group in (*adam.param_groups, *muon.param_groups):
        group["initial_lr"] = group["lr"]
    owned = [id(p) for opt in (adam, muon) for b in opt.buckets for p in b.params]
    if sorted(owned) != sorted(id(p) for p in model.parameters()):
        raise RuntimeError("build_optimizers: a parameter is in no group, or in two")
    return [adam, muon]


# ----------------------------------------------------------------------------------------------------------------------
# 6. Modules
# ----------------------------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """RMSNorm over channels without a learned weight."""
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Half-truncated rotary embedding (arXiv:2104.09864): a quarter of the channels pairs rotates at frequencies from 1
    to 1 / base, the other half of the pairs stands still, which leaves half of each head to content alone."""

    def __init__(self, head_dim: int, max_len: int, base: float):
        super().__init__()
        freqs = (1 / base) ** torch.linspace(0, 1, steps=head_dim // 4, dtype=torch.float32)
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), F.pad(freqs, (0, head_dim // 2 - head_dim // 4)))
        self.register_buffer("cos", theta.cos(), persistent=False)  # (max_len, K / 2)
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (T, H, K)
        cos, sin = self.cos[: x.size(0), None], self.sin[: x.size(0), None]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)


def uniform_matrix(*shape: int) -> nn.Parameter:
    """Uniform with standard deviation 0.5 / sqrt(fan-in), half of the usual."""
    bound = 3**0.5 * 0.5 * shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class CausalSelfAttention(nn.Module):
    """Attention with merged QKV, QK-norm (arXiv:2010.04245), rotary, and value embeddings mixed into v."""

    def __init__(self, hp: Hyperparameters, has_value_embed: bool):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = hp.num_heads, hp.head_dim, hp.attn_scale
        self.qkv = uniform_matrix(3, hp.model_dim, hp.model_dim)
        self.out = nn.Parameter(torch.zeros(hp.model_dim, hp.model_dim))  # zero: a block starts as the identity
        self.lambdas = nn.Parameter(torch.full((1 + has_value_embed,), 0.5))  # of v, and of the value embedding

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: Rotary, mask) -> Tensor:  # (T, D)
        qkv = F.linear(x, self.qkv.flatten(0, 1).type_as(x)).view(-1, 3 * self.num_heads, self.head_dim)
        q, k, v = qkv.chunk(3, dim=1)  # (T, H, K)
        q, k = rotary(norm(q) * self.scale), rotary(norm(k))  # scaling q: FlexAttention's scale would recompile
        v = self.lambdas[0] * v
        if value_embed is not None:  # arXiv:2410.17897
            v = v + self.lambdas[1] * value_embed.view_as(v)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, K)
        y = attend(q, k, v, mask)[0].transpose(0, 1).reshape(x.shape)
        return F.linear(y, self.out.type_as(x))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (arXiv:2109.08668), 1-2 % better than GELU."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        hidden = hp.mlp_ratio * hp.model_dim
        self.up = uniform_matrix(hidden, hp.model_dim)
        self.down = nn.Parameter(torch.zeros(hp.model_dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up.type_as(x))).square(), self.down.type_as(x))


class Block(nn.Module):
    """One layer: mix in x0, then attention where the pattern has it, then the MLP."""

    def __init__(self, hp: Hyperparameters, window: str, table: str):
        super().__init__()
        self.attn = CausalSelfAttention(hp, table != ".") if window != "-" else None
        self.mlp = MLP(hp)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))  # of the stream, and of x0

    def forward(self, x: Tensor, x0: Tensor, value_embed: Tensor | None, rotary: Rotary, mask) -> Tensor:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(norm(x), value_embed, rotary, mask)
        return x + self.mlp(norm(x))


# ----------------------------------------------------------------------------------------------------------------------
# 7. GPT and the training step
# ----------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """U-Net GPT: the output of encoder layer i is added, with a learned weight, to the input of the mirrored decoder
    layer. vocab_size: rows V of embeddings and head, a multiple of 128."""

    def __init__(self, hp: Hyperparameters, vocab_size: int):
        super().__init__()
        self.layers, self.tables, depth = hp.layer_pattern, hp.value_pattern, len(hp.layer_pattern)
        self.cap, self.temp, self.max_window = hp.logit_cap, hp.logit_temp, hp.window_blocks_max
        self.last_row = EOT if vocab_size > EOT else BYTE_EOT  # row of the document token; a clamp leaves the others alone
        self.use_flex = True  # False: dense attention in chunks, for devices without FlexAttention's backward
        self.embed = nn.Embedding(vocab_size, hp.model_dim)
        self.value_embeds = nn.ModuleList(nn.Embedding(vocab_size, hp.model_dim) for _ in set(self.tables) - {"."})
        blocks = [Block(hp, window, table) for window, table in zip(self.layers, self.tables)]
        self.encoder, self.decoder = nn.ModuleList(blocks[: depth // 2]), nn.ModuleList(blocks[depth // 2 :])
        self.skip_weights = nn.Parameter(torch.ones(depth // 2))
        self.rotary = Rotary(hp.head_dim, max(hp.train_seq_len, hp.val_seq_len), hp.rope_base)
        # 2^19 suits the gradient of a mean over 48K tokens; fewer tokens give larger gradients
        grad_scale = hp.grad_scale * hp.train_seq_len / (48 * 1024)
        self.lm_head = CastedLinear(hp.model_dim, vocab_size, hp.x_scale, hp.w_scale, grad_scale)
        nn.init.zeros_(self.lm_head.weight)

    def features(self, input_ids: Tensor, window: Tensor) -> Tensor:
        """Normed residual stream before the head. input_ids: (T,) int, window: 0-d int32 tensor -> (T, D)."""
        masks = create_masks(input_ids, BLOCK, window, self.max_window)
        if not self.use_flex:
            masks = [dense_chunks(mask) for mask in masks]
        mask_of = {"L": masks[0], "S": masks[1], "-": None}
        rows = input_ids.clamp(max=self.last_row)
        embeds = {str(i): table(rows) for i, table in enumerate(self.value_embeds)}
        x = x0 = norm(self.embed(rows))  # (T, D)
        skips = []
        for i, block in enumerate((*self.encoder, *self.decoder)):
            if i >= len(self.encoder) and skips:
                x = x + self.skip_weights[i - len(self.encoder)] * skips.pop()
            x = block(x, x0, embeds.get(self.tables[i]), self.rotary, mask_of[self.layers[i]])
            if i < len(self.encoder):
                skips.append(x)
        return norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, V) fp32 in (0, cap); the sigmoid is a tanh soft-cap (arXiv:2408.00118) shifted to be positive."""
        return self.cap * torch.sigmoid(self.lm_head(x).float() / self.temp)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row. x: (n, D), targets: (n,) int64, -100 scores 0 -> (n,) fp32 nats. Logits never exceed
        the cap, so it serves as the softmax's maximum, and the target is picked inside the same pass over V."""
        logits = self.logits(x)
        hit = targets.clamp(max=self.last_row)[:, None] == torch.arange(logits.size(-1), device=x.device)
        log_total = (logits - self.cap).exp().sum(-1).log() + self.cap
        return torch.where(targets >= 0, log_total - torch.where(hit, logits, 0).sum(-1), 0)

    def forward(self, input_ids: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Mean loss of one packed sequence: input_ids (T,) int, targets (T,) int64 -> 0-d fp32."""
        return self.losses(self.features(input_ids, window), targets).mean()


def place(model: GPT, device: torch.device | str) -> GPT:
    """Move to the device; on CUDA embeddings are bf16, and with them all activations. CPU stays fp32: bf16 is 6x slower."""
    model.to(device)
    if torch.device(device).type == "cuda":
        for table in (model.embed, *model.value_embeds):
            table.bfloat16()
    return model


def matmul_params(model: GPT) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name)


def train_step(forward, model: GPT, optimizers, sequences, hp: Hyperparameters, step: int, window: Tensor) -> Tensor:
    """One optimizer step over this rank's sequences of the batch. `forward`: the model or its compiled form; sequences:
    iterable of (input_ids, targets). Returns the 0-d sum of their losses / sequences_per_step. Each backward sees
    the undivided mean of its sequence, which FP8's gradient scale is made for; the optimizers divide."""
    window.fill_(window_scheduler(step, hp.steps, hp.window_min, hp.window_max))
    total = torch.zeros((), device=window.device)
    for input_ids, targets in sequences:
        loss = forward(input_ids, targets, window)
        loss.backward()
        total += loss.detach() / hp.sequences_per_step
        for optimizer in optimizers:
            optimizer.accumulate()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_at(step, hp)
            if "momentum" in group:
                group["momentum"] = momentum_at(step, hp)
        optimizer.step()
    for p in model.parameters():
        p.grad = None
    return total


