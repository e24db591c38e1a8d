"""What is said of the paper is consistent with itself, and arithmetic on it comes out as it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fairseq_moe_opt.buffering import static_memory
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.reproduction.config import PHASES, PaperModel, Plan, Size, read_plan, shape_of
from fairseq_moe_opt.reproduction.results import ABOUT, AT_LEAST, AT_MOST, PaperValue
from fairseq_moe_opt.reproduction.sections import (
    activation,
    balance,
    latency,
    memory,
    miss_rates,
    throughput,
    waste,
)
from fairseq_moe_opt.reproduction.sections import (
    static_memory as static_section,
)
from hf_integration.footprint import model_sizes

NLLB_54B = Path(__file__).parents[1] / "data" / "nllb_54b"
SECTIONS = (activation, balance, latency, memory, miss_rates, static_section, throughput, waste)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan("full")


def values(table: Mapping[str, object]) -> list[PaperValue]:
    found = []
    for one in table.values():
        found += [one] if isinstance(one, PaperValue) else values(one)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.NAME)
def test_every_value_says_where_it_stands(section: object) -> None:
    found = values(section.PAPER)  # type: ignore[attr-defined]
    assert found
    for value in found:
        assert value.text and value.where
        assert value.goal in ("", ABOUT, AT_LEAST, AT_MOST)
        assert value.number is not None or not value.goal


def test_the_waste_factors_are_those_of_the_models(plan: Plan) -> None:
    for phase in PHASES:
        assert plan.paper(phase).waste == pytest.approx(waste.PAPER[phase].number)
    assert (plan.models["lm"].waste, plan.models["mt"].waste) == (pytest.approx(12.8), 64)


def test_memory_is_consistent() -> None:
    assert pytest.approx(memory.PAPER["peak"]["lm"].number, rel=0.01) == 18.88 / 2.2
    assert pytest.approx(memory.PAPER["peak"]["mt"].number, rel=0.01) == 21.16 / 7.02
    assert pytest.approx(memory.PAPER["activation"]["lm"].number, rel=0.01) == 100 * (1 - 1.28 / 6.29)
    assert pytest.approx(memory.PAPER["activation"]["mt"].number, rel=0.01) == 100 * (1 - 1.05 / 1.89)
    assert pytest.approx(memory.PAPER["total"]["lm"].number, rel=0.01) == 18.88 / (12.59 + 1.28)


def test_the_budget_is_the_paper_s_quotient(plan: Plan) -> None:
    assert plan.models["lm"].budget_ratio == pytest.approx(32 / (18.88 - 6.29), rel=1e-3)
    assert plan.models["mt"].budget_ratio == pytest.approx(32 / (21.16 - 3.67), rel=1e-3)


def test_goals_are_the_ones_the_paper_reports_best(plan: Plan) -> None:
    best = {phase: value.number for phase, value in throughput.PAPER["nodes"].items()}
    assert best == {"lm": 11.55, "encoder": 10.98, "decoder": 5.71}
    assert {phase: one.number < best[phase] for phase, one in throughput.PAPER["one node"].items()} == dict.fromkeys(
        PHASES, True
    )


def test_what_is_never_scaled_is_not(plan: Plan) -> None:
    for scale in ("full", "quick"):
        for phase in PHASES:
            one = read_plan(scale)
            paper, shape = one.paper(phase), shape_of(phase, one.paper(phase), one.size(phase))
            share = paper.vocabulary / paper.width / paper.layers
            assert shape.vocabulary / shape.width / shape.layers == pytest.approx(share, rel=0.01)
            assert sum(map(shape.is_sparse, range(shape.layers))) * paper.moe_every == shape.layers
            assert shape.length / shape.width == pytest.approx(paper.length / paper.width, rel=0.1)
    lm, mt = plan.models["lm"], plan.models["mt"]
    assert (lm.experts, lm.top_k, lm.capacity, lm.moe_every) == (512, 2, 0.05, 2)
    assert (mt.experts, mt.top_k, mt.capacity, mt.moe_every) == (128, 2, 1.0, 4)


def test_the_static_memory_table_is_that_of_the_published_configuration(plan: Plan) -> None:
    ours = static_section.table(plan.models["mt"], 8)
    dense, layers = model_sizes(NLLB_54B, static_section.HALF_BYTES)
    expected = static_memory(dense, layers, 8)
    assert [row.saved for row in ours] == [row.saved for row in expected]
    assert [row.nbytes for row in ours] == pytest.approx([row.nbytes for row in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds: 5", "round: 5", ["full", "round"]),
        ("seed: 6182", "", ["KeyError", "seed"]),
        ("top_k: 2", "top_k: 2\n    top_n: 2", ["lm", "top_n"]),
        ("models:", "models: [", ["cannot be read"]),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    from fairseq_moe_opt.reproduction.config import plan_path

    path = tmp_path / "plan.yaml"
    path.write_text(plan_path().read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(OptionError) as caught:
        read_plan("full", path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_unknown_scales_and_sizes_that_do_not_fit_are_refused(plan: Plan) -> None:
    with pytest.raises(OptionError, match="'huge' is not one of full, quick"):
        read_plan("huge")
    lm: PaperModel = plan.models["lm"]
    with pytest.raises(OptionError, match="3 is not a multiple of moe_every=2"):
        shape_of("lm", lm, Size(64, 3))
    with pytest.raises(OptionError, match="100 is not a multiple of 64"):
        shape_of("lm", lm, Size(100, 2))
