"""A card per term: what a use of it costs each model, its verdict, its neighbours and what the models say it means."""

from __future__ import annotations

import math

from common import stats
from task3_tokenizer import task


def rows(lexicon: task.Lexicon, uses: list[dict], items: dict, looks: dict, before: dict[str, str], after: dict[str, dict]) -> list[dict]:
    """Result rows, one a term, from the scored `uses` ({model: kinds}), what intrinsic.look saw per stage, and the definitions."""
    cards = []
    for term in lexicon.chosen:
        word = term["term"]
        mine = [k for k, row in enumerate(uses) if row["term"] == word]
        bits = {name: [items[name]["uses"][k]["term_nats"] / math.log(2) for k in mine]
                for name in ("base", "control c2", "new init", "new a", "new c2")}
        spelled = [items["new c2"]["uses, old pieces"][k]["term_nats"] / math.log(2) for k in mine]
        either = [-math.log2(2 ** -new + 2 ** -old) for new, old in zip(bits["new c2"], spelled)]
        delta = stats.paired_delta(bits["control c2"], either)
        judged = stats.verdict(delta, higher_is_better=False)
        near = {side: next(f for f in looks["c2"] if (f["side"], f["term"]) == (side, word)) for side in ("input", "output")}
        start = {side: next(f for f in looks["init"] if (f["side"], f["term"]) == (side, word)) for side in ("input", "output")}
        cards.append({"table": "cards", "model": word, "metric": "term_bits_minus_control", **delta, "verdict": judged,
                      **{name.replace(" ", "_"): sum(v) / len(v) for name, v in bits.items()}, "either": sum(either) / len(either),
                      "median_rank": sorted(items["new c2"]["uses"][k]["rank"] for k in mine)[len(mine) // 2], "new_id": lexicon.ids[word],
                      "anchors_before": start["input"]["anchors"], "anchors_after": near["input"]["anchors"],
                      "anchors_after_output": near["output"]["anchors"], "anchor_rank_before": start["output"]["anchor_rank"],
                      "anchor_rank_after": near["output"]["anchor_rank"],
                      "neighbours_before": start["output"]["neighbours"], "neighbours_after": near["output"]["neighbours"],
                      "neighbours_input_before": start["input"]["neighbours"], "neighbours_input_after": near["input"]["neighbours"],
                      "definition_before": before[word], "definition_control": after["control"][word],
                      "definition_after": after["new"][word]})
    return cards


def text(cards: list[dict], uses: list[dict], items: dict) -> str:
    """The same as markdown, with the best and worst held-out sentence: for the reader's own machine only, it quotes the installed packages."""
    lines = ["# A card per term\n"]
    for card in cards:
        mine = sorted((k for k, row in enumerate(uses) if row["term"] == card["model"]), key=lambda k: items["new c2"]["uses"][k]["term_nats"])
        lines.append(f"## {card['model']} (id {card['new_id']}): {card['verdict']}\n")
        lines += [f"- {key}: {value}" for key, value in card.items() if key not in ("table", "model", "verdict")]
        lines += [f"- {name}: {uses[k]['text'].strip()} ({items['new c2']['uses'][k]['term_nats'] / math.log(2):.1f} bits for the term)"
                  for name, k in (("best", mine[0]), ("worst", mine[-1]))]
    return "\n".join(lines) + "\n"
