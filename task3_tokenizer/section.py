"""What report.md says about task 3: tables and figures made from its result files."""

from __future__ import annotations

from pathlib import Path

from common.report import Found, Rows, choices, code, cost, draw, each_run, fold, interval, main_run, number, p_value, shown, table

TASK = "task3_tokenizer"
STAGES = {"init": "before training", "a": "(a) new rows", "b": "(b) both matrices", "c1": "(c1) + LoRA, attention", "c2": "(c2) + LoRA, all"}
KINDS = {"uses": "around terms", "domain": "any held-out text", "free": "held-out, no term", "general": "general English"}


def data(found: Found) -> str:
    rows = shown(found, TASK, "01_data")
    if rows is None:
        return "not run"
    counts = table(["count", "value"], [[r["metric"].replace("_", " "), number(r["value"])] for r in rows.all(table="counts")])
    best = [[f"`{r['model']}`", " ".join(code(p) for p in r["pieces"]), number(r["value"], 0), number(r["keyness"], 0), r["documents"],
             r["held_out_documents"], "yes" if r["taken"] else r["rejected"] or "accepted, not taken"] for r in rows.all(table="candidates")]
    reasons = table(["reason", "words"], [[r["model"], r["value"]] for r in rows.all(table="rejected")])
    surface = table(["form", "caught in one id", "n"], [[r["model"], number(r["value"]), number(r["n"])] for r in rows.all(table="surface")])
    return "\n\n".join([counts, "Why candidates were rejected:", reasons,
                        fold("The sixty best candidates, accepted and rejected",
                             table(["word", "pieces", "score", "keyness", "training documents", "held out", "taken"], best[:60])),
                        "Which forms of a term the new id catches:", surface])


def spelling(rows: Rows) -> str:
    return table(["term", "pieces now", "which", "ids", "bytes", "new id"],
                 [[f"`{r['model']}`", r["value"], " ".join(code(p) for p in r["pieces"]), " ".join(map(str, r["ids"])), r["bytes"], r["new_id"]]
                  for r in rows.all(table="spelling")])


def before(found: Found) -> str:
    rows = shown(found, TASK, "02_baseline")
    if rows is None:
        return "not run"
    ways, heads = [], ("round_trip_share", "one_token_share", "stray_blanks_per_text", "other_words_cut_differently", "texts_longer",
                       "tokens_per_text")
    for name in dict.fromkeys(r["model"] for r in rows.all(table="ways")):
        words = rows.one(table="ways", model=name, metric="examples")["words"]
        ways.append([name, *(number(rows.one(table="ways", model=name, metric=m)["value"]) for m in heads), ", ".join(f"`{w}`" for w in words)])
    n = rows.one(table="ways", metric="round_trip_share")["n"]
    base = [[KINDS.get(r["table"], r["table"]), interval(r), r["n"]] for r in rows.all(model="base", metric="bits_per_byte")]
    return "\n\n".join([
        spelling(rows),
        f"Every way to add them, on {n} texts (the first row adds nothing):",
        table(["way", *(h.replace("_", " ") for h in heads), "such words"], ways),
        "The untrained model, in bits per byte:", table(["text", "bits per byte [95 %]", "n"], base)])


def note(found: Found) -> str:
    """What has to stand beside the verdict: differences where no new token can be the cause."""
    rows, more = shown(found, TASK, "04_eval"), shown(found, TASK, "ablations")
    free = rows.one(table="minus control: free", model="new c2")
    again = [r for r in more.all(table="seeds", model="new minus control", kind="uses") if r["seed"] != "as in 03"] if more else []
    said = ["For scale, the same two trainings differ"]
    said += [f"by {interval(free)} in text without any term"] if free else []
    said += [f"{'; and ' if free else ''}by {' and '.join(map(interval, again))} around terms when both are repeated with "
             f"{'another seed' if len(again) == 1 else f'{len(again)} other seeds'}"] if again else []
    return " ".join(said).replace(" ; and", "; and") + "." if len(said) > 1 else ""


