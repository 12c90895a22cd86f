"""`deltatune doctor`: adapters of known kind in front of programs whose rules are known; PEFT itself is asked."""

import json
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import deltatune as d
from deltatune.cli.app import app
from deltatune.doctor import diagnose
from deltatune.errors import ConfigError, FormatError

LOADS, REFUSES, CHANGES, UNSURE = "loads it", "refuses it", "computes something else", "not certain"
SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
QV = ["q_proj", "v_proj"]


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options)).eval()


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)).eval()


def lora(r=4, target_modules=QV, **options):
    return d.LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=target_modules, **options)


def case(config, peft, vllm, sglang, llama_cpp, base=llama):
    return SimpleNamespace(config=config, base=base, expected=(peft, vllm, sglang, llama_cpp))


CLM = {"task_type": "CAUSAL_LM"}
# What each program does, by its source: vLLM 0.33.0 (lora/peft_helper.py, lora/utils.py), SGLang 0.5.23 (srt/lora/
# lora.py, lora_manager.py), llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
CASES = {
    "plain": case(lora(), LOADS, LOADS, LOADS, LOADS),
    "all_linear": case(lora(target_modules="all-linear"), LOADS, LOADS, LOADS, LOADS),
    "high_rank": case(lora(r=24), LOADS, LOADS, LOADS, LOADS),
    "rank_pattern": case(lora(rank_pattern={"v_proj": 8}), LOADS, LOADS, CHANGES, LOADS),
    "alpha_pattern": case(lora(alpha_pattern={"v_proj": 32}), LOADS, LOADS, CHANGES, CHANGES),
    "idle_pattern": case(lora(alpha_pattern={"v_proj": 8}), LOADS, LOADS, LOADS, LOADS),
    "rslora": case(lora(use_rslora=True), LOADS, LOADS, CHANGES, CHANGES),
    "dora": case(lora(use_dora=True), LOADS, REFUSES, REFUSES, REFUSES),
    "pissa": case(lora(init_lora_weights="pissa"), LOADS, REFUSES, CHANGES, CHANGES),
    "lora_bias": case(lora(lora_bias=True), LOADS, REFUSES, CHANGES, REFUSES),
    "biases": case(lora(bias="all"), LOADS, REFUSES, CHANGES, REFUSES, lambda: llama(attention_bias=True)),
    "whole_head": case(lora(modules_to_save=["lm_head"]), LOADS, REFUSES, CHANGES, REFUSES),
    "tokens": case(lora(trainable_token_indices=[3, 4]), LOADS, REFUSES, CHANGES, REFUSES),
    "alora": case(lora(alora_invocation_tokens=[5]), LOADS, REFUSES, CHANGES, LOADS),
    "pattern_targets": case(lora(target_modules=r".*\.[qv]_proj"), LOADS, LOADS, REFUSES, LOADS),
    "queries_alone": case(lora(target_modules=["q_proj"]), LOADS, LOADS, REFUSES, LOADS),
    "values_alone": case(lora(target_modules=["v_proj"]), LOADS, LOADS, CHANGES, LOADS),
    "head": case(lora(target_modules=["lm_head", *QV]), LOADS, LOADS, LOADS, UNSURE),
    "experts": case(
        lora(target_modules=QV, target_parameters=["experts.down_proj"]), LOADS, UNSURE, UNSURE, UNSURE, mixtral
    ),
    "ia3": case(d.IA3Config(**CLM), LOADS, REFUSES, REFUSES, REFUSES),
    "loha": case(d.LoHaConfig(**CLM, r=4, target_modules=QV), LOADS, REFUSES, REFUSES, REFUSES),
    "prefix": case(d.PrefixTuningConfig(**CLM, num_virtual_tokens=3), REFUSES, REFUSES, REFUSES, REFUSES),
    "prefix_for_peft": case(
        d.PrefixTuningConfig(**CLM, num_virtual_tokens=3, layout="peft"), LOADS, REFUSES, REFUSES, REFUSES
    ),
    "prompt": case(d.PromptTuningConfig(**CLM, num_virtual_tokens=3), LOADS, REFUSES, REFUSES, REFUSES),
    "reft": case(d.ReftConfig(**CLM, r=2, target_modules=["mlp"]), REFUSES, REFUSES, REFUSES, REFUSES),
    "tokens_and_copies": case(
        d.TrainableTokensConfig(**CLM, token_indices=[3], modules_to_save=["lm_head"]), LOADS, REFUSES, REFUSES, REFUSES
    ),
}  # fmt: skip


