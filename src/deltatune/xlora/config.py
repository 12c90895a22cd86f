"""X-LoRA: W' = W + sum_i s_i(token) (alpha_i / r_i) B_i A_i, frozen LoRA experts weighted by a trained classifier.

These are its options; the equations are in `deltatune.xlora.experts` and `deltatune.xlora.classifier`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from deltatune import checks
from deltatune.config import PeftConfig, PeftType, config
from deltatune.notice import warn
from deltatune.xlora import peer


@config
class XLoraConfig(PeftConfig):
    """X-LoRA's options, with PEFT's names and defaults.

    Attributes:
        adapters: Name -> folder (or hub name) of a trained LoRA adapter, the experts. They are numbered in the order of
            their names. PEFT takes the names "0", "1", ... only.
        hidden_size: Width of the base; None: read off the base.
        enable_softmax: Weights of the experts are a softmax over them, divided by `softmax_temperature` before.
        top_k_lora: Only so many experts act on a token, those with the largest weights; None: all.
        enable_softmax_topk: A softmax over those that are left.
        layerwise_scalings: The weights differ from layer to layer.
        xlora_depth: Linear layers of the classifier, of inner width `xlora_size` and with dropout `xlora_dropout_p`.
        use_trainable_adapters: Train the experts too.
        scaling_pass_value: Weight of every expert in the first pass, the one that the classifier reads.
        global_scaling_weight: Factor for what all experts add.
        modules_to_save: Modules trained whole, as copies that are saved beside the classifier.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    modules_to_save: list[str] | None = None

    _owner: ClassVar[str] = "XLoraConfig"

    def __post_init__(self) -> None:
        self.saved: dict[str, str] = {}
        self.pieces: dict[str, Path] = {}
        self.peft_type = PeftType.XLORA
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        for name in ("xlora_depth", "xlora_size"):
            checks.positive_int(self._owner, name, getattr(self, name))
        for name in ("hidden_size", "top_k_lora"):
            if getattr(self, name) is not None:
                checks.positive_int(self._owner, name, getattr(self, name))
        checks.probability(self._owner, "xlora_dropout_p", self.xlora_dropout_p)
        checks.finite_positive(self._owner, "softmax_temperature", self.softmax_temperature)
        folders = self.adapters or {}
        if not folders or not all(isinstance(part, str) and part for item in folders.items() for part in item):
            checks.refuse(
                self._owner, "adapters", self.adapters, "names with folders of LoRA adapters, such as {'0': 'folder'}"
            )
        bad = [name for name in folders if "." in name or "/" in name or name in ("", "default")]
        if bad:
            checks.refuse(self._owner, "adapters", bad[0], "names without dots and slashes, none of them 'default'")
        if self.top_k_lora is not None and self.top_k_lora > len(folders):
            checks.refuse(self._owner, "top_k_lora", self.top_k_lora, f"at most the number of adapters, {len(folders)}")

    def located(self, folder: Path) -> None:
        """The experts that are saved beside the classifier come before those that it was made from.

        What PEFT 0.21.2 puts there is no adapter: it is the base, parts of the experts, and the linear layer of the
        classifier whose number is the expert's name, which the classifier's own file lacks (`deltatune.xlora.peer`).
        """
        found = peer.look(folder, list(self.adapters or {}))
        self.saved, self.pieces = found.experts, found.pieces
        if found.pieces and self.use_trainable_adapters:
            warn(f"{folder}: PEFT saves trained experts in part only; those that they were trained from are used")

    def ordered(self) -> dict[str, str]:
        """The adapters in the order of their names, numbers as numbers: JSON files do not keep another."""
        key = {name: (0, int(name), "") if name.isdecimal() else (1, 0, name) for name in self.adapters or {}}
        return {name: (self.adapters or {})[name] for name in sorted(key, key=key.__getitem__)}
