"""Wrong lines that nobody would notice in a report, and the tests that notice them.

`old` stands exactly once in `file`; with `new` in its place every test of `caught_by` fails. As a script it
runs tests and prints how each of them ended: tests/test_planted.py applies the faults to a copy of the code.
"""

import json
import os
import sys
from typing import NamedTuple

import pytest


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]  # pytest ids under tests/


STATS, TRAINING, MODELS = (f"common/{name}.py" for name in ("stats", "training", "models"))
RESULTS, RUNNER, FRESH = (f"pipeline/{name}.py" for name in ("results", "runner", "fresh"))
CORPUS = "sources/corpus.py"
TASK1, DATA1, BASE1, TRAIN1, EVAL1, SCORING1, HARNESS1 = (
    f"task1_decoder/{name}.py"
    for name in ("task", "01_data", "02_baseline", "03_train", "04_eval", "scoring", "harness"))
TASK2, DATA2, TRAIN2, EVAL2, BATCHES2 = (
    f"task2_encoder/{name}.py" for name in ("task", "01_data", "03_train", "04_eval", "batches"))
TASK3, TRAIN3, EVAL3, ROWS3, DISTIL3 = (
    f"task3_tokenizer/{name}.py" for name in ("task", "03_train", "04_eval", "embeddings", "distil"))

PLAIN1 = "test_reference.py::test_task_1_trains_what_a_plain_loop_trains"
BASE_1 = "test_reference.py::test_task_1_measures_the_base_without_and_with_examples"
TUNED1 = "test_reference.py::test_task_1_compares_the_tuned_model_with_the_base"
COUNTS1 = "test_reference.py::test_task_1_counts_the_bytes_of_general_text_and_the_right_answers"
RELOADS1 = "test_reference.py::test_an_adapter_that_reloads_wrongly_is_not_kept"
PLAIN2 = "test_reference.py::test_task_2_trains_what_a_plain_loop_trains"
TUNED2 = "test_reference.py::test_task_2_compares_the_tuned_encoder_with_the_base"
PLAIN3 = "test_reference.py::test_task_3_trains_what_a_plain_loop_trains"
FIRST3 = "test_reference.py::test_task_3_starts_new_rows_of_both_matrices_at_the_mean_of_their_pieces"
BYTES3 = "test_reference.py::test_task_3_counts_bytes_where_a_letter_has_two"
ORDER3 = "test_reference.py::test_task_3_trains_both_arms_on_the_same_texts_in_the_same_order"
STARTS3 = "test_task3.py::test_the_model_starts_distilled_if_the_knob_says_so"
CONTROL3 = "test_reference.py::test_task_3_subtracts_the_control_from_the_new_model"
UNCHANGED = "test_reference.py::test_an_evaluation_that_finds_no_change_is_refused"
STALE_DATA = "test_reference.py::test_a_changed_data_file_makes_the_result_of_01_stale"
DIRECTIONS = "test_reference.py::test_every_metric_has_the_direction_that_is_better"
KNOBS1, KNOBS2, KNOBS3 = (
    f"test_knobs.py::test_every_knob_of_training_reaches_the_library[{task}]"
    for task in ("task1_decoder", "task2_encoder", "task3_tokenizer"))
IDENTITY1, IDENTITY2 = (f"test_knobs.py::test_a_checkpoint_belongs_to_its_knobs_and_data[{task}]"
                        for task in ("task1_decoder", "task2_encoder"))
IDENTITY3 = "test_knobs.py::test_a_stage_of_task_3_belongs_to_its_knobs_data_and_arm"
LABELS1 = "test_task1.py::test_labels_are_exactly_the_answers_though_padding_differs_in_length"
NLL1 = "test_task1.py::test_nll_equals_the_sum_computed_row_by_row"
WORKED1 = "test_task1.py::test_score_on_a_worked_example"
BATCH2 = "test_task2.py::test_no_group_stands_twice_in_a_batch_and_batches_are_alike_in_length"
GROUPS2 = "test_task2.py::test_every_document_of_a_group_is_a_right_answer_and_equal_texts_are_one"
BEST2 = "test_encoders.py::test_the_weights_of_the_best_evaluation_are_kept"
RELOADS2 = "test_encoders.py::test_an_adapter_that_does_not_reload_is_refused"

