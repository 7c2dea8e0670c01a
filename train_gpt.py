"""GPT Sprint: train a GPT-2-class language model (276 M parameters, 121 M of them in matmuls) as fast as possible.

    torchrun --standalone --nproc_per_node=8 train_gpt.py      # the full FineWeb run, 8 H100s
    python train_gpt.py --preset=80gb                          # the same steps on one GPU, by gradient accumulation
    python train_gpt.py --steps=20 --val_tokens=65536          # a 20-step smoke run: every schedule scales
    ./run.sh                                                   # gets data and picks the preset; minutes on a CPU

The RECIPE half is all that moves the loss or the clock, readable alone: 1 hyperparameters, 2 schedules, 3 modules, 4 GPT,
5 attention masks, 6 FP8 matmul, 7 optimizers, 8 tokens, 9 the step. The HARNESS half makes it safe and pleasant: 10
command line, 11 data, 12 run, 13 text, 14 main. It is record 21 of the NanoGPT speedrun (KellerJordan/modded-nanogpt, January
2025) without its momentum warm-up, and with a lower skip_lr. Letters: B = blocks of a sequence, D = model width, H =
heads, K = head width, T = tokens of a sequence, V = vocabulary rows, R x C = a matrix.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dataclasses
import difflib
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._pytree import tree_map

# ==== RECIPE: all that moves the loss or the clock ====================================================================

# ---- 1. Hyperparameters: every knob, once. A span (a unit) is a fraction of the run up to 1, a count of steps above 1

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
    sequences_per_step: int = knob(8, "data", "sequences", "batch of a step, over all ranks")
    val_tokens: int = knob(10_485_760, "data", "tokens", "scored from the start of the validation stream")
    epochs: int = knob(1, "data", "passes", "how often the training stream may be read; 1 = never repeat")
    # schedule
    steps: int = knob(1770, "schedule", "steps", "length of the run; spans up to 1 are fractions of it")
    cooldown: float = knob(0.4, "schedule", "span", "linear learning-rate decay at the end; 0 = off")
    lr_floor: float = knob(0.1, "schedule", "x lr", "what the decay ends at")
    momentum_warmup: float = knob(0.0, "schedule", "span", "of Muon's momentum; 0 = off: better over 64 steps")
    window_min: int = knob(1, "schedule", "tokens", "attention window at step 0, in whole 128s; = window_max: fixed")
    window_max: int = knob(1728, "schedule", "tokens", "attention window at the end, likewise, so 1,792")
    # model
    layer_pattern: str = knob("LSSSLSS-SSSL", "model", "one a layer", "attention window: L long, S half, - none")
    value_pattern: str = knob("012......012", "model", "one a layer", "value-embedding table added to v; . none")
    model_dim: int = knob(768, "model", "channels", "width D of the residual stream")
    num_heads: int = knob(6, "model", "heads", "attention heads H, each model_dim / num_heads wide")
    mlp_ratio: int = knob(4, "model", "x width", "hidden width of the MLP")
    attn_scale: float = knob(0.12, "model", "x q.k", "before the softmax; with QK-norm 1/sqrt(K) is too flat")
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
    muon_momentum: float = knob(0.95, "muon", "1", "Nesterov momentum, after its warm-up if there is one")
    muon_momentum_start: float = knob(0.85, "muon", "1", "momentum at step 0 of the warm-up")
    newton_schulz_steps: int = knob(5, "muon", "iterations", "of the quintic that orthogonalizes an update")
    # techniques and communication
    fp8: bool = knob(True, "fp8", "switch", "FP8 output head where the GPU passes a probe; False = bf16")
    x_scale: float = knob(2.0, "fp8", "x", "head input is multiplied by this before its e4m3 cast")
    w_scale: float = knob(2.0**9, "fp8", "x", "head weight is multiplied by this before its e4m3 cast")
    grad_scale: float = knob(2.0**19, "fp8", "x", "times a 48K-token mean's logit gradient, before its e5m2 cast")
    grad_comm: str = knob("bf16", "fp8", "bf16|fp8", "what gradients travel in between ranks")
    # run
    seed: int = knob(1, "run", "integer", "of the initial weights")
    val_every: int = knob(125, "run", "steps", "between validations; 0 = only the first and the last")
    checkpoint_every: int = knob(0, "run", "steps", "between checkpoints; 0 = none")
    resume: str = knob("", "run", "path", "checkpoint to go on from, or latest; empty = start afresh", place=True)
    save: bool = knob(True, "run", "switch", "write the final weights to the run folder", place=True)
    weights: str = knob("", "run", "path", "weights.pt to sample from, or latest, without training", place=True)
    prompt: str = knob("", "run", "text", "print a continuation of this at the end; empty = of a document's start")
    bpe_file: str = knob("", "run", "path", "GPT-2 rank file for text; empty = tiktoken's own copy", place=True)
    target_loss: float = knob(0.0, "run", "nats", "say at the end whether it was met; 0 = none")
    profile: int = knob(0, "run", "steps", "torch.profiler trace of so many steps; 0 = off")
    peak_tflops: float = knob(0.0, "run", "TFLOP/s", "dense bf16 peak of one GPU for MFU; 0 = known GPUs only")

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

BLOCK = 128  # tokens of a mask block: FlexAttention's tile on every GPU that we know, and the unit of a window
EOT = 50256  # GPT-2's <|endoftext|>, the first token of every document
BYTE_EOT = 256  # its row in a model of byte shards, which has 384 rows instead of 50,304

SMALL = dict(val_tokens=65_536, window_min=128, window_max=512, momentum_warmup=0.17)
PRESETS: dict[str, dict] = {  # what each changes; a knob on the command line wins; peaks: README
    "80gb": dict(), "40gb": dict(),
    "24gb": dict(train_seq_len=24 * 1024, sequences_per_step=16, val_seq_len=64 * 1024),
    "tiny": dict(SMALL, train_seq_len=8 * 1024, val_seq_len=16 * 1024, sequences_per_step=2, epochs=5, steps=400,
                 layer_pattern="LSSSSL", value_pattern="01..01", model_dim=384, num_heads=3),
    "cpu": dict(SMALL, train_seq_len=1024, val_seq_len=4096, sequences_per_step=1, epochs=4, steps=500, val_every=100,
                layer_pattern="LSSL", value_pattern="0..0", model_dim=128, num_heads=2),
}

# ---- 2. Schedules: pure functions of the step

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
    """Sliding window in blocks of 128 tokens: ceil((min + (max - min) * step / total) / 128). Defaults as published."""
    tokens = window_min + (window_max - window_min) * step / total_steps
    return math.ceil(tokens / BLOCK)

# ---- 3. Modules

def norm(x: Tensor) -> Tensor:
    """RMSNorm over channels without a learned weight."""
    return F.rms_norm(x, (x.size(-1),))

class Rotary(nn.Module):
    """Half-truncated rotary embedding (arXiv:2104.09864): half of the channel pairs rotates, at frequencies from 1 to
    1 / base, and half stands still, which leaves those channels to content alone."""
    def __init__(self, head_dim: int, max_len: int, base: float):
        super().__init__()
        freqs = (1 / base) ** torch.linspace(0, 1, steps=head_dim // 4, dtype=torch.float32)
        freqs = F.pad(freqs, (0, head_dim // 2 - head_dim // 4))
        theta = torch.outer(torch.arange(max_len, dtype=torch.float32), freqs)
        self.register_buffer("cos", theta.cos(), persistent=False)  # (max_len, K / 2)
        self.register_buffer("sin", theta.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (T, H, K)
        cos, sin = self.cos[: x.size(0), None], self.sin[: x.size(0), None]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).type_as(x)

def uniform_matrix(*shape: int) -> nn.Parameter:
    """Uniform with standard deviation 0.5 / sqrt(fan-in); nn.Linear has 0.577."""
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
    """Two matrices with ReLU^2 between them (arXiv:2109.08668; 1-2 % better than GELU by modded-nanogpt)."""
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

# ---- 4. GPT, its loss and its precision

class GPT(nn.Module):
    """U-Net GPT: the output of encoder layer i is added, with a learned weight, to the input of the mirrored decoder
    layer. vocab_size: rows V of embeddings and head, a multiple of 128."""
    def __init__(self, hp: Hyperparameters, vocab_size: int):
        super().__init__()
        self.layers, self.tables, depth = hp.layer_pattern, hp.value_pattern, len(hp.layer_pattern)
        self.cap, self.temp, self.max_window = hp.logit_cap, hp.logit_temp, math.ceil(hp.window_max / BLOCK)
        self.last_row = EOT if vocab_size > EOT else BYTE_EOT  # row of the document token
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
        rows = input_ids.clamp(max=self.last_row)  # moves the document token of byte data only
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
        """(n, D) -> (n, V) fp32 in (0, cap); the sigmoid is a tanh soft-cap (arXiv:2408.00118) made positive."""
        return self.cap * torch.sigmoid(self.lm_head(x).float() / self.temp)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each row. x: (n, D), targets: (n,) int64, -100 scores 0 -> (n,) fp32 nats. Logits never
        exceed the cap, so it serves as the softmax's maximum; the target is picked in the same pass over V."""
        logits = self.logits(x)
        hit = targets.clamp(max=self.last_row)[:, None] == torch.arange(logits.size(-1), device=x.device)
        log_total = (logits - self.cap).exp().sum(-1).log() + self.cap
        return torch.where(targets >= 0, log_total - torch.where(hit, logits, 0).sum(-1), 0)

    def forward(self, input_ids: Tensor, targets: Tensor, window: Tensor) -> Tensor:
        """Mean loss of one packed sequence: input_ids (T,) int, targets (T,) int64 -> 0-d fp32."""
        return self.losses(self.features(input_ids, window), targets).mean()

