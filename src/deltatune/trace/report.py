"""What a trace found: plain dataclasses of numbers, names and shapes, to JSON and back.

`where` always names the place in the code as `module:qualname`, for a reader to open.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

Shape = list[int]

LIVE, WAITING, DEAD, FROZEN, UNKNOWN = "live", "waiting", "dead", "frozen", "unknown"


@dataclass
class Gradient:
    """How much gradient something received from the batch.

    Attributes:
        state: "live"; "waiting": exactly zero now, and going to change; "dead": nothing arrives (`reason` says why);
            "frozen": not asked for; "unknown": no loss to start from.
        norm: Its 2-norm; None where there is no gradient, or one that is not finite.
        zeros: How many of its elements are exactly zero, those without any gradient included.
    """

    state: str
    norm: float | None = None
    zeros: int = 0
    reason: str = ""


@dataclass
class Parameter:
    name: str
    shape: Shape
    norm: float
    gradient: Gradient

    @property
    def size(self) -> int:
        size = 1
        for side in self.shape:
            size *= side
        return size


@dataclass
class ConfigStop:
    """What the user set, and what the model filled in: the fields that differ from their defaults."""

    where: str
    adapter: str
    fields: dict[str, Any]


@dataclass
class MethodStop:
    """The registry's entry: the method's config class, the class of what is trained, and its formula."""

    where: str
    adapter: str
    method: str
    config_class: str
    trained_class: str
    formula: str

    @property
    def title(self) -> str:
        """The method as its authors write it."""
        return self.formula.partition(":")[0] or self.method


@dataclass
class TaskStop:
    """The wrapper that the task type chose, and the model it stands around."""

    where: str
    task_type: str | None
    base_class: str
    model_type: str
    trainable: int
    total: int
    training: bool


@dataclass
class Part:
    """The keys and values of one site: columns of the prefix's rows.

    Attributes:
        site: The attention that the part is made for, by its place in the order of sites.
        readers: The attentions that read it. In PEFT's layout of encoder-decoders these are others, or none.
        columns: First column and the one after the last.
        key_shape: (heads, P, dim), as the attention gets it; no batch axis, for it is the same in every row.
    """

    index: int
    site: str
    kind: str
    readers: list[str]
    columns: Shape
    key_shape: Shape
    value_shape: Shape
    key_norm: float
    value_norm: float
    key: Gradient
    value: Gradient
    dead: bool


@dataclass
class InputStop:
    """The prompt of one adapter: rows before the embedded tokens.

    Attributes:
        sides: Embedding -> rows that stand before what it gives.
    """

    where: str
    adapter: str
    virtual_tokens: int
    rows: Shape
    sides: dict[str, int]
    parameters: list[Parameter]


@dataclass
class PrefixStop:
    """The prefix encoder of one adapter, and what it hands to the attentions.

    Attributes:
        steps: What the virtual tokens pass through, with the shape after each step.
        shift: Positions by which the tokens move (PEFT's layout only).
    """

    where: str
    where_cut: str
    where_bound: str
    adapter: str
    virtual_tokens: int
    projection: bool
    layout: str
    shift: int
    steps: list[tuple[str, Shape]]
    parameters: list[Parameter]
    parts: list[Part]


@dataclass
class AttentionCall:
    """One call of an attention function, in the order of the forward pass.

    Attributes:
        prefix: Keys put in front of those of the tokens; 0 in an attention without prefix.
        mask_before: None where the call came without a mask.
        bias_before: Shape of a relative position bias (T5), which is extended like the mask.
    """

    where: str
    module: str
    module_class: str
    kind: str
    backend: str
    function: str
    query: Shape
    key_before: Shape
    key_after: Shape
    value_after: Shape
    mask_before: Shape | None
    mask_after: Shape | None
    mask_type: str
    bias_before: Shape | None
    bias_after: Shape | None
    prefix: int

    @property
    def length_before(self) -> int:
        return self.key_before[2]

    @property
    def length_after(self) -> int:
        return self.key_after[2]


@dataclass
class AdapterPart:
    """One adapter on one layer.

    Attributes:
        facts: Plain values that its class declares in `views`, such as LoRA's r and scaling.
        delta_norm: Frobenius norm of what it adds to the weight; `base_norm` is that of the weight below it. None of an
            adapter that no weight can hold.
    """

    where: str
    adapter: str
    facts: dict[str, Any]
    base_norm: float | None
    delta_norm: float | None
    parameters: list[Parameter]
    dead: bool

    @property
    def rank(self) -> int | None:
        return self.facts.get("r")

    @property
    def scaling(self) -> float | None:
        return self.facts.get("scaling")


@dataclass
class LayerStop:
    """One wrapped layer; shapes are those of the first of its `calls` in the batch, None where there was no call.

    A block of layers has no `weight`.
    """

    where: str
    path: str
    layer_class: str
    weight: Shape | None
    calls: int
    input_shape: Shape | None
    output_shape: Shape | None
    adapters: list[AdapterPart]


@dataclass
class CopyStop:
    """A module that is trained whole, as a copy (`modules_to_save`)."""

    where: str
    path: str
    adapter: str
    parameters: list[Parameter]


@dataclass
class LossStop:
    """The model's output; `value` is None without a loss, or where it is not finite (`note` says which)."""

    where: str
    computed_by: str
    value: float | None
    output: dict[str, Shape]
    note: str = ""


@dataclass
class GradientStop:
    """Sums over everything that trains. `live + waiting + dead` elements, unless there was no loss."""

    where: str
    norm: float | None
    tensors: int
    elements: int
    live: int
    waiting: int
    dead: int
    frozen: int
    others: list[Parameter] = field(default_factory=list)
    note: str = ""


@dataclass
class Stop:
    """One stop of the way, in order; `field` and `index` say where in the report its details are."""

    name: str
    where: str
    summary: str
    field: str
    dead: bool = False
    index: int = 0


@dataclass
class TraceReport:
    """One batch on its way through an adapted model."""

    version: str
    batch: dict[str, Shape]
    active: list[str]
    inactive: list[str]
    configs: list[ConfigStop]
    methods: list[MethodStop]
    task: TaskStop
    prefixes: list[PrefixStop]
    layers: list[LayerStop]
    calls: list[AttentionCall]
    copies: list[CopyStop]
    loss: LossStop
    gradient: GradientStop
    stops: list[Stop] = field(default_factory=list)
    inputs: list[InputStop] = field(default_factory=list)

    @property
    def dead(self) -> list[str]:
        """Names of everything that trains but gets no gradient: parts of prefixes, adapters on layers, parameters."""
        parts = [f"{prefix.adapter}: {part.site}" for prefix in self.prefixes for part in prefix.parts if part.dead]
        for layer in self.layers:
            for part in layer.adapters:
                if part.dead:
                    parts.append(f"{part.adapter}: {layer.path}")
                else:
                    dead = [p.name for p in part.parameters if p.gradient.state == DEAD]
                    parts += [f"{part.adapter}: {layer.path}.{name}" for name in dead]
        for prompt in self.inputs:
            parts += [f"{prompt.adapter}: {p.name}" for p in prompt.parameters if p.gradient.state == DEAD]
        for copy in self.copies:
            parts += [f"{copy.adapter}: {copy.path}.{p.name}" for p in copy.parameters if p.gradient.state == DEAD]
        return parts + [p.name for p in self.gradient.others if p.gradient.state == DEAD]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `TraceReport.from_dict` is the way back."""
        return dataclasses.asdict(self, dict_factory=lambda pairs: {key: _plain(value) for key, value in pairs})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TraceReport:
        return _built(cls, values)


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _built(hint: Any, value: Any) -> Any:
    """`value`, as JSON holds it, as what the type hint says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None or hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _built(args[0], value)
    if origin is list:
        return [_built(args[0], part) for part in value]
    if origin is tuple:
        return tuple(_built(part, item) for part, item in zip(args, value))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{key: _built(hints[key], part) for key, part in value.items()})
    return value
