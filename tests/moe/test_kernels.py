"""The kernel registry, and the thread pool under the loop kernel."""

from __future__ import annotations

import threading
from itertools import accumulate

import pytest
import torch

from fairseq_moe_opt.errors import KernelError, OptionError
from fairseq_moe_opt.moe import ResidentExperts, available_kernels
from fairseq_moe_opt.moe.kernels import choose_kernel, get_kernel, kernel_names, register_kernel
from fairseq_moe_opt.moe.kernels.naive import NaiveKernel
from fairseq_moe_opt.moe.kernels.threads import SingleCoreThreads
from fairseq_moe_opt.moe.types import Segment
from tests.helpers.layers import random_experts

CPU = torch.device("cpu")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"kernel.*'cuda' is not one of auto, naive, loop, grouped_mm"):
        get_kernel("cuda")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(OptionError, match="'naive' is taken"):
        register_kernel(NaiveKernel())
    assert kernel_names() == ("naive", "loop", "grouped_mm", "fused", "triton")


def test_refusal_names_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert "grouped_mm" not in available_kernels()
    with pytest.raises(KernelError, match=r"'grouped_mm' cannot run here: .*use kernel='loop'"):
        choose_kernel("grouped_mm", CPU, torch.float32)


def test_auto_computes_experts_apart_wherever_there_is_no_other_way() -> None:
    assert choose_kernel("auto", torch.device("cuda"), torch.bfloat16, apart=True).name == "loop"


def test_grouped_mm_refuses_experts_kept_apart() -> None:
    experts = random_experts(2)
    (wave,) = ResidentExperts(2, experts.expert).waves((0, 1))
    out = torch.empty(2, 8)
    with pytest.raises(KernelError, match="packed"):
        get_kernel("grouped_mm").run(torch.randn(2, 8), [Segment(0, 0, 1), Segment(1, 1, 2)], wave, "relu", out)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", [(600, 99, 1), (1, 2, 3, 4, 5, 6), (2,)], ids=str)
def test_threads_compute_crowded_and_thin_experts(sizes: tuple[int, ...]) -> None:
    """An expert with most rows runs on all cores; two and three rows are computed as four; the rest one a core."""
    experts = random_experts(len(sizes))
    rows = torch.randn(sum(sizes), 8)
    stops = list(accumulate(sizes))
    segments = [Segment(e, stop - size, stop) for e, (size, stop) in enumerate(zip(sizes, stops, strict=True))]
    (wave,) = ResidentExperts(len(sizes), experts.expert).waves(range(len(sizes)))
    results = {}
    for name in ("naive", "loop"):
        results[name] = torch.full((sum(sizes), 8), float("nan"))
        with torch.no_grad():
            get_kernel(name).run(rows, segments, wave, "relu", results[name])
    torch.testing.assert_close(results["loop"], results["naive"], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (40, 2), (100, 100), (300, 2)], ids=str)
def test_an_expert_has_the_same_bits_in_whatever_wave_it_comes(sizes: tuple[int, int]) -> None:
    """How many cores an expert gets must not depend on what else is in its wave: more cores round otherwise."""
    experts = random_experts(2, 256, 1024)
    rows = torch.randn(sum(sizes), 256)
    segments = [Segment(0, 0, sizes[0]), Segment(1, sizes[0], sum(sizes))]
    store, kernel = ResidentExperts(2, experts.expert), get_kernel("loop")
    together, apart = torch.empty_like(rows), torch.empty_like(rows)
    with torch.inference_mode():
        (wave,) = store.waves((0, 1))
        kernel.run(rows, segments, wave, "relu", together)
        for segment in segments:
            (wave,) = store.waves((segment.expert,))
            kernel.run(rows, [segment], wave, "relu", apart)
    assert torch.equal(together, apart)


@pytest.mark.usefixtures("two_threads")
def test_threads_do_everything_once_and_leave_the_process_setting() -> None:
    threads, done, lock = SingleCoreThreads(), [], threading.Lock()

    def work(item: int) -> None:
        with lock:
            done.append((item, torch.get_num_threads()))

    threads.for_each(work, range(50))
    assert sorted(item for item, _ in done) == list(range(50))
    assert {limit for _, limit in done} == {1}
    assert torch.get_num_threads() == 2
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_reaches_the_caller() -> None:

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        SingleCoreThreads().for_each(work, range(8))
