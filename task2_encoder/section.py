"""What report.md says about task 2: tables and figures made from its result files."""

from __future__ import annotations

from pathlib import Path

from common import spread
from common.report import Found, Rows, choices, code, cost, draw, each_run, fold, interval, main_run, number, p_value, shown, table

TASK = "task2_encoder"
PRECISIONS = {"nf4": "NF4"}  # other names as they are
HEAD = ["what", "documents", "metric", "base [95 %]", "tuned [95 %]", "delta [95 %]", "p", "n", "won / same / lost", "verdict"]


def data(found: Found) -> str:
    rows = shown(found, TASK, "01_data")
    if rows is None:
        return "not run"

    def listed(name, *more):
        return [[r["model"], r["metric"].replace("_", " "), number(r["value"]), *(number(r[m]) for m in more)] for r in rows.all(table=name)]
    counts = table(["count", "rows"], [line[1:] for line in listed("counts")])
    pools, leaks = table(["pool", "what", "value"], listed("pool")), table(["where", "gate", "value", "of"], listed("leaks", "n"))
    tokens = table(["split", "metric", "value", "n"], listed("tokens", "n"))
    example = table(["side", "tokens", "ids"], [[side, code(" ".join(r["token"] for r in part)), " ".join(str(r["id"]) for r in part)]
                                                for side in ("anchor", "positive") if (part := rows.all(table="example", model=side))])
    return "\n\n".join([counts, pools, leaks, "One pair (of ours) as the encoder sees it:", example,
                        fold("Lengths in tokens, and the share cut", tokens)])


def compare(rows: Rows, name: str, label: str = "") -> list[list]:
    body = []
    for delta in rows.all(table=name, model="delta"):
        base, tuned = (rows.one(table=name, model=m, metric=delta["metric"]) for m in ("base", "tuned"))
        counts = f"{delta['wins']} / {delta['ties']} / {delta['losses']}" if "wins" in delta else "–"
        body.append([label or name, number(base.get("documents")), delta["metric"], interval(base), interval(tuned), interval(delta),
                     p_value(delta["p"]), delta["n"], counts, delta["verdict"]])
    return body


def systems(rows: Rows) -> str:
    body, metrics = [], ("recall@1", "recall@5", "recall@10", "ndcg@10", "map@10")
    for r in rows.all(table="systems", metric="mrr@10"):
        others = [number(rows.one(table="systems", model=r["model"], metric=m)["value"]) for m in metrics]
        body.append([r["model"], interval(r), *others, interval(rows.one(table="systems minus fp32 base", model=r["model"]))])
    return table(["system", "MRR@10 [95 %]", "R@1", "R@5", "R@10", "nDCG@10", "MAP@10", "MRR@10 minus fp32 base [95 %]"], body)


def results_block(found: Found) -> str:
    rows, before, run = shown(found, TASK, "04_eval"), shown(found, TASK, "02_baseline"), main_run(found, TASK)
    if rows is None:
        return "not run"
    others = [n for n in ("full", "masked", "general") if rows.one(table=n, model="delta")]
    slices = list(dict.fromkeys(r["table"] for r in rows.all(model="delta") if r["table"].startswith("slice: ")))
    baselines = [[r["model"], number(r["documents"])] + [number(before.one(table=t, model=r["model"], metric=m)["value"])
                                                         for m in ("mrr@10", "recall@1", "recall@10")]
                 for t in ("pool", "full") for r in before.all(table=t, metric="mrr@10")]
    down = []
    for base in rows.all(table="downstream", model="base"):
        delta = rows.one(table="downstream", model="delta", metric=base["metric"])
        down.append([base["metric"], interval(base), interval(rows.one(table="downstream", model="tuned", metric=base["metric"])), interval(delta),
                     *((p_value(delta["p"]), delta["verdict"]) if delta else ("–", "–"))])
    majority = rows.one(table="downstream", model="majority")  # older results have none, and had random folds
    folds = f"5 folds by module; the largest topic has {number(majority['value'])}" if majority else "5-fold"
    parity = [[r["model"], number(r["value"])] for r in rows.all(table="parity")]
    return "\n\n".join([
        f"Queries of unseen packages against the pool of {number(rows.one(table='pool', model='base')['documents'])} documents:",
        table(HEAD, compare(rows, "pool")),
        f"![training curve](results/{run}/{TASK}/curve.svg)",
        "The same queries against every held-out document (`full`), with function names hidden (`masked`), and the forgetting check: SciQ "
        "questions, plain English, against their passages (`general`):",
        table(HEAD, [line for n in others for line in compare(rows, n)]),
        "Who gains? MRR@10 on the pool by length of the query and by package:",
        table(HEAD, [line for n in slices for line in compare(rows, n, n.removeprefix("slice: "))]),
        "Is it the 4 bits, the adapter or the merge, and would a search engine without training do? The same queries and pool throughout:",
        systems(rows), f"![MRR@10 of each system](results/{run}/{TASK}/systems.svg)",
        fold("Baselines on both pools", table(["model", "documents", "MRR@10", "R@1", "R@10"], baselines)),
        "The embeddings as features for something else, package.subpackage of a held-out function "
        f"(logistic regression, {folds}; k-means, mean of 10 starts):",
        table(["metric", "base [95 %]", "tuned [95 %]", "delta [95 %]", "p", "verdict"], down),
        f"![embedding map](results/{run}/{TASK}/map.svg)",
        "What was saved opens again with plain sentence-transformers; largest difference between two embeddings of the pool:",
        table(["compared", "difference"], parity)])


