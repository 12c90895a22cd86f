"""What a user sets: the two enums, and `PeftConfig`, the base of every method's config, to JSON and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import typing
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltatune import checks
from deltatune.errors import ConfigError, FormatError, LimitError
from deltatune.notice import warn
from deltatune.suggest import did_you_mean

CONFIG_NAME = "adapter_config.json"
PEER_VERSION = "0.21.2"  # the release of PEFT whose files and names we speak
A_CONFIG = "a config such as LoraConfig() (get_peft_config makes one of a dict)"
MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 32


class TaskType(str, Enum):
    """What the model is trained for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """Names of methods, PEFT's and at the end our own; `deltatune.registry.METHODS` says which are built."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FOURIERFT = "FOURIERFT"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    CPT = "CPT"
    BONE = "BONE"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    PVERA = "PVERA"
    ADAMSS = "ADAMSS"
    LILY = "LILY"
    PSOFT = "PSOFT"
    TINYLORA = "TINYLORA"
    PEANUT = "PEANUT"
    UNILORA = "UNILORA"
    BEFT = "BEFT"
    DEFT = "DEFT"
    FROD = "FROD"
    GLORA = "GLORA"
    HIRA = "HIRA"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    BITFIT = "BITFIT"  # this one and what follows is not PEFT's
    DIFF_PRUNING = "DIFF_PRUNING"
    BOTTLENECK = "BOTTLENECK"
    COMPACTER = "COMPACTER"
    REFT = "REFT"


if TYPE_CHECKING:
    from dataclasses import dataclass as config
else:

    def config(cls: type) -> type:
        """Class decorator of every config: a dataclass that answers unknown and retired arguments in words."""
        cls = dataclasses.dataclass(cls)
        build = cls.__init__

        @functools.wraps(build)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            build(self, *args, **_without_retired(cls, kwargs))

        cls.__init__ = init
        return cls


def _without_retired(cls: type[PeftConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Drop keys of older versions that ask for nothing; raise for every other unknown key."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [key for key in values if key not in known]
    inert = [key for key in unknown if key in cls.retired and values[key] in cls.retired[key]]
    for key in inert:
        warn(f"{cls.__name__}: {key}={values[key]!r} is a retired option without effect")
    wrong = [key for key in unknown if key not in inert]
    if wrong:
        key = wrong[0]
        raise ConfigError(
            f"{cls.__name__}: unexpected keyword argument {key!r}{did_you_mean(key, known)}",
            field=key,
            found=values[key],
            expected=sorted(known),
        )
    return {key: value for key, value in values.items() if key in known}


@config
class PeftConfig:
    """Base of all configs; fields and meaning are PEFT's.

    Unknown fields of a file that another version wrote are kept in `unknown_fields`, and saved again.
    """

    retired: ClassVar[dict[str, tuple[Any, ...]]] = {}
    unsaved: ClassVar[frozenset[str]] = frozenset()
    file_defaults: ClassVar[dict[str, Any]] = {}  # what a file means that does not say
    alike_in_swap: ClassVar[tuple[str, ...]] = ()  # fields in which an adapter and its successor have to agree
    rank_name: ClassVar[str] = "r"  # the field that no layer may be smaller than

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self.unknown_fields: dict[str, Any] = {}
        if self.peft_version is None:
            self.peft_version = PEER_VERSION
        self.task_type = _member(TaskType, "task_type", self.task_type)
        self.peft_type = _method_name(self.peft_type)
        self.validate()

    def validate(self) -> None:
        """Check every field; called at construction and again when the config is used, because it is mutable."""
        for name, annotation in _annotations(type(self)).items():
            value = getattr(self, name)
            if not checks.fits(value, annotation):
                checks.refuse(type(self).__name__, name, value, checks.describe(annotation))
            checks.representable(type(self).__name__, name, value)

    def copy(self) -> Any:
        """A config of its own, with lists and tables of its own; what else is in it (modules, tensors) is shared."""
        made = copy.copy(self)
        vars(made).update({k: copy.copy(v) for k, v in vars(self).items() if isinstance(v, (list, set, dict))})
        return made

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    # ------------------------------------------------------------------------------------------------ JSON both ways

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_file_dict(self) -> dict[str, Any]:
        """What `adapter_config.json` holds: plain values, sets sorted, and `inference_mode` true as PEFT writes it."""
        values = {**self.unknown_fields, **self.to_dict(), "inference_mode": True}
        return {key: _plain(value) for key, value in values.items() if key not in self.unsaved}

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `adapter_config.json`; `auto_mapping_dict` replaces the config's own `auto_mapping` in it."""
        from deltatune.storage.files import write_files

        mapping = kwargs.get("auto_mapping_dict")
        values = {**self.to_file_dict(), "inference_mode": self.inference_mode}  # of a config alone, as PEFT
        values |= {} if mapping is None else {"auto_mapping": mapping}
        text = json.dumps(values, indent=2, sort_keys=True)
        write_files(Path(save_directory), {CONFIG_NAME: text.encode()})

    def push_to_hub(self, repo_id: str, *, commit_message: str | None = None, **hub: Any) -> Any:
        """Put `adapter_config.json` alone into a repository of the hub, as one commit; see `PeftModel.push_to_hub`."""
        from deltatune.storage.hub import push

        return push(self.save_pretrained, repo_id, commit_message=commit_message or "Upload adapter_config.json", **hub)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read `adapter_config.json` of a local folder, or of a repository of the hub (`revision`, `token`, ...).

        Other keyword arguments, as PEFT's for the model, are passed over.

        Raises:
            FormatError: There is none, or the hub cannot be reached.
        """
        from deltatune.storage.locate import locate

        file = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **kwargs)
        found = cls.from_file_dict(cls.from_json_file(file), str(file))
        found.located(Path(file).parent)
        return found

    def located(self, folder: Path) -> None:
        """The folder that the config was read from; for paths in it."""

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        return read_json(Path(path_json_file))

    @classmethod
    def from_file_dict(cls, values: dict[str, Any], source: str = CONFIG_NAME) -> PeftConfig:
        """A config from the content of a file; unknown keys are kept with a warning instead of refused."""
        target = config_class(values["peft_type"], source) if values.get("peft_type") else cls
        known = {field.name for field in dataclasses.fields(target)} | set(target.retired)
        unknown = {key: value for key, value in values.items() if key not in known and key not in target.unsaved}
        if unknown:
            warn(f"{source}: {target.__name__} does not know {sorted(unknown)}; kept and saved again, without effect")
        given = {key: value for key, value in values.items() if key in known}
        try:
            result = target(**{**target.file_defaults, **given})
        except ConfigError as error:
            error.in_file(source)
            raise
        result.unknown_fields = unknown
        return result

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        target = config_class(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        return target(**kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        return kwargs


def config_class(peft_type: str | PeftType, source: str = "config") -> type[PeftConfig]:
    """The config class of a method's name."""
    from deltatune.registry import METHODS

    member = _method_name(peft_type, source)
    if member not in METHODS:
        built = sorted(method.name.upper() for method in METHODS.values())
        raise ConfigError(
            f"{source}: method {member.name} is not available in this version, which has {', '.join(built)}",
            field="peft_type",
            found=member.name,
            expected=built,
        )
    return METHODS[member].config


