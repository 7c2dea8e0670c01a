"""Slow, obvious versions of what train_gpt.py does fast. Tests compare the two."""

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
