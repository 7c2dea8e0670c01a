"""GPT Sprint: train a GPT-2-class language model (351 M parameters, 110 M in matmuls), fast.

    torchrun --standalone --nproc_per_node=8 train_gpt.py   # the full FineWeb run, 8 H100s
    python train_gpt.py                               # the same steps on one GPU, by accumulation
    python train_gpt.py --steps=20 --val_tokens=65536       # a smoke run: every schedule scales
    ./run.sh                                # gets data and picks the preset; minutes on a CPU

What one rank's share of a run reaches (`--preset=eighth`: all steps, an eighth of the tokens) is
measured in records/. The recipe adopts what the NanoGPT speedrun (KellerJordan/modded-nanogpt)
found from its record 21 (January 2025) to its record 89 (July 2026), wherever plain PyTorch is
enough.

RECIPE: all that decides a step's loss and time, to be read from top to bottom; then stop
     1 hyperparameters   2 schedules                                          what is set
     3 modules   4 GPT   5 loss   6 attention masks   7 FP8                   the model
     8 updates   9 exchange between ranks and optimizers                      the optimizers
    10 tokens   11 training: step, evaluation, warm-up, build, the loop       the run
HARNESS: what makes a run safe and pleasant
    12 command line   13 data   14 run folder   15 checkpoints   16 the run   17 main

Letters: B = blocks of 128 tokens in a sequence, C = candidates of a softmax, D = model width, H =
heads, K = head width, T = tokens of a sequence, V = vocabulary rows, R x C = a matrix, n, N = any
count. Names with an @ are those of the speedrun's contributors who found or brought a technique.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import gc
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._pytree import tree_leaves, tree_map

# ==== RECIPE: all that decides a step's loss and time =============================================

# ---- 1. Hyperparameters: every knob, once, with its [unit]. A span is a fraction of the run up to
# 1, a count of steps above 1.


@dataclass(frozen=True)
class Hyperparameters:
    """The defaults are the full FineWeb run on 8 ranks; derived values are properties."""

    # -- data
    data_dir: str = "data/fineweb10B"  # [path] folder with *train*.bin and *val*.bin shards
    train_seq_len: int = 49_152  # [tokens] of a sequence; giving it clears the stages
    val_seq_len: int = 262_144  # [tokens] packed validation sequence, a multiple of 128
    sequences_per_step: int = 8  # [sequences] of a step, over all ranks; giving it clears them too
    # one entry a stage, in equal spans of the run; without, the two knobs above make one stage
    batch_stages: str = "8x16384 8x32768 24x16384 16x32768"  # [SEQUENCESxTOKENS] empty = one
    val_tokens: int = 10_485_760  # [tokens] scored from the start of the validation stream
    epochs: int = 1  # [passes] how often the training stream may be read; 1 = never repeat
    # -- schedule
    steps: int = 1293  # [steps] length of the run; spans up to 1 are fractions of it
    lr_batch: int = 16_384  # [tokens] of a step that rates are for; else x its root; 0 = off
    cooldown: float = 0.6  # [span] linear learning-rate decay at the end; 0 = off
    lr_floor: float = 0.15  # [x lr] what the decay ends at
    momentum_warmup: float = 0.234  # [span] of Muon's momentum; 0 = off
    momentum_cooldown: float = 0.04  # [span] of Muon's momentum, at the end; 0 = off
    window_min: int = 128  # [tokens] attention window at step 0, in whole 128s; = window_max: fixed
    window_max: int = 1792  # [tokens] attention window at the end
    average: float = 0.1  # [span] time constant of the average of head and matrices; 0 = off
    average_share: float = 0.5  # [1] share of the average in the final weights
    sampled: float = 0.95  # [span] in which the training softmax is over candidates; 0 = off
    # -- model
    layer_pattern: str = "SSSLSSSSSL"  # [one a layer] attention window: L long, S half
    value_pattern: str = ".01....234"  # [one a layer] value embedding added to v; . none
    late_layer: int = 6  # [layer, from 0] whose output all later attentions read
    mixed_layers: str = "3 6 8"  # [layers] whose outputs, and x0, both `Mix`es weigh
    copy_reach: int = 4096  # [tokens] that `Pointer` looks back, in whole 128s; below 128: all
    bigram_rows: int = 249_856  # [rows] of the hashed table of token pairs
    bigram_dim: int = 192  # [channels] first ones of the stream, which the pair's row is added to
    model_dim: int = 768  # [channels] width D of the residual stream
    num_heads: int = 6  # [heads] attention heads H, each model_dim / num_heads wide
    mlp_ratio: int = 4  # [x width] hidden width of the MLP
    attn_scale: float = 0.12  # [x q.k] before the softmax; with QK-norm 1/sqrt(K) is too flat
    rope_base: float = 1024.0  # [1] slowest rotary frequency is 1 / rope_base
    logit_cap: float = 23.0  # [nats] logits = cap * sigmoid((z + logit_shift) / logit_temp)
    logit_shift: float = 5.0  # [1] see logit_cap
    logit_temp: float = 7.5  # [1] see logit_cap
    # -- adam
    head_betas: tuple = (0.5, 0.95)  # [1] decay of both moments: output head
    table_betas: tuple = (0.75, 0.98)  # [1] value embeddings and bigrams
    scalar_betas: tuple = (0.9, 0.99)  # [1] scalars, gates, skip weights, `Mix`
    adam_eps: float = 1e-20  # [1] added to the root of the second moment
    head_lr: float = 0.004  # [lr] output head, which is the token embedding too
    table_lr: float = 0.3  # [lr] value embeddings and bigrams
    scalar_lr: float = 0.02  # [lr] scalars: of stream, x0, bigrams, v, smear and pointer
    skip_lr: float = 0.015  # [lr] weights of U-Net, `Mix`, gates of value embeddings; 0 = fixed
    mix_lr: float = 0.001  # [lr] networks of `Mix`
    head_decay: float = 0.3  # [1] x lr^2: cautious decay of the head, see `subtract`
    table_decay: float = 0.025  # [1] likewise the value embeddings and bigrams
    # -- muon
    muon_lr: float = 0.008  # [lr] matrices of blocks and pointer
    down_scale: float = 2.5  # [x muon_lr] second matrix of an MLP
    muon_decay: float = 1.2  # [1] as head_decay, for the matrices
    muon_beta2: float = 0.95  # [1] decay of the second moment of rows or columns
    muon_momentum: float = 0.93  # [1] Nesterov momentum, after its warm-up if there is one
    muon_momentum_start: float = 0.85  # [1] where the warm-up begins and the cool-down ends
    # -- fp8
    fp8: bool = True  # [switch] FP8 head and MLPs where the GPU passes a probe; False = bf16
    x_scale: float = 4.48  # [x] of the head's input before its e4m3 cast
    w_scale: float = 64.0  # [x] of the head's weight before its e4m3 cast, which ends at 7
    grad_scale: float = 2.0**25  # [x] of a 48K-token mean's gradients before their e5m2 casts
    grad_comm: str = "bf16"  # [bf16|fp8] what gradients travel in between ranks
    # -- run
    seed: int = 1  # [integer] of the initial weights
    val_every: int = 125  # [steps] between validations; 0 = only the first and the last
    checkpoint_every: int = 0  # [steps] between checkpoints; 0 = none
    resume: str = ""  # [path] checkpoint to go on from, or latest; empty = start afresh
    save: bool = True  # [switch] write the final weights to the run folder
    log_norms: int = 0  # [steps] between norms of gradients and updates by kind; 0 = none

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads


CANDIDATES = 16_384  # rows of V, a third, in a sampled softmax; half of its tokens, if more
BLOCK = 128  # tokens of a mask block: FlexAttention's tile on every known GPU, a window's unit
GATE = 12  # channels that a gate reads: half of attention's input, half of a value row
EOT = 50256  # GPT-2's <|endoftext|>, the first token of every document
BYTE_EOT = 256  # its row in a model of byte shards
VOCAB = {"gpt2": 50304, "bytes": 384}  # rows: tokens of the encoding, up to a multiple of 128

SMALL = dict(
    batch_stages="", lr_batch=0, val_tokens=65_536, window_max=512, copy_reach=1024, sampled=0.0
)
SHORT = dict(  # six narrow layers, one sequence a step: for one GPU (records/LOG.md)
    batch_stages="1x32768", val_tokens=2_097_152, layer_pattern="SSLSSL", value_pattern="01..23",
    late_layer=3, mixed_layers="1 3 4", model_dim=512, num_heads=4, muon_lr=0.012
)
PRESETS = {  # what each changes; a knob on the command line wins
    "80gb": dict(),
    "40gb": dict(val_seq_len=131_072),  # CUDA graphs keep a step's memory in validation too
    "24gb": dict(batch_stages="8x16384 16x16384 24x16384 32x16384", val_seq_len=65_536),
    "eighth": dict(
        batch_stages="1x16384 1x32768 3x16384 2x32768", val_tokens=2_097_152, val_every=0
    ),
    "long": dict(SHORT, steps=950),  # to 4.13 nats on one H100
    "quick": dict(SHORT, steps=420),  # to 4.41
    "tiny": dict(
        SMALL, train_seq_len=8192, val_seq_len=16_384, sequences_per_step=2,
        epochs=5, steps=400, layer_pattern="LSSSSL", value_pattern="01..01", late_layer=4,
        mixed_layers="2 4", bigram_rows=50_000, bigram_dim=96, model_dim=384, num_heads=3
    ),
    "cpu": dict(
        SMALL, train_seq_len=1024, val_seq_len=4096, sequences_per_step=1,
        epochs=4, steps=350, layer_pattern="LSSL", value_pattern="0..0",
        late_layer=2, mixed_layers="1 2", bigram_rows=8192, bigram_dim=32, model_dim=128,
        num_heads=2, table_lr=0.6, scalar_lr=0.04, muon_lr=0.036
    ),
}

# ---- 2. Schedules: pure functions of the step, which counts from 0


class Stage(NamedTuple):
    """A span of the run with one shape of batch."""

    first: int  # step at which it begins
    sequences: int  # of a step, over all ranks
    seq_len: int  # tokens of one

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


def stages(hp) -> list[Stage]:
    """`batch_stages` in equal spans of the run, or one stage of the two plain knobs."""
    batches = hp.batch_stages.split() or [f"{hp.sequences_per_step}x{hp.train_seq_len}"]
    return [
        Stage(k * hp.steps // len(batches), *map(int, batch.split("x")))
        for k, batch in enumerate(batches)
    ]


def stage_at(step: int, hp) -> Stage:
    return [stage for stage in stages(hp) if stage.first <= step][-1]


def tokens_before(step: int, hp) -> int:
    """Tokens that all ranks together have read when `step` begins."""
    tokens, end = 0, step
    for stage in reversed(stages(hp)):
        tokens += max(0, end - stage.first) * stage.tokens
        end = min(end, stage.first)
    return tokens


def sequences(hp, total: int):
    """Yield for each step ((first token, length) of each of its sequences, passes over the stream
    begun so far). total: tokens of the stream. A sequence begins where the one before it ended, and
    at token 0 where it, with its last target, would not fit before the end."""
    position, passes = 0, 1
    for step in range(hp.steps):
        stage, spans = stage_at(step, hp), []
        for _ in range(stage.sequences):
            if position + stage.seq_len >= total:
                position = 0
                passes += 1
            spans.append((position, stage.seq_len))
            position += stage.seq_len
        yield spans, passes


def span(length: float, total_steps: int) -> float:
    """Length of a span in steps: up to 1 it is a fraction of the run, above 1 a count of steps."""
    return length * total_steps if length <= 1 else length


def shape_at(step: int, hp) -> tuple[Stage, bool]:
    """What a step's compiled code depends on: its stage, and whether the softmax is sampled."""
    return stage_at(step, hp), step < span(hp.sampled, hp.steps)


def lr_at(step: int, hp) -> float:
    """Multiplier of every learning rate: the root of the step's tokens, in units of `lr_batch`
    (arXiv:2205.10287), times a decay that is 1 until the cool-down and then linear to `lr_floor`.
    """
    cooldown = span(hp.cooldown, hp.steps)
    batch = stage_at(step, hp).tokens / hp.lr_batch if hp.lr_batch else 1.0
    remaining = min((hp.steps - step) / cooldown, 1.0) if cooldown else 1.0
    return batch**0.5 * (remaining + (1 - remaining) * hp.lr_floor)


def momentum_at(step: int, hp) -> float:
    """Muon's momentum: linear from `muon_momentum_start` to `muon_momentum` over its warm-up
    (@Grad62304977, @kellerjordan0), and back over its cool-down (@classiclarryd)."""
    warmup, cooldown = (span(x, hp.steps) for x in (hp.momentum_warmup, hp.momentum_cooldown))
    up = step / warmup if warmup else 1.0
    down = (hp.steps - step) / cooldown if cooldown else 1.0
    done = min(up, down, 1.0)
    return (1 - done) * hp.muon_momentum_start + done * hp.muon_momentum


def window_scheduler(
    step: int, total_steps: int, window_min: int = 128, window_max: int = 1792
) -> int:
    """Sliding window in blocks of 128 tokens: ceil((min + (max - min) * step / total) / 128).
    Defaults are those of the recipe's published description."""
    tokens = window_min + (window_max - window_min) * step / total_steps
    return math.ceil(tokens / BLOCK)


def window_at(step: int, hp) -> int:
    return window_scheduler(step, hp.steps, hp.window_min, hp.window_max)


# ---- 3. Modules


def norm(x: Tensor) -> Tensor:
    """RMSNorm over channels without a learned weight."""
    return F.rms_norm(x, (x.size(-1),))


class Rotary(nn.Module):
    """Half-truncated rotary embedding (arXiv:2104.09864; truncated by @YouJiacheng): half of the
    channel pairs rotates, at frequencies from 1 to 1 / base, and half stands still, which leaves
    those channels to content alone."""

    def __init__(self, head_dim: int, max_len: int, base: float):
        super().__init__()
        freqs = (1 / base) ** torch.linspace(0, 1, head_dim // 4)
        freqs = F.pad(freqs, (0, len(freqs)))
        theta = torch.outer(torch.arange(max_len), freqs)
        turns = torch.stack((theta.cos(), theta.sin())).repeat(1, 1, 2)  # (2, max_len, K)
        turns[1, :, len(freqs) :] *= -1
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x):  # (T, H, K)
        cos, sin = self.turns[:, : x.size(0), None]
        # channel i turns with i + K / 2; no cat, for which Inductor would store both halves
        other = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return (x * cos + other * sin).type_as(x)