def stage_rows(rows: Rows, kind: str, metric: str) -> list[list]:
    body = []
    for stage, title in STAGES.items():
        new, control = (rows.one(table=kind, model=f"{arm} {stage}", metric=metric) for arm in ("new", "control"))
        if new:
            delta = rows.one(table=f"minus control: {kind}", model=f"new {stage}", metric=metric)
            base = rows.one(table=f"minus base: {kind}", model=f"new {stage}", metric=metric)
            body.append([KINDS[kind], title, interval(new), interval(control), interval(delta), p_value(delta["p"]) if delta else "–",
                         delta["verdict"] if delta else "–", interval(base)])
    return body


HEAD = ["text", "stage", "new tokens [95 %]", "control [95 %]", "new minus control [95 %]", "p", "verdict", "new minus untrained base [95 %]"]


def results_block(found: Found) -> str:
    rows, trained, run = shown(found, TASK, "04_eval"), shown(found, TASK, "03_train"), main_run(found, TASK)
    if rows is None:
        return "not run"
    others = [line for kind in list(KINDS)[1:] for line in stage_rows(rows, kind, "bits_per_byte")]
    leak, after = [], []
    for stage, title in STAGES.items():
        r, new = rows.one(table="leak", model=f"new {stage}"), rows.one(table="uses", model=f"new {stage}", metric="reciprocal_rank")
        mass = rows.one(table="free", model=f"new {stage}", metric="new_token_mass") or rows.one(table="general", model=f"new {stage}",
                                                                                               metric="new_token_mass")
        if new:  # old pieces are not read after every stage
            leak.append([title, interval(r), interval(new), interval(mass)])
    for r in rows.all(table="id minus old pieces"):
        sides = (rows.one(table=kind, model=r["model"], metric="after_bits_per_byte") for kind in ("uses", "uses, old pieces"))
        after.append([STAGES[r["model"].split()[1]], *map(interval, sides), interval(r), p_value(r["p"]), r["verdict"]])
    inits = [[r["model"], interval(r), interval(rows.one(table="inits", model=r["model"], metric="uses term_bits")),
              interval(rows.one(table="inits", model=r["model"], metric="free new_token_mass"))]
             for r in rows.all(table="inits", metric="uses bits_per_byte")]
    frozen = [[r["model"], STAGES[r["stage"]], *(number(trained.one(table="training", model=r["model"], stage=r["stage"], metric=m)["value"])
                                                 for m in ("input_largest_change_of_other_rows", "output_largest_change_of_other_rows",
                                                           "input_mean_change_of_other_rows", "input_trained_norm", "output_trained_norm",
                                                           "input_median_norm", "dev_bits_per_byte"))]
              for r in trained.all(table="training", metric="input_rows_identical")]
    inside = []
    for r in rows.all(table="intrinsic", metric="anchors"):
        def cell(metric, r=r):
            return interval(rows.one(table="intrinsic", model=r["model"], stage=r["stage"], metric=metric))
        minus = rows.one(table="intrinsic minus init", model=r["model"], stage=r["stage"], metric="anchors")
        inside.append([r["model"], STAGES[r["stage"]], interval(r), interval(minus),
                       *map(cell, ("negatives", "anchor_rank", "negative_rank", "norm"))])
    inside_rows = inside and [
        "Inside the rows: mean-centred cosine to anchor words and to words that have nothing to do with the term, and the share of 1,000 random "
        "words that are less similar (0.5 is chance):",
        table(["matrix", "stage", "cosine to anchors [95 %]", "minus before training", "to negative anchors", "anchors above", "negatives above",
               "norm over median"], inside), f"![cosine by stage](results/{run}/{TASK}/cosine.svg)"]
    saved = [[r["model"], number(r["before"], 1), number(r["after"], 1), number(r["value"], 1), number(r["n"])] for r in rows.all(table="saved")]
    speeds = [r["value"] for r in rows.all(table="speed")]
    speed = [[r["model"], number(r["value"], 0)] for r in rows.all(table="speed")]
    speed.append(["ratio", number(speeds[0] / speeds[1])])
    written = [[name, *(rows.one(table="continued", model=name, metric=m)["value"] for m in
                        ("continued", "term_written", "term_written_by_new_id", "re_encodes_alike"))]
               for name in dict.fromkeys(r["model"] for r in rows.all(table="continued"))]
    parts = [
        "Bits per byte around terms (whole windows of about 180 characters), lower is better:",
        table(HEAD, stage_rows(rows, "uses", "bits_per_byte")), f"![bits per byte by stage](results/{run}/{TASK}/stages.svg)",
        "Only the term itself, in bits per use, whatever it is spelled with:", table(HEAD, stage_rows(rows, "uses", "term_bits")),
        "Other text: what does it cost where no new word stands?", table(HEAD, others),
        "Does the model still spell a term with old pieces, where does the id stand at its true place (reciprocal rank), and how much "
        "probability do the new ids take where no term comes?",
        table(["stage", "share of probability on old pieces", "reciprocal rank of the id", "mass of new ids in text without terms"], leak),
        "Does the id tell the model what the pieces told it? Bits per byte of the text after the term, the same model reading it by id and by "
        "pieces:", table(["stage", "after the id [95 %]", "after the pieces [95 %]", "id minus pieces [95 %]", "p", "verdict"], after),
        "First values compared, before any training:",
        table(["first values", "bits per byte around terms", "bits per term", "mass of new ids in text without terms"], inits),
        *inside_rows,
        "What stayed frozen, what moved. \"Other rows\" are all that are no new row (control: no piece of a term):",
        table(["arm", "stage", "largest change of other input rows", "of other output rows", "mean change, input", "norm of trained input rows",
               "of output rows", "median norm", "dev bits per byte"], frozen),
        "Length and speed:", table(["text", "tokens per 1,000 words before", "after", "saved", "words"], saved),
        table(["reading held-out windows", "bytes per second"], speed),
        "Held-out beginnings that stop right before a term, continued greedily:",
        table(["model", "beginnings", "wrote the term", "by its new id", "decode and encode give the same ids"], written)]
    if rows.all(table="known"):
        parts += ["How good can it get? Real single-token words, hidden (their rows overwritten by the mean of the pieces they would be made "
                  "of), learnt again as in (a), and compared with the rows that pretraining had given them: "
                  + ", ".join(f"`{r['model']}`" for r in rows.all(table="known words")) + ".", known(rows)]
    return "\n\n".join(parts)


