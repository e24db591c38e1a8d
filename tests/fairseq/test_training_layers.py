"""What a sparse layer does in training: gradients, capacity, dropout, masking, batches filled up."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("fairseq", reason="fairseq is not installed")

import fairseq_moe_opt
from fairseq_moe_opt.build import LayerSpec
from fairseq_moe_opt.models._block import BlockSpec, CMRLayer, MoEBlock
from fairseq_moe_opt.models._losses import collect_gate_losses
from fairseq_moe_opt.moe import CapacityRule, ExpertDropout, GShardTop2Router, Routing, Top1Router
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.fairseq_runs import Recorder

fairseq_moe_opt.register_fairseq()

E, D, F = 4, 6, 8
ROUTERS = {
    "top-1": Top1Router(E, CapacityRule(1.0), fp32_gating=False),
    "top-2": GShardTop2Router(E, CapacityRule(1.0), fp32_gating=False),
}


def block(router: Any = ROUTERS["top-2"], capacity: str = "none", **changes: Any) -> MoEBlock:
    """A block in training mode, in double precision; ``changes`` are fields of LayerSpec or BlockSpec."""
    torch.manual_seed(5)
    of_layer = {name: changes.pop(name) for name in ("expert_masking", "final_masking", "dropout") if name in changes}
    spec = LayerSpec("encoder.layers.0.moe_layer", "encoder", router, "gelu", **of_layer)
    made = MoEBlock(BlockSpec(spec, D, F, **changes), MoEOptions(capacity=capacity))
    return made.double().train()


def routings(made: MoEBlock) -> list[Routing]:
    """Where the routings of ``made`` are kept from now on."""
    recorder = Recorder()
    made.observe(recorder)
    return recorder.routings.setdefault(made.spec.layer.name, [])


def naive(made: MoEBlock, hidden: Tensor, padding: Tensor | None) -> Tensor:
    """The layer as a loop over tokens and choices that shares only the router's decision with the engine."""
    tokens = hidden.transpose(0, 1).reshape(-1, D)
    router = made.engine.router
    rows = None if padding is None else padding.reshape(-1)
    routing = router.route(made.gate(tokens), rows, training=made.training)
    results = []
    for token, index, weight in zip(tokens, routing.expert_index, routing.weight, strict=True):
        result = torch.zeros_like(token)
        for expert, share in zip(index.tolist(), weight, strict=True):
            if expert < E:
                own = made.experts[expert]
                result = result + share * own.fc2(functional.gelu(own.fc1(token)))
        results.append(result)
    return torch.stack(results).view(hidden.shape[1], hidden.shape[0], D).transpose(0, 1)


