"""Run the sides: a process each, kept alive, and told to work one at a time while the others sleep on a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from _sides import Case, Shape, Side, Timing

_HERE = Path(__file__).resolve().parent
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"
Progress = Callable[[str], None]


class SideError(Exception):
    """A side could not do what it was told; the message is one line."""


class Worker:
    """The process of one side. It starts loading at once; ``wait_ready`` waits for it."""

    def __init__(self, side: Side, folder: Path, threads: int, log: Path) -> None:
        self.side = side
        self.facts: dict[str, Any] = {}
        spec = {
            "folder": str(folder),
            "dtype": side.dtype,
            "options": None if side.options is None else dict(side.options),
            "threads": threads,
        }
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "_worker.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(side, threads),
        )

    def wait_ready(self) -> None:
        """Wait until the model is loaded; SideError if it cannot be."""
        self.facts = self._answer()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; SideError when the side failed."""
        if self._process.stdin is None or self._process.poll() is not None:
            raise SideError("its process has ended")
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise SideError(f"its process ended with code {self._process.wait()}; its output is in {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


@dataclass(frozen=True)
class Measured:
    """One side's facts (``transformers``: its version, ``load_peak_bytes``) and a timing a case, in their order."""

    side: Side
    facts: dict[str, Any]
    timings: tuple[Timing, ...]


def make_weights(shape: Shape, seed: int, folder: Path) -> None:
    """Write the random model to ``folder``, in a process of its own; CalledProcessError when that fails."""
    command = [sys.executable, str(_HERE / "_weights.py"), json.dumps(shape.to_dict()), str(seed), str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(
    sides: Sequence[Side], cases: Sequence[Case], rounds: int, folder: Path, threads: int, progress: Progress
) -> list[Measured]:
    """Time every side on every case: round by round, the sides taking turns within each round."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-bench-logs-")))
        workers = []
        for number, side in enumerate(sides):
            progress(f"loading {side.name} ({side.dtype})")
            workers.append(stack.enter_context(Worker(side, folder, threads, logs / f"{number}.txt")))
        failures = {index: _failure(worker.wait_ready) for index, worker in enumerate(workers)}
        timings: list[list[Timing]] = [[] for _ in workers]
        for case in cases:
            for index, timing in enumerate(_alternate(workers, failures, case, rounds, progress)):
                timings[index].append(timing)
        return [Measured(worker.side, worker.facts, tuple(timings[index])) for index, worker in enumerate(workers)]


def _failure(work: Callable[[], object]) -> str | None:
    try:
        work()
    except SideError as error:
        return str(error)
    return None


def _alternate(
    workers: Sequence[Worker], failures: dict[int, str | None], case: Case, rounds: int, progress: Progress
) -> list[Timing]:
    """One case: an untimed run of each side, then ``rounds`` rounds; each round begins with another side."""
    timings = [Timing(error=failures[index]) for index in range(len(workers))]
    for step in range(rounds + 1):
        for turn in range(len(workers)):
            index = (turn + step) % len(workers)
            if timings[index].error is not None:
                continue
            worker = workers[index]
            label = f"round {step} of {rounds}" if step else "comparing"
            progress(f"batch {case.batch}, {label}: {worker.side.name} ({worker.side.dtype})")
            timings[index] = _one_turn(worker, timings[index], case, first=step == 0)
    return timings


def _one_turn(worker: Worker, timing: Timing, case: Case, *, first: bool) -> Timing:
    try:
        if first:
            return Timing(tokens=worker.ask("begin", **asdict(case))["tokens"])
        answer = worker.ask("round")
    except SideError as error:
        return Timing(error=str(error))
    seconds = {phase: [*timing.seconds[phase], answer[phase]] for phase in timing.seconds}
    return Timing(seconds, timing.tokens, max(timing.peak_bytes, answer["peak_bytes"]))


def _environment(side: Side, threads: int) -> dict[str, str]:
    paths = [os.environ.get("PYTHONPATH", "")]
    if side.python_path is not None:
        paths.insert(0, str(side.python_path.resolve()))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


@contextmanager
def busy_neighbour(threads: int) -> Iterator[None]:
    """Keep ``threads`` cores as busy as another user's program would, for the time of the ``with`` block."""
    command = [sys.executable, "-S", "-c", _BUSY]
    neighbours = [subprocess.Popen(command) for _ in range(threads)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