def known(rows: Rows) -> str:
    inside = [[name, *(number(rows.one(table="known", model=name, metric=m)["value"]) for m in ("cosine", "rank", "overlap", "norm_over_true"))]
              for name in dict.fromkeys(r["model"] for r in rows.all(table="known"))]
    outside = [[r["metric"], *(interval(rows.one(table="known uses", model=m, metric=r["metric"])) for m in ("true", "start", "learnt")),
                interval(r), p_value(r["p"]), r["verdict"]] for r in rows.all(table="known uses", model="learnt minus true")]
    return "\n\n".join([
        table(["rows", "cosine to the true row", "rank of the true row", "shared neighbours of ten", "norm over true"], inside),
        table(["held-out uses", "true rows", "mean of pieces", "learnt again", "learnt minus true [95 %]", "p", "verdict"], outside)])


WORTH = {"improved": "yes: shorter, and predicted better", "no difference shown": "for length: shorter, no difference shown",
         "worse": "no: shorter, but predicted worse"}


def definitions(rows: Rows, prompt: str) -> str:
    said = [[f"`{r['model']}`", *(code(r[f"definition_{k}"], 120) for k in ("before", "control", "after"))] for r in rows.all(table="cards")]
    return fold(f"How each model goes on after \"{prompt}\"", table(["term", "base", "control", "new tokens"], said))


