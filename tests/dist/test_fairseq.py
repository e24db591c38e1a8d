"""fairseq's commands on several ranks: what one process prints, whoever holds which experts and has which batches."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

import fairseq_moe_opt
from fairseq_moe_opt.errors import MoEError, OptionError, ParallelError, PlacementError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer
from fairseq_moe_opt.parallel import ProcessGroupRanks
from fairseq_moe_opt.placement import Cluster, LoadHistory, place, write_placement
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_json
from tests.helpers.ranks import start_ranks, values_of, without_content

pytestmark = pytest.mark.dist

ROOT = Path(__file__).resolve().parents[2]
DATA = FAIRSEQ_GOLDENS / "data"
NUM_EXPERTS, NUM_SENTENCES = 8, 48
LAYERS = tuple(f"{side}.layers.{number}.moe_layer" for side in ("encoder", "decoder") for number in (1, 3))
FINGERPRINT = Trace(tuple(TraceLayer(name, name.split(".")[0], NUM_EXPERTS) for name in LAYERS), ()).fingerprint
PATIENCE = {"timeout": 120.0, "deadline": 600.0}
TIMEOUT, DEADLINE = 15.0, 400.0


def arguments(model: str = "A_top2_eom", beam: int = 1, batch_size: int = 7) -> list[str]:
    """Of fairseq-generate; 48 sentences in batches of 7 are 7 batches, which neither 2 nor 3 divide."""
    path = str(FAIRSEQ_GOLDENS / model / "checkpoint_last.pt")
    flags = f"--cpu --num-workers 0 --beam {beam} --batch-size {batch_size} --required-batch-size-multiple 1"
    return [str(DATA / "bin"), "--path", path, *flags.split(), "--max-len-a", "1.5", "--max-len-b", "10"]


def placed(folder: Path, slots: Sequence[int], fingerprint: str = FINGERPRINT) -> str:
    """A file of a placement by made-up loads, some experts far hotter than others."""
    generator = np.random.default_rng(5)
    heat = generator.pareto(1.0, NUM_EXPERTS) + 1
    history = LoadHistory({name: generator.poisson(20 * heat, (30, NUM_EXPERTS)) for name in LAYERS})
    path = folder / f"{'-'.join(map(str, slots))}-{fingerprint[:4]}.json"
    write_placement(place(history, Cluster(tuple(slots)), "greedy", fingerprint=fingerprint), path)
    return str(path)


def parsed(parser: str, words: Sequence[str]) -> Any:
    from fairseq import options

    fairseq_moe_opt.register_fairseq()
    return options.parse_args_and_arch(getattr(options, f"get_{parser}_parser")(), list(words))


def generate_all(cases: dict[str, list[str]], folder: Path, size: int) -> None:
    """Every case, results into a folder of its name."""
    from fairseq_cli import generate

    for name, words in cases.items():
        world = ["--distributed-world-size", str(size)] if size > 1 else []
        args = parsed("generation", [*words, *world, "--results-path", str(folder / name)])
        generate.main(args)


def printed(folder: Path, name: str) -> str:
    return (folder / name / "generate-test.txt").read_text(encoding="utf-8")


def alone(words: tuple[str, ...], folder: Path) -> str:
    """What one process prints."""
    generate_all({"alone": list(words)}, folder, 1)
    return printed(folder, "alone")


def check_same(found: str, expected: str) -> None:
    """The same lines in the same order; numbers to rounding, words and the final score exactly."""
    ours, theirs = (
        [line.split("\t") for line in text.splitlines() if re.match(r"[STHDP]-\d+\t|Generate ", line)]
        for text in (found, expected)
    )
    assert [line[0] for line in ours] == [line[0] for line in theirs] and len(ours) >= 5 * NUM_SENTENCES + 1
    for one, two in zip(ours, theirs, strict=True):
        if one[0][0] == "P":
            numbers = [[float(number) for number in line[1].split()] for line in (one, two)]
            assert numbers[0] == pytest.approx(numbers[1], abs=2e-4), one[0]
        elif one[0][0] in "HD":
            assert one[2] == two[2], one[0]
            assert float(one[1]) == pytest.approx(float(two[1]), abs=1e-5), one[0]
        else:
            assert one == two


BUFFERED = ("--moe-expert-memory", "40%")


@pytest.mark.parametrize("size", [2, 3])
def test_generate_prints_what_one_process_prints(size: int, tmp_path: Path) -> None:
    placement = placed(tmp_path, [NUM_EXPERTS - 2 * (size - 1), *[2] * (size - 1)])
    on_two = {
        "beam, buffered": (arguments(beam=3), BUFFERED),
        "a placement, top-1": (arguments("C_top1"), ("--moe-placement", placement)),
        "the same batches, buffered": (arguments(beam=2), ("--moe-generation", *BUFFERED)),
    }
    on_three = {
        "a placement, conditional, best of two": (
            [*arguments("D_cmr", beam=2), "--nbest", "2"],
            ("--moe-placement", placement),
        ),
        "fewer batches than ranks": (arguments(batch_size=NUM_SENTENCES // 2), BUFFERED),
        "the same batches": (arguments(beam=2), ("--moe-generation",)),
        "of the reference": ([*arguments(), "--score-reference"], ()),
    }
    cases = {"greedy": (arguments(), ()), **(on_two if size == 2 else on_three)}
    words = {name: [*plain, *more] for name, (plain, more) in cases.items()}
    values_of(start_ranks(size, generate_all, words, tmp_path, size, **PATIENCE))
    for name, (plain, _) in cases.items():
        check_same(printed(tmp_path, name), alone(tuple(plain), tmp_path / f"{name}, alone"))


def generate_moving(cases: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, int]]:
    """As above; how often experts moved meanwhile, and how many."""
    from fairseq_moe_opt.models import _report

    moved, stock = {}, _report.TurnRebalancing
    for name, words in cases.items():
        made: list[Any] = []
        _report.TurnRebalancing = lambda *given, made=made: made.append(stock(*given)) or made[-1]  # type: ignore
        generate_all({name: words}, folder, 2)
        (one,) = made
        moved[name] = one.report.times, one.report.experts_moved
    return moved


def test_experts_that_move_on_the_way_change_nothing(tmp_path: Path) -> None:
    flags = ["--moe-rebalance-every", "1", "--moe-placement", placed(tmp_path, [5, 3])]
    ways = {"resident": [], "packed": ["--moe-kernel", "grouped_mm"], "buffered": BUFFERED}
    cases = {name: [*arguments(beam=2), *flags, *way] for name, way in ways.items()}
    for moved in values_of(start_ranks(2, generate_moving, cases, tmp_path, **PATIENCE)):
        assert all(times > 0 and experts >= 2 for times, experts in moved.values()), moved
    expected = alone(tuple(arguments(beam=2)), tmp_path / "alone")
    for name in cases:
        check_same(printed(tmp_path, name), expected)


def score_all(cases: dict[str, list[str]], size: int) -> dict[str, tuple[float | None, list[str]]]:
    """The loss of every case, and what is logged of words."""
    from fairseq import distributed_utils
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import eval_lm

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    eval_lm.logger.addHandler(handler)
    eval_lm.logger.setLevel(logging.INFO)
    results = {}
    for name, words in cases.items():
        logged.clear()
        world = ["--distributed-world-size", str(size)] if size > 1 else []
        cfg = convert_namespace_to_omegaconf(parsed("eval_lm", [*words, *world]))
        found = distributed_utils.call_main(cfg, eval_lm.main)
        loss = None if found is None else float(found["loss"])
        results[name] = loss, [line for line in logged if line[:1].isdigit()]
    return results


def test_eval_lm_gives_the_numbers_of_one_process() -> None:
    path = str(FAIRSEQ_GOLDENS / "E_lm_moe_branch" / "checkpoint_last.pt")
    flags = "--cpu --num-workers 0 --gen-subset test --tokens-per-sample 32 --batch-size 3 --output-word-probs"
    plain = [str(DATA / "binlm"), "--path", path, *flags.split()]
    cases = {
        "blocks": [*plain, "--sample-break-mode", "none"],
        "sentences, buffered": [*plain, "--sample-break-mode", "eos", "--moe-expert-memory", "30%"],
        "the same batches": [*plain, "--sample-break-mode", "eos", "--moe-generation"],
        "a window": [*plain, "--sample-break-mode", "none", "--context-window", "8"],
    }
    first, *others = values_of(start_ranks(3, score_all, cases, 3, **PATIENCE))
    expected = score_all(cases, 1)
    for name, (loss, lines) in expected.items():
        assert first[name][0] == pytest.approx(loss, rel=1e-5), name
        assert len(lines) > 3 and [line.split("[")[0] for line in first[name][1]] == [
            line.split("[")[0] for line in lines
        ]
        assert all(other[name][1] == [] for other in others)


def what_a_rank_reads() -> tuple[int, list[str], list[str], str]:
    """Numbers in memory, the ranks' kernels, and what a spread model refuses."""
    from fairseq_moe_opt.models._sharing import ExpertSharing, sharing_experts
    from tests.helpers.fairseq_runs import load_golden

    ranks = ProcessGroupRanks()
    with sharing_experts(ExpertSharing(ranks, torch.device("cpu"))):
        model, _ = load_golden("A_top2_eom", "cap1.00", moe_capacity="none")
    for block in model.moe.blocks:
        block.make_generation_fast_()
    here = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
    try:
        model.state_dict()
    except MoEError as error:
        refused = str(error)
    model.half()
    dtypes = {str(parameter.dtype) for parameter in model.parameters() if not parameter.is_meta}
    return here, [block.engine.config.kernel for block in model.moe.blocks], sorted(dtypes), refused


