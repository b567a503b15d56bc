"""Paired statistics: the delta between two models on the same items, with an interval and a p-value (on top of scipy)."""

from __future__ import annotations

import numpy as np
import scipy.stats

RESAMPLES = 9999  # Monte-Carlo error of a 95 % bound is then about 1 % of the interval's width; p has a floor of 2e-4
SEED = 0  # fixed: the same items give the same interval, so a report can be rendered twice


def ratio_interval(totals, weights) -> dict:
    """sum(totals) / sum(weights) with a 95 % bootstrap interval over items, e.g. nats per token: {"value", "lo", "hi", "n"}."""
    totals, weights = _finite(totals), _finite(weights)
    return {"value": float(totals.sum() / weights.sum()), **_interval(_ratio, (totals, weights)), "n": len(totals)}


def paired_delta(before, after, weights=None) -> dict:
    """`after - before` on the same items, each array of shape (n,), as {"value", "lo", "hi", "p", "n"}.

    `weights` (n,) turns per-item totals into a ratio: sum(after - before) / sum(weights). The interval is scipy's percentile
    bootstrap over items (Efron & Tibshirani 1993), p is the two-sided paired permutation test, in which the labels before/after
    are swapped item by item. Raises ValueError for fewer than two items, unequal lengths or non-finite values.
    """
    before, after = _finite(before), _finite(after)
    weights = np.ones(len(before)) if weights is None else _finite(weights)
    if not len(before) == len(after) == len(weights) >= 2:
        raise ValueError(f"paired items needed: before {len(before)}, after {len(after)}, weights {len(weights)}; at least 2")
    difference = after - before
    if not difference.any():  # identical arms: nothing to resample
        return {"value": 0.0, "lo": 0.0, "hi": 0.0, "p": 1.0, "n": len(before)}
    test = scipy.stats.permutation_test((difference,), lambda d, axis: d.sum(axis=axis), permutation_type="samples",
                                        vectorized=True, n_resamples=RESAMPLES, rng=np.random.default_rng(SEED))
    return {"value": float(difference.sum() / weights.sum()), **_interval(_ratio, (difference, weights)),
            "p": float(test.pvalue), "n": len(before)}


def mcnemar(before, after) -> dict:
    """`after - before` of 0/1 outcomes on the same items: {"value", "lo", "hi", "p", "n"}, value = difference of the two shares.

    p is McNemar's exact test, the interval Agresti & Min's (2005): Wald's with half an item added to each of the four cells. The
    bootstrap is no good here: 4 items lost and none gained gave it [-0.08, -0.01] of 100 where the exact p is 0.125. Raises
    ValueError for fewer than two items, unequal lengths or values other than 0 and 1.
    """
    before, after = _finite(before), _finite(after)
    if not len(before) == len(after) >= 2 or not np.isin([before, after], (0, 1)).all():
        raise ValueError(f"paired 0/1 outcomes needed: before {len(before)}, after {len(after)} items; at least 2")
    n, gained, lost = len(before), int((after > before).sum()), int((after < before).sum())
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    centre, half = (gained - lost) / (n + 2), 1.96 * np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return {"value": (gained - lost) / n, "lo": float(max(-1, centre - half)), "hi": float(min(1, centre + half)), "p": float(p), "n": n}


def verdict(delta: dict, higher_is_better: bool) -> str:
    """"improved" / "worse" only if the 95 % interval excludes 0 and p < 0.05, else "no difference shown".

    Both, because at the edge an interval can exclude 0 where the exact test says p = 0.07.
    """
    if delta["lo"] <= 0 <= delta["hi"] or delta["p"] >= 0.05:
        return "no difference shown"
    return "improved" if (delta["value"] > 0) == higher_is_better else "worse"


def _ratio(totals, weights, axis=-1):
    return totals.sum(axis=axis) / weights.sum(axis=axis)


def _interval(statistic, data) -> dict:
    if len(data[0]) < 2:
        raise ValueError("an interval needs at least 2 items")
    result = scipy.stats.bootstrap(data, statistic, paired=True, vectorized=True, method="percentile", batch=500,
                                   n_resamples=RESAMPLES, rng=np.random.default_rng(SEED))
    return {"lo": float(result.confidence_interval.low), "hi": float(result.confidence_interval.high)}


def _finite(values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"expected a flat array of finite numbers, got shape {values.shape}")
    return values
