"""Intervals and p-values against cases that can be worked out by hand."""

import numpy as np
import pytest

from common import stats


def test_permutation_p_is_the_exact_count_over_sign_flips():
    """Differences 1, 2, 3, 4: of 2^4 = 16 sign patterns only +++ + and ---- reach |sum| = 10, so p = 2/16."""
    assert stats.paired_delta([0, 0, 0, 0], [1, 2, 3, 4])["p"] == pytest.approx(2 / 16)


def test_delta_is_a_ratio_of_totals_not_a_mean_of_ratios():
    """Totals 10 -> 4 over 1 token and 10 -> 13 over 3 tokens: (-6 + 3) / 4 = -0.75 nats a token."""
    assert stats.paired_delta([10, 10], [4, 13], weights=[1, 3])["value"] == pytest.approx(-0.75)


def test_constant_difference_has_a_point_interval():
    delta = stats.paired_delta(np.arange(20.0), np.arange(20.0) + 2)
    assert delta["value"] == delta["lo"] == delta["hi"] == 2


def test_interval_of_a_normal_mean_matches_theory():
    """100 values with mean 0 and sd exactly 1: the 95 % interval is close to +-1.96 / sqrt(100)."""
    values = np.random.default_rng(0).normal(size=100)
    values = (values - values.mean()) / values.std(ddof=1)
    got = stats.ratio_interval(values, np.ones(100))
    assert got["value"] == pytest.approx(0, abs=1e-12)
    assert (got["lo"], got["hi"]) == (pytest.approx(-0.196, abs=0.015), pytest.approx(0.196, abs=0.015))


