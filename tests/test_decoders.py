"""Task 1 with other decoders than Llama's: what is measured and trained is what the model itself computes,
in every step.
"""

import json

import jinja2
import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from common import models, training
from task1_decoder import harness, memory, task
from tests.conftest import step
from tests.decoders import DECODERS, save_decoder, with_tokenizer, write_rows

REPRESENTATIVES = ("BOS", "Gemma-3")  # make test takes these two, make test-all every one
EACH = [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.all) for name in DECODERS]
CFG = task.Config(instruction="Answer the question.", compute="fp32", precision="fp32")
ROWS = [
    {"id": str(i), "prompt": prompt, "completion": completion}
    for i, (prompt, completion) in enumerate(
        (
            (
                "Where does the river that crosses the old stone bridge near the garden begin, "
                "and where does it end?",
                "In the hills.",
            ),
            (
                "Name a colour.",
                "Blue, or the deep green of the sea in winter when the wind comes from the north.",
            ),
            ("Count to three.", "One, two, three."),
        )
    )
]
REQUESTS = [
    ("The sky is", " blue"),
    ("The sky is", " very deep green today"),
    ("Question: two plus two?\nAnswer:", " four"),
    ("", "A word"),
]


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("name", EACH)
def test_what_is_measured_is_what_the_plain_model_computes(name, tokenizer, tmp_path):
    folder = save_decoder(name, tokenizer, tmp_path / "model")
    tokenizer, model, other = (
        models.load_tokenizer(str(folder)),
        models.load_decoder(str(folder), "fp32"),
        plain(folder),
    )
    prompt, examples = task.Prompt(tokenizer, CFG), task.encode(tokenizer, ROWS, CFG)
    items = task.score(model, tokenizer, ROWS, CFG, trained=set())
    nats = []
    for row, example, item in zip(ROWS, examples, items):
        asked, answer = len(example["prompt"]), torch.tensor(example["answer"])
        with torch.no_grad():
            logits = (
                other(torch.tensor([example["prompt"] + example["answer"]]))
                .logits[0, asked - 1 : -1]
                .double()
            )
        nats.append(torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item())
        assert item["nats"] == pytest.approx(nats[-1], rel=1e-4)
        written = other.generate(
            torch.tensor([prompt(row["prompt"])]),
            do_sample=False,
            max_new_tokens=CFG.max_new_tokens,
            eos_token_id=[prompt.end, tokenizer.eos_token_id],
            pad_token_id=0,
        )[0, asked:].tolist()
        kept = (
            [i for i in written if i not in (prompt.end, tokenizer.eos_token_id, 0)]
            if item["stopped"]
            else written
        )
        assert item["text"] == tokenizer.decode(kept, skip_special_tokens=True).strip()
    loss = model(**task.collate(examples, tokenizer.pad_token_id)).loss.item()
    assert loss == pytest.approx(sum(nats) / sum(item["tokens"] for item in items), rel=1e-4)

    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(REQUESTS)]
    ours = harness.HarnessLM(model, tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    stock = HFLM(pretrained=other, tokenizer=tokenizer, batch_size=2, softmax_dtype="float32").loglikelihood(
        requests, disable_tqdm=True
    )
    for (mine, greedy), (theirs, stock_greedy) in zip(ours, stock):
        assert mine == pytest.approx(theirs, rel=1e-4) and greedy == stock_greedy


@pytest.mark.all  # make test takes a Llama through all steps, in test_pipeline.py
@pytest.mark.parametrize("name", DECODERS)
def test_all_steps_run(name, tokenizer, repo, tmp_path):
    folder = save_decoder(name, tokenizer, tmp_path / "model")
    run = f"steps-{name.replace(' ', '-')}"
    arguments = [
        "--run",
        run,
        "--model",
        str(folder),
        "--data",
        str(write_rows(tmp_path / "own.jsonl")),
        "--set",
        "instruction=Answer the question.",
        "max_steps=2",
        "eval_every=2",
    ]
    for script in ("01_data", "02_baseline", "03_train", "04_eval"):
        done = step(repo, script, *arguments)
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"
    stored = repo / "results" / run / "task1_decoder"
    results = {name: json.loads((stored / f"{name}.json").read_text()) for name in ("03_train", "04_eval")}
    linear = models.linear_layers(plain(folder))
    adapter = json.loads(
        (repo / "runs" / run / "task1_decoder" / "adapter" / "adapter_config.json").read_text()
    )
    assert {layer.rsplit(".", 1)[-1] for layer in linear} == {
        layer.rsplit(".", 1)[-1] for layer in adapter["target_modules"]
    }
    trained = next(r["value"] for r in results["03_train"]["rows"] if r["metric"] == "trainable_parameters")
    assert trained == sum(16 * sum(shape) for shape in linear.values())
    rows = results["04_eval"]["rows"]
    assert {"base", "tuned", "delta"} <= {r["name"] for r in rows if r["table"] == "heldout"}


def test_bos_and_a_separator_stand_where_there_is_no_template(tokenizer):
    """The same ids in scoring and generation, the same text in lm-eval; a text that goes on has no
    separator.
    """
    base = with_tokenizer(tokenizer, "BOS")
    prompt = task.Prompt(base, CFG)
    assert base.decode(prompt("Name a colour.")) == "<|im_start|>Answer the question.\n\nName a colour.\n"
    assert prompt("Name a colour.")[0] == base.bos_token_id and prompt.end == base.eos_token_id
    assert base.decode(base(prompt.text("Name a colour.")).input_ids) == base.decode(prompt("Name a colour."))
    assert (
        task.Prompt(base, task.Config(instruction=""), style="plain")("Once upon")
        == base("Once upon").input_ids
    )
    shown = task.Prompt(base, CFG, shots=[("Name a fruit.", "Apple.")]).text("Name a colour.")
    assert shown == "Name a fruit.\nApple.\n\nAnswer the question.\n\nName a colour.\n"


def test_lm_eval_reads_our_prompts_as_our_likelihoods_do(tokenizer, tmp_path):
    """A template that writes no BOS gets none from lm-eval either, though the tokenizer would add one."""
    folder = save_decoder("BOS", tokenizer, tmp_path / "model")
    own = models.load_tokenizer(str(folder))
    own.chat_template = (
        "{% for turn in messages %}<file_sep>{{ turn.content }}<reponame>{% endfor %}"
        "{% if add_generation_prompt %}<file_sep>{% endif %}"
    )
    prompt = task.Prompt(own, CFG)
    lm = harness.HarnessLM(models.load_decoder(str(folder), "fp32"), own, 1, prompt.before)
    assert lm.tok_encode(prompt.text("Name a colour.")) == prompt("Name a colour.")
    assert lm.tok_encode("Name a colour.")[0] == own.bos_token_id


def test_a_template_without_system_role_gets_the_instruction_in_the_first_question(tokenizer):
    gemma = with_tokenizer(tokenizer, "Gemma-3")
    with pytest.raises(jinja2.TemplateError):
        gemma.apply_chat_template(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], tokenize=False
        )
    prompt = task.Prompt(gemma, CFG, shots=[("Name a fruit.", "Apple.")])
    assert prompt.text("Name a colour.") == (
        "<file_sep>user: Answer the question.\n\nName a fruit.<reponame>\n"
        "<file_sep>assistant: Apple.<reponame>\n"
        "<file_sep>user: Name a colour.<reponame>\n<file_sep>assistant: "
    )
    assert prompt.end == gemma.convert_tokens_to_ids("<reponame>") != gemma.eos_token_id
    assert prompt.encode(ROWS[0])["answer"][-1] == prompt.end
    silent = gemma.chat_template.replace("{{ raise_exception('no system role here') }}", "")
    gemma.chat_template = silent.replace(
        "{% for turn in messages %}", "{% for turn in messages if turn.role != 'system' %}"
    )
    assert (
        "Answer the question." in task.Prompt(gemma, CFG).before
    )  # left out without a word, and put in all the same


