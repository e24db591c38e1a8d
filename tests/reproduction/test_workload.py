"""Scaled-down models: their bytes, that both gatings compute the same, and that memory is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.experts import ResidentPackedExperts
from fairseq_moe_opt.reproduction.config import DECODER, ENCODER, LM, PHASES, Plan, read_plan
from fairseq_moe_opt.reproduction.memory import peak_bytes, running_peak
from fairseq_moe_opt.reproduction.models import DENSE, DYNAMIC, STATIC, VARIANTS, Model, Watch
from fairseq_moe_opt.reproduction.timing import take_turns
from fairseq_moe_opt.reproduction.workload import ITEM_BYTES, Workload, static_bytes

PLAN_FILE = Path(__file__).with_name("plan.yaml")
MIB = 2**20


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan("full", PLAN_FILE)


@pytest.fixture(scope="module", params=PHASES)
def workload(request: pytest.FixtureRequest, plan: Plan) -> Workload:
    return Workload(plan, request.param)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expert_numel(model: Model) -> int:
    total = 0
    for one in model.sparse:
        store = one.layers[DYNAMIC].store
        assert isinstance(store, ResidentPackedExperts)
        tensors = store.packed.expert(0).tensors()
        total += store.num_experts * sum(tensor.numel() for tensor in tensors)
    return total


def test_bytes_are_those_of_the_weights_that_are_there(plan: Plan) -> None:
    for phases in ((LM,), (ENCODER, DECODER)):
        models = [Workload(plan, phase).model for phase in phases]
        found = static_bytes([model.shape for model in models])
        twins = [parameters(model) for model in models]
        shared = 0 if phases == (LM,) else parameters(models[0].embedding)  # one embedding for both
        assert found.dense_twin == (sum(twins) - shared) * ITEM_BYTES
        replaced = sum(parameters(model.blocks[-1].ffn) for model in models)  # one sparse layer each
        gates = sum(one.gate._weight.numel() for model in models for one in model.sparse)
        experts = sum(map(expert_numel, models))
        assert found.experts == experts * ITEM_BYTES
        assert found.total == found.dense_twin + (experts + gates - replaced) * ITEM_BYTES


def test_both_gatings_compute_the_same_from_one_routing(workload: Workload) -> None:
    found = workload.compare(workload.paper.batch)
    assert 0 < found.difference < 1e-5
    assert found.choices == 2 * workload.shape.tokens(workload.paper.batch)
    assert (found.dropped > 0) == (workload.phase == LM)  # only its capacity binds


def test_a_wrong_gating_is_not_timed(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    run = workload.model.run

    def wrong(batch: object, variant: str, step: int = 0, **more: object) -> Tensor:
        result = run(batch, variant, step, **more)  # type: ignore[arg-type]
        return result * 1.01 if variant == DYNAMIC else result

    monkeypatch.setattr(workload.model, "run", wrong)
    with pytest.raises(MoEError, match="static and dynamic gating differ by"):
        workload.compare(2)


def test_static_gating_takes_more_memory_than_dynamic_and_that_than_none(workload: Workload) -> None:
    batch = workload.paper.batch
    peaks = {variant: workload.peak(variant, batch) for variant in VARIANTS}
    assert 0 < peaks[DENSE] <= peaks[DYNAMIC] < peaks[STATIC]
    assert workload.peak(STATIC, batch) == peaks[STATIC]  # counted, so the same every time
    assert workload.peak(DYNAMIC, 2 * batch) < 2.2 * peaks[DYNAMIC]


def test_rows_are_counted_while_timing(workload: Workload) -> None:
    batch, paper = workload.paper.batch, workload.paper
    workload.reset_counters()
    found = workload.time(VARIANTS, batch, 2, 60)
    assert {len(one.seconds) for one in found.values()} == {2}
    assert found[DENSE].sparse == 0 < found[DYNAMIC].sparse < found[DYNAMIC].median
    asked, computed = workload.counted_rows(STATIC)
    assert asked == 3 * 2 * workload.shape.tokens(batch)  # two rounds and one before
    assert computed / asked == pytest.approx(paper.waste, rel=0.02)
    needed, done = workload.counted_rows(DYNAMIC)
    assert needed == done == asked
    assert 0 < workload.active_share(DYNAMIC) <= 1


def test_gates_give_experts_their_shares(plan: Plan) -> None:
    workload = Workload(plan, LM)
    (gate,) = [one.gate for one in workload.model.sparse]
    batch, found = workload.model.make_batch(64), []
    for step in range(2):
        watch = Watch()
        workload.model.run(batch, DYNAMIC, step, watch=watch)
        counts = torch.bincount(watch.routings[0].expert_index.flatten(), minlength=plan.paper(LM).experts)
        share = counts / counts.sum()
        assert (share - gate._shares[step]).abs().max() < 0.06 < gate._shares[step].max()
        found.append(share)
    assert (found[0] - found[1]).abs().max() > 0.06  # another batch of the trace


def test_the_peak_is_what_is_held_together() -> None:
    assert running_peak([5, 3, -5, 4, -7]) == 8
    assert running_peak([]) == 0

    def work() -> Tensor:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first
        return second

    assert peak_bytes(work) == 3 * MIB
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0)
    assert torch.get_num_threads() == before


def test_sides_take_turns_until_time_is_over() -> None:
    order: list[str] = []
    ticks = iter(range(1000))
    runs = {"a": lambda turn: order.append(f"a{turn}"), "b": lambda turn: order.append(f"b{turn}")}
    found = take_turns(runs, 3, 1000, clock=lambda: next(ticks))
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert found == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert {len(one) for one in take_turns(runs, 5, 0, clock=lambda: next(ticks)).values()} == {1}


def test_the_budget_leaves_what_the_paper_s_devices_have(plan: Plan) -> None:
    workload = Workload(replace(plan), LM)
    assert workload.activation_budget == round(workload.static.total * (32 / 12.59 - 1))
