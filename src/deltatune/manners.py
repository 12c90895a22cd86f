"""Where PEFT does otherwise for no better reason, and programs may depend on it: `deltatune.as_peft` asks for that.

`as_peft` is False unless deltatune stands in for PEFT in this process.

- a fresh adapter, and the `PeftModel` around it, are in training mode whatever the mode of the base, so that a loop
  that calls no `model.train()` has the dropout that it has with PEFT;
- `set_peft_model_state_dict` returns as missing whatever of the model it did not fill, the base included;
- `inject_adapter_in_model` leaves adapters that are there training;
- a folder of adapters has a model card of its own, beside those of its subfolders;
- `LoraConfig.to_dict()` leaves out `runtime_config`.
"""

as_peft = False
