"""Takes techniques out of train_gpt.py and prints the results as arms of tests/bench/arms.py, an option each:

    python tests/bench/without.py --list
    python tests/bench/arms.py --data_dir=DIR --preset=eighth --seeds=1,2 --arm=all:train_gpt.py \
        $(python tests/bench/without.py smear key_offset smear+key_offset)

A name with + takes out several together. What a knob switches off is that knob; the rest is taken out of a copy of the
script, in .cache/without/, by replacing lines. Exit code 2: an unknown technique, or lines that the script has no
more."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, make_form  # noqa: E402

FOLDER = Path(".cache", "without")
KNOBS = dict(
    average="--average=0",
    batch_stages="--batch_stages=2x20480",  # of the preset eighth: as many tokens
    candidates="--sampled=0",
    decay="--muon_decay=0,--head_decay=0,--table_decay=0",
    fp8="--fp8=False",
    momentum="--momentum_warmup=0,--momentum_cooldown=0",
    softcap="--logit_cap=30,--logit_shift=0",
    value_embeds="--value_pattern=..........",
)
LINES = dict(  # name: [(what stands there, what does without)]
    bigrams=[
        ("        self.bigrams = nn.Embedding(hp.bigram_rows, hp.bigram_dim)\n"
         "        nn.init.zeros_(self.bigrams.weight)\n", ""),
        ("        pairs = self.bigrams(bigram_index(rows, self.bigrams.num_embeddings))\n"
         "        x = self.embed(rows).type_as(pairs)  # (T, D)\n"
         "        bigrams = F.pad(pairs, (0, x.size(1) - pairs.size(1)))\n",
         "        x, bigrams = self.embed(rows), None\n        x = x.bfloat16() if x.is_cuda else x\n"),
        (" + self.lambdas[2] * bigrams\n", "\n"), ("        model.bigrams.bfloat16()\n", "")],
    block_scale=[("torch.tensor([1.1, 0.0, 0.05])", "torch.tensor([1.0, 0.0, 0.05])")],
    key_offset=[("        if self.window == \"L\":\n            k = offset_keys(k)\n", "")],
    late_input=[("            if i == self.hp.late_layer:\n                seen = norm(x)\n", "")],
    mix_head=[("        return norm(x + self.mix_head(x, streams))\n", "        return norm(x)\n")],
    mix_input=[("            if i == len(self.blocks) - 1:\n                x = x + self.mix_input(x, streams)\n", "")],
    mixes=[  # but for the backout, which is older
        ("        self.mix_input = Mix(hp.model_dim, [0.0] * len(backout))\n"
         "        self.mix_head = Mix(hp.model_dim, backout)\n",
         "        self.backout = nn.Parameter(torch.full((1,), 0.5))\n"),
        ("            if i == len(self.blocks) - 1:\n                x = x + self.mix_input(x, streams)\n", ""),
        ("                seen = norm(x)\n        return norm(x + self.mix_head(x, streams))\n",
         "                late, seen = x, norm(x)\n        return norm(x - self.backout.type_as(x) * late)\n")],
    linear_window=[  # three widths in equal spans, as the speedrun's, of nearly the same mean
        ("    return window_scheduler(step, hp.steps, hp.window_min, hp.window_max)\n",
         "    widest = math.ceil(hp.window_max / BLOCK)\n"
         "    return math.ceil(widest * (0.2, 0.5, 1.0)[3 * step // (hp.steps + 1)])\n")],
    more_skips=[  # but for one, from the last layer but one of the encoder
        ("                x = x + self.skip_weights[i - half] * skips.pop()\n",
         "                pair = skips.pop()\n"
         "                x = x + self.skip_weights[1] * pair if i == half + 1 else x\n")],
    normuon=[("    update = normalize_neurons(update, second_moment, beta2)\n", "")],
    out_init=[("self.out = uniform_matrix(hp.model_dim, hp.model_dim)",
               "self.out = nn.Parameter(torch.zeros(hp.model_dim, hp.model_dim))")],
    pointer=[
        ("        self.pointer = Pointer(hp)\n", ""),
        ("        copied = self.pointer(x, input_ids, targets, self.use_flex)\n", ""),
        ("self.losses(x, copied, targets, *", "self.losses(x, 0.0, targets, *"),
        ("place == own[:, None], place == pointer", "place == own[:, None]"),
        ("every, found, pointed = self", "every, found = self"),
        ("(found + copied * pointed).log()", "found.log()"),
        ("        model.pointer.forward = compiled(model.pointer.forward)\n", ""),
        ("            copied = model.pointer(x, input_ids, targets, model.use_flex)\n", ""),
        ("x[part], copied[part], t", "x[part], 0.0, t")],
    polar_express=[("    for a, b, c in QUINTICS:\n", "    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:\n")],
    skips=[("            if i >= half and skips:  # of an odd count of layers the last one has no partner\n"
            "                x = x + self.skip_weights[i - half] * skips.pop()\n", "")],
    smear=[("        self.smear = nn.Parameter(torch.zeros(1))\n", ""),
           ("norm(x + self.smear.type_as(x) * previous(x))", "norm(x)")],
    tying=[("        self.lm_head.weight = self.embed.weight  # optimizers call it embed, knobs head\n",
            "        nn.init.normal_(self.lm_head.weight, std=0.005)\n"),
           ("        kinds[kind][\"params\"].append(p)\n",
            "        kinds[\"embed\" if name == \"lm_head.weight\" else kind][\"params\"].append(p)\n")],
    value_gates=[("            v = v + 2 * gate[..., None] * value_embed.view_as(v)\n",
                  "            v = v + value_embed.view_as(v)\n")],
    x0=[(" + self.lambdas[1] * x0", "")],
)


def without(source: str, names: list[str]) -> tuple[str, str]:
    """(script, knobs) without the techniques. ValueError for lines that are not there once."""
    for name in names:
        for old, new in LINES.get(name, ()):
            if source.count(old) != 1:
                raise ValueError(f"{name}: the script has {source.count(old)} times, not once: {old.strip()!r}")
            source = source.replace(old, new)
    return source, ",".join(KNOBS[name] for name in names if name in KNOBS)


def main(argv: list[str]) -> int:
    parser = make_form(__doc__)
    parser.add_argument("arms", nargs="*", metavar="NAME[+NAME...]", help="what an arm does without")
    parser.add_argument("--list", action="store_true", help="the names")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="other than the project's")
    args = parser.parse_args(argv)
    if args.list:
        print(*sorted([*KNOBS, *LINES]), sep="\n")
    source = args.script.read_text(encoding="utf-8")
    for arm in args.arms:
        if unknown := [name for name in arm.split("+") if name not in KNOBS and name not in LINES]:
            parser.error(f"{', '.join(unknown)} cannot be taken out: --list names what can")
        try:
            script, knobs = without(source, arm.split("+"))
        except ValueError as error:
            parser.error(str(error))
        path = FOLDER / f"{arm.replace('+', '-')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        print(f"--arm=no-{path.stem}:{path}" + (f",{knobs}" if knobs else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
