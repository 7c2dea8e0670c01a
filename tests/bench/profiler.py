"""Traces a few training steps of a script by torch.profiler, on one GPU or the CPU:

    python tests/bench/profiler.py --data_dir=DIR [--steps=5] [--script=train_gpt.py] [--tiny] [--knob=value ...]

The run has two steps more than are traced, which come first, and every schedule scales to it. Its folder in logs/ gets
trace.json, for https://ui.perfetto.dev, with the host's name left out; the 20 costliest kernels, by their own time, are
printed. Without CUDA the model is tiny. Exit code 2: bad input; else that of the run, 0 where it is complete."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, TINY, data_option, load_script, make_parser, parse_known, plain_batch, tg  # noqa: E402

SKIPPED = 2  # steps before the trace: one waits, one warms the profiler up


def costliest(profile, device: str) -> str:
    """Table of the 20 kernels, or on a CPU operators, with most time of their own."""
    order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)


def trace(run, steps: int) -> None:
    """Train `run`, whose steps SKIPPED + 1 to SKIPPED + `steps` are traced."""
    path, real = run.log.folder / "trace.json", run.trainer.train_step

    def ready(profile):
        profile.export_chrome_trace(str(path))
        path.write_text(re.sub(r'"host_name": "[^"]*"', '"host_name": ""', path.read_text()))
        run.log.say(costliest(profile, run.trainer.device.type))

    plan = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=plan, on_trace_ready=ready) as profile:
        def train_step(step, batch):
            loss = real(step, batch)
            profile.step()
            return loss

        run.trainer.train_step = train_step
        run.train()


def parse(argv: list[str]):
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5, help="of the trace")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="what is traced")
    args = parse_known(parser, argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: a trace has 1 step at least")
    return args


def profiled(args, data: str) -> int:
    """The exit code of the run."""
    module = load_script(args.script)
    tg.require(hasattr(module, "Trainer"), f"{args.script} has no Trainer, whose steps could be traced")
    sizes = TINY if args.tiny else ["--val_tokens=65536"]
    argv = plain_batch([*sizes, "--save=False", *args.knobs, f"--steps={SKIPPED + args.steps}", data], module)
    hp = module.parse_overrides(argv)
    module.check(hp, 1)
    run = module.Run(hp, *module.init_distributed(), argv, args.script.read_bytes())
    run.log.emit("warning", dict(text=f"{args.steps} steps are profiled, and slower for it", step=0))
    try:
        trace(run, args.steps)
        run.close(0, "complete")
        print(run.log.folder / "trace.json")
        return 0
    except module.RunEnd as end:
        run.close(end.code, str(end))
        raise


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        with data_option(args) as data:
            return profiled(args, data)
    except Exception as error:
        if not hasattr(error, "code"):  # the script's own RunEnd has one
            raise
        print(f"profiler: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
