"""The algebra: a frozen layer is a linear map, an adapter is a trainable change to it, and the result is a map again.

LinearMap   x -> x @ weight.T + bias, however the layer stores and runs it
Adapter     weight -> adapt(weight), the definition of a method; `forward` is the same map, made cheap
Applied     adapter after map: a map, so stacking adapters is composition
Stored      what files hold of an adapter, or of a module that the adapters of all layers share
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from deltatune.calls import Value
from deltatune.config import PeftConfig, PeftType
from deltatune.errors import MergeError


class LinearMap(Protocol):
    """A frozen layer seen as a matrix; a block of layers, which has none, is met by adapters of its output alone.

    keeps           names of the module's parameters that are `weight` and `bias`
    only_weight     its output is no linear map of its input, so that adapters act through the adapted weight alone
    parts           modules inside of it that are adapted with it
    turned          it stores its weight as (in, out)
    dense           its weight is stored as such and unchanged, and there is no more to calling it than that weight

    `in_features` and `out_features` are the sides of `weight`. A convolution's input side counts channels x kernel
    positions (`kernel` of them per channel), an embedding's counts its rows. With several `groups` the matrix is
    block-diagonal: each group of outputs reads its own share of the channels.
    """

    keeps: tuple[str, str]
    only_weight: bool
    parts: tuple[str, ...]
    in_features: int
    out_features: int
    kernel: int
    groups: int
    turned: bool

    @property
    def dense(self) -> bool: ...
    @property
    def weight(self) -> Tensor: ...  # (out, in), dense
    @property
    def bias(self) -> Tensor | None: ...  # (out,)
    @property
    def kind(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...  # of the values, whatever they are packed in
    def __call__(self, x: Any) -> Tensor: ...  # the layer's own fast way
    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...  # with another (any, in) matrix
    def matrix(self, stored: Tensor) -> Tensor: ...  # a weight in the layer's own layout -> (out, in)
    def store(self, weight: Tensor) -> Tensor: ...  # and back
    def hold(self, weight: Tensor) -> nn.Parameter: ...  # (out, in) -> the parameter in which the layer would keep it
    def down_shape(self, rank: int) -> tuple[int, ...]: ...  # in which files keep a factor that reads the input
    def up_shape(self, rank: int) -> tuple[int, ...]: ...  # in which files keep a factor that writes the output
    def mix(self, h: Tensor, matrix: Tensor) -> Tensor: ...  # matrix (out, h) over the feature axis of an output
    def scale(self, y: Tensor, vector: Tensor) -> Tensor: ...  # vector (out,) times the features of an output


class Stored(nn.Module):
    """A module whose tensors an adapter's file holds, with PEFT's names and shapes.

    Frozen tensors that config and base weight give again (drawn from a seed, a decomposition) are buffers that
    `derived_tensors` names. Files leave them out and hold a checksum, with which loading compares what is derived here.
    A file that has them is believed, and has them again when it is saved.

    Attributes:
        keeps_derived: They are saved: an option asks for it, or they came from a file.
    """

    keeps_derived: bool = False

    def derived_tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, which are filled in place where a file has them."""
        return {}

    def kept_tensors(self) -> dict[str, Tensor]:
        """Those of them that files hold; perhaps some always, where rounding would decide what is derived."""
        return self.derived_tensors() if self.keeps_derived else {}

    def checked_tensors(self) -> dict[str, Tensor]:
        """What checksums are taken of: the derived tensors that a file leaves out, or what counts of them."""
        kept = self.kept_tensors()
        return {name: tensor for name, tensor in self.derived_tensors().items() if name not in kept}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file before they are checked: in our shapes, where another program writes others too."""
        return tensors

    @property
    def reads_plainly(self) -> bool:
        """Whether `from_file` changes nothing."""
        return type(self).from_file is Stored.from_file

    def file_tensors(self) -> dict[str, Tensor]:
        return {**_parameters(self), **self.kept_tensors()}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Fill the tensors; names and shapes have been checked against `file_tensors`."""
        for name, tensor in self.file_tensors().items():
            tensor.data.copy_(tensors[name])


