"""diffusers: adapters on a small UNet and a small transformer of random weights, as pipelines load them."""

import json
import tempfile

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer


def say(name, value):
    print("=", name, json.dumps(value))


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=2, out_channels=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    ).eval()  # fmt: skip


generator = torch.Generator().manual_seed(1)
sample, context = torch.randn(1, 2, 8, 8, generator=generator), torch.randn(1, 4, 8, generator=generator)


def end(model, **kwargs):
    with torch.no_grad():
        return [round(x, 5) for x in model(sample, 3, context, **kwargs).sample[0, 0, 0, :6].tolist()]


def scatter(model, seed):
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "lokr_" in name or "hada_" in name:
                seed += 1
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))


model = unet()
say("bare", end(model))
targets = ["to_q", "to_k", "to_v", "to_out.0"]
model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), adapter_name="one")
scatter(model, 10)
say("one", end(model))
say("layers", sum(isinstance(module, BaseTunerLayer) for module in model.modules()))
say("scaled call", end(model, cross_attention_kwargs={"scale": 0.5}))
say("after it", end(model))
folder = tempfile.mkdtemp()
model.save_lora_adapter(f"{folder}/one", adapter_name="one")

other = unet()
other.load_lora_adapter(
    f"{folder}/one", prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="first"
)
say("loaded", [end(other), other.active_adapters()])
state = {f"unet.{key}": value * 0.5 for key, value in get_peft_model_state_dict(model, adapter_name="one").items()}
other.load_lora_adapter(state, prefix="unet", adapter_name="second")
say("two", [sorted(other.peft_config), end(other)])
other.set_adapters(["first", "second"], weights=[0.7, 1.5])
say("weighted", [end(other), other.active_adapters()])
other.set_adapters("second")
say("second", end(other))
other.set_adapters(["first", "second"], weights=[{"down": 0.3, "mid": 1.0, "up": 0.9}, 1.0])
say("by block", end(other))
other.disable_lora()
say("off", end(other))
other.enable_lora()
say("on", end(other))
other.set_adapters(["first"])
other.fuse_lora(lora_scale=0.8)
say("fused", end(other))
other.unfuse_lora()
other.set_adapters(["first"])
say("unfused", end(other))
other.delete_adapters("second")
say("deleted", [sorted(other.peft_config), end(other)])
other.unload_lora()
say("unloaded", [end(other), hasattr(other, "peft_config")])
say("clean", any("lora" in key or "base_layer" in key for key in other.state_dict()))

for config in (LoKrConfig(r=2, target_modules=["to_q", "conv1"]), LoHaConfig(r=2, target_modules=["to_k", "conv2"])):
    made = unet()
    made.add_adapter(config)
    scatter(made, 50)
    say(type(config).__name__, [end(made), sorted(get_peft_model_state_dict(made))[:2]])

torch.manual_seed(2)
flux = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
).eval()  # fmt: skip
lora = {
    f"transformer.{name}.lora_{side}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 0.2
    for name in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v")
    for side, shape in (("A", (2, 16)), ("B", (16, 2)))
}
flux.load_lora_adapter(lora, prefix="transformer", adapter_name="given")
inputs = {
    "hidden_states": torch.ones(1, 6, 4) * 0.3, "encoder_hidden_states": torch.ones(1, 3, 8) * 0.1,
    "pooled_projections": torch.ones(1, 8) * 0.2, "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
}  # fmt: skip
with torch.no_grad():
    say("flux", [round(x, 5) for x in flux(**inputs).sample[0, 0].tolist()])
    say(
        "flux scaled",
        [round(x, 5) for x in flux(**inputs, joint_attention_kwargs={"scale": 0.3}).sample[0, 0].tolist()],
    )
    flux.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    say("cast", str(flux.transformer_blocks[0].attn.to_k.weight.dtype))
