"""What the cases share: small models, and how errors, warnings and printed lines are told in JSON."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.arange(24).reshape(4, 6) % 50 + 3


class Net(nn.Module):
    """Layers of several kinds, some of them with names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"lin0": nn.Linear(8, 8), "lin1": nn.Linear(8, 8)}) for _ in "abc"])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.emb(x)
        for layer in self.layers:
            x = layer["lin1"](torch.tanh(layer["lin0"](x))) + x
        return self.head(self.norm(x).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


ROWS = torch.arange(12).reshape(3, 4)


def llama(layers: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    config = LlamaConfig(
        **{**sizes, "num_attention_heads": 4, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 2, **options}
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def scatter(model: Any, seed: int = 1, prefix: str = "lora_") -> Any:
    """Every adapter does something, the same wherever parameters are called alike."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if prefix in name:
                seed += 1
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
    return model


def told(tensor: Any) -> Any:
    """Numbers of a tensor, few of them."""
    return [round(x, 5) for x in tensor.detach().float().flatten()[:12].tolist()]


def end(model: Any, ids: Any = IDS, **options: Any) -> Any:
    with torch.no_grad():
        return told(model(ids, **options).logits[:, -1, :3])


def out(model: Any, x: Any = ROWS, **options: Any) -> Any:
    with torch.no_grad():
        return told(model(x, **options))


def raises(call: Any) -> Any:
    """The builtin classes that would catch what the call raises; "nothing" if it raises nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except Exception as error:
            names = {kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"}
            return {"raises": sorted(names - {"object", "BaseException", "Exception", "LookupError"})}
    return "nothing"


def warns(call: Any) -> bool:
    """Whether the call warns the program's user."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return any(issubclass(one.category, UserWarning) for one in seen)


def printed(call: Any) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        call()
    return text.getvalue()


def trains(model: Any) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def shapes(tensors: Any) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def folder() -> str:
    return tempfile.mkdtemp()


def plain(value: Any) -> Any:
    """A value of a config as JSON has it; sets sorted."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
