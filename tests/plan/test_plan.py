"""What is reckoned for a job against what its steps hold; what fits; several devices; the command."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from deltatune.cli.app import app
from deltatune.cli.plan import bytes_of
from deltatune.errors import ConfigError
from deltatune.plan import plan
from deltatune.plan.fit import BITS4, saved_by_4_bits
from deltatune.plan.job import Shape, build_job
from deltatune.plan.live import LiveBytes
from deltatune.plan.many import spread
from deltatune.plan.probe import RealSteps, bare_base
from deltatune.plan.speed import Cost, Speed, named
from deltatune.plan.step import simulate
from deltatune.train import TrainSettings

CPU = torch.device("cpu")
SPEED = Speed("a machine", (1e9, 2e9), (1e9, 1e9, 1e9), 1e-6, memory=10**12, draw=1e-8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with a config and random weights, and no tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    made = {
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, pad_token_id=0,
            )
        ),
        "t5": transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=512, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        "bert": transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
            )
        ),
    }  # fmt: skip
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


TASKS = {"llama": "causal", "t5": "seq2seq", "bert": "classification"}


def settings_for(models, kind, **options):
    given = {"max_length": 48, "max_target_length": 24, "per_device_train_batch_size": 3, **options}
    return TrainSettings(model_name_or_path=str(models / kind), task=TASKS[kind], **given)


JOBS = [
    ("llama", {"method": "lora"}),
    pytest.param(
        *("llama", {"method": "lora", "gradient_checkpointing": True, "loss": "model"}), marks=pytest.mark.slow
    ),
    ("llama", {"method": "lora", "loss": "chunked", "max_length": 200}),
    pytest.param(*("llama", {"method": "full", "dtype": "bfloat16"}), marks=pytest.mark.slow),
    ("llama", {"method": "prefix_tuning"}),
    ("t5", {"method": "lora", "use_dora": True}),
    ("t5", {"method": "prompt_tuning"}),
    pytest.param(*("t5", {"method": "ia3"}), marks=pytest.mark.slow),
    pytest.param(*("bert", {"method": "lora", "optimizer": "loraplus"}), marks=pytest.mark.slow),
    pytest.param(*("bert", {"method": "prefix_tuning"}), marks=pytest.mark.slow),
    ("bert", {"method": "full", "gradient_checkpointing": True}),
]


@pytest.mark.parametrize(("kind", "options"), JOBS, ids=lambda value: str(value))
def test_the_bytes_are_those_of_real_steps(models, kind, options):
    settings = settings_for(models, kind, **options)
    reckoned = simulate(build_job(settings, CPU), Shape.of(settings)).memory
    real = RealSteps(settings, CPU, Shape.of(settings), bare_base(settings, CPU))
    real()
    measured = real.peak()
    assert reckoned.peak == pytest.approx(measured, rel=0.03)
    trained = sum(p.numel() * p.element_size() for p in real.trained)
    assert (reckoned.trained, reckoned.gradients) == (trained, trained)
    assert reckoned.optimizer == pytest.approx(2 * trained, rel=0.01)


def test_a_step_without_numbers_has_the_operations_of_a_real_one(models):
    settings, shape, counted = settings_for(models, "llama"), Shape(2, 16), Cost()
    reckoned = simulate(build_job(settings, torch.device("cpu")), shape)
    real = RealSteps(settings, torch.device("cpu"), shape)
    real()  # the states of the optimizer
    with LiveBytes(counted.add):
        real()
    assert reckoned.micro.count + reckoned.update.count == pytest.approx(counted.count, rel=0.15)
    assert reckoned.micro.flop == pytest.approx(counted.flop, rel=0.01)


def test_live_bytes_follow_storages_and_not_tensors():
    with LiveBytes() as live:
        x = torch.zeros(1000)
        assert live.now == 4000
        view = x.view(10, 100)
        del x
        assert live.now == 4000
        y = view + 1
        assert live.now == 8000
        del view
        assert live.now == 4000
        y.add_(1)
    assert live.peak == 8000


def test_the_peak_agrees_with_the_profiler():
    from torch.profiler import ProfilerActivity, profile

    network, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), torch.randn(32, 64)

    def step():
        network(x).square().sum().backward()
        network.zero_grad()

    step()
    live = LiveBytes()
    live.hold([*network.parameters(), x])
    before = live.now
    with live:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert live.peak - before == pytest.approx(most, rel=0.05)


def test_checkpointing_and_chunks_take_less(models):
    def peak(**options):
        settings = settings_for(models, "llama", max_length=256, **options)
        return simulate(build_job(settings, CPU), Shape.of(settings)).memory

    whole, chunked = peak(loss="model"), peak(loss="chunked")
    assert whole.logits == 3 * 256 * 4096 * 4
    assert chunked.logits == 0
    assert chunked.peak < whole.peak - whole.logits / 2
    assert peak(loss="chunked", gradient_checkpointing=True).activations < chunked.activations / 2


@pytest.mark.slow
def test_what_fits_is_found_and_does_fit(models):
    settings = settings_for(models, "llama", per_device_train_batch_size=8, max_length=256)
    base = plan(settings, device="cpu", speed=SPEED)
    assert base.fits
    assert base.choices == []
    beside = base.resident - base.memory.peak
    made = plan(settings, device="cpu", speed=SPEED, device_memory=beside + base.memory.peak // 2 + 8 * 2**20)
    good = [choice for choice in made.choices if choice.fits]
    assert good
    assert not made.fits or base.memory.peak < 16 * 2**20
    for choice in good[:3]:
        if "base" in choice.changes:
            continue
        changed = settings.model_copy(update=choice.changes)
        again = simulate(build_job(changed, CPU), Shape.of(changed)).memory
        assert again.peak + beside <= made.room + 32 * 2**20  # the process grows while it plans
        rows = changed.per_device_train_batch_size * changed.gradient_accumulation_steps
        assert rows >= 8
    assert [len(c.changes) for c in good] == sorted(len(c.changes) for c in good)


def test_four_bits_save_the_frozen_linear_layers(models):
    job = build_job(settings_for(models, "llama", method="ia3"), CPU)
    entries = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert job.sizes.linear == entries
    assert saved_by_4_bits(job) == int(entries * (4 - BITS4)) - 2 * 64 * 96


def test_several_devices_share_states_and_send_gradients(models):
    job = build_job(settings_for(models, "llama", method="full"), CPU)
    memory = simulate(job, Shape(2, 16)).memory
    ddp, fsdp, zero = spread(job, memory, 4)
    states = memory.trained + memory.frozen + memory.gradients + memory.optimizer
    assert ddp.states == states
    assert ddp.sent == int(1.5 * memory.gradients)  # a ring: twice three quarters
    assert fsdp.states == zero.states == -(-states // 4)
    assert fsdp.sent == int(0.75 * (2 * (memory.trained + memory.frozen) + memory.gradients))
    assert fsdp.peak < memory.peak < ddp.peak


def test_a_core_moves_bytes_after_the_arithmetic_and_an_accelerator_beside_it():
    cost = Cost()
    cost.add(2e9, 10**6, 0, torch.float32)
    cost.add(0.0, 3 * 10**6, 0, torch.float32)
    cost.add(2e9, 10**6, 0, torch.bfloat16)
    cost.add(0.0, 0, 1000, torch.float32)
    overhead = 4 * SPEED.overhead
    assert SPEED.seconds(cost) == pytest.approx(2 + 1 + 0.005 + 1000 * SPEED.draw + overhead, rel=1e-9)
    assert replace(SPEED, queued=True).seconds(cost) == pytest.approx(2 + 1 + 0.003, rel=1e-9)


def test_random_numbers_are_counted_where_they_are_drawn():
    counted = Cost()
    x = torch.randn(3, 8, 4, 16)
    with LiveBytes(counted.add):
        nn.functional.dropout(x, 0.5, training=True)
        nn.functional.scaled_dot_product_attention(x, x, x)  # could draw, and does not
    assert sum(drawn for listed in counted.operations.values() for *_, drawn in listed) == x.numel()


def test_devices_have_data_sheets():
    assert named("H100").flops[1] > named("rtx4090").flops[1]
    with pytest.raises(ConfigError, match="did you mean"):
        named("h10")


def test_starts_that_need_data_are_refused(models):
    with pytest.raises(ConfigError, match="pass over data"):
        build_job(settings_for(models, "llama", method="lora", init_lora_weights="eva"), CPU)


def test_memory_in_words():
    assert bytes_of("24GB") == 24 * 10**9
    assert bytes_of("80 GiB") == 80 * 2**30
    assert bytes_of("1.5g") == 1_500_000_000
    with pytest.raises(ConfigError, match="24GB"):
        bytes_of("much")


@pytest.fixture
def words(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": "a b c", "target": "d"}) + "\n" for _ in range(20)))
    return ["plan", "--model", "demo", "--train_file", str(rows), "--epochs", "2", "--for", "l4"]


def test_the_command(words):
    done = CliRunner().invoke(app, [*words, "--devices", "2"])
    assert done.exit_code == 0, done.output
    for part in ("tensors at most", "the run", "6 steps", "it fits", "FSDP2, 2 devices"):
        assert part in done.stdout
    assert CliRunner().invoke(app, ["plan", "--model", "demo", "--for", "h10"]).exit_code == 2


@pytest.mark.slow  # every setting that saves memory is tried
def test_the_command_looks_for_what_fits(words):
    small = CliRunner().invoke(app, [*words, "--device-memory", "610MiB", "--json"])
    assert small.exit_code in (0, 4), small.output
    told = json.loads(small.stdout)
    assert told["fits"] is (small.exit_code == 0)
    assert told["steps"] == 6
    assert told["choices"]
