"""Where models come from, and that 4-bit layers keep their gradients."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from common import models, results
from tests.conftest import environment


def lora_gradients(model, evaluate_first: bool):
    ids = torch.arange(3, 35)[None]
    if evaluate_first:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


def quantised(folder):
    torch.manual_seed(0)
    model = get_peft_model(models.load_decoder(str(folder), "nf4", "bf16", True), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # at its initial zero, lora_A would have no gradient either way
    return model


def test_gradients_are_equal_before_and_after_an_evaluation(tiny_model_folder):
    model = quantised(tiny_model_folder)
    before, after = lora_gradients(model, False), lora_gradients(model, True)
    assert len(before) == 2 * 7 * 2  # two layers, seven linear modules, A and B
    for name, gradient in before.items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, after[name]), name


@pytest.mark.skipif(torch.cuda.is_available() or not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks only on CPUs with AVX512-BF16")
def test_without_the_guard_an_evaluation_corrupts_gradients(tiny_model_folder):
    """If this fails, bitsandbytes mended it: delete models.keep_gradients."""
    model = quantised(tiny_model_folder)
    right = lora_gradients(model, False)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    wrong = lora_gradients(model, True)
    off = [name for name in right if wrong[name] is None or (wrong[name] - right[name]).norm() > 0.1 * right[name].norm()]
    assert len(off) > len(right) / 2


@pytest.mark.parametrize(("kind", "capability", "expected"), [
    ("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", True, "bf16"), ("mps", False, "fp32"), ("cpu", False, "fp32")])
def test_arithmetic_is_what_the_hardware_has(monkeypatch, kind, capability, expected):
    """A T4 has no bf16 but emulates it; a CPU without AVX512-BF16 or AMX neither."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: capability)
    monkeypatch.setattr(models.platform, "machine", lambda: "x86_64")
    assert models.native_dtype(kind) == expected


def test_a_cpu_limited_to_avx2_computes_in_fp32():
    """What decides is what oneDNN may use, not what is printed on the processor."""
    code = "from common import models; print(models.native_dtype('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=results.ROOT, capture_output=True, text=True, check=True,
                          env=environment(results.ROOT) | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"})
    assert done.stdout.split() == ["fp32"]


@pytest.mark.parametrize(("precision", "compute", "word"), [("NF4", "auto", "precision='NF4'"), ("nf4", "half", "compute='half'")])
def test_an_unknown_number_format_is_refused(tiny_model_folder, precision, compute, word):
    with pytest.raises(SystemExit, match=word):
        models.load_decoder(str(tiny_model_folder), precision, compute, True)


def test_four_bits_are_never_loaded_by_an_unsaid_rule(tiny_model_folder):
    with pytest.raises(TypeError, match="double_quant"):
        models.load_decoder(str(tiny_model_folder), "nf4")
    single, double = (models.load_decoder(str(tiny_model_folder), "nf4", "fp32", choice) for choice in (False, True))
    layer = [model.model.layers[0].mlp.up_proj.weight.quant_state for model in (single, double)]
    assert [state.nested for state in layer] == [False, True]
    assert all(state.quant_type == "nf4" and state.dtype == torch.float32 for state in layer)


def test_size_counts_parameters_not_packed_bytes(tiny_model_folder):
    """2 layers x (64x64 q + 2 x 32x64 kv + 64x64 o + 3 x 64x128 MLP) = 73,728 linear weights at about 4.1 bits; the rest in bf16."""
    plain, packed = (models.size(models.load_decoder(str(tiny_model_folder), p, "bf16", True)) for p in ("bf16", "nf4"))
    assert plain["parameters"] == packed["parameters"] and plain["bytes"] == 2 * plain["parameters"]
    saved = plain["bytes"] - packed["bytes"]
    assert 2 * 73_728 * 0.55 < saved < 2 * 73_728 * 0.75


def test_a_widened_model_computes_the_same_function(tiny_model_folder, tmp_path):
    """Logits of HyperCloning x2 equal the source's in fp32 (to 1e-5 of the largest); the head is untied, linear layers are four times as large."""
    models.hyperclone(tiny_model_folder, tmp_path / "wide", 2)
    small, wide = (models.load_decoder(str(folder), "fp32") for folder in (tiny_model_folder, tmp_path / "wide"))
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.inference_mode():
        logits = small(input_ids=ids).logits
        assert (wide(input_ids=ids).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert not wide.config.tie_word_embeddings and wide.config.hidden_size == 2 * small.config.hidden_size
    layers = [[p.numel() for n, p in m.named_parameters() if "proj" in n] for m in (small, wide)]
    assert layers[1] == [4 * size for size in layers[0]]
    one, other = (AutoTokenizer.from_pretrained(folder)("a b").input_ids for folder in (tiny_model_folder, tmp_path / "wide"))
    assert one == other


def test_two_first_runs_unpack_a_model_once(tmp_path, monkeypatch):
    """The second waits for the first and takes what it wrote; what a killed one left half-written is written anew."""
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
        folders = list(pool.map(lambda _: models.written_once("some", write), range(3)))
    assert len(written) == 1 and [path.name for path in folders[0].iterdir()] == ["whole"] and len(set(folders)) == 1


def test_only_llamas_are_widened(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        models.hyperclone(tmp_path, tmp_path / "wide", 2)


def test_tokenizer_pads_with_something_that_is_not_eos(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.padding_side == "left"


def test_folder_without_weights_or_config_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="no weights"):
        models.resolve(str(tmp_path))


def test_a_wrong_path_is_not_taken_for_a_hub_id():
    with pytest.raises(SystemExit, match="no such folder"):
        models.resolve("./nowhere/model")
    with pytest.raises(SystemExit, match="embedded-135m"):
        models.resolve("embeded-135m")
