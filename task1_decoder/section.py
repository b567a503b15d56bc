"""What report.md says about task 1: tables and figures made from its result files."""

from __future__ import annotations

from pathlib import Path

from common import spread
from common.report import Found, Rows, choices, code, cost, draw, each_run, fold, interval, main_run, number, p_value, shown, table

TASK = "task1_decoder"
HEAD = ["what", "metric", "base [95 %]", "tuned [95 %]", "delta [95 %]", "p", "n", "verdict"]


def data(found: Found) -> str:
    rows = shown(found, TASK, "01_data")
    if rows is None:
        return "not run"
    counts = table(["count", "rows"], [[r["metric"].replace("_", " "), number(r["value"])] for r in rows.all(table="counts")])
    packages = table(["package", "version", "functions kept"], [[r["model"], r["metric"], number(r["value"])] for r in rows.all(table="packages")])
    leaks = table(["held-out split", "shared with training", "rows", "of"],
                  [[r["model"], r["metric"].replace("_", " "), number(r["value"]), r["n"]] for r in rows.all(table="leaks")])
    tokens = table(["split", "metric", "value", "n"],
                   [[r["model"], r["metric"].replace("_", " "), number(r["value"]), number(r["n"])] for r in rows.all(table="tokens")])
    example = table(["position", "token", "id", "trained"],
                    [[r["position"], code(r["token"]), r["id"], "yes" if r["trained"] else ""] for r in rows.all(table="example")])
    return "\n\n".join([counts, packages, leaks, fold("Lengths in tokens, and the share cut", tokens),
                        fold("One example (a function of ours) token by token, with its label mask", example)])


def compare(rows: Rows, name: str) -> list[list]:
    body = []
    for delta in rows.all(table=name, model="delta"):
        base, tuned = (rows.one(table=name, model=m, metric=delta["metric"]) for m in ("base", "tuned"))
        body.append([name, delta["metric"], interval(base), interval(tuned), interval(delta), p_value(delta["p"]), delta["n"],
                     delta["verdict"] or "–"])
    return body


def results_block(found: Found) -> str:
    rows, before, run = shown(found, TASK, "04_eval"), shown(found, TASK, "02_baseline"), main_run(found, TASK)
    if rows is None:
        return "not run"
    shots = [[r["metric"], interval(before.one(model="base 3-shot", metric=r["metric"])),
              interval(rows.one(table="heldout", model="tuned", metric=r["metric"])), interval(r), p_value(r["p"]), r["verdict"] or "–"]
             for r in rows.all(model="tuned minus base 3-shot")]
    others = [t for t in dict.fromkeys(r["table"] for r in rows.all(model="delta")) if t not in ("headline", "heldout")]
    precision = rows.config.get("precision", "nf4")
    dtype = next(r["metric"].split("_")[1] for r in rows.all(table="attribution") if r["metric"].endswith("_base"))
    parts = [[r["model"], interval(r), interval(rows.one(table="attribution", model=r["model"], metric=f"minus_{precision}")), r["n"]]
             for r in rows.all(table="attribution", metric="nll_per_token")]
    return "\n\n".join([
        "Held-out functions, zero-shot:", table(HEAD, compare(rows, "heldout")), f"![training curve](results/{run}/{TASK}/loss.svg)",
        "How far does a good prompt alone get? The base with three worked examples, against the tuned model without any:",
        table(["metric", "base 3-shot [95 %]", "tuned zero-shot [95 %]", "tuned minus base 3-shot [95 %]", "p", "verdict"], shots),
        "What else moved. Benchmarks are zero-shot without chat template; `general` is plain English; `basket` is listed below:",
        table(HEAD, [line for name in others for line in compare(rows, name)]), f"![benchmark deltas](results/{run}/{TASK}/deltas.svg)",
        "Is it the 4 bits, the adapter or the merge? The same items throughout, NLL per token:",
        table(["model", "NLL per token [95 %]", "minus its NF4 counterpart [95 %]", "n"], parts),
        "The fairest single number: the 4-bit model with its adapter against the base in 16 bits, which NF4 has not hurt: "
        f"**{interval(rows.one(table='attribution', metric=f'minus_{dtype}_base'))}** nats per token."])


def errors(found: Found) -> str:
    rows = shown(found, TASK, "04_eval")
    if rows is None:
        return "not run"
    body = [[r["model"], f"`{r['item']}`", number(r["chrf_before"], 1), number(r["chrf_after"], 1), number(r["nll_before"], 2),
             number(r["nll_after"], 2), code(r["output_before"]), code(r["output_after"])] for r in rows.all(table="examples")]

    def answer(side):
        flags = ["did not stop"] * (not side["stopped"]) + ["repeats itself"] * (side["repetition"] > 0.2) + ["copied"] * side["copied"]
        return f"{code(side['text'])}<br>{side['new_tokens']} tokens{''.join('; **' + f + '**' for f in flags)}"
    basket = table(["prompt", "before", "after"],
                   [[code(r["prompt"], 160), answer(r["before"]), answer(r["after"])] for r in rows.all(table="basket_prompts")])
    head = ["", "function", "chrF before", "after", "NLL before", "after", "base wrote", "tuned wrote"]
    return table(head, body) + "\n\n" + fold("The whole basket, side by side", basket)


