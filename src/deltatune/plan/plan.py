"""`plan`: the memory and time of a training job before anything of it runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from deltatune.errors import ConfigError
from deltatune.plan import speed as speeds
from deltatune.plan.fit import Choice, choices, reserved
from deltatune.plan.job import Shape, build_job
from deltatune.plan.many import Spread, spread
from deltatune.plan.probe import Probe, probe
from deltatune.plan.speed import Speed
from deltatune.plan.step import Memory, simulate
from deltatune.train.quantised import field_of
from deltatune.train.settings import TrainSettings


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        device: Its name.
        shape: Of the largest batch.
        memory: Bytes of tensors in a step of it.
        resident: Bytes of the process, or on CUDA of the device, with that.
        room: Bytes of the device; None where none is known.
        step_seconds: Of an optimizer step on batches of usual size.
        steps: Of the whole run; None where neither data nor max_steps say it.
        choices: Settings that fit into `room`, best first; empty where what was asked for fits or no room is known.
        spreads: The same on several devices.
    """

    settings: TrainSettings
    device: str
    shape: Shape
    memory: Memory
    resident: int
    room: int | None
    trained_parameters: int
    parameters: int
    flop: float
    step_seconds: float
    steps: int | None
    probe: Probe | None = None
    choices: list[Choice] = field(default_factory=list)
    spreads: list[Spread] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else self.resident <= self.room

    @property
    def seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_seconds


def plan(
    settings: TrainSettings,
    *,
    device: str | None = None,
    device_memory: int | None = None,
    devices: int = 1,
    probing: bool = False,
    speed: Speed | None = None,
) -> Plan:
    """Reckon a job from the config of its base; weights are not loaded.

    Forward, backward and update run once with tensors that have shapes and no numbers, through the code that trains.

    Args:
        device: "cpu" or "cuda" for this machine, or a name such as "a100-80", "h100", "rtx4090", by its data sheet.
        device_memory: Bytes that there are, instead of the device's.
        devices: Above one, also what each of so many would hold and send.
        probing: Load the weights and do a few small steps here, by which the time is corrected.
        speed: Of the device, where it is known better.

    Raises:
        PeftError: Settings, data or model do not allow the run, or the model decides by numbers.
    """
    place, found = _device(device, settings)
    if probing and found is not None:
        raise ConfigError(f"a probe runs on this machine, not on {device}; leave one of them out", field="probe")
    speed = speed or found or speeds.here("cuda" if place.type == "cuda" else "cpu")
    shape, usual, steps, labels = _shapes(settings)
    job = build_job(settings, place, labels)
    notes = [*job.notes, "evaluation is not reckoned"]
    if (field := field_of(settings)) is not None:
        notes.append(f"reckoned with the base as it is stored; {field} makes its linear layers smaller")
    whole = simulate(job, shape)
    average = whole if usual == shape else simulate(job, usual)
    probed = probe(settings, place, shape, speed) if probing else None
    slower = 1.0 if probed is None else probed.slower
    micro, update = speed.seconds(average.micro), speed.seconds(average.update)
    baseline = psutil.Process().memory_info().rss
    beside = reserved(place, baseline)
    room = device_memory or speed.memory
    resident = whole.memory.peak + beside
    fitting: list[Choice] = []
    if room is not None and (resident > room or device_memory is not None):
        fitting = choices(settings, place, room, speed, beside)
    return Plan(
        settings,
        speed.name,
        shape,
        whole.memory,
        resident,
        room,
        whole.trained_parameters,
        whole.parameters,
        average.micro.flop * settings.gradient_accumulation_steps + average.update.flop,
        slower * (micro * settings.gradient_accumulation_steps + update),
        steps,
        probed,
        fitting,
        spread(job, whole.memory, devices, settings.gradient_accumulation_steps) if devices > 1 else [],
        notes,
    )


def _device(name: str | None, settings: TrainSettings) -> tuple[torch.device, Speed | None]:
    """The kind of device, and its speed where a data sheet has it."""
    if name in (None, "auto", "cpu", "cuda"):
        asked = settings.device if name in (None, "auto") else name
        cuda = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise ConfigError(
                "device='cuda' is not on this machine; name the device that is meant, such as a100-80 or rtx4090",
                field="device",
                found="cuda",
            )
        return torch.device("cuda" if cuda else "cpu"), None
    assert name is not None
    return torch.device("cuda"), speeds.named(name)


def _shapes(settings: TrainSettings) -> tuple[Shape, Shape, int | None, int | None]:
    """The largest batch, a usual one, the steps of the run, and how many classes there are."""
    limit = Shape.of(settings)
    if settings.train_file is None and settings.dataset is None:
        return limit, limit, settings.max_steps if settings.max_steps > 0 else None, None
    from deltatune.data.order import Order
    from deltatune.train.base import load_words
    from deltatune.train.corpus import encode_corpus, load_corpus
    from deltatune.train.pace import Pace

    corpus = load_corpus(settings)
    words = load_words(settings)
    corpus = encode_corpus(settings, corpus, words.tokenizer, words.vocabulary, words.positions)
    if settings.packing:
        corpus = corpus.packed()
    rows: list[Any] = corpus.train.features
    size = settings.per_device_train_batch_size
    order = Order(
        [row.length for row in rows], settings.seed, size, settings.gradient_accumulation_steps, 1,
        settings.group_by_length,
    )  # fmt: skip
    steps = Pace.of(settings, order.steps_per_epoch).total_steps
    answers = settings.task == "seq2seq"
    batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    longest = [max(len(row.input_ids) for row in batch) for batch in batches]
    targets = [max(len(row.labels) for row in batch) if answers else 0 for batch in batches]
    most = min(size, len(rows))
    return (
        Shape(most, max(longest), max(targets)),
        Shape(most, round(statistics.fmean(longest)), round(statistics.fmean(targets))),
        steps,
        None if corpus.labels is None else len(corpus.labels),
    )