# Run in every `make test`; the others by `make faults`.
FAST = ("bootstrap not paired", "one-sided p", "verdict turned round")

FAULTS = [Fault(name, file, old, new, caught_by if isinstance(caught_by, tuple) else (caught_by,))
          for name, file, old, new, caught_by in (
    # ------------------------------------------------------------------------------------------- statistics
    ("bootstrap not paired", STATS, "paired=True", "paired=False",
     "test_stats.py::test_the_bootstrap_draws_an_item_with_its_weight"),
    ("one-sided p", STATS, 'permutation_type="samples"', 'permutation_type="samples", alternative="greater"',
     "test_stats.py::test_permutation_p_is_the_exact_count_over_sign_flips"),
    ("90 % interval", STATS, "batch=500", "batch=500, confidence_level=0.9",
     "test_stats.py::test_interval_of_a_normal_mean_matches_theory"),
    ("verdict turned round", STATS, '(delta["value"] > 0) == higher', '(delta["value"] > 0) != higher',
     "test_stats.py::test_verdict_needs_the_interval_and_the_p"),
    ("verdict without p", STATS, ' or delta.get("p_holm", delta["p"]) >= 0.05', "",
     "test_stats.py::test_verdict_needs_the_interval_and_the_p"),
    ("before minus after", STATS, "difference = after - before", "difference = before - after",
     "test_stats.py::test_delta_is_a_ratio_of_totals_not_a_mean_of_ratios"),
    ("mean of ratios", STATS, "totals.sum(axis=axis) / weights.sum(axis=axis)",
     "(totals / weights).mean(axis=axis)",
     "test_stats.py::test_delta_is_a_ratio_of_totals_not_a_mean_of_ratios"),
    ("sign of McNemar's difference", STATS, '"value": (gained - lost)', '"value": (lost - gained)',
     "test_stats.py::test_mcnemar_counts_only_the_discordant_items"),
    ("before and after of other items", STATS,
     'if [item.get("id") for item in before] != [item.get("id") for item in after]:',
     "if len(before) != len(after):",
     ("test_stats.py::test_items_that_are_not_the_same_are_never_compared",
      "test_task2.py::test_before_and_after_are_the_same_queries")),
    ("an adapter that does nothing is accepted", STATS, "if before == after:", "if before is after:",
     (UNCHANGED, "test_reference.py::test_task_3_refuses_an_arm_that_did_not_change")),

    # ------------------------------------------------------------------------- freshness, models and corpus
    ("freshness ignores the data file", FRESH,
     "now = results.source_hash(results.ROOT / rest)", "now = old", STALE_DATA),
    ("artifacts not compared with their result", RUNNER,
     'if results.sha256(path) != made["artifacts"].get(name):', "if not made:",
     "test_results.py::test_what_a_step_left_is_verified_before_it_is_read"),
    ("own data is not tracked", DATA1, "run.track(Path(cfg.data)", "str(Path(cfg.data)", STALE_DATA),
    ("shared knobs not checked", RUNNER, 'if value not in (made, result["env"].get(name, made)):',
     'if made is None:',
     "test_reference.py::test_a_step_with_another_value_of_a_shared_knob_is_refused"),
    ("module hash without numbers", RESULTS, "else repr(node)", "else type(node).__name__",
     "test_results.py::test_knob_edit_makes_that_step_and_those_after_stale"),
    ("NaN loss goes on", TRAINING, "if not all(math.isfinite(", "if all(math.isinf(",
     "test_reference.py::test_a_loss_or_gradient_that_is_no_number_ends_the_training"),
    ("checkpoints of other knobs are resumed", TRAINING, "stored.read_text() == digest", "stored.read_text()",
     "test_knobs.py::test_checkpoints_of_another_identity_are_removed"),
    ("fp4 instead of NF4", MODELS, 'bnb_4bit_quant_type="nf4"', 'bnb_4bit_quant_type="fp4"',
     "test_models.py::test_four_bits_are_never_loaded_by_an_unsaid_rule"),
    ("double_quant ignored", MODELS, "use_double_quant=double_quant", "use_double_quant=True",
     "test_models.py::test_four_bits_are_never_loaded_by_an_unsaid_rule"),
    ("double_quant of the encoder ignored", MODELS, 'nf4(compute, double_quant, ["pooler"])',
     'nf4(compute, True, ["pooler"])',
     "test_knobs.py::test_an_encoder_in_4_bits_is_nf4_with_the_scales_as_asked"),
    ("16 bits instead of 4", MODELS, 'nf4(compute, double_quant) if precision == "nf4" else None', "None",
     "test_models.py::test_size_counts_parameters_not_packed_bytes"),
    ("03 loads another base than 02 and 04", TRAIN1,
     "base = models.load_decoder(cfg.model, cfg.precision, cfg.compute, cfg.double_quant)",
     "base = models.load_decoder(cfg.model, cfg.precision, cfg.compute, True)",
     "test_knobs.py::test_all_steps_of_task_1_load_the_same_base"),
    ("leaks are never counted", CORPUS, "twin is not None and twin < n", "twin is not None and twin < 0",
     "test_corpus.py::test_planted_leaks_are_counted"),
    ("near copies stay", CORPUS, ">= threshold * len", "> 2 * threshold * len",
     "test_corpus.py::test_near_duplicates_point_at_the_earlier_kept_one"),

    # ---------------------------------------------------------------------------------- task 1: what is fed
    ("labels shifted by one", TASK1, '[-100] * len(example["prompt"]) + example["answer"]',
     '[-100] * (len(example["prompt"]) - 1) + example["answer"] + [-100]', (LABELS1, PLAIN1)),
    ("the prompt is trained too", TASK1, '[-100] * len(example["prompt"]) + example["answer"]',
     'example["prompt"] + example["answer"]', LABELS1),
    ("EOS not trained", TASK1, '[*self.ids(row["completion"]), self.end]', '[*self.ids(row["completion"])]',
     "test_task1.py::test_an_answer_closes_with_eos_unless_it_is_too_long"),
    ("few-shot prompt without its examples", BASE1, "task.trained_texts(run), task.shots_of(run))",
     "task.trained_texts(run))", BASE_1),
    ("dev scored as test", TASK1, 'test = run.rows("test")', 'test = run.rows("dev")', BASE_1),
    ("leaks into the test rows not looked for", DATA1, "texts(splits[split])).items()",
     "texts(splits[split][:0])).items()",
     "test_task1.py::test_training_rows_that_repeat_held_out_ones_stop_the_run"),
    ("answer index off by one", DATA1, '"answer": choices.index(right)',
     '"answer": (choices.index(right) + 1) % 4',
     "test_task1.py::test_a_question_has_four_different_choices"),
    ("lm-eval takes the choice after the right one", "task1_decoder/docstring_choice.yaml",
     "doc_to_target: answer", 'doc_to_target: "{{(answer + 1) % 4}}"', COUNTS1),
    ("the first benchmark items instead of a draw", HARNESS1,
     "np.random.default_rng(SAMPLE_SEED).permutation(n_items)", "np.arange(n_items)",
     "test_harness.py::test_sample_is_seeded_spread_and_without_repeats"),

    # ---------------------------------------------------------------------------------- task 1: the training
    ("learning rate ignored", TRAIN1, "learning_rate=cfg.learning_rate", "learning_rate=5e-5",
     (PLAIN1, KNOBS1)),
    ("alpha ignored", TRAIN1, "lora_alpha=cfg.lora_alpha", "lora_alpha=2 * cfg.lora_r", PLAIN1),
    ("gradients accumulated over two batches", TRAIN1,
     "gradient_accumulation_steps=per_process // passes.rows",
     "gradient_accumulation_steps=2 * per_process // passes.rows", PLAIN1),
    ("seed of LoRA ignored", TRAIN1, "transformers.set_seed(cfg.seed)  # LoRA's A",
     "transformers.set_seed(0)  # LoRA's A", PLAIN1),
    ("seed of the order ignored", TRAIN1, "rng, ordered, needed = random.Random(cfg.seed)",
     "rng, ordered, needed = random.Random(0)", PLAIN1),
    ("clipping ignored", TRAIN1, "max_grad_norm=cfg.max_grad_norm", "max_grad_norm=0.0", PLAIN1),
    ("warm-up ignored", TRAIN1, "warmup_steps=cfg.warmup_steps", "warmup_steps=0", PLAIN1),
    ("schedule ignored", TRAIN1, "lr_scheduler_type=cfg.schedule", 'lr_scheduler_type="constant_with_warmup"',
     PLAIN1),
    ("weight decay ignored", TRAIN1, "weight_decay=cfg.weight_decay", "weight_decay=0.0", PLAIN1),
    ("dropout ignored", TRAIN1, "lora_dropout=cfg.lora_dropout", "lora_dropout=0.0", KNOBS1),
    ("patience ignored", TRAIN1, "EarlyStoppingCallback(cfg.patience)", "EarlyStoppingCallback(2)", KNOBS1),
    ("worst checkpoint kept", TRAIN1, "greater_is_better=False", "greater_is_better=True", PLAIN1),
    ("last checkpoint kept", TRAIN1, "load_best_model_at_end=True", "load_best_model_at_end=False", PLAIN1),
    ("dev loss of the training rows", TRAIN1, "dev = task.encode(tokenizer, dev, cfg)",
     "dev = task.encode(tokenizer, rows, cfg)", PLAIN1),
    ("checkpoint identity without knobs", TRAIN1, "[vars(cfg), data_hash]", "[data_hash]", IDENTITY1),
    ("checkpoint identity without data", TRAIN1, "[vars(cfg), data_hash]", "[vars(cfg)]", IDENTITY1),
    ("B still zero after training", TRAIN1, "if difference != 0 or moved == 0:", "if difference != 0:",
     RELOADS1),
    ("stale adapter", TRAIN1, "if difference != 0 or moved == 0:", "if moved == 0:", RELOADS1),

    # ------------------------------------------------------------------------------------ task 1: the scores
    ("one normaliser for all tokens", SCORING1, "logits.logsumexp(1)", "logits.logsumexp(1).mean()", NLL1),
    ("the least probable token counts as right", SCORING1, "logits.argmax(1)", "logits.argmin(1)",
     "test_task1.py::test_the_most_probable_tokens_count_as_right"),
    ("bytes counted as characters", TASK1, '"bytes": len(row["completion"].encode())',
     '"bytes": len(row["completion"])', BASE_1),
    ("bytes of general text counted as characters", TASK1, '"bytes": len(text.encode())',
     '"bytes": len(text)', COUNTS1),
    ("nats called bits", TASK1, "scale=1 / math.log(2)", "scale=1.0", WORKED1),
    ("flipped direction", TASK1, '"NLL per token (nats)", "nats", "tokens", better="lower"',
     '"NLL per token (nats)", "nats", "tokens", better="higher"', DIRECTIONS),
    ("copied turned round", TASK1, "normalise(text) in trained", "normalise(text) not in trained", WORKED1),
    ("tuned model scored without its adapter", EVAL1,
     "    model = PeftModel.from_pretrained(model, adapter).eval()", "    model = model.eval()", TUNED1),
    ("base scored with the adapter attached", EVAL1, "with model.disable_adapter():", "with torch.no_grad():",
     TUNED1),
    ("adapter dropped instead of merged", EVAL1, "merged = model.merge_and_unload()",
     "merged = model.unload()", TUNED1),
    ("base minus tuned", EVAL1, "name, items, after[table], metrics", "name, after[table], items, metrics",
     TUNED1),

    # ------------------------------------------------------------------------------------------------ task 2
    ("task 2: learning rate ignored", TRAIN2, "learning_rate=cfg.learning_rate", "learning_rate=2e-5",
     (PLAIN2, KNOBS2)),
    ("task 2: alpha ignored", TRAIN2, "lora_alpha=cfg.lora_alpha", "lora_alpha=2 * cfg.lora_r",
     PLAIN2),
    ("task 2: clipping ignored", TRAIN2, "max_grad_norm=cfg.max_grad_norm", "max_grad_norm=0.0",
     PLAIN2),
    ("task 2: warm-up ignored", TRAIN2, "warmup_steps=cfg.warmup_steps", "warmup_steps=0", PLAIN2),
    ("task 2: seed of LoRA ignored", TRAIN2, "torch.manual_seed(cfg.seed)", "torch.manual_seed(0)", PLAIN2),
    ("task 2: seed of the order ignored", BATCHES2, "rng, size, batches = random.Random(cfg.seed)",
     "rng, size, batches = random.Random(0)", BATCH2),
    ("own group as a negative", BATCHES2, ' and rows[i]["group"] not in groups', "", BATCH2),
    ("scale ignored", TRAIN2, "contrastive_loss(model, cfg.scale,", "contrastive_loss(model, 20.0,",
     PLAIN2),
    ("one direction of the loss only", TRAIN2, 'directions=("query_to_doc", "doc_to_query")',
     'directions=("query_to_doc",)', PLAIN2),
    ("task 2: worst checkpoint kept", TRAIN2, 'metric_for_best_model="mrr@10"',
     'metric_for_best_model="mrr@10", greater_is_better=False', BEST2),
    ("task 2: last weights kept", TRAIN2,
     "trainer._load_from_checkpoint(trainer.state.best_model_checkpoint)", "pass", BEST2),
    ("task 2: checkpoint identity without knobs", TRAIN2, "[vars(cfg), data_hash, method]",
     "[data_hash, method]", IDENTITY2),
    ("task 2: B still zero after training", TRAIN2, "if difference != 0 or moved == 0:",
     "if difference != 0:", RELOADS2),
    ("task 2: tuned model scored without its adapter", EVAL2, "task.measure(task.load_adapter(adapter, cfg),",
     "task.measure(task.load_encoder(cfg),", TUNED2),
    ("task 2: base minus tuned", EVAL2, 'stats.delta_rows(table, "delta", before, after, metrics)',
     'stats.delta_rows(table, "delta", after, before, metrics)', TUNED2),
    ("ties left in corpus order", TASK2, "(-scores[document], document)", "-scores[document]",
     "test_task2.py::test_equal_scores_are_ordered_by_id_and_not_by_the_order_of_the_texts"),
    ("only the own document is right", TASK2, '{row["id"]: groups[row["group"]] for',
     '{row["id"]: {row["id"]} for', GROUPS2),
    ("ranks below ten count", TASK2, 'item["rank"] <= 10 else', 'item["rank"] <= 100 else',
     "test_task2.py::test_an_answer_below_ten_counts_for_nothing_but_its_rank"),
    ("task 2: held-out texts not compared with training", DATA2, "corpus.leaks(*as_code)",
     "corpus.leaks([], next(as_code))", "test_task2.py::test_planted_leaks_fire"),
    ("only the first function answers a question", TASK2, 'for name in line["functions"] for',
     'for name in line["functions"][:1] for',
     "test_task2.py::test_a_question_is_answered_by_every_document_of_the_groups_of_its_functions"),

    # ------------------------------------------------------------------------------------------------ task 3
    ("rate of the rows ignored", TRAIN3, '"lr": stage.lr_rows', '"lr": 1e-3', (PLAIN3, KNOBS3)),
    ("matrices learn at the rate of the rows", TRAIN3, '"lr": stage.lr_matrices', '"lr": stage.lr_rows',
     PLAIN3),
    ("task 3: alpha ignored", TRAIN3, "lora_alpha=cfg.lora_alpha", "lora_alpha=2 * cfg.lora_r",
     PLAIN3),
    ("task 3: gradients accumulated over two batches", TRAIN3, "per_device_train_batch_size=batch_size",
     "per_device_train_batch_size=batch_size, gradient_accumulation_steps=2", PLAIN3),
    ("task 3: clipping ignored", TRAIN3, "max_grad_norm=cfg.max_grad_norm", "max_grad_norm=0.0",
     PLAIN3),
    ("task 3: warm-up ignored", TRAIN3, "warmup_steps=max(1, round(cfg.warmup * steps))", "warmup_steps=0",
     PLAIN3),
    ("task 3: seed of LoRA ignored", TRAIN3, "set_seed(cfg.seed)", "set_seed(0)", PLAIN3),
    ("task 3: adapter dropped instead of merged", TRAIN3, "model.merge_and_unload() if stage.layers",
     "model.unload() if stage.layers", PLAIN3),
    ("task 3: stage identity without knobs", TRAIN3, "[vars(cfg), made_from, arm.name, name]",
     "[made_from, arm.name, name]", IDENTITY3),
    ("initial rows not written to the head", ROWS3, "write_rows(model, list(pieces_of), rows)",
     "write_rows(model, list(pieces_of), rows[:1])", FIRST3),
    ("rows initialised in the wrong order", ROWS3, "pieces, head = list(pieces_of.values())",
     "pieces, head = list(pieces_of.values())[::-1]", FIRST3),
    ("rows start at their first piece", ROWS3, "matrix[ids].mean(0) for ids", "matrix[ids[0]] for ids",
     (FIRST3, "test_task3.py::test_first_values_worked_by_hand")),
    ("new rows missing in the head", ROWS3, ", bias).index_copy_(-1, self.ids, own)", ", bias)", PLAIN3),
    ("wrong rows written", ROWS3, "layer.weight[where] = values", "layer.weight[where - 1] = values",
     (PLAIN3, "test_task3.py::test_rows_are_written_in_the_order_of_the_ids_given")),
    ("control in another order of texts", TRAIN3, "windows.interleave_terms(part, seed,",
     'windows.interleave_terms(part, seed + (arm.name == "control"),', ORDER3),
    ("task 3: seed of the order ignored", TRAIN3, 'folder / "init", cfg.seed', 'folder / "init", 0', ORDER3),
    ("control minus new", EVAL3, 'f"new {stage}", before[kind], new)', 'f"new {stage}", new, before[kind])',
     CONTROL3),
    ("tokenizer and model out of step", EVAL3, '(lexicon.new, lexicon.pieces_of) if arm == "new"',
     '(lexicon.old, lexicon.pieces_of) if arm == "new"', CONTROL3),
    ("distilled towards itself", DISTIL3, "target = states(before, counts)", "target = states(after, counts)",
     "test_task3.py::test_distilled_rows_are_read_as_their_pieces_were"),
    ("distilled from the texts of all stages", TRAIN3, 'source, dev, parts["a"])',
     "source, dev, texts)", STARTS3),
    ("passes of the distillation ignored", TRAIN3, ", cfg.distil_passes)", ", 1)", STARTS3),
    ("detection where the first token comes", TASK3, "detection = -masses[start + place[0]]",
     "detection = -masses[start]", "test_task3.py::test_a_score_is_that_of_a_plain_forward_pass"),
    ("task 3: bytes counted as characters", TASK3, '"bytes": len(text.encode())', '"bytes": len(text)',
     BYTES3),
    ("bytes after a term counted as characters", TASK3, 'len(text[rows[i]["end"]:].encode())',
     'len(text[rows[i]["end"]:])', BYTES3),
)]


class Endings:
    """{id: "passed", or when a test failed and by which exception}, as a plugin of pytest."""

    def __init__(self):
        self.found: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo:
            self.found[item.nodeid] = f"{report.when}: {call.excinfo.typename}"
        elif report.when == "call":
            self.found[item.nodeid] = "passed"
        return report


def run(arguments: list[str]) -> int:
    """Run pytest in this process, forked from one that may have the other copy of these tests loaded."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ.pop("FAULT_ROWS", None)  # the tests that run here report nothing
    os.environ["PYTHONPATH"] = os.getcwd()
    sys.dont_write_bytecode = True  # two versions of a file within a second look alike to Python's cache
    endings = Endings()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[endings])
    print(json.dumps(endings.found))
    return int(code)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