def inputs(batch: int = 3, length: int = 4) -> Tensor:
    """(T, B, D), off centre so that some experts are asked for more than their share."""
    noise = torch.randn(length, batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (noise + 2).requires_grad_()


PADDING = torch.tensor([[False] * 4, [False] * 4, [False, False, True, True]])


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize("capacity", ["none", "checkpoint"])
@pytest.mark.parametrize("padding", [None, PADDING])
def test_gradients_of_every_parameter_are_those_of_the_naive_loop(
    gate: str, capacity: str, padding: Tensor | None
) -> None:
    made, hidden = block(ROUTERS[gate], capacity), inputs()
    kept = routings(made)
    ours, theirs = made(hidden, padding), naive(made, hidden, padding)
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    assert (int(kept[0].dropped or 0) > 0) == (capacity == "checkpoint")
    wanted = [hidden, *made.parameters()]
    found, expected = (
        torch.autograd.grad(output.square().sum(), wanted, allow_unused=True, materialize_grads=True)
        for output in (ours, theirs)
    )
    assert all(float(gradient.abs().sum()) > 0 for gradient in expected[:2])
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", ROUTERS)
@pytest.mark.parametrize("capacity", ["none", "checkpoint"])
def test_gradients_agree_with_finite_differences(gate: str, capacity: str) -> None:
    """Of the input, the gate's matrix and every parameter of two experts."""
    made = block(ROUTERS[gate], capacity)
    parameters = [made.gate.wg.weight, *made.experts[0].parameters(), *made.experts[1].parameters()]
    assert torch.autograd.gradcheck(lambda hidden, *_: made(hidden, PADDING), (inputs(), *parameters))


@pytest.mark.parametrize("capacity", ["none", "checkpoint"])
def test_gradients_of_conditional_routing_agree_with_finite_differences(capacity: str) -> None:
    layer = CMRLayer(block(capacity=capacity), dropout=0.0).double().train()
    dense = torch.nn.Linear(D, D).double()
    parameters = (*layer.gate.parameters(), *dense.parameters(), layer.moe_layer.gate.wg.weight)
    assert torch.autograd.gradcheck(lambda hidden, *_: layer(hidden, dense, PADDING), (inputs(), *parameters))


@pytest.mark.parametrize(("gate", "factor"), [("top-1", 1), ("top-2", 2)])
def test_capacity_in_training_is_the_training_formula(gate: str, factor: int) -> None:
    """12 rows over 4 experts: 3 rows an expert and choice, whatever the fraction for evaluation."""
    made = block(ROUTERS[gate], "checkpoint")
    kept = routings(made)
    made(inputs())
    made.eval()
    made(inputs())
    assert [routing.capacity for routing in kept] == [factor * 3, 12]
    counts = torch.bincount(kept[0].expert_index.flatten(), minlength=E + 1)[:E]
    assert int(counts.max()) <= factor * 3


def test_a_smaller_batch_is_filled_up_with_rows_that_go_nowhere() -> None:
    """3 sentences of 4 tokens in a batch of 5: 20 rows, so 2 * ceil(20 / 4) = 10; in validation 7 * 4 rows."""
    plain, made = block(capacity="none"), block(capacity="checkpoint", train_batch=5, valid_batch=7)
    kept, hidden = routings(made), inputs()
    with collect_gate_losses() as losses:
        output = made(hidden, PADDING)
    assert torch.allclose(output, plain(hidden, PADDING), rtol=1e-12)
    assert (kept[0].capacity, kept[0].expert_index.shape[0]) == (10, 20)
    assert bool((kept[0].expert_index[12:] == E).all())
    rows = torch.cat((hidden.transpose(0, 1).reshape(12, D), torch.zeros(8, D, dtype=torch.float64)))
    shares = torch.softmax(rows @ made.gate.wg.weight.t(), dim=1).mean(0)
    first = torch.bincount(kept[0].expert_index[:, 0], minlength=E + 1)[:E].double() / 20
    # The first choices are the real rows' alone, but both means are over all 20 rows.
    assert float(losses.balance[0].detach()) == pytest.approx(float(E * (shares * first).sum().detach()), rel=1e-9)
    made.eval()
    made(hidden)
    assert kept[-1].capacity == 28
    made.make_generation_fast_()
    made(hidden)
    assert kept[-1].capacity == 12


def test_a_larger_batch_stays_as_it_is() -> None:
    made = block(capacity="checkpoint", train_batch=2)
    kept = routings(made)
    made(inputs())
    assert kept[0].capacity == 6


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_dropout_is_inside_each_expert(gating: str) -> None:
    """Where one expert's value is dropped, the other one's still arrives: not the sum is dropped, but its terms."""
    made = block(dropout=ExpertDropout(output=0.5))
    made.options = replace(made.options, gating=gating)
    made.experts.requires_grad_(False)
    for expert in made.experts:
        expert.fc2.weight.zero_()
        expert.fc2.bias.fill_(1.0)
    kept = routings(made)
    with torch.no_grad():
        output = made(inputs(batch=50)).transpose(0, 1).reshape(200, D)
    first, second = kept[0].weight.unbind(1)
    possible = torch.stack([2 * (a * first + b * second) for a, b in itertools.product((0, 1), repeat=2)], dim=1)
    distance = (output.unsqueeze(2) - possible.unsqueeze(1)).abs()
    assert float(distance.amin(2).max()) < 1e-12
    shares = torch.bincount(distance.argmin(2).flatten(), minlength=4) / output.numel()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.06)
    made.eval()
    with torch.no_grad():
        assert torch.allclose(made(inputs()), torch.ones(1, dtype=torch.float64))


def test_activation_dropout_is_between_the_matrices() -> None:
    made = block(dropout=ExpertDropout(hidden=1.0))
    for expert in made.experts:
        torch.nn.init.constant_(expert.fc2.bias, 3.0)
    assert torch.allclose(made(inputs()), torch.full((1,), 3.0, dtype=torch.float64))


def test_expert_masking_drops_choices_and_final_masking_tokens() -> None:
    """As in the branches without rescaling; at evaluation a factor stands for it."""
    for name, expected in (("expert_masking", {0.0, 0.5, 1.0}), ("final_masking", {0.0, 1.0})):
        made = block(**{name: 0.4})
        torch.nn.init.zeros_(made.gate.wg.weight)
        for expert in made.experts:
            torch.nn.init.zeros_(expert.fc2.weight)
            torch.nn.init.ones_(expert.fc2.bias)
        output = made(inputs(batch=100))
        assert {round(value, 6) for value in output.flatten().tolist()} == expected
        assert bool((output == output[..., :1]).all())
        assert float(output.mean()) == pytest.approx(0.6, abs=0.08)
        made.eval()
        assert torch.allclose(made(inputs()), torch.full((1,), 0.6, dtype=torch.float64))


def test_no_tokens_and_one_token() -> None:
    made = block()
    for length in (0, 1):
        hidden = torch.zeros(length, 1, D, dtype=torch.float64, requires_grad=True)
        made(hidden).sum().backward()
        assert hidden.grad is not None and math.isfinite(float(hidden.grad.sum()))
