"""Sizes as users write them."""

from __future__ import annotations

import pytest

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.sizes import num_slots, parse_size, readable

WHOLE = 4000
MEANT = {
    "all": WHOLE,
    "100%": WHOLE,
    "25%": 1000,
    "12.5 %": 500,
    "1KiB": 1024,
    "1kb": 1000,
    "1.5 MiB": 3 * 2**19,
    "2GiB": 2**31,
    "3B": 3,
    "7": 7,
    7: 7,
    0: 0,
}


@pytest.mark.parametrize("text", MEANT)
def test_what_sizes_mean(text: str | int) -> None:
    assert parse_size("expert_memory", text, WHOLE) == MEANT[text]


@pytest.mark.parametrize("text", ["", "much", "-1", "2 GiBs", "25 percent", "1e9", "101%", True, 1.5, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(OptionError, match="option 'expert_memory'"):
        parse_size("expert_memory", text, WHOLE)  # type: ignore[arg-type]


def test_slots_are_whole_and_no_more_than_there_are_experts() -> None:
    assert num_slots("m", 2500, WHOLE, 1000, at_least=1, at_most=4) == 2
    assert num_slots("m", "1GiB", WHOLE, 1000, at_least=1, at_most=4) == 4
    assert num_slots("m", "100%", WHOLE, 1001, at_least=1, at_most=4) == 4
    with pytest.raises(OptionError, match=r"'999' has no room for one expert: the smallest possible is 1000 bytes"):
        num_slots("m", "999", WHOLE, 1000, at_least=1, at_most=4)


def test_readable() -> None:
    assert [readable(size) for size in (5, 2048, 3 * 2**20, 5 * 2**40)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 TiB"]
