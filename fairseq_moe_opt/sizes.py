"""Memory sizes as users write them, and how many slots they are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fairseq_moe_opt.errors import OptionError

ALL = "all"
"""Everything stays in memory: no buffering at all."""

ALIGNMENT = 64
"""Every tensor of a slot starts on such a boundary, as torch's own do: GEMM libraries may round by alignment."""

_UNITS: Mapping[str, int] = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*|%)\s*")
_FORMS = "a size like 2GiB or 500MB, a share like 25%, or a number of bytes"


def parse_size(option: str, text: str | int, whole: int) -> int:
    """Bytes that ``text`` (``2GiB``, ``500MB``, ``25%``, ``1048576``, ``all``) means; everything is ``whole`` bytes.

    Raises OptionError naming ``option`` for anything else.
    """
    check_size(option, text)
    if text == ALL:
        return whole
    number, unit = _split(str(text))
    if unit == "%":
        return int(whole * number / 100)
    return int(number * _UNITS[unit])


def check_size(option: str, text: str | int) -> None:
    """Raise OptionError naming ``option`` unless ``text`` is a size: what can be said before ``whole`` is known."""
    if text == ALL:
        return
    if isinstance(text, bool) or not isinstance(text, (str, int)) or _SIZE.fullmatch(str(text)) is None:
        raise OptionError(option, f"{text!r} is not {_FORMS}")
    number, unit = _split(str(text))
    if unit != "%" and unit not in _UNITS:
        raise OptionError(option, f"{text!r} has the unknown unit {unit!r}; wanted is {_FORMS}")
    if unit == "%" and number > 100:
        raise OptionError(option, f"{text!r} is more than 100%")


def num_slots(option: str, text: str | int, whole: int, slot_bytes: int, *, at_least: int, at_most: int) -> int:
    """How many slots of ``slot_bytes`` fit the size ``text``, no more than ``at_most``.

    Raises OptionError with the smallest possible size when fewer than ``at_least`` fit.
    """
    slots = parse_size(option, text, whole) // slot_bytes
    if text == ALL or _is_full_share(text):
        slots = at_most  # padding between an expert's tensors must not cost the last slot
    if slots < at_least:
        what = "one expert" if at_least == 1 else f"{at_least} experts (one a layer)"
        raise OptionError(
            option, f"{text!r} has no room for {what}: the smallest possible is {at_least * slot_bytes} bytes"
        )
    return min(slots, at_most)


def aligned(nbytes: int) -> int:
    """``nbytes`` and what is lost until the next boundary."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def readable(nbytes: int) -> str:
    """``25.6 MiB``."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"


def _split(text: str) -> tuple[float, str]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    return float(match[1]), match[2].upper()


def _is_full_share(text: str | int) -> bool:
    number, unit = _split(str(text))
    return unit == "%" and number == 100
