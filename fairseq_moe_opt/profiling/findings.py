"""What a profile shows, in sentences with the numbers in them: titles of pictures, and the page's summary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import mean

from fairseq_moe_opt.profiling.clock import ATTENTION, EXPERTS, REST
from fairseq_moe_opt.profiling.profile import Profile, waste_of
from fairseq_moe_opt.profiling.profiler import LayerFacts
from fairseq_moe_opt.profiling.statistics import LayerStatistics
from fairseq_moe_opt.sizes import readable


def short_name(facts: LayerFacts) -> str:
    """``model.decoder.layers.3.ffn`` is the decoder's layer 3."""
    numbers = re.findall(r"\.(\d+)(?:\.|$)", facts.name)
    return f"layer {numbers[0]}" if numbers else facts.name


def findings(profile: Profile) -> list[str]:
    """Everything worth a sentence, phase by phase."""
    found = []
    for phase in profile.phases:
        for say in (time_finding, idle_finding, skew_finding, load_finding, reuse_finding, correlation_finding):
            sentence = say(profile, phase)
            if sentence is not None:
                found.append(f"{sentence}.")
    found += [f"{memory_finding(profile, phase)}." for phase in profile.timelines]
    found += [f"{sentence}." for sentence in (waste_finding(profile), experts_finding(profile)) if sentence is not None]
    return found


def time_finding(profile: Profile, phase: str) -> str | None:
    """Where a forward's time goes."""
    shares = []
    for one in profile.inputs:
        parts = one.milliseconds(phase)
        if parts:
            shares.append((sum(parts.values()), parts))
    if not shares:
        return None
    whole = _range([total for total, _ in shares], 1)

    def share(names: Iterable[str]) -> str:
        wanted = tuple(names)
        return _percent([sum(parts[name] for name in wanted) / total for total, parts in shares])

    sparse = [name for name in shares[0][1] if name not in (ATTENTION, REST)]
    return (
        f"{phase}: {whole} ms a forward; sparse layers take {share(sparse)} of it "
        f"(expert FFN {share([EXPERTS])}), attention {share([ATTENTION])}"
    )


def idle_finding(profile: Profile, phase: str) -> str | None:
    """Experts without a row."""
    found = _statistics(profile, phase)
    if not found:
        return None
    idle, even = (_percent([read(one) for one in found]) for read in (_idle, _idle_if_even))
    if max(map(_idle, found)) < 0.005:
        return f"{phase}: all experts are at work in every batch"
    return f"{phase}: {idle} of the experts are idle in a batch; random choices would leave {even}"


def _idle(one: LayerStatistics) -> float:
    return one.inactive


def _idle_if_even(one: LayerStatistics) -> float:
    return one.inactive_if_even


def skew_finding(profile: Profile, phase: str) -> str | None:
    """The busiest expert."""
    found = _statistics(profile, phase)
    if not found:
        return None
    even = mean(1 / one.num_experts for one in profile.layers_of(phase))
    share = _percent([one.max_share for one in found])
    worst = max(one.worst_share for one in found)
    return (
        f"{phase}: the busiest expert gets {share} of a batch's rows, at most {100 * worst:.0f} %; "
        f"even would be {100 * even:.1f} %"
    )


def load_finding(profile: Profile, phase: str) -> str | None:
    """How much of their load two inputs share; None where there is only one input."""
    layers = [
        one
        for one in profile.layers_of(phase)
        if one.name in profile.comparison and len(profile.comparison[one.name].overlap) > 1
    ]
    if not layers:
        return None
    least = min(layers, key=lambda one: profile.comparison[one.name].mean_overlap)
    found = profile.comparison[least.name]
    if found.mean_overlap > 0.995:
        return f"{phase}: the load is the same for every input"
    return (
        f"{phase}, {short_name(least)}: two inputs have {100 * found.mean_overlap:.0f} % of their load in common, "
        f"halves of one {100 * mean(found.self_overlap):.0f} %; "
        f"{len(found.specific)} of {least.num_experts} experts serve mainly one input"
    )


def reuse_finding(profile: Profile, phase: str) -> str | None:
    """Whether the next batch needs the same experts."""
    found = [one for one in _statistics(profile, phase) if one.batches > 1]
    if not found or min(one.stickiness_by_chance for one in found) > 0.995:
        return None  # where every batch needs all experts there is nothing to say
    kept, chance = _percent([one.stickiness for one in found]), _percent([one.stickiness_by_chance for one in found])
    return f"{phase}: {kept} of a batch's experts are needed by the next one too, {chance} if batches had no memory"


def correlation_finding(profile: Profile, phase: str) -> str | None:
    """Whether experts rise and fall together."""
    found = [one for one in _statistics(profile, phase) if one.batches > 2]
    if not found:
        return None
    seen, chance = mean(one.mean_correlation for one in found), mean(one.correlation_by_chance for one in found)
    return f"{phase}: two experts' shares correlate by {seen:.2f} on average (absolute), {chance:.2f} by chance alone"


def memory_finding(profile: Profile, phase: str) -> str:
    """The peak of a forward."""
    peak = profile.timelines[phase].peak
    return (
        f"{phase}: one forward needs {readable(peak.nbytes)} beside {readable(profile.weights.total)} of weights, "
        f"most of all in {peak.component}"
    )


def waste_finding(profile: Profile) -> str | None:
    """What static gating would compute."""
    factors = {
        (one.num_experts, one.capacity_fraction, one.top_k, waste)
        for one in profile.layers
        if (waste := waste_of(one)) is not None
    }
    if not factors:
        return None
    return "; ".join(
        f"static gating would compute {waste:.1f} rows for each one needed "
        f"(E C / K = {experts} x {fraction:g} / {top_k})"
        for experts, fraction, top_k, waste in sorted(factors)
    )


def experts_finding(profile: Profile) -> str | None:
    """Experts that are slow for their rows."""
    if not profile.experts:
        return None
    slow = [one for one in profile.experts if one.is_slow]
    if not slow:
        return "no expert always takes twice as long as others of its layer with as many rows"
    worst = max(slow, key=lambda one: one.seconds / one.expected)
    return (
        f"expert {worst.expert} of {worst.layer} takes {1e6 * worst.seconds:,.0f} microseconds a forward, "
        f"{worst.seconds / worst.expected:.1f} times what others would with its {worst.rows:g} rows"
    )


def _statistics(profile: Profile, phase: str) -> list[LayerStatistics]:
    """Of every layer of a phase, for every input."""
    names = [one.name for one in profile.layers_of(phase)]
    return [one.statistics[name] for one in profile.inputs for name in names if name in one.statistics]


def _percent(values: Sequence[float]) -> str:
    return f"{_range([100 * value for value in values], 0)} %"


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{one:.{digits}f}" for one in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