def uniform_matrix(*shape: int) -> nn.Parameter:
    """Uniform with standard deviation 0.5 / sqrt(fan-in); nn.Linear has 0.577."""
    bound = 3**0.5 * 0.5 * shape[-1] ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x: weights are fp32, and activations bf16 on a GPU."""
    return F.linear(x, weight.type_as(x))


def previous(x: Tensor) -> Tensor:
    """Each row's predecessor; the first row's is itself. x: (T, ...). That of a document's first
    token is another document's last one. So a little leaks over that border: by smear and bigrams
    that token, by offset keys and the pointer's key what its features hold of its document.
    Attention masks let nothing through."""
    return torch.cat((x[:1], x[:-1]))


def offset_keys(k: Tensor) -> Tensor:
    """Keys whose channels that stand still are those of the token before: a query that matches a
    token so reads the value of its successor (@classiclarryd). k: (T, H, K), in quarters that
    rotate, stand still, rotate, stand still."""
    rotating, still = k.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack((rotating, previous(still)), -2).flatten(-3)


def bigram_index(ids: Tensor, rows: int) -> Tensor:
    """Row of a table for each token with the one before it, by a hash (modded-nanogpt's record
    62). ids: (T,) int32, below 59,139 -> (T,) int32."""
    return ((36313 * ids) ^ (27191 * previous(ids))) % rows


class CausalSelfAttention(nn.Module):
    """Attention with merged QKV (@fernbear.bsky.social), QK-norm (arXiv:2010.04245;
    @Grad62304977), a fixed temperature (@leloykun), rotary, value embeddings added to v
    (arXiv:2410.17897; @KoszarskyB) as far as a gate for each head lets them, which sees a few
    channels of the input and of the embedding (@classiclarryd)."""

    def __init__(self, hp, layer: int):
        super().__init__()
        self.hp, self.window, self.table = hp, hp.layer_pattern[layer], hp.value_pattern[layer]
        self.qkv = uniform_matrix(3, hp.model_dim, hp.model_dim)
        self.out = uniform_matrix(hp.model_dim, hp.model_dim)
        self.v_scale = nn.Parameter(torch.full((1,), 0.5))
        if self.table != ".":
            self.value_gate = nn.Parameter(torch.zeros(hp.num_heads, GATE))

    def forward(self, x, values, rotary, masks):
        qkv = linear(x, self.qkv.flatten(0, 1))  # x: (T, D)
        heads = 3, self.hp.num_heads, self.hp.head_dim
        q, k, v = qkv.unflatten(1, heads).unbind(1)  # (T, H, K)
        # scaling q: FlexAttention's scale would recompile
        q, k = rotary(norm(q) * self.hp.attn_scale), rotary(norm(k))
        if self.window == "L":
            k = offset_keys(k)
        v = self.v_scale.type_as(v) * v
        if self.table in values:
            value_embed = values[self.table]
            both = [t[:, : GATE // 2] for t in (x, value_embed)]
            gate = linear(torch.cat(both, 1), self.value_gate).sigmoid()
            v = v + 2 * gate[..., None] * value_embed.view_as(v)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, H, T, K)
        y = attend(q, k, v, masks[self.window])[0].transpose(0, 1)  # (T, H, K)
        return linear(y.reshape(x.shape), self.out)


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (arXiv:2109.08668; 1-2 % better than GELU
    according to modded-nanogpt, @SKYLINEZ007 and @Grad62304977)."""

    def __init__(self, hp):
        super().__init__()
        hidden = hp.mlp_ratio * hp.model_dim
        # scales before casts to e4m3, which ends at 448: 8 x the normed input (below D^0.5), 64 x
        # weights (to 7), 1/16 x squares (to 7,168). What is larger is clipped in training alone, as
        # validation is in bf16: with 256 x and 1 x, a run at the default's rates trained to 3.99
        # and validated at 8.34 (records/LOG.md). Gradients: see `set_grad_scale`
        self.up = CastedLinear(hp.model_dim, hidden, 8.0, 64.0)
        self.down = CastedLinear(hidden, hp.model_dim, 0.0625, 64.0)
        self.up.weight = uniform_matrix(hidden, hp.model_dim)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):  # (T, D)
        return self.down(F.relu(self.up(x)).square())


class Mix(nn.Module):
    """A sum of earlier outputs, `streams`, weighted anew at each token (MUDDFormer,
    arXiv:2502.12170; modded-nanogpt's record 81). A weight is a learned constant, `start` at first,
    plus 0.1 times what a network of two layers makes of the current x; its second layer is zero at
    first, so that the constants alone count."""

    def __init__(self, dim: int, start: list[float]):
        super().__init__()
        self.network_in = uniform_matrix(64, dim)
        self.network_out = nn.Parameter(torch.zeros(len(start), 64))
        self.skip_weights = nn.Parameter(torch.tensor(start))

    def forward(self, x, streams):
        """x, and each of the streams: (T, D) -> (T, D)."""
        change = linear(F.gelu(linear(norm(x), self.network_in)), self.network_out)
        weights = self.skip_weights.type_as(x) + 0.1 * change  # (T, n)
        return sum(w * s for w, s in zip(weights.split(1, 1), streams))


