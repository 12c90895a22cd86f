"""A store of many adapters: few of them on the model, exact results, bounded memory, nothing taken off in use."""

import gc
import threading
import weakref

import pytest
import torch

from deltatune import AdapterStore, IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from deltatune.errors import AdapterNameError, ConfigError, FormatError, LimitError, MismatchError, StateError
from deltatune.inject import adapter_parameters, adapter_tensors
from tests.core.tiny import batch, logits, tiny
from tests.laws.examples import move

INPUTS = {key: value for key, value in batch("llama", rows=1).items() if key != "labels"}
NAMES = [f"a{number}" for number in range(5)]
TARGETS = ["q_proj", "down_proj"]


def same(one, other):
    """Up to the order in which layer and update are summed; another adapter's answer is far from it."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def base():
    return get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", r=2), adapter_name="own").eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five folders: LoRA of unequal ranks and one IA3, and what each makes of the inputs."""
    place, expected = tmp_path_factory.mktemp("adapters"), {}
    for number, name in enumerate(NAMES):
        lora = LoraConfig(task_type="CAUSAL_LM", r=2 + 2 * (number % 2), target_modules=TARGETS)
        ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"])
        model = get_peft_model(tiny("llama"), ia3 if number == 4 else lora, adapter_name=name).eval()
        torch.manual_seed(number)
        move(model, name=name)
        model.save_pretrained(place)
        with torch.no_grad():
            expected[name] = model(**INPUTS, adapter_names=[name]).logits
    return place, expected


def stored(folders, **limits):
    store = AdapterStore(base(), **limits)
    for name in NAMES:
        store.register(name, folders[0] / name)
    return store


def answer(store, name):
    with store.use(name), torch.no_grad():
        return store.model(**INPUTS, adapter_names=[name]).logits


@pytest.mark.parametrize("limits", [{}, {"most": 2}, {"most": 1, "host_bytes": 10**6}, {"most_bytes": 6000}])
def test_every_adapter_gives_what_it_gave_when_it_was_saved(folders, limits):
    store = stored(folders, **limits)
    for name in [*NAMES, *reversed(NAMES), "a0", "a0", "a3"]:
        assert torch.equal(answer(store, name), folders[1][name])


def test_the_least_recently_used_makes_room(folders):
    store = stored(folders, most=2)
    answer(store, "a0"), answer(store, "a1"), answer(store, "a0"), answer(store, "a2")
    assert store.names("model") == ["a0", "a2"]
    assert store.names("host") == [] and store.names("disk") == ["a1", "a3", "a4"]
    assert set(store.model.peft_config) == {"own", "a0", "a2"}


def test_what_leaves_the_model_goes_to_the_host_and_from_there_to_its_folder(folders, monkeypatch):
    store = stored(folders, most=1)
    answer(store, "a0")
    size = store.bytes()
    store = stored(folders, most=1, host_bytes=size)
    answer(store, "a0"), answer(store, "a2")
    assert store.names("host") == ["a0"] and store.bytes("host") == size
    with monkeypatch.context() as patched:
        patched.setattr("deltatune.storage.folder.read", lambda *args, **kwargs: pytest.fail("the folder was read"))
        assert torch.equal(answer(store, "a0"), folders[1]["a0"])
    assert store.names("host") == ["a2"]
    answer(store, "a4")
    assert store.names("host") == ["a0"]


def test_memory_is_bounded(folders):
    store = stored(folders, most=2)
    bare = sum(p.numel() for p in store.model.parameters())
    gone = []
    for name in NAMES * 3:
        answer(store, name)
        bare_model = store.model.get_base_model()
        own = {known: adapter_tensors(bare_model, known) for known in store.names("model")}
        tensors = [tensor for found in own.values() for tensor in found]
        assert sum(p.numel() for p in store.model.parameters()) == bare + sum(t.numel() for t in tensors)
        assert store.bytes() == sum(t.nbytes for t in tensors)
        gone.append([weakref.ref(parameter) for parameter in adapter_parameters(bare_model, name)])
    del own, tensors
    gc.collect()
    alive = [number for number, refs in enumerate(gone) if any(ref() is not None for ref in refs)]
    assert alive == [len(gone) - 2, len(gone) - 1]


def test_bytes_limit_what_is_on_the_model(folders):
    store = stored(folders)
    with store.use(NAMES):
        sizes = {name: sum(t.nbytes for t in adapter_tensors(store.model.get_base_model(), name)) for name in NAMES}
        assert store.bytes() == sum(sizes.values())
    limit = sizes["a0"] + sizes["a2"]
    store = stored(folders, most_bytes=limit)
    for name in ("a0", "a2", "a4", "a0", "a2"):
        answer(store, name)
        assert store.bytes() <= limit
    with pytest.raises(LimitError, match="most_bytes") as caught, store.use(["a0", "a1"]):
        pass
    assert caught.value.field == "most_bytes"


