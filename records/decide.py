"""Does B differ from A? Tests, intervals, the runs still needed, and what looking again costs.

Where two sets share PAIRS seeds or more, the differences between runs of one seed decide, by Student's t: they began
with the same random numbers and read the same tokens in the same order, so most of a seed's luck cancels. Else Welch's
t decides. Which of the two it is follows from the seeds alone, before any loss is known.
"""

import bisect
import contextlib
import hashlib
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import NamedTuple

LEVEL = 0.95  # of every interval; a difference counts where its interval excludes 0
PAIRS = 3  # the interval of two differences is 12.7 standard errors wide to each side
MARGIN = 0.01  # nats, unless given: losses whose difference lies inside it with its interval count as equal
CHANCES = ((0.5, "an even chance"), (0.8, "80 %"))
MOST_RUNS = 10_000  # more are not worth saying

class Undecided(Exception):
    """Exit code 3: more runs, or a library, are needed."""

class Estimate(NamedTuple):
    """A difference B - A, its interval, and the two-sided p of no difference."""
    gap: float
    low: float
    high: float
    p: float

    apart = property(lambda self: not self.low <= 0 <= self.high)

    def inside(self, margin: float) -> bool:
        return -margin < self.low and self.high < margin

def distributions():
    try:
        from scipy import stats

        warnings.filterwarnings("ignore", "Precision loss")  # of runs that hardly scatter
    except ImportError:
        raise Undecided("unchecked: scipy missing (./run.sh test installs it)") from None
    return stats

def p_below(losses: list[float], target: float) -> float | None:
    """One-sided t-test: how likely a mean this far below `target` is if the true mean lies at it."""
    if len(set(losses)) < 2:
        return None
    return float(distributions().ttest_1samp(losses, target, alternative="less").pvalue)

def prediction(losses: list[float]) -> tuple[float, float]:
    """(mean, half width) of the interval that holds the loss of one new run with 95 %."""
    if len(losses) < 2:
        raise Undecided("an interval needs 2 runs at least, and there is 1")
    t = float(distributions().t.ppf((1 + LEVEL) / 2, len(losses) - 1))
    return statistics.fmean(losses), t * statistics.stdev(losses) * math.sqrt(1 + 1 / len(losses))

def estimate(gap: float, test) -> Estimate:
    interval = test.confidence_interval(LEVEL)
    return Estimate(gap, float(interval.low), float(interval.high), float(test.pvalue))

def welch(a: list[float], b: list[float]) -> Estimate | None:
    """Of the means, by Welch's t-test. None below two values each, and where neither set scatters."""
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    return estimate(statistics.fmean(b) - statistics.fmean(a), distributions().ttest_ind(b, a, equal_var=False))

def paired(a: list[float], b: list[float]) -> Estimate | None:
    """Of the mean of b[i] - a[i], by Student's t-test. None below two pairs."""
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    if len(gaps) < 2:
        return None
    if len(set(gaps)) == 1:  # as of equal sets: there is nothing to divide by
        return Estimate(gaps[0], gaps[0], gaps[0], float(gaps[0] == 0))
    return estimate(statistics.fmean(gaps), distributions().ttest_rel(b, a))

def rule(pairs: int) -> str:
    """What decides between two sets with so many seeds in common."""
    if pairs >= PAIRS:
        return f"the differences between runs of one seed decide ({pairs} pairs, Student's t)"
    return f"Welch's t decides, as there are {pairs} seeds in common: pairs decide from {PAIRS} on"

class Duel:
    """Two sets of runs, and how they are compared. `pairs`: runs of one seed, in the order of the seeds."""

    def __init__(self, a: list, b: list):
        self.a, self.b = a, b
        mine, other = ({run.seed: run for run in runs if run.seed is not None} for runs in (a, b))
        self.pairs = [(mine[seed], other[seed]) for seed in sorted(mine.keys() & other.keys())]
        self.by_pairs = len(self.pairs) >= PAIRS

    n = property(lambda self: len(self.pairs) if self.by_pairs else min(len(self.a), len(self.b)))
    size = property(lambda self: f"{self.n} pairs of one seed" if self.by_pairs
                    else f"n = {len(self.a)} and {len(self.b)}")

    @property
    def identical(self) -> bool:
        """Did each seed of the smaller set give the other the same loss, to the last digit?"""
        shared = len(self.pairs) == min(len(self.a), len(self.b)) > 0
        return shared and all(x.val_loss == y.val_loss for x, y in self.pairs)

    def values(self, value) -> tuple[list, list]:
        """value(run) of A and of B: of the pairs where these decide."""
        runs = zip(*self.pairs) if self.by_pairs else (self.a, self.b)
        a, b = ([value(run) for run in each] for each in runs)
        return a, b

    def decide(self, value) -> Estimate | None:
        """The difference of value(run), by the test that decides."""
        return (paired if self.by_pairs else welch)(*self.values(value))

    def power(self, n: int) -> float:
        """How likely n runs of each show a difference, if the one seen and its scatter are the true ones: by pairs if
        these will decide then."""
        stats, samples = distributions(), [[run.val_loss for run in runs] for runs in (self.a, self.b)]
        if len(self.pairs) > 1:
            samples = [[y.val_loss - x.val_loss for x, y in self.pairs]]
        gap, *other = (statistics.fmean(sample) for sample in samples)
        parts = [statistics.variance(sample) / n for sample in samples]
        if not sum(parts):
            return 1.0
        df = (n - 1) * sum(parts) ** 2 / sum(part**2 for part in parts)
        return float(stats.nct.sf(stats.t.ppf((1 + LEVEL) / 2, df), df, abs(gap - sum(other)) / math.sqrt(sum(parts))))

    def needed(self, chance: float) -> int | None:
        """The least n, above that of today, whose power is `chance`. None above MOST_RUNS."""
        more = range(self.n + 1, MOST_RUNS + 1)
        found = bisect.bisect_left(more, chance, key=self.power)
        return more[found] if found < len(more) else None

    def runs_still_needed(self) -> str:
        """A sentence with the counts of runs at which this difference, if it is the true one, would likely be told."""
        a, b = map(statistics.fmean, self.values(lambda run: run.val_loss))
        counts = [(name, self.needed(chance)) for chance, name in CHANCES]
        shown = " and ".join(f"{f'n = {n}' if n else f'over {MOST_RUNS} runs'} for {name}" for name, n in counts)
        return f"if {b - a:+.4f} is the true difference, telling it takes {shown}"

