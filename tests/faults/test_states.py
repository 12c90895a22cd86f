"""Random lives of a model with adapters, against a plain account of what its outputs must be.

Adapters of three seams come, go, are switched, merged, disabled, saved and loaded again, in any order. The account is
a dict: by name, the outputs that the adapter had when it was made. A call that is refused changes nothing at all.
"""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltatune import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from deltatune.errors import PeftError
from deltatune.inject import adapted_layers
from tests.core.tiny import tiny
from tests.faults.crowd import ask, stir
from tests.faults.folders import state, unchanged

CAUSAL = {"task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: LoraConfig(r=2, **CAUSAL),
    "ia3": lambda: IA3Config(**CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
}
names = st.sampled_from(["p", "q", "r"])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def base() -> torch.nn.Module:
    return tiny("llama", num_hidden_layers=1)


class Life(RuleBasedStateMachine):
    """`kinds` and `alone` are the account: the method of each adapter, and its outputs when it acts alone."""

    @initialize(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 99))
    def begin(self, kind, seed):
        self.room = tempfile.TemporaryDirectory()
        self.plain = ask(base())
        self.model = get_peft_model(base(), KINDS[kind](), adapter_name="p").eval()
        self.kinds, self.alone, self.saved = {"p": kind}, {}, {}
        self.active, self.merged, self.enabled = ["p"], [], True
        self.sums = set()  # adapters with the config of a sum, onto which no other file is loaded
        self._made("p", seed)

    def _made(self, name, seed):
        active, trained = list(self.active), self.model.base_model.selection.trained
        stir(self.model, name, seed)
        self.alone[name] = ask(self.model)
        self.model.base_model.selection.active = tuple(active)
        self.model.base_model.let_train(trained, True)
        self.model.base_model.let_train({name} - set(active), False)
        if not self.enabled:
            self.alone[name] = self._enabled(name)

    def _enabled(self, name):
        return ask(self.model, [name, name])

    def refused(self, call):
        """The call is refused in words, and nothing is another bit than before."""
        before, active, out = state(self.model), self.model.active_adapters, ask(self.model)
        with pytest.raises(PeftError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert unchanged(self.model, before) and self.model.active_adapters == active
        assert list(self.model.peft_config) == list(self.kinds) and torch.equal(ask(self.model), out)

    @property
    def layers(self):
        return [name for name, kind in self.kinds.items() if kind != "prefix"]

    # -------------------------------------------------------------------------------------------- comings and goings

    @rule(name=names, kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 99))
    def add(self, name, kind, seed):
        if name in self.kinds or self.merged:
            if name in self.kinds:
                self.refused(lambda: self.model.add_adapter(name, KINDS[kind]()))
            return
        self.model.add_adapter(name, KINDS[kind]())
        self.kinds[name] = kind
        self.sums.discard(name)
        self.active = self.active or [name]
        self._made(name, seed)

    @rule(name=names)
    def delete(self, name):
        if name not in self.kinds or name in self.merged:
            return self.refused(lambda: self.model.delete_adapter(name))
        if len(self.kinds) == 1 or self.merged:
            return
        self.model.delete_adapter(name)
        del self.kinds[name], self.alone[name]
        self.active = [other for other in self.active if other != name] or list(self.kinds)[:1]

    @rule(name=names)
    def set(self, name):
        if name not in self.kinds:
            return self.refused(lambda: self.model.set_adapter(name))
        self.model.set_adapter(name)
        self.active, self.merged = [name], []

    @rule()
    def set_all_layer_methods(self):
        if len(self.layers) > 1:
            self.model.set_adapter(self.layers)
            self.active, self.merged = self.layers, []

    # ----------------------------------------------------------------------------------------- merging and disabling

    @rule(name=names)
    def merge(self, name):
        if name not in self.kinds or self.kinds[name] == "prefix":
            return self.refused(lambda: self.model.base_model.merge_adapter([name]))
        if name in self.active:
            self.model.base_model.merge_adapter([name])
            self.merged = [*self.merged, *([] if name in self.merged else [name])]

    @rule()
    def unmerge(self):
        self.model.base_model.unmerge_adapter()
        self.merged = []

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        self.model.base_model.enable_adapter_layers() if enabled else self.model.base_model.disable_adapter_layers()
        self.enabled = enabled

    @rule()
    def nothing_of_a_list(self):
        self.refused(lambda: self.model.merge_adapter([]))
        self.refused(lambda: self.model.merge_and_unload(adapter_names=[]))

    # ------------------------------------------------------------------------------------------------ files and sums

    @rule(name=names)
    def save(self, name):
        if name not in self.kinds:
            return self.refused(lambda: self.model.save_pretrained(self.room.name, selected_adapters=[name]))
        folder = Path(self.room.name) / f"folder{len(self.saved)}"
        self.model.save_pretrained(folder, selected_adapters=[name])
        self.saved[folder / name] = (self.kinds[name], self.alone[name], name in self.sums)

    @precondition(lambda self: bool(self.saved))
    @rule(name=names, data=st.data())
    def load(self, name, data):
        folder = data.draw(st.sampled_from(sorted(self.saved)))
        kind, outputs, summed = self.saved[folder]
        if self.merged:
            return self.refused(lambda: self.model.load_adapter(folder, name)) if name in self.merged else None
        if self.kinds.get(name, kind) != kind:
            return self.refused(lambda: self.model.load_adapter(folder, name))
        if name in self.kinds and (summed or name in self.sums):
            return  # the options of the model stay, with a warning, and say how strongly the tensors act
        self.model.load_adapter(folder, name)
        self.sums = self.sums | {name} if summed else self.sums - {name}
        self.kinds[name], self.alone[name] = kind, outputs
        fresh = PeftModel.from_pretrained(base(), folder).eval()
        assert close(ask(fresh), outputs)

    @rule(name=names)
    def load_what_is_not_there(self, name):
        self.refused(lambda: self.model.load_adapter(Path(self.room.name) / "nowhere", name))

    @rule(name=names, one=names, weight=st.sampled_from([1.0, -0.5]))
    def weighted(self, name, one, weight):
        def combine():
            self.model.add_weighted_adapter([one], [weight], name, combination_type="linear")

        known = self.kinds.get(one) in ("lora", "ia3")
        if not known or name in self.kinds or self.merged:
            return self.refused(combine)
        combine()
        self.sums.add(name)
        self.kinds[name] = self.kinds[one]
        self.alone[name] = self.alone[one] if weight == 1.0 else self._enabled(name)

    # ------------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def outputs_are_those_of_the_account(self):
        assert list(self.model.peft_config) == list(self.kinds) and self.model.active_adapters == self.active
        got = ask(self.model)
        if not self.enabled:
            assert torch.equal(got, self.plain)
        elif len(self.active) == 1:
            assert close(got, self.alone[self.active[0]])
        with self.model.disable_adapter():
            assert torch.equal(ask(self.model), self.plain)
        if not self.merged:
            for name in self.kinds:
                assert close(ask(self.model, [name, name]), self.alone[name])
        held = {name for _, layer in adapted_layers(self.model.get_base_model()) for name in layer.merged_adapters}
        assert held == set(self.merged)

    def teardown(self):
        if hasattr(self, "room"):
            self.room.cleanup()


def lives(count: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = settings(
            max_examples=count,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Life, settings=quiet)


def test_random_lives_of_a_model():
    lives(12, 12)


@pytest.mark.long
def test_many_long_lives_of_a_model():
    lives(300, 40)