def _method_name(value: Any, source: str = "config") -> Any:
    """A member of `PeftType`, or the name under which another package has registered its method."""
    from deltatune.registry import METHODS

    registered = METHODS.get(value) if isinstance(value, str) else None
    return _member(PeftType, "peft_type", value, source) if registered is None else registered.peft_type


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """Build the config of the method named by `config_dict["peft_type"]`."""
    if not config_dict.get("peft_type"):
        raise ConfigError(
            "get_peft_config: the dict needs 'peft_type', for example {'peft_type': 'LORA', 'r': 8}", field="peft_type"
        )
    return PeftConfig.from_peft_type(**config_dict)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file: bounded in size, without duplicate keys or NaN, errors by file, line and column."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise LimitError(
                f"{path}: {size} bytes, configs of up to {MAX_JSON_BYTES} bytes are read", path=str(path), found=size
            )
        text = path.read_bytes().decode("utf-8")
        if (depth := nesting(text)) > MAX_JSON_DEPTH:
            raise LimitError(
                f"{path}: nested {depth} deep, up to {MAX_JSON_DEPTH} is read",
                path=str(path),
                found=depth,
                expected=MAX_JSON_DEPTH,
            )
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except LimitError:
        raise
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}", path=str(path)
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}", path=str(path)) from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: holds a {type(values).__name__}, expected an object", path=str(path))
    return values


def nesting(text: str) -> int:
    """How deep the brackets of a JSON text are nested, without those in strings."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"key {next(key for key in counts if counts[key] > 1)!r} stands twice")
    return values


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


def _member(enum: type[Enum], field: str, value: Any, source: str = "config") -> Any:
    if value is None or isinstance(value, enum):
        return value
    names = [member.value for member in enum]
    if value not in names:
        raise ConfigError(
            f"{source}: {field}={checks.shown(value)} is not known{did_you_mean(str(value).upper(), names)}",
            field=field,
            found=value,
            expected=names,
        )
    return enum(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value) if len({type(part) for part in value}) < 2 else sorted(value, key=str)
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


@functools.cache
def _annotations(cls: type[PeftConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
