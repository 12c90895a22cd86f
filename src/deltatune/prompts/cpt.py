"""Context-aware prompt tuning: X' = [E(c) + delta; X], |delta_i| <= eps_i, with the context's labels in the loss too.

https://arxiv.org/abs/2410.17222: the prompt starts as embedded examples c of the task and stays close to them. Every
token of the context has a type: 0 for none, and for the k-th example 4k + 1 input format, 4k + 2 input, 4k + 3 output
format, 4k + 4 label. Formats and inputs move, within balls of their own radius; labels stay and are learned from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from deltatune import checks
from deltatune.adapter import Method
from deltatune.config import PeftType, TaskType, config
from deltatune.errors import ConfigError
from deltatune.inputs.call import IGNORED
from deltatune.inputs.encoder import ROWS, InputEncoder, embedded
from deltatune.inputs.prompt import Input
from deltatune.prompts.config import PromptLearningConfig

FORMATS, INPUT, LABEL = (1, 3), 2, 0  # a type modulo 4
_RADIUS_WIDTH = 2048  # the width of embedding for which the radii are given
_TINY = 1e-10  # the ball of tokens that do not move


@config
class CPTConfig(PromptLearningConfig):
    """Fields and meaning are PEFT's; the task is CAUSAL_LM. Calls may give `input_type_mask`, types of tokens.

    Attributes:
        cpt_token_ids: The context; its length is the number of virtual tokens.
        cpt_mask: Kept for PEFT, which does not read it either.
        cpt_tokens_type_mask: The type of each token of the context.
        opt_weighted_loss_type: "decay" weighs the labels of earlier examples less.
        opt_loss_decay_factor: From each label to the one before.
        opt_projection_epsilon: Radius of the balls of inputs, for embeddings of width 2048; it grows as the root.
        opt_projection_format_epsilon: The same for formats.
        tokenizer_name_or_path: Kept for PEFT.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        if self.peft_type is None:
            self.peft_type = PeftType.CPT
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        count = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * count if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if self.num_virtual_tokens not in (None, count):
            checks.refuse(
                type(self).__name__, "num_virtual_tokens", self.num_virtual_tokens, f"{count}, as cpt_token_ids"
            )
        self.num_virtual_tokens = count
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        owner = type(self).__name__
        if self.task_type != TaskType.CAUSAL_LM:
            checks.refuse(owner, "task_type", self.task_type, "'CAUSAL_LM'")
        lengths = [len(part or ()) for part in (self.cpt_token_ids, self.cpt_mask, self.cpt_tokens_type_mask)]
        if len({*lengths, self.num_virtual_tokens}) > 1 or not lengths[0]:
            raise ConfigError(
                f"{owner}: cpt_token_ids, cpt_mask and cpt_tokens_type_mask have {lengths} entries, expected as many "
                "in each, one at least",
                field="cpt_token_ids",
                found=lengths,
            )
        if min(self.cpt_tokens_type_mask or [0]) < 0:
            checks.refuse(owner, "cpt_tokens_type_mask", min(self.cpt_tokens_type_mask or ()), "types of 0 or more")
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon", "opt_loss_decay_factor"):
            checks.finite_positive(owner, name, getattr(self, name))