class Pointer(nn.Module):
    """Copying: the next token may be one that the document already contains (pointer sentinel,
    arXiv:1609.07843; PR 379 of modded-nanogpt). One head of attention over the features at the end:
    a token is copied if what predicted it then resembles what predicts the next one now. So the key
    of token j adds the features at j - 1, which predicted it, and those at j, which say what it is.
    Each token sees its document so far, up to `copy_reach` back in whole blocks of 128. Worth 0.054
    nats in the eighth, in a form with equal chunks (records/LOG.md)."""

    def __init__(self, hp):
        super().__init__()
        self.hp = hp
        self.query = uniform_matrix(hp.head_dim, hp.model_dim)
        self.key = uniform_matrix(hp.head_dim, hp.model_dim)
        self.key_before = uniform_matrix(hp.head_dim, hp.model_dim)
        self.copy_scale = nn.Parameter(torch.ones(1))

    def scored(self, x, input_ids):
        """x: (T, D), input_ids: (T,) -> queries and keys (T, K), whose products are scores, and the
        BlockMask."""
        q = norm(linear(x, self.query)) * self.hp.attn_scale * self.copy_scale.type_as(x)
        k = norm(linear(x, self.key) + previous(linear(x, self.key_before)))
        return q, k, create_masks(input_ids, BLOCK, None, self.hp.copy_reach // BLOCK)[0]

    def forward(self, x, input_ids, targets, flex=False):
        """Weight of those tokens that are the target: x (T, D) -> (T,) fp32. A token's weights are
        the softmax of its scores and one more of 0, which means "copy nothing". flex: by
        FlexAttention, on a GPU."""
        q, k, mask = self.scored(x, input_ids)
        if not (flex and x.is_cuda):
            found = []
            for rows, keys, visible in dense_chunks(mask):
                scores = (q[rows] @ k[keys].mT).float().clamp(max=75)  # a sum of e^75 is finite
                weights = scores.exp() * visible
                hits = weights * (input_ids[keys] == targets[rows, None])
                found.append(hits.sum(1) / (1 + weights.sum(1)))
            return torch.cat(found)

        # Of two equal heads the second sees the target alone. `lse` has the log of each head's sum
        # of e^score, so the share is e^hits / (1 + e^every), as above. The sum of values y, which
        # attention is for, has no use: 16 channels are its fewest, and 0 * y gives it the gradient
        # without which FlexAttention's backward does not compile.
        def target_alone(score, batch, head, query, key):
            return score.where((head == 0) | (input_ids[key] == targets[query]), -math.inf)

        q, k = (t.expand(1, 2, *t.shape) for t in (q, k))
        y, sums = flex_attention(
            q, k, k[..., :16], target_alone, mask, scale=1.0, return_aux=AuxRequest(lse=True)
        )
        every, hits = sums.lse[0] + 0 * y[0, 0, :, 0]
        return (hits - F.softplus(every)).exp()


class Block(nn.Module):
    """One layer: add x0 and bigrams, then attention, then the MLP."""

    def __init__(self, hp, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(hp, layer)
        self.mlp = MLP(hp)
        self.lambdas = nn.Parameter(torch.tensor([1.1, 0.0, 0.05]))  # of stream, x0, bigrams

    def forward(self, x, x0, bigrams, seen, values, rotary, masks):
        """x, x0, bigrams: (T, D); seen: what attention reads, (T, D), or None for the normed x, up
        to `late_layer`; values: value embeddings (T, D) by digit; masks: by letter."""
        x = self.lambdas[0] * x + self.lambdas[1] * x0 + self.lambdas[2] * bigrams
        seen = norm(x) if seen is None else seen
        # in fp32: in bf16 Inductor would join it with the matmul to `addmm`, which copies x first
        x = (x.float() + self.attn(seen, values, rotary, masks)).type_as(x)
        return x + self.mlp(norm(x))


# ---- 4. GPT


class GPT(nn.Module):
    """U-Net GPT (arXiv:1505.04597; @brendanh0gan): the output of encoder layer i is added, with a
    learned weight, to the input of the mirrored decoder layer. x0, the normed token embedding with
    a share of the token before (`smear`), is added again in every block, and so is a row of
    `bigrams` for the token and the one before it. Attention after `late_layer` reads that layer's
    output (all three: @classiclarryd). Two `Mix`es weigh x0 and the outputs of `mixed_layers` and
    are added to x: `mix_input` before the last layer, `mix_head` before head and pointer. At first
    `mix_input` adds nothing, and `mix_head` takes half of `late_layer`'s output away (backout:
    @classiclarryd), if that is among them. A `Pointer` copies from the document. Weight tying: head
    and token embedding are one matrix (arXiv:1608.05859), small at first (@varunneal). vocab_size:
    its rows V, a multiple of 128. Its optimizers: `build_optimizers`, by names and dimensions."""

    def __init__(self, hp, vocab_size: int):
        super().__init__()
        depth = len(hp.layer_pattern)
        self.hp = hp
        self.mixed_layers = sorted(map(int, hp.mixed_layers.split()))
        self.max_window = window_at(hp.steps, hp)
        # the highest row of a token, and the one after it stands for "copy", see `losses`
        self.last_row = EOT if vocab_size > EOT else BYTE_EOT
        self.use_flex = True  # False: dense attention, where FlexAttention has no backward
        self.embed = nn.Embedding(vocab_size, hp.model_dim)
        nn.init.normal_(self.embed.weight, std=0.005)
        self.value_embeds = nn.ModuleDict()
        for table in sorted(set(hp.value_pattern) - {"."}):
            self.value_embeds[table] = nn.Embedding(vocab_size, hp.model_dim)
            nn.init.normal_(self.value_embeds[table].weight, std=0.01)
        self.bigrams = nn.Embedding(hp.bigram_rows, hp.bigram_dim)
        nn.init.zeros_(self.bigrams.weight)
        self.smear = nn.Parameter(torch.zeros(1))
        backout = [-0.5 * (layer == hp.late_layer) for layer in (-1, *self.mixed_layers)]
        # constants in the order of the streams: x0, then layers from low to high
        self.mix_input = Mix(hp.model_dim, [0.0] * len(backout))
        self.mix_head = Mix(hp.model_dim, backout)
        self.blocks = nn.ModuleList(Block(hp, layer) for layer in range(depth))
        self.skip_weights = nn.Parameter(torch.ones(depth // 2))
        longest = max(stage.seq_len for stage in stages(hp))
        self.rotary = Rotary(hp.head_dim, max(longest, hp.val_seq_len), hp.rope_base)
        self.lm_head = CastedLinear(hp.model_dim, vocab_size, hp.x_scale, hp.w_scale)
        self.lm_head.weight = self.embed.weight  # optimizers call it embed, knobs head
        self.pointer = Pointer(hp)
        self.fp8_layers = [m for m in self.modules() if isinstance(m, CastedLinear)]
        self.set_grad_scale(stages(hp)[0].seq_len)

    def features(self, input_ids: Tensor, window: Tensor) -> Tensor:
        """Normed residual stream before the head. input_ids: (T,) int, window: 0-d int32 tensor in
        blocks -> (T, D)."""
        masks = create_masks(input_ids, BLOCK, window, self.max_window)
        if not (self.use_flex and input_ids.is_cuda):
            masks = map(dense_chunks, masks)
        masks = dict(zip("LS", masks))
        rows = input_ids.clamp(max=self.last_row)  # moves the document token of byte data only
        values = {letter: table(rows) for letter, table in self.value_embeds.items()}
        pairs = self.bigrams(bigram_index(rows, self.bigrams.num_embeddings))
        x = self.embed(rows).type_as(pairs)  # (T, D)
        bigrams = F.pad(pairs, (0, x.size(1) - pairs.size(1)))
        x = x0 = norm(x + self.smear.type_as(x) * previous(x))
        # the last pushed is the first popped: layer `half` gets its own input 1 + w times
        skips, half, seen = [], len(self.skip_weights), None
        streams = [x0]  # what the mixes sum up
        for i, block in enumerate(self.blocks):
            if i >= half and skips:  # of an odd count of layers the last one has no partner
                x = x + self.skip_weights[i - half] * skips.pop()
            if i == len(self.blocks) - 1:
                x = x + self.mix_input(x, streams)
            x = block(x, x0, bigrams, seen, values, self.rotary, masks)
            if i < half:
                skips.append(x)
            if i in self.mixed_layers:
                streams.append(x)
            if i == self.hp.late_layer:
                seen = norm(x)
        return norm(x + self.mix_head(x, streams))

    def forward(self, input_ids, targets, window, sampled=False):
        """Loss of a packed sequence: input_ids (T,) int, targets (T,) int, window 0-d int32 in
        blocks -> 0-d fp32, the mean over its tokens. sampled: against `candidates` instead of all
        rows of V."""
        x = self.features(input_ids, window)
        copied = self.pointer(x, input_ids, targets, self.use_flex)
        candidates = self.candidates(targets) if sampled else ()
        return self.losses(x, copied, targets, *candidates).mean()

    # ---- 5. Loss

    def candidates(self, targets: Tensor):
        """Rows of V for the softmax of a training sequence, and their weights, (C,) each. Every
        target is one, and the pointer's row, with weight 1. Others come from a stride through V,
        begun elsewhere in each sequence, and weigh as many as they stand for, so that over all
        strides the mean of the sum is nearly that of the whole softmax (arXiv:1412.2007; PR 360 of
        modded-nanogpt). targets: (T,) int32. C has room for three times the kinds of token that
        text has, 4,900 in 16,384; a target without room would have an infinite loss."""
        V = self.embed.num_embeddings
        C = min(V, max(CANDIDATES, len(targets) // 2))
        needed = torch.zeros(V, device=targets.device)
        needed[targets.clamp(0, self.last_row)] = needed[self.last_row + 1] = 1
        stride = (torch.arange(V, device=targets.device) * 31_337 + targets.sum()) % V
        rows = (needed * V + stride).topk(C).indices
        left = V - needed.sum()
        return rows, torch.where(needed[rows] > 0, 1, left / (left - V + C))

    def logits(self, x: Tensor, rows=slice(None)) -> Tensor:
        """(n, D) -> (n, V) fp32 in (0, cap), or only those of `rows`; the sigmoid is a tanh
        soft-cap (arXiv:2408.00118; @Grad62304977, @KoszarskyB) made positive (@YouJiacheng) and
        shifted, so that it caps what is likely sooner than what is not (@classiclarryd)."""
        z = self.lm_head(x, rows).float() + self.hp.logit_shift
        return self.hp.logit_cap * torch.sigmoid(z / self.hp.logit_temp)

    def sums(self, x, own, pointer, rows, weights):
        """e^(logit - cap) times weights, summed for each of n tokens: over all of `rows`, over the
        one of them at the place `own` (n,), and over the one at `pointer` (0-d). x: (n, D) ->
        three (n,) fp32. All in one pass over V, and no sum over V in the backward, which writes a
        transposed copy. What a token's sums are good for is left to `losses`, which is not
        compiled: the backward here would do it anew for each logit. On an H100 that took 0.9 of
        the 2.8 ms of 32,768 tokens."""
        # a GPU has an instruction for exp2, and takes nine for exp
        bits = (self.logits(x, rows) - self.hp.logit_cap) / math.log(2)
        shares = weights * bits.exp2()
        place = torch.arange(shares.size(1), dtype=torch.int32, device=x.device)
        return [
            (shares * part).sum(-1) for part in (1, place == own[:, None], place == pointer)
        ]

    def losses(self, x, copied, targets, rows=slice(None), weights=1.0) -> Tensor:
        """Cross-entropy of each row: x (n, D), targets (n,) int, -100 scores 0 -> (n,) fp32 nats.
        Row `last_row` + 1 of V is no token's: its softmax share is the probability of copying, so
        p(target) = softmax[target] + softmax[last_row + 1] * copied, with copied (n,) from
        `Pointer`. Over all tokens that sums to at most 1; what is left stays with rows of no token.
        Logits never exceed the cap, so it serves as the softmax's maximum. Over all of V, or over
        `candidates`: rows (C,) int64 and weights (C,)."""
        index = torch.arange(self.embed.num_embeddings, dtype=torch.int32, device=x.device)
        # of each row of V: its place among `rows`, or below 0 (~i is -1 - i), which no place is
        places = (~index).scatter(0, index[rows].long(), index)
        own, pointer = places[targets.clamp(0, self.last_row)], places[self.last_row + 1]
        every, found, pointed = self.sums(x, own, pointer, rows, weights)
        return (every.log() - (found + copied * pointed).log()) * (targets >= 0)

    def set_grad_scale(self, seq_len: int):
        """Set each layer's third FP8 scale, the gradient's: `grad_scale` suits the gradient of a
        mean over 48K tokens, and a mean over `seq_len`, if fewer, has larger ones."""
        for layer in self.fp8_layers:
            layer.scale[2].fill_(self.hp.grad_scale * seq_len / 49_152)


def place(model: GPT, device) -> GPT:
    """Move to the device; on CUDA value embeddings and bigrams are bf16, and with them all
    activations; the head stays fp32. A CPU is 6x slower in bf16."""
    model.to(device)
    if model.embed.weight.is_cuda:
        model.value_embeds.bfloat16()
        model.bigrams.bfloat16()
    return model


# ---- 6. Attention masks. Key k is visible to query q iff k <= q, doc(k) == doc(q) and
# q // 128 - k // 128 < window. FlexAttention takes two lists of blocks for each block: full ones,
# all visible, and partial ones, masked by element.


def block_table(first_doc, last_doc, window, width: int, axis: str) -> dict:
    """Which blocks each block meets, by FlexAttention's names: counts (1, 1, B) and indices
    (1, 1, B, width), int32. first_doc, last_doc: (B,) int32, documents of a block's first and last
    token. axis: "kv" lists the key blocks of each query block (to its left), "q" the query blocks
    of each key block. Documents are in order, so the visible blocks are the nearest ones, and
    after the diagonal the full ones (a single document in both) come first: counts give the
    indices, nothing is sorted and no table is wider than the widest window. To the left of block 9
    `P F F P .`, nearest first (partial, full, invisible), gives full 8, 7 and partial 9, 6."""
    blocks, side = first_doc.size(0), -1 if axis == "kv" else 1
    own = torch.arange(blocks, device=first_doc.device, dtype=torch.int32)[:, None]  # (B, 1)
    distance = torch.arange(width, device=first_doc.device, dtype=torch.int32)  # (width,)
    other = own + side * distance  # (B, width)
    inside = (other >= 0) & (other < blocks)
    other = other.clamp(0, blocks - 1)
    left, right = (other, own) if axis == "kv" else (own, other)
    # of a block, by distance: 0 partial, then full ones, then partial ones, then invisible ones
    visible = inside & (distance < window) & (last_doc[left] >= first_doc[right])
    full = visible & (distance > 0) & (first_doc[left] == last_doc[right])
    n_full = full.sum(1, dtype=torch.int32)
    n_partial = visible.sum(1, dtype=torch.int32) - n_full
    partial = own + side * torch.where(distance > 0, n_full[:, None] + distance, 0)
    full_indices = own + side * (1 + distance)
    return {
        f"{axis}_num_blocks": n_partial[None, None],
        f"{axis}_indices": partial.clamp(0, blocks - 1)[None, None],
        f"full_{axis}_num_blocks": n_full[None, None],
        f"full_{axis}_indices": full_indices.clamp(0, blocks - 1)[None, None],
    }


def create_masks(
    input_ids: Tensor,
    block_size: int = BLOCK,
    window=None,
    max_window=None
):
    """Document-causal sliding-window masks of a packed sequence: (with the whole window, with half
    of it). Long and short windows: arXiv:2408.00118, @leloykun, @YouJiacheng, @Grad62304977;
    blocks from document bounds: @KoszarskyB.
    input_ids: (T,) integers, T a multiple of block_size; a document starts at each token 50256.
    window: in blocks, a 0-d integer tensor on the same device (an int would recompile), or None
    = unlimited. max_window: the widest window that will come, which fixes the tables' width.
    O(B x max_window) memory, never T x T. The half window is rounded down; the block of a query is
    always visible. Raises ValueError for a length that is no multiple."""
    length = input_ids.numel()
    if input_ids.ndim != 1 or length % block_size:
        raise ValueError(
            f"create_masks: ids of shape {tuple(input_ids.shape)} are not one packed sequence of a "
            f"multiple of {block_size} tokens: give one at a time, padded"
        )
    blocks = length // block_size
    width = min(max_window or blocks, blocks)
    window = blocks if window is None else window
    window = torch.as_tensor(window, dtype=torch.int32, device=input_ids.device)
    docs = (input_ids == EOT).cumsum(0, dtype=torch.int32)  # (T,)
    first_doc = docs[::block_size]  # (B,)
    last_doc = docs[block_size - 1 :: block_size]

    def build(window):
        window = window.clamp(1, width)

        def visible(batch, head, q, k):
            near = q // block_size - k // block_size < window
            return (q >= k) & (docs[q] == docs[k]) & near

        kv = block_table(first_doc, last_doc, window, width, "kv")
        q = block_table(first_doc, last_doc, window, width, "q")
        return BlockMask(
            (length, length), **kv, **q, BLOCK_SIZE=(block_size, block_size), mask_mod=visible
        )

    return build(window), build(window // 2)


QUERIES = 512  # of one dense attention call: its mask is (512, 512 + window), never T x T


def dense_chunks(mask: BlockMask):
    """A BlockMask as (queries, keys, (queries, keys) bool) pieces for dense attention, each over
    the key range of the widest window: the current window only masks, so shapes never change."""
    length, (block, _) = mask.seq_lengths[0], mask.BLOCK_SIZE
    reach = (mask.kv_indices.size(-1) - 1) * block
    places = torch.arange(length, device=mask.kv_indices.device)
    pieces = []
    for start in range(0, length, QUERIES):
        rows = slice(start, min(start + QUERIES, length))
        keys = slice(max(0, start - reach), rows.stop)
        visible = mask.mask_mod(0, 0, places[rows, None], places[keys])
        pieces.append((rows, keys, visible))
    return pieces


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Attention of q, k, v (1, H, T, K) with q already scaled; mask: a BlockMask for FlexAttention
    (arXiv:2412.05496; @KoszarskyB), or `dense_chunks` of one where that has no backward (CPU)."""
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, scale=1.0)
    pieces = []
    for rows, keys, visible in mask:
        part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        pieces.append(F.scaled_dot_product_attention(*part, attn_mask=visible, scale=1.0))
    return torch.cat(pieces, dim=2)


def flex_supported(device) -> bool:
    """FlexAttention trains on GPUs whose Triton has bf16; elsewhere it has no backward."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ---- 7. FP8 matmul. A linear layer is three matmuls: y = x W^T, dx = dy W and dW = dy^T x. Tensor
# cores multiply FP8 twice as fast as bf16. Two formats: e4m3 (3 mantissa bits, to 448) for values,
# e5m2 (2 bits, to 57,344) for gradients. Each tensor is multiplied by one fixed scale that centres
# it in its format, and the product is divided by both. The hardware takes one layout only, A
# row-major times B column-major, hence the transposed copies in backward.


def to_fp8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x * scale) in `dtype`, saturated: torch's own casts turn what is too large into inf or NaN,
    so it is clamped. Triton's saturate by themselves, which spares Inductor's code a dozen
    instructions a value: 6 % of an MLP's time on an H100."""
    x = x.float() * scale
    if not torch.compiler.is_compiling():
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def column_major(x: Tensor) -> Tensor:
    """Copy of an FP8 matrix (N, n). Where n < 2048, as in the stream but not in the MLP, x comes
    from a sum over channels, which Inductor would join the copy to, and write it byte by byte; no
    kernel reaches over a view as wider numbers, which itself costs nothing. ([None]: Inductor drops
    two views in a row.)"""
    if x.size(1) < 2048:
        x = x.view(torch.int32)[None].view(x.dtype)[0]
    return x.t().contiguous().t()


class FP8Matmul(torch.autograd.Function):
    """y = x W^T in FP8, forward and backward (arXiv:2209.05433; @YouJiacheng). As a Function, and
    not as a custom operator, Inductor fuses the casts into their neighbours. x: (N, in) bf16,
    weight: (out, in) fp32, scale: (3,) fp32; N, in and out multiples of 16."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        x8 = to_fp8(x, scale[0], torch.float8_e4m3fn)
        w8 = to_fp8(weight, scale[1], torch.float8_e4m3fn)
        # one by one: cuBLASLt of CUDA 13 refuses a scale at a 4-byte offset inside another tensor
        inv = [s.reciprocal() for s in scale.unbind()]
        ctx.save_for_backward(x8, w8, scale, *inv)
        return torch._scaled_mm(
            x8, w8.t(), inv[0], inv[1], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx, grad):
        x8, w8, scale, *inv = ctx.saved_tensors
        g8 = to_fp8(grad, scale[2], torch.float8_e5m2)
        grad_x = torch._scaled_mm(g8, column_major(w8), inv[2], inv[1], out_dtype=torch.bfloat16)
        # (in, N) x (N, out): the head's small operand goes first; fp32 out, as sequences are summed
        grad_w = torch._scaled_mm(
            column_major(x8).t(), column_major(g8), inv[0], inv[2], out_dtype=torch.float32
        ).t()
        return grad_x, grad_w.contiguous(), None


class CastedLinear(nn.Linear):
    """nn.Linear that trains in FP8 with static per-tensor scales and evaluates in the dtype of its
    input. x: (..., in_features) -> (..., out_features), any number of rows, or only the features
    `out`, a slice or (C,) int64, of which FP8 wants a multiple of 16. `x_scale`, `w_scale` and
    `grad_scale` multiply the input, the weight and the incoming gradient before their casts;
    products are divided by them again. All three lie in `scale`, which stays fp32 whatever the
    module is cast to. FP8 needs CUDA, training mode, `use_fp8` (see `fp8_supported`) and features
    divisible by 16; otherwise the weight is cast to the input's dtype. Scales: NanoGPT speedrun,
    2025-01-26_BatchSize. Raises TypeError where a bool stands for x_scale."""

    def __init__(
        self, in_features: int, out_features: int,
        x_scale: float = 2.0, w_scale: float = 512.0, grad_scale: float = 524288.0,
        *, bias: bool = False, device=None, dtype=None
    ):
        if isinstance(x_scale, bool):
            raise TypeError("CastedLinear: x_scale is a number: pass bias=True by keyword")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        # no buffer, since casts of a model reach those, and fp16 would make inf of 2^19; nor saved:
        # weights load into nn.Linear and back, strictly
        self.scale = torch.tensor(
            [x_scale, w_scale, grad_scale], dtype=torch.float32, device=device
        )
        self.use_fp8 = True

    def _apply(self, fn, recurse=True):
        """What all casts and moves of modules call: `scale` moves along, and keeps its dtype."""
        super()._apply(fn, recurse)
        if not self.scale.is_meta:
            self.scale = self.scale.to(self.weight.device)
        return self

    def forward(self, x: Tensor, out=slice(None)) -> Tensor:
        weight = self.weight[out]
        bias = None if self.bias is None else self.bias[out].type_as(x)
        aligned = self.in_features % 16 == self.out_features % 16 == 0
        if not (self.use_fp8 and self.training and x.is_cuda and aligned):
            return F.linear(x, weight.type_as(x), bias)
        rows = x.reshape(-1, self.in_features)
        pad = -rows.size(0) % 16
        padded = F.pad(rows, (0, 0, 0, pad)) if pad else rows
        y = FP8Matmul.apply(padded, weight, self.scale)
        y = y[: rows.size(0)].type_as(x)
        y = y.view(*x.shape[:-1], y.size(1))
        return y if bias is None else y + bias


def fp8_supported(device):
    """(whether `CastedLinear` has FP8 on `device`, why), by one forward and backward."""
    if torch.device(device).type != "cuda":
        return False, "no CUDA device"
    try:
        layer = CastedLinear(64, 64, grad_scale=1.0, device=device)
        x = torch.randn(32, 64, device=device, dtype=torch.bfloat16)
        layer(x).float().square().mean().backward()
    except Exception as error:
        return False, "probe failed: " + str(error).partition("\n")[0][:120]
    return True, "probe passed"


# ---- 8. Updates: Muon for the matrices, Adam for the rest, as pure functions


# Of the polynomials a x + b x^3 + c x^5, one after the other, those that bring the singular values
# between 0.001 and 1 closest to 1 in five (Polar Express, arXiv:2505.16932; @varunneal).
QUINTICS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def zeropower_via_newtonschulz5(G: Tensor) -> Tensor:
    """Approximate U V^T of each matrix G = U S V^T by a quintic Newton-Schulz iteration
    (kellerjordan.github.io/posts/muon). G: (..., R, C) -> same shape, bf16 (fp32 on CPU)."""
    X = G / (1.02 * matrix_norms(G) + 1e-6)  # rounded, none may lie above 1
    X = X.bfloat16() if G.is_cuda else X.float()
    tall = X.size(-2) > X.size(-1)
    identity = torch.eye(min(X.shape[-2:]), device=X.device)
    for a, b, c in QUINTICS:
        A = X.mT @ X if tall else X @ X.mT
        # with a on the diagonal, X is multiplied once and never copied
        B = (a * identity + b * A + c * (A @ A)).type_as(X)
        X = X @ B if tall else B @ X
    return X


def matrix_norms(x: Tensor) -> Tensor:
    """(..., R, C) -> (..., 1, 1), above 0."""
    return torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-30)


def normalize_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Divide each row (each column, of a wide matrix) by the root of the moving average of its mean
    square, and give each matrix its norm back (NorMuon, arXiv:2510.05491; @li_zichong).
    update: (N, R, C); second_moment: (N, max(R, C)) fp32, changed in place."""
    axis = 2 if update.size(1) >= update.size(2) else 1
    update = update.float()
    # as lerp, which takes one dtype: torch loads states in that of the parameter
    second_moment += (1 - beta2) * (update.square().mean(axis) - second_moment)
    scaled = update * second_moment.clamp(min=1e-10).rsqrt().unsqueeze(axis)
    return scaled * (matrix_norms(update) / matrix_norms(scaled))


def muon_update(
    grad: Tensor, momentum_buffer: Tensor, second_moment: Tensor, momentum: Tensor, lr: Tensor,
    beta2: float, divisor: Tensor
) -> Tensor:
    """Nesterov momentum of grad / divisor, orthogonalized, its neurons normalized, times
    lr * sqrt(max(1, R / C)). grad, momentum_buffer (changed in place): (N, R, C); momentum, lr,
    divisor (sequences in the sum): 0-d. Returns the bf16 step to subtract. Muon: Keller Jordan and
    others; in batches: @scottjmaddox, @YouJiacheng."""
    grad = grad.float() / divisor
    average = torch.lerp(momentum_buffer.float(), grad, 1 - momentum)
    momentum_buffer.copy_(average)
    update = zeropower_via_newtonschulz5(grad.lerp(average, momentum))
    update = normalize_neurons(update, second_moment, beta2)
    scale = lr * max(1.0, grad.size(-2) / grad.size(-1)) ** 0.5
    return (update * scale).bfloat16()


def subtract(params: list[Tensor], updates: list[Tensor], shrinkage: Tensor):
    """params -= updates, and where a step makes a weight smaller, shrinkage (0-d) times the weight
    too: cautious weight decay (arXiv:2510.12402; @varunneal, @roeeshenberg). shrinkage is decay
    times lr^2: it follows the schedule twice, as a step and as a decay that fades."""
    for p, update in zip(params, updates):
        weight, step = p.float(), update.float()
        p.copy_(weight - step - shrinkage * weight * (weight * step > 0))


def adam_update(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, betas: tuple,
    eps: float, divisor: Tensor
) -> Tensor:
    """Adam (arXiv:1412.6980; small eps: @YouJiacheng) on grad / divisor; decay: `subtract`. grad,
    exp_avg, exp_avg_sq (changed in place): one shape; lr, step (from 1), divisor: 0-d. Returns the
    bf16 step to subtract."""
    grad = grad.float() / divisor
    m = torch.lerp(exp_avg.float(), grad, 1 - betas[0])
    v = torch.lerp(exp_avg_sq.float(), grad.square(), 1 - betas[1])
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    return (lr * (m / (1 - betas[0] ** step)) / denominator).bfloat16()


# ---- 9. Exchange between ranks, and the optimizers. Each rank owns a share of every bucket:
# gradients are summed to their owner, the owner computes the update, updates travel in bf16
# (arXiv:1910.02054). On one rank nothing travels, on the same path.

SCALE_BLOCK = 4096  # values of one fp32 scale in an FP8 exchange; parameters start at multiples


def compiled(function, **options):
    """By Inductor, once for each shape, in one graph: what changes in a run is a tensor. options:
    Inductor's own."""
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class Bucket:
    """Parameters of one param_group, number `group`, that travel together: one buffer in which each
    starts at a multiple of 4,096 values, cut into equal shares of whole units (a matrix, or 4,096
    values), one a rank."""

    def __init__(self, params, group: int, unit: int, world_size: int):
        self.params, self.group, self.unit = params, group, unit
        self.strides = [round_up(p.numel(), SCALE_BLOCK) for p in params]
        self.size = round_up(sum(self.strides), unit * world_size)
        self.share = self.size // world_size  # values of one rank
        self.strides[-1] += self.size - sum(self.strides)  # what fills up the last share

    def views(self, buffer: Tensor) -> list[Tensor]:
        pieces = zip(buffer.split(self.strides), self.params)
        return [piece[: p.numel()].view(p.shape) for piece, p in pieces]

    def pack(self) -> Tensor:
        """Gradients as one bf16 buffer (size,); a parameter without a gradient counts as zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        first = grads[0]
        if first.dtype == torch.bfloat16 and first.numel() == self.size:
            return first.flatten()  # alone in its bucket, and of the wire's dtype: no copy
        buffer = first.new_zeros(self.size, dtype=torch.bfloat16)
        torch._foreach_copy_(self.views(buffer), grads)
        return buffer


class BF16Exchange:
    """Gradients travel in bf16 and are summed on the way, by reduce-scatter. What `send` returns
    is for `receive`."""

    def __init__(self, world_size: int):
        self.world_size = world_size

    def start(self, collective, sent: Tensor, size: int):
        """Send `sent` (n,), gradients or bf16 updates. Returns a function that waits and gives the
        (size,) that this rank receives."""
        if self.world_size == 1:
            return lambda: sent
        received = sent.new_empty(size)
        work = collective(received, sent, async_op=True)

        def wait(kept=sent):  # what was sent must live until then
            work.wait()
            return received

        return wait

    def send(self, bucket: Bucket):
        return self.start(dist.reduce_scatter_tensor, bucket.pack(), bucket.share)

    def receive(self, in_flight) -> Tensor:
        """This rank's share of the gradient, summed over ranks: (share,)."""
        return in_flight()


# The FP8 exchange, off by default: a quarter fewer bytes (updates stay bf16), slower over NVLink.


def quantize_e5m2(x):
    """(n * 4096,) -> (e5m2 (n * 4096,), fp32 scales (n,)): each 4,096 fill e5m2's range."""
    blocks = x.float().view(-1, SCALE_BLOCK)
    scales = blocks.abs().amax(1).clamp(min=1e-30) / torch.finfo(torch.float8_e5m2).max
    return to_fp8(blocks, 1 / scales[:, None], torch.float8_e5m2).flatten(), scales


def dequantize_e5m2(values, scales):
    return (values.float().view(-1, SCALE_BLOCK) * scales[:, None]).flatten()


class FP8Exchange(BF16Exchange):
    """Gradients by all-to-all in e5m2, summed in fp32 by the owner (arXiv:2310.18313)."""

    def send(self, bucket):
        values, scales = quantize_e5m2(bucket.pack())
        parts = values.view(torch.uint8), scales  # gloo knows no float8
        return [self.start(dist.all_to_all_single, x, x.numel()) for x in parts]

    def receive(self, in_flight):
        values, scales = (part() for part in in_flight)
        gradients = dequantize_e5m2(values.view(torch.float8_e5m2), scales)
        return gradients.view(self.world_size, -1).sum(0)


class ShardedOptimizer(torch.optim.Optimizer):
    """What Muon and Adam share. They add `kind`, which says what goes into one bucket, `update`, a
    pure function, and `share_update`, which calls it for this rank's share of a bucket. One code
    path for 1 and N ranks; without a process group the collectives drop out. `grad_divisor`, which
    may change every step, divides the summed gradient; `grad_comm` is the format in which that
    travels. world_size: the process group's, unless given to plan for another. For --log_norms
    `squares` is not () but fp32 (2, param_groups), and a step adds the squares of this rank's share
    of the undivided gradient and of the update to it. Raises ValueError for parameters after the
    constructor's."""

    squares = ()
    subtract = staticmethod(subtract)

    def __init__(self, params, defaults: dict, grad_divisor=1.0, grad_comm="bf16", world_size=None):
        super().__init__(params, defaults)
        together = dist.get_world_size() if dist.is_initialized() else 1
        self.world_size = world_size or together
        self.buckets = self.make_buckets()
        self.device = self.buckets[0].params[0].device
        # 0-d tensors: a number that changes would recompile, or stay as it was in a CUDA graph
        self.grad_divisor = torch.as_tensor(grad_divisor, device=self.device)
        for group in self.param_groups:
            for key in {"lr", "momentum"}.intersection(group):
                group[key] = torch.as_tensor(1.0 * group[key], device=self.device)
        exchange = FP8Exchange if grad_comm == "fp8" and self.world_size > 1 else BF16Exchange
        self.exchange = exchange(self.world_size)

    def __getstate__(self) -> dict:
        """All of it: torch's own forgets what a copy's step needs."""
        return self.__dict__

    def add_param_group(self, group: dict):
        if hasattr(self, "buckets"):
            raise ValueError("buckets are fixed: give all parameters to the constructor")
        super().add_param_group(group)

    def make_buckets(self) -> list[Bucket]:
        """One for each param_group, dtype and `kind`: (values of a unit, what else is alike)."""
        alike = defaultdict(list)
        for group, settings in enumerate(self.param_groups):
            for p in settings["params"]:
                alike[group, p.dtype, self.kind(p)].append(p)
        return [
            Bucket(params, group, unit, self.world_size)
            for (group, _, (unit, *_)), params in alike.items()
        ]

    def compile(self):
        """Let Inductor fuse the updates."""
        self.update = compiled(self.update)
        self.subtract = compiled(self.subtract, combo_kernels=True)  # not one a matrix

    @torch.enable_grad()
    def step(self, closure=None):
        loss = closure and closure()
        list(self.parts())
        return loss

    @torch.no_grad()
    def parts(self):
        """A step in three parts, a yield behind each: gradients leave, updates are computed and
        leave, weights change. Optimizers that take turns, as in `Trainer.launch`, hide what one
        sends behind what another computes. At the last yield each waits for the others, since
        `zip` would end with the first to end."""
        gradients = [self.exchange.send(bucket) for bucket in self.buckets]
        yield
        sent = []
        for bucket, in_flight in zip(self.buckets, gradients):
            gradient = self.exchange.receive(in_flight)
            update = self.share_update(bucket, gradient)
            # only for --log_norms; what fills a share up is zero in both
            for total, values in zip(self.squares, (gradient, update)):
                total[bucket.group] += values.float().square().sum()
            # travels while the next is computed
            gathered = self.exchange.start(dist.all_gather_into_tensor, update, bucket.size)
            sent.append(gathered)
        yield
        for bucket, in_flight in zip(self.buckets, sent):
            updates = bucket.views(in_flight())
            group = self.param_groups[bucket.group]
            self.subtract(bucket.params, updates, group["decay"] * group["lr"] ** 2)
        yield

    def moment(self, bucket: Bucket, name: str, *shape: int) -> Tensor:
        """A state of this rank's share of a bucket, of the parameters' dtype, or fp32 if it has a
        shape of its own; kept under the bucket's first parameter."""
        first = bucket.params[0]
        state = self.state[first]
        if name not in state:
            dtype = torch.float32 if shape else first.dtype
            state[name] = first.new_zeros(shape or bucket.share, dtype=dtype)
        return state[name]


class Muon(ShardedOptimizer):
    """Momentum, orthogonalized by Newton-Schulz. params: matrices (..., R, C), leading dimensions
    are separate ones; equal shapes are orthogonalized in one batch, each rank its share of it. `lr`
    and `momentum` may change every step; they are 0-d tensors, which schedulers fill in place, so
    that a state_dict to be kept is to be copied. Works as any torch.optim.Optimizer, without a
    process group and under any LR scheduler. Raises ValueError for what is no matrix."""

    update = staticmethod(muon_update)

    def __init__(self, params, lr=0.02, momentum=0.95, beta2=0.95, decay=0.0, **exchange):
        settings = dict(lr=lr, momentum=momentum, beta2=beta2, decay=decay)
        super().__init__(params, settings, **exchange)

    def kind(self, p):
        shape = p.shape[-2:]
        if p.ndim < 2 or (p.ndim > 2 and shape.numel() % SCALE_BLOCK):
            raise ValueError(
                f"Muon: {tuple(p.shape)} is no matrix, nor a stack of matrices of a multiple of "
                f"{SCALE_BLOCK} values; give it to Adam, or its matrices singly"
            )
        return round_up(shape.numel(), SCALE_BLOCK), shape

    def share_update(self, bucket, grad):
        group, shape = self.param_groups[bucket.group], bucket.params[0].shape[-2:]
        grad, buffer = (
            flat.view(-1, bucket.unit)[:, : shape.numel()].unflatten(1, shape)
            for flat in (grad, self.moment(bucket, "momentum_buffer"))
        )
        second = self.moment(bucket, "second_moment", len(grad), max(shape))
        settings = group["momentum"], group["lr"], group["beta2"]
        update = self.update(grad, buffer, second, *settings, self.grad_divisor).flatten(1)
        padding = bucket.unit - shape.numel()
        return (F.pad(update, (0, padding)) if padding else update).flatten()


class Adam(ShardedOptimizer):
    """Adam, sharded over ranks. A tensor of more than 4,096 values has a bucket of its own; smaller
    ones of a group share one."""

    update = staticmethod(adam_update)

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.0, **exchange
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, decay=decay), **exchange)

    def kind(self, p):
        return SCALE_BLOCK, id(p) if p.numel() > SCALE_BLOCK else 0

    def share_update(self, bucket, grad):
        group = self.param_groups[bucket.group]
        m, v = self.moment(bucket, "exp_avg"), self.moment(bucket, "exp_avg_sq")
        step = self.moment(bucket, "step", 1)[0].add_(1)
        settings = group["lr"], group["betas"], group["eps"]
        return self.update(grad, m, v, step, *settings, self.grad_divisor)


def build_optimizers(model: GPT, hp, world_size=None):
    """[Muon, Adam, Muon of the MLPs' second matrices], the order in which they take turns in
    `Trainer.launch`; each parameter in a group of its kind: by its name, or the module it is in."""
    scale, steady = hp.down_scale, dict(betas=hp.scalar_betas)
    tables = dict(lr=hp.table_lr, betas=hp.table_betas, decay=hp.table_decay)
    kinds = dict(  # Adam's small ones first: see `Trainer.launch`
        scalars=dict(lr=hp.scalar_lr, **steady), mixes=dict(lr=hp.mix_lr, **steady),
        skip_weights=dict(lr=hp.skip_lr, **steady),
        embed=dict(lr=hp.head_lr, betas=hp.head_betas, decay=hp.head_decay),
        value_embeds=dict(tables), bigrams=tables,
        matrices=dict(lr=hp.muon_lr, decay=hp.muon_decay),
        down=dict(lr=hp.muon_lr * scale, decay=hp.muon_decay / scale)
    )
    for kind, group in kinds.items():
        group.update(name=kind, initial_lr=group["lr"], params=[])
    for name, p in model.named_parameters():
        other = "scalars" if p.ndim < 2 else "skip_weights" if "gate" in name else "matrices"
        other = "mixes" if "network" in name else other
        kind = next((part for part in name.split(".") if part in kinds), other)
        kinds[kind]["params"].append(p)
    groups = [group for group in kinds.values() if group["params"]]
    exchange = dict(grad_comm=hp.grad_comm, world_size=world_size)
    adam = Adam([group for group in groups if "betas" in group], eps=hp.adam_eps, **exchange)
    first, *others = (
        Muon([group], hp.muon_lr, hp.muon_momentum, hp.muon_beta2, **exchange)
        for group in groups if "betas" not in group
    )
    return [first, adam, *others]


# ---- 10. Tokens

LOADER_DEADLINE = 60.0  # seconds that the training loop waits for a step's tokens


class RunEnd(Exception):
    """An end of the run that one sentence explains. `code` is the exit code: 2 refused before step
    0, or a shard that was cut short since, once all is saved; 3 non-finite loss, weight or moment;
    4 rank, collective or loader deadline; 5 no usable checkpoint; 6 no space or memory; 75 stopped
    by a signal, saved; 0: there is nothing to do."""

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code


class TokenStream:
    """Shards, uint16 (count,) each, laid end to end; `total` is the count of tokens."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.total = shards, sum(map(len, shards))

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start : start + length] as int32, across shard boundaries. IndexError past the
        end."""
        end = start + length
        pieces, first = [], 0
        for shard in self.shards:
            pieces.append(shard[max(start - first, 0) : max(end - first, 0)])
            first += len(shard)
        tokens = np.concatenate(pieces)
        if len(tokens) < length:
            raise IndexError(f"tokens {start} to {end} of {self.total}")
        return tokens.astype(np.int32)

    def pair(self, start: int, seq_len: int) -> Tensor:
        """A sequence, and the token that follows each of its tokens: input_ids and targets, as rows
        of one (2, T) int32."""
        return torch.from_numpy(self.read(start, seq_len + 1)).unfold(0, seq_len, 1)


def prefetch(stream: TokenStream, hp, rank=0, world_size=1, first_step=0, pin=False):
    """Yield each step's batch of this rank, read ahead in a thread: input_ids and targets of n
    sequences, (n, 2, T) int32; rank r takes the sequences r, r + world_size, ... of a step. RunEnd
    4 if the thread failed or gave nothing in time."""
    ready = queue.Queue(4)

    def fill():
        try:
            for step, (spans, _) in enumerate(sequences(hp, stream.total)):
                if step >= first_step:
                    batch = torch.stack([stream.pair(*place) for place in spans[rank::world_size]])
                    ready.put(batch.pin_memory() if pin else batch)
        except BaseException as error:  # it belongs to the thread that waits for the tokens
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    for _ in range(first_step, hp.steps):
        try:
            item = ready.get(timeout=LOADER_DEADLINE)
        except queue.Empty:
            item = TimeoutError(f"nothing came for {LOADER_DEADLINE:.0f} s")
        if isinstance(item, BaseException):
            raise RunEnd(
                4, f"the data loader failed ({item!r}): see whether the disk of --data_dir answers"
            ) from item
        yield item


# ---- 11. Training

AVERAGED = "embed", "matrices", "down"  # groups whose weights are averaged
HEAD_ROWS = 16_384  # rows of logits at once in validation: 256K rows of them would be 53 GB


class Trainer:
    """One rank's model and optimizers, and what is done with them. `window`: 0-d int32, in blocks.
    """

    def __init__(self, hp, model: GPT, optimizers, rank=0, world_size=1):
        self.hp, self.model, self.optimizers = hp, model, optimizers
        self.rank, self.world_size = rank, world_size
        self.device = model.embed.weight.device
        self.cuda = self.device.type == "cuda"
        self.window = torch.zeros((), dtype=torch.int32, device=self.device)
        self.loss = torch.zeros((), device=self.device)  # of the last step
        self.graphs = {}  # by `shape_at`: a CUDA graph's replay and the batch that it reads

    def compile(self):
        """The model in parts, of which the layers, which take longest, compile once for a length,
        whether or not the softmax is sampled. A deepcopy of the model would compute with this
        one's weights: build another."""
        # compiled graphs of one function; `subtract` has one for each shape of bucket: eleven
        torch._dynamo.config.recompile_limit = 256
        model = self.model
        for part in "features candidates sums".split():
            setattr(model, part, compiled(getattr(model, part)))
        model.pointer.forward = compiled(model.pointer.forward)
        for optimizer in self.optimizers:
            optimizer.compile()

    def set_schedules(self, step: int):
        """Set all that changes between steps: window, rates, momentum, and at a stage's border
        FP8's gradient scale and the divisor. Compiled code sees them as tensors, so nothing
        recompiles. Code for a new stage's shapes and for the whole softmax is from `warm_up`;
        weights, moments and the place in the stream just go on."""
        hp, stage = self.hp, stage_at(step, self.hp)
        lr, momentum = lr_at(step, hp), momentum_at(step, hp)
        self.window.fill_(window_at(step, hp))
        self.model.set_grad_scale(stage.seq_len)
        for optimizer in self.optimizers:
            optimizer.grad_divisor.fill_(stage.sequences)
            for group in optimizer.param_groups:
                group["lr"].fill_(group["initial_lr"] * lr)
                if "momentum" in group:
                    group["momentum"].fill_(momentum)

    def train_step(self, step: int, batch: Tensor) -> Tensor:
        """One optimizer step over this rank's sequences of the batch, (n, 2, T) int32: input_ids
        and targets of each. Returns the 0-d sum of their losses / sequences of the step."""
        self.set_schedules(step)
        batch = batch.to(self.device, non_blocking=True)
        start, inputs = self.graphs.get(
            shape_at(step, self.hp), (lambda: self.launch(step, batch), batch)
        )
        inputs.copy_(batch)
        start()
        self.average(step)
        return self.loss.clone()

    def launch(self, step: int, batch: Tensor):
        """The device's share of `train_step`, kernel by kernel. Each backward sees the undivided
        mean of its sequence, which FP8's gradient scale is made for; the optimizers divide."""
        stage, sampled = shape_at(step, self.hp)
        self.loss.zero_()
        for input_ids, targets in batch:
            loss = self.model(input_ids, targets, self.window, sampled)
            loss.backward()
            self.loss += loss.detach() / stage.sequences
        every = self.hp.log_norms
        due = every and not (step + 1) % every
        for optimizer in self.optimizers:
            optimizer.squares = torch.zeros(
                2, len(optimizer.param_groups), device=self.device
            ) if due else ()
        # Muon computes while gradients of Adam's tables travel, and again while their updates do.
        # By default CUDA has 8 queues for a graph's branches: the ninth reduce-scatter is queued
        # before what waits for the first, Muon's products, and these do not start before it does.
        # So what is sent before it is small, but for Muon's own.
        list(zip(*(optimizer.parts() for optimizer in self.optimizers)))
        self.model.zero_grad()

    def capture(self, batches: dict[int, Tensor]) -> int:
        """Record the launches of each step of `batches`, by its number, as a CUDA graph, which
        starts all of them at once: one by one they take the host 36 ms, more than a GPU needs for
        16K tokens. A graph reads and writes tensors where they were: what changes is filled in
        place, and state is copied into. So no launch may wait for the GPU, as print(loss) or
        .item() do: to look into a step, --log_norms=1000000 leaves the graphs out. thread_local:
        other threads may go on. All share the memory of the first. Returns its bytes."""
        torch.cuda.reset_peak_memory_stats()
        pool = torch.cuda.graph_pool_handle()
        for step, batch in batches.items():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                self.launch(step, batch)
            self.graphs[shape_at(step, self.hp)] = graph.replay, batch
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    @torch.no_grad()
    def average(self, step: int):
        """Head and matrices get a moving average, from three time constants before the end on."""
        length = span(self.hp.average, self.hp.steps)
        if step < self.hp.steps - 3 * length:
            return
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"] if group["name"] in AVERAGED else ():
                    state = optimizer.state[p]
                    if "average" not in state:
                        state["average"] = p.clone()
                    state["average"].lerp_(p, min(1 / length, 1))

    @torch.no_grad()
    def blend(self):
        """Move the weights towards their average, with the norm that each matrix has, since an
        average of directions is shorter (PR 360 of modded-nanogpt)."""
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                if "average" in state:
                    before = matrix_norms(p)
                    p.lerp_(state["average"], self.hp.average_share)
                    p.mul_(before / matrix_norms(p))

    @torch.no_grad()
    def evaluate(self, stream: TokenStream, val_tokens: int, step: int, *each) -> float:
        """Mean loss in nats over exactly the first val_tokens tokens at the window of `step`, the
        same on any count of ranks: pieces begin at multiples of val_seq_len, are dealt out, and
        each has its own fp64 sum. each: nothing, or fp32 zeros (pieces, val_seq_len) to fill with
        the loss of each token."""
        self.window.fill_(window_at(step, self.hp))
        model = self.model.eval()  # all that it does: head and MLPs leave FP8
        length = self.hp.val_seq_len
        pieces, rows = math.ceil(val_tokens / length), math.gcd(length, HEAD_ROWS)
        sums = torch.zeros(pieces, dtype=torch.float64, device=self.device)
        for piece in range(self.rank, pieces, self.world_size):
            count = min(length, val_tokens - piece * length)
            pair = F.pad(stream.pair(piece * length, count), (0, length - count), value=-100)
            input_ids, targets = pair.to(self.device)
            input_ids[count:] = EOT
            x = model.features(input_ids, self.window)
            copied = model.pointer(x, input_ids, targets, model.use_flex)
            for start in range(0, length, rows):
                part = slice(start, start + rows)
                losses = model.losses(x[part], copied[part], targets[part])
                sums[piece] += losses.double().sum()
                for kept in each:
                    kept[piece, part] = losses
        if self.world_size > 1:
            for values in (sums, *each):
                dist.all_reduce(values)
        model.train()
        return float(sums.sum() / val_tokens)

    def warm_up(self) -> int:
        """Compile and load the kernels of a step of each shape and of a validation, on made-up
        tokens and off the clock. Then put the weights back, `capture` the steps, and set all
        moments to zero. Returns the bytes that a captured step uses and then gives back, or 0."""
        kept = {name: t.clone() for name, t in self.model.state_dict().items()}
        # the first step of each shape; the last shape, which as a rule is the largest, comes first
        firsts = {shape_at(step, self.hp): step for step in reversed(range(self.hp.steps))}
        validated = self.hp.val_seq_len * self.world_size
        longest = max(validated, *(stage.seq_len for stage, _ in firsts))
        dummy, batches = TokenStream([np.arange(longest + 1) % 251]), {}
        for (stage, _), step in firsts.items():
            pair = dummy.pair(0, stage.seq_len).to(self.device)
            batches[step] = pair.repeat(stage.sequences // self.world_size, 1, 1)
            self.set_schedules(step)
            self.launch(step, batches[step])
        self.evaluate(dummy, validated, 0)
        self.model.load_state_dict(kept)
        scratch = self.capture(batches) if self.cuda and not self.hp.log_norms else 0
        for optimizer in self.optimizers:
            for moment in tree_leaves(optimizer.state):
                moment.zero_()
        gc.collect()
        gc.freeze()  # a collection in the run would stop the host
        return scratch


def build(hp, vocab_size: int, rank: int, world_size: int, device) -> Trainer:
    """Weights come from hp.seed, those of rank 0 for all. Compiled on a GPU."""
    torch.manual_seed(hp.seed)
    with device:  # drawing 600 M random numbers takes seconds on a CPU
        model = place(GPT(hp, vocab_size), device)
    model.use_flex = flex_supported(device)
    fp8, reason = fp8_supported(device) if hp.fp8 else (False, "--fp8=False")
    for layer in model.fp8_layers:
        layer.use_fp8 = fp8
    if world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    trainer = Trainer(hp, model, build_optimizers(model, hp), rank, world_size)
    trainer.fp8_reason = reason
    if trainer.cuda:
        trainer.compile()
    return trainer


STEP_DEADLINE = 120.0  # seconds to wait for a launched step of several ranks


class Outcome:
    """A step's loss, whether a rank wants to stop, and the optimizers' `squares` if any, summed
    over ranks, on their way to the host while the next step runs."""

    def __init__(self, loss: Tensor, stop: bool, world_size: int, optimizers=()):
        squares = [value for o in optimizers for pair in zip(*o.squares) for value in pair]
        values = torch.stack((loss, torch.full_like(loss, float(stop)), *squares))
        self.event, self.world_size = None, world_size
        if world_size > 1:
            dist.all_reduce(values)
        self.values = values.to("cpu", non_blocking=True)
        if loss.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> tuple[float, bool, list[float]]:
        """(loss, stop, [squares of a group's gradient, of its update, ...]). RunEnd 4 where the GPU
        does not answer in time."""
        end = time.monotonic() + STEP_DEADLINE
        while self.event and not self.event.query():
            if self.world_size > 1 and time.monotonic() > end:
                raise RunEnd(
                    4, f"a step took longer than {STEP_DEADLINE:.0f} s: another rank has died or "
                    "hangs"
                )
            time.sleep(1e-4)
        loss, stop, *squares = self.values.tolist()
        return loss, stop > 0, squares


def train(trainer: Trainer, stream: TokenStream, run):
    """The loop: steps, checkpoints and validations up to hp.steps. `run` (section 16) counts the
    finished steps, keeps clock and files, and lists the signals that came. RunEnd 3 on a loss
    that is not finite, 75 after a signal, once everything is saved."""
    hp, pending, world_size = trainer.hp, [], trainer.world_size
    loader = prefetch(stream, hp, trainer.rank, world_size, run.step, pin=trainer.cuda)
    if run.step == 0:
        run.validate()
    for step in range(run.step, hp.steps):
        run.clock.start()
        loss = trainer.train_step(step, next(loader))
        pending.append(Outcome(loss, bool(run.signals), world_size, trainer.optimizers))
        # on a GPU the host launches a step before it reads the loss of the one before
        stop = len(pending) > trainer.cuda and run.report(pending.pop(0))
        done = step + 1
        last = done == hp.steps
        save = hp.checkpoint_every and done % hp.checkpoint_every == 0
        score = hp.val_every and done % hp.val_every == 0
        if not (last or save or score or stop):
            continue
        while pending:
            stop = run.report(pending.pop(0)) or stop
        if save or not last:  # else the clock runs on, over the blending
            run.clock.stop()
        stop = stop and not last
        if save or stop:
            run.checkpoint()
        if stop:
            raise RunEnd(75, f"a signal stopped step {done}, all saved: --resume=latest goes on")
        if score and not last:
            run.validate()
    run.clock.start()
    trainer.blend()
    run.clock.stop()
    run.save_weights()
    run.validate()


# ==== HARNESS: what makes a run safe and pleasant; it decides no step's loss, and no step's time ==

# ---- 12. Command line

PLACES = ("data_dir", "resume", "save")  # say where things lie, never what is computed
# Runs that differ in these alone compute the same numbers: `latest` goes on from one to the other.
ASIDE = (*PLACES, *"val_every checkpoint_every log_norms".split())
PLAIN_BATCH = ["train_seq_len", "sequences_per_step"]  # a run of one stage
# What a checkpoint, and the place in the stream, depend on.
FIXED = PLAIN_BATCH + (
    "batch_stages layer_pattern value_pattern late_layer mixed_layers copy_reach bigram_rows "
    "bigram_dim model_dim num_heads mlp_ratio attn_scale rope_base logit_cap logit_shift logit_temp"
).split()
# Rates, and what 0 switches off; every other number must be above 0.
MAY_BE_ZERO = (
    "cooldown momentum_warmup momentum_cooldown average average_share sampled late_layer "
    "lr_batch logit_shift adam_eps head_lr table_lr scalar_lr skip_lr mix_lr head_decay "
    "table_decay muon_lr muon_decay muon_beta2 muon_momentum muon_momentum_start "
    "val_every checkpoint_every log_norms seed lr_floor"
).split()


class Refused(RunEnd):
    """An end that `require` or a handler found: bad input, a bad loss, no file, no room."""


def require(fine, sentence: str, code: int = 2):
    if not fine:
        raise Refused(code, sentence)


def say(text: str, stream=None):
    """Print. Where nobody listens (a closed pipe, a full disk) all that follows goes nowhere: a
    run does not end for its listener, nor fail at exit with what could not be written."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeError:  # a folder's name, where the terminal is ASCII
        say(ascii(text), stream)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flag(name: str, value) -> str:
    return f"--{name}={value}".replace(", ", ",")


def parse_value(name: str, text: str, default):
    """`text` as a value of the type of `default`; int passes for float. Refused 2 if ill-typed."""
    kind = type(default)
    with contextlib.suppress(ValueError, KeyError, Refused):
        if kind is tuple:
            parts = zip(text.strip("()[], ").split(","), default, strict=True)
            return tuple(parse_value(name, part, each) for part, each in parts)
        value = {"True": True, "False": False}[text] if kind is bool else kind(text)
        if kind is str or abs(value) < 2**31:
            return value
    raise Refused(
        2, f"--{name} takes a value of type {kind.__name__}, such as {flag(name, default)}, and "
        f"not {text!r}"
    )


def parse_overrides(argv: list[str]) -> Hyperparameters:
    """Knobs from `--name=value` arguments, which win over those of `--preset=name`. Refused 2 on
    anything else."""
    known = dict(dataclasses.asdict(Hyperparameters()), preset="80gb")
    given = {}
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        close = "=value --".join(difflib.get_close_matches(name, known, cutoff=0))
        require(
            name in known and equals and argument.startswith("--"),
            f"unknown argument {argument!r}: the nearest legal ones are --{close}=value (--help "
            "lists all)"
        )
        given[name] = parse_value(name, text, known[name])
    preset = given.pop("preset", "80gb")
    require(
        preset in PRESETS,
        f"unknown preset {preset!r}: the legal names are {', '.join(PRESETS)}"
    )
    knobs = PRESETS[preset] | given
    plain = [f"--{name}" for name in PLAIN_BATCH if name in given]
    require(
        not (plain and given.get("batch_stages")),
        f"--batch_stages and {' '.join(plain)} both say what a step holds: give one of them"
    )
    if plain:  # they win over stages
        knobs["batch_stages"] = ""
    return Hyperparameters(**knobs)


def help_text() -> str:
    """Every knob by group with default, unit and meaning, as the lines of the dataclass say them,
    then the presets, signals and restarts."""
    rows = ["python train_gpt.py [--preset=name] [--knob=value ...]"]
    for group, name, note in re.findall(
        r"    (?:# -- (.*)|(\w+): \w+ = .*  # (\[.*))", inspect.getsource(Hyperparameters)
    ):
        default = flag(name, getattr(Hyperparameters, name, ""))
        rows += ["", group] if group else [f"{'  ' + default:44} {note}"]
    rows += ["", "presets (a knob given beside one wins)"]
    for name, knobs in PRESETS.items():
        rows.append(f"  --preset={name:8}" + " ".join(map(flag, knobs, knobs.values())))
    rows.append(
        "\nCtrl-C, SIGTERM and SIGHUP save after the step under way; a second Ctrl-C saves nothing."
        "\nEach start leaves a folder in logs/. torchrun's --max-restarts goes on with "
        "--resume=latest alone."
    )
    return "\n".join(rows)


def check(hp, world_size: int):
    """Refused 2 on the first knob whose value cannot work, with the values that can."""
    for name, value in dataclasses.asdict(hp).items():
        if type(value) in (int, float):
            require(
                value > 0 or value == 0 and name in MAY_BE_ZERO,
                f"--{name}={value} is too small: --help says what it means"
            )
        if type(value) is tuple:
            require(
                0 <= min(value) <= max(value) < 1,
                f"{flag(name, value)} must both lie from 0 to below 1"
            )
    check_batches(hp, world_size)
    require(
        # 64 x 64 values make a whole block of the FP8 exchange
        hp.model_dim % math.lcm(64, 4 * hp.num_heads) == 0,
        f"--model_dim={hp.model_dim} must be a multiple of 64, and --num_heads={hp.num_heads} "
        "times a multiple of 4"
    )
    tables = "".join(sorted(set(hp.value_pattern) - {"."}))
    fine = re.fullmatch("[LS]+", hp.layer_pattern) and "0123456789".startswith(tables)
    require(
        fine and len(hp.layer_pattern) == len(hp.value_pattern),
        "--layer_pattern is made of L and S, and --value_pattern of . and the digits from 0 on "
        "without a gap, one letter a layer in both and as many, not "
        f"{hp.layer_pattern!r} and {hp.value_pattern!r}"
    )
    # `GPT.losses` takes exp(logit - cap), logits are above 0, and fp32's smallest normal number is
    # 2^-126 = exp(-87.3): below it digits are lost
    require(
        hp.logit_cap <= 87,
        f"--logit_cap={hp.logit_cap} is too large for an exact loss in fp32: 87 is the greatest"
    )
    layers = {str(layer) for layer in range(len(hp.layer_pattern))}
    require(
        layers.issuperset([str(hp.late_layer), *hp.mixed_layers.split()]),
        f"--late_layer={hp.late_layer} and --mixed_layers={hp.mixed_layers!r} must be among the "
        f"{len(layers)} layers, from 0 on"
    )
    require(
        hp.bigram_dim <= hp.model_dim,
        f"--bigram_dim={hp.bigram_dim} must not be above --model_dim={hp.model_dim}"
    )
    require(
        hp.window_min <= hp.window_max,
        f"--window_min={hp.window_min} must not be above --window_max={hp.window_max}"
    )
    require(
        hp.grad_comm in ("bf16", "fp8"), f"--grad_comm must be bf16 or fp8, not {hp.grad_comm!r}"
    )


def check_batches(hp, world_size: int):
    """Refused 2 where stages cannot be read, cut into blocks, or dealt to the ranks."""
    batches = hp.batch_stages.split()
    require(
        all(re.fullmatch("[1-9][0-9]{0,5}x[1-9][0-9]{0,7}", batch) for batch in batches),
        f"--batch_stages={hp.batch_stages!r} is not of the form '8x16384 16x16384', each "
        "SEQUENCESxTOKENS of a step"
    )
    count = len(batches) or 1
    require(hp.steps >= count, f"--steps={hp.steps} must not be below the {count} --batch_stages")
    of_length, of_count = ["batch_stages"] * 2 if batches else PLAIN_BATCH
    lengths = {stage.seq_len: of_length for stage in stages(hp)}
    for length, name in (lengths | {hp.val_seq_len: "val_seq_len"}).items():
        require(
            length % BLOCK == 0,
            f"--{name}: {length} tokens are no multiple of {BLOCK}, as a sequence must be"
        )
    shared = math.gcd(*(stage.sequences for stage in stages(hp)))
    require(
        shared % world_size == 0,
        f"--{of_count}={getattr(hp, of_count)} cannot be dealt to {world_size} ranks: legal counts "
        f"of ranks are the divisors of {shared}"
    )


# ---- 13. Data. A shard is 256 int32 (magic, version, count), then uint16 tokens; the scripts in
# data/ are the twins.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


class Corpus(NamedTuple):
    """Both streams, and who they are."""

    encoding: str
    train: TokenStream
    val: TokenStream
    facts: dict  # what the start event says of the data; hashes of shards on rank 0 alone
    notes: list[str]  # what the log warns of
    sources: list[str]  # of the validation documents, if they are told
    source_of: np.ndarray  # (val_tokens,) index of the source of each position scored, or (0,)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map, uint16 (count,). Refused 2 if it cannot be
    read, or if header and size disagree."""
    try:
        size = path.stat().st_size  # 0 of a pipe, which would be waited for
        head = np.fromfile(path, "<i4", 3) if size else np.zeros(3, "<i4")
    except (OSError, ValueError) as error:
        raise Refused(
            2, f"{path} is a shard by its name or by manifest.json, and cannot be read "
            f"({error!r}): get it again, or make the data anew"
        ) from None
    require(
        head.tobytes() != b"version http",
        f"{path} is a pointer of Git LFS and not the data: `git lfs pull` gets that"
    )
    magic, version, count = [*head.tolist(), 0, 0, 0][:3]
    require(
        (magic, version, size) == (MAGIC, VERSION, HEADER_BYTES + 2 * count) and count > 0,
        f"{path} is not a token shard, or was cut short or damaged: its {size} bytes, which begin "
        f"with {magic} {version} {count}, should begin with {MAGIC} {VERSION} and the count of "
        f"tokens, and be {HEADER_BYTES} and two for each; get it again"
    )
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))


def scan_shard(path: Path, tokens, encoding: str, known: dict) -> str:
    """SHA-256 of the token bytes, hex. Refused 2 if `known`, where it is kept with its path, has
    another for it, or another path with it, or if a token is not of the encoding: a GPU would only
    say assert."""
    bad = tokens > EOT if encoding == "gpt2" else (tokens > 255) & (tokens != EOT)
    require(
        not bad.any(),
        f"{path} holds token {tokens[bad.argmax()]} at {bad.argmax()}, which {encoding} does not "
        "have: make the shard again, or check its manifest.json"
    )
    found = hashlib.sha256(tokens).hexdigest()
    expected = str(known.get(path) or found).lower()
    require(
        found == expected,
        f"{path} has SHA-256 {found:.12} and its manifest says {expected:.12}: it was changed or "
        "damaged; get it again"
    )
    require(
        known.setdefault(found, path) == path,
        f"{path} holds the same tokens as {known[found]}: leave one of them out"
    )
    return found


def read_manifest(folder: Path):
    """(encoding, {shard: SHA-256 of its token bytes, if told}, [training shards, validation
    shards], [a warning of each in neither]). The manifest tells the split, or else the name does;
    without one, GPT-2 tokens. Refused 2 where the manifest cannot be used, or a shard is in both
    splits."""
    path, manifest, known = folder / "manifest.json", dict(encoding="gpt2"), {}
    try:
        words = {shard: shard.name for shard in folder.glob("*.bin")}
        if os.path.lexists(path):  # a link that leads nowhere is no absence
            manifest = json.loads(path.read_text(encoding="utf-8"))
        encoding, files = manifest["encoding"], manifest.get("files", [])
        require(encoding in VOCAB, f"encoding {encoding!r} is none of {', '.join(VOCAB)}")
        for file in files:
            shard = folder / file["name"]
            require(shard not in known, f"it lists {shard.name} twice")
            known[shard], words[shard] = file.get("sha256"), file.get("split", shard.name)
        train, val = (
            [shard for shard in sorted(words) if split in re.split("[^a-z]+", words[shard].lower())]
            for split in ("train", "val")
        )
    except Exception as error:
        raise Refused(2, f"{path} cannot be used ({error!r}): make it or get it again") from None
    for shard in set(train).intersection(val):
        raise Refused(2, f"{shard} says both train and val: rename it, or let manifest.json decide")
    notes = [
        f"{shard.name} is left out: it says neither train nor val" for shard in sorted(words)
        if shard not in train + val
    ]
    return encoding, known, [train, val], notes


def read_sources(folder: Path, scored: np.ndarray):
    """(names, (n,) index of the source of each token scored) by val_docs.json, or empty ones. The
    source is that of the document of its input; scored: (n + 1,) tokens. Refused 2 where the file
    cannot be used."""
    path = folder / "val_docs.json"
    if not os.path.lexists(path):
        return [], scored[:0]
    docs = np.cumsum(scored[:-1] == EOT) - (scored[0] == EOT)
    with contextlib.suppress(Exception):
        told = json.loads(path.read_text(encoding="utf-8"))
        names, found = told["sources"], np.array(told["doc_source"])[docs]
        if len(np.bincount(found)) <= len(set(names)):  # bincount takes whole numbers from 0 on
            return names, found
    raise Refused(
        2, f'{path} cannot be used: it must hold {{"sources": [names], "doc_source": [an index of '
        f"sources for each of at least {docs[-1] + 1} documents]}}"
    )


def by_source(names: list[str], source_of: np.ndarray, losses: Tensor) -> dict:
    """{name: mean loss} of `read_sources`, summed in fp64, without what has no token that is
    scored. losses: of each token, in order, and of padding after the last."""
    counts = np.bincount(source_of)
    sums = np.bincount(source_of, losses.flatten()[: len(source_of)].cpu())
    return {name: total / n for name, total, n in zip(names, sums, counts) if n}


def count_passes(hp, total: int) -> int:
    """Passes over a training stream of `total` tokens. Refused 2 if the knobs allow fewer."""
    longest = max(stage.seq_len for stage in stages(hp))
    require(
        longest < total,
        f"the training data has {total} tokens, too few for a sequence of {longest}: shorter ones "
        "are needed, by --train_seq_len or --batch_stages"
    )
    reads = tokens_before(hp.steps, hp)
    for step, (_, passes) in enumerate(sequences(hp, total)):
        require(
            passes <= hp.epochs,
            f"--steps={hp.steps} reads {reads} tokens, and the data has {total}, enough for {step} "
            f"of these steps: take --epochs={math.ceil(reads / (total - longest))}, or fewer "
            "--steps"
        )
    return passes


def load_corpus(hp, thorough: bool) -> Corpus:
    """Open and check every shard of `hp.data_dir`; `thorough` (rank 0) also reads, hashes and
    compares all tokens."""
    folder = Path(hp.data_dir)
    encoding, known, found, left_out = read_manifest(folder)
    require(
        all(found),
        f"--data_dir={hp.data_dir} is not a folder with *train*.bin and *val*.bin, whole words: "
        "data/fineweb.py downloads FineWeb, and data/tokenize_text.py turns any text into shards"
    )
    opened = [{path: open_shard(path) for path in paths} for paths in found]
    train, val = (TokenStream([*shards.values()]) for shards in opened)
    require(
        val.total > hp.val_tokens,
        f"--val_tokens={hp.val_tokens} is more than the validation stream can score: "
        f"--val_tokens={val.total - 1} is the most"
    )
    passes = count_passes(hp, train.total)
    notes = [f"the training stream is begun {passes} times"] * (passes > 1) + left_out
    shards = opened[0] | opened[1] if thorough else {}
    with ThreadPoolExecutor(4) as pool:  # hashing and scanning both leave the interpreter's lock
        scan = lambda shard: scan_shard(*shard, encoding, known)
        digests = dict(zip(shards, pool.map(scan, shards.items())))
    scored = val.read(0, hp.val_tokens + 1).astype("<u2")
    facts = dict(
        encoding=encoding, val_sha256=hashlib.sha256(scored).hexdigest(),
        val_tokens=hp.val_tokens, train=[
            dict(name=path.name, tokens=len(tokens), sha256=digests.get(path))
            for path, tokens in opened[0].items()
        ]
    )
    return Corpus(encoding, train, val, facts, notes, *read_sources(folder, scored))


# ---- 14. Run folder: log.txt for people, metrics.jsonl as evidence, the script; and the clock

# The line of an event for people; an event without one has none.
LINES = {
    "start": "train_gpt log 2\nrun_id: {run_id}\nscript_sha256: {script_sha256}\nstarted: {utc}\n"
    "changed: {changed}\nseed: {seed}\npython: {python}\ntorch: {torch}\ncuda: {cuda}\n"
    "driver: {driver}\ngpu: {gpu}\nworld_size: {world_size}\nfp8: {fp8[on]} {fp8[reason]}\n"
    "attention: {attention}\ndata: {data[encoding]}, {data[val_tokens]} validation tokens "
    "{data[val_sha256]:.12}, {corpus.train.total} training tokens",
    "step": "step:{step}/{total} train_loss:{train_loss:.4f} train_time:{train_ms:.0f}ms "
    "step_avg:{step_avg:.2f}ms",
    "val": "step:{step}/{total} val_loss:{val_loss:.6f} train_time:{train_ms:.0f}ms "
    "step_avg:{step_avg:.2f}ms",
    "warning": "warning: {text}",
    "resume": "resumed from {from_run_id} at step {step}",
    "end": "val_loss: {val_loss}\ntrain_time_ms: {train_ms:.0f}\nsteps: {steps}\n"
    "tokens: {tokens}\ntokens_per_s: {tokens_per_s}\n"
    "peak_train_mib: {peak_train_mib}\npeak_val_mib: {peak_val_mib}\n"
    "reserved_mib: {reserved_mib}\nexit: {code} {reason}",
}


@contextlib.contextmanager
def no_space(what: str):
    """Turn a failed write into Refused 6."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk behind a RuntimeError
        reason = getattr(error, "strerror", None) or repr(error.__context__ or error)
        raise Refused(
            6, f"{what} cannot be written ({reason}): make room in logs/, a folder that you may "
            "write to, or write less with --save=False --checkpoint_every=0"
        ) from error


class RunLog:
    """Rank 0's standard output and run folder. Other ranks stay silent."""

    def __init__(self, rank: int, source: bytes):
        now = datetime.datetime.now(datetime.timezone.utc)
        # ids sort as runs began: five digits for microseconds, and one of chance
        self.utc = f"{now:%Y-%m-%dT%H:%M:%SZ}"
        self.run_id = f"{now:%Y%m%d-%H%M%S}-{now.microsecond:05x}{os.urandom(1).hex()[0]}"
        self.rank, self.folder = rank, Path("logs") / self.run_id
        if rank == 0:
            with no_space("the run folder"):
                self.folder.mkdir(parents=True)
                (self.folder / "train_gpt.py").write_bytes(source)

    def emit(self, event: str, facts: dict, file=True, **shown):
        """An event: a row of facts for metrics.jsonl, and its line, if any, for log.txt and the
        screen, which may show more than the facts."""
        shown = {k: "n/a" if v is None else v for k, v in (facts | shown).items()}
        line = LINES.get(event, "").format(**shown)
        if line:
            self.say(line)
        if self.rank or not file:
            return
        finite = lambda v: str(v) if isinstance(v, float) and not math.isfinite(v) else v
        row = dict(event=event, **tree_map(finite, facts))
        with no_space("the run folder"):
            for name, text in (("metrics.jsonl", json.dumps(row)), ("log.txt", line)):
                with open(self.folder / name, "ab") as part:
                    part.write((text and text + "\n").encode("ascii", "replace"))

    def say(self, text: str):
        """On the screen alone."""
        if self.rank == 0:
            say(text)


class Clock:
    """Training time in ms and wall time in s, from one reading of one clock; training time does
    not advance while stopped."""

    scratch = 0  # bytes that CUDA graphs use, which torch does not count while they do

    def __init__(self, log: RunLog, cuda: bool):
        self.log, self.cuda, self.began = log, cuda, time.perf_counter()
        self.train_ms, self.since, self.peak = 0.0, None, 0

    def read(self) -> dict:
        now = time.perf_counter() - self.began
        running = (now - (self.since or now)) * 1e3
        return dict(train_ms=self.train_ms + running, wall_s=now)

    def start(self):
        if self.since is None:
            self.since = self.switch("start")["wall_s"]

    def stop(self):
        """It also keeps the peak of allocated memory."""
        if self.since is not None:
            self.train_ms = self.switch("stop")["train_ms"]
            self.since = None

    def switch(self, mark: str) -> dict:
        if self.cuda:
            torch.cuda.synchronize()
            if mark == "stop":
                self.peak = max(self.peak, torch.cuda.max_memory_allocated() + self.scratch)
            torch.cuda.reset_peak_memory_stats()
        reading = self.read()
        self.log.emit("clock", dict(mark=mark, **reading))
        return reading


# ---- 15. Checkpoints


@contextlib.contextmanager
def unusable(what):
    """Turn what is wrong with a checkpoint into Refused 5; a lost rank or want of memory is not."""
    try:
        yield
    except Exception as error:
        if verdict(error)[0] in (4, 6):
            raise
        raise Refused(
            5, f"{what} is not usable ({error!r:.100}): name another file, or leave out --resume"
        ) from error


def load_file(path: Path) -> dict:
    """A checkpoint, of plain tensors, on the CPU. Refused 5 if it is missing, damaged or another
    file."""
    with unusable(path):
        require(path.is_file(), "it is no file")
        with zipfile.ZipFile(path) as archive:  # torch.load accepts flipped bits; it has checksums
            require(not archive.testzip(), "a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        require("optimizers" in saved, "it holds no run of this script's kind")
        require(
            all(v.isfinite().all() for v in tree_leaves(saved) if isinstance(v, Tensor)),
            "it holds numbers that are not finite"
        )
        return saved


def identity(facts: dict) -> dict:
    """What runs must share for one to go on from another: {knob, script or data: value}. facts: of
    a start event or a checkpoint."""
    data = facts["data"]
    shards = "".join(str(file["sha256"]) for file in data["train"])
    own = {k: v for k, v in facts["knobs"].items() if k not in ASIDE} | {
        "the script": facts["script_sha256"][:12],
        "validation data": data["val_sha256"][:12],
        "training data": hashlib.sha256(shards.encode()).hexdigest()[:12]
    }
    return json.loads(json.dumps(own))  # a log has lists for tuples


def changes(then: dict, now: dict) -> dict:
    """{name: "muon_lr 0.05 -> 0.5"} of what two runs, by their facts, do not share; but not of
    knobs that `then` did not have."""
    then, now = identity(then), identity(now)
    return {k: f"{k} {then[k]} -> {v}" for k, v in now.items() if then.get(k, v) != v}


def find_latest(now: dict, notes: list[str]) -> list:
    """[None, the newest usable checkpoint of runs with the identity of the facts `now`]; unusable
    ones join the notes. Without one [exit code, why]: 0 if the newest of the runs is complete."""
    advice = ""
    for folder in sorted(Path("logs").glob("*"), reverse=True):  # named by date, files by step
        try:
            lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
            other = changes(json.loads(lines[0]), now)
        except Exception:
            other = dict(file="a metrics.jsonl that cannot be read")
        if not other and '"status": "complete"' in lines[-1]:
            return [
                0, f"already complete: {folder.name} is this very run; another one needs another "
                "--seed or no --resume"
            ]
        for path in sorted(folder.glob("checkpoints/step_*.pt"), reverse=True):
            try:
                if not other:
                    load_file(path)
                    return [None, str(path)]
                advice = advice or (
                    f"; the newest other differs in {', '.join(other.values())}: repeat its knobs, "
                    f"or go on from it by --resume={path.as_posix()}"
                )
            except Refused:
                notes.append(
                    f"{folder.name}/{path.name} is not usable; the next older one is tried"
                )
    return [
        5, "--resume=latest finds no usable checkpoint"
        f"{advice or ': name a file, or leave it out'}"
    ]


def public_knobs(hp) -> dict:
    """All knobs, with place knobs as base names: a log names no path."""
    places = dict(data_dir=Path(hp.data_dir).name, resume=Path(hp.resume).name)
    return dataclasses.asdict(hp) | places


# ---- 16. The run

START_TIMEOUT = 600  # seconds a collective may take: ranks compile and read at different speeds
# The same once all are there. Longer than STEP_DEADLINE, whose end is the better told.
RANK_TIMEOUT = 130
PACKAGES = "torch numpy tiktoken huggingface_hub triton".split()


def init_distributed():
    """(rank, world size, device) from torchrun's environment; without it one rank, no group."""
    places = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    values = [os.environ.get(*place) for place in places.items()]
    fine = all(map(str.isdecimal, values))
    rank, local, world_size = map(int, values) if fine else (0, 0, 0)
    require(
        rank < world_size,
        f"{', '.join(places)} are {', '.join(values)}, which cannot be: unset them, or start by "
        "torchrun"
    )
    device, backend = torch.device("cpu"), dict(backend="gloo")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        require(local < gpus, f"rank {rank} has no GPU: start at most {gpus} ranks on this machine")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = dict(backend="nccl", device_id=device)
    warnings.filterwarnings(  # 2.13 warns; the new names came with it
        "ignore", ".*(reduce_scatter_tensor|all_gather_into_tensor)", FutureWarning
    )
    if world_size > 1:
        dist.init_process_group(timeout=datetime.timedelta(seconds=START_TIMEOUT), **backend)
    return rank, world_size, device


def catch_signals(stack: contextlib.ExitStack):
    """SIGTERM, SIGINT and SIGHUP ask for an end after the step: the time of each one's first joins
    the dict. A second SIGINT aborts, unless it comes within a second: then it is the launcher's
    echo of the first. The stack's end brings back the handlers of before."""
    caught = {}

    def handler(number, frame):
        if not caught:
            say("stopping after this step, and saving; a second Ctrl-C: at once", sys.stderr)
        first = caught.setdefault(number, time.monotonic())
        if number == signal.SIGINT and time.monotonic() - first > 1:
            os._exit(130)

    for name in {"SIGTERM", "SIGINT", "SIGHUP"}.intersection(dir(signal)):  # Windows lacks one
        number = getattr(signal, name)
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
            with contextlib.suppress(ValueError):  # not the main thread
                before = signal.signal(number, handler) or signal.SIG_DFL
                stack.callback(signal.signal, number, before)
    return caught


def nvidia_driver():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(Exception):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0]


def machine(device, world_size: int) -> dict:
    """What the start event says of hardware and software."""
    cuda, packages = device.type == "cuda", {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    gpu = torch.cuda.get_device_properties(device) if cuda else None
    return dict(
        gpu=gpu and gpu.name, gpu_count=world_size * cuda,
        gpu_memory_mib=gpu and gpu.total_memory >> 20, driver=nvidia_driver() if cuda else None,
        torch=torch.__version__, cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version()))
        if cuda and dist.is_nccl_available() else None,
        triton=packages.pop("triton", None), python=platform.python_version(), packages=packages
    )


class Run:
    """One training run: what the loop calls `run`. `step` counts the finished steps; with the clock
    it is the loop's whole state, as all else follows from it."""

    def __init__(
        self, hp, rank: int, world_size: int, device, argv, source: bytes, notes=()
    ):
        self.hp, self.rank, self.world_size = hp, rank, world_size
        self.step, self.val_loss, self.peak_val = 0, None, 0
        corpus, knobs = load_corpus(hp, thorough=rank == 0), public_knobs(hp)
        self.notes, self.handlers = [*notes, *corpus.notes], contextlib.ExitStack()
        self.corpus, self.facts = corpus, dict(
            script_sha256=hashlib.sha256(source).hexdigest(), knobs=knobs, data=corpus.facts
        )
        self.saved = self.find_saved() if hp.resume else None
        self.trainer = build(hp, VOCAB[corpus.encoding], rank, world_size, device)
        self.log = RunLog(rank, source)
        self.clock = Clock(self.log, self.trainer.cuda)
        # the start event: all that the result may depend on, and no place or name
        changed = {
            k: v for k, v in knobs.items()
            if k not in PLACES and v != getattr(Hyperparameters, k)
        }
        shown = [re.sub(r"(?s)=.*[/\\](?=.)", "=", argument) for argument in argv]  # no folders
        model = self.trainer.model
        # a checkpoint holds moments too, and averages for each rank; two are kept beside a third
        times = 9 + world_size if hp.checkpoint_every else hp.save
        most = times * sum(t.nbytes for t in model.state_dict().values())
        if rank == 0 and shutil.disk_usage(self.log.folder).free < most:
            self.notes.append(
                f"up to {most / 1e9:.1f} GB go to logs/, and fewer are free: make room, or take "
                "--checkpoint_every=0 or --save=False"
            )
        facts = dict(
            format=2, run_id=self.log.run_id, utc=self.log.utc, argv=shown, changed=changed,
            seed=hp.seed, device=device.type, **machine(device, world_size), world_size=world_size,
            fp8=dict(on=model.lm_head.use_fp8, reason=self.trainer.fp8_reason),
            attention="flex" if model.use_flex else "sdpa",
            stages=[stage._asdict() for stage in stages(hp)], **self.facts
        )
        self.log.emit("start", facts, corpus=corpus)

    def find_saved(self) -> dict:
        """The checkpoint to go on from; a note says what changed since. Rank 0 finds `latest`, and
        all do or end as it does. Refused 2 where the file does not fit knobs or ranks."""
        hp, answer = self.hp, [None, self.hp.resume]
        if self.rank == 0 and hp.resume == "latest":
            answer = find_latest(self.facts, self.notes)
        if self.world_size > 1:
            dist.broadcast_object_list(answer, 0)
        code, path = answer
        require(code is None, path, code)
        saved = load_file(Path(path))
        with unusable(path):
            other = changes(saved, self.facts)
            step, ranks = saved["step"], len(saved["optimizers"])
            # past the end, or in another stage
            moved = step > hp.steps or saved["tokens"] != tokens_before(step, hp)
            fixed = [
                flag(k, saved["knobs"][k]) for k in FIXED + ["steps"] * moved if k in other
            ]
            fixed += [f"{saved['tokens']} tokens read by step {step}"] * moved
        fixed += [f"{ranks} ranks"] * (ranks != self.world_size)
        require(
            not fixed, f"{path} was written with {' '.join(fixed)}: give the same to resume it"
        )
        if other:
            self.notes.append(f"changed since the checkpoint: {', '.join(other.values())}")
        return saved

    def restore(self, saved: dict):
        """Go on where a checkpoint was written."""
        with unusable(f"--resume={self.hp.resume} holds weights of another script or encoding: it"):
            for optimizer, state in zip(
                self.trainer.optimizers, saved["optimizers"][self.rank], strict=True
            ):
                optimizer.step()  # of no gradient: it makes the moments that the file must have
                groups, made = optimizer.param_groups, optimizer.state
                optimizer.load_state_dict(state)
                optimizer.param_groups = groups  # rates are the knobs', not the file's
                for p in made | optimizer.state:
                    found, values = optimizer.state[p], made[p]
                    if "average" in found:  # only runs near their end have it
                        values["average"] = torch.empty_like(p)
                    for key, value in values.items():
                        found[key] = value.copy_(found[key].view_as(value))
            self.trainer.model.load_state_dict(saved["model"])
            self.step, self.clock.train_ms = int(saved["step"]), float(saved["train_ms"])
            self.log.emit("resume", dict(step=self.step, from_run_id=saved["run_id"]))

    @property
    def tokens(self) -> int:
        return tokens_before(self.step, self.hp)

    def validate(self):
        """Score the validation tokens at this step's window, with the clock stopped. Refused 3 if
        the loss is not finite."""
        hp, corpus = self.hp, self.corpus
        self.log.say(f"validating on {hp.val_tokens} tokens")
        shape = math.ceil(hp.val_tokens / hp.val_seq_len), hp.val_seq_len
        each = [torch.zeros(shape, device=self.trainer.device)] if corpus.sources else []
        self.val_loss = self.trainer.evaluate(corpus.val, hp.val_tokens, self.step, *each)
        self.peak_val = max(self.peak_val, torch.cuda.max_memory_allocated())  # 0 on a CPU
        now, step = self.clock.read(), self.step
        facts = dict(
            step=step, tokens=self.tokens, val_loss=self.val_loss, val_tokens=hp.val_tokens, **now
        )
        for losses in each:
            facts["sources"] = by_source(corpus.sources, corpus.source_of, losses)
        self.log.emit(
            "val", facts, total=hp.steps, step_avg=now["train_ms"] / (step or math.nan)
        )
        require(
            math.isfinite(self.val_loss),
            f"the validation loss is {self.val_loss} at step {step}: lower the learning rates",
            3
        )

    def report(self, outcome: Outcome) -> bool:
        """Await a step's loss and write its line. True if a rank wants to stop; RunEnd 3 if the
        loss is not finite."""
        loss, stop, squares = outcome.wait()
        with contextlib.suppress(Exception):  # private to torch, or no group
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=RANK_TIMEOUT))
        hp, now = self.hp, self.clock.read()
        at, stage, ms = self.step, stage_at(self.step, hp), now["train_ms"]
        step = self.step = at + 1
        facts = dict(
            step=step, tokens=self.tokens, train_loss=loss, lr=lr_at(at, hp),
            momentum=momentum_at(at, hp), window=window_at(at, hp), sequences=stage.sequences,
            seq_len=stage.seq_len, **now
        )
        if squares:
            norms, left = {}, iter(squares)
            for group in sum((o.param_groups for o in self.trainer.optimizers), []):
                # the gradient is not divided by the step's sequences yet
                norms[f"{group['name']}.grad"] = math.sqrt(next(left)) / stage.sequences
                norms[f"{group['name']}.update"] = math.sqrt(next(left))
            facts["norms"] = norms
        kept = squares or step in (1, hp.steps) or not step % math.ceil(hp.steps / 48)
        self.log.emit("step", facts, kept, total=hp.steps, step_avg=ms / step)
        if step == 10 < hp.steps:
            self.log.say(
                f"about {ms / 6e5 * hp.steps:.1f} minutes of training for {hp.steps} steps, and "
                f"validations: {1 + (hp.steps - 1) // (hp.val_every or hp.steps)}; --steps=N: fewer"
            )
        require(
            math.isfinite(loss),
            f"the training loss is {loss} at step {step}: lower the learning rates, or, of data "
            "with more kinds of token in a sequence than text has, take --sampled=0",
            3
        )
        return stop

    def require_finite(self):
        """Refused 3 on all ranks if a weight of a rank or a state in its share is not finite. A
        moment has the name of the first parameter in its bucket."""
        names = {p: name for name, p in self.trainer.model.named_parameters()}
        tensors = self.trainer.model.state_dict() | {
            f"{type(optimizer).__name__}'s {key} of {names[p]}": tensor
            for optimizer in self.trainer.optimizers
            for p, state in optimizer.state.items() for key, tensor in state.items()
        }
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        found = [bad] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, bad)
        for name in sum(found, []):
            raise Refused(
                3, f"{name} is not finite after step {self.step}: no file is written; lower the "
                "learning rates"
            )

    def save(self, *args, **more):
        """`save_file`, in a thread of rank 0, which tells the others meanwhile that it lives: a
        slow disk is no dead rank. Call it on all ranks."""
        with ThreadPoolExecutor(1) as pool:
            writing = None if self.rank else pool.submit(self.save_file, *args, **more)
            busy = [self.world_size > 1]
            while busy[0]:
                busy = [writing and not writing.done()]
                dist.broadcast_object_list(busy, 0)
                time.sleep(0.02)
            return writing and writing.result()

    def save_file(self, name: str, **more) -> Path:
        """Write weights, knobs and `more` to a file of the run folder: beside it, flushed to the
        disk, then renamed."""
        path = self.log.folder / name
        part = path.with_name(path.name + ".part")
        more |= dict(self.facts, encoding=self.corpus.encoding)
        try:
            with no_space(path.name):
                path.parent.mkdir(exist_ok=True)
                with open(part, "wb") as file:
                    torch.save(dict(model=self.trainer.model.state_dict(), **more), file)
                    file.flush()
                    os.fsync(file.fileno())
                return part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def checkpoint(self):
        """Write checkpoints/step_<n>.pt and keep the newest two. Call it on all ranks, with the
        clock stopped."""
        began = time.perf_counter()
        self.require_finite()
        own = [optimizer.state_dict() for optimizer in self.trainer.optimizers]
        states = [own] * self.world_size
        if self.world_size > 1:  # to the host: else rank 0 opens every GPU
            own = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, own)
            dist.gather_object(own, None if self.rank else states)
        path = self.save(
            f"checkpoints/step_{self.step:06d}.pt", optimizers=states, step=self.step,
            tokens=self.tokens, train_ms=self.clock.train_ms, run_id=self.log.run_id
        )
        if self.rank:
            return
        ms = (time.perf_counter() - began) * 1e3
        self.log.emit(
            "checkpoint", dict(step=self.step, bytes=path.stat().st_size, ms=ms)
        )
        for old in sorted(path.parent.glob("step_*.pt"))[:-2]:
            old.unlink()

    def save_weights(self):
        self.require_finite()
        if self.hp.save:
            self.save("weights.pt", vocab_size=VOCAB[self.corpus.encoding])

    def train(self):
        """Warm up, go on from a checkpoint, if there is one, and run the loop, with signals caught
        from there until `close`."""
        if self.trainer.cuda:
            self.log.say("compiling: minutes at the first start, less than two later")
            self.clock.scratch = self.trainer.warm_up()
            torch.cuda.reset_peak_memory_stats()  # else the first validation reports this peak
        else:
            self.log.say(
                f"training on {tokens_before(self.hp.steps, self.hp):,} tokens by the CPU: minutes "
                "with --preset=cpu, days and more with the full recipe"
            )
        if self.saved:
            self.restore(self.saved)
            del self.saved
        for text in self.notes:
            self.log.emit("warning", dict(text=text, step=self.step))
        self.signals = catch_signals(self.handlers)
        train(self.trainer, self.corpus.train, self)
        for shard in self.corpus.train.shards + self.corpus.val.shards:
            require(  # what is missing in the last page reads as 0
                shard.base.size() >= HEADER_BYTES + shard.nbytes,
                f"{Path(shard.filename).name} was cut short while the run read it: all is saved, "
                "and not to be trusted; get the data again, and train anew"
            )

    def close(self, code: int, reason: str):
        """The end event, however the run ended."""
        if code != 4:  # where a GPU may never answer
            with contextlib.suppress(Exception):
                self.clock.stop()
        now, mib = self.clock.read(), lambda count: count >> 20 or None
        ms = now["train_ms"]
        facts = dict(
            status={0: "complete", 75: "stopped"}.get(code, "failed"), code=code, reason=reason,
            steps=self.step, tokens=self.tokens, val_loss=None if code else self.val_loss, **now,
            tokens_per_s=round(self.tokens / ms * 1e3) if ms else None,
            peak_train_mib=mib(self.clock.peak), peak_val_mib=mib(self.peak_val),
            reserved_mib=mib(torch.cuda.max_memory_reserved())
        )
        with self.handlers:
            self.log.emit("end", facts)
            weights = f"--weights={self.log.folder}/weights.pt --data_dir={self.hp.data_dir!a}"
            self.log.say(
                f"kept in {self.log.folder}; once complete:\n  ./run.sh plot {self.log.folder} "
                f"--out curve.png\n  ./run.sh compare {self.log.folder} ANOTHER"
                + f"\n  ./run.sh sample {weights}" * self.hp.save
            )


