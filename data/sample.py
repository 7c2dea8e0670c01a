"""Prints a text in the words of a trained model.

    python data/sample.py                                            the newest weights of logs/, a document's start
    python data/sample.py --prompt="The river" --tokens=100          after a prompt
    python data/sample.py --weights=logs/RUN/weights.pt --temperature=0 --bpe_file=gpt2.tiktoken

weights.pt holds numbers and knobs only. The model is built by the train_gpt.py beside it, the very script that ran, so
weights of any age go with their own code. That file is run as Python: name no folder whose script you would not start.
What is used of it: Hyperparameters (train_seq_len, val_seq_len, window_max), GPT(hp, vocab_size) with features, logits,
last_row and use_flex, its pointer if it has one, place, BLOCK and EOT.

GPT-2's vocabulary is --bpe_file, else what data/tokenize_text.py kept beside the shards, else tiktoken's own.

Exit codes: 0 printed; 2 bad knob, or no vocabulary; 5 no usable weights, or no script that fits them; 6 no memory; 130
stopped by Ctrl-C.
"""
import contextlib
import math
import sys
import types
import zipfile
from pathlib import Path

from screen import ROOT, end_by, quit_at_ctrl_c, say

if __name__ == "__main__":
    quit_at_ctrl_c("no sample: stopped.")

import tokenize_text  # noqa: E402
import torch  # noqa: E402
from tokenize_text import Knobs, Problem  # noqa: E402

CONTEXT = 2048  # tokens that the model sees of what came before; nothing is cached, so more would be slow
DEFAULT_TOKENS = {"gpt2": 50, "bytes": 200}  # about 200 characters
KEYS = {"model", "knobs", "encoding", "vocab_size"}  # what a run saves


class Unusable(Problem):
    """No weights, or none that a script fits, told in one sentence; exit code 5."""


def reason(error):
    """What an exception says, on one line: its type and its first words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def no_memory(error):
    """Whether memory ran out: torch says so of a CPU's in a RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def load(path):
    """What a run saved: {model: {name: tensor}, knobs, encoding, vocab_size}. Unusable if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load accepts flipped bits; the archive has checksums
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not KEYS <= saved.keys():
            raise ValueError(f"it does not hold {', '.join(sorted(KEYS))}")
        if saved["encoding"] not in DEFAULT_TOKENS:
            raise ValueError(f"encoding {saved['encoding']!r} is none of {', '.join(DEFAULT_TOKENS)}")
        for key in ("model", "knobs"):
            if not isinstance(saved[key], dict):
                raise ValueError(f"its {key} is no table of names")
        for name, tensor in saved["model"].items():
            wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
            if not wide.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        return saved
    except Exception as error:  # every kind of damage raises another
        if no_memory(error):
            raise
        raise Unusable(f"{path} is missing, damaged or no weights ({reason(error)})") from None


def find(weights):
    """(path, what it holds) of the file named, or for `latest` of the newest readable one."""
    if weights != "latest":
        return Path(weights), load(weights)
    for path in sorted(Path("logs").glob("*/weights.pt"), reverse=True):  # run folders are named by date
        try:
            return path, load(path)
        except Unusable as problem:
            say(f"sample.py: {problem}; the next older one is tried.", sys.stderr)
    raise Unusable("there is no usable logs/*/weights.pt here; train first, or name a file as --weights")


def script_beside(weights):
    """The train_gpt.py beside weights; a link to weights has it where it leads, or else beside itself."""
    places = [path.with_name("train_gpt.py") for path in (weights.resolve(), weights)]
    return next(filter(Path.is_file, places), places[-1])


def load_script(path):
    """The script of a run folder as a module. Importing it has no effects; no compiled copy is left beside it."""
    if not path.is_file():
        raise Unusable(f"{path} is missing, the script that builds the model; put the one that trained it there")
    script = types.ModuleType("train_gpt_of_weights")
    script.__file__ = str(path)
    sys.modules[script.__name__] = script  # where dataclasses look for it
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(script))
    except (Exception, SystemExit) as error:  # one that ends itself would end this, as if a sample had been printed
        raise Unusable(f"{path} cannot be imported ({reason(error)}); put the script there that trained it") from None
    return script


@contextlib.contextmanager
def fitting(path):
    """Turns what goes wrong between weights and script into Unusable."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a name that is not there, a shape that differs, whatever it raises
        if no_memory(error):
            raise
        raise Unusable(f"{path} does not fit the train_gpt.py beside it ({reason(error)}); put the script there that "
                       "trained it") from error