def cards(found: Found) -> str:
    rows, start = shown(found, TASK, "04_eval"), shown(found, TASK, "02_baseline")
    if rows is None:
        return "not run"
    body, near = [], []
    for r in rows.all(table="cards"):
        body.append([f"`{r['model']}`", start.one(table="spelling", model=r["model"])["value"], *(number(r[k], 1) for k in
                     ("base", "control_c2", "new_init", "new_a", "new_c2", "either")), interval(r), r["median_rank"], WORTH[r["verdict"]]])
        near.append([f"`{r['model']}`", ", ".join(r["neighbours_before"][:6]), ", ".join(r["neighbours_after"][:6]),
                     ", ".join(r["neighbours_input_after"][:6])])
    verdicts = [sum(r["verdict"] == v for r in rows.all(table="cards")) for v in WORTH]
    return "\n\n".join([
        f"Of {len(body)} terms {verdicts[0]} are predicted better by the model with new tokens than by the control, for {verdicts[1]} no difference "
        f"can be shown with at most {max(r['n'] for r in rows.all(table='cards'))} uses each, {verdicts[2]} are predicted worse; of {len(body)} "
        "verdicts at p < 0.05 one is expected to be wrong. Bits a term costs at its true place (`either`: new id or old pieces after the same "
        "text, their probabilities added; this is what the verdict compares with the control):",
        table(["term", "pieces", "base", "control", "before training", "(a)", "(c2), id", "(c2), either", "either minus control [95 %]",
               "median rank", "worth adding?"], body),
        fold("Nearest words: output rows before training and after (c2), input rows after (c2)",
             table(["term", "output, before", "output, after", "input, after"], near)),
        definitions(rows, "In a Python library, TERM is")])


def ablations(found: Found) -> str:
    rows = shown(found, TASK, "ablations")
    if rows is None or not rows.rows:
        return "not run: `make ablations`"
    body = []
    for r in rows.all(table="ablation", metric="bits_per_byte"):
        def cell(metric, r=r):
            return interval(rows.one(table="ablation", model=r["model"], metric=metric))
        body.append([r["model"], interval(r), interval(rows.one(table="ablation minus 03", model=r["model"], metric="bits_per_byte")),
                     *map(cell, ("term_bits", "after_bits_per_byte", "tokens_per_byte", "new_token_mass"))])
    curve = [[r["texts"], number(r["windows_per_term"], 0), interval(r), *(interval(rows.one(table="texts", texts=r["texts"], metric=m)) for m in
                                         ("term_bits", "reciprocal_rank", "anchors")), number(r["steps"])]
             for r in rows.all(table="texts", metric="bits_per_byte")]
    parts = [table(["changed, then stage (a)", "bits per byte around terms [95 %]", "minus the row of 03 [95 %]", "bits per term",
                    "bits per byte after the term", "tokens per byte", "mass of new ids in text without terms"], body)]
    if curve:
        parts += [f"How many texts does a token need? The {rows.one(table='texts')['terms']} terms with the most texts, stage (a) alone, each "
                  "text once:", table(["texts per token, at most", "mean", "bits per byte around terms [95 %]", "bits per term", "reciprocal rank",
                                       "cosine to anchors (output)", "steps"], curve),
                  f"![texts per token](results/{main_run(found, TASK)}/{TASK}/texts.svg)"]
    seeds = [[KINDS[r["kind"]], r["seed"], *(interval(rows.one(table="seeds", model=m, kind=r["kind"], seed=r["seed"])) for m in ("new", "control")),
              interval(r), p_value(r["p"]), r["verdict"]] for r in rows.all(table="seeds", model="new minus control")]
    if seeds:
        parts += ["Both arms through all stages again, with the seed (order of texts, adapter) one higher each time: intervals over texts do not "
                  "show what another training changes. Bits per byte after (c2):",
                  table(["text", "training", "new tokens [95 %]", "control [95 %]", "new minus control [95 %]", "p", "verdict"], seeds)]
    return "\n\n".join(parts)


def russian(found: Found) -> str:
    """The run on colloquial Russian words in short, if there is one."""
    run = next((n for (n, t, s), r in found.items() if (t, s) == (TASK, "04_eval") and r["config"]["terms"] == "ru"), None)
    if run is None:
        return "not run: `make task3 TERMS=ru RUN=ru`"
    start, rows = (Rows(found[run, TASK, step]) for step in ("02_baseline", "04_eval"))
    cards = [[f"`{r['model']}`", *(number(r[k], 1) for k in ("base", "control_c2", "new_a", "new_c2", "either")), interval(r), WORTH[r["verdict"]]]
             for r in rows.all(table="cards")]
    saved = rows.one(table="saved", model="uses")
    return "\n\n".join([
        spelling(start),
        table(HEAD, stage_rows(rows, "uses", "bits_per_byte") + stage_rows(rows, "general", "bits_per_byte")),
        f"Tokens per 1,000 words of such sentences: {number(saved['before'], 0)} before, {number(saved['after'], 0)} after.",
        table(["term", "base", "control", "(a)", "(c2), id", "(c2), either", "either minus control [95 %]", "worth adding?"], cards),
        definitions(rows, "Простыми словами, TERM — это")])


