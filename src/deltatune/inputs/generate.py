"""Generation with virtual tokens: placeholders are part of the sequence, and nobody but the model sees them.

Every cache, beam, draft and chunk then counts the virtual tokens like any others. Logits processors (transformers' own
and the caller's), stopping criteria and streamers are shown sequences without them, and so is the caller at the end.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune.errors import StateError
from deltatune.inputs import call as input_call
from deltatune.inputs.places import DECODER, ENCODER

if TYPE_CHECKING:
    from deltatune.inputs.stage import InputStage


@dataclass(eq=False)
class Generation:
    """One call of generate.

    Attributes:
        rows: What stands before the tokens of each side.
        count: Placeholders at the front of the sequences that are generated.
        source: Placeholders before the ids that the model is asked with.
        first: Which virtual token each side begins with (`deltatune.inputs.call.lengthen`).
        original: The caller's ids (B, T) at the front of what is generated.
        fed: Tokens that went into a cache which does not count them.
    """

    rows: dict[str, Tensor]
    two_sided: bool
    count: int
    source: int
    first: dict[str, Any]
    original: Tensor | None = None
    fed: int = 0

    def starts(self, named: dict[str, Any]) -> dict[str, Any]:
        """Which token of the sequence the first of this pass is."""
        seen = input_call.past_tokens(named)
        ids = named.get("input_ids")
        if not self.two_sided and isinstance(ids, Tensor):
            self.fed = ids.shape[1] if isinstance(seen, int) and seen == 0 else self.fed + ids.shape[1]
        if seen is None:
            seen = self.fed - (ids.shape[1] if isinstance(ids, Tensor) else 0)
        side = DECODER if self.two_sided else ENCODER
        tokens = 0 if self.original is None else self.original.shape[1]
        past = isinstance(seen, int) and seen >= self.source + tokens  # all virtual tokens
        return {**self.first, side: seen if past else seen + self.first.get(side, 0)}

    def shown(self, sequences: Tensor) -> Tensor:
        """Sequences as the caller knows them: without virtual tokens, with padding where the caller had it."""
        if self.original is None:
            return sequences[:, self.count :]
        tokens = self.original.shape[1]
        front = self.original.repeat_interleave(len(sequences) // len(self.original), dim=0)
        return torch.cat([front.to(sequences), sequences[:, self.count + tokens :]], dim=1)


def generate(stage: InputStage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model: Any = stage.model
    named = {**dict(zip(inspect.signature(model.generate).parameters, args)), **kwargs}
    takes_tasks = any(prompt.encoder.takes_tasks for prompt in stage.prompts.values())
    task_ids = named.pop("task_ids", None) if takes_tasks else None
    prompts = stage.active()
    if not prompts:
        return model.generate(**named)
    setting = _Settings(model, named)
    if setting("guidance_scale") not in (None, 1, 1.0):
        raise StateError(
            "generate: guidance_scale runs the model a second time, which a prompt cannot follow; leave it out, or use "
            "PrefixTuningConfig",
            field="guidance_scale",
        )
    _name_the_inputs(named, setting, stage)
    given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    rows = stage.rows(prompts, task_ids, len(given))
    generation = _prepare(stage, named, rows, setting)
    _shift_lengths(named, setting, generation.count if not _embeds_only(named, stage) else rows[ENCODER].shape[-2])
    _wrap_callers(named, generation)
    before, stage.local.generation = stage.local.generation, generation
    try:
        output = model.generate(**named)
    finally:
        stage.local.generation = before
    return _shortened(output, generation, given.shape[1])


class _Settings:
    """What holds for a call: its own arguments, then the given generation config, then the model's."""

    def __init__(self, model: Any, named: dict[str, Any]) -> None:
        self.sources = (named, vars(named.get("generation_config") or object), vars(model.generation_config))

    def __call__(self, name: str) -> Any:
        return next((source[name] for source in self.sources if source.get(name) is not None), None)


def _name_the_inputs(named: dict[str, Any], setting: _Settings, stage: InputStage) -> None:
    if (ids := named.pop("inputs", None)) is not None:
        named["input_ids"] = ids
    if named.get("encoder_outputs") is not None:
        raise StateError(
            "generate: encoder_outputs were computed without the virtual tokens of the prompt; pass input_ids",
            field="encoder_outputs",
        )
    if named.get("input_ids") is None and named.get("inputs_embeds") is None:
        start = setting("bos_token_id")
        if start is None:
            raise StateError("generate: pass input_ids; the model has no bos_token_id to begin with", field="input_ids")
        named["input_ids"] = torch.tensor([[start]], device=stage.model.device)


def _embeds_only(named: dict[str, Any], stage: InputStage) -> bool:
    return not stage.places.stacks and named.get("input_ids") is None