def trained(kind, folder):
    model = d.get_peft_model(kind.base(), kind.config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("name", CASES)
def test_adapters_of_known_kind(name, tmp_path):
    kind = CASES[name]
    model = trained(kind, tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter")
    assert found.healthy, found.problems
    assert tuple(verdict.word for verdict in found.verdicts.values()) == kind.expected
    for verdict in found.verdicts.values():
        assert verdict.loads == (verdict.word in (LOADS, UNSURE))
    ids = torch.tensor([[7, 9, 5, 11, 13, 4]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = model(ids).logits
        try:
            theirs = peft.PeftModel.from_pretrained(kind.base(), str(tmp_path / "adapter")).eval()(ids).logits
        except Exception:
            assert found.verdicts["peft"].word == REFUSES
        else:
            same = torch.allclose(theirs[:, -6:], ours[:, -6:], atol=1e-4)  # PEFT's have rows of a prompt before them
            assert found.verdicts["peft"].word == (LOADS if same else CHANGES)


def four_bits(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*linear.weight.shape[::-1], linear.bias is not None, torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def eight_bits(linear):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*linear.weight.shape[::-1], linear.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(linear, library.Int8WeightOnlyConfig())
    return linear


def quantised(make):
    """A base whose adapted layers are stored in few bits."""

    def base():
        model = llama()
        for layer in model.model.layers:
            for name in QV:
                setattr(layer.self_attn, name, make(getattr(layer.self_attn, name)))
        return model

    return base


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("make", [four_bits, eight_bits, torchao_int8])
def test_an_adapter_of_a_quantised_base_is_judged_by_what_it_is(make, options, tmp_path):
    trained(case(lora(**options), LOADS, LOADS, LOADS, LOADS, quantised(make)), tmp_path)
    found = diagnose(tmp_path)
    assert found.healthy, found.problems
    other = REFUSES if options else LOADS
    assert {name: verdict.word for name, verdict in found.verdicts.items()} == {
        "peft": LOADS, "vllm": other, "sglang": other, "llama.cpp": other,
    }  # fmt: skip


def test_what_has_to_be_said_at_the_start_is_no_refusal(tmp_path):
    trained(CASES["high_rank"], tmp_path)
    (finding,) = diagnose(tmp_path, ["vllm"]).verdicts["vllm"].findings
    assert (finding.effect, finding.fix) == ("needs", "--max-lora-rank 32")


def test_every_refusal_of_what_a_weight_can_hold_names_a_way_out(tmp_path):
    for name in ("dora", "pissa", "whole_head", "loha", "rslora", "queries_alone"):
        trained(CASES[name], tmp_path / name)
        for verdict in diagnose(tmp_path / name).verdicts.values():
            assert all(finding.fix.startswith("deltatune ") for finding in verdict.findings), (name, verdict)
    trained(CASES["prompt"], tmp_path / "prompt")
    assert "no weight can hold it" in diagnose(tmp_path / "prompt").verdicts["vllm"].findings[0].what


def test_adapters_that_peft_wrote(tmp_path):
    for name, options, word in [("plain", {}, LOADS), ("dora", {"use_dora": True}, REFUSES)]:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=QV, init_lora_weights=False, **options)
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path / name)
        found = diagnose(tmp_path / name)
        assert found.healthy
        assert found.verdicts["vllm"].word == word


def test_broken_folders_are_told_for_every_program(tmp_path):
    trained(CASES["plain"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] * float("nan")}, file)
    assert any("not finite" in problem for problem in diagnose(tmp_path).problems)
    file.write_bytes(file.read_bytes()[:100])
    cut = diagnose(tmp_path)
    assert not cut.healthy
    assert cut.facts is None
    assert {verdict.word for verdict in cut.verdicts.values()} == {REFUSES}
    (tmp_path / "adapter_config.json").write_text("{")
    assert "line 1" in diagnose(tmp_path).problems[0]
    with pytest.raises(FormatError, match="does not exist"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        diagnose(tmp_path, ["vlm"])


def test_the_verb(tmp_path):
    trained(CASES["dora"], tmp_path)
    run = CliRunner()
    everything = run.invoke(app, ["doctor", str(tmp_path)])
    assert everything.exit_code == 0, everything.output
    assert "vLLM 0.33.0: refuses it" in everything.stdout
    assert f"deltatune convert {tmp_path} OUT --to lora" in everything.stdout.replace("\n", "")
    assert run.invoke(app, ["doctor", str(tmp_path), "--for", "peft"]).exit_code == 0
    asked = run.invoke(app, ["doctor", str(tmp_path), "--for", "vllm", "--json"])
    assert asked.exit_code == 3
    told = json.loads(asked.stdout)
    assert list(told["verdicts"]) == ["vllm"]
    assert told["verdicts"]["vllm"]["loads"] is False