BLOCKS = {"task3/data": data, "task3/choices": lambda found: choices(found, TASK), "task3/before": before,
          "task3/results": each_run(TASK, "04_eval", results_block),
          "task3/cards": cards, "task3/russian": russian,
          "task3/ablations": each_run(TASK, "ablations", ablations),
          "task3/cost": each_run(TASK, "04_eval", lambda found: cost(found, TASK, "All facts of the training"))}


def band(axes, points: list[tuple], label: str, colour: str) -> None:
    """A line through (x, row) with the rows' intervals as bars; points without a row are left out."""
    points = [(p, r) for p, r in points if r]
    x = [p for p, _ in points]
    axes.errorbar(x, [r["value"] for _, r in points], yerr=[[r["value"] - r["lo"] for _, r in points], [r["hi"] - r["value"] for _, r in points]],
                  color=colour, marker="o", ms=4, lw=1.5, capsize=2, label=label)


def stage_ticks(axes) -> None:
    axes.set_xticks(range(len(STAGES)), ["before" if stage == "init" else f"({stage})" for stage in STAGES])


def stages_figure(rows: Rows, figure) -> None:
    figure.set_size_inches(7.6, 3)
    for axes, (kind, title) in zip(figure.subplots(1, 2), (("uses", "around terms"), ("general", "general English"))):
        base = rows.one(table=f"minus base: {kind}", model="new a", metric="bits_per_byte")
        if base is None:
            continue
        for arm, colour, shift in (("new", "#c2410c", 0.06), ("control", "#52606d", -0.06)):
            points = [(i + shift, r) for i, s in enumerate(STAGES) if (r := rows.one(table=kind, model=f"{arm} {s}", metric="bits_per_byte"))]
            band(axes, points, "new tokens" if arm == "new" else "control", colour)
        untrained = rows.one(table=kind, model="new a", metric="bits_per_byte")["value"] - base["value"]
        axes.axhline(untrained, color="#9aa5b1", lw=1, ls="--", label="untrained base")
        axes.set(title=title, ylabel="bits per byte")
        stage_ticks(axes)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()


def cosine_figure(rows: Rows, figure) -> None:
    if not rows.one(table="intrinsic", metric="anchors"):
        return  # terms without anchors
    figure.set_size_inches(7.6, 3)
    for axes, side in zip(figure.subplots(1, 2, sharey=True), ("input", "output")):
        for metric, label, colour in (("anchors", "anchors", "#c2410c"), ("negatives", "negative anchors", "#52606d")):
            band(axes, [(i, rows.one(table="intrinsic", model=side, stage=s, metric=metric)) for i, s in enumerate(STAGES)], label, colour)
        axes.set(title=f"{side} rows", ylabel="mean-centred cosine")
        stage_ticks(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))


def texts_figure(rows: Rows, figure) -> None:
    points = [(r["texts"], r) for r in rows.all(table="texts", metric="term_bits")]
    if not points:
        return
    axes = figure.add_subplot()
    band(axes, points, "by its new id", "#c2410c")
    old = rows.one(table="texts base", metric="term_bits")
    axes.axhline(old["value"], color="#9aa5b1", lw=1, ls="--", label="by old pieces, untrained base")
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks([p for p, _ in points], [str(p) for p, _ in points])
    axes.set_xlim(-1, 1.2 * max(p for p, _ in points))
    axes.set(xlabel="texts per token", ylabel="bits per use of a term")
    axes.legend(frameon=False)


def figures(found: Found) -> dict[Path, str]:
    plots = {"stages": ("04_eval", stages_figure), "cosine": ("04_eval", cosine_figure), "texts": ("ablations", texts_figure)}
    return draw(found, TASK, (6.4, 3.2), plots)
