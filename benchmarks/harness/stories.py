"""Cells of `decoders`: stories260K (a Llama of 260,032 parameters that writes children's stories) on text and chat."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from deltatune.errors import DataError, IntegrityError
from harness.cells import Spec
from harness.data import HASHES, Row, data_folder, rows, split, spread_over
from harness.meanings import Meaning, group, linearised, score
from harness.progress import Line
from harness.training import facts, in_folder, settings_of, train_cell

SHA256 = "407a7c581bdd66972383ce9ad24857713fb98786d06ea564a2fe9b34ebe77dfd"
EVAL_BATCH = 32  # changes no figure beyond rounding, so it is not part of a cell
NEW_TOKENS = 160
PASSAGE = 300  # characters: most passages stay below 256 tokens of this tokenizer
SHARES = (0.8, 0.9)  # where the dev and the test plays begin


@cache
def stories_folder() -> Path:
    """The model's folder, its weights checked.

    Raises:
        DataError: It is not there.
        IntegrityError: Its weights are not the ones that the figures belong to.
    """
    folder = data_folder() / "weights" / "stories260K"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise DataError(
            f"{weights} does not exist; set DELTATUNE_SHARED to the folder that holds data/weights/stories260K",
            path=str(weights),
        )
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != SHA256:
        raise IntegrityError(
            f"{weights} has sha256 {found[:12]}, expected {SHA256[:12]}; figures of other weights do not compare",
            path=str(weights),
            found=found,
            expected=SHA256,
        )
    return folder


def run_stories(spec: Spec, work: Path, line: Line) -> dict[str, Any]:
    """Train, choose by the loss on dev rows, score on test rows; the untouched base is scored only."""
    chat = spec.task == "chat"
    records = spread_over(group(rows("e2e/test")), spec.budget["test_records"]) if chat else []
    test = conversations(records) if chat else passages("test", spec.budget["test_rows"])
    settings = {
        "model_name_or_path": str(stories_folder()), "task": spec.task, "per_device_eval_batch_size": EVAL_BATCH,
        **({"chat_template": "plain"} if chat else {}), **settings_of(spec),
    }  # fmt: skip
    trains = "method" in spec.hyper
    if trains and chat:
        train, dev = split(rows("e2e/train"), 0, spec.budget["train_rows"])[0], rows("e2e/dev")
        train_rows, dev_rows = told(train), told(spread_over(dev, spec.budget["dev_rows"]))
    elif trains:
        train_rows, dev_rows = (passages(part, spec.budget[f"{part}_rows"]) for part in ("train", "dev"))
    else:  # a fresh adapter is the base: after one step at a rate of nothing it still is
        settings.update(method="lora", max_steps=1, learning_rate=1e-30, per_device_train_batch_size=1)
        train_rows, dev_rows = test[:1], test[:1]

    def train_and_score(place: Path) -> dict[str, Any]:
        result = train_cell(settings, place, line, train_rows, dev_rows, test)
        after = result.metrics["after"]
        made: dict[str, Any] = {"test": dict(after["test"])}
        if trains:
            batch = spec.budget["per_device_train_batch_size"]
            made |= {"dev": after["eval"], **facts(result, len(train_rows), batch)}
        if chat:
            outputs = _answers(spec, result.model, result.tokenizer, records, line)
            made["test"] |= score(outputs, records)
            made["samples"] = [(meaning.record, text) for meaning, text in zip(records, outputs)][:2]
        return made

    return in_folder(work, train_and_score)


def told(chosen: Any) -> list[Row]:
    return [_conversation(row["mr"], row["ref"]) for row in chosen]


def conversations(records: list[Meaning]) -> list[Row]:
    return [_conversation(meaning.record, meaning.references[0]) for meaning in records]


def _conversation(record: str, text: str) -> Row:
    asked, answered = {"role": "user", "content": linearised(record)}, {"role": "assistant", "content": text}
    return {"messages": [asked, answered]}


def passages(part: str, count: int) -> list[Row]:
    """Speeches one after the other, up to `PASSAGE` characters; the parts are plays that follow each other.

    Raises:
        DataError: The text is not there, or another one.
    """
    whole = _passages()
    first, second = (int(len(whole) * share) for share in SHARES)
    chosen = {"train": whole[:first], "dev": whole[first:second], "test": whole[second:]}[part]
    return [{"text": text} for text in spread_over(chosen, count)]


@cache
def _passages() -> tuple[str, ...]:
    path = data_folder() / "text" / "tiny_shakespeare.txt.gz"
    if not path.is_file():
        raise DataError(f"{path} does not exist; set DELTATUNE_SHARED to the folder of data/text", path=str(path))
    raw = gzip.decompress(path.read_bytes())
    if hashlib.sha256(raw).hexdigest() != HASHES["text/tiny_shakespeare"]:
        raise DataError(f"{path} holds another text than the figures were measured on", path=str(path))
    made, current = [], ""
    for speech in raw.decode("utf-8").split("\n\n"):
        if current and len(current) + len(speech) > PASSAGE:
            made.append(current)
            current = ""
        current = f"{current}\n\n{speech}" if current else speech
    return (*made, current)


def _answers(spec: Spec, model: Any, tokenizer: Any, records: list[Meaning], line: Line) -> list[str]:
    from deltatune.data.encode import Encoder
    from deltatune.evaluate import answer

    limit = spec.budget["max_length"]
    encoder = Encoder(tokenizer, "chat", limit, NEW_TOKENS)
    prompts = [encoder.prompt(linearised(meaning.record)) for meaning in records]
    line.on_stage("test records", len(prompts))
    return answer(
        model, tokenizer, prompts, causal=True, max_new_tokens=NEW_TOKENS, batch_size=EVAL_BATCH,
        after_batch=line.on_stage_progress,
    )  # fmt: skip