def _prepare(stage: InputStage, named: dict[str, Any], rows: dict[str, Tensor], setting: _Settings) -> Generation:
    """Lengthen what generation starts from."""
    two_sided, source = bool(stage.places.stacks), rows[ENCODER].shape[-2]
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    seen = input_call.past_tokens(named)
    goes_on = seen is None or bool(seen > 0)
    if goes_on and ids is not None and mask is not None and mask.shape[1] != ids.shape[1]:
        input_call.continue_side(named, ENCODER, source)  # new tokens only, after those of the cache
        return Generation({}, two_sided, 0, 0, {})
    padding = setting("pad_token_id")
    _, as_ids, start = input_call.lengthen(named, ENCODER, rows[ENCODER], stage.causal, padding, stage.places.counted)
    rows = dict(rows) if as_ids else {side: part for side, part in rows.items() if side != ENCODER}
    if not two_sided:
        return Generation(rows, False, source if as_ids else 0, source, {ENCODER: start}, ids if as_ids else None)
    if DECODER not in rows:
        return Generation(rows, True, 0, source, {ENCODER: start})
    first = {ENCODER: start, DECODER: _lengthen_targets(named, rows[DECODER], setting)}
    return Generation(rows, True, rows[DECODER].shape[-2], source, first)


def _lengthen_targets(named: dict[str, Any], rows: Tensor, setting: _Settings) -> Any:
    given = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start
    first = torch.as_tensor(start, device=given.device).reshape(-1, 1).expand(len(given), 1)
    ids = named.get("decoder_input_ids")
    if ids is None:
        ids = first
    elif (ids[:, 0] != first[:, 0]).all():  # as generate() itself does
        ids = torch.cat([first, ids], dim=1)
        if named.get("decoder_attention_mask") is not None:
            mask = named["decoder_attention_mask"]
            named["decoder_attention_mask"] = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)
    named["decoder_input_ids"] = ids
    return input_call.lengthen(named, DECODER, rows, True)[2]


def _shift_lengths(named: dict[str, Any], setting: _Settings, count: int) -> None:
    for name in ("max_length", "min_length"):
        value = setting(name)
        if value and count:
            named[name] = value + count


# ---------------------------------------------------------------------------------------- what others see of a sequence


def build_processors(stage: InputStage, *args: Any, **kwargs: Any) -> Any:
    """The logits processors of a generation, each of which sees sequences and lengths without placeholders."""
    from transformers import LogitsProcessorList

    build = type(stage.model)._get_logits_processor  # type: ignore[attr-defined]
    generation = stage.local.generation
    if generation is None or not generation.source:
        return build(stage.model, *args, **kwargs)
    named = {**dict(zip(list(inspect.signature(build).parameters)[1:], args)), **kwargs}
    config = named["generation_config"] = copy.copy(named["generation_config"])
    for name in ("max_length", "min_length"):
        if getattr(config, name) is not None:
            setattr(config, name, getattr(config, name) - generation.count)
    if named.get("input_ids_seq_length") is not None:
        named["input_ids_seq_length"] -= generation.count
    source = named.get("encoder_input_ids")
    if isinstance(source, Tensor) and source.ndim == 2:
        named["encoder_input_ids"] = source[:, generation.source :]
    built = build(stage.model, **named)
    return LogitsProcessorList([_Processor(one, generation) for one in built]) if generation.count else built


class _Shorter:
    """Stands in for a callable that is shown sequences; everything else is the original's."""

    def __init__(self, inner: Any, generation: Generation) -> None:
        self.inner, self.generation = inner, generation

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "generation"):
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Processor(_Shorter):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(self.generation.shown(input_ids), scores)


class _Criterion(_Shorter):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self.inner(self.generation.shown(input_ids), scores, **kwargs)


class _Streamer(_Shorter):
    """The first thing that a streamer gets is the prompt."""

    started = False

    def put(self, value: Tensor) -> None:
        self.inner.put(value if self.started else self.generation.shown(value))
        self.started = True

    def end(self) -> None:
        self.inner.end()


def _wrap_callers(named: dict[str, Any], generation: Generation) -> None:
    if not generation.count:
        return
    if named.get("streamer") is not None:
        named["streamer"] = _Streamer(named["streamer"], generation)
    if named.get("stopping_criteria") is not None:
        from transformers import StoppingCriteriaList

        named["stopping_criteria"] = StoppingCriteriaList(
            [_Criterion(criterion, generation) for criterion in named["stopping_criteria"]]
        )


def _shortened(output: Any, generation: Generation, tokens: int) -> Any:
    """Sequences and hidden states without the virtual tokens; attention weights keep their columns."""
    if isinstance(output, Tensor):
        return generation.shown(output)
    output.sequences = generation.shown(output.sequences)
    for name in ("hidden_states", "attentions", "decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        steps = output.get(name)
        if steps is not None:
            first = 1 if generation.two_sided else tokens
            output[name] = tuple(input_call.shorten_steps(step, first + index) for index, step in enumerate(steps))
    for name in ("encoder_hidden_states", "encoder_attentions"):
        if output.get(name) is not None:
            output[name] = input_call.shorten_steps(output[name], tokens)
    return output
