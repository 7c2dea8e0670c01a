"""Block masks against their definition: the tables, FlexAttention compiled, the dense path with gradients."""

import pytest
import torch
from probe import compiles
from reference import attention, random_documents, relative_error, visible

import train_gpt as tg

BLOCK = tg.BLOCK


def from_tables(mask, side: str) -> torch.Tensor:
    """(T, T) bool rebuilt from one side's tables alone: full blocks whole, partial ones through the mask function."""
    length = mask.seq_lengths[0]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for kind in ("full_", ""):
        counts, indices = getattr(mask, f"{kind}{side}_num_blocks")[0, 0], getattr(mask, f"{kind}{side}_indices")[0, 0]
        for own in range(length // BLOCK):
            listed = indices[own, : counts[own]].tolist()
            assert len(set(listed)) == len(listed)
            for other in listed:
                q, k = (own, other) if side == "kv" else (other, own)
                rows, cols = (torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in (q, k))
                block = torch.ones(BLOCK, BLOCK, dtype=torch.bool)
                if not kind:
                    block = mask.mask_mod(0, 0, rows[:, None], cols[None])
                assert not seen[rows[0], cols[0] : cols[-1] + 1].any(), "a block is listed twice"
                seen[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = block
    return seen


@pytest.mark.parametrize("seed", range(200))
def test_tables_give_the_defined_set(seed):
    g = torch.Generator().manual_seed(seed)
    blocks = int(torch.randint(1, 9, (), generator=g))
    ids = random_documents(blocks * BLOCK, g)
    widest = int(torch.randint(1, 12, (), generator=g))
    window = int(torch.randint(0, widest + 2, (), generator=g))
    masks = tg.create_masks(ids, BLOCK, torch.tensor(window, dtype=torch.int32), widest)
    for mask, blocks_seen in zip(masks, (window, window // 2)):
        want = visible(ids, min(max(blocks_seen, 1), widest))
        assert want.any(1).all()
        for side in ("kv", "q"):
            assert torch.equal(from_tables(mask, side), want), (side, window)
        q = k = torch.arange(len(ids))
        assert torch.equal(mask.mask_mod(0, 0, q[:, None], k[None]), want)


def test_tables_stay_narrow_and_full_blocks_are_used():
    ids = torch.zeros(64 * BLOCK, dtype=torch.int32)
    mask, half = tg.create_masks(ids, BLOCK, torch.tensor(14), 14)
    assert mask.kv_indices.shape[-1] == 14 and mask.full_q_indices.shape[-1] == 14
    assert mask.full_kv_num_blocks[0, 0, -1] == 13 and half.full_kv_num_blocks[0, 0, -1] == 6
    assert mask.kv_num_blocks[0, 0].unique().tolist() == [1], "one document needs the element mask on the diagonal only"


def test_no_window_sees_the_whole_document_and_bad_lengths_are_refused():
    ids = random_documents(6 * BLOCK, torch.Generator().manual_seed(1))
    assert torch.equal(from_tables(tg.create_masks(ids)[0], "kv"), visible(ids, 99))
    for shape in (100,), (1, 128), (128, 128), (1, 1, 256), ():
        with pytest.raises(ValueError, match=r"not one packed sequence .* multiple of 128") as caught:
            tg.create_masks(torch.zeros(shape, dtype=torch.int32))
        assert str(shape) in str(caught.value)


def qkv(length: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, length, 16, generator=g, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [1, 3, 9])
def test_dense_chunks_equal_the_reference_with_gradients(window):
    length = 9 * BLOCK  # more than two chunks, the last one ragged
    ids = random_documents(length, torch.Generator().manual_seed(window))
    mask, _ = tg.create_masks(ids, BLOCK, torch.tensor(window), 5)
    inputs = qkv(length)
    pieces = tg.dense_chunks(mask)
    assert max(seen.numel() for _, _, seen in pieces) <= tg.QUERIES * (tg.QUERIES + 4 * BLOCK)
    out = tg.attend(*inputs, pieces)
    want = attention(*inputs, visible(ids, min(window, 5)))
    assert relative_error(out, want) < 1e-5
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9))
    got = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs)):
        assert relative_error(a, b) < 1e-5


def test_the_window_never_recompiles_with_gradients_on_the_dense_path():
    torch._dynamo.reset()
    ids = random_documents(4 * BLOCK, torch.Generator().manual_seed(3))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def run(q, k, v, ids, window):
        long, short = tg.create_masks(ids, BLOCK, window, 4)
        return tg.attend(q, k, v, tg.dense_chunks(long)) + tg.attend(q, k, v, tg.dense_chunks(short))

    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in (1, 2, 3, 4):
            inputs = qkv(4 * BLOCK, window)
            out = run(*inputs, ids, torch.tensor(window, dtype=torch.int32))
            want = attention(*inputs, visible(ids, window)) + attention(*inputs, visible(ids, max(window // 2, 1)))
            assert relative_error(out, want) < 1e-5
            got = torch.autograd.grad(out.sum(), inputs)
            for a, b in zip(got, torch.autograd.grad(want.sum(), inputs)):
                assert relative_error(a, b) < 1e-4


@compiles("flex_attention", "*torch.zeros(3, 1, 1, 128, 16)")
def test_compiled_flex_attention_reads_the_tables_and_never_recompiles():
    """Inductor for CPUs wants tables as wide as the sequence, made outside of its graph; test_gpu.py has the rest."""
    torch._dynamo.reset()
    ids = torch.zeros(6 * BLOCK, dtype=torch.int32)
    ids[[150, 400, 410]] = tg.EOT

    @torch.compile(fullgraph=True, dynamic=False)
    def run(q, k, v, long, short):
        return tg.attend(q, k, v, long), tg.attend(q, k, v, short)

    inputs = [t.detach() for t in qkv(6 * BLOCK)]  # a CPU refuses any that requires a gradient
    errors = []
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for window in (1, 2, 3, 4, 5, 6):
            masks = tg.create_masks(ids, BLOCK, torch.tensor(window, dtype=torch.int32), 6)
            for out, blocks in zip(run(*inputs, *masks), (window, window // 2)):
                assert relative_error(out, attention(*inputs, visible(ids, max(blocks, 1)))) < 1e-4
            errors.append(relative_error(out, attention(*inputs, visible(ids, 6))))
    assert errors[0] > 0.05, "the window changes what is seen"
