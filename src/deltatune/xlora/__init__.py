"""X-LoRA: a mixture of trained LoRA adapters, weighted by token and layer."""