def errors(found: Found) -> str:
    rows = shown(found, TASK, "04_eval")
    if rows is None:
        return "not run"

    def rank(value):
        return "> 100" if value is None else value
    body = [[r["model"], f"`{r['item']}`", rank(r["before"]), rank(r["value"]), f"`{r['first_before']}`", f"`{r['first_after']}`"]
            for r in rows.all(table="examples")]
    return table(["", "function asked for", "rank before", "after", "first before", "first after"], body)


def ablations(found: Found) -> str:
    rows = shown(found, TASK, "ablations")
    if rows is None or not rows.rows:
        return "not run: `make ablations`"

    used = rows.config.get("precision", "nf4")

    def fact(name, metric):
        return rows.one(table="ablation facts", model=name, metric=metric)["value"]
    body = [[r["model"], number(fact(r["model"], "trainable_parameters")), f"{fact(r['model'], 'kept_step')} of {fact(r['model'], 'steps')}",
             number(fact(r["model"], "dev_mrr_kept")), number(fact(r["model"], "dev_mrr_last")), interval(r),
             interval(rows.one(table="ablation minus base", model=r["model"])), interval(rows.one(table="ablation minus 03", model=r["model"]))]
            for r in rows.all(table="ablation", metric="mrr@10")]
    head = ["changed", "trained parameters", "step kept", "dev MRR@10", "dev at the last step",
            "test MRR@10 [95 %]", f"minus {PRECISIONS.get(used, used)} base [95 %]",
            "minus the row of 03 [95 %]"]
    return table(head, body)


BLOCKS = {"task2/data": data, "task2/choices": lambda found: choices(found, TASK), "task2/results": each_run(TASK, "04_eval", results_block),
          "task2/errors": each_run(TASK, "04_eval", errors), "task2/ablations": each_run(TASK, "ablations", ablations),
          "task2/several": spread.several(TASK),
          "task2/cost": each_run(TASK, "04_eval", lambda found: cost(found, TASK, "All facts of the training"))}


def curve_figure(rows: Rows, figure) -> None:
    loss, mrr = figure.subplots(1, 2)
    for axes, metric, label, colour in ((loss, "loss", "contrastive loss (nats)", "#9aa5b1"),
                                        (mrr, "eval_mrr@10", "MRR@10 on the dev package", "#c2410c")):
        points = rows.all(table="curve", metric=metric)
        axes.plot([p["step"] for p in points], [p["value"] for p in points], color=colour, marker="o", ms=3)
        axes.set(xlabel="optimiser step", ylabel=label)
    figure.tight_layout()


def systems_figure(rows: Rows, figure) -> None:
    systems = [r for r in rows.all(table="systems", metric="mrr@10") if r["model"] != "random"][::-1]
    figure.set_size_inches(6.4, 0.32 * len(systems) + 0.9)
    axes = figure.add_subplot()
    for y, r in enumerate(systems):
        axes.plot([r["lo"], r["hi"]], [y, y], color="#c2410c" if "adapter" in r["model"] or "merged" in r["model"] else "#52606d", lw=2)
        axes.plot(r["value"], y, "o", color="#1f2933", ms=4)
    axes.set_yticks(range(len(systems)), [r["model"] for r in systems])
    axes.set_xlabel(f"MRR@10 among {number(systems[0]['documents'])} documents (95 % interval)")


def map_figure(rows: Rows, figure) -> None:
    if not rows.one(table="map"):
        return  # own data has no topics to show
    figure.set_size_inches(8.4, 3.9)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("base", "tuned")):
        points = rows.one(table="map", model=name)
        for i, label in enumerate(sorted(set(points["label"]))):
            chosen = [k for k, other in enumerate(points["label"]) if other == label]
            axes.scatter([points["x"][k] for k in chosen], [points["y"][k] for k in chosen], s=7, color=f"C{i}", label=label)
        axes.set(title=name, xticks=[], yticks=[])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False, fontsize=8, markerscale=2)
    figure.tight_layout(rect=(0, 0.13, 1, 1))


def figures(found: Found) -> dict[Path, str]:
    plots = {"curve": ("03_train", curve_figure), "map": ("04_eval", map_figure), "systems": ("04_eval", systems_figure)}
    return draw(found, TASK, (7.2, 2.8), plots) | spread.figure(found, TASK)
