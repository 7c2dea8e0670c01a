"""Measures on one GPU what the description of this recipe claims, before and after, by patches made here:

    python tests/bench/parts.py --data_dir=DIR [--part=a,b|all] [--rounds=3] [--seconds=540] [--out=FILE] [--knob=value]

steps: training steps and memory: longer sequences, a bf16 head, all off. masks: bytes, building, equality of our masks
and create_block_mask's. head: FP8 and bf16. scaling: error and time of its matmuls by kind of scale. optimizer: grouped
and not, alone and as a share of 8. longest: the longest validation sequence by one dense mask and ours, last, since an
illegal access ends all. After --seconds, rounds end early and parts are left out. Without CUDA all is --tiny. Exit code
2: bad input; 1: a part failed or was left out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # as run.sh has it; torch reads it when it is imported
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common  # noqa: E402
import recipe  # noqa: E402
import scaling  # noqa: E402
from common import tg  # noqa: E402
from ranks import HOST, Wire  # noqa: E402

PARTS = ("steps", "masks", "head", "scaling", "optimizer", "longest")
TINY = [*common.TINY, "--model_dim=128", "--steps=3"]  # 128: a block of FP8 scales
TABLES = [kind + side + what for side in ("kv", "q") for kind in ("", "full_") for what in ("_num_blocks", "_indices")]
E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
PRODUCTS = {"y = x W^T": "xw", "dx = g W": "gw", "dW^T = x^T g": "xg"}  # each A B^T, contracted along rows of both
SCHEMES = [("bf16", BF16), ("tensor, static", E5M2), ("tensor, amax", E5M2), ("tensor, amax", E4M3), ("row", E4M3),
           ("block", E4M3)]  # kind of scale, and format of the gradient


def standard_masks(input_ids: Tensor, block_size: int, window: Tensor | None, max_window: int) -> tuple:
    """What tg.create_masks gives, from torch's create_block_mask: every pair of tokens is looked at."""
    docs = (input_ids == tg.EOT).cumsum(0, dtype=torch.int32)
    window = torch.full((), max_window, device=docs.device) if window is None else window
    def build(window: Tensor):
        def visible(batch, head, q, k):
            return (q >= k) & (docs[q] == docs[k]) & (q // block_size - k // block_size < window)
        return create_block_mask(visible, None, None, len(docs), len(docs), device=docs.device, BLOCK_SIZE=block_size)
    return build(window.clamp(min=1)), build((window // 2).clamp(min=1))


def tables(make, max_window: int, input_ids: Tensor, window: Tensor) -> list[Tensor]:
    """All that both masks of `make` hold: eight tables each, and the documents."""
    masks = make(input_ids, tg.BLOCK, window, max_window)
    return [*(getattr(m, name) for m in masks for name in TABLES), (input_ids == tg.EOT).cumsum(0, dtype=torch.int32)]


def grids(held: list[Tensor]) -> Tensor:
    """Both masks by their key and query sides, (4, B, B), query first: 2 a whole block is visible, 1 a part of it."""
    seen = torch.zeros(4, *(held[0].numel(),) * 2, dtype=torch.int8, device=held[0].device)
    for i, (count, indices) in enumerate(zip(held[:16:2], held[1:16:2])):
        listed = torch.arange(indices.size(-1), device=count.device) < count[0, 0, :, None]
        side = seen[i // 2].t() if i // 2 % 2 else seen[i // 2]
        side[listed.nonzero()[:, 0], indices[0, 0][listed].long()] = 1 + i % 2
    return seen


def whole_mask(mask) -> list:
    """In place of tg.dense_chunks: one piece, with a (T, T) bool mask filled by rows, to need no more memory."""
    at = torch.arange(mask.seq_lengths[0], device=mask.kv_indices.device)
    seen = torch.empty(len(at), len(at), dtype=torch.bool, device=at.device)
    for rows in at.split(512):
        seen[rows[0] : rows[-1] + 1] = mask.mask_mod(0, 0, rows[:, None], at)
    return [(slice(0, len(at)), slice(0, len(at)), seen)]


# ---- FP8 products by kind of scale


def logit_gradient(model, x: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Gradient of a mean over `tokens` tokens with respect to the head's output for these rows, as backward gets it.
    x: (n, D) -> (n, V) in the dtype of x."""
    z = model.lm_head(x).detach().requires_grad_()
    with torch.enable_grad(), mock.patch.object(model.lm_head, "forward", lambda z, rows: z):
        return torch.autograd.grad(model.losses(z, z.new_zeros(len(z)), targets).sum() / tokens, z)[0]


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


# ---- Parts


class Parts(scaling.Bench):
    """The model on one GPU. The weights to begin with lie on the host: peaks are measured."""
    def __init__(self, hp: tg.Hyperparameters, args, ceiling: float | None):
        super().__init__(hp, args)
        self.first, self.fp8, self.trained = [t.cpu() for t in self.first], self.model.lm_head.use_fp8, False
        self.compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True) if self.cuda else lambda f: f
        self.facts["ceiling"], self.quantise = ceiling, self.compiled(quantise)
        self.late = lambda: time.perf_counter() - self.began > args.seconds

    @torch.no_grad()
    def reset(self) -> None:
        """The weights to begin with, and neither gradients nor optimizer state."""
        for trainer in self.made.values():
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        self.model.train().zero_grad()
        self.set_head(self.hp.train_seq_len)
        for tensor, kept in zip(self.tensors, self.first):
            tensor.copy_(kept)

    def set_head(self, length: int, fp8: bool = True) -> None:
        """As GPT makes it for training sequences of this length."""
        self.model.lm_head.use_fp8 = self.fp8 and fp8
        self.model.set_grad_scale(length)

    def attempt(self, work) -> tuple:
        """(what work() gives, "none"), or (None, the error as one line) with its memory freed."""
        try:
            return work(), "none"
        except Exception as error:
            if not isinstance(error, NotImplementedError):
                traceback.print_exc(file=sys.stdout)
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]}"
        with contextlib.suppress(RuntimeError):  # of a GPU that does not answer any more
            gc.collect()
            torch.cuda.empty_cache()
        return None, said

    def run(self, part: str) -> bool:
        def work():
            if not self.trained and part in ("steps", "head", "scaling", "longest"):
                self.weights()
                self.trained = True
            self.reset()
            getattr(self, part)()
        said = f"left out after {self.args.seconds:g} s" if self.late() else self.attempt(work)[1]
        self.say(f"part {part}: error {said}")
        return said == "none"

    def weights(self) -> None:
        """Train the default model through a whole schedule: at the start the head is zero."""
        for i, batch in enumerate(tg.prefetch(self.corpus.train, self.hp, 0, 1, 0, self.cuda)):
            self.say(f"weights: step {i + 1}, loss {float(self.step(*self.arm(1), batch, i)):.3f}")
        self.first = [t.to("cpu", copy=True) for t in self.tensors]

    def medians(self, arms: dict, rounds: int) -> tuple[dict, int]:
        """({name: median ms of work()}, calls of each), interleaved, after a round that is not counted."""
        times = {name: [] for name in arms}
        for turn in range(rounds + 1):
            for name, work in arms.items() if turn < 2 or not self.late() else ():
                if self.cuda:
                    torch.cuda._sleep(80_000_000)  # cycles, about 45 ms: the host is ahead, as within a run
                start, _, end = self.mark(), work(), self.mark()
                if self.cuda:
                    end.synchronize()
                times[name].append(start.elapsed_time(end) if self.cuda else end - start)
        return {k: statistics.median(t[1:]) for k, t in times.items()}, min(map(len, times.values()), default=1) - 1

    def peak(self, work) -> tuple:
        """(what work() gives, bytes allocated on the way at most, and before it)."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        before, got = torch.cuda.memory_allocated(), work()
        return got, torch.cuda.max_memory_allocated() or None, before

    def tokens(self, length: int) -> tuple[Tensor, Tensor]:
        """(input_ids, targets) of one validation sequence; a shorter stream is repeated."""
        text = torch.from_numpy(self.corpus.val.read(0, min(length + 1, self.corpus.val.total)))
        text = text.repeat(-(-(length + 1) // len(text)))[: length + 1].to(self.device)
        return text[:-1].clone(), text[1:].long()

    def steps(self) -> None:
        hp, peaks, rows, T = self.hp, {}, [], self.hp.train_seq_len
        def train(length: int, fp8: bool, off: bool, step: int) -> Tensor:
            self.set_head(length, fp8)
            wire, trainer = self.arm(1, grouped=not off)
            own, masks = dataclasses.replace(hp, train_seq_len=length), standard_masks if off else tg.create_masks
            with mock.patch.object(trainer, "hp", own), mock.patch.object(tg, "create_masks", masks):
                return self.step(wire, trainer, data[length], step)
        long = -(-T // 96) * 128
        one = {n: dataclasses.replace(hp, train_seq_len=n, steps=1) for n in (T, long)}
        data = {n: next(tg.prefetch(self.corpus.train, one[n], 0, 1, 0, self.cuda)) for n in one}
        arms = {"default": (T, True, False), "4/3 as long": (long, True, False), "bf16 head": (T, False, False)}
        works = {k: functools.partial(train, *arm) for k, arm in (arms | {"all off": (long, False, True)}).items()}
        for name, work in [*works.items()]:
            self.reset()  # of one arm only is the optimizer's state in memory
            peaks[name], said = self.attempt(lambda work=work: (work(0), self.peak(lambda: work(0))[1])[1])
            self.say(f"steps, {name}: error {said}, peak {peaks[name]} bytes")
            works[name] = work if said == "none" else None
        for place in (0, hp.steps // 2, hp.steps - 1):
            ms, n = self.medians({k: functools.partial(w, place) for k, w in works.items() if w}, self.args.rounds)
            for name, took in ms.items():
                each, length = took / hp.sequences_per_step, works[name].args[0]
                row = {"arm": name, "step": place, "window": int(self.window), "tokens": length, "ms a step": took,
                       "ms a sequence": each, "us a token": each / length * 1e3, "tokens/s": length / each * 1e3,
                       "peak MiB": peaks[name] and peaks[name] / 2**20}
                for to in ("4/3 as long", "default"):
                    row |= {f"time to {to}": took / ms[to] if to in ms else None,
                            f"memory to {to}": peaks[name] and peaks[to] and peaks[name] / peaks[to]}
                rows.append(row | {"n": n})
        self.report("steps", "with the optimizer. Peak: weights, gradients, its state, a sequence's activations", rows)

    def masks(self) -> None:
        rows, most = [], self.model.max_window
        for length, blocks in [(n, w) for n in (self.hp.train_seq_len, self.hp.val_seq_len) for w in (most, 1)]:
            window = torch.full((), blocks, dtype=torch.int32, device=self.device)
            pair, works, ours = (self.tokens(length)[0], window), {}, None
            for name in ("ours", "ours, eager", "create_block_mask"):
                make = standard_masks if name.startswith("c") else tg.create_masks
                build = lambda ids, window, make=make: tables(make, most, ids, window)
                work = functools.partial(build if "eager" in name else self.compiled(build), *pair)
                got, said = self.attempt(lambda work=work: (work(), self.peak(work))[1])
                held, peak, before = got or ([], None, None)
                seen, works = (grids(held), works | {name: work}) if got else (None, works)
                ours = seen if ours is None else ours
                same = got and torch.equal(seen, ours) and torch.equal(seen[::2], seen[1::2])
                rows.append({"masks": name, "tokens": length, "window": blocks, "half": max(blocks // 2, 1),
                             "bytes held": sum(t.nbytes for t in held), "building, bytes": peak and peak - before,
                             "as ours": same, "error": said})
            ms, n = self.medians(works, 2 * self.args.rounds)
            rows[-3:] = [row | {"ms": ms.get(row["masks"]), "n": n} for row in rows[-3:]]
        self.report("masks", "whole window and half, and the documents. Building: allocated at most, over before", rows)

    def real_features(self) -> tuple[Tensor, Tensor]:
        """The head's input and targets for a training sequence, by dense attention: nothing to compile."""
        ids, targets = (t.to(self.device) for t in self.pairs[0])
        self.window.fill_(self.model.max_window)
        with torch.no_grad(), mock.patch.object(self.model, "use_flex", False):
            return tg.GPT.features(self.model, ids, self.window), targets

    def head(self) -> None:
        model, (x, targets) = self.model, self.real_features()
        x.requires_grad_()
        sums = self.compiled(model.sums)
        def work(fp8: bool) -> None:
            model.lm_head.use_fp8, x.grad, model.lm_head.weight.grad = fp8, None, None
            with mock.patch.object(model, "sums", sums):
                model.losses(x, x.new_zeros(len(x)), targets).mean().backward()
        arms = {name: functools.partial(work, name == "FP8") for name in ("FP8", "bf16")[not self.fp8 :]}
        ms, n = self.medians(arms, 4 * self.args.rounds)
        self.report("head", "output head and loss, forward and backward; the weight and its gradient are fp32", [
            {"head": name, "rows": len(x), "ms": took, "to bf16": took and took / ms["bf16"], "n": n}
            for name, took in ({"FP8": None} | ms).items()])

    def operands(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each product on a real sequence: x bf16, W fp32, and g as it reaches the head's backward, bf16."""
        x, targets = self.real_features()
        w = self.model.lm_head.weight.detach()
        g = torch.empty(len(x), len(w), dtype=BF16, device=self.device)
        for rows in pieces(len(x)):
            g[rows] = logit_gradient(self.model, x[rows], targets[rows], len(x))
        return {"xw": (x.to(BF16), w), "gw": (g, w.t()), "xg": (x.to(BF16).t(), g.t())}

    def prepare(self, kinds: str, a: Tensor, b: Tensor, scheme: str, dtype: torch.dtype) -> list:
        """Both operands with factors. Scales follow the values, the gradient's too, in all schemes but the static."""
        if scheme == "bf16":
            return [a.to(BF16), None, b.to(BF16), None]
        ready = []
        for kind, x in zip(kinds, (a, b)):
            tile = {"row": (1, 0), "block": (128 if kind == "w" else 1, 128)}.get(scheme, (0, 0))
            scale = self.model.lm_head.scale["xwg".index(kind)].clone() if scheme == "tensor, static" else None
            ready += self.quantise(x, dtype if kind == "g" else E4M3, tile, scale)
        return ready

    def scaling(self) -> None:
        operands, rows = self.operands(), []
        for product, kinds in PRODUCTS.items():
            a, b = operands[kinds]
            arms, first = {}, len(rows)
            for scheme, dtype in SCHEMES if "g" in kinds else [s for s in SCHEMES if s != ("tensor, amax", E4M3)]:
                arm, error = f"{scheme} {dtype}", None
                prepare = functools.partial(self.prepare, kinds, a, b, scheme, dtype)
                ready, said = self.attempt(prepare)
                rounding = functools.partial(emulated_error, a, b, *(ready or ()))
                emulated = self.attempt(rounding)[0] if scheme != "bf16" else None
                for out in (torch.float32, BF16)[kinds != "xg" or scheme == "bf16" :] if ready else ():
                    work = functools.partial(multiply, scheme, kinds, out, *ready)
                    error, said = self.attempt(lambda a=a, b=b, work=work: product_error(a, b, work().__getitem__))
                    if said == "none":
                        arms |= {arm: prepare, f"{arm} matmul": work}
                        break
                gradient = str(dtype)[6:] if "g" in kinds else "none"
                rows.append({"product": product, "scales": scheme, "gradient": gradient, "emulated error": emulated,
                             "kernel error": error, "out": str(out)[6:], "error": said, "arm": arm})
            ms, n = self.medians(arms if self.cuda else {}, 2 * self.args.rounds)
            for row in rows[first:]:
                own, matmul = (ms.get(row["arm"] + what) for what in ("", " matmul"))
                row |= {"quantise ms": own, "matmul ms": matmul, "both ms": own and own + matmul, "n": n}
                del row["arm"]
        self.report("scaling", f"{self.hp.train_seq_len} tokens. Error against fp32: of rounded operands multiplied in "
                    "fp32, and of the kernel. Quantise: both operands. block: 1 x 128, and 128 x 128 for W", rows)

    def optimizer(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        wires = {str(rank): Wire(None, rank, HOST, local=True) for rank in range(HOST)}
        arms = {(rank, grouped): functools.partial(self.update, wire, self.trainer(wire, grouped=grouped))
                for grouped in (True, False) for rank, wire in ({"alone": Wire(None, 0, 1)} | wires).items()}
        ms, n = self.medians(arms, 2 * self.args.rounds)
        ms |= {("most", grouped): max(ms[rank, grouped] for rank in wires) for grouped in (True, False)}
        self.report("optimizer", f"random gradients; one rank alone, each one's share of {HOST}, copies for "
                    "exchange. Grouped: a bucket for a shape, else for as few matrices as give each rank one", [
            {"rank": rank, "grouped ms": ms[rank, True], "one matrix at a time ms": ms[rank, False],
             "to grouped": ms[rank, False] / ms[rank, True], "n": n} for rank in ("alone", *wires, "most")])

    def score(self, chunks, rows: int, ids: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token without copying, `rows` at once. chunks: stands for tg.dense_chunks in dense, uncompiled
        attention."""
        with mock.patch.object(self.model, "use_flex", self.model.use_flex and chunks is None), \
                mock.patch.object(tg, "dense_chunks", chunks or tg.dense_chunks):
            features = functools.partial(tg.GPT.features, self.model) if chunks else self.model.features
            x = features(ids, self.window)
            none, parts = torch.zeros(len(x), device=x.device), pieces(len(x), min(rows, len(x)))
            return torch.cat([self.model.losses(x[part], none[part], targets[part]) for part in parts])

    @torch.no_grad()
    def longest(self) -> None:
        model, rows, fits, kept = self.model, [], {}, self.model.rotary
        unit, known, most = (256, 512, 1024) if self.args.tiny else (2048, 65_536, 1 << 22)
        chunked = functools.partial(self.score, tg.dense_chunks, tg.HEAD_ROWS)
        arms = {"one dense mask": (unit, functools.partial(self.score, whole_mask, unit)),
                "ours": (self.hp.val_seq_len, functools.partial(self.score, None, tg.HEAD_ROWS))}
        model.eval()
        self.window.fill_(model.max_window)
        short = chunked(*self.tokens(known))
        for name, (length, score) in arms.items():
            fits[name], said = 0, "none"
            while length <= most and said == "none" and not (self.late() and fits[name]):
                row, said = self.attempt(functools.partial(self.longest_row, length, score, chunked, short))
                row = row or dict.fromkeys(("peak MiB", "loss", "gap, first", "gap, last", "agrees"))
                rows.append({"masks": name, "tokens": length, f"x {unit}": length // unit} | row | {"error": said})
                self.say(f"longest: {rows[-1]}")
                fits[name], length = length if said == "none" else fits[name], 2 * length
        model.rotary = kept
        self.report("longest", f"a sequence, doubled until an error: {fits}. Gaps: mean loss of the first {known} "
                    f"and last {known // 2} tokens, to a sequence of {known}. Peak: with weights, rotary tables", rows)

    def longest_row(self, length: int, score, chunked, short: Tensor) -> dict:
        if length > self.model.rotary.turns.size(1):
            with self.device:
                self.model.rotary = tg.Rotary(self.hp.head_dim, length, self.hp.rope_base)
        pair = self.tokens(length)
        losses, peak, _ = self.peak(lambda: score(*pair))
        known, last = min(length, len(short)), None
        first = abs(float(losses[:known].mean() - short[:known].mean()))
        if length > known:  # half of it is more than 12 layers of windows reach back
            tail = chunked(*(t[-known:] for t in pair))
            last = abs(float(losses[-known // 2 :].mean() - tail[-known // 2 :].mean()))
        return {"peak MiB": peak and peak / 2**20, "loss": float(losses.double().mean()), "gap, first": first,
                "gap, last": last, "agrees": bool(losses.isfinite().all()) and max(first, last or 0) <= 1e-2}


def parse(argv: list[str]):
    parser = common.make_parser(__doc__)
    parser.add_argument("--part", type=functools.partial(common.names, PARTS), default=[*PARTS], metavar="A,B",
                        help=f"of {', '.join(PARTS)}, run as given; default all")
    parser.add_argument("--rounds", type=int, default=3, help="of whole steps; twice or four times as many of the rest")
    parser.add_argument("--seconds", type=float, default=540, help="after which rounds and parts are left out")
    parser.add_argument("--out", type=os.path.abspath, help="file to which the tables are appended as JSON lines")
    args = common.parse_known(parser, argv)
    args.gpus = [1]
    args.knobs = [*(TINY if args.tiny else ["--val_tokens=65536", "--steps=24"]), *args.knobs]
    return args


def main(argv: list[str]) -> int:
    """1 where a part failed or was left out."""
    args, cuda, real = parse(argv), torch.cuda.is_available(), tg.dist
    try:
        with common.data_option(args) as data:
            hp = common.read_knobs("parts", [*args.knobs, data])
            ceiling = recipe.ceiling() if cuda else None
            print(f"{torch.cuda.get_device_name() if cuda else 'no GPU'}, torch {torch.__version__}, bf16 8192^3: "
                  f"{common.shown(ceiling)} TFLOP/s", flush=True)
            bench = Parts(hp, args, ceiling)
            return int(not all([bench.run(part) for part in args.part]))
    finally:
        tg.dist = real


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
