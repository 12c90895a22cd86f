"""Every method there is: one import and one entry each."""

from __future__ import annotations

from deltatune.adapter import Method
from deltatune.config import PeftType
from deltatune.methods import hra, ia3, lora, oft
from deltatune.prompts import adaption_prompt, cartridge, cpt, multitask, p_tuning, prefix, prompt_tuning

METHODS: dict[PeftType, Method] = {
    method.peft_type: method
    for method in (
        lora.METHOD,
        ia3.METHOD,
        oft.METHOD,
        hra.METHOD,
        prefix.METHOD,
        cartridge.METHOD,
        adaption_prompt.METHOD,
        prompt_tuning.METHOD,
        p_tuning.METHOD,
        multitask.METHOD,
        cpt.METHOD,
    )
}