def place(model: GPT, device: torch.device | str) -> GPT:
    """Move to the device; on CUDA embeddings are bf16, and with them all activations. A CPU is 6x slower in bf16."""
    model.to(device)
    if torch.device(device).type == "cuda":
        for table in (model.embed, *model.value_embeds):
            table.bfloat16()
    return model

# ---- 5. Attention masks. Key k is visible to query q iff k <= q, doc(k) == doc(q) and q // 128 - k // 128 < window.
# FlexAttention takes two lists of blocks for each block: full ones, all visible, and partial ones, masked by element.

def block_table(low: Tensor, high: Tensor, window: Tensor, width: int, side: int) -> tuple[Tensor, ...]:
    """Which blocks each block meets: (partial count (B,), partial indices (B, width), full count, full indices).
    low, high: (B,) int32, documents of a block's first and last token. side: -1 lists the key blocks of each query
    block (to its left), +1 the query blocks of each key block. Documents are in order, so the visible blocks are the
    nearest ones, and after the diagonal the full ones (a single document in both) come first: counts give the
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
    full_indices = own + side * (1 + distance)
    return n_partial, partial.clamp(0, low.size(0) - 1), n_full, full_indices.clamp(0, low.size(0) - 1)

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

def flex_supported(device: torch.device) -> bool:
    """FlexAttention trains on GPUs whose Triton has bf16; elsewhere it has no backward."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

# ---- 6. FP8 matmul. A linear layer is three matmuls: y = x W^T, dx = dy W and dW = dy^T x. Tensor cores multiply FP8
# twice as fast as bf16. Two formats: e4m3 (3 mantissa bits, to 448) for values, e5m2 (2 bits, to 57,344) for gradients.
# Each tensor is multiplied by one fixed scale that centres it in its format, and the product is divided by both. The
# hardware takes one layout only, A row-major times B column-major, hence the transposed copies in backward.

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
        y = FP8Matmul.apply(F.pad(rows, (0, 0, 0, pad)) if pad else rows, self.weight, self.scale.float())  # bf16 model
        y = y[: rows.size(0)].view(*x.shape[:-1], self.out_features).type_as(x)
        return y if self.bias is None else y + self.bias.type_as(x)

def fp8_supported(device: torch.device | str) -> tuple[bool, str]:
    """(whether FP8 works on `device`, why), by one forward and backward through `CastedLinear`."""
    if torch.device(device).type != "cuda":
        return False, "no CUDA device"
    try:
        layer = CastedLinear(64, 64, grad_scale=1.0, device=device)
        layer(torch.randn(32, 64, device=device, dtype=torch.bfloat16)).float().square().mean().backward()
        ok = bool(torch.isfinite(layer.weight.grad).all())
        return ok, "probe passed" if ok else "probe gave non-finite gradients"
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        return False, "probe failed: " + (str(error).splitlines() or [type(error).__name__])[0][:120]

# ---- 7. Optimizers. Muon (kellerjordan.github.io/posts/muon) for the matrices, Adam for the rest. Each rank owns a
# share of every bucket: gradients are summed to their owner, the owner computes the update, updates travel in bf16.

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
    average = torch.lerp(momentum_buffer.float(), grad, 1 - momentum)
    momentum_buffer.copy_(average)
    update = zeropower_via_newtonschulz5(grad.lerp(average, momentum), ns_steps)
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
    """Parameters that travel together: one buffer in which each starts at a multiple of 4,096 values, cut into equal
    shares of whole units (a matrix, or 4,096 values), one a rank. `groups`: the index of each one's param_group."""
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
        exact = all(g is not None for g in grads) and self.size == sum(p.numel() for p in self.params)
        if exact and len(grads) == 1 and grads[0].dtype == torch.bfloat16:
            return grads[0].reshape(-1)
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
        self.quantize, self.dequantize = quantize_e5m2, dequantize_e5m2

    def add_param_group(self, group: dict):
        if hasattr(self, "buckets"):
            raise ValueError(f"{type(self).__name__}: buckets are fixed; give all parameters to the constructor")
        super().add_param_group(group)

    def compile(self):
        """Let Inductor fuse updates and casts, once for each shape of bucket: what changes in a run is a tensor."""
        for name in ("update", "quantize", "dequantize"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True))

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
                gradient = self.dequantize(*self.quantize(bucket.pack()))
                self.sums[i] = self.sums[i].add_(gradient) if i in self.sums else gradient
                for p in bucket.params:
                    p.grad = None

    def send_gradient(self, i: int, bucket: Bucket):
        """Start the exchange of one bucket; returns a function that waits for this rank's summed share (share,)."""
        packed = self.sums.pop(i) if i in self.sums else bucket.pack()
        if self.world_size == 1:
            return lambda: packed
        if self.grad_comm == "fp8":
            values, scales = self.quantize(packed)
            sent = values.view(torch.uint8), scales  # gloo knows no float8
            got = [torch.empty_like(x) for x in sent]
            work = [dist.all_to_all_single(out, x, async_op=True) for out, x in zip(got, sent)]
        else:
            sent, got = packed, packed.new_empty(bucket.share)
            work = [dist.reduce_scatter_tensor(got, sent, async_op=True)]
        def wait(sent=sent):  # names what was sent, so that it lives until then
            for handle in work:
                handle.wait()
            if self.grad_comm == "bf16":
                return got
            return self.dequantize(got[0].view(torch.float8_e5m2), got[1]).view(self.world_size, -1).sum(0)
        return wait

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.accumulate()
        arriving = [self.send_gradient(i, bucket) for i, bucket in enumerate(self.buckets)]
        departing = []
        for bucket, wait in zip(self.buckets, arriving):
            own = every = self.share_update(bucket, wait())  # (share,) bf16; it travels while the next one is computed
            if self.world_size > 1:
                every = own.new_empty(bucket.size)
            work = dist.all_gather_into_tensor(every, own, async_op=True) if self.world_size > 1 else None
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