class CPTEmbedding(InputEncoder):
    """The trainable part: `delta_embedding` (P, token_dim), on the frozen `embedding` of the context."""

    epsilon: Tensor
    moves: Tensor
    ids: Tensor
    types: Tensor

    def __init__(self, config: CPTConfig, word_embeddings: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__(config)
        ids, types = list(config.cpt_token_ids or ()), list(config.cpt_tokens_type_mask or ())
        if word_embeddings is not None and not config.inference_mode:
            vocabulary = len(word_embeddings.weight)  # type: ignore[attr-defined]
            super().start_at(embedded(word_embeddings, ids, vocabulary))
        self.delta_embedding = torch.nn.Embedding(config.length, self.embedding.embedding_dim)
        torch.nn.init.zeros_(self.delta_embedding.weight)
        scale = math.sqrt(self.embedding.embedding_dim / _RADIUS_WIDTH)
        radii = dict.fromkeys(FORMATS, (config.opt_projection_format_epsilon or 0) * scale)
        radii[INPUT] = (config.opt_projection_epsilon or 0) * scale
        epsilon = [radii.get(kind % 4, _TINY) if kind > 0 else _TINY for kind in types]
        self.register_buffer("epsilon", torch.tensor(epsilon)[:, None], persistent=False)
        self.register_buffer("moves", torch.tensor(epsilon)[:, None] > _TINY, persistent=False)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.register_buffer("types", torch.tensor(types), persistent=False)
        self.decay = (config.opt_loss_decay_factor or 1.0) if config.opt_weighted_loss_type == "decay" else 1.0
        self.embedding.requires_grad_(False)

    def requires_grad_(self, requires_grad: bool = True) -> CPTEmbedding:
        self.delta_embedding.requires_grad_(requires_grad)
        return self

    def forward(self, tokens: Tensor | None = None, task_ids: Tensor | None = None) -> Tensor:
        delta = self.delta_embedding.weight
        projected = project(delta.detach(), self.epsilon)
        if torch.is_grad_enabled() and delta.requires_grad:
            with torch.no_grad():  # projected gradient descent: after a step, back into the ball
                delta.copy_(projected)
            projected = torch.where(self.moves, delta, projected)
        rows = self.embedding.weight + projected
        return rows if tokens is None else functional.embedding(tokens, rows)

    def start_at(self, rows: Tensor) -> None:
        """The rows of a file become the centres, as in PEFT."""
        super().start_at(rows)
        torch.nn.init.zeros_(self.delta_embedding.weight)

    def file_tensors(self) -> dict[str, Tensor]:
        return super().file_tensors() | self.state_tensors()

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        if not self.load_state_tensors(tensors):
            self.start_at(tensors[ROWS])

    def context_loss(
        self, encoders: list[InputEncoder], labels: Tensor, types: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """The loss of a call from its logits (B, P + T, vocabulary): over the context's labels and the caller's (B, T).

        Args:
            encoders: Those whose rows stand before the tokens, in order.
            types: Of the caller's tokens (B, T); labels, when left out.
        """
        types = torch.full_like(labels, 4) if types is None else types.to(labels)
        ids, kinds, highest = [], [], 0
        for encoder in encoders:
            own = encoder if isinstance(encoder, CPTEmbedding) else None
            count = len(encoder.embedding.weight)
            ids.append(labels.new_full((count,), IGNORED) if own is None else own.ids.to(labels))
            shifted = labels.new_zeros(count) if own is None else torch.where(own.types > 0, own.types + highest, 0)
            kinds.append(shifted.to(labels))
            highest = highest if own is None else int(own.types.max()) + highest
        kind = torch.cat([torch.cat(kinds).expand(len(labels), -1), torch.where(types > 0, types + highest, 0)], dim=1)
        wanted = torch.cat([torch.cat(ids).expand(len(labels), -1), labels], dim=1)
        wanted = torch.where((kind > 0) & (kind % 4 == LABEL), wanted, IGNORED)
        return lambda logits: weighted_loss(logits, wanted, kind, self.decay)


def project(delta: Tensor, epsilon: Tensor) -> Tensor:
    """Each row of delta (P, d), no longer than its epsilon (P, 1)."""
    norm = delta.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, delta * (epsilon / torch.maximum(norm, epsilon)), delta)


def weighted_loss(logits: Tensor, labels: Tensor, types: Tensor, decay: float) -> Tensor:
    """Mean over the labels (B, S) of cross-entropy times decay^i, i counting the examples of a row from the last."""
    labels, types = labels[:, 1:], types[:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    is_label = (types > 0) & (types % 4 == LABEL)
    weights = torch.ones_like(losses).view_as(labels)
    for row in range(len(labels)) if decay != 1 else ():
        for age, kind in enumerate(types[row][is_label[row]].unique().flip(0)):
            weights[row][types[row] == kind] = decay**age
    counted = labels != IGNORED
    return (losses.view_as(labels) * weights)[counted].mean()


METHOD = Method(
    PeftType.CPT, CPTConfig, None, key_prefix="prompt_", graft=Input, encoder=CPTEmbedding, learning_rate=1e-3
)
