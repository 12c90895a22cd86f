"""Run by torchrun: adapters on a base in tensor parallel beside the same adapters on the whole base.

torchrun --nproc-per-node 2 tensor_parallel.py BASE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from deltatune import (
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from deltatune.errors import MergeError, PeftError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": lambda: LoraConfig(r=3, target_modules=ALL, task_type="CAUSAL_LM"),
    "head": lambda: LoraConfig(r=3, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=3, target_modules=ALL, use_dora=True, task_type="CAUSAL_LM"),
    "pissa": lambda: LoraConfig(r=3, target_modules=ALL, init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(target_modules=ALL, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=ALL, task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(r=4, target_modules=ALL, task_type="CAUSAL_LM"),
}
DROPOUT = LoraConfig(r=3, target_modules=ALL, lora_dropout=0.5, task_type="CAUSAL_LM")
REFUSED = {
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "embedding": lambda: LoraConfig(r=3, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "whole": lambda: LoraConfig(r=3, target_modules=ALL, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


def load(base: str, sliced: bool):
    from transformers.distributed import DistributedConfig

    more = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size())} if sliced else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, **more)


def adapted(base: str, config, sliced: bool):
    model = load(base, sliced)
    torch.manual_seed(3)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():  # off the start
        for _, parameter in trained(model):
            parameter += 0.1 * torch.rand(parameter.shape, dtype=parameter.dtype)
    return model


def trained(model):
    return sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)


def passes(model, ids, steps: int = 3):
    """Losses of a few steps, the gradients of the first, and the outputs at the end."""
    optimizer = torch.optim.SGD([p for _, p in trained(model)], lr=0.1)
    losses, gradients = [], {}
    torch.manual_seed(4)
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in trained(model)}
        optimizer.step()
    with torch.no_grad():
        return losses, gradients, model.eval()(input_ids=ids).logits


def apart(model) -> float:
    """How far what trains is from what the first process has."""
    most = 0.0
    for _, parameter in trained(model):
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        most = max(most, (parameter - first).abs().max().item())
    return most


def drops(base: str) -> dict[str, float]:
    """With dropout: the processes drop the same, so that their adapters stay one."""
    model = adapted(base, DROPOUT, True)
    start = {name: p.detach().clone() for name, p in trained(model)}
    passes(model, torch.arange(24).reshape(2, 12) % 30 + 1)
    moved = max((p - start[name]).abs().max().item() for name, p in trained(model))
    return {"apart": apart(model), "moved": moved}


def compare(base: str, name: str, folder: Path) -> dict[str, float]:
    ids = torch.arange(24).reshape(2, 12) % 30 + 1
    whole, sliced = adapted(base, CONFIGS[name](), False), adapted(base, CONFIGS[name](), True)
    one, other = passes(whole, ids), passes(sliced, ids)
    assert list(one[1]) == list(other[1])
    found = {
        "losses": max(abs(a - b) for a, b in zip(one[0], other[0], strict=True)),
        "gradients": max((one[1][key] - other[1][key]).abs().max().item() for key in one[1]),
        "largest": max(value.abs().max().item() for value in one[1].values()),
        "outputs": (one[2] - other[2]).abs().max().item(),
    }
    weight = sliced.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
    found["share"], found["apart"] = weight.to_local().numel() / weight.numel(), apart(sliced)
    with sliced.disable_adapter(), torch.no_grad():
        found["disabled"] = (sliced(input_ids=ids).logits - load(base, True)(input_ids=ids).logits).abs().max().item()
    first = dist.get_rank() == 0
    if first:  # alone: nothing that is saved needs the others
        sliced.save_pretrained(folder / name)
    dist.barrier()
    again = PeftModel.from_pretrained(load(base, False), str(folder / name), autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        found["reloaded"] = (again(input_ids=ids).logits - other[2]).abs().max().item()
        written = [model.generate(input_ids=ids[:, :4], max_new_tokens=5, do_sample=False) for model in (whole, sliced)]
    found["written"] = float(not torch.equal(*written))
    try:
        sliced.merge_adapter()
    except MergeError as error:
        found["merge"] = float("is in shards" not in str(error))
    return found


def refuse(base: str, name: str) -> str:
    model = load(base, True)
    modules, trains = list(model.modules()), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    if name == "seeds":
        torch.manual_seed(dist.get_rank())
    try:
        get_peft_model(model, REFUSED.get(name, CONFIGS["lora"])())
    except PeftError as error:
        same = all(a is b for a, b in zip(modules, model.modules(), strict=True))
        return str(error) if same and trains == [p.requires_grad for p in model.parameters()] else "changed"
    return "not refused"


def main() -> None:
    base, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    told: dict = {name: compare(base, name, folder) for name in CONFIGS}
    told["dropout"] = drops(base)
    told["refused"] = {name: refuse(base, name) for name in (*REFUSED, "seeds")}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
