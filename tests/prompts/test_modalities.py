"""Models that see and hear: what acts in attentions works as with text, what acts at the input works or is refused."""

from __future__ import annotations

import pytest
import torch

from deltatune import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from deltatune.errors import TargetError
from tests.prompts.modalities import SEEING, TELLING, made
from tests.prompts.models import redraw

ALL = [*SEEING, *TELLING]
NAMELESS = ["vit", "dinov2", "clip-classifier", "whisper", "wav2vec2"]  # which read no tokens, on the side that counts


def prefixed(name: str, length: int = 4, seed: int = 3, **settings):
    base, inputs, task = made(name)
    model = get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=length, **settings))
    redraw(model, seed)
    return model.eval(), inputs


def outputs(model, inputs, **more):
    with torch.no_grad():
        found = model(**inputs, **more)
    return found.logits_per_image if hasattr(found, "logits_per_image") else found.logits


def given(inputs):
    return {name: value for name, value in inputs.items() if name not in ("labels", "return_loss")}


@pytest.mark.parametrize("name", ALL)
def test_a_prefix_trains_in_every_number_and_comes_back_from_its_file(name, tmp_path):
    model, inputs = prefixed(name)
    bare, _, _ = made(name)
    assert (outputs(model, inputs) - outputs(bare, inputs)).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), outputs(bare, inputs))
    weight = model.prompt_encoder["default"].embedding.weight
    optimizer = torch.optim.Adam([weight], lr=1e-2)
    losses = []
    for step in range(6):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        if not step:
            assert (weight.grad != 0).all()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    fresh, _, _ = made(name)
    assert torch.equal(outputs(PeftModel.from_pretrained(fresh, tmp_path), inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ["vit", "clip-classifier", "whisper", "wav2vec2", "llava"])
def test_rows_with_prefixes_of_their_own(name):
    model, inputs = prefixed(name)
    _, _, task = made(name)
    model.add_adapter("long", PrefixTuningConfig(task_type=task, num_virtual_tokens=7))
    model.set_adapter("long")
    redraw(model, 5)
    model.eval()
    mixed = outputs(model, inputs, adapter_names=["default", "long", "__base__"])
    for row, adapter in enumerate(("default", "long", None)):
        if adapter is None:
            with model.disable_adapter():
                alone = outputs(model, inputs)
        else:
            model.set_adapter(adapter)
            alone = outputs(model, inputs)
        torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_lora_and_a_prefix_together(name, tmp_path):
    base, inputs, task = made(name)
    model = get_peft_model(base, LoraConfig(task_type=task, r=2, target_modules="all-linear", init_lora_weights=False))
    alone = outputs(model.eval(), inputs)
    model.add_adapter("prefix", PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    model.set_adapter(["default", "prefix"])
    both = outputs(model.eval(), inputs)
    assert (both - alone).abs().max() > 1e-5
    model(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "prompt_enc" in n)
    model.save_pretrained(tmp_path)
    fresh, _, _ = made(name)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    loaded.load_adapter(tmp_path / "prefix", "prefix")
    loaded.set_adapter(["default", "prefix"])
    assert torch.equal(outputs(loaded.eval(), inputs), both)


@pytest.mark.parametrize("name", ALL)
def test_gated_prompts_leave_the_model_as_it_was_and_open(name):
    base, inputs, task = made(name)
    before = outputs(base, inputs)
    model = get_peft_model(base, AdaptionPromptConfig(task_type=task, adapter_len=4, adapter_layers=2)).eval()
    torch.testing.assert_close(outputs(model, inputs), before)
    redraw(model)
    assert (outputs(model, inputs) - before).abs().max() > 1e-4


@pytest.mark.parametrize("sites", ["default", "all"])
@pytest.mark.parametrize("name", ["whisper", "speech2text", *TELLING])
def test_generation_with_a_prefix_is_the_same_with_and_without_a_cache(name, sites):
    model, inputs = prefixed(name, sites=sites)
    asked = {**given(inputs), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**asked)
    assert torch.equal(cached, model.generate(**asked, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**asked))
    assert len(model.generate(**asked, num_beams=2)) == 3


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
@pytest.mark.parametrize("name", NAMELESS)
def test_prompts_at_the_input_are_refused_where_no_tokens_are_embedded(name, kind):
    base, _, task = made(name)
    before = [name for name, _ in base.named_parameters()]
    with pytest.raises(TargetError, match=f"{type(base).__name__} reads .*, not tokens.*PrefixTuningConfig"):
        get_peft_model(base, kind(task_type=task, num_virtual_tokens=4))
    assert [name for name, _ in base.named_parameters()] == before


@pytest.mark.parametrize("name", TELLING)
def test_a_prompt_of_embedded_tokens_is_these_tokens_beside_an_image(name):
    """Virtual tokens stand before the image; the model counts the parts of images, and they are none."""
    base, inputs, task = made(name)
    inputs = given(inputs)
    real = torch.tensor([[5, 9, 17, 23]]).expand(3, -1)
    longer = {**inputs, "input_ids": torch.cat([real, inputs["input_ids"]], dim=1)}
    for field, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if field in inputs:
            longer[field] = torch.cat([torch.full_like(real, fill), inputs[field]], dim=1)
    expected = outputs(base, longer)[:, 4:]
    told = base.generate(**longer, max_new_tokens=5, do_sample=False)[:, 4:]
    rows = base.get_input_embeddings()(real[0]).detach()
    model = get_peft_model(base, PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    model.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    torch.testing.assert_close(outputs(model, inputs), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), told)


def test_a_start_from_text_says_what_stands_in_its_way():
    base, _, _ = made("clip")
    with pytest.raises(TargetError, match=r"CLIPModel.*no embedding of tokens.*leave the text out"):
        get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3, init_token_ids=[5, 6, 7]))


@pytest.mark.slow
def test_a_vision_transformer_learns_handwritten_digits():
    """Real images of 8 x 8 pixels: a frozen random ViT, its head, and a prefix that has to do better than the head."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)

    def accuracy(adapted: bool) -> float:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))
        with torch.no_grad():
            for weight in base.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=weight.shape[-1] ** -0.5)
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=10)
        model = get_peft_model(base, config)
        if not adapted:
            model.prompt_encoder.requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
        for rows in order.repeat(3).split(100):
            loss = model(pixel_values=pixels[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = model.eval()(pixel_values=pixels[1500:]).logits.argmax(-1)
        return (found == labels[1500:]).float().mean().item()

    frozen, learnt = accuracy(False), accuracy(True)
    assert frozen > 0.3 and learnt > frozen + 0.05, (frozen, learnt)
