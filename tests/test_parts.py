"""What tests/bench_parts.py measures with: masks, FP8 scales, and every part once with a tiny model on the CPU."""

import json
from unittest import mock

import bench_parts as bench
import claims
import pytest
import torch
import torch.distributed as dist
from reference import random_documents, relative_error, visible
from small import documents, small_hp, small_model, window_tensor

import train_gpt as tg

BLOCK = tg.BLOCK
ROW_KERNEL = not torch.__version__.startswith("2.11.")  # 2.11 has no FP8 product with a scale a row on a CPU
ARGUMENTS = "--tiny --part=all --rounds=1 --sequences_per_step=2 --layer_pattern=LS --value_pattern=0.".split()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Rows of each part, after one run of all of them."""
    out, limit = tmp_path_factory.mktemp("parts") / "rows.jsonl", torch._dynamo.config.recompile_limit
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert bench.main([*ARGUMENTS, f"--out={out}"]) == 0
    assert tg.dist is dist and tg.create_masks is not bench.standard_masks
    assert torch._dynamo.config.recompile_limit == limit
    tables = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [table["part"] for table in tables] == list(bench.PARTS)
    return {table["part"]: table["rows"] for table in tables}


# ---- Parts


def test_steps_have_every_arm_at_three_places(seen):
    arms = [(row["step"], row["arm"]) for row in seen["steps"]]
    assert arms == [(i, arm) for i in range(3) for arm in ("default", "4/3 as long", "bf16 head", "all off")]
    assert [row["window"] for row in seen["steps"][::4]] == [1, 1, 2]
    for row in seen["steps"]:
        long = row["arm"] in ("4/3 as long", "all off")
        assert row["tokens"] == (384 if long else 256) and row["n"] == 1 and row["peak MiB"] is None
        assert row["ms a sequence"] == row["ms a step"] / 2
        assert row["us a token"] * row["tokens/s"] == pytest.approx(1e6)
        assert row["time to default"] == 1 or row["arm"] != "default"


def test_our_masks_are_the_same_and_hold_less(seen):
    rows = seen["masks"]
    assert len(rows) == 12 and all(row["as ours"] is True and row["error"] == "none" for row in rows)
    for ours, eager, standard in zip(rows[::3], rows[1::3], rows[2::3]):
        assert ours["bytes held"] == eager["bytes held"] and ours["building, bytes"] is None
        assert ours["bytes held"] < standard["bytes held"] or ours["tokens"] == 256  # two blocks, and a window of two


def test_head_and_optimizer(seen):
    assert [(row["head"], row["to bf16"]) for row in seen["head"]] == [("FP8", None), ("bf16", 1.0)]
    assert [row["rank"] for row in seen["optimizer"]] == ["alone", *"01234567", "most"]


def test_scaling_has_every_scheme(seen):
    rows = seen["scaling"]
    assert [sum(row["product"] == product for row in rows) for product in bench.PRODUCTS] == [5, 6, 6]
    for row in rows:
        rounding, kernel = row["emulated error"], row["kernel error"]
        assert (rounding is None) == (row["scales"] == "bf16") and row["both ms"] is None
        if row["scales"] == "block" or row["scales"] == "row" and not ROW_KERNEL:  # a CPU has no such kernel
            assert kernel is None and "Error" in row["error"]
        elif rounding:
            assert kernel == pytest.approx(rounding, abs=1e-3)
        else:
            assert kernel < 5e-3


def test_longest_agrees_with_a_shorter_sequence(seen):
    rows = seen["longest"]
    dense, ours = ([row["tokens"] for row in rows if row["masks"] == name] for name in ("one dense mask", "ours"))
    assert dense == [256, 512, 1024] and ours == [512, 1024]
    for row in rows:
        assert row["agrees"] is True and row["gap, first"] < 1e-5 and row["x 256"] == row["tokens"] // 256
        assert row["gap, last"] is None if row["tokens"] <= 512 else row["gap, last"] < 1e-5


def test_a_part_that_fails_does_not_end_the_others(capsys):
    with mock.patch.object(bench.Parts, "masks", mock.Mock(side_effect=ValueError("on purpose"))), \
            mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert bench.main(["--tiny", "--part=masks,optimizer", "--rounds=1", *ARGUMENTS[3:]]) == 1
    said = capsys.readouterr().out
    assert "Traceback" in said and "part masks: error ValueError: on purpose" in said
    assert "part optimizer: error none" in said


# ---- Masks


@pytest.mark.parametrize("seed", range(6))
def test_standard_masks_are_the_defined_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    ids, window = random_documents(6 * BLOCK, generator), torch.tensor(seed + 1, dtype=torch.int32)
    masks = bench.standard_masks(ids, BLOCK, window, 6)
    at = torch.arange(len(ids))
    for mask, blocks in zip(masks, (seed + 1, max((seed + 1) // 2, 1))):
        assert torch.equal(mask.mask_mod(0, 0, at[:, None], at), visible(ids, blocks))
    held = [bench.tables(make, 6, ids, window) for make in (tg.create_masks, bench.standard_masks)]
    want = torch.stack([(tiles := visible(ids, blocks).view(6, BLOCK, 6, BLOCK)).any(3).any(1).to(torch.int8)
                        + tiles.all(3).all(1).to(torch.int8)
                        for blocks in (seed + 1, max((seed + 1) // 2, 1)) for _ in "kq"])
    for tables in held:
        assert len(tables) == 17 and torch.equal(bench.grids(tables), want)


def test_the_model_trains_alike_with_standard_and_with_whole_masks():
    hp = small_hp()
    model, (ids, targets) = small_model(hp, awake=True), documents(hp, 1)[0]
    want = model(ids, targets, window_tensor(2))
    with mock.patch.object(tg, "create_masks", bench.standard_masks):
        assert torch.allclose(model(ids, targets, window_tensor(2)), want, atol=1e-6)
    with mock.patch.object(tg, "dense_chunks", bench.whole_mask):
        assert torch.allclose(model(ids, targets, window_tensor(2)), want, atol=1e-6)


def test_standard_masks_compile_without_a_break():
    """Inside the model, where the window may change without recompiling."""
    torch._dynamo.reset()
    ids = random_documents(4 * BLOCK, torch.Generator().manual_seed(0))
    run = torch.compile(lambda ids, window: bench.tables(bench.standard_masks, 4, ids, window), backend="aot_eager",
                        fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in (1, 3, 4):
            want = bench.tables(tg.create_masks, 4, ids, torch.tensor(window, dtype=torch.int32))
            got = run(ids, torch.tensor(window, dtype=torch.int32))
            assert torch.equal(bench.grids(got), bench.grids(want))


# ---- FP8 scales


def uneven(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows whose magnitudes fall by 8 powers of ten, in steps of 128 rows."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-8 * torch.linspace(0, 1, rows // 128)).repeat_interleave(128)[:, None]
    return torch.randn(rows, columns, generator=generator) * size


@pytest.mark.parametrize("dtype", [bench.E4M3, bench.E5M2])
def test_a_static_scale_is_the_recipes_cast(dtype):
    x, scale = torch.randn(256, 384), torch.tensor(2.0**9)
    values, factors = claims.quantise(x, dtype, (0, 0), scale)
    assert torch.equal(values.float(), tg.to_fp8(x, scale, dtype).float()) and factors.tolist() == [[2.0**-9]]
    assert torch.equal(claims.dequantise(values, factors), tg.to_fp8(x, scale, dtype).float() / scale)


@pytest.mark.parametrize("tile, shape", [((0, 0), (1, 1)), ((1, 0), (256, 1)), ((1, 128), (256, 3)),
                                         ((128, 128), (2, 3))])
def test_each_tile_fills_the_format(tile, shape):
    for x in (uneven(256, 384, 1), uneven(384, 256, 2).t()):
        values, factors = claims.quantise(x, bench.E4M3, tile)
        assert factors.shape == shape and values.shape == x.shape and values.is_contiguous()
        tiles = values.float().view(shape[0], 256 // shape[0], shape[1], 384 // shape[1])
        assert torch.equal(tiles.abs().amax((1, 3)), torch.full(shape, 448.0))
        error = (claims.dequantise(values, factors) - x).abs()
        largest = x.abs().view(tiles.shape).amax((1, 3), keepdim=True).expand(tiles.shape).reshape(x.shape)
        assert (error <= x.abs() / 16 + largest * 2**-18).all()  # 3 mantissa bits, and what lies below the smallest


def test_finer_scales_lose_less_where_rows_differ():
    x, w, errors = uneven(512, 256, 3), torch.randn(384, 256), []
    for tile, of_w in (((0, 0), (0, 0)), ((1, 0), (1, 0)), ((1, 128), (128, 128))):
        ready = *claims.quantise(x, bench.E4M3, tile), *claims.quantise(w, bench.E4M3, of_w)
        small = claims.dequantise(*ready[:2])[-128:]
        errors.append((claims.emulated_error(x, w, *ready), relative_error(small, x[-128:])))
    (whole, of_small), *finer = errors
    assert of_small > 0.9 and all(error <= whole and small < 0.05 for error, small in finer), errors


def test_the_kernels_give_what_was_rounded():
    a, b = uneven(256, 128, 4), torch.randn(384, 128)
    for scheme, tile in (("tensor, amax", (0, 0)), *[("row", (1, 0))] * ROW_KERNEL):
        ready = *claims.quantise(a, bench.E4M3, tile), *claims.quantise(b, bench.E4M3, tile)
        got = claims.multiply(scheme, "gw", torch.bfloat16, *ready)
        want = claims.dequantise(*ready[:2]) @ claims.dequantise(*ready[2:]).t()
        assert torch.allclose(got.float(), want, rtol=1e-2, atol=1e-3 * float(want.abs().max()))
    assert bench.product_error(a, b, (a @ b.t()).__getitem__) < 1e-6