class Muon(ShardedOptimizer):
    """Momentum, orthogonalized by Newton-Schulz. params: matrices (..., R, C), leading dimensions are separate ones;
    equal shapes are orthogonalized in one batch, each rank its share of it. `lr` and `momentum` may change every step.
    Works as any torch.optim.Optimizer, without a process group and under any LR scheduler."""
    update = staticmethod(muon_update)

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, ns_steps: int = 5, **exchange):
        super().__init__(params, dict(lr=lr, momentum=momentum, ns_steps=ns_steps), **exchange)

    def make_buckets(self) -> list[Bucket]:
        by_shape = defaultdict(list)
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.ndim < 2 or (p.ndim > 2 and p.shape[-2:].numel() % SCALE_BLOCK):
                    raise ValueError(f"Muon: {tuple(p.shape)} is no matrix, nor a stack of matrices of a multiple of "
                                     f"{SCALE_BLOCK} values; give it to Adam, or give its matrices one by one")
                by_shape[g, p.shape[-2:], p.dtype].append(p)
        return [Bucket(params, [g] * len(params), -(-shape.numel() // SCALE_BLOCK) * SCALE_BLOCK, self.world_size)
                for (g, shape, _), params in by_shape.items()]

    def share_update(self, bucket: Bucket, grad: Tensor) -> Tensor:
        group, (rows, cols) = self.param_groups[bucket.groups[0]], bucket.params[0].shape[-2:]
        matrices = [t.view(-1, bucket.unit)[:, : rows * cols].unflatten(1, (rows, cols))
                    for t in (grad, *self.moments(bucket, "momentum_buffer"))]
        momentum, lr = (torch.full((), group[name], device=grad.device) for name in ("momentum", "lr"))
        update = self.update(*matrices, momentum, lr, group["ns_steps"], self.grad_divisor).flatten(1)
        return (F.pad(update, (0, bucket.unit - rows * cols)) if rows * cols < bucket.unit else update).flatten()

class Adam(ShardedOptimizer):
    """Adam, sharded over ranks. Tensors of 2 and more dimensions have a bucket each, the small ones share one."""
    update = staticmethod(adam_update)

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, **exchange):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps), **exchange)

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
        kind = dict(embed="embed", value_embeds="embed", lm_head="head", skip_weights="skip").get(name.split(".")[0])
        groups[kind or ("scalar" if p.ndim < 2 else "muon")].append(p)
    lrs = dict(head=hp.head_lr, embed=hp.embed_lr, scalar=hp.scalar_lr, skip=hp.skip_lr)
    exchange = dict(grad_divisor=hp.sequences_per_step, grad_comm=hp.grad_comm, world_size=world_size)
    adam = Adam([dict(params=groups[kind], lr=lr) for kind, lr in lrs.items()], betas=hp.adam_betas, eps=hp.adam_eps,
                **exchange)
    muon = Muon(groups["muon"], lr=hp.muon_lr, momentum=hp.muon_momentum, ns_steps=hp.newton_schulz_steps, **exchange)
    for group in (*adam.param_groups, *muon.param_groups):
        group["initial_lr"] = group["lr"]
    owned = [id(p) for opt in (adam, muon) for b in opt.buckets for p in b.params]
    if sorted(owned) != sorted(id(p) for p in model.parameters()):
        raise RuntimeError("build_optimizers: a parameter is in no group, or in two")
    return [adam, muon]

# ---- 8. Tokens

LOADER_DEADLINE = 60.0  # seconds that the training loop waits for a step's tokens
HEAD_ROWS = 16_384  # rows of logits at once in validation: 256K rows of them would be 26 GB