def ablations(found: Found) -> str:
    """Rows of make ablations, and what each way to train costs on an accelerator."""
    rows = shown(found, TASK, "ablations")
    if rows is None or not rows.rows:
        return "not run: `make ablations`"

    def fact(name, metric):
        return number(rows.one(table="ablation facts", model=name, metric=metric)["value"])
    def minus(name, what):
        return interval(rows.one(table=f"ablation minus {what}", model=name))
    body = [[r["model"], fact(r["model"], "trainable_parameters"), fact(r["model"], "dev_nll_best"), interval(r), minus(r["model"], "base"),
             minus(r["model"], "03"), r["n"]]
            for r in rows.all(table="ablation", metric="nll_per_token")]
    parts = [table(["row", "trained parameters", "dev NLL", "test NLL per token [95 %]", "minus base [95 %]", "minus 03 [95 %]", "n"], body)]
    if rows.one(table="cost"):
        parts += ["A training step in every way: peak memory from shapes (`task.training_memory`) and as measured, time, and model FLOP utilisation: "
                  "(4 x weights x tokens + 4 x hidden x vocabulary x label columns) / seconds / what a bf16 product of 8,192 x 8,192 matrices "
                  f"reaches here ({rows.one(table='cost', metric='matmul_flops_per_second')['value'] / 1e12:.0f} TFLOP/s). 4 = 2 forward + 2 back to "
                  "the activations; frozen weights have no gradients, and what checkpointing computes twice does not count.", costs(rows)]
    return "\n\n".join(parts)


CARDS = (8, 16, 24, 80)  # GiB of usual accelerators


def costs(rows: Rows) -> str:
    body = []
    for name in dict.fromkeys(r["model"] for r in rows.all(table="cost")):
        found = {r["metric"]: r for r in rows.all(table="cost", model=name)}
        one, peak = found["step_seconds"], found["measured_peak_bytes"]["value"] / 2**30
        body.append([one["precision"], "on" if one["checkpointing"] else "off", one["batch"],
                     number(found["predicted_peak_bytes"]["value"] / 2**30, 1), number(peak, 1), number(one["value"] * 1000, 0),
                     number(found["tokens_per_second"]["value"], 0),
                     f"{100 * found['utilisation']['value']:.0f} %", *("yes" if peak < 0.92 * size else "no" for size in CARDS)])
    head = ["weights", "checkpointing", "rows a step", "predicted GiB", "measured GiB", "ms a step", "tokens/s", "utilisation"]
    text = "\n\nFits: below 92 % of the card, the rest being the driver's and fragmentation's."
    return table([*head, *(f"fits {size} GiB" for size in CARDS)], body) + text


BLOCKS = {"task1/data": data, "task1/choices": lambda found: choices(found, TASK), "task1/results": each_run(TASK, "04_eval", results_block),
          "task1/errors": each_run(TASK, "04_eval", errors), "task1/ablations": each_run(TASK, "ablations", ablations),
          "task1/several": spread.several(TASK),
          "task1/cost": each_run(TASK, "04_eval", lambda found: cost(found, TASK, "Predicted and measured, in full"))}


def loss_figure(rows: Rows, figure) -> None:
    axes = figure.add_subplot()
    for metric, label, style in (("loss", "training batches", dict(color="#9aa5b1", lw=1)),
                                 ("eval_loss", "dev package", dict(color="#c2410c", lw=2, marker="o", ms=4))):
        points = rows.all(table="curve", metric=metric)
        axes.plot([p["step"] for p in points], [p["value"] for p in points], label=label, **style)
    axes.set(xlabel="optimiser step", ylabel="NLL per token (nats)")
    axes.legend(frameon=False)


def delta_figure(rows: Rows, figure) -> None:
    deltas = [r for r in rows.all(model="delta") if r["metric"] in ("acc", "acc_norm")][::-1]
    figure.set_size_inches(6.4, 0.32 * len(deltas) + 0.9)
    axes = figure.add_subplot()
    for y, r in enumerate(deltas):
        axes.plot([r["lo"], r["hi"]], [y, y], color="#c2410c" if r["lo"] > 0 or r["hi"] < 0 else "#52606d", lw=2)
        axes.plot(r["value"], y, "o", color="#1f2933", ms=4)
    axes.axvline(0, color="#9aa5b1", lw=1)
    axes.set_yticks(range(len(deltas)), [f"{r['table']} {r['metric']}" for r in deltas])
    axes.set_xlabel("accuracy, tuned minus base (95 % interval)")


def figures(found: Found) -> dict[Path, str]:
    plots = {"loss": ("03_train", loss_figure), "deltas": ("04_eval", delta_figure)}
    return draw(found, TASK, (6.4, 3.2), plots) | spread.figure(found, TASK)
