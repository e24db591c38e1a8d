"""One side, in a process of its own: it sleeps on its standard input, runs what it is told, answers, sleeps again.

The command line is one JSON object (``folder``, ``dtype``, ``options``, ``threads``). A request is one JSON line, an
answer is one JSON line. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

Request = dict[str, Any]
PAD, FIRST_TOKEN, FORCED_TOKEN = 1, 8, 5
"""Padding, the first id that is an ordinary token, and the token that every target starts with."""

OFFLOADED = {"offload": "accelerate"}
"""In place of this project's options: accelerate's disk offload of the experts."""

_PAGE_BYTES = 4096
_MEMORY_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Runner:
    """A loaded model and the inputs of the case at hand."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._model = load(spec["folder"], getattr(torch, spec["dtype"]), spec["options"])
        touch(self._model)
        self._vocabulary = int(self._model.config.vocab_size)
        self._inputs: dict[str, torch.Tensor] = {}
        self._new_tokens = 0

    def begin(self, request: Request) -> dict[str, Any]:
        """Take a case and run it once, untimed; its tokens are what is compared."""
        self._inputs = source(request["batch"], request["source_tokens"], self._vocabulary)
        self._new_tokens = request["new_tokens"]
        reset_peak()
        generated = self._decode(self._encode())
        return {"tokens": generated[:, 1:].tolist()}

    def round(self, request: Request) -> dict[str, Any]:
        """Time the encoder, then decoding from what it gave."""
        encoder_seconds, encoded = timed(self._encode)
        decoder_seconds, _ = timed(lambda: self._decode(encoded))
        return {"encoder": encoder_seconds, "decoder": decoder_seconds, "peak_bytes": peak_bytes()}

    def components(self, request: Request) -> dict[str, Any]:
        """The same, as seconds of each component; their sums are a little more than what ``round`` gives."""
        from _components import seconds_of

        encoder, encoded = seconds_of(self._model, self._encode)
        decoder, _ = seconds_of(self._model, lambda: self._decode(encoded))
        return {"encoder": encoder, "decoder": decoder}

    def report(self, request: Request) -> dict[str, Any]:
        """What the experts' buffer did in the last generate call; empty where all experts stay in memory."""
        handle = getattr(self._model, "moe", None)
        if handle is None or handle.report().buffer is None:
            return {}
        found = handle.report().to_dict()
        return {"buffer": found["buffer"], "caches": [layer["cache"] for layer in found["layers"]]}

    def _encode(self) -> Any:
        return self._model.get_encoder()(**self._inputs)

    def _decode(self, encoded: Any) -> torch.Tensor:
        return decode(self._model, encoded, self._inputs["attention_mask"], self._new_tokens)


def decode(model: Any, encoded: Any, mask: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy tokens (batch, 1 + ``new_tokens``) from what the encoder gave for a source of this mask (batch, length).

    As many new tokens as asked for, no matter what: the end token is held back until the maximum.
    """
    result: torch.Tensor = model.generate(
        encoder_outputs=encoded,
        attention_mask=mask,
        forced_bos_token_id=FORCED_TOKEN,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        num_beams=1,
        do_sample=False,
    )
    return result


def load(folder: str, dtype: torch.dtype, options: dict[str, Any] | None) -> Any:
    """The model as a user of that side loads it."""
    if options == OFFLOADED:
        return offloaded(folder, dtype)
    if options is not None:
        import hf_integration  # the other sides must not even import it

        return hf_integration.from_pretrained(folder, dtype=dtype, **options)
    from transformers import NllbMoeForConditionalGeneration

    return NllbMoeForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def offloaded(folder: str, dtype: torch.dtype) -> Any:
    """As Transformers loads it, with accelerate's own hooks reading each expert from disk whenever it is called."""
    import accelerate
    from transformers import NllbMoeForConditionalGeneration

    model = NllbMoeForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    for name, module in model.named_modules():
        if name.endswith(".ffn.experts"):
            accelerate.disk_offload(module, f"{folder}/offloaded/{name}", execution_device=torch.device("cpu"))
    return model


def touch(model: torch.nn.Module) -> None:
    """Read something of every page of the weights.

    A side that maps the file would otherwise count only the experts it happened to use, one that reads it all of them.
    """
    for parameter in model.parameters():
        if parameter.device.type == "meta":  # not in memory, and not to be
            continue
        parameter.detach().view(-1)[:: _PAGE_BYTES // parameter.element_size()].sum()


def source(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """(batch, length) random tokens without padding, the same on every side."""
    stream = torch.Generator().manual_seed(batch)
    ids = torch.randint(FIRST_TOKEN, vocabulary, (batch, length), generator=stream)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of ``work()``, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def reset_peak() -> None:
    """Start measuring the peak anew, where the system can; elsewhere it is the peak since the process started."""
    if _MEMORY_RESET.exists():
        _MEMORY_RESET.write_text("5")


def peak_bytes() -> int:
    """Largest resident size since the last reset."""
    if (peak := memory_line("VmHWM")) is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def memory_line(name: str) -> int | None:
    """Bytes that the system states for this process under ``name``; None where it does not."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def answering(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``work()``, or its error as one line: a side that cannot run is a row of the table, not the end."""
    try:
        return work()
    except Exception as error:  # whatever the measured code raises
        reason = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {reason}"}


def serve(spec: dict[str, Any], answers: TextIO) -> None:
    """Load, report the versions, then answer requests until the input ends."""
    torch.set_num_threads(spec["threads"])
    runner: Runner | None = None

    def start() -> dict[str, Any]:
        nonlocal runner
        runner = Runner(spec)
        import transformers  # loaded by now; which release it is depends on the side

        return {
            "transformers": transformers.__version__,
            "load_peak_bytes": peak_bytes(),
            "loaded_bytes": memory_line("VmRSS"),
        }

    def answer(work: Callable[[], dict[str, Any]]) -> None:
        answers.write(json.dumps(answering(work)) + "\n")
        answers.flush()

    answer(start)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            if runner is not None:
                operations = (runner.begin, runner.round, runner.components, runner.report)
                operation = {one.__name__: one for one in operations}[request["do"]]
                answer(lambda operation=operation, request=request: operation(request))  # type: ignore[misc]


def main() -> None:
    """Keep standard output for answers; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), answers)


if __name__ == "__main__":
    main()
