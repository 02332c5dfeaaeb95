"""Intervals and tests: against scipy, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from kdbench.evaluation import statistics
from kdbench.evaluation.statistics import Estimate, holm

RECORDS = 200


def simulated(generator, seeds, of_seeds, of_records, of_rest):
    """Scores of true mean 0 with these standard deviations, in units of a score."""
    return (
        of_seeds * generator.standard_normal((seeds, 1))
        + of_records * generator.standard_normal((1, RECORDS))
        + of_rest * generator.standard_normal((seeds, RECORDS))
    )


def test_one_seed_is_an_interval_over_records():
    table = np.random.default_rng(0).normal(3, 20, (1, 400))
    found = statistics.mean([table])
    low, high = found.interval()
    want = stats.t.interval(0.95, 399, table.mean(), stats.sem(table[0]))
    np.testing.assert_allclose((low, high), want, rtol=1e-12)
    assert found.from_seeds == 0
    np.testing.assert_allclose(found.p_value(), stats.ttest_1samp(table[0], 0).pvalue, rtol=1e-9)


def test_seeds_that_differ_in_everything_alike_are_a_t_test_over_seeds():
    of_seeds = np.array([1.0, 2.5, 0.3, 1.9])
    found = statistics.mean([np.repeat(of_seeds[:, None], 50, axis=1)])
    want = stats.t.interval(0.95, 3, of_seeds.mean(), stats.sem(of_seeds))
    np.testing.assert_allclose(found.interval(), want, rtol=1e-12)
    np.testing.assert_allclose(found.p_value(), stats.ttest_1samp(of_seeds, 0).pvalue, rtol=1e-9)


def test_mean_squares_are_those_of_the_sums_over_cells():
    table = np.random.default_rng(1).normal(size=(3, 7))
    found = statistics.mean([table])
    grand, rows, columns = table.mean(), table.mean(1), table.mean(0)
    of_seeds = sum(7 * (row - grand) ** 2 for row in rows) / 2
    of_records = sum(3 * (column - grand) ** 2 for column in columns) / 6
    rest = sum((table[s, i] - rows[s] - columns[i] + grand) ** 2 for s in range(3) for i in range(7)) / 12
    assert found.from_seeds == pytest.approx(max(of_seeds - rest, 0) / 21)
    assert found.from_records == pytest.approx(max(of_records, rest) / 21)


def test_the_average_counts_data_sets_alike_and_seeds_once():
    generator = np.random.default_rng(2)
    effect = np.array([[0.0], [3.0], [6.0]])
    small, large = effect + generator.normal(size=(3, 30)), effect + generator.normal(size=(3, 3000))
    both = statistics.mean([small, large])
    assert both.mean == pytest.approx((small.mean() + large.mean()) / 2)
    assert both.from_seeds == pytest.approx(9 / 3, rel=0.1)  # not halved: it is the same effect in both
    parts = [statistics.mean([table]).from_records for table in (small, large)]
    assert both.from_records == pytest.approx(sum(parts) / 4)


def test_the_level_of_the_interval_that_ends_at_zero_is_one_less_p():
    one = Estimate(1.3, 0.2, 0.4, 3, 99)
    low, _ = one.interval(1 - one.p_value())
    assert low == pytest.approx(0, abs=1e-9)
    assert one.p_value() == Estimate(-1.3, 0.2, 0.4, 3, 99).p_value()


def test_ends():
    assert Estimate(0.0, 0.0, 0.0, 3, 9).p_value() == 1.0
    assert Estimate(2.0, 0.0, 0.0, 3, 9).p_value() == 0.0
    assert Estimate(2.0, 0.0, 0.0, 3, 9).interval() == (2.0, 2.0)
    alone = statistics.mean([np.array([[3.0], [4.0]])])
    assert alone.mean == 3.5
    assert math.isnan(alone.interval()[0])
    assert math.isnan(alone.p_value())
    with pytest.raises(ValueError, match=r"\[0\] training seeds"):
        statistics.mean([np.zeros((0, 3))])
    with pytest.raises(ValueError, match=r"\[1, 2\] training seeds"):
        statistics.mean([np.zeros((1, 3)), np.zeros((2, 3))])


# Of seeds, records and the rest: a test set of 200 records of which each seed answers others well; seeds that differ much; hardly.
WORLDS = [(1.0, 20.0, 20.0), (3.0, 20.0, 20.0), (0.5, 25.0, 18.0)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_intervals_cover_the_truth_in_93_to_97_percent_of_experiments(seeds, world):
    generator = np.random.default_rng(3)
    found = [statistics.mean([simulated(generator, seeds, *world)]).interval() for _ in range(2000)]
    coverage = np.mean([low <= 0 <= high for low, high in found])
    print(f"{seeds} seeds, {world}: {coverage:.3f}")
    assert 0.93 <= coverage <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "of_seeds"), [(1, 0.0), (3, 0.0), (3, 1.0), (3, 4.0), (5, 2.0)])
def test_methods_that_do_not_differ_are_found_different_in_at_most_5_percent(seeds, of_seeds):
    """Of paired differences: what two methods share, the records, is gone. One seed: no effect of seeds."""
    generator = np.random.default_rng(4)
    tables = [simulated(generator, seeds, of_seeds, 0.0, 15.0) for _ in range(2000)]
    p_values = np.array([statistics.mean([table], paired=True).p_value() for table in tables])
    for level in (0.05, 0.01):  # Holm's correction asks about small ones
        share = (p_values <= level).mean()
        print(f"{seeds} seeds of standard deviation {of_seeds}: {share:.4f} at {level}")
        assert share <= level + 3 * math.sqrt(level * (1 - level) / 2000)
    assert (p_values <= 0.05).mean() >= 0.004  # nor is it blind


def test_holm_is_the_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9]) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert holm([]) == []


def test_holm_keeps_false_findings_of_a_family_rare():
    generator = np.random.default_rng(5)
    found = [min(holm(generator.uniform(size=10))) <= 0.05 for _ in range(4000)]
    assert np.mean(found) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 4000)
