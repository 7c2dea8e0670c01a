"""records/decide.py: what decides between two sets, against slow references, simulation and real records."""

import json
import math
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from forge import ROOT
from reference import slow_welch, t_below, t_quantile
from scipy import stats

sys.path.append(str(ROOT / "records"))
import decide  # noqa: E402
import runs as reading  # noqa: E402

CLAIMS = reading.read_record(next((ROOT / "records").glob("*_Claims"))).sets
# The published trial of GELU for ReLU^2, by its means and intervals: three runs of each that were not paired.
GELU = [1.8100, 1.8100 + 0.0146, 1.8100 - 0.0146], [1.7902, 1.7902 + 0.0219, 1.7902 - 0.0219]


def runs(losses, first_seed=1):
    return [SimpleNamespace(seed=first_seed + i, val_loss=loss) for i, loss in enumerate(losses)]


def duel(a, b, apart=False):
    return decide.Duel(runs(a), runs(b, 100 if apart else 1))


def loss(run):
    return run.val_loss


# ---- Tests and intervals

PUBLISHED = [3.2791, 3.2773, 3.2783, 3.2775, 3.2781, 3.2775, 3.2793, 3.2772, 3.2769, 3.2775, 3.2806, 3.2779, 3.2816]


def test_published_losses():
    assert statistics.fmean(PUBLISHED) == pytest.approx(3.27836923, abs=5e-9)
    assert statistics.stdev(PUBLISHED) == pytest.approx(0.00141562, abs=5e-9)
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
    ("cooldown_1.5", 0.134, 0.002), ("window_record_21", 0.054, 0.030), ("grad_comm_fp8", 0.097, 0.021),
    ("fp8_off", 0.112, 0.071), ("sequences_64k", 0.358, 0.174)])
def test_pairs_see_what_welch_does_not(arm, by_welch, by_pairs):
    """On runs of a record; expected values by scipy, and by hand below."""
    base, other = ({run.seed: run.val_loss for run in CLAIMS[label]} for label in ("runs", f"arms/{arm}"))
    a, b = ([values[seed] for seed in (1, 2, 3)] for values in (base, other))
    found = decide.Duel(CLAIMS["runs"], CLAIMS[f"arms/{arm}"])
    assert found.by_pairs and found.n == 3 and not found.identical
    assert found.decide(loss).p == pytest.approx(stats.ttest_rel(b, a).pvalue, rel=1e-9)
    assert found.decide(loss).p == pytest.approx(by_pairs, abs=5e-4)
    assert decide.welch(a, b).p == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue, rel=1e-9)
    assert decide.welch(a, b).p == pytest.approx(by_welch, abs=5e-4)
    gaps = [y - x for x, y in zip(a, b)]
    half = stats.t.ppf(0.975, 2) * statistics.stdev(gaps) / math.sqrt(3)
    low, high = found.decide(loss)[1:3]
    assert (low, high) == pytest.approx((statistics.fmean(gaps) - half, statistics.fmean(gaps) + half))


def test_pairs_decide_from_three_seeds_on_whatever_the_losses():
    a, b = [3.0, 3.1, 3.4, 3.2], [2.9, 3.0, 3.3, 3.15]
    for n in (2, 3, 4):
        found = duel(a[:n], b[:n])
        assert found.by_pairs == (n >= 3)
        assert found.decide(loss) == (decide.paired if n >= 3 else decide.welch)(a[:n], b[:n])
    shifted = decide.Duel(runs(a), runs(b, 2))  # of the seeds 2, 3 and 4 alone
    assert shifted.n == 3 and shifted.decide(loss) == decide.paired(a[1:], b[:3])
    assert not duel(a, b, apart=True).by_pairs
    assert "seed decide (3 pairs" in decide.rule(3) and "Welch" in decide.rule(2)
    assert "Welch" in decide.rule(0)


def test_one_run_of_each_or_no_scatter_has_no_interval():
    assert duel([3.0], [3.1]).decide(loss) is None and decide.welch([3.0, 3.0], [3.1, 3.1]) is None
    assert decide.paired([3.0], [3.1]) is None
    assert decide.paired([3.0, 3.5, 4.0], [3.0, 3.5, 4.0]) == (0, 0, 0, 1)
    same = decide.paired([3.0, 3.5, 4.0], [3.25, 3.75, 4.25])
    assert same == (0.25, 0.25, 0.25, 0) and same.apart


def test_identical_means_every_seed_of_both_to_the_last_digit():
    a = [3.0, 3.1, 3.4]
    assert duel(a, a).identical and duel(a[:1], a[:1]).identical
    assert not duel(a, [3.0, 3.1, math.nextafter(3.4, 4)]).identical
    assert duel(a, a[:2]).identical and not duel(a, a, apart=True).identical


def test_equal_within_a_margin_takes_the_whole_interval():
    found = decide.Estimate(0.001, -0.004, 0.006, 0.6)
    assert found.inside(0.01) and not found.inside(0.005) and not found.apart
    assert decide.Estimate(0.002, 0.001, 0.003, 0.01).apart


# ---- Runs still needed


def separates(a, b, n):
    """Would n runs of each with these means and standard deviations separate them?"""
    moments = (x for values in (a, b) for x in (statistics.fmean(values), statistics.stdev(values), n))
    return stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue < 0.05


