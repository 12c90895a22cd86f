"""A prefix in files: the native ones resume and make PEFT raise, PEFT's mean here what they mean there."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from deltatune import PeftModel, PrefixTuningConfig
from deltatune.errors import MismatchError, TargetError
from tests.prompts.models import KINDS, bare, batch, gradients, prefixed, redraw

FIVE = ["gpt2", "llama", "t5", "bert", "bart"]
peft = pytest.importorskip("peft")


def theirs(name: str, **settings):
    """A model with a random prefix in the hands of PEFT."""
    config = peft.PrefixTuningConfig(task_type=KINDS[name][1], num_virtual_tokens=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(bare(name), config)
    redraw(model)
    return model.eval()


def read_by_peft(name: str, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(bare(name), folder).eval()


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def real(logits: torch.Tensor, inputs) -> torch.Tensor:
    """Without what decoders say at padding."""
    shaped_alike = logits.ndim == 3 and logits.shape[:2] == inputs["attention_mask"].shape
    return logits[inputs["attention_mask"].bool()] if shaped_alike else logits


# -------------------------------------------------------------------------------------------------------------- native


@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True}, {"sites": "all"}, {"layout": "peft"}])
@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_what_was_saved_comes_back_bit_for_bit(name, settings, tmp_path):
    model, inputs = prefixed(name, **settings), batch(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare(name), tmp_path)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.peft_config["default"].layout == settings.get("layout", "native")


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_projected_prefix_resumes_where_it_was(layout, tmp_path):
    model = prefixed("t5", prefix_projection=True, layout=layout).train()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare("t5"), tmp_path, is_trainable=True)
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    torch.testing.assert_close(gradients(loaded, batch("t5")), gradients(model, batch("t5")), atol=0, rtol=0)


def test_a_plain_prefix_is_stored_once(tmp_path):
    prefixed("llama").save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prefix_embeddings"]


@pytest.mark.parametrize("name", FIVE)
def test_peft_raises_on_a_native_file(name, tmp_path):
    prefixed(name).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="prompt_embeddings"):
        read_by_peft(name, tmp_path)


def test_a_file_that_does_not_fit_is_refused_before_anything_changes():
    prefix = prefixed("llama").prefixes["default"]
    before = prefix.encoder().clone()
    good = prefix.file_tensors()
    rows = good["prefix_embeddings"]
    for bad, reason in [
        ({}, "needs the tensor 'prefix_embeddings'"),
        ({"prompt_embeddings": rows}, "belongs to the other layout"),
        ({"prefix_embeddings": rows[:2]}, r"shape \(2, 64\) in the file, this model needs \(4, 64\)"),
        ({**good, "surplus": rows}, "surplus"),
    ]:
        with pytest.raises(MismatchError, match=reason):
            prefix.load_file_tensors({key: tensor + 1 for key, tensor in bad.items()})
        assert torch.equal(prefix.encoder(), before)
    projected = prefixed("llama", prefix_projection=True).prefixes["default"]
    tensors = projected.file_tensors()
    tensors.pop("prefix_encoder.transform.0.bias")
    with pytest.raises(MismatchError, match=r"lacks .*transform\.0\.bias"):
        projected.load_file_tensors(tensors)


def test_a_prefix_for_another_base_is_refused(tmp_path):
    prefixed("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_attention_heads|site_shapes|token_dim"):
        PeftModel.from_pretrained(bare("qwen3"), tmp_path, allow_base_mismatch=True)


# ---------------------------------------------------------------------------------------------------------------- peft


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", [*FIVE, "mistral", "roberta", "t5-deep"])
def test_a_file_of_peft_gives_the_logits_of_peft(name, projection, tmp_path):
    model = theirs(name, prefix_projection=projection)
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(bare(name), tmp_path)
    assert ours.peft_config["default"].layout == "peft"
    for left in (False, True) if name in ("gpt2", "llama", "mistral") else (False,):
        inputs = batch(name, left)
        expected = real(logits(model, inputs), inputs)
        torch.testing.assert_close(real(logits(ours, inputs), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", FIVE)
def test_a_file_in_the_layout_of_peft_gives_our_logits_in_peft(name, projection, tmp_path):
    model, inputs = prefixed(name, layout="peft", prefix_projection=projection), batch(name)
    model.save_pretrained(tmp_path)
    assert not {"layout", "sites", "site_names"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    found = real(logits(read_by_peft(name, tmp_path), inputs), inputs)
    torch.testing.assert_close(found, real(logits(model, inputs), inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm"])
def test_a_native_prefix_on_rotary_positions_is_written_for_peft_exactly(name, projection, tmp_path):
    model, inputs = prefixed(name, prefix_projection=projection), batch(name)
    model.save_pretrained(tmp_path, format="peft")
    expected = real(logits(model, inputs), inputs)
    torch.testing.assert_close(
        real(logits(read_by_peft(name, tmp_path), inputs), inputs), expected, atol=1e-5, rtol=1e-5
    )
    back = PeftModel.from_pretrained(bare(name), tmp_path)
    torch.testing.assert_close(real(logits(back, inputs), inputs), expected, atol=1e-5, rtol=1e-5)
    back.save_pretrained(tmp_path / "native", format="native")
    native = PeftModel.from_pretrained(bare(name), tmp_path / "native")
    assert native.peft_config["default"].layout == "native"
    torch.testing.assert_close(real(logits(native, inputs), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "learned positions"),
        ("bert", "learned positions"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("mistral", "window of 6 tokens"),
        ("hybrid", "each of its 3 layers"),
        ("latent", "one shape"),
    ],
)
def test_what_peft_cannot_say_is_named(name, reason, tmp_path):
    with pytest.raises(TargetError, match=reason):
        prefixed(name).save_pretrained(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_thirty_steps_side_by_side_with_peft_have_the_same_losses(name, projection):
    settings = {"prefix_projection": projection}
    ours, other = prefixed(name, layout="peft", **settings).train(), theirs(name, **settings).train()
    inputs = batch(name)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = []
    for model in (ours, other):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(30):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=0)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_layouts_that_peft_has_no_numbers_for_are_refused():
    with pytest.raises(TargetError, match="differ in shape"):
        prefixed("latent", layout="peft")
    with pytest.raises(TargetError, match="called several times"):
        prefixed("albert", layout="peft")
    assert PrefixTuningConfig.file_defaults == {"layout": "peft"}
