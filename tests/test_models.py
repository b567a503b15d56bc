"""Where models come from, how they are loaded, and that 4-bit layers keep their gradients."""

import inspect
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from common import models
from pipeline import results
from sources import pretrained

# ----------------------------------------------------------------------------------------------- gradients

def lora_gradients(model, evaluate_first: bool):
    ids = torch.arange(3, 35)[None]
    if evaluate_first:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    adapter = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: None if p.grad is None else p.grad.clone() for name, p in adapter}


@pytest.fixture
def quantised(tiny_model_folder):
    torch.manual_seed(0)
    model = models.load_decoder(str(tiny_model_folder), "nf4", "bf16", True)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # at its initial zero, lora_A would have no gradient either way
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_gradients_are_equal_before_and_after_an_evaluation(quantised):
    before, after = lora_gradients(quantised, False), lora_gradients(quantised, True)
    assert len(before) == 2 * 7 * 2  # two layers, seven linear modules, A and B
    for name, gradient in before.items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, after[name]), name


@pytest.mark.skipif(torch.cuda.is_available() or not bnb.functional.has_avx512bf16(),
                    reason="bitsandbytes repacks only on CPUs with AVX512-BF16")
def test_without_the_guard_an_evaluation_corrupts_gradients(quantised):
    """If this fails, bitsandbytes mended it: delete models.keep_gradients."""
    right = lora_gradients(quantised, False)
    for module in quantised.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    wrong = lora_gradients(quantised, True)
    off = [name for name, gradient in right.items()
           if wrong[name] is None or (wrong[name] - gradient).norm() > 0.1 * gradient.norm()]
    assert len(off) > len(right) / 2


# ------------------------------------------------------------------------------------------ number formats

@pytest.mark.parametrize(("kind", "capability", "expected"), [
    ("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", True, "bf16"), ("mps", False, "fp32"),
    ("cpu", False, "fp32")])
def test_arithmetic_is_what_the_hardware_has(monkeypatch, kind, capability, expected):
    """A T4 has no bf16 but emulates it; a CPU without AVX512-BF16 or AMX neither."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or capability)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: capability)
    monkeypatch.setattr(models.platform, "machine", lambda: "x86_64")
    assert models.native_dtype(kind) == expected


def test_a_cpu_limited_to_avx2_computes_in_fp32():
    """What decides is what oneDNN may use, not what is printed on the processor."""
    code = f"import platform, torch\n{inspect.getsource(models.native_dtype)}\nprint(native_dtype('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"})
    assert done.stdout.split() == ["fp32"]


def test_weights_in_fp16_are_for_gpus(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(models, "device", lambda: torch.device("cpu"))
    models.compute_name.cache_clear()
    for precision, compute in (("fp16", "auto"), ("nf4", "fp16")):
        with pytest.raises(SystemExit, match="on GPUs only"):
            models.load_decoder(str(tiny_model_folder), precision, compute, True)


def test_four_bits_are_never_loaded_by_an_unsaid_rule(tiny_model_folder):
    with pytest.raises(TypeError, match="double_quant"):
        models.load_decoder(str(tiny_model_folder), "nf4")
    for choice in (False, True):
        model = models.load_decoder(str(tiny_model_folder), "nf4", "fp32", choice)
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert (state.nested, state.quant_type, state.dtype) == (choice, "nf4", torch.float32)


# -------------------------------------------------------------------------------------------- layers, size

def test_size_counts_parameters_not_packed_bytes(tiny_model_folder):
    """2 layers x (64x64 q + 2 x 32x64 kv + 64x64 o + 3 x 64x128 MLP) = 73,728 linear weights at about 4.1
    bits; the rest in bf16."""
    plain, packed = (models.size(models.load_decoder(str(tiny_model_folder), precision, "bf16", True))
                     for precision in ("bf16", "nf4"))
    assert plain["parameters"] == packed["parameters"] and plain["bytes"] == 2 * plain["parameters"]
    saved = plain["bytes"] - packed["bytes"]
    assert 2 * 73_728 * 0.55 < saved < 2 * 73_728 * 0.75


def test_lora_targets(tiny_model):
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert models.lora_targets(tiny_model, "all-linear") == linear
    assert models.lora_targets(tiny_model, "all-linear", skip=("mlp",)) == linear[2:5] + linear[6:]
    assert models.lora_targets(tiny_model, "v_proj,self_attn.q_proj") == ["v_proj", "self_attn.q_proj"]
    assert models.lora_targets(tiny_model, r".*(attn|attention)\..*") == r".*(attn|attention)\..*"
    for wrong in ("v_proj,q_prj", "proj", "lm_head", r".*attention\..*"):
        with pytest.raises(SystemExit, match=rf"{', '.join(linear)}$"):
            models.lora_targets(tiny_model, wrong)
    with pytest.raises(SystemExit, match="it has none"):
        models.lora_targets(tiny_model, "all-linear", skip=("",))
    nested = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    nested.get_output_embeddings = lambda: None
    assert models.lora_targets(nested, "all-linear") == ["0.0"]  # "0" alone would name the block as well


# ------------------------------------------------------------------------------------ where they come from

def test_a_widened_model_computes_the_same_function(tiny_model_folder, tmp_path):
    """Logits of HyperCloning x2 equal the source's in fp32, to 1e-5 of the largest."""
    pretrained.hyperclone(tiny_model_folder, tmp_path / "wide", 2)
    folders = [str(tiny_model_folder), str(tmp_path / "wide")]
    small, wide = (models.load_decoder(folder, "fp32") for folder in folders)
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.inference_mode():
        logits = small(input_ids=ids).logits
        assert (wide(input_ids=ids).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert not wide.config.tie_word_embeddings and wide.config.hidden_size == 2 * small.config.hidden_size
    layers = [[p.numel() for n, p in m.named_parameters() if "proj" in n] for m in (small, wide)]
    assert layers[1] == [4 * size for size in layers[0]]
    texts = [AutoTokenizer.from_pretrained(folder)("a b").input_ids for folder in folders]
    assert texts[0] == texts[1]


def test_two_first_runs_unpack_a_model_once(tmp_path, monkeypatch):
    """The second waits for the first and takes what it wrote; what a killed one left half-written goes."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "runs" / "assets" / "some.partial").mkdir(parents=True)
    (tmp_path / "runs" / "assets" / "some.partial" / "half").touch()
    written = []

    def write(folder):
        written.append(folder)
        folder.mkdir()
        time.sleep(0.2)
        (folder / "whole").touch()
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: pretrained.written_once("some", write), range(3)))
    assert len(written) == len(folders) == 1
    assert [path.name for path in folders.pop().iterdir()] == ["whole"]


def test_tokenizer_pads_with_something_that_is_not_eos(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.padding_side == "left"


def test_what_is_no_model_is_named(tmp_path):
    for wrong, words in (("./nowhere/model", "no such folder"), ("embeded-135m", "embedded-135m")):
        with pytest.raises(SystemExit, match=words):
            pretrained.resolve(wrong)
    with pytest.raises(SystemExit, match=r"no config\.json"):
        pretrained.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="no weights"):
        pretrained.resolve(str(tmp_path))