def test_the_bootstrap_draws_an_item_with_its_weight():
    """Each total is twice its weight, so that every draw of whole items has the ratio 2; and a difference of
    half the weight has the ratio 1/2.
    """
    weights = np.arange(1.0, 31)
    whole = stats.ratio_interval(2 * weights, weights)
    assert (whole["lo"], whole["hi"]) == (pytest.approx(2), pytest.approx(2))
    delta = stats.paired_delta(3 * weights, 3.5 * weights, weights)
    assert (delta["lo"], delta["hi"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_mcnemar_counts_only_the_discordant_items():
    """6 gained, 1 lost, 5 unchanged: two-sided exact binomial p = 2 * (1 + 7) / 2^7 = 0.125; accuracy moves
    by 5/12.
    """
    before, after = [0] * 6 + [1] + [1] * 5, [1] * 6 + [0] + [1] * 5
    got = stats.mcnemar(before, after)
    assert got["p"] == pytest.approx(0.125)
    assert got["value"] == pytest.approx(5 / 12)


def test_mcnemar_interval_agrees_with_its_p():
    """4 lost of 100, none gained: p = 2 / 2^4 = 0.125, so 0 has to lie inside. Centre -4/102, half 1.96
    sqrt(5 - 16/102) / 102.
    """
    got = stats.mcnemar([1] * 4 + [0] * 96, [0] * 100)
    assert got["p"] == pytest.approx(0.125) and stats.verdict(got, True) == "no difference shown"
    assert (got["lo"], got["hi"]) == (pytest.approx(-0.08150, abs=1e-4), pytest.approx(0.00306, abs=1e-4))


def test_same_items_give_the_same_interval_twice():
    before, after = np.random.default_rng(1).normal(size=(2, 30))
    assert stats.paired_delta(before, after) == stats.paired_delta(before, after)


def test_identical_arms_show_no_difference():
    delta = stats.paired_delta([1, 2, 3], [1, 2, 3])
    assert delta["p"] == 1 and stats.verdict(delta, True) == "no difference shown"


@pytest.mark.parametrize(
    ("lo", "hi", "p", "higher", "word"),
    [
        (0.1, 0.3, 0.01, True, "improved"),
        (0.1, 0.3, 0.01, False, "worse"),
        (-0.3, -0.1, 0.01, False, "improved"),
        (-0.1, 0.2, 0.3, True, "no difference shown"),
        (0.002, 0.115, 0.07, True, "no difference shown"),
    ],
)
def test_verdict_needs_the_interval_and_the_p(lo, hi, p, higher, word):
    assert stats.verdict({"value": (lo + hi) / 2, "lo": lo, "hi": hi, "p": p}, higher) == word


@pytest.mark.parametrize("arms", [([1], [2]), ([1, 2], [1]), ([1, float("nan")], [1, 2])])
def test_unusable_arms_raise(arms):
    with pytest.raises(ValueError):
        stats.paired_delta(*arms)


NLL = stats.Metric("nll", "NLL per token (nats)", "nats", "tokens", better="lower")
LONG = stats.Metric(
    "long", "share of long answers", lambda item: item["tokens"] > 2, better="higher", binary=True
)
ITEMS = [{"id": i, "nats": float(i), "tokens": 1 + i % 4} for i in range(8)]


def test_a_metric_gives_rows_deltas_label_and_verdict():
    """28 nats over 20 tokens before, 8 nats less after; half of the items are long, none of them after."""
    after = [item | {"nats": item["nats"] - 1, "tokens": item["tokens"]} for item in ITEMS]
    nll, long = stats.rows_of("held-out", "base", ITEMS, [NLL, LONG], seed=3)
    assert nll["value"] == pytest.approx(28 / 20) and nll["n"] == 8 and long["value"] == 0.5
    assert (nll["table"], nll["name"], nll["label"], nll["seed"]) == ("held-out", "base", NLL.label, 3)
    (delta,) = stats.delta_rows("held-out", "delta", ITEMS, after, [NLL])
    assert delta["value"] == pytest.approx(-8 / 20)
    assert (delta["verdict"], delta["better"]) == ("improved", "lower")
    shorter = [item | {"tokens": 1} for item in ITEMS]
    (delta,) = stats.delta_rows("held-out", "delta", ITEMS, shorter, [LONG])
    assert delta["value"] == -0.5 and delta["p"] == pytest.approx(2 / 2**4)  # McNemar: 4 lost, none gained


def test_a_metric_without_a_direction_has_no_verdict():
    (row,) = stats.delta_rows("x", "delta", ITEMS, ITEMS, [stats.Metric("tokens", "tokens", "tokens")])
    assert row["verdict"] is None and row["better"] is None


def test_holm_counts_the_verdicts_of_a_file():
    """p of 0.02, 0.001, 0.03 and 0.9: times 4, 3, 2 and 1 in rising order, and never falling: 0.004, 0.06,
    0.06, 0.9. A row without verdict is not counted."""
    def judged(p):
        return {"value": 1.0, "lo": 0.5, "hi": 1.5, "p": p, "better": "higher", "verdict": "improved"}
    rows = [*map(judged, (0.02, 0.001, 0.03, 0.9)), {"value": 1, "p": 1e-9, "verdict": None}]
    assert stats.holm(rows) is rows
    assert [row["p_holm"] for row in rows[:4]] == pytest.approx([0.06, 0.004, 0.06, 0.9])
    assert [row["verdict"] for row in rows[:4]] == [
        "no difference shown", "improved", "no difference shown", "no difference shown"]
    assert "p_holm" not in rows[4]


def test_clusters_are_drawn_whole():
    """Items of a cluster are copies of one: the interval over items is too narrow by the root of their
    number, 10, and that over clusters is the interval over one item of each."""
    values = np.random.default_rng(0).normal(size=40)
    items = [{"id": i, "nats": value, "tokens": 1} for i, value in enumerate(np.repeat(values, 10))]
    zero = [item | {"nats": 0.0} for item in items]
    (row,) = stats.delta_rows("x", "delta", zero, items, [NLL], clusters=[i // 10 for i in range(400)])
    alone = stats.paired_delta(np.zeros(40), values)
    assert row["clusters"] == 40
    assert (row["cluster_lo"], row["cluster_hi"]) == pytest.approx((alone["lo"], alone["hi"]))
    width = (row["cluster_hi"] - row["cluster_lo"]) / (row["hi"] - row["lo"])
    assert width == pytest.approx(10**0.5, rel=0.1)


@pytest.mark.parametrize(("values", "word"), [((1.0, 1.1, 0.9), "improved"),
                                              ((1.0, 0.1, 0.4), "no difference shown"),
                                              ((1.0, -1.2, -1.1), "no difference shown")])
def test_a_verdict_over_seeds_needs_an_effect_that_seeds_do_not_change(values, word):
    """Student's t with two degrees of freedom: 4.303 standard errors on both sides of the mean."""
    rows = [{"name": "n", "metric": "m", "label": "l", "better": "higher", "verdict": "improved",
             "value": value} for value in values]
    (row,) = stats.over_seeds(rows)
    assert row["seed_verdict"] == word and row["n"] == 3
    half = 4.30265 * np.std(values, ddof=1) / 3**0.5
    mean = np.mean(values)
    assert (row["value"], row["lo"], row["hi"]) == pytest.approx((mean, mean - half, mean + half), rel=1e-4)
    assert (row["least"], row["most"]) == (min(values), max(values))


def test_items_that_are_not_the_same_are_never_compared():
    with pytest.raises(ValueError, match="not measured on the same items"):
        stats.delta_rows("x", "delta", ITEMS, ITEMS[::-1], [NLL])


def test_without_items_there_are_no_rows():
    assert stats.rows_of("x", "base", [], [NLL]) == stats.delta_rows("x", "delta", [], [], [NLL]) == []
