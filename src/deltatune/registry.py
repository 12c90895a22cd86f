"""Every method there is: one import and one entry each, and `register_method` for methods of other packages."""

from __future__ import annotations

from deltatune.adapter import Method
from deltatune.config import PeftType
from deltatune.errors import ConfigError
from deltatune.methods.adalora import METHOD as ADALORA
from deltatune.methods.adamss import METHOD as ADAMSS
from deltatune.methods.beft import METHOD as BEFT
from deltatune.methods.bitfit import METHOD as BITFIT
from deltatune.methods.boft import METHOD as BOFT
from deltatune.methods.c3a import METHOD as C3A
from deltatune.methods.deft import METHOD as DEFT
from deltatune.methods.delora import METHOD as DELORA
from deltatune.methods.diff_pruning import METHOD as DIFF_PRUNING
from deltatune.methods.fourierft import METHOD as FOURIERFT
from deltatune.methods.frod import METHOD as FROD
from deltatune.methods.glora import METHOD as GLORA
from deltatune.methods.gralora import METHOD as GRALORA
from deltatune.methods.hira import METHOD as HIRA
from deltatune.methods.hra import METHOD as HRA
from deltatune.methods.ia3 import METHOD as IA3
from deltatune.methods.ln_tuning import METHOD as LN_TUNING
from deltatune.methods.loha import METHOD as LOHA
from deltatune.methods.lokr import METHOD as LOKR
from deltatune.methods.lora import METHOD as LORA
from deltatune.methods.miss import METHOD as MISS
from deltatune.methods.oft import METHOD as OFT
from deltatune.methods.osf import METHOD as OSF
from deltatune.methods.peanut import METHOD as PEANUT
from deltatune.methods.psoft import METHOD as PSOFT
from deltatune.methods.pvera import METHOD as PVERA
from deltatune.methods.randlora import METHOD as RANDLORA
from deltatune.methods.road import METHOD as ROAD
from deltatune.methods.shira import METHOD as SHIRA
from deltatune.methods.supertuning import METHOD as SUPERTUNING
from deltatune.methods.tinylora import METHOD as TINYLORA
from deltatune.methods.trainable_tokens import METHOD as TRAINABLE_TOKENS
from deltatune.methods.unilora import METHOD as UNILORA
from deltatune.methods.vblora import METHOD as VBLORA
from deltatune.methods.vera import METHOD as VERA
from deltatune.methods.waveft import METHOD as WAVEFT
from deltatune.outputs.bottleneck import METHOD as BOTTLENECK
from deltatune.outputs.compacter import METHOD as COMPACTER
from deltatune.outputs.lily import METHOD as LILY
from deltatune.outputs.poly import METHOD as POLY
from deltatune.outputs.reft import METHOD as REFT
from deltatune.prompts.adaption_prompt import METHOD as ADAPTION_PROMPT
from deltatune.prompts.cartridge import METHOD as CARTRIDGE
from deltatune.prompts.cpt import METHOD as CPT
from deltatune.prompts.multitask import METHOD as MULTITASK_PROMPT_TUNING
from deltatune.prompts.p_tuning import METHOD as P_TUNING
from deltatune.prompts.prefix import METHOD as PREFIX_TUNING
from deltatune.prompts.prompt_tuning import METHOD as PROMPT_TUNING
from deltatune.shadow.graft import METHOD as SHADOW
from deltatune.xlora.graft import METHOD as XLORA

METHODS: dict[PeftType | str, Method] = {
    method.peft_type: method
    for method in (
        # low-rank and other products added to the weight
        *(LORA, ADALORA, LOHA, LOKR, HIRA, GRALORA, MISS, DELORA, GLORA),
        # with tensors that layers share
        *(VERA, PVERA, RANDLORA, VBLORA, UNILORA, TINYLORA, FROD),
        # spectra, functions of the weight
        *(C3A, FOURIERFT, WAVEFT, PEANUT),
        # entries and subspaces of the weight
        *(SHIRA, SUPERTUNING, DIFF_PRUNING, ADAMSS, OSF, PSOFT, DEFT),
        # rotations and scales
        *(OFT, BOFT, HRA, ROAD, IA3),
        # biases, norms, rows
        *(BITFIT, BEFT, LN_TUNING, TRAINABLE_TOKENS),
        # outputs of layers and blocks
        *(BOTTLENECK, COMPACTER, REFT, POLY, LILY),
        # keys and values, inputs
        *(PREFIX_TUNING, CARTRIDGE, ADAPTION_PROMPT, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, CPT),
        # beside the model
        *(SHADOW, XLORA),
    )
}


def register_method(method: Method) -> Method:
    """Add a method of another package: from now on its configs, files and command line names are known.

    Its `peft_type` is a new upper-case name, which its config sets as its `peft_type` too.

    Raises:
        ConfigError: The name is taken, or is not upper-case.
    """
    name = str(getattr(method.peft_type, "value", method.peft_type))
    if name != name.upper() or not name.isidentifier():
        raise ConfigError(
            f"register_method: peft_type={name!r} has to be an upper-case identifier; use {name.upper()!r}",
            field="peft_type",
            found=name,
        )
    if name in METHODS and METHODS[name] is not method:
        raise ConfigError(
            f"register_method: peft_type={name!r} is a method already; choose another name",
            field="peft_type",
            found=name,
        )
    METHODS[method.peft_type] = method
    return method
