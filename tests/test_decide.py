"""records/decide.py: what decides between two sets, against slow references, simulation and real records."""

import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from forge import ROOT
from reference import PUBLISHED, slow_welch, t_below, t_quantile
from scipy import stats

sys.path.append(str(ROOT / "records"))
import decide  # noqa: E402
import runs as reading  # noqa: E402

CLAIMS = reading.read_record(next((ROOT / "records").glob("*_Claims"))).sets


def runs(losses, first_seed=1):
    return [SimpleNamespace(seed=first_seed + i, val_loss=loss) for i, loss in enumerate(losses)]


def duel(a, b, apart=False):
    return decide.Duel(runs(a), runs(b, 100 if apart else 1))


def loss(run):
    return run.val_loss


# ---- Tests and intervals


def test_published_losses():
    assert decide.p_below(PUBLISHED, 3.28) == pytest.approx(0.00066906, abs=5e-9)
    t = (3.28 - statistics.fmean(PUBLISHED)) / (statistics.stdev(PUBLISHED) / math.sqrt(13))
    assert 1 - t_below(t, 12) == pytest.approx(0.00066906, abs=5e-9)
    assert decide.p_below([3.27] * 3, 3.28) is None


@pytest.mark.parametrize("cut, shift", [(6, 0), (3, 0.002), (10, -0.01)])
def test_welch_and_prediction(cut, shift):
    a, b = PUBLISHED[:cut], [x + shift for x in PUBLISHED[cut:]]
    assert decide.welch(a, b) == pytest.approx(slow_welch(a, b), rel=1e-5, abs=1e-9)
    mean, half = decide.prediction(a)
    assert mean == pytest.approx(sum(a) / cut)
    assert half == pytest.approx(t_quantile(0.975, cut - 1) * statistics.stdev(a) * math.sqrt(1 + 1 / cut), rel=1e-6)
    assert decide.welch(a[:1], b) is None


# ---- Which test decides


@pytest.mark.parametrize("arm, by_welch, by_pairs", [
    ("cooldown_1.5", 0.134, 0.002), ("window_record_21", 0.054, 0.030), ("fp8_off", 0.112, 0.071)])
def test_pairs_see_what_welch_does_not(arm, by_welch, by_pairs):
    """On runs of a record; expected values by hand."""
    base, other = ({run.seed: run.val_loss for run in CLAIMS[label]} for label in ("runs", f"arms/{arm}"))
    a, b = ([values[seed] for seed in (1, 2, 3)] for values in (base, other))
    found = decide.Duel(CLAIMS["runs"], CLAIMS[f"arms/{arm}"])
    assert found.by_pairs and found.n == 3 and not found.identical
    assert (found.decide(loss).p, decide.welch(a, b).p) == pytest.approx((by_pairs, by_welch), abs=5e-4)
    gaps = [y - x for x, y in zip(a, b)]
    half = t_quantile(0.975, 2) * statistics.stdev(gaps) / math.sqrt(3)
    ends = statistics.fmean(gaps) - half, statistics.fmean(gaps) + half
    assert found.decide(loss)[1:3] == pytest.approx(ends, rel=1e-5)


def test_pairs_decide_from_three_seeds_on_whatever_the_losses():
    a, b = [3.0, 3.1, 3.4, 3.2], [2.9, 3.0, 3.3, 3.15]
    for n in (2, 3, 4):
        assert duel(a[:n], b[:n]).decide(loss) == (decide.paired if n >= 3 else decide.welch)(a[:n], b[:n])
    shifted = decide.Duel(runs(a), runs(b, 2))  # of the seeds 2, 3 and 4 alone
    assert shifted.n == 3 and shifted.decide(loss) == decide.paired(a[1:], b[:3])
    assert not duel(a, b, apart=True).by_pairs
    assert "seed decide (3 pairs" in decide.rule(3) and "Welch" in decide.rule(2)


def test_one_run_of_each_or_no_scatter_has_no_interval():
    assert duel([3.0], [3.1]).decide(loss) is None and decide.welch([3.0, 3.0], [3.1, 3.1]) is None
    assert decide.paired([3.0, 3.5, 4.0], [3.0, 3.5, 4.0]) == (0, 0, 0, 1)
    same = decide.paired([3.0, 3.5, 4.0], [3.25, 3.75, 4.25])
    assert same == (0.25, 0.25, 0.25, 0) and same.apart


