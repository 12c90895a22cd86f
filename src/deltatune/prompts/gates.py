"""Gated prompts at the attention seam: what LLaMA-Adapter adds to the result of an attention function.

PEFT's numbers differ from the paper's in two ways, which `layout="peft"` repeats by adding after the module instead:

- where one child makes keys and values (GPT-2), the gated part does not pass through the output projection;
- elsewhere it passes through it on its own, so that a bias of that projection counts twice.

Where neither is the case, both layouts are the same numbers, and PEFT reads files of either.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError, TargetError
from deltatune.patterns import modules_by_name
from deltatune.prompts.attention import GATES, install
from deltatune.prompts.graft import Graft
from deltatune.prompts.projections import Projections, find_projections
from deltatune.prompts.sites import Site, choose_sites
from deltatune.prompts.text import ids_of_config
from deltatune.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = "base_model.model."  # as PEFT's files name the base


class _Late(threading.local):
    """Of this thread: id of a running attention module -> what is added after it."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[tuple[Gate, Tensor]]] = {}


_late = _Late()


class Gate:
    """One adapter's prompt at one attention module.

    Attributes:
        layout: "native" or "peft".
        learned: Holds `adaption_prompt` and `adaption_gate`.
        late: Whether PEFT's layout adds after the module, and not before its output projection.
        as_peft: Whether PEFT would compute the same numbers.
    """

    def __init__(self, module: nn.Module, learned: Any, projections: Projections, layout: str) -> None:
        self.learned, self.projections, self.layout = learned, projections, layout
        fused = projections.key.child == projections.value.child
        biased = projections.output is not None and _bias(module, projections.output) is not None
        self.late = layout == "peft" and (fused or biased)
        self.unprojected = self.late and fused
        self.as_peft = layout == "peft" or not (fused or biased)

    def __call__(self, module: nn.Module, query: Tensor, scaling: float | None, rows: Tensor | None) -> Tensor:
        """g softmax(q k(P)^T * scaling) v(P), (B, Q, heads, dim), of a query (B, heads, Q, dim).

        Args:
            rows: Which rows of the batch (B) have this prompt; all where None.
        """
        made, (key_heads, value_heads) = self.projections, self.projections.heads
        prompt, gate = self.learned.adaption_prompt.to(query), self.learned.adaption_gate.to(query)
        if rows is not None:  # wrapped projections then expect a row for each of the batch
            prompt, gate = prompt.repeat(len(rows), 1, 1), gate * rows.to(query)[:, None, None, None]
        key, value = made.key(module, prompt, key_heads), made.value(module, prompt, value_heads)
        key = key.repeat_interleave(query.shape[1] // key_heads, dim=1)
        value = value.repeat_interleave(query.shape[1] // value_heads, dim=1)
        scale = query.shape[3] ** -0.5 if scaling is None or self.layout == "peft" else scaling
        scores = query @ key.transpose(2, 3) * scale
        weights = gate * scores.softmax(dim=-1, dtype=torch.float32).to(query)
        return (weights @ value).transpose(1, 2)


class GateSlot:
    """The gates of one attention module by adapter name. `deltatune.prompts.attention.attend` finds it there."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.gates: dict[str, Gate] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        install()  # also in a process that unpickles a model

    def added(self, module: nn.Module, query: Tensor, result: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an attention function (output, weights) with the gated parts of the active adapters."""
        call = self.selection.current()
        by_row = None if call.rows is None else call.rows_of(query.shape[0])
        for name in dict.fromkeys(call.names if by_row is None else by_row):
            gate = self.gates.get(name) if name is not None else None
            if gate is None:
                continue
            rows = None if by_row is None else torch.tensor([row == name for row in by_row], device=query.device)
            extra = gate(module, query, kwargs.get("scaling"), rows)
            if gate.late:
                _late.waiting.setdefault(id(module), []).append((gate, extra.flatten(2)))
            else:
                result = (result[0] + extra.reshape(result[0].shape), *result[1:])
        return result


def add_late(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """After an attention module: what PEFT adds to its output (None where the module raised)."""
    waiting = _late.waiting.pop(id(module), [])
    if output is None:
        return None
    for gate, extra in waiting:
        if not gate.unprojected and gate.projections.output is not None:
            extra = module.get_submodule(gate.projections.output)(extra)
        output = (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra
    return output


class Gates(Graft):
    """One adapter's gated prompts on one model.

    Attributes:
        encoder: The trainable part, one prompt and gate for each of the `sites`.
        gates: Its gates, in the same order.
    """

    identity_at_birth = True

    encoder: Any

    def __init__(self, name: str, config: Any, encoder: Any, sites: list[Site], model: PreTrainedModel) -> None:
        self.name, self.config, self.encoder, self.sites, self.model = name, config, encoder, sites, model
        self.gates: list[Gate] = []
        self.handles: list[Any] = []

    @classmethod
    def attach(cls, model: nn.Module, config: Any, name: str, selection: Selection, encoder: type[nn.Module]) -> Gates:
        """Find the attention modules and their projections, build the encoder; raises before any change."""
        from transformers import PreTrainedModel

        config.validate()
        length = config.length
        if not isinstance(model, PreTrainedModel):
            raise TargetError(
                f"{type(model).__name__}: adaption prompts need a model of transformers, whose attention they can "
                "reach; use LoRA",
                field="model",
                found=type(model).__name__,
                expected="a model of transformers",
                hint="use LoRA",
            )
        sites = _chosen(model, config)
        own = [site.name for site in sites if site.layout is not None]
        if own:
            raise TargetError(
                f"{type(model).__name__}: {own[0]!r} computes attention in code of its own, outside of transformers' "
                "attention interface, where no gate can be added; use PrefixTuningConfig",
                field="target_modules",
                found=own,
            )
        projections = find_projections(model, sites)
        starts = None
        if config.init_text is not None or config.init_token_ids is not None:
            ids = torch.tensor([ids_of_config(model, config, "adapter_len")], device=model.device)
            starts = [found.inputs[:length] for found in find_projections(model, sites, ids)]
        config.adapter_layers = len(sites)
        built: Any = encoder(config, [found.width for found in projections])  # type: ignore[call-arg]
        if starts is not None:
            built.fill(starts)
        made = cls(name, config, built.to(model.device), sites, model)
        modules = modules_by_name(model)
        install()
        for site, found, learned in zip(sites, projections, built):
            module = modules[site.name]
            gate = Gate(module, learned, found, config.layout)
            made.gates.append(gate)
            vars(module).setdefault(GATES, GateSlot(selection)).gates[name] = gate
            if gate.late:
                made.handles.append(module.register_forward_hook(add_late, always_call=True))
        return made

    def detach(self) -> None:
        modules = modules_by_name(self.model)
        for site in self.sites:
            slot = vars(modules[site.name]).get(GATES)
            if slot is not None:
                slot.gates.pop(self.name, None)
                if not slot.gates:
                    vars(modules[site.name]).pop(GATES)
        for handle in self.handles:
            handle.remove()

    # ----------------------------------------------------------------------------------------------------------- files

    def owns(self, key: str) -> bool:
        return key.rpartition(".")[2].startswith("adaption_")

    def file_tensors(self, format: str | None = None) -> dict[str, Tensor]:
        """PEFT's keys. A gate whose meaning PEFT does not share has no axis, which makes PEFT raise."""
        same = all(gate.as_peft for gate in self.gates)
        self._check(format, same)
        found: dict[str, Tensor] = {}
        for site, learned in zip(self.sites, self.encoder):
            found[f"{ROOT}{site.name}.adaption_prompt"] = learned.adaption_prompt
            gate = learned.adaption_gate
            found[f"{ROOT}{site.name}.adaption_gate"] = gate if same else gate.squeeze()
        return found

    def file_config(self, format: str | None = None) -> dict[str, Any]:
        self._check(format, all(gate.as_peft for gate in self.gates))
        foreign = (format or self.config.layout) == "peft"
        return {"layout": ..., "modules_to_save": self.config.modules_to_save or ...} if foreign else {}

    def load_file_tensors(self, tensors: dict[str, Tensor]) -> None:
        from deltatune.state_dict import check

        shaped = {k: t.reshape(1) if k.endswith("_gate") and t.numel() == 1 else t for k, t in tensors.items()}
        own = {key: tensor.reshape(1) if not tensor.ndim else tensor for key, tensor in self.file_tensors().items()}
        check(shaped, own, f"adapter {self.name!r}")
        with torch.no_grad():
            for site, learned in zip(self.sites, self.encoder):
                for part, parameter in learned.named_parameters():
                    parameter.copy_(shaped[f"{ROOT}{site.name}.{part}"])

    def _check(self, format: str | None, same: bool) -> None:
        if format not in (None, "native", "peft"):
            raise ConfigError(
                f"format={format!r} is not known, expected one of 'native', 'peft'",
                field="format",
                found=format,
                expected=["native", "peft"],
            )
        if format is not None and format != self.config.layout and not (same and _alike(self)):
            raise TargetError(
                f"{type(self.model).__name__}: the prompts {self.name!r} with layout={self.config.layout!r} cannot be "
                f"written with format={format!r}, because PEFT adds them elsewhere in this model; save without format=",
                field="format",
                found=format,
                expected=self.config.layout,
            )


def _alike(gates: Gates) -> bool:
    return not any(gate.late for gate in gates.gates)


def _chosen(model: PreTrainedModel, config: Any) -> list[Site]:
    """The last `adapter_layers` of the attention modules that are meant."""
    sites = choose_sites(model, "default" if config.target_modules is None else "all")
    if config.target_modules is not None:
        ending = f".{config.target_modules}"
        found = [site for site in sites if f".{site.name}".endswith(ending)]
        if not found:
            raise TargetError(
                f"{type(model).__name__}: target_modules={config.target_modules!r} is the ending of none of its "
                f"attentions, which are named like {sites[0].name!r}",
                field="target_modules",
                found=config.target_modules,
                expected=[site.name for site in sites],
            )
        sites = found
    if config.adapter_layers is not None and config.adapter_layers > len(sites):
        raise ConfigError(
            f"{type(config).__name__}: adapter_layers={config.adapter_layers}, but {type(model).__name__} has "
            f"{len(sites)} such attentions",
            field="adapter_layers",
            found=config.adapter_layers,
            expected=len(sites),
        )
    return sites[-config.adapter_layers :] if config.adapter_layers else sites


def _bias(module: nn.Module, child: str) -> Tensor | None:
    return getattr(module.get_submodule(child), "bias", None)
