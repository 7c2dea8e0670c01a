"""Does B differ from A? Tests, intervals, the runs still needed, and what looking again costs.

Where two sets share PAIRS seeds or more, the differences between runs of one seed decide, by Student's t: they began
with the same random numbers and read the same tokens in the same order, so most of a seed's luck cancels. Else Welch's
t decides. Which of the two it is follows from the seeds alone, before any loss is known.
"""

import bisect
import contextlib
import json
import math
import statistics
import warnings
from typing import NamedTuple

LEVEL = 0.95  # of every interval; a difference counts where its interval excludes 0
PAIRS = 3  # the interval of two differences is 12.7 standard errors wide to each side
MARGIN = 0.01  # nats, unless given: losses whose difference lies inside it with its interval count as equal
POWER = 0.8  # how likely the runs asked for tell a difference
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

def distributions():
    try:
        from scipy import stats

        warnings.filterwarnings("ignore", "Precision loss")  # of runs that hardly scatter
    except ImportError:
        raise Undecided("unchecked: scipy missing (./run.sh test installs it)") from None
    return stats

def t_quantile(df):
    return float(distributions().t.ppf((1 + LEVEL) / 2, df))

def p_below(losses, target):
    """One-sided t-test: how likely a mean this far below `target` is if the true mean lies at it."""
    if len(set(losses)) < 2:
        return None
    return float(distributions().ttest_1samp(losses, target, alternative="less").pvalue)

def prediction(losses):
    """(mean, half width) of the interval that holds the loss of one new run with 95 %."""
    n = len(losses)
    if n < 2:
        raise Undecided("an interval needs 2 runs at least, and there is 1")
    error = statistics.stdev(losses) * math.sqrt(1 + 1 / n)
    return statistics.fmean(losses), t_quantile(n - 1) * error

def estimate(gap, test):
    interval = test.confidence_interval(LEVEL)
    return Estimate(gap, float(interval.low), float(interval.high), float(test.pvalue))

def welch(a, b):
    """Of the means, by Welch's t-test. None below two values each, and where neither set scatters."""
    flat = len({*a}) == len({*b}) == 1
    if flat or min(len(a), len(b)) < 2:
        return None
    gap = statistics.fmean(b) - statistics.fmean(a)
    return estimate(gap, distributions().ttest_ind(b, a, equal_var=False))

def paired(a, b):
    """Of the mean of b[i] - a[i], by Student's t-test."""
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    if len(set(gaps)) == 1:  # as of equal sets: there is nothing to divide by
        return Estimate(gaps[0], gaps[0], gaps[0], float(gaps[0] == 0))
    return estimate(statistics.fmean(gaps), distributions().ttest_rel(b, a))

def rule(pairs):
    """What decides between two sets with so many seeds in common."""
    if pairs >= PAIRS:
        return f"the differences between runs of one seed decide ({pairs} pairs, Student's t)"
    return f"Welch's t decides, as there are {pairs} seeds in common: pairs decide from {PAIRS} on"

class Duel:
    """Two sets of runs, and how they are compared. `pairs`: runs of one seed, in the order of the seeds."""

    def __init__(self, a, b):
        self.a, self.b = a, b
        mine, other = ({run.seed: run for run in runs} for runs in (a, b))
        shared = sorted(mine.keys() & other.keys() - {None})  # public logs say nothing of seeds
        self.pairs = [(mine[seed], other[seed]) for seed in shared]
        self.by_pairs = len(self.pairs) >= PAIRS
        self.n = len(self.pairs) if self.by_pairs else min(len(a), len(b))
        self.size = f"{self.n} pairs of one seed" if self.by_pairs else f"n = {len(a)} and {len(b)}"

    @property
    def identical(self):
        """Did each seed of the smaller set give the other the same loss, to the last digit?"""
        shared = len(self.pairs) == min(len(self.a), len(self.b)) > 0
        return shared and all(x.val_loss == y.val_loss for x, y in self.pairs)

    def decide(self, value):
        """The difference of value(run), by the test that decides."""
        a, b = zip(*self.pairs) if self.by_pairs else (self.a, self.b)
        test = paired if self.by_pairs else welch
        return test([*map(value, a)], [*map(value, b)])

    def power(self, n):
        """How likely n runs of each show a difference, if the one seen and its scatter are the true ones: by pairs if
        these will decide then."""
        samples = [[run.val_loss for run in runs] for runs in (self.a, self.b)]
        if len(self.pairs) > 1:
            samples = [[y.val_loss - x.val_loss for x, y in self.pairs]]
        gap, *other = map(statistics.fmean, samples)
        parts = [statistics.variance(sample) / n for sample in samples]
        error = math.sqrt(sum(parts))
        if not error:
            return 1.0
        df = (n - 1) * sum(parts) ** 2 / sum(part**2 for part in parts)
        effect = abs(gap - sum(other)) / error
        return float(distributions().nct.sf(t_quantile(df), df, effect))

    def needed(self):
        """The least n, above that of today, at which this difference would be told with POWER. None above MOST_RUNS."""
        more = range(self.n + 1, MOST_RUNS + 1)
        found = bisect.bisect_left(more, POWER, key=self.power)
        return more[found] if found < len(more) else None

# ---- Looking again

def false_alarms(counts, by_pairs, draws=20_000):
    """How often one look at least, of those after so many runs of each, sees a difference where there is none: by so
    many draws of normal noise, the same in every call."""
    import numpy as np

    stats, rng = distributions(), np.random.default_rng(0)
    a, b = rng.standard_normal((2, draws, max(counts)))
    ever = np.zeros(draws, bool)
    for n in counts:
        if by_pairs:
            found = stats.ttest_1samp(a[:, :n], 0, axis=1)
        else:
            found = stats.ttest_ind(a[:, :n], b[:, :n], axis=1, equal_var=False)
        ever |= found.pvalue < 1 - LEVEL
    return float(ever.mean())

def look(file, duel):
    """Note a look at two sets in `file`, logs/looks.jsonl, and say what the looks so far make of this one. The same
    runs again are no new look."""
    names = {run.name for run in duel.a + duel.b}
    a, b = (str(runs[0].recipe) for runs in (duel.a, duel.b))
    rows, row = [], dict(n=duel.n, runs=sorted(names), a=a, b=b)
    with open(file, "a+", encoding="utf-8") as log:
        log.seek(0)
        for line in log:
            with contextlib.suppress(ValueError):  # half a line, of a full disk
                rows.append(json.loads(line))
        if row not in rows:
            log.write(f"\n{json.dumps(row)}\n")  # the line before may be half a one
            rows.append(row)
    met = [other for other in rows if other["a"] == a]
    ideas = {other["b"] for other in met}
    again = [other["n"] for other in met if other["b"] == b and names.intersection(other["runs"])]
    return warnings_of(again, len(ideas), duel.by_pairs)

def warnings_of(looks, ideas, by_pairs):
    """`looks`: after how many runs of each there was a look at these two; `ideas`: how many met this baseline."""
    said, least = [], PAIRS if by_pairs else 2  # below which nothing is decided
    counts = sorted({n for n in looks if n >= least})
    if len(counts) > 1:
        rate = 100 * false_alarms(counts, by_pairs)
        said.append(f"looks at these two after n = {', '.join(map(str, looks))}: where nothing differs, one of them "
                    f"says otherwise in {rate:.0f} % of cases, not 5 %")
    if ideas > 1:
        rate = 100 * (1 - LEVEL**ideas)
        said.append(f"{ideas} ideas have met this baseline: if none mattered, one at least would seem to in up to "
                    f"{rate:.0f} % of cases; try a winner again, with --first-seed=101")
    return said
