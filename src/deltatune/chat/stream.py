"""An answer piece by piece, while the model is still writing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor


def stream(
    tokenizer: Any, generate: Callable[..., Any], inputs: dict[str, Tensor], acting: AbstractContextManager[Any]
) -> Iterator[str]:
    """What `generate(**inputs)` writes, without the prompt and special tokens.

    The model runs in a thread of its own, which is over when this is: where the reader stops early (Ctrl-C, `close`),
    writing stops at the next token.

    Args:
        acting: Chooses the adapter. It is entered in that thread, because such a choice holds for its own thread.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = Event(), list[BaseException]()

    def stopped(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.full((ids.shape[0],), stop.is_set(), dtype=torch.bool, device=ids.device)

    def write() -> None:
        try:
            with acting, torch.no_grad():
                generate(**inputs, streamer=pieces, stopping_criteria=StoppingCriteriaList([stopped]))
        except BaseException as error:  # told to whoever reads
            failed.append(error)
        finally:
            pieces.end()

    thread = Thread(target=write, daemon=True)
    thread.start()
    try:
        for piece in pieces:
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
