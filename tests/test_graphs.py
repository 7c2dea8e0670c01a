"""What dynamo makes of a run, without a GPU: it traces and guards here as there, and Inductor stays out."""

import gc

import numpy as np
import torch
from small import small_hp, trainer

import train_gpt as tg


def model_of(hp, rows: int, device: str) -> tg.GPT:
    """With bf16 tables, as on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = tg.GPT(hp, rows)
    model.use_flex = False
    model.value_embeds.bfloat16()
    model.bigrams.bfloat16()
    return model


def kinds(model: tg.GPT, hp) -> set:
    """Those of buckets: an optimizer's function is compiled once for each."""
    return {(bucket.params[0].dtype, *(p.shape for p in bucket.params))
            for optimizer in tg.build_optimizers(model, hp) for bucket in optimizer.buckets}


def test_the_warm_up_makes_all_graphs_of_a_run_and_dynamo_lets_it(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(tg, "compiled", lambda function: torch.compile(
        function, backend="eager", dynamic=False, fullgraph=True))
    hp = small_hp(batch_stages="1x128 2x256 1x512", copy_chunk=128, steps=6, sampled=0.5, average=1.0,
                  model_dim=128, num_heads=2)
    model, full = model_of(hp, 384, "cpu"), tg.Hyperparameters()
    assert len(kinds(model, hp)) == len(kinds(model_of(full, tg.VOCAB["gpt2"], "meta"), full))
    t = trainer(model, hp)
    stream = tg.TokenStream([np.random.default_rng(0).integers(0, 100, 9000).astype(np.uint16)])
    with torch._dynamo.config.patch(recompile_limit=8):  # dynamo's own; `compile` raises it
        t.compile()
        t.warm_up()
        gc.unfreeze()  # what the warm-up froze
        made = dict(torch._dynamo.utils.counters["stats"])
        for step, pairs in enumerate(tg.prefetch(stream, hp)):
            loss = t.train_step(step, pairs)
            t.evaluate(stream, 1024, step)
        assert dict(torch._dynamo.utils.counters["stats"]) == made and made["unique_graphs"] > 12
    assert loss.isfinite()