def load_in_wrong_ways(folder: Path) -> list[Exception]:
    """Each way is tried by all ranks; what was raised."""
    from fairseq_moe_opt.models._sharing import ExpertSharing, sharing_experts
    from fairseq_moe_opt.placement import read_placement
    from tests.helpers.fairseq_runs import load

    ranks = ProcessGroupRanks()
    ways: list[tuple[str | None, str, dict[str, Any]]] = [
        (placed(folder, (4, 4), "another model"), "A_top2_eom", {}),
        (placed(folder, (3, 3, 2)), "A_top2_eom", {}),
        (placed(folder, (4, 4)) if ranks.rank else None, "A_top2_eom", {}),
        (None, "C_top1" if ranks.rank else "D_cmr", {}),
        (None, "A_top2_eom", {"moe_capacity": "checkpoint" if ranks.rank else "none"}),
        (None, "A_top2_eom", {"moe_gating": "static"}),
    ]
    raised: list[Exception] = []
    for file, model, overrides in ways:
        sharing = ExpertSharing(ranks, torch.device("cpu"), None if file is None else read_placement(file))
        try:
            with sharing_experts(sharing):
                load(FAIRSEQ_GOLDENS / model / "checkpoint_last.pt", DATA / "bin", **overrides)
        except MoEError as error:
            raised.append(without_content(error))
    return raised