def test_a_template_that_writes_the_date_writes_the_same_every_day(tokenizer):
    dated = with_tokenizer(tokenizer, "Llama")
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert task.Prompt(dated, CFG).before.startswith("01 Jan 2025")


def test_a_template_that_hides_the_question_is_refused(tokenizer):
    broken = with_tokenizer(tokenizer, "Llama")
    broken.chat_template = "{% for turn in messages %}hello{% endfor %}"
    with pytest.raises(SystemExit, match="0 times"):
        task.Prompt(broken, CFG)


def test_a_module_that_is_not_there_is_answered_with_those_that_are(tokenizer, tmp_path):
    folder = save_decoder("GPT-NeoX", tokenizer, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"q_proj.*dense, dense_4h_to_h, dense_h_to_4h, query_key_value"):
        models.lora_targets(plain(folder), "q_proj")


def test_a_recurrent_model_is_refused(tmp_path, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="recurrent state"):
        models.load_decoder(str(tmp_path), "fp32")


def test_attention_caps_are_not_left_to_the_fused_kernel(monkeypatch):
    from transformers import Gemma2Config, LlamaConfig

    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    assert models.attention(Gemma2Config()) == "eager" and models.attention(LlamaConfig()) is None


def test_a_long_context_keeps_what_stock_keeps(tiny_model, tokenizer):
    """Context and continuation of 1,100 tokens: the last 1,024 are read and the last token is predicted, as
    lm-eval does.
    """
    request = [Instance("loglikelihood", {}, ("word " * 1100, " and an end"), 0)]
    ours = harness.HarnessLM(tiny_model, tokenizer, batch_size=1).loglikelihood(request, disable_tqdm=True)
    stock = HFLM(
        pretrained=tiny_model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32", max_length=1024
    )
    assert ours[0][0] == pytest.approx(stock.loglikelihood(request, disable_tqdm=True)[0][0], rel=1e-5)
    with pytest.raises(SystemExit, match="does not fit"):
        harness.HarnessLM(tiny_model, tokenizer, batch_size=1)._loglikelihood_tokens(
            [(("a", "b"), [5], [7] * 1025)]
        )


