"""What README.md shows of `make demo` is what it printed: examples/demo/output.txt."""

from __future__ import annotations

from tests.helpers.pages import ROOT, blocks_of

PRINTED = (ROOT / "examples" / "demo" / "output.txt").read_text(encoding="utf-8").splitlines()
LEFT_OUT = "  [...]"


def test_every_line_shown_was_printed() -> None:
    (block,) = [block for block in blocks_of(ROOT / "README.md") if block.text.startswith("nllb-moe, ")]
    shown = block.text.splitlines()
    assert len(shown) > 50
    assert [line for line in shown if line not in PRINTED and line != LEFT_OUT] == []