def _parameters(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """`dict(module.named_parameters())`, in a fraction of its time for a few small modules."""
    found: dict[str, Tensor] = {prefix + name: p for name, p in module._parameters.items() if p is not None}
    for name, child in module._modules.items():
        if child is not None:
            found |= _parameters(child, f"{prefix}{name}.")
    return found


class Adapter(Stored):
    """A trainable change to a linear map. A method is complete once `adapt` is written.

    A change that no weight can hold (`mergeable`) is complete once `forward` is written, which is its definition then.

    Class attributes declare what the laws need to know; where an option decides, an instance has its own:
        base_kinds: Kinds of layers its maths allows (`LinearMap.kind`).
        identity_at_birth: True, or the reason why a fresh adapter changes the output.
        replaces: Its W' does not depend on W, so that adapters before it on a layer have no effect.
        mergeable: True, or the reason why no weight can hold the change, so that `adapt` is not defined.
        deterministic: True, or the reason why equal calls in evaluation mode give different outputs.
        learns_in_eval: True, or the reason why gradients reach some parameters in training mode alone.
        lossless: True, or the reason why a file holds less than what trains.
        bounded_r: Whether a config's `r` is a rank or width, so that one above both sides of a layer is refused.
        pointwise: True, or the reason why what it does at a token depends on others of the row.
        reads: What it has to know about a call; `forward` is handed each by name.
        stacks: Names of attributes in which adapters have to agree to act together on rows of a batch, each on its own
            (`deltatune.mixed`): then `forward` is called, on a linear layer, with tensors that have one more axis, of
            rows, before theirs (`rows` is 1), and x (rows, tokens, in). None: one after the other. Not inherited.
        row_numbers: Attributes that are numbers and may differ between such adapters; (rows, 1, 1) where they do.
        views: Attributes that programs read per adapter on a layer, as in `layer.lora_A["default"]`.
        configured_scaling: The factor of the update that the config asks for, where programs may change it.
        shared: What `Method.shared` has built for all layers together. The model holds it, an adapter refers to it: it
            is none of the adapter's own modules.
    """

    base_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "conv"})
    identity_at_birth: bool | str = True
    replaces: ClassVar[bool] = False
    mergeable: bool | str = True
    deterministic: bool | str = True
    learns_in_eval: bool | str = True
    lossless: bool | str = True
    bounded_r: ClassVar[bool] = True
    pointwise: bool | str = True
    reads: tuple[Value, ...] = ()
    stacks: tuple[str, ...] | None = None
    row_numbers: ClassVar[tuple[str, ...]] = ()
    rows: int = 0
    views: ClassVar[tuple[str, ...]] = ()
    configured_scaling: float | None = None
    shared: Any = None

    @classmethod
    def fits(cls, layer: LinearMap) -> bool | str:
        """True, or why the method's maths does not allow the layer."""
        allowed = ", ".join(sorted(cls.base_kinds))
        return layer.kind in cls.base_kinds or f"its maths allows {allowed} layers, and this is a {layer.kind} layer"

    @classmethod
    def build(cls, layer: LinearMap, config: Any, path: str) -> Adapter:
        """A fresh adapter for the layer at `path`, its parameters on the CPU in float32.

        A method with `Method.shared` takes that module as a fourth argument.
        """
        raise NotImplementedError

    @classmethod
    def plan(cls, layers: dict[str, LinearMap], config: Any) -> Any:
        """The options for `build`, given all layers by their paths: others than the config's where a layer's depend on
        the rest."""
        return config

    @property
    def ties(self) -> bool:
        """Whether `tied` may have an answer other than None."""
        return type(self).tied is not Adapter.tied

    def tied(self, layer: LinearMap, config: Any = None) -> Adapter | None:
        """The same change for a layer that shares the weight of the one this was built for; None where it has none.

        Args:
            config: What targets that layer too, if anything does.
        """
        return None

    def adapt(self, weight: Tensor) -> Tensor:
        """W -> W', both (out, in).

        Raises:
            MergeError: No weight can hold the change.
        """
        if self.mergeable is not True:
            raise MergeError(
                f"no weight can hold {type(self).__name__}, because {self.mergeable}; "
                "call the layer instead of reading its weight, and leave the adapter unmerged",
                found=type(self).__name__,
            )
        raise NotImplementedError

    def low_rank(self, layer: LinearMap) -> tuple[Tensor, Tensor] | None:
        """Up (out, R) and down (R, in) with W' - W = up @ down; None where R would not be small, or there are none."""
        return None

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias

    def adapted_bias(self, layer: LinearMap) -> Tensor | None:
        """The bias under this adapter; methods in which it depends on the weight override this one."""
        return self.adapt_bias(layer.bias)

    def forward(self, x: Any, layer: LinearMap, **values: Any) -> Tensor:
        return layer.apply(x, self.adapt(layer.weight), self.adapted_bias(layer))

    def prepared(self, layer: LinearMap) -> Callable[[Tensor], Tensor | None] | None:
        """`forward` on this layer for calls without gradients, with as little around its products as there can be.

        It is kept from call to call, gives None in a call that it does not fit, and is asked for where the layer has a
        plain weight and no other adapter acts. None: there is none.
        """
        return None

    # How another adapter of the method takes its place (`deltatune.hotswap`).

    def make_room(self, rank: int | None = None) -> None:
        """Before compiling: hold what others may have otherwise in tensors, and factors in the shape of this rank."""

    def fit(self, other: Adapter) -> None:
        """Take the shapes of another adapter, as far as it has room, to be put in its place."""

    def neutral(self) -> bool:
        """Fresh as it is, make it change nothing; False if it does not know how."""
        return self.identity_at_birth is True

    def penalty(self) -> Tensor | None:
        """A term of the loss of a training step; the model sums those of all layers of its active adapters."""
        return None

    @property
    def core(self) -> Adapter:
        """The method's own adapter, where this one is more than that."""
        return self

    @classmethod
    def penalises(cls, config: Any) -> bool:
        """Whether adapters of a config have such a term; where none has, no training step looks for one."""
        return cls.penalty is not Adapter.penalty

    def joins(self, beside: nn.ModuleDict) -> None:
        """It is put on a layer, together with the adapters in `beside`, by name, itself among them."""

    @property
    def settles(self) -> bool:
        """Whether `settle` does anything."""
        return type(self).settle is not Adapter.settle

    def settle(self, layer: LinearMap) -> None:
        """A file has been read, by this adapter and by what it shares: work out again what depends on both and W."""

    def live_tensors(self) -> dict[str, tuple[nn.Module, str]]:
        """Tensors that programs know by one name on the layer, as in `layer.hada_w1_a["default"]`: who holds each."""
        own = {**self._parameters, **self._buffers}
        hidden = self._non_persistent_buffers_set
        return {name: (self, name) for name, tensor in own.items() if tensor is not None and name not in hidden}

    def live_parts(self) -> dict[str, nn.Module]:
        """Modules that programs know by one name on the layer, as in `layer.lora_A["default"]`."""
        return {name: module for name, module in self._modules.items() if module is not None}

    def everything(self) -> Iterator[nn.Parameter]:
        """What this adapter computes with: its own parameters and the shared ones."""
        yield from self.parameters()
        if self.shared is not None:
            yield from self.shared.parameters()


