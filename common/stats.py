"""Metrics and paired statistics: from scored items to result rows with intervals and p-values, by scipy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats

RESAMPLES = 9999  # the Monte-Carlo error of a bound is about 1 % of the interval's width; p is at least 2e-4
SEED = 0  # fixed, so that the same items always give the same interval


@dataclass(frozen=True)
class Metric:
    """What is computed from scored items, how tables call it, and which direction is better."""

    name: str  # in result rows
    label: str  # in tables, with the unit
    top: str | Callable[[dict], float]  # key of an item or a function of it: what is summed over the items
    bottom: str | None = None  # key of the weight whose sum divides it; None: the number of items does
    scale: float = 1.0  # factor of the numerator, for the unit
    better: str | None = None  # "higher" or "lower"; None: a difference is no judgement
    binary: bool = False  # items are 0 or 1, so that McNemar's test judges differences

    def columns(self, items: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """Numerators and weights of the items, each of shape (n,)."""
        value = self.top if callable(self.top) else lambda item: item[self.top]
        totals = self.scale * np.array([value(item) for item in items], float)
        return totals, np.array([item[self.bottom] if self.bottom else 1 for item in items], float)


def facts(table: str, name: str, values: dict, **more) -> list[dict]:
    """A result row per {metric: value} that has no interval: {table, name, metric, value}, and `more`."""
    return [{"table": table, "name": name, "metric": metric, "value": value, **more}
            for metric, value in values.items()]


def rows_of(table: str, name: str, items: list[dict], metrics, **more) -> list[dict]:
    """A result row per metric: {table, name, metric, label, value, lo, hi, n}, with a 95 % bootstrap
    interval.

    `more` goes into every row. Without items there are no rows.
    """
    return [{"table": table, "name": name, "metric": metric.name, "label": metric.label,
             **ratio_interval(*metric.columns(items)), **more} for metric in metrics if items]


def delta_rows(table: str, name: str, before: list[dict], after: list[dict], metrics, clusters=None,
               **more) -> list[dict]:
    """A result row per metric of `after - before`, item by item: as `rows_of`, with p, better and verdict.

    With `clusters`, a label for each item, the row also has the number of clusters and "cluster_lo" and
    "cluster_hi", of a bootstrap that draws whole clusters: items of one resemble each other. ValueError
    unless both sides hold the same items in the same order, by their "id".
    """
    if [item.get("id") for item in before] != [item.get("id") for item in after]:
        raise ValueError(f"{table}: before and after were not measured on the same items")
    rows = []
    for metric in metrics if after else ():
        (old, weights), (new, _) = metric.columns(before), metric.columns(after)
        delta = mcnemar(old, new) if metric.binary else paired_delta(old, new, weights)
        judged = verdict(delta, metric.better == "higher") if metric.better else None
        if clusters:
            labels, place = np.unique(clusters, return_inverse=True)
            sums = [np.bincount(place, weights=column) for column in (new - old, weights)]
            delta["clusters"] = len(labels)
            delta |= {f"cluster_{bound}": value for bound, value in _interval(sums).items()}
        rows.append({"table": table, "name": name, "metric": metric.name, "label": metric.label, **delta,
                     "better": metric.better, "verdict": judged, **more})
    return rows


def holm(rows: list[dict]) -> list[dict]:
    """The rows of a result file, those with a verdict judged again by a p that counts how many there are.

    "p_holm" is Holm's step-down correction (1979): with it, the chance that any verdict of a file is an
    accident stays below 5 %.
    """
    judged = sorted((row for row in rows if row.get("verdict")), key=lambda row: row["p"])
    least = 0.0
    for place, row in enumerate(judged):
        least = row["p_holm"] = max(least, min(1.0, row["p"] * (len(judged) - place)))
        row["verdict"] = verdict(row, row["better"] == "higher")
    return rows


def over_seeds(rows: list[dict]) -> list[dict]:
    """A result row, {"table": "over seeds", ...}, of each difference that several trainings have: `rows` of a
    table with the same "kind" and metric, this run's before those of other seeds.

    "value" is the mean, "lo" and "hi" Student's 95 % interval over the n seeds, "least" and "most" the range.
    The verdict is the first row's if this interval excludes 0 too, else "no difference shown".
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row.get("kind"), row["metric"]), []).append(row)
    found = []
    for first, *others in groups.values():
        if others:
            values = np.array([row["value"] for row in (first, *others)])
            mean, half = values.mean(), scipy.stats.t.ppf(0.975, len(others)) * scipy.stats.sem(values)
            shown = np.sign(first["value"]) == np.sign(mean) and abs(mean) > half
            kept = {key: first.get(key) for key in ("name", "metric", "label", "better", "kind")}
            found.append({"table": "over seeds", **kept, "value": float(mean), "lo": float(mean - half),
                          "hi": float(mean + half), "n": len(values), "least": float(values.min()),
                          "most": float(values.max()),
                          "seed_verdict": first["verdict"] if shown else "no difference shown"})
    return found


