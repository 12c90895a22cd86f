"""Which options of LoRA go with `target_parameters`: a parameter of experts has no input or output of its own."""

from __future__ import annotations

from typing import Any

from deltatune.errors import ConfigError

# What acts on a layer's input or output, of which there is none here, or is defined for one matrix.
WITHOUT: dict[str, Any] = {
    "lora_dropout": 0.0,
    "lora_bias": False,
    "use_dora": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "velora_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
STARTS = (True, False, None, "gaussian")  # the others decompose one matrix, or what one layer reads


def check(config: Any, path: str | None = None) -> None:
    """
    Args:
        path: Of a parameter that is adapted; None: those that the config names, if it does.

    Raises:
        ConfigError: An option asks for what no parameter of a module has.
    """
    if path is None and not config.target_parameters:
        return
    which = path or ", ".join(sorted(config.target_parameters))
    for name, inert in WITHOUT.items():
        if getattr(config, name) != inert:
            raise ConfigError(
                f"LoraConfig: {name}={getattr(config, name)!r} is not possible with target_parameters: {which} is a "
                f"parameter, whose module alone sees inputs and outputs; leave it at {inert!r}",
                field=name,
                path=path,
                found=getattr(config, name),
                expected=inert,
            )
    if config.init_lora_weights not in STARTS:
        raise ConfigError(
            f"LoraConfig: init_lora_weights={config.init_lora_weights!r} is not possible with target_parameters "
            f"({which}): it begins with the matrix or the input of one layer; use one of {STARTS[:2] + STARTS[3:]}",
            field="init_lora_weights",
            path=path,
            found=config.init_lora_weights,
            expected=STARTS,
        )