class TokenStream:
    """Shards, uint16 (count,) each, laid end to end; `total` is the count of tokens."""
    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.ends = shards, np.cumsum([len(s) for s in shards])
        self.total = int(self.ends[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, offset in it) of a token."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        return shard, position - (int(self.ends[shard - 1]) if shard else 0)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start : start + length] as int32, across shard boundaries. IndexError past the end."""
        if not 0 <= start <= start + length <= self.total:
            raise IndexError(f"tokens {start} to {start + length} of {self.total}")
        pieces, missing, (shard, offset) = [], length, self.locate(start)
        while missing:
            pieces.append(self.shards[shard][offset : offset + missing])
            missing, shard, offset = missing - len(pieces[-1]), shard + 1, 0
        return np.concatenate(pieces).astype(np.int32) if pieces else np.empty(0, np.int32)

def prefetch(stream: TokenStream, hp: Hyperparameters, rank: int, world: int, first_step: int = 0, pin: bool = False):
    """Yield each step's [(input_ids (T,) int32, targets (T,) int64), ...] of this rank, read ahead in a thread.
    Sequence g = step * S + i of the run starts at token g * T of the stream, which begins again after its last whole
    sequence; rank r takes i = r, r + world, ... Refused 4 if the thread failed or gave nothing in time."""
    ready: queue.Queue = queue.Queue(4)
    def read(i: int) -> tuple[Tensor, Tensor]:
        start = i % ((stream.total - 1) // hp.train_seq_len) * hp.train_seq_len
        tokens = torch.from_numpy(stream.read(start, hp.train_seq_len + 1))
        pair = tokens[:-1].clone(), tokens[1:].long()
        return tuple(t.pin_memory() for t in pair) if pin else pair
    def fill() -> None:
        try:
            for step in range(first_step, hp.steps):
                count = hp.sequences_per_step
                ready.put([read(step * count + i) for i in range(rank, count, world)])
        except BaseException as error:  # it belongs to the thread that waits for the tokens
            ready.put(error)
    threading.Thread(target=fill, daemon=True).start()
    for _ in range(first_step, hp.steps):
        try:
            item = ready.get(timeout=LOADER_DEADLINE)
        except queue.Empty:
            item = TimeoutError(f"nothing came for {LOADER_DEADLINE:.0f} s")
        if isinstance(item, BaseException):
            reason = getattr(item, "strerror", None) or item
            raise Refused(4, f"the data loader failed ({reason}): see whether the disk of --data_dir answers") from item
        yield item

# ---- 9. The training step

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
    model.zero_grad()
    return total

@torch.no_grad()
def evaluate(features, losses, stream: TokenStream, hp: Hyperparameters, rank: int, world: int, window) -> float:
    """Mean loss in nats over exactly the first hp.val_tokens tokens, the same on any count of ranks: pieces begin at
    multiples of val_seq_len, are dealt out, and each has its own fp64 sum. `window`: 0-d int32, in blocks."""
    length, pieces = hp.val_seq_len, math.ceil(hp.val_tokens / hp.val_seq_len)
    rows, sums = math.gcd(length, HEAD_ROWS), torch.zeros(pieces, dtype=torch.float64, device=window.device)
    for piece in range(rank, pieces, world):
        count = min(length, hp.val_tokens - piece * length)
        tokens = torch.from_numpy(stream.read(piece * length, count + 1))
        input_ids = F.pad(tokens[:-1], (0, length - count), value=EOT).to(window.device)
        targets = F.pad(tokens[1:].long(), (0, length - count), value=-100).to(window.device)
        x = features(input_ids, window)
        for start in range(0, length, rows):
            sums[piece] += losses(x[start : start + rows], targets[start : start + rows]).double().sum()
    if world > 1:
        dist.all_reduce(sums)
    return float(sums.sum() / hp.val_tokens)

# ==== HARNESS: what makes a run safe and pleasant; nothing below changes the loss or the clock ========================

# ---- 10. Command line

FIELDS = dataclasses.fields(Hyperparameters)
PLACES = [f.name for f in FIELDS if f.metadata["place"]]
# What saved weights, and the place in the stream, depend on.
FIXED = [f.name for f in FIELDS if f.metadata["group"] == "model"] + ["train_seq_len", "sequences_per_step"]

class Refused(Exception):
    """An end that one sentence explains. `code` is the exit code: 2 refused before step 0, 3 non-finite loss, 4 rank,
    collective or loader deadline, 5 no usable checkpoint, 6 no space or memory, 75 stopped by a signal, saved."""
    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code

def need(fine, sentence: str, code: int = 2) -> None:
    if not fine:
        raise Refused(code, sentence)

def flag(name: str, value) -> str:
    return f"--{name}={value}".replace(" ", "")

def parse_value(name: str, text: str, default):
    """`text` as a value of the type of `default`; int passes for float. Refused 2 if it is ill-typed."""
    if isinstance(default, str):
        return text
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        value, many = ast.literal_eval(text), isinstance(default, tuple)
        pairs = list(zip(value, default, strict=True)) if many else [(value, default)]
        cast = [float(v) if (type(v), type(d)) == (int, float) else v for v, d in pairs]
        if all(type(v) is type(d) and abs(v) < 1e30 for v, (_, d) in zip(cast, pairs)):
            return tuple(cast) if many else cast[0]
    kind = "True or False" if isinstance(default, bool) else f"a value of type {type(default).__name__}"
    raise Refused(2, f"--{name} takes {kind}, such as {flag(name, default)}, and not {text!r}")

def parse_overrides(argv: list[str]) -> Hyperparameters:
    """Knobs from `--name=value` arguments, which win over those of `--preset=name`. Refused 2 on anything else."""
    known, given = dict(dataclasses.asdict(Hyperparameters()), preset="80gb"), {}
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or ["help"]
        need(name in known, f"unknown argument {argument!r}: the nearest legal names are "
                            f"{', '.join('--' + c for c in close)} (--help lists all)")
        need(argument.startswith("--") and equals, f"{argument!r} is not of the form --{name}=value")
        given[name] = parse_value(name, text, known[name])
    preset = given.pop("preset", "80gb")
    need(preset in PRESETS, f"unknown preset {preset!r}: the legal names are {', '.join(PRESETS)}")
    return Hyperparameters(**PRESETS[preset] | given)

def help_text() -> str:
    """Every knob by group with default, unit and meaning, then the presets."""
    groups = {"": ["python train_gpt.py [--preset=name] [--knob=value ...]"]}
    for f in FIELDS:
        row = f"{'  ' + flag(f.name, f.default):44} [{f.metadata['unit']}] {f.metadata['meaning']}"
        groups.setdefault(f.metadata["group"], ["", f.metadata["group"]]).append(row)
    rows = [f"  --preset={name:8}" + " ".join(map(flag, knobs, knobs.values())) for name, knobs in PRESETS.items()]
    return "\n".join([*sum(groups.values(), []), "", "presets (a knob given beside one wins)", *rows])

def check(hp: Hyperparameters, world_size: int) -> None:
    """Refused 2 on the first knob whose value cannot work, with the values that can."""
    for f in FIELDS:
        value, zero = getattr(hp, f.name), f.metadata["group"] in ("adam", "muon") or "0 = " in f.metadata["meaning"]
        if type(value) in (int, float) and f.name not in ("seed", "lr_floor", "newton_schulz_steps"):
            bound = "not be below" if zero else "be above"
            need(value > 0 or zero and value == 0, f"--{f.name} must {bound} 0, and is {value}")
    for name, length in dict(train_seq_len=hp.train_seq_len, val_seq_len=hp.val_seq_len).items():
        near = f"{max(length // BLOCK, 1) * BLOCK} or {max(length // BLOCK + 1, 2) * BLOCK}"
        need(length % BLOCK == 0, f"--{name} must be a multiple of {BLOCK}, such as {near}")
    legal = [n for n in range(1, hp.sequences_per_step + 1) if hp.sequences_per_step % n == 0]
    need(world_size in legal, f"--sequences_per_step={hp.sequences_per_step} cannot be dealt to {world_size} ranks: "
                              f"the legal counts of ranks are {', '.join(map(str, legal))}")
    need(hp.model_dim % 64 == 0 and hp.model_dim % (4 * hp.num_heads) == 0,  # 64^2 values: a block of FP8 scales
         f"--model_dim={hp.model_dim} must be a multiple of 64, and --num_heads={hp.num_heads} times a multiple of 4")
    need(len(hp.layer_pattern) == len(hp.value_pattern) > 0, f"--layer_pattern has {len(hp.layer_pattern)} layers and "
         f"--value_pattern {len(hp.value_pattern)}: they must have the same count, one letter a layer")
    tables = sorted(set(hp.value_pattern) - {"."})
    need(set(hp.layer_pattern) <= set("LS-") and tables == [str(i) for i in range(len(tables))],
         "--layer_pattern is made of L, S and -, and --value_pattern of . and the digits from 0 on without a gap, "
         f"not {hp.layer_pattern!r} and {hp.value_pattern!r}")
    need(hp.window_min <= hp.window_max, f"--window_min={hp.window_min} must not be above --window_max={hp.window_max}")
    need(hp.grad_comm in ("bf16", "fp8"), f"--grad_comm must be bf16 or fp8, and not {hp.grad_comm!r}")

# ---- 11. Data. A shard is 256 int32 (magic, version, count), then uint16 tokens; the scripts in data/ are the twins

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
VOCAB = {"gpt2": 50304, "bytes": 384}  # embedding rows: tokens of the encoding, rounded up to a multiple of 128

# Both streams, and who they are: train_files [{name, tokens, sha256}], val_sha256 of the tokens scored.
Corpus = namedtuple("Corpus", "encoding train val train_files val_sha256")

def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map, uint16 (count,). Refused 2 if header and size disagree."""
    size = path.stat().st_size
    magic, version, count = np.fromfile(path, "<i4", 3).tolist() if size >= HEADER_BYTES else (0, 0, 0)
    need((magic, version) == (MAGIC, VERSION),
         f"{path} is not a token shard: it begins with {magic} {version}, not {MAGIC} {VERSION}")
    need(count >= 1 and size == HEADER_BYTES + 2 * count, f"{path} holds {count} tokens by its header, "
         f"{(size - HEADER_BYTES) // 2} by its size: it was cut short or damaged; get it again")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))

def scan_shard(path: Path, tokens: np.ndarray, encoding: str, expected: str | None) -> str:
    """SHA-256 of the token bytes, hex. Refused 2 if it is not the manifest's, or if a token is not of the encoding: a
    GPU would only say assert."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 22):
        piece = np.ascontiguousarray(tokens[start : start + (1 << 22)])
        bad = piece > EOT if encoding == "gpt2" else (piece > 255) & (piece != EOT)
        need(not bad.any(), f"{path} holds token {piece[bad.argmax()]} at {start + bad.argmax()}, which {encoding} "
                            "does not have: make the shard again, or check its manifest.json")
        digest.update(piece)
    found, expected = digest.hexdigest(), expected or digest.hexdigest()
    need(found == expected, f"{path} has SHA-256 {found[:12]} and its manifest says {expected[:12]}: it was changed or "
                            "damaged; get it again")
    return found

def read_manifest(folder: Path) -> tuple[str, dict[str, str]]:
    """(encoding, {file: SHA-256 of its token bytes}); shards without a manifest are GPT-2 tokens."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else dict(encoding="gpt2")
        if manifest["encoding"] not in VOCAB:
            raise ValueError(f"encoding {manifest['encoding']!r} is none of {', '.join(VOCAB)}")
        return manifest["encoding"], {f["name"]: f["sha256"] for f in manifest.get("files", []) if f.get("sha256")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(2, f"{path} cannot be used ({error!r}): make the data again") from None

def load_corpus(hp: Hyperparameters, thorough: bool) -> Corpus:
    """Open and check every shard of `hp.data_dir`; `thorough` (rank 0) also reads, hashes and compares all tokens."""
    folder = Path(hp.data_dir)
    need(folder.is_dir(), f"--data_dir={hp.data_dir} is not a folder: data/fineweb.py downloads FineWeb, and "
                          "data/tokenize_text.py turns any text into shards")
    encoding, known = read_manifest(folder)
    opened = {s: {path: open_shard(path) for path in sorted(folder.glob(f"*{s}*.bin"))} for s in ("train", "val")}
    for split, shards in opened.items():
        need(shards, f"--data_dir={hp.data_dir} holds no *{split}*.bin: both splits need a shard")
    train, val = (TokenStream(list(shards.values())) for shards in opened.values())
    need(val.total > hp.val_tokens, f"--val_tokens={hp.val_tokens} is more than the validation stream can score: "
                                    f"--val_tokens={val.total - 1} is the most")
    sequences, most = hp.steps * hp.sequences_per_step, (train.total - 1) // hp.train_seq_len
    enough = f"--epochs={math.ceil(sequences / most)}" if most else "a shorter --train_seq_len"
    steps = most * hp.epochs // hp.sequences_per_step
    need(sequences <= most * hp.epochs, f"--steps={hp.steps} reads {sequences * hp.train_seq_len} tokens, and the data "
         f"has {train.total}: take {enough}" + (f" or --steps={steps}" if steps else ""))
    shards = opened["train"] | opened["val"] if thorough else {}
    with ThreadPoolExecutor(4) as pool:  # hashing and scanning both leave the interpreter's lock
        scans = pool.map(lambda path: scan_shard(path, shards[path], encoding, known.get(path.name)), shards)
        digests = dict(zip(shards, scans))
    files = [dict(name=path.name, tokens=len(t), sha256=digests.get(path)) for path, t in opened["train"].items()]
    scored = val.read(0, hp.val_tokens + 1).astype("<u2")
    return Corpus(encoding, train, val, files, hashlib.sha256(scored).hexdigest())

# ---- 12. Run: ranks, run folder, clock, checkpoints, the loop

START_TIMEOUT = 600  # seconds a collective may take: ranks compile and read data at different speeds
STEP_DEADLINE = 120.0  # seconds to wait for a launched GPU step; below START_TIMEOUT, so that we name the cause first
PACKAGES = ("torch", "numpy", "tiktoken", "huggingface_hub", "triton")  # those of requirements.txt, and Triton
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-40GB": 312,
               "NVIDIA A100-SXM4-80GB": 312, "NVIDIA GeForce RTX 4090": 165}  # dense bf16, fp32 sums
WEIGHTS_KEYS = "model knobs encoding vocab_size"
CHECKPOINT_KEYS = "model optimizers loop knobs encoding run_id script_sha256"

def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device) from torchrun's environment; without it one rank and no process group."""
    rank, local, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    backend, own, gpus = ("nccl", device, torch.cuda.device_count()) if device.type == "cuda" else ("gloo", None, 0)
    if own:
        need(local < gpus, f"rank {rank} has no GPU: start at most {gpus} ranks on this machine")
        torch.cuda.set_device(device)
    # 2.13 warns; the new names came with it
    warnings.filterwarnings("ignore", ".*(reduce_scatter_tensor|all_gather_into_tensor)", FutureWarning)
    try:
        if world > 1:
            dist.init_process_group(backend, timeout=timedelta(seconds=START_TIMEOUT), device_id=own)
    except (dist.DistError, ValueError) as error:
        cause = "is in use" if "in use" in str(error) else "did not bring all ranks together"
        raise Refused(2 if "in use" in cause else 4, f"MASTER_PORT={os.environ.get('MASTER_PORT')} {cause}: take "
                      "another, or let torchrun --standalone choose") from error
    return rank, world, device

@contextlib.contextmanager
def no_space(what: str):
    """Turn a failed write into Refused 6."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else type(error).__name__
        raise Refused(6, f"{what} cannot be written ({reason}): make room in logs/, or write less with "
                         "--save=False --checkpoint_every=0") from error

class RunLog:
    """Rank 0's standard output and run folder: log.txt, metrics.jsonl and the script. Other ranks stay silent."""
    def __init__(self, rank: int, source: bytes):
        self.run_id = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + os.urandom(3).hex()
        self.rank, self.folder, self.bar = rank, Path("logs") / self.run_id, None
        if rank == 0:
            with no_space("the run folder"):
                self.folder.mkdir(parents=True)
                (self.folder / "train_gpt.py").write_bytes(source)
        self.line("train_gpt log 1")

    def line(self, text: str, file: bool = True, screen: bool = True) -> None:
        if self.rank == 0 and screen:
            self.bar.write(text) if self.bar else print(text, flush=True)
        if file:
            text = " ".join(text.encode("ascii", "replace").decode().split("\n"))
            self.append("log.txt", text if text.startswith("changed: ") else text[:400])

    def event(self, event: str, **fields) -> None:
        fields = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self.append("metrics.jsonl", json.dumps(dict(event=event, **fields)))

    def append(self, name: str, text: str) -> None:
        if self.rank == 0:
            with no_space(name), open(self.folder / name, "a", encoding="ascii", newline="\n") as file:
                file.write(text + "\n")

    def warn(self, step: int, sentence: str) -> None:
        self.line(f"warning: {sentence}")
        self.event("warning", text=sentence, step=step)

    def progress(self, what: str, total: int, first: int = 0):
        """A tqdm bar on rank 0's terminal, as a context; files and pipes get plain lines."""
        with contextlib.suppress(ImportError):
            if self.rank == 0 and sys.stdout.isatty():
                from tqdm import tqdm
                self.bar = tqdm(total=total, initial=first, desc=what, file=sys.stdout, dynamic_ncols=True)
        return self.bar or contextlib.nullcontext()

class Clock:
    """Training time in ms and wall time in s, from one reading of one clock; the former stands while stopped."""
    def __init__(self, log: RunLog, cuda: bool):
        self.log, self.cuda, self.began = log, cuda, time.perf_counter()
        self.train_ms, self.since, self.mark, self.peak, self.resumed_ms = 0.0, None, None, 0, 0.0

    def read(self, event=None) -> dict:
        """Now, or when the GPU passed a recorded CUDA event."""
        now = self.since + self.mark.elapsed_time(event) / 1e3 if event else time.perf_counter()
        running = 0.0 if self.since is None else (now - self.since) * 1e3
        return dict(train_ms=self.train_ms + running, wall_s=now - self.began)

    def switch(self, on: bool) -> None:
        """Start or stop, with its mark in the log; a stop also keeps the peak of allocated memory."""
        if on == (self.since is not None):
            return
        if self.cuda:
            torch.cuda.synchronize()
            self.peak = self.peak if on else max(self.peak, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        reading, mark = self.read(), "start" if on else "stop"
        self.train_ms, self.since = reading["train_ms"], self.began + reading["wall_s"] if on else None
        if on and self.cuda:
            self.mark = torch.cuda.Event(enable_timing=True)
            self.mark.record()
        self.log.line(f"clock: {mark}", screen=False)
        self.log.event("clock", mark=mark, **reading)

def catch_signals() -> list[float]:
    """SIGTERM and SIGINT ask for an end after the step: their times join the list. A second SIGINT aborts, unless it
    comes within a second: then it is the launcher's echo of the first."""
    caught = []
    def handler(number, frame):
        if number == signal.SIGINT and caught and time.monotonic() - caught[0] > 1:
            os._exit(130)
        caught.append(time.monotonic())
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, handler)
    return caught

def load_file(path: Path, keys: str) -> dict:
    """A saved dict of plain tensors, on the CPU, with these keys. Refused 5 if it is missing, damaged or another."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load accepts flipped bits; the archive has checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not saved.keys() >= set(keys.split()):
            raise ValueError(f"it does not hold {keys}")
        return saved
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
        raise Refused(5, f"{path} is not usable ({reason}): name another file, or leave it out") from error

def find_saved(wanted: str, pattern: str, keys: str, skipped: list[str]) -> Path:
    """The file named, or for `latest` the newest readable one of all run folders; unreadable ones join `skipped`."""
    if wanted != "latest":
        return Path(wanted)
    for path in sorted(Path("logs").glob(pattern), reverse=True):  # run folders are named by date, files by step
        try:
            return load_file(path, keys) and path
        except Refused:
            skipped.append(f"{path.relative_to('logs').as_posix()} is damaged; the next older one is tried")
    raise Refused(5, f"latest finds no usable logs/{pattern}: name a file, or leave it out")

def public_knobs(hp: Hyperparameters) -> dict:
    """All knobs, with place knobs as base names: a log names no path."""
    return {k: Path(v).name if k in PLACES and isinstance(v, str) else v for k, v in dataclasses.asdict(hp).items()}

def visible_keys(input_ids: np.ndarray, window: int) -> float:
    """Mean number of keys that a query of this sequence sees under a window in blocks."""
    position = np.arange(len(input_ids))
    document = np.maximum.accumulate(np.where(input_ids == EOT, position, 0))
    first = np.maximum(document, (position // BLOCK - max(window, 1) + 1) * BLOCK)
    return float(np.mean(position - first + 1))

def digits(value, spec: str) -> str:
    return "n/a" if value is None else format(value, spec)

def nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, IndexError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0]

class Run:
    """One training run. `step`, with the clock and the random state, is the loop's whole state: the place in the stream
    follows from it (see `prefetch`). `pending`: what steps that the GPU still works on will give."""
    def __init__(self, hp: Hyperparameters, rank: int, world: int, device, argv: list[str], source: bytes):
        self.hp, self.rank, self.world, self.device, self.cuda = hp, rank, world, device, device.type == "cuda"
        self.sha, self.step, self.pending, self.val_loss = hashlib.sha256(source).hexdigest(), 0, [], None
        self.peak_val, self.keys, self.spent = 0, [], dict(validation=0.0, saving=0.0)
        self.corpus = load_corpus(hp, thorough=rank == 0)
        saved, warnings = self.find_checkpoint() if hp.resume else (None, [])
        torch.manual_seed(hp.seed)
        with device:  # drawing 193 M normal numbers takes seconds on a CPU
            self.model = place(GPT(hp, VOCAB[self.corpus.encoding]), device)
        self.model.use_flex = flex_supported(device)
        on, why = fp8_supported(device) if hp.fp8 else (False, "--fp8=False")
        self.model.lm_head.use_fp8, self.fp8 = on, dict(on=on, reason=why)
        for tensor in self.model.state_dict().values() if world > 1 else ():
            dist.broadcast(tensor, 0)
        self.optimizers = build_optimizers(self.model, hp)
        self.window = torch.zeros((), dtype=torch.int32, device=device)
        parts = self.model, self.model.features, self.model.losses
        if self.cuda:
            parts = [torch.compile(part, dynamic=False, fullgraph=True) for part in parts]
            for optimizer in self.optimizers:
                optimizer.compile()
        self.forward, self.features, self.losses = parts
        self.log = RunLog(rank, source)
        self.clock = Clock(self.log, self.cuda)
        self.describe(argv)
        if self.cuda:
            self.warm_up()
        if saved:
            warnings += self.restore(saved)
        passes = hp.steps * hp.sequences_per_step / ((self.corpus.train.total - 1) // hp.train_seq_len)
        if passes > 1:
            warnings.append(f"the training stream is read {passes:.2f} times (--epochs={hp.epochs})")
        for sentence in warnings:
            self.log.warn(self.step, sentence)

    def describe(self, argv: list[str]) -> None:
        """The start event and the head of log.txt: everything that the result may depend on, and no place or name."""
        hp, c, knobs, cuda = self.hp, self.corpus, public_knobs(self.hp), self.cuda
        gpu, packages = torch.cuda.get_device_properties(self.device) if cuda else None, {}
        for name in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                packages[name] = importlib.metadata.version(name)
        facts = dict(
            format=1, run_id=self.log.run_id, script_sha256=self.sha,
            utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            argv=[n + e + (Path(v).name if n[2:] in PLACES else v) for n, e, v in (a.partition("=") for a in argv)],
            knobs=knobs, changed={f.name: knobs[f.name] for f in FIELDS
                                  if getattr(hp, f.name) != f.default and f.name not in PLACES},
            seed=hp.seed, device=self.device.type, gpu=gpu and gpu.name, gpu_count=self.world * cuda,
            gpu_memory_mib=gpu and gpu.total_memory >> 20, driver=nvidia_driver() if cuda else None,
            torch=torch.__version__, cuda=torch.version.cuda,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
            triton=packages.pop("triton", None), python=platform.python_version(), packages=packages,
            world_size=self.world, grad_accum=hp.sequences_per_step // self.world, fp8=self.fp8,
            attention="flex" if self.model.use_flex else "sdpa",
            data=dict(encoding=c.encoding, val_sha256=c.val_sha256, val_tokens=hp.val_tokens, train=c.train_files))
        train_hash = hashlib.sha256("".join(f["sha256"] or "" for f in c.train_files).encode()).hexdigest()
        head = dict(facts, started=facts["utc"], changed=json.dumps(facts["changed"]),
                    fp8=f"{'on' if self.fp8['on'] else 'off'} {self.fp8['reason']}",
                    data_val=f"{hp.val_tokens} tokens {c.val_sha256[:12]}",
                    data_train=f"{len(c.train_files)} files {c.train.total} tokens {train_hash[:12]}")
        for key in ("run_id script_sha256 started changed seed python torch cuda driver gpu world_size grad_accum fp8 "
                    "attention data_val data_train").split():
            self.log.line(f"{key}: {digits(head[key], '')}")
        self.log.event("start", **facts)

    def warm_up(self) -> None:
        """Compile and load every kernel on made-up tokens, then put weights, optimizers and random state back."""
        self.log.line("compiling: a minute or two at the first start, seconds later", file=False)
        hp, tensors, validated = self.hp, [*self.model.state_dict().values()], self.hp.val_seq_len * self.world
        kept = [t.clone() for t in tensors]
        dummy = TokenStream([(np.arange(max(hp.train_seq_len, validated) + 1) * 7919 % 256).astype("<u2")])
        tokens = torch.from_numpy(dummy.read(0, hp.train_seq_len + 1)).to(self.device)
        sequences = [(tokens[:-1].clone(), tokens[1:].long())] * (hp.sequences_per_step // self.world)
        with self.log.progress("compiling", 2), torch.random.fork_rng(devices=[self.device] if self.cuda else []):
            train_step(self.forward, self.model, self.optimizers, sequences, hp, 0, self.window)
            if self.log.bar:
                self.log.bar.update()
            self.evaluate(dummy, dataclasses.replace(hp, val_tokens=validated))
        with torch.no_grad():
            torch._foreach_copy_(tensors, kept)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        gc.collect()
        gc.freeze()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()  # else the first validation would report the warm-up's peak

    def find_checkpoint(self) -> tuple[dict, list[str]]:
        """(the checkpoint to resume, warnings): rank 0 chooses. Refused 2 where it does not fit the knobs or ranks."""
        hp, skipped, box = self.hp, [], [None]
        if self.rank == 0:
            box = [str(find_saved(hp.resume, "*/checkpoints/step_*.pt", CHECKPOINT_KEYS, skipped))]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        path, saved = box[0], load_file(Path(box[0]), CHECKPOINT_KEYS)
        knobs, ranks, step = saved["knobs"], len(saved["optimizers"]), saved["loop"]["step"]
        differ = [flag(k, knobs.get(k)) for k in FIXED if knobs.get(k) != getattr(hp, k)]
        need(not differ, f"{path} was written with {' '.join(differ)}: give the same to resume it")
        need(saved["encoding"] == self.corpus.encoding,
             f"{path} was trained on {saved['encoding']} tokens: name such data as --data_dir")
        need(ranks == self.world, f"{path} was written by {ranks} ranks: start as many to resume it")
        need(step <= hp.steps, f"{path} is at step {step}: --steps={hp.steps} is behind it")
        return saved, skipped

    def restore(self, saved: dict) -> list[str]:
        """Go on where a checkpoint was written; returns a warning if more than places changed since."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"][self.rank]):
            optimizer.load_state_dict(state)
            for values in optimizer.state.values():  # torch leaves `step` on the CPU, which would recompile
                values.update({key: value.to(self.device) for key, value in values.items()})
        self.step, self.clock.train_ms = saved["loop"]["step"], saved["loop"]["train_ms"]
        self.clock.resumed_ms = self.clock.train_ms
        torch.set_rng_state(saved["loop"]["random"])
        self.log.event("resume", step=self.step, from_run_id=saved["run_id"])
        self.log.line(f"resumed from {saved['run_id']} at step {self.step}", file=False)
        other = [k for k, v in public_knobs(self.hp).items() if k not in PLACES and saved["knobs"].get(k) != v]
        other += ["the script itself"] if saved["script_sha256"] != self.sha else []
        return [f"changed since the checkpoint: {', '.join(other)}"] if other else []

    def save(self, name: str, **more) -> Path:
        """Write weights, knobs and `more` to a file of the run folder: beside it, flushed to the disk, then renamed."""
        path = self.log.folder / name
        part = path.with_name(path.name + ".part")
        more |= dict(model=self.model.state_dict(), knobs=public_knobs(self.hp), encoding=self.corpus.encoding)
        try:
            with no_space(path.name):
                path.parent.mkdir(exist_ok=True)
                with open(part, "wb") as file:
                    torch.save(more, file)
                    file.flush()
                    os.fsync(file.fileno())
                return part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def checkpoint(self) -> None:
        """Write checkpoints/step_<n>.pt and keep the newest two. Call it on all ranks, with the clock stopped."""
        began, own = time.perf_counter(), [optimizer.state_dict() for optimizer in self.optimizers]
        states = [own] + [None] * (self.world - 1)
        if self.world > 1:
            own = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, own)  # else rank 0 opens every GPU
            dist.gather_object(own, states if self.rank == 0 else None)
        if self.rank == 0:
            place = self.tokens % ((self.corpus.train.total - 1) // self.hp.train_seq_len * self.hp.train_seq_len)
            loop = dict(step=self.step, place=self.corpus.train.locate(place), train_ms=self.clock.train_ms,
                        random=torch.get_rng_state())
            path = self.save(f"checkpoints/step_{self.step:06d}.pt", optimizers=states, loop=loop,
                             run_id=self.log.run_id, script_sha256=self.sha)
            ms = (time.perf_counter() - began) * 1e3
            self.log.event("checkpoint", step=self.step, bytes=path.stat().st_size, ms=ms)
            for old in sorted(path.parent.glob("step_*.pt"))[:-2]:
                old.unlink()
        self.spent["saving"] += time.perf_counter() - began

    @property
    def tokens(self) -> int:
        return self.step * self.hp.sequences_per_step * self.hp.train_seq_len

    def speed(self, train_ms: float) -> tuple[int | None, float | None, float | None]:
        """(tokens/s, MFU, MFU with attention) of the training so far; None where unknown."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        peak = (self.hp.peak_tflops or PEAK_TFLOPS.get(name, 0)) * 1e12 * self.world
        rate = self.tokens / train_ms * 1e3 if train_ms else 0.0
        matmuls = 6 * sum(p.numel() for n, p in self.model.named_parameters() if p.ndim >= 2 and "embed" not in n)
        attention = 12 * self.hp.model_dim * float(np.mean(self.keys or [0]))
        mfus = [work * rate / peak if rate and peak else None for work in (matmuls, matmuls + attention)]
        return round(rate) if train_ms else None, *mfus

    def evaluate(self, stream: TokenStream, hp: Hyperparameters) -> float:
        self.window.fill_(window_scheduler(self.step, hp.steps, hp.window_min, hp.window_max))
        self.model.eval()
        loss = evaluate(self.features, self.losses, stream, hp, self.rank, self.world, self.window)
        self.model.train()
        return loss

    def validate(self) -> None:
        """Score the validation tokens at this step's window, with the clock stopped. Refused 3 if it is not finite."""
        hp, began = self.hp, time.perf_counter()
        self.val_loss = self.evaluate(self.corpus.val, hp)
        self.peak_val = max(self.peak_val, torch.cuda.max_memory_allocated() if self.cuda else 0)
        self.spent["validation"] += time.perf_counter() - began
        now = self.clock.read()
        self.log.line(f"step:{self.step}/{hp.steps} val_loss:{self.val_loss:.6f} train_time:{now['train_ms']:.0f}ms "
                      f"step_avg:{now['train_ms'] / self.step if self.step else math.nan:.2f}ms")
        scored = dict(val_loss=self.val_loss, val_tokens=hp.val_tokens)
        self.log.event("val", step=self.step, tokens=self.tokens, **scored, **now)
        if not math.isfinite(self.val_loss):
            raise Refused(3, f"the validation loss is {self.val_loss} at step {self.step}: lower the learning rates")

    def launch(self, pairs: list[tuple[Tensor, Tensor]], step: int, stop: bool) -> None:
        """Start a training step. Its loss and stop flag, summed over ranks, join `pending` with the event of their
        arrival on the host, while the next step runs. The keys its queries see are counted 64 times a run."""
        hp, event = self.hp, None
        if step % math.ceil(hp.steps / 64) == 0:
            ids, long = pairs[0][0].numpy(), window_scheduler(step, hp.steps, hp.window_min, hp.window_max)
            layers = zip("LS", (long, long // 2))
            self.keys.append(sum(hp.layer_pattern.count(kind) * visible_keys(ids, window) for kind, window in layers))
        sequences = ([t.to(self.device, non_blocking=True) for t in pair] for pair in pairs)
        loss = train_step(self.forward, self.model, self.optimizers, sequences, hp, step, self.window)
        host = torch.stack((loss, torch.full_like(loss, float(stop))))
        if self.world > 1:
            dist.all_reduce(host)
        if self.cuda:
            host = torch.empty(2, pin_memory=True).copy_(host, non_blocking=True)
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.pending.append((host, event))

    def settle(self, leave: int = 0) -> bool:
        """Where more than `leave` steps are pending, await the first one's loss and write its line. True if a rank
        wants to stop; Refused 3 if the loss is not finite, 4 if the GPU does not answer."""
        if len(self.pending) <= leave:
            return False
        (host, event), hp, deadline = self.pending.pop(0), self.hp, time.monotonic() + STEP_DEADLINE
        while event and not event.query():
            need(time.monotonic() < deadline or self.world == 1,
                 f"a step took longer than {STEP_DEADLINE:.0f} s: another rank has died or hangs", code=4)
            time.sleep(1e-4)
        (loss, stop), now = host.tolist(), self.clock.read(event)
        self.step += 1
        kept = self.step in (1, hp.steps) or self.step % math.ceil(hp.steps / 48) == 0
        rate, mfu, _ = self.speed(now["train_ms"])
        self.log.line(f"step:{self.step}/{hp.steps} train_loss:{loss:.4f} train_time:{now['train_ms']:.0f}ms "
                      f"step_avg:{now['train_ms'] / self.step:.2f}ms tokens_per_s:{rate} mfu:{digits(mfu, '.3f')}",
                      file=kept, screen=not self.log.bar)
        if kept:
            self.log.event("step", step=self.step, tokens=self.tokens, train_loss=loss, **now)
        if self.log.bar:
            self.log.bar.set_postfix_str(f"loss {loss:.4f}, {rate} tokens/s", refresh=False)
            self.log.bar.update(self.step - self.log.bar.n)
        if self.step == 10 < hp.steps:
            self.log.line(f"about {now['train_ms'] / 6e5 * hp.steps:.1f} minutes of training for {hp.steps} steps; a "
                          f"shorter run is --steps={min(200, hp.steps // 2)}: every schedule scales", file=False)
        need(math.isfinite(loss), f"the training loss is {loss} at step {self.step}: lower the learning rates", code=3)
        return stop > 0

    def train(self) -> None:
        """Steps, checkpoints and validations up to hp.steps. Refused 75 after a signal, once everything is saved."""
        hp, caught = self.hp, catch_signals()
        loader = prefetch(self.corpus.train, hp, self.rank, self.world, self.step, self.cuda)
        if self.step == 0:
            self.validate()
        with self.log.progress("training", hp.steps, self.step), profiler(self) as profile:
            for n in range(self.step + 1, hp.steps + 1):
                self.clock.switch(True)
                self.launch(next(loader), n - 1, bool(caught))
                stopping = self.settle(leave=int(self.cuda))  # a GPU's step before, now that this one is on its way
                if profile:
                    profile.step()
                last, save = n == hp.steps, hp.checkpoint_every and n % hp.checkpoint_every == 0
                score = not last and hp.val_every and n % hp.val_every == 0
                if not (last or save or score or stopping):
                    continue
                stopping = (self.settle() or stopping) and not last
                self.clock.switch(False)
                if save or stopping:
                    self.checkpoint()
                need(not stopping, f"stopped by a signal at step {n}, all saved: --resume=latest goes on", code=75)
                if score:
                    self.validate()
        if hp.save and self.rank == 0:
            began = time.perf_counter()
            self.save("weights.pt", vocab_size=VOCAB[self.corpus.encoding])
            self.spent["saving"] += time.perf_counter() - began
        self.validate()

    def close(self, code: int, reason: str) -> None:
        """The final block and the end event, however the run ended."""
        with contextlib.suppress(Exception):  # a dead GPU cannot be waited for; the numbers so far still count
            self.clock.switch(False)
        now = self.clock.read()
        memory = (self.clock.peak, self.peak_val, torch.cuda.max_memory_reserved()) if self.cuda else ()
        peaks = zip(("peak_train_mib", "peak_val_mib", "reserved_mib"), [v >> 20 for v in memory] or [None] * 3)
        rates = dict(zip(("tokens_per_s", "mfu", "mfu_with_attention"), self.speed(now["train_ms"])), **dict(peaks))
        done = dict(steps=self.step, tokens=self.tokens)
        formats = dict(val_loss=".6f", train_time_ms=".0f", mfu=".3f", mfu_with_attention=".3f")
        for key, value in dict(val_loss=self.val_loss, train_time_ms=now["train_ms"], **done, **rates).items():
            self.log.line(f"{key}: {digits(value, formats.get(key, 'd'))}")
        dead = now["wall_s"] - (now["train_ms"] - self.clock.resumed_ms) / 1e3 - sum(self.spent.values())
        self.log.line(f"dead time: {dead:.1f} s of {now['wall_s']:.1f} s, beside validation "
                      f"{self.spent['validation']:.1f} s and saving {self.spent['saving']:.1f} s", file=False)
        self.log.line(f"exit: {code} {reason}")
        status = {0: "complete", 75: "stopped"}.get(code, "failed")
        self.log.event("end", status=status, code=code, reason=reason, **done, val_loss=self.val_loss, **now, **rates)

def profiler(run: Run):
    """A torch.profiler trace of hp.profile steps from the third on, on rank 0; its costliest kernels on the screen."""
    if not run.hp.profile or run.rank:
        return contextlib.nullcontext()
    def ready(profile):
        path = run.log.folder / "trace.json"
        with no_space(path.name):
            profile.export_chrome_trace(str(path))
            path.write_text(re.sub(r'"host_name": "[^"]*"', '"host_name": ""', path.read_text()))
        order = f"self_{run.device.type}_time_total"
        run.log.line(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60), file=False)
    run.log.warn(run.step, f"{run.hp.profile} steps are profiled, and slower for it")
    plan = torch.profiler.schedule(wait=1, warmup=1, active=run.hp.profile, repeat=1)
    return torch.profiler.profile(schedule=plan, on_trace_ready=ready)

# ---- 13. Text

def text_codec(encoding: str, bpe_file: str):
    """(encode: str -> ids, decode: ids -> str). Refused 2 where GPT-2's ranks cannot be had."""
    if encoding == "bytes":  # GPT-2's 256 single-byte tokens: the printable bytes of Latin-1 first
        order = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order += [b for b in range(256) if b not in order]
        return (lambda text: [order.index(b) for b in text.encode()],
                lambda ids: bytes(order[i] for i in ids if i < 256).decode("utf-8", "replace"))
    try:
        import tiktoken
        if bpe_file:
            rows = (row.split() for row in Path(bpe_file).read_bytes().splitlines() if row)
            bpe = {base64.b64decode(token): int(rank) for token, rank in rows}
            words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
            codec = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=bpe, special_tokens={"<|endoftext|>": EOT})
        else:
            codec = tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise Refused(2, "no text without GPT-2's ranks: give a rank file as --bpe_file") from error
    return codec.encode_ordinary, lambda ids: codec.decode([i for i in ids if i < EOT])

@torch.no_grad()
def print_sample(model: GPT, hp: Hyperparameters, encoding: str, heat: float = 0.8) -> None:
    """About 200 characters in the model's own words, after hp.prompt or a document's start, sampled at temperature
    `heat` up to the document's end. It keeps no cache, and leaves the model in evaluation and without FlexAttention."""
    (encode, decode), device = text_codec(encoding, hp.bpe_file), next(model.parameters()).device
    model.eval().use_flex = False
    window = torch.tensor(math.ceil(hp.window_max / BLOCK), dtype=torch.int32, device=device)
    random, ids, new = torch.Generator().manual_seed(hp.seed), [EOT, *encode(hp.prompt)], []
    while len(new) < (50 if encoding == "gpt2" else 200) and new[-1:] != [model.last_row]:
        context = (ids + new)[-min(hp.train_seq_len, 2048) :]
        padded = torch.tensor(context + [EOT] * (-len(context) % BLOCK), dtype=torch.int32, device=device)
        x = model.features(padded, window)[len(context) - 1 : len(context)]
        logits = model.logits(x)[0, : model.last_row + 1].float().cpu() / heat
        new.append(int(torch.multinomial(logits.softmax(0), 1, generator=random)))
    print(f"sample: {hp.prompt}{decode(new)}", flush=True)

def sample_saved(hp: Hyperparameters, device: torch.device) -> None:
    """Print a sample of saved weights, without training and without a run folder."""
    saved = load_file(find_saved(hp.weights, "*/weights.pt", WEIGHTS_KEYS, []), WEIGHTS_KEYS)
    hp = dataclasses.replace(hp, **{name: saved["knobs"][name] for name in [*FIXED, "val_seq_len", "window_max"]})
    model = GPT(hp, saved["vocab_size"])
    model.load_state_dict(saved["model"])
    print_sample(place(model, device), hp, saved["encoding"])

# ---- 14. main

def verdict(error: BaseException) -> tuple[int, str]:
    """(exit code, one sentence) of whatever ended a run; code 1 is a fault of the script."""
    if isinstance(error, Refused):
        return error.code, str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return 6, "out of memory: --preset=24gb or a shorter --train_seq_len or --val_seq_len needs less"
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped before training began: nothing to save"
    lost = any(word in str(error) for word in ("gloo", "NCCL", "onnection", "imed out"))
    if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and dist.is_initialized() and lost:
        return 4, "a collective failed: another rank died or hung; its own message says why; --resume=latest goes on"
    return 1, f"the script failed with {type(error).__name__}"

def main(argv: list[str] | None = None) -> None:
    """Parse, check, train, sample. Ends by SystemExit with the code that `Refused` lists."""
    source, argv = Path(__file__).read_bytes(), sys.argv[1:] if argv is None else argv
    run, rank = None, int(os.environ.get("RANK", 0))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what this terminal cannot show
    try:
        if "--help" in argv or "-h" in argv:
            return print(help_text())
        hp = parse_overrides(argv)
        check(hp, int(os.environ.get("WORLD_SIZE", 1)))
        rank, world, device = init_distributed()
        if hp.weights:
            return sample_saved(hp, device) if rank == 0 else None
        run = Run(hp, rank, world, device, argv, source)
        run.train()
        run.close(0, "complete")
    except BaseException as error:
        code, reason = verdict(error)
        if run:
            with contextlib.suppress(Refused):  # a full disk may refuse this too
                run.close(code, reason)
        if rank and code == 2:
            time.sleep(5)  # leaving first would have the launcher end rank 0 before it spoke
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"train_gpt: {reason}", file=sys.stderr, flush=True)
        if code == 1:
            raise
        if code == 4:
            os._exit(4)  # an ordinary exit would wait for the rank that is gone
        sys.exit(code)
    if rank == 0:
        try:
            print_sample(run.model, hp, run.corpus.encoding)
        except Exception as error:  # the run is complete and saved
            print(f"no sample: {error}")
        if hp.target_loss:
            miss = run.val_loss - hp.target_loss
            print("target met" if miss <= 0 else f"target missed by {miss:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
