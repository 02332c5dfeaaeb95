"""How sure a mean over training seeds and records is: intervals, tests and their correction for many.

The scores of a method on a data set are a table x_si of training seeds s and records i (decode seeds averaged), with a seed's effect, a
record's effect and what is left: x_si = μ + a_s + b_i + e_si. Both, seeds and records, are draws from many that could have been. With the
mean squares MS_s, MS_i and MS_e of the analysis of variance of two random factors (Searle, Casella & McCulloch 1992, section 4.3),

    variance of the mean = A + B,   A = max(MS_s - MS_e, 0) / SI   (S - 1 degrees of freedom),
                                    B = max(MS_i, MS_e) / SI       (I - 1, of several data sets together)

and the 95 % interval reaches √(t_A² A + t_B² B) to either side, t the quantile of Student's distribution. That is the t interval of the
seeds where they decide, the one of the records where these do, and a little wide in between. A bootstrap that draws three or five seeds
again is too narrow where they decide: it takes their few degrees of freedom for infinitely many.

In differences of two methods the records' part, which both share, is gone, and no longer makes up for an A that chance has made too small:
the more so the smaller the p-values that are asked about. There A = (2 MS_s - MS_e) / SI, but at least half and at most the whole of
MS_s / SI, with which it is the t test over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean: over data sets, of the means over seeds and records.
        from_seeds: A above, the part of the variance of the mean that comes of training seeds; 0 where there is one.
        from_records: B above.
        seeds: S.
        records: of all data sets, less one for each.
    """

    mean: float
    from_seeds: float
    from_records: float
    seeds: int
    records: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The ends of the interval that covers the true mean with this probability; NaN where there is one record only."""
        reach = self._reach((1 - level) / 2)
        return self.mean - reach, self.mean + reach

    def p_value(self) -> float:
        """Two-sided probability of a mean as far from 0, were the true one 0: one less the level of the interval that ends at 0."""
        from scipy.optimize import brentq

        if math.isnan(self.from_records):
            return math.nan
        if self.mean == 0:
            return 1.0
        lowest = 1e-100
        if self._reach(lowest) <= abs(self.mean):
            return 0.0
        # On the scale of the logarithm, where small probabilities are found as exactly as large ones.
        tail = brentq(lambda log: self._reach(math.exp(log)) - abs(self.mean), math.log(lowest), math.log(0.5))
        return 2 * math.exp(tail)

    def _reach(self, tail: float) -> float:
        from scipy.stats import t

        if math.isnan(self.from_records):
            return math.nan
        parts = (self.from_seeds, self.seeds - 1), (self.from_records, self.records)
        return math.sqrt(sum(variance * float(t.isf(tail, freedom)) ** 2 for variance, freedom in parts if variance))


def mean(scores: Sequence[np.ndarray], paired: bool = False) -> Estimate:
    """The mean over data sets of the means over training seeds and records.

    Args:
        scores: for each data set (S, I) float, the same seeds in the same order for all.
        paired: they are differences of two methods.

    Raises:
        ValueError: the data sets have different numbers of seeds, or none.
    """
    counts = sorted({len(table) for table in scores})
    if len(counts) != 1 or counts[0] < 1:
        raise ValueError(f"data sets with {counts} training seeds")
    (seeds,) = counts
    share = 1 / len(scores)
    from_records = within = 0.0
    for table in scores:
        of_records, of_rest = _mean_squares(table)
        from_records += share**2 * max(of_records, of_rest) / table.size
        within += share**2 * of_rest / table.size
    by_seed = np.mean([table.mean(1) for table in scores], axis=0)
    between = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    from_seeds = min(max(2 * between - within, between / 2), between) if paired else max(between - within, 0.0)
    records = sum(table.shape[1] - 1 for table in scores)
    return Estimate(float(by_seed.mean()), float(from_seeds), float(from_records), seeds, records)


def _mean_squares(table: np.ndarray) -> tuple[float, float]:
    """MS_i and MS_e; of one seed the second is 0, of one record both are NaN."""
    seeds, records = table.shape
    if records < 2:
        return math.nan, math.nan
    of_records = seeds * table.mean(0).var(ddof=1)
    if seeds == 1:
        return float(of_records), 0.0
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float(of_records), float((rest**2).sum() / ((seeds - 1) * (records - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of a family of tests, corrected so that the chance of a single false finding stays below the level (Holm 1979).

    NaN, a test that could not be made, stays NaN and does not count.
    """
    given = [(p, place) for place, p in enumerate(p_values) if not math.isnan(p)]
    corrected, worst = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(sorted(given)):
        worst = max(worst, min(1.0, (len(given) - rank) * p))
        corrected[place] = worst
    return corrected
