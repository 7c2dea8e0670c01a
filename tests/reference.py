"""Slow, obvious versions of what train_gpt.py does fast, and of what records/ leaves to scipy. Tests compare the two.
"""

import math
import statistics

import torch
from torch import Tensor

EOT = 50256


# Final losses of a record of the public speedrun.
PUBLISHED = [3.2791, 3.2773, 3.2783, 3.2775, 3.2781, 3.2775, 3.2793, 3.2772, 3.2769, 3.2775, 3.2806, 3.2779, 3.2816]


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


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()  # the eps of float32


def rotated(x: Tensor, base: float) -> Tensor:
    """(T, K) channels, in pairs (i, i + K / 2): a complex rotation of half of the pairs, in float64."""
    length, width = x.shape
    frequencies = [base ** (-i / (width // 4 - 1)) for i in range(width // 4)] + [0.0] * (width // 4)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat((z.real, z.imag), dim=-1)


def gated_attention(attn, seen: Tensor, value: Tensor | None, visible_keys: Tensor, hp) -> Tensor:
    """A layer's attention, head by head in float64. seen: (T, D), what it reads; value: its value embedding."""
    width, heads = hp.head_dim, []
    for h in range(hp.num_heads):
        own = slice(h * width, h * width + width)
        q, k, v = (seen @ matrix[own].double().T for matrix in attn.qkv)
        q, k = rotated(rms(q) * hp.attn_scale, hp.rope_base), rotated(rms(k), hp.rope_base)
        v = attn.v_scale.double() * v
        if attn.window == "L":  # channels that stand still come from the token before
            still = [channel % (width // 2) >= width // 4 for channel in range(width)]
            before = [max(t - 1, 0) for t in range(len(k))]
            k = torch.where(torch.tensor(still), k[before], k)
        if value is not None:
            read = torch.cat((seen[:, :6], value[:, :6]), 1)
            v = v + 2 * torch.sigmoid(read @ attn.value_gate[h].double())[:, None] * value[:, own]
        y = attention(q[None, None], k[None, None], v[None, None], visible_keys)[0, 0]
        heads.append(y)
    return torch.cat(heads, 1) @ attn.out.double().T


def summed(mix, x: Tensor, streams: list[Tensor]) -> Tensor:
    """`Mix` in float64, token by token."""
    rows = []
    for t, row in enumerate(rms(x)):
        hidden = mix.network_in.double() @ row
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        weights = mix.skip_weights.double() + 0.1 * mix.network_out.double() @ hidden
        rows.append(sum(weight * stream[t] for weight, stream in zip(weights, streams)))
    return torch.stack(rows)


def features(model, hp, ids: Tensor, window: int) -> Tensor:
    """GPT.features of a byte model, layer by layer in float64, from its parameters."""
    rows = [min(int(i), 256) for i in ids]
    pairs = [(36313 * b ^ 27191 * a) % hp.bigram_rows for a, b in zip(rows[:1] + rows, rows)]
    embed, bigrams = model.embed.weight.double()[rows], model.bigrams.weight.double()[pairs]
    bigrams = torch.cat((bigrams, bigrams.new_zeros(len(rows), hp.model_dim - hp.bigram_dim)), 1)
    x = x0 = rms(torch.stack([e + model.smear.double() * (embed[t - 1] if t else 0) for t, e in enumerate(embed)]))
    outputs, depth, streams = [], len(hp.layer_pattern), [x0]
    for i, (letter, table) in enumerate(zip(hp.layer_pattern, hp.value_pattern)):
        block, partner = model.blocks[i], 2 * (depth // 2) - 1 - i
        if depth // 2 <= i < 2 * (depth // 2):
            x = x + model.skip_weights[i - depth // 2].double() * outputs[partner]
        if i == depth - 1:
            x = x + summed(model.mix_input, x, streams)
        a, b, c = block.lambdas.double()
        x = a * x + b * x0 + c * bigrams
        seen = rms(outputs[hp.late_layer] if i > hp.late_layer else x)
        value = None if table == "." else model.value_embeds[table].weight.double()[rows]
        keys = visible(ids, window if letter == "L" else max(window // 2, 1))
        x = x + gated_attention(block.attn, seen, value, keys, hp)
        x = x + (rms(x) @ block.mlp.up.weight.double().T).clamp(min=0) ** 2 @ block.mlp.down.weight.double().T
        outputs.append(x)
        if str(i) in hp.mixed_layers.split():
            streams.append(x)
    return rms(x + summed(model.mix_head, x, streams))


def copied(pointer, x: Tensor, ids: Tensor, targets: Tensor, scale: float, reach: int) -> Tensor:
    """`Pointer` in float64, token by token: what each token of the document so far, in the token's 128 and those up
    to `reach` before, weighs against e^0 for none; x: (T, D) -> (T,), the share of those that are the target."""
    matrices = pointer.query, pointer.key, pointer.key_before
    query, own, before = (x.double() @ matrix.double().T for matrix in matrices)
    keys = rms(torch.stack([own[t] + before[max(t - 1, 0)] for t in range(len(x))]))
    scores = rms(query) * scale * pointer.copy_scale.double() @ keys.T
    found, start = [], 0
    for t, token in enumerate(ids.tolist()):
        start = t if token == EOT else start
        seen = slice(max(start, (t // 128 + 1) * 128 - reach), t + 1)
        weights = scores[t, seen].exp()
        found.append((weights * (ids[seen] == targets[t])).sum() / (1 + weights.sum()))
    return torch.stack(found)


def normalized(update: Tensor, second: list[float], beta2: float) -> Tensor:
    """One matrix, each neuron (a row, or a column of a wide matrix) over the root of its mean square's average."""
    rows = update if update.size(0) >= update.size(1) else update.T
    for i, row in enumerate(rows):
        second[i] = beta2 * second[i] + (1 - beta2) * float((row**2).mean())
    scaled = torch.stack([row / second[i] ** 0.5 for i, row in enumerate(rows)])
    scaled = scaled * (update.norm() / scaled.norm())
    return scaled if rows is update else scaled.T


def subtracted(weight: Tensor, step: Tensor, shrinkage: float) -> Tensor:
    """weight - step, and where that makes a value smaller by itself, the value's share `shrinkage` off too."""
    pairs = zip(weight.flatten().tolist(), step.flatten().tolist())
    left = [w - s - (shrinkage * w if w * s > 0 else 0) for w, s in pairs]
    return torch.tensor(left, dtype=torch.float64).view(weight.shape)


class SlowAdam:
    """Adam of one tensor in float64, its steps rounded to bf16 as they travel, with cautious decay."""

    def __init__(self, weight: Tensor, lr: float, betas, eps: float = 1e-10, decay: float = 0.0):
        self.weight, self.lr, self.betas, self.eps, self.decay = weight.detach().double(), lr, betas, eps, decay
        self.m, self.v, self.steps = torch.zeros_like(self.weight), torch.zeros_like(self.weight), 0

    def step(self, grad: Tensor, rate: float = 1.0) -> Tensor:
        (b1, b2), lr, grad = self.betas, self.lr * rate, grad.double()
        self.steps += 1
        self.m, self.v = b1 * self.m + (1 - b1) * grad, b2 * self.v + (1 - b2) * grad**2
        m, v = self.m / (1 - b1**self.steps), self.v / (1 - b2**self.steps)
        step = (lr * m / (v.sqrt() + self.eps)).bfloat16()
        self.weight = subtracted(self.weight, step, self.decay * lr**2)
        return self.weight


class SlowMuon:
    """Muon of one matrix likewise, around an orthogonalization that it is given."""

    def __init__(self, weight: Tensor, lr: float, momentum: float, beta2: float, decay: float, orthogonalize):
        self.lr, self.momentum, self.beta2, self.decay, self.orthogonalize = lr, momentum, beta2, decay, orthogonalize
        self.weight, self.second = weight.detach().double(), [0.0] * max(weight.shape)
        self.average = torch.zeros_like(self.weight)

    def step(self, grad: Tensor) -> Tensor:
        self.average = self.momentum * self.average + (1 - self.momentum) * grad
        update = self.orthogonalize(self.momentum * self.average + (1 - self.momentum) * grad)
        update = normalized(update, self.second, self.beta2) * max(1, grad.size(0) / grad.size(1)) ** 0.5
        self.weight = subtracted(self.weight, (self.lr * update).bfloat16(), self.decay * self.lr**2)
        return self.weight


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