# ---- 17. main


def verdict(error: BaseException):
    """(exit code, one sentence) of whatever ended a run; code 1 is a fault of the script."""
    text = f"{error!r} {error.__cause__!r}"  # a loader's end has its thread's for a cause
    short = re.search("MemoryError|allocate memory|not enough memory|bad_alloc", text)
    if short and not isinstance(error, Refused):  # whose words may be the user's
        return 6, (
            "out of memory: shorter --batch_stages, --train_seq_len or --val_seq_len need less"
        )
    if isinstance(error, RunEnd):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped before training began: nothing to save"
    if re.match(  # but what a CUDA graph cannot capture
        "(?!.*captur)(Dist.*Error|.*(gloo|NCCL|rendezvous|pair closure|by peer|Timed out waiting))",
        text
    ):
        return 4, (
            "a collective failed: another rank died, hung or never came, as its own message says, "
            "or RANK, MASTER_ADDR or MASTER_PORT is missing, wrong or in use; where a checkpoint "
            "was written, --resume=latest goes on"
        )
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == __file__:
            number = frame.lineno
    return 1, f"the script failed in line {number}: {error!r:.200}"


def end(error: BaseException, run):
    """Close the run, say why, with the number of the rank if there are several, and exit with the
    code."""
    code, reason = verdict(error)
    if run:
        with contextlib.suppress(Refused):  # a full disk may refuse this too
            run.close(code, reason)
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    say(f"train_gpt: {rank}{reason}", sys.stderr)
    with contextlib.suppress(Exception):  # what torchrun shows at its end, where it is the launcher
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
            f'{{"message": {{"message": {json.dumps(reason)}, '
            f'"extraInfo": {{"timestamp": {time.time()}}}}}}}'
        )
    if code == 1:
        raise error
    if code == 4 or dist.is_initialized():
        os._exit(code)  # an ordinary exit would wait for a rank that is gone, or gloo abort it
    sys.exit(code)


