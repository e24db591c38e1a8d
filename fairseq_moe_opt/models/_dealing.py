"""A data set dealt out to ranks batch by batch, the results put together on rank 0 as one process would have them.

Rank r computes batches r, W + r, 2 W + r ... of fairseq's order. Rank 0 runs fairseq's command over all of them, and
where a batch is another rank's, takes its result from the mail: so what is printed, counted and scored is fairseq's own
doing, in the order of one process. The others run the command over their batches alone, and print nothing. They read
the other batches too, because a batch may hold the end of the one before it (``fairseq-eval-lm --context-window``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from itertools import islice
from typing import Any

from fairseq import tasks
from fairseq.logging import progress_bar
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.models._turns import Turns
from fairseq_moe_opt.parallel import Collectives, Mail

_NOT_PRINTED = "attention"
"""Of a hypothesis: as large as source times target, and read by no command."""


class AllDealtError(Exception):
    """Raised on other ranks than rank 0 after their last batch: fairseq's summary is not theirs to print."""


class Deal:
    """Who computes which batch; every rank asks for its batches in order, rank 0 for all of them."""

    def __init__(self, ranks: Collectives, turns: Turns, mail: Mail) -> None:
        self._ranks, self._turns, self._mail = ranks, turns, mail
        self._asked = 0

    def own(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Those of all ``batches`` that are this rank's."""
        return islice(batches, self._ranks.rank, None, self._ranks.size)

    def __call__(self, sample: Any, compute: Callable[[], Any]) -> Any:
        """The result of the batch ``sample``: what ``compute`` gives, here or on the rank whose batch it is."""
        number, size, ids = self._asked, self._ranks.size, sample["id"].tolist()
        self._asked += 1
        if self._ranks.rank > 0:
            result = compute()
            self._mail.send(_letter(self._ranks.rank, number), (ids, _as_sent(result)))
            return result
        owner = number % size
        if owner == 0:
            return compute()
        letter = _letter(owner, number // size)
        while not self._mail.arrived(letter) and self._turns.wait():
            pass
        found, result = self._mail.take(letter)
        if found != ids:
            raise ParallelError(
                f"rank {owner} has the sentences {found[:3]}... where rank 0 has {ids[:3]}...: all ranks must read the "
                "same data, with the same flags"
            )
        return result


@contextmanager
def dealt(deal: Deal, is_first: bool) -> Iterator[None]:
    """Let ``deal`` decide on every batch of fairseq's commands of generation and of scoring language models."""
    with ExitStack() as changes:
        changes.enter_context(replaced(tasks, "setup_task", partial(_setup_task, deal)))
        changes.enter_context(replaced(SequenceScorer, "generate", partial(_score, deal)))
        if not is_first:
            changes.enter_context(
                replaced(progress_bar, "progress_bar", lambda _: lambda itr, **_: _Share(deal.own(itr)))
            )
        yield


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """The attribute ``name`` of ``owner`` as ``wrap`` makes it of the present one, until the end of the context."""
    stock = getattr(owner, name)
    setattr(owner, name, wrap(stock))
    try:
        yield
    finally:
        setattr(owner, name, stock)


def _setup_task(deal: Deal, stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def setup_task(*args: Any, **kwargs: Any) -> Any:
        """fairseq's task, whose batches are dealt."""
        task = stock(*args, **kwargs)
        infer = task.inference_step

        def inference_step(generator: Any, models: Any, sample: Any, *more: Any, **settings: Any) -> Any:
            """Hypotheses of every sentence."""
            with replaced(SequenceScorer, "generate", _undealt):
                return deal(sample, partial(infer, generator, models, sample, *more, **settings))

        task.inference_step = inference_step
        return task

    return setup_task


def _score(deal: Deal, stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def generate(self: Any, models: Any, sample: Any, **settings: Any) -> Any:
        """Scores of every sample."""
        return deal(sample, partial(stock, self, models, sample, **settings))

    return generate


def _undealt(dealt: Callable[..., Any]) -> Callable[..., Any]:
    """fairseq's own: ``fairseq-generate --score-reference`` scores in its inference step, which is dealt already."""
    return dealt.__wrapped__  # type: ignore[attr-defined, no-any-return]


def _share(deal: Deal, batches: Iterable[Any], **_: Any) -> _Share:
    return _Share(deal.own(batches))


class _Share:
    """A rank's batches, as fairseq's progress bar would hand them on."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches
        raise AllDealtError

    def log(self, *_: Any, **__: Any) -> None:
        """Nothing is shown."""


def _letter(rank: int, number: int) -> str:
    return f"batch {number} of rank {rank}"


def _as_sent(result: Any) -> Any:
    """``result`` in memory of its own: a view would take the tensor it is of along."""
    if isinstance(result, Tensor):
        return result.detach().cpu().clone()
    if isinstance(result, dict):
        return {key: None if key == _NOT_PRINTED else _as_sent(value) for key, value in result.items()}
    return [_as_sent(one) for one in result] if isinstance(result, (list, tuple)) else result