def read_and_refuse(folder: Path) -> tuple[Any, list[Exception]]:
    return what_a_rank_reads(), load_in_wrong_ways(folder)


def test_each_rank_reads_its_own_experts_and_what_does_not_fit_is_refused_by_all_alike(tmp_path: Path) -> None:
    from tests.helpers.fairseq_runs import load_golden

    model, _ = load_golden("A_top2_eom", "cap1.00")
    experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    total = sum(value.numel() for value in model.parameters())
    (first, errors), (second, same_errors) = values_of(start_ranks(2, read_and_refuse, tmp_path, **PATIENCE))
    for here, kernels, dtypes, refused in (first, second):
        assert here == total - experts // 2
        assert set(kernels) == {first[1][0]} and "auto" not in kernels and dtypes == ["torch.float16"]
        assert refused.startswith("the experts of this model are spread over 2 ranks")
    assert list(map(str, errors)) == list(map(str, same_errors))
    assert [type(error) for error in errors] == [PlacementError] * 2 + [ParallelError] * 3 + [MoEError]
    for error, text in zip(
        errors,
        (
            "made for the model another model",
            "made for 3 ranks; this job has 2",
            "placement: rank 1 has greedy",
            "checkpoint: rank 1 has",
            "option moe_capacity: rank 1 has checkpoint, rank 0 has none",
            "option 'gating'",
        ),
        strict=True,
    ):
        assert text in str(error)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def command(*more: str, batch_size: int = 7, timeout: float = 90.0) -> list[str]:
    user_dir = ["--user-dir", str(ROOT / "fairseq_moe_opt"), "--moe-timeout", str(timeout)]
    return [*arguments(beam=2, batch_size=batch_size), *user_dir, *more]