def train_once(argv: list[str], source: bytes, notes=()) -> Run:
    """Parse, check, train; again and again in a process of one rank, if it calls gc.unfreeze() in
    between. source: bytes of this script; notes: warnings for the log. Returns a complete run; any
    other end is a SystemExit with the code that `RunEnd` lists, 130 where a signal came before
    training, or a fault's own exception."""
    run = None
    try:
        hp = parse_overrides(argv)
        place = init_distributed()
        check(hp, place[1])
        run = Run(hp, *place, argv, source, notes)
        run.train()
        run.close(0, "complete")
        return run
    except BaseException as error:
        end(error, run)


def main(argv: list[str] | None = None):
    """Train once; `argv` is for other code that calls this. Warnings tell of code that may have run
    and is not in the script that the run folder keeps."""
    script, notes = Path(__file__), []
    source = script.read_bytes()
    if __name__ == "__main__":
        import faulthandler  # a shard cut short under its memory map would end all in silence

        faulthandler.enable(2)
        argv = sys.argv[1:]
    else:
        if argv is None:
            sentence = (
                "another script calls main(), and the run folder would keep this one: cp "
                "train_gpt.py my.py, edit the copy, and run that"
            )
            end(Refused(2, sentence), None)
        notes.append("other code called this script: what ran may not be the script kept here")
    if "--help" in argv or "-h" in argv:
        return say(help_text())
    files = {Path(getattr(m, "__file__", None) or "") for m in [*sys.modules.values()]}
    for file in sorted(files - {script}):
        if file.parent == script.parent:
            notes.append(
                f"{file.name} lies beside the script and was imported: it is not kept here"
            )
    train_once(argv, source, notes)
    if dist.is_initialized():
        os._exit(0)  # gloo's threads may abort an ordinary exit


if __name__ == "__main__":
    main()
