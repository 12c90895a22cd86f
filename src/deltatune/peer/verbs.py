"""Verbs of PEFT's `PeftModel` that nothing in deltatune needs, over what is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.errors import StateError
from deltatune.notice import warn


class PeerVerbs:
    """The part of a `PeftModel` that only programs written for PEFT call."""

    @property
    def base_model_torch_dtype(self: Any) -> torch.dtype | None:
        return getattr(self.base_model.model, "dtype", None)

    @property
    def word_embeddings(self: Any) -> Any:
        """Of the base, where an adapter acts on its input or attention."""
        if not self.prompts:
            raise AttributeError("word_embeddings: no adapter of a prompt method is there")
        return self.base_model.model.get_input_embeddings()

    @property
    def prompt_tokens(self: Any) -> dict[str, Tensor]:
        """The numbers of the virtual tokens, by adapter."""
        if not self.prompts:
            raise AttributeError("prompt_tokens: no adapter of a prompt method is there")
        counts = {
            name: self.peft_config[name]
            for name in self.prompts
            if hasattr(self.peft_config[name], "num_virtual_tokens")
        }
        return {n: torch.arange(c.num_virtual_tokens * (c.num_transformer_submodules or 1)) for n, c in counts.items()}

    def get_prompt(self: Any, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """What the active prompt adapter puts before the tokens.

        Returns:
            Rows (B, P, width) of a method that acts on the input; a cache of B rows of one that acts on the attention.

        Args:
            task_ids: The task of each row, where the method has tasks.
            max_cache_len: Accepted; a cache grows as it is used.
        """
        from deltatune.prompts.serve import to_cache

        name = self._prompt_name(None)
        if name in self.prefixes:
            return to_cache(self, name, batch_size)
        encoder = self.prompt_encoder[name]
        rows = encoder(task_ids=task_ids) if getattr(encoder, "takes_tasks", False) else encoder()
        return rows if rows.ndim == 3 else rows.expand(batch_size, *rows.shape)

    def get_prompt_embedding_to_save(self: Any, adapter_name: str) -> Tensor:
        """The tensor `prompt_embeddings` of a prompt adapter's file."""
        return self.prompts[self._prompt_name(adapter_name)].file_tensors("peft")["prompt_embeddings"]

    def _prompt_name(self: Any, name: str | None) -> str:
        names = [name] if name is not None else self.active_adapters
        found = next((key for key in names if key in self.prompts), None)
        if found is None:
            raise StateError(f"{names} is no adapter of a prompt method; there are {list(self.prompts)}", found=names)
        return found

    def prepare_model_for_gradient_checkpointing(self: Any, model: Any) -> None:
        """Let gradients reach the inputs of the model, as reentrant checkpointing needs it; ours does without."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            warn(
                f"prepare_model_for_gradient_checkpointing: {type(model).__name__} cannot be told to, and is left alone"
            )
