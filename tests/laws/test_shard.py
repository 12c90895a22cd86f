"""FSDP2 on two processes: forward and gradients equal to one process, all methods in one pair of processes."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.laws.examples import LAYER_METHODS, config_of, move


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"layer": nn.Linear(8, 8)}) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["layer"](x))
        return self.head(x)


def adapted(method: str) -> nn.Module:
    from deltatune import get_peft_model

    config = config_of(method)  # finds legal values once, drawing random numbers: before the seed
    torch.manual_seed(0)
    model = get_peft_model(Stack().eval(), config)
    move(model, 0.3)
    return model.eval()  # some draw random numbers in training


def run(rank: int, port: int, expected: dict, failures) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for method, (x, out, gradients) in expected.items():
            model = adapted(method)
            for block in model.get_base_model().blocks:
                fully_shard(block["layer"], mesh=mesh)
            fully_shard(model, mesh=mesh)
            mine = model(x[rank * 2 : rank * 2 + 2])
            # each process has half of the rows and FSDP averages over the processes
            mine.square().sum().mul(2).backward()
            problems = [] if torch.allclose(mine, out[rank * 2 : rank * 2 + 2], atol=1e-6) else ["forward"]
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    full = parameter.grad.full_tensor()
                    if not torch.allclose(full, gradients[name], rtol=1e-4, atol=1e-5):
                        problems.append(name)
                else:
                    assert parameter.grad is None
            if problems:
                failures.put(f"{method}, process {rank}: {problems}")
    except Exception as error:
        failures.put(f"process {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.slow
def test_sharded_over_two_processes_equals_one_process():
    expected = {}
    for method in LAYER_METHODS:
        model, x = adapted(method), torch.randn(4, 8)
        out = model(x)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        expected[method] = (x, out.detach(), gradients)
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    port = free_port()
    workers = [context.Process(target=run, args=(rank, port, expected, failures)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    found = []
    while not failures.empty():
        found.append(failures.get())
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    assert found == [] and [worker.exitcode for worker in workers] == [0, 0]
