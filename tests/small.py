"""A small model, its documents and its optimizers in this process, for the tests of the recipe."""

import dataclasses
import time

import torch
from reference import EOT

import train_gpt as tg

torch.set_num_threads(1)  # a second thread gains nothing here, and on shared cores makes a step many times slower
ROWS = 384  # vocabulary rows of a byte model
SMALL = dict(train_seq_len=256, val_seq_len=512, model_dim=64, num_heads=1, layer_pattern="LSSS", value_pattern="0..0",
             late_layer=1, mixed_layers="0 1 2", bigram_rows=256, bigram_dim=16, copy_reach=256,
             sequences_per_step=2, steps=20)
# On these depends what tests find, and a script under test may have other defaults, or lack a knob.
RECIPE = dict(batch_stages="", lr_batch=0, cooldown=0.4, lr_floor=0.1, momentum_warmup=0.0, sampled=0.0,
              momentum_cooldown=0.0, average=0.0, average_share=0.5, window_min=1, window_max=1728,
              mlp_ratio=4, attn_scale=0.12, rope_base=1024.0, logit_cap=30.0, logit_shift=5.0, logit_temp=7.5,
              head_betas=(0.5, 0.95), table_betas=(0.75, 0.9), scalar_betas=(0.9, 0.99), adam_eps=1e-10, head_lr=0.008,
              table_lr=0.3, scalar_lr=0.04, skip_lr=0.01, mix_lr=0.002, head_decay=0.75,
              table_decay=0.025, muon_lr=0.025, down_scale=2.0, muon_decay=1.2, muon_beta2=0.9, muon_momentum=0.95,
              muon_momentum_start=0.85, x_scale=2.0, w_scale=2.0**9, grad_scale=2.0**19, grad_comm="bf16")


def small_hp(**knobs) -> tg.Hyperparameters:
    names = {field.name for field in dataclasses.fields(tg.Hyperparameters)}
    recipe = {name: value for name, value in RECIPE.items() if name in names}
    return dataclasses.replace(tg.Hyperparameters(), **recipe | SMALL | knobs)


def small_model(hp: tg.Hyperparameters, seed: int = 0, awake: bool = False) -> tg.GPT:
    """`awake`: what starts at zero, and hides most of the model by it, gets random values instead, and the head larger
    ones."""
    torch.manual_seed(seed)
    model = tg.place(tg.GPT(hp, ROWS), "cpu").train()
    model.use_flex = False
    if awake:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name == "embed.weight" or name.startswith("bigrams") or "gate" in name:
                    p.normal_(std=0.3)
                elif p.ndim >= 2 and not p.any():
                    p.normal_(std=0.2 * p.size(-1) ** -0.5)
                elif p.ndim < 2:
                    p.add_(torch.rand(p.shape) * 0.3 + 0.1)
            model.skip_weights.copy_(torch.linspace(0.5, 1.5, len(model.skip_weights)))
    return model


def documents(hp: tg.Hyperparameters, count: int, seed: int = 0) -> torch.Tensor:
    """`count` training sequences of random bytes, a document start at every 100th token: input_ids and targets,
    (count, 2, T) int32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (count, hp.train_seq_len + 1), generator=generator)
    ids[:, ::100] = EOT
    return ids.int().unfold(1, hp.train_seq_len, 1).contiguous()


def trainer(model: tg.GPT, hp: tg.Hyperparameters, rank: int = 0, world_size: int = 1) -> tg.Trainer:
    return tg.Trainer(hp, model, tg.build_optimizers(model, hp), rank, world_size)


def plan(optimizer) -> list[tuple[str, int]]:
    """(collective, payload in bytes) of one step of more than one rank, in the order of the calls."""
    sizes = [bucket.size for bucket in optimizer.buckets]
    if isinstance(optimizer.exchange, tg.FP8Exchange):
        sent = [("all_to_all_single", n) for size in sizes for n in (size, size // tg.SCALE_BLOCK * 4)]
    else:
        sent = [("reduce_scatter_tensor", 2 * size) for size in sizes]
    return sent + [("all_gather_into_tensor", 2 * size) for size in sizes]


def window_tensor(blocks: int = 0) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32)


def join(processes, seconds: float) -> None:
    """Wait for the ranks to end, at most so long and until one fails; asserts that all exited with 0."""
    end = time.monotonic() + seconds
    while any(p.is_alive() for p in processes) and time.monotonic() < end and not any(p.exitcode for p in processes):
        time.sleep(0.1)
    codes = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
        process.join(10)
    assert codes == [0] * len(processes), f"exit codes of the ranks: {codes} (None: still running after {seconds} s)"