def test_identical_means_every_seed_of_both_to_the_last_digit():
    a = [3.0, 3.1, 3.4]
    assert duel(a, a).identical and duel(a[:1], a[:1]).identical
    assert not duel(a, [3.0, 3.1, math.nextafter(3.4, 4)]).identical
    assert duel(a, a[:2]).identical and not duel(a, a, apart=True).identical


# ---- Runs still needed


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("shift, sd", [(0.02, 0.02), (0.02, 0.01), (0.005, 0.006)])
def test_power_is_how_often_simulated_runs_separate(pairs, shift, sd):
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2, 3))
    noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, ddof=1, keepdims=True)  # of sd 1, mean 0
    a = 3 + (0.1 if pairs else sd) * noise[0]
    b = (a if pairs else 3) - shift + sd * noise[1]
    found = duel(a.tolist(), b.tolist(), apart=not pairs)
    n = found.needed()
    assert found.power(n) >= 0.8 > found.power(n - 1) or n == 4
    if pairs:
        won = stats.ttest_1samp(rng.normal(-shift, sd, (4000, n)), 0, axis=1).pvalue < 0.05
    else:
        draws = rng.normal(3, sd, (4000, n)), rng.normal(3 - shift, sd, (4000, n))
        won = stats.ttest_ind(*draws, axis=1, equal_var=False).pvalue < 0.05
    # 5 standard errors of 4,000 draws, and what Welch's own degrees of freedom scatter
    assert won.mean() == pytest.approx(found.power(n), abs=0.04 if pairs else 0.08)


def test_what_is_out_of_reach_is_said_so():
    assert duel([3.0, 3.1, 3.2], [3.1, 3.2, 3.0]).needed() is None


def test_two_pairs_ask_for_pairs():
    """From three on these decide, and Welch's t would ask for over a hundred."""
    assert 3 < duel([3.0, 3.1], [3.02, 3.11]).needed() < 9
    assert duel([3.0, 3.1], [3.02, 3.11], apart=True).needed() > 100


# ---- Looking again


def test_false_alarms_grow_with_looks():
    """One look is wrong in 5 % of cases, and Welch's, of three runs, more seldom; several are wrong more often."""
    assert decide.false_alarms([3], True) == pytest.approx(0.05, abs=0.006)
    assert decide.false_alarms([3], False) < 0.05
    rng, wrong = np.random.default_rng(5), 0
    for gaps in rng.normal(size=(1000, 6)):
        wrong += any(stats.ttest_1samp(gaps[:n], 0).pvalue < 0.05 for n in (3, 4, 5, 6))
    assert wrong / 1000 == pytest.approx(decide.false_alarms([3, 4, 5, 6], True), abs=0.05)


def logged(count, knob, first_seed=1):
    return [SimpleNamespace(seed=seed, recipe=("script", knob), name=f"{knob}-{seed}")
            for seed in range(first_seed, first_seed + count)]


def test_looks_and_ideas_are_counted(tmp_path):
    """The same runs again are no new look, and runs of other seeds are no look at these."""
    file = tmp_path / "looks.jsonl"
    look = lambda count, *knob: decide.look(file, decide.Duel(logged(count, "base"), logged(count, *knob)))
    rate = 100 * decide.false_alarms([3, 5], True)
    assert look(3, "one") == look(3, "one") == []
    said, = look(5, "one")
    assert said.startswith("looks at these two after n = 3, 5: ") and f"in {rate:.0f} % of cases" in said
    fresh = decide.look(file, decide.Duel(logged(4, "base", 101), logged(4, "one", 101)))
    assert fresh == []
    file.write_text(file.read_text() + '\n{"a": "half a li')  # a disk was full
    said, = look(3, "two")
    assert said.startswith("2 ideas have met this baseline") and f"up to {100 * (1 - 0.95**2):.0f} % of cases" in said
    assert look(2, "one")[:-1] == [decide.warnings_of([3, 5, 2], 1, False)[0]]
