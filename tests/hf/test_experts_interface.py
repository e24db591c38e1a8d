"""Models behind Transformers' ``ExpertsInterface``: its own results, from the engine. Checked with 5.23.0."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fairseq_moe_opt.errors import NoMoELayerError, OptionError
from hf_integration import optimize
from hf_integration.experts_module import ExpertsModule, experts_modules
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import FAMILIES, greedy, language_model, logits_of


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_registered_function_gives_transformers_results(family: str) -> None:
    model = copy.deepcopy(eager(family)[0])
    model.set_experts_implementation("moe_opt")
    assert same(model, family)


@pytest.mark.parametrize("family", FAMILIES)
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


def test_gradients_are_transformers_own() -> None:
    model = copy.deepcopy(eager("GptOss")[0])
    ids = torch.arange(3, 15).view(2, 6)
    gradients = []
    for implementation in ("eager", "moe_opt"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close_relative(gradients[1][name], gradient, 1e-4)
