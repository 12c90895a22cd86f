"""A model that routes every token through trained LoRA adapters: their folders, loaded, and an Arrow router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from deltatune.config import PeftType
from deltatune.errors import ConfigError
from deltatune.inject import adapted_layers
from deltatune.lora.config import LoraConfig
from deltatune.lora.variants import no_sum
from deltatune.lora.variants.arrow import ROUTER, ArrowConfig
from deltatune.model import PeftModel


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load LoRA adapters as `task_0`, `task_1`, ... (general ones as `gks_0`, ...) and activate a router over them.

    Adapters that are added to the model later are experts as well; those that are deleted no longer are.

    Args:
        base_model: The model that all were trained on; its layers are wrapped in place.
        task_specific_adapter_paths: Folders, or repositories of the hub, perhaps with a folder in them.
        arrow_config: Its names of adapters are filled in.
        general_adapter_paths: Adapters of general knowledge, whose mean is subtracted with `use_gks`.
        **adapter_kwargs: For `PeftModel.from_pretrained` and `load_adapter`.

    Raises:
        PeftError: An adapter cannot be an expert, or does not load; the base is as it was.
    """
    tasks, general = list(task_specific_adapter_paths or ()), list(general_adapter_paths or ())
    if not tasks:
        raise ConfigError(
            "create_arrow_model: task_specific_adapter_paths is empty; name the folder of at least one LoRA adapter",
            field="task_specific_adapter_paths",
        )
    if arrow_config.use_gks and not general:
        raise ConfigError(
            "create_arrow_model: use_gks=True subtracts the mean of general adapters, and general_adapter_paths names "
            "none; name some, or set use_gks=False",
            field="general_adapter_paths",
        )
    arrow_config.validate()
    paths = {f"task_{index}": path for index, path in enumerate(tasks)}
    paths |= {f"gks_{index}": path for index, path in enumerate(general)} if arrow_config.use_gks else {}
    model = _loaded(base_model, paths, adapter_kwargs)
    try:
        _check_experts(model, paths, arrow_config)
        arrow_config.task_adapter_names = [name for name in paths if name.startswith("task_")]
        arrow_config.gks_adapter_names = [name for name in paths if name.startswith("gks_")]
        router = LoraConfig(
            arrow_config=arrow_config,
            r=next(iter(model.peft_config.values())).r,  # type: ignore[attr-defined]
            target_modules=sorted({path.rpartition(".")[2] for path, _ in adapted_layers(model.get_base_model())}),
            task_type=model.active_peft_config.task_type,
        )
        model.add_adapter(ROUTER, router)
    except BaseException:
        model.unload()
        raise
    model.set_adapter(ROUTER)
    return model


def _loaded(base: nn.Module, paths: dict[str, str], options: dict[str, Any]) -> PeftModel:
    model: PeftModel | None = None
    try:
        for name, path in paths.items():
            place, folder = _source(path)
            given = {**({"subfolder": folder} if folder is not None else {}), **options}
            if model is None:
                model = PeftModel.from_pretrained(base, place, adapter_name=name, **given)
            else:
                model.load_adapter(place, adapter_name=name, **given)
    except BaseException:
        if model is not None:
            model.unload()
        raise
    assert model is not None
    return model


def _source(path: str) -> tuple[str, str | None]:
    """A local folder as it is; "user/repository/folder/..." of the hub as repository and folder in it."""
    path = str(path)
    parts = path.strip("/").split("/")
    if Path(path).is_dir() or Path(path).is_absolute() or len(parts) < 3:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:])


def _check_experts(model: PeftModel, paths: dict[str, str], options: ArrowConfig) -> None:
    for name, path in paths.items():
        config: Any = model.peft_config[name]
        reason = None if config.peft_type is PeftType.LORA else f"is no LoRA adapter but {config.peft_type}"
        reason = reason or no_sum(config)
        if reason is None and (config.modules_to_save or config.beside()):
            reason = "trains whole modules or tokens too, which cannot be routed"
        if reason is not None:
            raise ConfigError(
                f"create_arrow_model: {path!r} {reason}; use LoRA adapters that add to the output of layers",
                field="task_specific_adapter_paths" if name.startswith("task_") else "general_adapter_paths",
                found=str(path),
            )
    _check_layers(model, paths, options)


def _check_layers(model: PeftModel, paths: dict[str, str], options: ArrowConfig) -> None:
    """Every layer has room for a router, and where means are subtracted, equal ranks."""
    for path, layer in adapted_layers(model.get_base_model()):
        if layer.as_map().kind != "linear":
            raise ConfigError(
                f"create_arrow_model: an adapter is on {path}, a {type(layer.base_layer).__name__}, whose tokens have "
                "no input to be routed by; use adapters of linear layers",
                field="target_modules",
                path=path,
            )
        present: dict[str, Any] = {name: layer.adapters[name] for name in paths if name in layer.adapters}
        here = {name: adapter.r for name, adapter in present.items()}
        if options.use_gks and len(set(here.values())) > 1:
            raise ConfigError(
                f"create_arrow_model: use_gks=True subtracts factors of equal rank, and at {path} they are {here}",
                field="use_gks",
                path=path,
                found=here,
            )