def test_the_published_trial_needs_nine_runs_and_not_eight():
    found, (a, b) = duel(*GELU, apart=True), GELU
    assert decide.welch(a, b).p == pytest.approx(0.27, abs=0.01)
    assert [n for n in range(4, 12) if separates(a, b, n)][0] == 9
    assert found.needed(0.5) == 9 and found.needed(0.8) > 14


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("shift, sd", [(0.02, 0.02), (0.02, 0.01), (0.005, 0.006)])
def test_power_is_how_often_simulated_runs_separate(pairs, shift, sd):
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2, 3))
    noise = (noise - noise.mean(1, keepdims=True)) / noise.std(1, ddof=1, keepdims=True)  # of sd 1, mean 0
    a = 3 + 0.1 * noise[0]
    b = a - shift + sd * noise[1] if pairs else 3 - shift + sd * noise[1]
    a = a if pairs else 3 + sd * noise[0]
    found = duel(a.tolist(), b.tolist(), apart=not pairs)
    for chance, n in ((chance, found.needed(chance)) for chance in (0.5, 0.8)):
        assert found.power(n) >= chance and (n == 4 or found.power(n - 1) < chance)
        if pairs:
            draws = rng.normal(-shift, sd, (4000, n))
            won = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
        else:
            draws = rng.normal(3, sd, (4000, n)), rng.normal(3 - shift, sd, (4000, n))
            won = stats.ttest_ind(*draws, axis=1, equal_var=False).pvalue < 0.05
        # 5 standard errors of 4,000 draws, and what Welch's own degrees of freedom scatter
        assert won.mean() == pytest.approx(found.power(n), abs=0.04 if pairs else 0.08)


def test_what_is_out_of_reach_is_said_so():
    found = duel([3.0, 3.1, 3.2], [3.1, 3.2, 3.00001])
    assert found.needed(0.5) is None or found.needed(0.5) > 1000
    nothing = duel([3.0, 3.1, 3.2], [3.1, 3.2, 3.0])
    assert nothing.needed(0.5) is None and "over 10000 runs for an even chance" in nothing.runs_still_needed()
    assert "n = 9 for an even chance" in duel(*GELU, apart=True).runs_still_needed()


def test_two_pairs_ask_for_pairs():
    """From three on these decide, and Welch's t would ask for over a hundred."""
    found = duel([3.0, 3.1], [3.02, 3.11])
    assert not found.by_pairs and found.needed(0.5) == 3 and 3 < found.needed(0.8) < 9
    assert duel([3.0, 3.1], [3.02, 3.11], apart=True).needed(0.5) > 100


# ---- Looking again


def test_false_alarms_grow_with_looks():
    """One look is wrong in 5 % of cases, and Welch's, of three runs, more seldom; several are wrong more often."""
    assert decide.false_alarms([3], True) == pytest.approx(0.05, abs=0.006)
    assert decide.false_alarms([3], False) < 0.05
    looks = [decide.false_alarms([3, 4, 5, 6][:k], True) for k in (1, 2, 3, 4)]
    assert looks == sorted(looks) and 0.08 < looks[2] < 0.12
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(500):
        a, b = rng.normal(size=6), rng.normal(size=6)
        wrong += any(stats.ttest_ind(a[:n], b[:n], equal_var=False).pvalue < 0.05 for n in (3, 6))
    assert wrong / 500 == pytest.approx(decide.false_alarms([3, 6], False), abs=0.05)


def logged(folder, count, knob=0, first_seed=1):
    """Run-like things that lie in logs/."""
    return [SimpleNamespace(seed=first_seed + i, val_loss=3 + i, recipe=("script", f"knob {knob}"), gpu=None,
                            gpu_count=0, start=dict(data="these"), folder=folder / f"{knob}-{i}", name=f"{knob}-{i}")
            for i in range(count)]


def test_looks_are_counted_beside_the_runs(tmp_path):
    file = tmp_path / "looks.jsonl"
    base = logged(tmp_path, 6)
    for count, looks in ((3, [3]), (3, [3]), (5, [3, 5])):  # the same runs again are no new look
        found = decide.look(file, decide.Duel(base[:count], logged(tmp_path, count, 1)))
        assert ([n for n, _ in found.seen], found.ideas) == (looks, 1)
    file.write_text(file.read_text() + '{"a": "half a li\n')  # a disk was full
    found = decide.look(file, decide.Duel(base[:3], logged(tmp_path, 3, 2)))
    assert ([n for n, _ in found.seen], found.ideas) == ([3], 2)
    found = decide.look(file, decide.Duel(logged(tmp_path, 6, 1), base))  # the other way round is the same pair
    assert [n for n, _ in found.seen] == [3, 5, 6] and found.ideas == 1  # another baseline, which has met one
    said = decide.Looks([(3, "abc"), (5, "abcde"), (6, "abcdef")], 4).sentences(True)
    assert "look 3 at these two, after n = 3, 5, 6" in said[0]
    assert "4 ideas" in said[1] and f"up to {100 * (1 - 0.95**4):.0f} % of cases" in said[1]
    assert decide.Looks([(3, "abc")], 1).sentences(True) == []


def test_looks_at_other_seeds_are_independent():
    one, two = decide.false_alarms([3], True), decide.false_alarms([3, 6], True)
    rate = lambda *looks: decide.Looks([(len(names), names) for names in looks], 1).false_alarms(True)
    assert rate("abc", "def") == pytest.approx(1 - (1 - one) ** 2)
    assert rate("abc", "abcdef") == pytest.approx(two) and two < 1 - (1 - one) ** 2
    assert rate("abc", "def", "abcdef") == pytest.approx(two)  # the last joins the first two
    assert rate("ab", "abc") == pytest.approx(one)  # two pairs decide nothing
    assert decide.Looks([(2, "ab"), (3, "abc")], 1).sentences(True) == []


def test_records_leave_no_note(tmp_path):
    file = tmp_path / "logs" / "looks.jsonl"
    arm = CLAIMS["arms/fp8_off"]
    assert decide.look(file, decide.Duel(CLAIMS["runs"], arm)).ideas == 1 and not file.exists()
    assert json.dumps(decide.key(arm[0])) != json.dumps(decide.key(CLAIMS["runs"][0]))
