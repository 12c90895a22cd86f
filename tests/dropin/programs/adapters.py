"""Several adapters on one model: adding, switching, mixing in a batch, merging, deleting; what a layer tells."""

import json
import tempfile

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM


def say(name, value):
    print("=", name, json.dumps(value))


def base():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3)).eval()


def scatter(model, seed):
    """Every adapter becomes one that does something, the same under any library that names parameters alike."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name or "hada_" in name:
                seed += 1
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))


ids = torch.arange(24).reshape(4, 6)


def end(model, **kwargs):
    with torch.no_grad():
        return [round(x, 5) for x in model(ids, **kwargs).logits[:, -1, :3].flatten().tolist()]


model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "first")
model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "up_proj"]))
scatter(model, 100)
model.eval()
say("active at first", [model.active_adapter, model.active_adapters, sorted(model.peft_config)])
say("first", end(model))
model.set_adapter("second")
say("second", end(model))
say("trains", sorted(n for n, p in model.named_parameters() if p.requires_grad)[:6])
say("active config", [model.active_peft_config.r, model.peft_type, model.base_model.prefix])
model.base_model.set_adapter(["first", "second"])
say("both", end(model))
model.set_adapter("first")
names = ["first", "second", "__base__", "second"]
say("mixed", end(model, adapter_names=names))

layer = model.base_model.model.model.layers[0].self_attn.q_proj
say("layer", [isinstance(layer, BaseTunerLayer), isinstance(layer, LoraLayer), isinstance(model.base_model, BaseTuner)])
say("reads", [layer.r, layer.lora_alpha, layer.scaling, layer.merged, layer.merged_adapters, layer.disable_adapters])
say("shapes", [list(layer.lora_A["first"].weight.shape), list(layer.lora_B["second"].weight.shape)])
say("delta", layer.get_delta_weight("second")[:2, :3].tolist())
say("base layer", type(layer.get_base_layer()).__name__)
say("targets", sorted(model.base_model.targeted_module_names)[:3])

layer.scaling["first"] = layer.scaling["first"] * 2
say("scaled", end(model))
layer.set_scale("first", 0.5)
layer.scale_layer(3.0)
say("scaled again", [layer.scaling["first"], end(model)])
layer.unscale_layer()
say("unscaled", [layer.scaling["first"], end(model)])

model.merge_adapter()
say("merged", [layer.merged, layer.merged_adapters, end(model)])
model.unmerge_adapter()
say("unmerged", [layer.merged, end(model)])
model.disable_adapter_layers()
say("off", end(model))
model.enable_adapter_layers()
say("on", end(model))

status = get_model_status(model)
say("status", [status.enabled, status.active_adapters, status.available_adapters, status.trainable_params])
say("layer status", [get_layer_status(model)[0].name, get_layer_status(model)[0].requires_grad])

folder = tempfile.mkdtemp()
model.save_pretrained(folder)
fresh = PeftModel.from_pretrained(base(), f"{folder}/second", adapter_name="again")
fresh.load_adapter(f"{folder}/first", adapter_name="other")
say("loaded", [end(fresh), sorted(fresh.peft_config)])
fresh.set_adapter("other")
say("other", end(fresh))
fresh.delete_adapter("again")
say("left", [sorted(fresh.peft_config), fresh.active_adapters, end(fresh)])
say("unloaded", end(fresh.unload()))

mixed = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora", mixed=True)
mixed.add_adapter("loha", LoHaConfig(target_modules=["v_proj"], init_weights=False))
scatter(mixed, 300)
mixed.set_adapter(["lora", "loha"])
say("mixed model", [type(mixed).__name__, end(mixed)])
scaled = get_peft_model(base(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
say("ia3", [end(scaled), scaled.get_nb_trainable_parameters()])