class Applied:
    """An adapter applied to a map; `read` answers what it has to know about the call, by name."""

    dense = False

    def __init__(self, adapter: Adapter, inner: LinearMap, read: Callable[[str], Any] = lambda name: None) -> None:
        self.adapter, self.inner, self.read = adapter, inner, read
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.kernel, self.groups, self.turned = inner.kernel, inner.groups, inner.turned
        self.keeps, self.only_weight, self.parts = inner.keeps, inner.only_weight, inner.parts

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def weight(self) -> Tensor:
        return self.adapter.adapt(self.inner.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.adapted_bias(self.inner)

    def __call__(self, x: Any) -> Any:
        if self.only_weight:
            return self.inner.apply(x, self.weight, self.bias)
        if not self.adapter.reads:
            return self.adapter(x, self.inner)
        return self.adapter(x, self.inner, **{value.name: self.read(value.name) for value in self.adapter.reads})

    def apply(self, x: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.inner.apply(x, weight, bias)

    def matrix(self, stored: Tensor) -> Tensor:
        return self.inner.matrix(stored)

    def store(self, weight: Tensor) -> Tensor:
        return self.inner.store(weight)

    def hold(self, weight: Tensor) -> nn.Parameter:
        return self.inner.hold(weight)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return self.inner.down_shape(rank)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return self.inner.up_shape(rank)

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        return self.inner.mix(h, matrix)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return self.inner.scale(y, vector)


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry.

    Attributes:
        adapter: What is grafted onto a layer; None where a method acts elsewhere (prefix tuning at the attention).
        shared: Builds what the adapters of all layers share, once per adapter name: layers by path, config -> a module,
            whose tensors are the top-level ones of the file.
        graft: What connects such a method with the model (`deltatune.prompts.graft`).
        encoder: What such a method trains, built from its config.
        key_prefix: How the names of its tensors begin, for programs that filter parameters by it.
        default_targets: Model type -> layers it adapts when the user names none; or a function of the config there.
        find_targets: Model -> those layers, for types that `default_targets` does not know.
        learning_rate: What `deltatune train` uses when the user names none; perhaps a function of the options.
        train_options: Options that `deltatune train` sets where the user does not: those given -> those to add.
        run_options: Likewise, with the number of optimizer steps: (those given, steps) -> those to add.
        entered: Model type -> layers that programs have entered as its defaults, before ours.
        for_peers: Rewrites what goes into a file where other programs would read something else out of it: (config, its
            values, tensors, keys that have to be kept, whether any program is to read it) -> (values, tensors, values
            of the config that only we read).
        weighted_sum: Adapters of this method as one of it: by layer, terms (weight, adapter or None where it has none
            there) -> options, of which "part" is (field, paths that it names), and by layer the tensors of its file.
        pairs: The x of tensors x_A (r, ...) and x_B that come in pairs of the config's rank; empty where none do.
        schedule: What happens after every optimizer step: makes a `deltatune.schedule.Schedule` from the adapter's
            name, the configs by name and the adapters by path, or None where the options ask for none.
    """

    peft_type: PeftType | str
    config: type[PeftConfig]
    adapter: type[Adapter] | None
    key_prefix: str
    default_targets: Callable[[str], Any] | None = None
    find_targets: Callable[[nn.Module], Any] | None = None
    shared: Callable[[dict[str, LinearMap], Any], Stored] | None = None
    graft: type[Any] | None = None
    encoder: type[nn.Module] | None = None
    learning_rate: float | Callable[[dict[str, Any]], float] = 1e-3
    train_options: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda given: {})
    run_options: Callable[[dict[str, Any], int], dict[str, Any]] = field(default=lambda given, steps: {})
    schedule: Callable[[str, dict[str, Any], dict[str, Any]], Any] | None = None
    for_peers: Callable[..., tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]] | None = None
    weighted_sum: Callable[[dict[str, list[tuple[float, Any]]]], tuple[dict[str, Any], dict[str, Any]]] | None = None
    pairs: str = ""
    entered: dict[str, Any] = field(default_factory=dict)

    def build(self, layers: dict[str, LinearMap], config: Any) -> tuple[dict[str, Adapter], Stored | None]:
        """Fresh adapters for layers by path, and what they share."""
        assert self.adapter is not None
        config = self.adapter.plan(layers, config)
        if self.shared is None:
            return {path: self.adapter.build(layer, config, path) for path, layer in layers.items()}, None
        shared, build = self.shared(layers, config), cast(Any, self.adapter).build
        made: dict[str, Adapter] = {path: build(layer, config, path, shared) for path, layer in layers.items()}
        for adapter in made.values():
            vars(adapter)["shared"] = shared  # past nn.Module, which would make it a part of every layer
        return made, shared

    def usual_targets(self, model_type: str, config: Any = None) -> Any:
        """The layers that it adapts in an architecture when the user names none; None where they are not known."""
        if model_type in self.entered:
            return self.entered[model_type]
        found = None if self.default_targets is None else self.default_targets(model_type)
        return found(self.config() if config is None else config) if callable(found) else found

    @property
    def name(self) -> str:
        """The method as settings and the command line write it."""
        return str(getattr(self.peft_type, "value", self.peft_type)).lower()
