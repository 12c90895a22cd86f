"""FSDP's first version on two processes, with the policy for adapted models: outputs and gradients of one process."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.helpers import fsdp_auto_wrap_policy
from tests.core.tiny import batch, tiny
from tests.laws.examples import move
from tests.laws.test_shard import free_port


def adapted() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    move(model)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    plain = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
    return {name: p.grad.clone() for name, p in plain.items() if p.requires_grad}


def run(rank: int, port: int, out: torch.Tensor, expected: dict[str, torch.Tensor], problems) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = adapted()
        policy, cpu = fsdp_auto_wrap_policy(model), torch.device("cpu")
        sharded = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
        mine = sharded(**batch("llama")).logits
        mine.square().sum().backward()
        if not torch.allclose(mine, out, atol=1e-6):
            problems.put("forward")
        with FSDP.summon_full_params(sharded, with_grads=True):
            found = gradients(sharded)
        if found.keys() != expected.keys():
            problems.put("which parameters train")
        for name, gradient in expected.items():
            if not torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5):
                problems.put(name)
    except Exception as error:
        problems.put(f"{type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.slow
def test_two_processes_under_the_policy_equal_one():
    model = adapted()
    out = model(**batch("llama")).logits
    out.square().sum().backward()
    context = mp.get_context("spawn")
    problems = context.Queue()
    arguments = (free_port(), out.detach(), gradients(model), problems)
    processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    assert problems.empty(), problems.get()
