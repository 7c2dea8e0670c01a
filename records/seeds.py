"""Trains one script with one seed after the other, in one process on one compiled graph. `trial` starts it, and the
bench of arms trains by its function.

    TRIAL_SCRIPT=my.py ./run.sh records/seeds.py --knob=value ...

run.sh takes this for the script, chooses preset and data, and hands standard input on. Behind MARK it prints what a run
would say of machine, data and knobs, as JSON; then for each seed, a line of standard input, the name of the complete
run in logs/. A run that does not end well ends this process, as it would its own.
"""

import contextlib
import gc
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

MARK = "\x1etrial "  # no line of a training begins with the record separator

def load(path):
    """The script as the module it would be for an import."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def context(script, argv):
    """What decides whether an earlier run counts beside those of now."""
    hp = script.parse_overrides(argv)
    script.check(hp, 1)
    corpus, (_, world_size, device) = script.load_corpus(hp, thorough=True), script.init_distributed()
    facts = corpus.facts  # a method in older scripts
    data, machine = facts(hp.val_tokens) if callable(facts) else facts, script.machine(device, world_size)
    return dict(machine, data=data, world_size=world_size, knobs=script.public_knobs(hp))

def train(script, argv, source, seed, facts):
    """One run: (0, what `facts` makes of it), or (the code that its own process would exit with, None). That would end
    here: what it left is cleared away, the compiled code kept."""
    code, found = 0, None
    try:
        found = facts(script.train_once([*argv, f"--seed={seed}"], source))
    except SystemExit as end:  # it has said why
        code = end.code or 1
    except Exception:
        traceback.print_exc()
        code = 1
    # not while an exception is handled, whose frames hold the run
    gc.unfreeze()  # the warm-up froze what was there
    gc.collect()
    if script.torch.cuda.is_available():
        # cuBLAS keeps a workspace in the memory of the first run's CUDA graphs, which would keep all of that
        with contextlib.suppress(AttributeError):  # private to torch
            script.torch._C._cuda_clearCublasWorkspaces()
        script.torch.cuda.empty_cache()
    return code, found

def main(argv):
    path = Path(os.environ["TRIAL_SCRIPT"])
    source, script = path.read_bytes(), load(path)
    script.torch._dynamo.config.recompile_limit = 64  # of one function for all seeds, and not for one
    try:
        print(MARK + json.dumps(context(script, argv)), flush=True)
    except script.RunEnd as end:  # train_once says these itself
        print(f"train_gpt: {end}", file=sys.stderr)
        sys.exit(end.code)
    for seed in map(str.strip, sys.stdin):
        code, run_id = train(script, argv, source, seed, lambda run: run.log.run_id)
        if code:
            sys.exit(code)
        print(MARK + run_id, flush=True)

if __name__ == "__main__":
    main(sys.argv[1:])
