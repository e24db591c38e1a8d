"""Models behind Transformers' ``ExpertsInterface``: its own results, from the engine.

Checked with Transformers 5.6.0, 5.23.0 and 5.24.0.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fairseq_moe_opt.errors import NoMoELayerError, OptionError
from hf_integration import optimize
from hf_integration.experts_function import name_is_taken
from hf_integration.experts_module import ExpertsModule, experts_modules
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import FAMILIES, greedy, language_model, logits_of
from tests.helpers.releases import RELEASE, TAKES_NAMES, families

needs_names = pytest.mark.skipif(
    RELEASE < TAKES_NAMES, reason=f"experts_implementation takes any registered name from Transformers {TAKES_NAMES} on"
)


@cache
def eager(family: str) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model, and what Transformers' own loop gives."""
    model = language_model(family)
    model.set_experts_implementation("eager")
    return model, logits_of(model), greedy(model)


def same(model: PreTrainedModel, family: str) -> bool:
    _, logits, tokens = eager(family)
    assert_close_relative(logits_of(model), logits)
    return torch.equal(greedy(model), tokens)


@needs_names
@pytest.mark.parametrize("family", families(FAMILIES))
def test_the_registered_function_gives_transformers_results(family: str) -> None:
    model = copy.deepcopy(eager(family)[0])
    model.set_experts_implementation("moe_opt")
    assert same(model, family)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_optimize_gives_transformers_results_and_undo_takes_it_out(family: str) -> None:
    model = copy.deepcopy(eager(family)[0])
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    handle = optimize(model)
    assert same(model, family)
    names = [name for name, _ in experts_modules(model)]
    layers = handle.report().layers
    assert [layer.name for layer in layers] == names
    assert all(len(layer.expert_rows) == 8 for layer in layers)
    assert all(sum(layer.expert_rows) == layer.routed_rows > 0 for layer in layers)
    handle.undo()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert not any("forward" in vars(module) for module in model.modules())
    assert same(model, family)


def only_its_own(model: PreTrainedModel, requested: str | None) -> str:
    """The check of releases up to 5.6."""
    if requested not in ("eager", "grouped_mm", "batched_mm", "deepgemm"):
        raise ValueError(f'Specified `experts_implementation="{requested}"` is not supported.')
    return requested


@pytest.fixture
def names_in_its_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A release that lets no name through but its own: this one, or one made so."""
    if RELEASE >= TAKES_NAMES:
        monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", only_its_own)
    name_is_taken.cache_clear()
    yield
    name_is_taken.cache_clear()


@pytest.mark.usefixtures("names_in_its_code")
def test_optimize_says_that_it_replaced_forwards_where_the_name_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(eager("Olmoe")[0])
    with pytest.raises(ValueError, match=r'experts_implementation="moe_opt".* is not supported'):
        model.set_experts_implementation("moe_opt")
    handle = optimize(model)
    assert same(model, "Olmoe")
    (note,) = handle.report().notes
    assert note.startswith(f"Transformers {RELEASE} takes no experts_implementation but its own")
    assert note.endswith("the forward of 2 experts modules was replaced instead")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", note)]
    assert handle.report().to_dict()["notes"] == (note,)
    handle.undo()
    assert same(model, "Olmoe")


def test_nothing_is_said_where_the_name_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert name_is_taken() == (RELEASE >= TAKES_NAMES)
    handle = optimize(copy.deepcopy(eager("Olmoe")[0]))
    assert (not handle.report().notes) == (not caplog.records) == name_is_taken()


class _StrangeGate(nn.Module):
    """An experts module as Transformers' decorator leaves it, with a gate of its own."""

    def __init__(self, **attributes: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(8, 12, 4))
        self.down_proj = nn.Parameter(torch.randn(8, 4, 6))
        self.is_transposed = False
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.tanh(gate) * up


def test_a_gate_that_is_not_the_engines_is_refused() -> None:
    with pytest.raises(NoMoELayerError, match="_StrangeGate have a gate that is none of the engine's"):
        ExpertsModule.of(_StrangeGate())
    with pytest.raises(NoMoELayerError, match="normalises"):
        ExpertsModule.of(_StrangeGate(has_post_expert_norm=True))


@pytest.mark.parametrize(
    ("option", "value"), [("gating", "static"), ("capacity", "checkpoint"), ("expert_dtype", "int8")]
)
def test_options_without_effect_are_refused(option: str, value: str) -> None:
    model = copy.deepcopy(eager("Mixtral")[0])
    with pytest.raises(OptionError, match=option):
        optimize(model, **{option: value})


@pytest.mark.parametrize("kernel", ["naive", "grouped_mm"])
@pytest.mark.parametrize("family", ["Olmoe", "GptOss"])
def test_every_kernel(family: str, kernel: str) -> None:
    model = copy.deepcopy(eager(family)[0])
    handle = optimize(model, kernel=kernel)
    assert_close_relative(logits_of(model), eager(family)[1])
    assert {layer.kernels for layer in handle.report().layers} == {(kernel,)}


@pytest.mark.parametrize("how", [pytest.param("moe_opt", marks=needs_names), "optimize"])
def test_gradients_are_transformers_own(how: str) -> None:
    model = copy.deepcopy(eager("GptOss")[0])
    ids = torch.arange(3, 15).view(2, 6)
    gradients = []
    for implementation in ("eager", how):
        if implementation == "optimize":
            optimize(model)
        else:
            model.set_experts_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close_relative(gradients[1][name], gradient, 1e-4)