def test_rows_of_one_batch_may_be_of_any_adapters(folders):
    store = stored(folders, most=3)
    rows = ["a1", "__base__", "a4", "a1", "a0"]
    inputs = {key: value.repeat(len(rows), 1) for key, value in INPUTS.items()}
    with store.use(rows), torch.no_grad():
        mixed = store.model(**inputs, adapter_names=rows).logits
    for row, name in enumerate(rows):
        if name != "__base__":
            torch.testing.assert_close(mixed[row : row + 1], folders[1][name], rtol=1e-4, atol=1e-5)


def test_none_in_use_is_taken_off(folders):
    store = stored(folders, most=2)
    with store.use("a0"):
        answer(store, "a1"), answer(store, "a2"), answer(store, "a3")
        assert store.names("model") == ["a0", "a3"]
        with store.use("a3"), pytest.raises(LimitError, match="most=2"), store.use("a1"):
            pass
        with pytest.raises(StateError, match="in use"):
            store.forget("a0")
    store.forget("a0")
    assert "a0" not in store.names() and "a0" not in store.model.peft_config


def test_the_active_adapter_stays(folders):
    store = stored(folders, most=2)
    answer(store, "a0")
    store.model.set_adapter("a0")
    answer(store, "a1"), answer(store, "a2")
    assert store.names("model") == ["a0", "a2"]
    assert same(logits(store.model, INPUTS), folders[1]["a0"])


def test_a_thread_waits_for_room_and_is_told_when_there_is_none_in_time(folders):
    store, inside, found = stored(folders, most=1), threading.Event(), {}

    def other():
        inside.wait()
        with pytest.raises(StateError, match=r"within 0\.01 seconds"), store.use("a1", timeout=0.01):
            pass
        found["started"] = True
        found["answer"] = answer(store, "a1")

    thread = threading.Thread(target=other)
    thread.start()
    with store.use("a0"):
        inside.set()
        while "started" not in found:
            pass
        assert store.names("model") == ["a0"]
    thread.join(timeout=30)
    assert torch.equal(found["answer"], folders[1]["a1"])


def test_threads_that_wait_for_each_other_are_told(folders):
    store, both, errors = stored(folders, most=2), threading.Barrier(2), []

    def nested(first, second):
        with store.use(first):
            both.wait()
            try:
                with store.use(second):
                    pass
            except LimitError as error:
                errors.append(error)

    threads = [threading.Thread(target=nested, args=names) for names in (("a0", "a2"), ("a1", "a3"))]
    [thread.start() for thread in threads]
    [thread.join(timeout=30) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert len(errors) == 1


def test_many_threads_get_exact_results(folders):
    store, wrong = stored(folders, most=3, host_bytes=4000), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(8):
            name = NAMES[int(torch.randint(len(NAMES), (1,), generator=generator))]
            try:
                if not torch.equal(answer(store, name), folders[1][name]):
                    wrong.append(name)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join(timeout=120) for thread in threads]
    assert wrong == []
    assert len(store.names("model")) <= 3


@pytest.mark.parametrize("limits", [{"most": 0}, {"most": True}, {"most_bytes": -1}, {"host_bytes": -1}, {"most": 1.5}])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        AdapterStore(None, **limits)


def test_names_and_folders_that_cannot_be_are_refused(folders, tmp_path):
    store = stored(folders, most=2)
    with pytest.raises(StateError, match="registered already"):
        store.register("a0", folders[0] / "a0")
    with pytest.raises(StateError, match="on the model already"):
        store.register("own", folders[0] / "a0")
    with pytest.raises(AdapterNameError, match="not allowed"):
        store.register("a/b", folders[0] / "a0")
    with pytest.raises(FormatError):
        store.register("new", tmp_path)
    with pytest.raises(AdapterNameError, match="did you mean 'a0'"), store.use("a00"):
        pass
    with pytest.raises(LimitError, match=r"'a2'\]"), store.use(["a0", "a1", "a2"]):
        pass
    prefix = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prefix.save_pretrained(tmp_path / "prefix")
    with pytest.raises(ConfigError, match="outside of single layers"):
        store.register("new", tmp_path / "prefix")
    assert store.names() == NAMES and store.names("model") == []


def test_an_adapter_of_another_base_is_refused_and_the_others_stay_right(folders, tmp_path):
    other = get_peft_model(tiny("llama", seed=9), LoraConfig(task_type="CAUSAL_LM", r=2), adapter_name="default")
    other.save_pretrained(tmp_path)
    store = stored(folders, most=1)
    store.register("other", tmp_path)
    answer(store, "a0")
    with pytest.raises(MismatchError, match="another base"), store.use("other"):
        pass
    assert "other" not in store.model.peft_config
    assert torch.equal(answer(store, "a0"), folders[1]["a0"])
