"""Slow, obvious versions of what train_gpt.py does fast, and of what records/ leaves to scipy. Tests compare the two.
"""

import math
import statistics

import torch
from torch import Tensor

EOT = 50256


def visible(input_ids: Tensor, window: int, block: int = 128) -> Tensor:
    """(T, T) bool: the definition of the attention mask, written out."""
    docs = (input_ids == EOT).cumsum(0)
    q, k = torch.arange(len(docs))[:, None], torch.arange(len(docs))[None]
    docs = docs.cpu()
    return (k <= q) & (docs[:, None] == docs[None]) & (q // block - k // block < window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of (1, H, T, K) with q already scaled, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = (q @ k.mT).masked_fill(~mask.to(q.device), float("-inf"))
    return scores.softmax(-1) @ v


def random_documents(length: int, generator: torch.Generator) -> Tensor:
    """Tokens with document starts at random places: few or many, sometimes in a row, sometimes on block edges."""
    ids = torch.randint(0, 256, (length,), generator=generator)
    rate = 10 ** (-4 * torch.rand((), generator=generator).item())  # from every token to almost none
    ids[torch.rand(length, generator=generator) < rate] = EOT
    if torch.rand((), generator=generator) < 0.3:
        ids[:: 128 * int(torch.randint(1, 4, (), generator=generator))] = EOT
    return ids


def relative_error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def t_below(t, df, pieces=2000):
    """P(T < t) of Student's distribution, by Simpson's rule."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    ys = [scale * (1 + (t * i / pieces) ** 2 / df) ** (-(df + 1) / 2) for i in range(pieces + 1)]
    return 0.5 + t / pieces / 3 * (ys[0] + ys[-1] + 4 * sum(ys[1:-1:2]) + 2 * sum(ys[2:-1:2]))


def t_quantile(p, df):
    low, high = 0.0, 1000.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, df) < p else (low, middle)
    return low


def slow_welch(a, b):
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    df = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b)))
    gap, error = statistics.fmean(b) - statistics.fmean(a), math.sqrt(sum(parts))
    half = t_quantile(0.975, df) * error
    return gap, gap - half, gap + half, 2 * (1 - t_below(abs(gap) / error, df))
