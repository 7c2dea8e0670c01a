"""What dynamo and CUDA graphs make of a run, without a GPU: dynamo traces and guards here as there, and Inductor stays
out; a CUDA graph is played by a call of `launch` on the batch that it would read."""

import copy
import functools
import gc
import types

import numpy as np
import torch
from small import small_hp, trainer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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


def random_stream() -> tg.TokenStream:
    return tg.TokenStream([np.random.default_rng(0).integers(0, 100, 9000).astype(np.uint16)])


def kinds(model: tg.GPT, hp) -> set:
    """Those of buckets: an optimizer's function is compiled once for each."""
    return {(bucket.params[0].dtype, *(p.shape for p in bucket.params))
            for optimizer in tg.build_optimizers(model, hp) for bucket in optimizer.buckets}


def test_the_warm_up_makes_all_graphs_of_a_run_and_dynamo_lets_it(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(tg, "compiled", lambda function, **_: torch.compile(
        function, backend="eager", dynamic=False, fullgraph=True))
    hp = small_hp(batch_stages="1x128 2x256 1x512", copy_reach=256, steps=6, sampled=0.5, average=1.0,
                  model_dim=128, num_heads=2)
    model, full = model_of(hp, 384, "cpu"), tg.Hyperparameters()
    assert len(kinds(model, hp)) == len(kinds(model_of(full, tg.VOCAB["gpt2"], "meta"), full))
    t = trainer(model, hp)
    stream = random_stream()
    with torch._dynamo.config.patch(recompile_limit=8):  # dynamo's own; `compile` raises it
        t.compile()
        t.warm_up()
        gc.unfreeze()  # what the warm-up froze
        made = dict(torch._dynamo.utils.counters["stats"])
        for step, batch in enumerate(tg.prefetch(stream, hp)):
            loss = t.train_step(step, batch)
            t.evaluate(stream, 1024, step)
        assert dict(torch._dynamo.utils.counters["stats"]) == made and made["unique_graphs"] > 12
    assert loss.isfinite()


class Launched(TorchDispatchMode):
    """Names of all operations but those within compiled functions' forwards."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})

    def skip(self, function, **_):
        def call(*args):
            with _disable_current_modes():
                return function(*args)
        return call


def test_a_launch_takes_nothing_from_the_host_and_gives_it_nothing(monkeypatch):
    """As a CUDA graph wants it: a number in an assignment would be copied to the GPU, .item() would wait for it."""
    launched = Launched()
    monkeypatch.setattr(tg, "compiled", launched.skip)
    hp = small_hp(batch_stages="1x128", steps=4, sampled=0.5, model_dim=128, num_heads=2)
    t = trainer(model_of(hp, 384, "cpu"), hp)
    t.compile()
    batch = random_stream().pair(0, 128)[None]
    for step in (0, 3):
        t.set_schedules(step)
        with launched:
            t.launch(step, batch)
    assert {"add", "mul"} & launched.names, "that much is seen"
    assert not launched.names & {"lift_fresh", "lift_fresh_copy"}
    t = trainer(model_of(hp, 384, "meta"), hp)  # has no values: whatever looks at one raises
    for step in (0, 3):
        t.launch(step, batch.to("meta"))


def read_by_graphs(t: tg.Trainer) -> dict:
    """Addresses of all tensors that the launches of a step read or change, and the numbers that they hold as such."""
    tensors = dict(t.model.named_parameters()) | dict(window=t.window, loss=t.loss)
    tensors |= {f"batch {i}": batch for i, (_, batch) in enumerate(t.graphs.values())}
    tensors |= {f"scale {i}": layer.scale for i, layer in enumerate(t.model.fp8_layers)}
    for name, o in zip(("Muon", "Adam", "down"), t.optimizers, strict=True):
        tensors[f"{name} divisor"] = o.grad_divisor
        for i, group in enumerate(o.param_groups):
            tensors |= {f"{name} {i} {key}": group[key] for key in ("lr", "momentum") if key in group}
        for i, state in enumerate(o.state.values()):
            tensors |= {f"{name} {i} {key}": value for key, value in state.items() if key != "average"}
    numbers = [{key: value for key, value in group.items() if key != "params" and not isinstance(value, torch.Tensor)}
               for o in t.optimizers for group in o.param_groups]
    return {name: tensor.data_ptr() for name, tensor in tensors.items()} | dict(numbers=numbers)


def test_a_graph_finds_all_that_it_reads_where_it_was_and_a_run_by_graphs_is_the_same(monkeypatch):
    hp = small_hp(batch_stages="1x128 2x256 1x512", copy_reach=256, steps=9, sampled=0.8, average=1.0, lr_batch=256,
                  momentum_warmup=0.5, window_min=128)
    stream = random_stream()
    weights, losses = [], []
    for by_graphs in (True, False):
        t = trainer(model_of(hp, 384, "cpu"), hp)
        if by_graphs:
            def capture(batches, t=t):
                t.graphs = {tg.shape_at(step, hp): (functools.partial(t.launch, step, batch), batch)
                            for step, batch in batches.items()}
                return 12345

            monkeypatch.setattr(t, "capture", capture)
            monkeypatch.setattr(t, "cuda", True)
            assert t.warm_up() == 12345
            gc.unfreeze()
            places = read_by_graphs(t)
            assert set(t.graphs) == {tg.shape_at(step, hp) for step in range(hp.steps)}
            assert [stage.seq_len for stage, _ in t.graphs] == [512, 512, 256, 128], "the largest first"
        losses.append([float(t.train_step(step, batch)) for step, batch in enumerate(tg.prefetch(stream, hp))])
        t.evaluate(stream, 1024, 5)
        if by_graphs:
            assert read_by_graphs(t) == places
        t.blend()
        weights.append(t.model.state_dict())
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.05
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_checkpoint_goes_into_the_tensors_that_graphs_read():
    """Of a run whose average has begun, and with the numbers of older files as param_groups."""
    hp = small_hp(steps=6, average=1.0, sampled=0.0)
    stream = random_stream()
    batches = list(tg.prefetch(stream, hp))
    first, second = (trainer(model_of(hp, 384, "cpu"), hp) for _ in range(2))
    for step in range(4):
        first.train_step(step, batches[step])
    own = [o.state_dict() for o in first.optimizers]
    for state in own:
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
    saved = copy.deepcopy(dict(model=first.model.state_dict(), optimizers=[own], step=4, train_ms=1.0, run_id="x"))
    second.warm_up()
    gc.unfreeze()
    places = read_by_graphs(second)
    run = types.SimpleNamespace(hp=hp, trainer=second, rank=0, clock=types.SimpleNamespace(),
                                log=types.SimpleNamespace(emit=lambda *_: None))
    tg.Run.restore(run, saved)
    assert read_by_graphs(second) == places and run.step == 4
    losses = [[float(t.train_step(step, batches[step])) for step in (4, 5)] for t in (first, second)]
    assert losses[0] == losses[1]
