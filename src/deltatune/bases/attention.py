"""`nn.MultiheadAttention`: its joint projection of queries, keys and values, a bare parameter (3 width, width).

No layer stands there that could be called: attention is no linear map of its input. So an adapter acts through the
adapted weight alone (`only_weight`), with which the whole attention is computed. The output projection beside it is an
`nn.Linear`, adapted as such; the attention reads its weight.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.bases.linear import Linear
from deltatune.bases.parameter import like

_CALL = inspect.signature(nn.MultiheadAttention.forward)


class JointProjection(Linear):
    types = ("MultiheadAttention",)
    keeps = ("in_proj_weight", "in_proj_bias")
    only_weight = True
    parts = ("out_proj",)
    dense: bool = False

    @staticmethod
    def fits(module: nn.Module) -> bool:
        # With keys or values of another width there is one matrix for each instead of the joint one.
        own = type(module).forward is nn.MultiheadAttention.forward
        return isinstance(module, nn.MultiheadAttention) and own and module._qkv_same_embed_dim

    def __init__(self, module: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        self.attention = cast(nn.MultiheadAttention, module)
        self.args, self.kwargs = args, kwargs or {}
        self.in_features, self.out_features = self.attention.embed_dim, 3 * self.attention.embed_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.attention.in_proj_weight.dtype

    @property
    def weight(self) -> Tensor:
        return self.attention.in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        return self.attention.in_proj_bias

    def hold(self, weight: Tensor) -> nn.Parameter:
        return like(weight, self.attention.in_proj_weight)

    def __call__(self, x: Tensor) -> Any:
        return self.attention(x, *self.args, **self.kwargs)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """The attention of queries `x` with another joint projection; its output and perhaps its weights."""
        module = self.attention
        call = _CALL.bind(module, x, *self.args, **self.kwargs)
        call.apply_defaults()
        given = {name: value for name, value in call.arguments.items() if name != "self"}
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        swap = module.batch_first and x.dim() == 3
        if swap:  # equal tensors stay one object, which the function looks for
            turned = {id(part): part.transpose(0, 1) for part in (query, key, value)}
            query, key, value = turned[id(query)], turned[id(key)], turned[id(value)]
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            module.dropout,
            module.out_proj.weight,
            module.out_proj.bias,
            training=module.training,
            **given,
        )
        return (output.transpose(0, 1) if swap else output), weights