def test_the_command_starts_the_other_processes_itself(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = command("--distributed-world-size", "2", "--moe-report", str(report))
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.generate", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_same(done.stdout, alone(tuple(arguments(beam=2)), tmp_path))
    assert done.stderr.count(f"Translated {NUM_SENTENCES} sentences") + done.stdout.count("Translated 48") == 1
    reports = [read_json(tmp_path / f"report.rank-{rank}.json") for rank in range(2)]
    layers = [layer for one in reports for layer in one["layers"]]
    assert {layer["exchange"]["kind"] for layer in layers} == {"all-to-all"}
    assert sum(layer["routed_rows"] for layer in layers) == sum(layer["computed_rows"] for layer in layers) > 0


def test_torchrun_starts_them_and_the_branches_flag_gives_all_the_same_batches(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("fairseq-generate")
    if not script.exists():
        pytest.skip(f"there is no {script}")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), *command("--is-moe")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_same(done.stdout, alone(tuple(arguments(beam=2)), tmp_path))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_rank_that_is_killed_stops_all_with_one_message(tmp_path: Path) -> None:
    port, output = free_port(), tmp_path / "generate-test.txt"
    words = command("--results-path", str(tmp_path), batch_size=1, timeout=TIMEOUT)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fairseq_cli.generate", *words],
            env=environment(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        start = time.monotonic()
        while not output.exists() or "H-" not in output.read_text(encoding="utf-8"):
            assert time.monotonic() < start + DEADLINE, "no sentence was done in time"
            time.sleep(0.02)
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        said = "".join(ranks[rank].communicate(timeout=DEADLINE)[1] for rank in (0, 2))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert time.monotonic() < killed + 2 * TIMEOUT
    assert all(ranks[rank].returncode == 1 for rank in (0, 2))
    messages = [line for line in said.splitlines() if ": error: " in line]
    assert len(messages) == 1, messages
    (message,) = messages
    assert "no answer from rank 1 (dead or hanging)" in message and "Traceback" not in said
    assert "Generate test" not in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--moe-placement", "p.json"], "has no effect in one process"),
        (["--moe-timeout", "5"], "has no effect in one process"),
        (["--distributed-world-size", "2", "--num-shards", "2"], "ranks deal the batches"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    from fairseq_cli import generate

    args = parsed("generation", [*arguments(), *words])
    with pytest.raises(OptionError, match=message):
        generate.main(args)


def test_as_many_processes_as_there_is_room_for_where_a_published_line_asks_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    world = ["--distributed-world-size", "16"]
    published = parsed("generation", [*arguments(), *world, "--is-moe"])
    assert (published.distributed_world_size, published.model_overrides) == (2, "{'moe_generation': True}")
    assert parsed("generation", [*arguments(), *world]).distributed_world_size == 16


def test_a_launcher_that_starts_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq_cli import generate

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    args = parsed("generation", [*arguments(), "--distributed-world-size", "2"])
    with pytest.raises(ParallelError, match="asks for 2 processes, but 3 were started"):
        generate.main(args)