def build(script, saved):
    """(hp, model): the weights in the model of their own script, on the GPU if there is one."""
    hp = script.Hyperparameters(**saved["knobs"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:  # drawing the initial numbers takes seconds on a CPU
        model = script.GPT(hp, saved["vocab_size"])
    model.load_state_dict(saved["model"])
    model = script.place(model, device).eval()
    model.use_flex = False  # dense attention needs no compiler
    return hp, model


def choose(logits, temperature, generator):
    """An id from logits (V,): the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


def next_logits(model, input_ids, window, at):
    """Logits (V,) of the token after input_ids[at]. Where the model has a pointer, the share of the row after the last
    token's goes to what that finds in the document."""
    x = model.features(input_ids, window)
    logits = model.logits(x[at : at + 1])[0]
    if not hasattr(model, "pointer"):
        return logits
    shares = logits.softmax(0)
    if hasattr(model.pointer, "weights"):  # scripts up to 2026-11-27, with chunks of the sequence
        weights, ids = model.pointer.weights(x, input_ids)
        weights, rows = weights.flatten(0, 1)[at], ids[at // weights.size(1)]
    else:
        queries, keys, mask = model.pointer.scored(x, input_ids)
        places, rows = torch.arange(len(x), device=x.device), input_ids
        scores = (keys @ queries[at]).float().where(mask.mask_mod(0, 0, places[at], places), -math.inf)
        weights = torch.cat((scores.new_zeros(1), scores)).softmax(0)[1:]  # e^0: copy nothing
    rows = rows.clamp(max=model.last_row)
    return shares.index_add(0, rows, shares[model.last_row + 1] * weights).log()


@torch.no_grad()
def generate(script, hp, model, ids, count, temperature, seed):
    """Up to `count` ids that follow `ids`; where the document ends before, its end is the last of them."""
    device = next(model.parameters()).device
    window = torch.tensor(math.ceil(hp.window_max / script.BLOCK), dtype=torch.int32, device=device)
    longest = min(CONTEXT, hp.train_seq_len, hp.val_seq_len)
    generator = torch.Generator().manual_seed(seed)
    new = []
    while len(new) < count and new[-1:] != [model.last_row]:
        context = (ids + new)[-longest:]
        padding = [script.EOT] * (-len(context) % script.BLOCK)  # later documents: nothing before them sees them
        input_ids = torch.tensor(context + padding, dtype=torch.int32, device=device)
        logits = next_logits(model, input_ids, window, len(context) - 1)
        # further rows are no tokens, and no text begins with its end
        new.append(choose(logits[: model.last_row + (len(ids + new) > 1)].float().cpu(), temperature, generator))
    return new


def ranks_beside(data_dir, knobs):
    """The ranks kept beside the shards, of which a run knows no more than their folder's name; None if there are none.
    """
    name = str(knobs.get("data_dir", ""))
    folders = [data_dir] if data_dir else [name, ROOT / name, ROOT / "data" / name] if name else []
    return next(filter(None, (tokenize_text.kept_ranks(Path(folder)) for folder in folders)), None)


def parse(argv):
    parser = Knobs(description="A text in the words of a trained model.", allow_abbrev=False)
    add, refuse = parser.add_argument, parser.error
    add("--weights", default="latest", metavar="FILE", help="weights.pt of a run folder (default: latest, the newest)")
    add("--prompt", default="", metavar="TEXT", help="what the text begins with (default: a document's start)")
    add("--tokens", type=int, metavar="N", help="at most so many new tokens (default: 50 of GPT-2, 200 bytes)")
    add("--temperature", type=float, default=0.8, metavar="T", help="below 1 bolder choices, 0 the likeliest (0.8)")
    add("--seed", type=int, default=1, metavar="N", help="of the random choices (1)")
    add("--bpe_file", "--bpe-file", metavar="FILE", help="local rank file of GPT-2 instead of tiktoken's own")
    add("--data_dir", "--data-dir", metavar="DIR", help="the shards, if not where the run's name of them leads to")
    args = parser.parse_args(argv)
    if args.tokens is not None and args.tokens < 1:
        refuse(f"--tokens must be at least 1, and is {args.tokens}")
    if not (args.temperature == 0 or 0.01 <= args.temperature <= 100):
        refuse(f"--temperature must be 0 or lie between 0.01 and 100, and is {args.temperature}")
    if args.data_dir and not Path(args.data_dir).is_dir():
        refuse(f"--data_dir={args.data_dir} is no folder: name that of the shards, or leave it out")
    if not 0 <= args.seed < 2**63:
        refuse(f"--seed must lie between 0 and 2^63 - 1, and is {args.seed}")
    return args


def run(args):
    path, saved = find(args.weights)
    bpe_file = args.bpe_file
    if saved["encoding"] == "gpt2" and not bpe_file:
        bpe_file = ranks_beside(args.data_dir, saved["knobs"])
    try:
        encode, decode = tokenize_text.codec(saved["encoding"], bpe_file)
    except Problem as problem:
        raise Problem(f"{problem}, or as --data_dir the folder of shards that keeps it") from None
    script = load_script(script_beside(path))
    count = args.tokens or DEFAULT_TOKENS[saved["encoding"]]
    with fitting(path):
        hp, model = build(script, saved)
        ids = [script.EOT, *encode(args.prompt).tolist()]
        new = generate(script, hp, model, ids, count, args.temperature, args.seed)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what this terminal cannot show
    say(f"sample: {args.prompt}{decode(new)}")
    return 0


def main(argv=None):
    try:
        return run(parse(argv))
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    except Unusable as problem:
        code, message = 5, problem
    except Problem as problem:
        code, message = 2, problem
    except Exception as error:
        if not no_memory(error):
            raise
        code, message = 6, "memory ran out; a shorter --prompt needs less, or CUDA_VISIBLE_DEVICES= takes the CPU"
    say(f"no sample: {message}.", sys.stderr)
    return code


if __name__ == "__main__":
    end_by(main)
