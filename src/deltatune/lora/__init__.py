"""What LoRA can be besides B A: `deltatune.methods.lora` is the method itself."""