# ---- Looking again

def false_alarms(counts: list[int], by_pairs: bool, draws: int = 20_000) -> float:
    """How often one look at least, of those after so many runs of each, sees a difference where there is none: by so
    many draws of normal noise, the same in every call."""
    import numpy as np

    stats, rng = distributions(), np.random.default_rng(0)
    a, b = rng.standard_normal((2, draws, max(counts)))
    ever = np.zeros(draws, bool)
    for n in counts:
        test = stats.ttest_1samp(a[:, :n], 0, axis=1) if by_pairs else stats.ttest_ind(
            a[:, :n], b[:, :n], axis=1, equal_var=False)
        ever |= test.pvalue < 1 - LEVEL
    return float(ever.mean())

def key(run) -> str:
    """What a set of runs is, seeds aside: script, knobs, data and machine."""
    return hashlib.sha256(json.dumps([run.recipe, run.start["data"], run.gpu, run.gpu_count]).encode()).hexdigest()[:16]

class Looks(NamedTuple):
    """At two sets so far, this one included: (n, names of the runs) of each. `ideas`: sets that A has met as baseline.
    """
    seen: list[tuple]
    ideas: int

    def false_alarms(self, by_pairs: bool) -> float:
        """How often one of the looks at least is wrong where nothing differs. Those that share runs depend on each
        other, and others, of fresh seeds, do not."""
        groups = []  # of looks that share runs
        for seen in self.seen:
            own = [group for group in groups if any({*names} & {*seen[1]} for _, names in group)]
            groups = [group for group in groups if group not in own] + [sum(own, [seen])]
        least = PAIRS if by_pairs else 2
        counts = [sorted({n for n, _ in group if n >= least}) for group in groups]
        return 1 - math.prod(1 - false_alarms(own, by_pairs) for own in counts if own)

    def sentences(self, by_pairs: bool) -> list[str]:
        said, rate = [], 100 * self.false_alarms(by_pairs) if len(self.seen) > 1 else 0
        if round(rate) > 5:
            shown = ", ".join(str(n) for n, _ in self.seen)
            said.append(f"look {len(self.seen)} at these two, after n = {shown}: where nothing differs, one of these "
                        f"looks says otherwise in {rate:.0f} % of cases, not 5 %")
        if self.ideas > 1:
            rate = 100 * (1 - LEVEL**self.ideas)
            said.append(f"{self.ideas} ideas have met this baseline: if none mattered, one at least would seem to in "
                        f"up to {rate:.0f} % of cases; try a winner again, with --first-seed=101")
        return said

def look(file: Path, duel: Duel) -> Looks:
    """Note a look at two sets in `file`, logs/looks.jsonl, and say how many there were. One that sees the same runs
    again is none. Runs that do not lie beside the file, as those of a record, leave no note."""
    row = dict(n=duel.n, runs=sorted(run.name for run in duel.a + duel.b))
    if not all(run.start and run.folder.resolve().parent == file.parent.resolve() for run in duel.a + duel.b):
        return Looks([(duel.n, row["runs"])], 1)
    row |= dict(a=key(duel.a[0]), b=key(duel.b[0]))
    rows = []
    with open(file, "a+", encoding="utf-8") as log:
        log.seek(0)
        for line in log:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line, of a full disk
                found = json.loads(line)
                rows.append({name: found[name] for name in row})
        if row not in rows:
            log.write(json.dumps(row) + "\n")
            rows.append(row)
    both, met = {row["a"], row["b"]}, {other["b"] for other in rows if other["a"] == row["a"]}
    return Looks([(other["n"], other["runs"]) for other in rows if {other["a"], other["b"]} == both], len(met))