def test_memory_is_what_the_tensors_of_a_step_take(tokenizer, tmp_path, monkeypatch):
    """Saved bytes grow by the same amount with every row, checkpointing keeps the inputs of layers, and a
    card of any size gets a plan.
    """
    folder = save_decoder("Llama", tokenizer, tmp_path / "model")
    model = models.load_decoder(str(folder), "fp32")
    batch = {
        "input_ids": torch.full((8, 40), 5),
        "attention_mask": torch.ones(8, 40, dtype=torch.long),
        "labels": torch.full((8, 11), 5),
        "logits_to_keep": 11,
    }
    row = memory.per_row(model, batch, "fp32")
    whole = training.saved_bytes(model, lambda: model(**batch).loss, "fp32", len(tokenizer))
    assert whole["activations"] == pytest.approx(8 * row["activations"] + row["constant"], rel=0.03)
    assert whole["logits"] >= 8 * 10 * 4 * len(tokenizer)
    assert row["inputs"] == 2 * 64 * 40 * 4
    free = {
        rows: sum(
            memory.predict(model, row, rows, False)[part]
            for part in ("adapter_and_optimiser", "activations", "logits")
        )
        for rows in (8, 2)
    }
    limit = training.HEAP * free[8] / training.SPARE / 2**30
    resident = psutil.Process().memory_info().rss / 2**30
    assert memory.plan(model, batch, "fp32", 0, "auto", resident + limit + 0.2)[:2] == (8, False)
    one, eight, again = (
        memory.predict(model, row, rows, checkpointing)["total"]
        for rows, checkpointing in ((1, False), (8, False), (1, True))
    )
    for room, expected in ((eight, (8, False)), (one, (1, False)), (again, (1, True))):
        needed = (room - memory.predict(model, row, 0, False)["resident"]) / training.SPARE + 1
        monkeypatch.setattr(models, "free_memory", lambda cap_gib, needed=needed: needed)
        assert memory.plan(model, batch, "fp32", 0, "auto", 0)[:2] == expected
    assert memory.plan(model, batch, "fp32", 4, "on", 0)[:2] == (4, True)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="does not divide"):
        memory.plan(model, batch, "fp32", 3, "auto", 0)
    with pytest.raises(SystemExit, match="GiB"):
        memory.plan(model, batch, "fp32", 0, "auto", 0.001)
