"""The paper's static memory, from NLLB-54B's configuration, and as a small model really allocates it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq_moe_opt.buffering import LayerSize, static_memory
from fairseq_moe_opt.errors import OptionError
from hf_integration import from_pretrained
from hf_integration.footprint import model_sizes
from tests.helpers.nllb import tiny_model

NLLB_54B = Path(__file__).resolve().parents[1] / "data" / "nllb_54b"
# Section 3.2: slots a device and layer to (GiB saved, times less), on 8 devices in 16 bits.
PAPER = {16: (0.0, 1.0), 12: (1.50, 1.094), 10: (2.251, 1.148), 8: (3.00, 1.207), 5: (4.13, 1.309), 1: (5.627, 1.474)}


def test_the_papers_table() -> None:
    dense_bytes, layers = model_sizes(NLLB_54B, 2)
    assert {(layer.num_experts, layer.expert_bytes) for layer in layers} == {(128, 33_564_672 * 2)}
    table = {row.slots: row for row in static_memory(dense_bytes, layers, 8)}
    assert sorted(table) == list(range(1, 17))
    assert table[16].nbytes / 2**30 == pytest.approx(17.49, abs=0.005)
    for slots, (saved, ratio) in PAPER.items():
        assert table[slots].saved / 2**30 == pytest.approx(saved, abs=0.006)
        assert table[slots].ratio == pytest.approx(ratio, abs=0.0005)


def test_a_small_model_allocates_what_the_table_says(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    dense_bytes, layers = model_sizes(tmp_path, 4)
    for row in static_memory(dense_bytes, layers, 1, ("encoder", "decoder")):
        budget = row.slots * sum(layer.expert_bytes for layer in layers)
        model = from_pretrained(tmp_path, expert_memory=budget, expert_pool="layer")
        held = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.device.type == "cpu"}
        dense = sum(parameter.numel() * parameter.element_size() for parameter in held.values())
        assert dense + model.moe.report().buffer.arena_bytes == row.nbytes


def test_ranks_must_divide_the_experts() -> None:
    with pytest.raises(OptionError, match="'ranks': 3 ranks do not divide 8 experts equally"):
        static_memory(100, [LayerSize("decoder", 8, 10)], 3)


def test_by_hand() -> None:
    layers = [LayerSize("encoder", 4, 10), LayerSize("decoder", 4, 10)]
    rows = static_memory(100, layers, 2)
    assert [(row.slots, row.nbytes, row.saved) for row in rows] == [(2, 140, 0), (1, 130, 10)]
    assert static_memory(100, layers, 2, ("encoder", "decoder"))[-1].ratio == 140 / 120