def refuse_unchanged(before, after) -> None:
    """SystemExit if all scored items are what they were before training: it changed nothing, or was not
    loaded.
    """
    if before == after:
        raise SystemExit("every item is scored as before training: the trained weights were not loaded or "
                         "change nothing; train again, with a learning rate above 0")


def ratio_interval(totals, weights) -> dict:
    """sum(totals) / sum(weights) with a 95 % bootstrap interval over items: {"value", "lo", "hi", "n"}."""
    totals, weights = _finite(totals), _finite(weights)
    return {"value": float(_ratio(totals, weights)), **_interval((totals, weights)), "n": len(totals)}


def paired_delta(before, after, weights=None) -> dict:
    """`after - before` on the same items, each array of shape (n,), as {"value", "lo", "hi", "p", "n"}.

    `weights` (n,) turns per-item totals into a ratio: sum(after - before) / sum(weights). The interval is
    scipy's percentile bootstrap over items (Efron & Tibshirani 1993); p is the two-sided paired permutation
    test, in which the labels before/after are swapped item by item. ValueError for fewer than two items,
    unequal lengths or values that are not finite.
    """
    before, after = _finite(before), _finite(after)
    weights = np.ones(len(before)) if weights is None else _finite(weights)
    if not len(before) == len(after) == len(weights) >= 2:
        raise ValueError(f"at least 2 paired items needed: {len(before)} before, {len(after)} after, "
                         f"{len(weights)} weights")
    difference = after - before
    if not difference.any():  # nothing to resample
        return {"value": 0.0, "lo": 0.0, "hi": 0.0, "p": 1.0, "n": len(before)}
    test = scipy.stats.permutation_test((difference,), np.sum, permutation_type="samples", vectorized=True,
                                        n_resamples=RESAMPLES, rng=np.random.default_rng(SEED))
    return {"value": float(_ratio(difference, weights)), **_interval((difference, weights)),
            "p": float(test.pvalue), "n": len(before)}


def mcnemar(before, after) -> dict:
    """`after - before` of 0/1 outcomes on the same items: {"value" (difference of shares), "lo", "hi", "p",
    "n"}.

    p is McNemar's exact test, the interval is Agresti & Min's (2005): Wald's with half an item added to each
    of the four cells. The bootstrap fails here: with 4 items lost of 100 and none gained it gave
    [-0.08, -0.01], where the exact p is 0.125. ValueError for fewer than two items, unequal lengths or values
    other than 0 and 1.
    """
    before, after = _finite(before), _finite(after)
    if not len(before) == len(after) >= 2 or not np.isin([before, after], (0, 1)).all():
        raise ValueError(f"at least 2 paired 0/1 outcomes needed: {len(before)} before, {len(after)} after")
    n, gained, lost = len(before), int((after > before).sum()), int((after < before).sum())
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    centre = (gained - lost) / (n + 2)
    half = 1.96 * np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = float(max(-1, centre - half)), float(min(1, centre + half))
    return {"value": (gained - lost) / n, "lo": low, "hi": high, "p": float(p), "n": n}


def verdict(delta: dict, higher_is_better: bool) -> str:
    """"improved" or "worse" only if the 95 % interval excludes 0 and p < 0.05, else "no difference shown".

    Both are asked, because at the edge an interval can exclude 0 where the exact test says p = 0.07. The p is
    that of `holm`, if there is one.
    """
    if delta["lo"] <= 0 <= delta["hi"] or delta.get("p_holm", delta["p"]) >= 0.05:
        return "no difference shown"
    return "improved" if (delta["value"] > 0) == higher_is_better else "worse"


def _ratio(totals, weights, axis=-1):
    return totals.sum(axis=axis) / weights.sum(axis=axis)


def _interval(data) -> dict:
    found = scipy.stats.bootstrap(data, _ratio, paired=True, vectorized=True, method="percentile", batch=500,
                                  n_resamples=RESAMPLES, rng=np.random.default_rng(SEED)).confidence_interval
    return {"lo": float(found.low), "hi": float(found.high)}


def _finite(values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"expected a flat array of finite numbers, got shape {values.shape}")
    return values
