"""The branches' training criteria: cross entropy and the losses of gates."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.models._cross_entropy import label_smoothed_cross_entropy
from fairseq_moe_opt.models._losses import GateLosses, collect_gate_losses

COMBINE_METHODS = ("average", "sum")
TRANSFORMS = ("none", "neg_log")


@dataclass
class MoECrossEntropyConfig(CrossEntropyCriterionConfig):
    """Cross entropy with the gates' load-balancing loss."""

    moe_gate_loss_wt: float = field(default=1.0, metadata={"help": "weight of the load-balancing loss"})
    moe_gate_loss_combine_method: str = field(default="average", metadata={"help": "average or sum over layers"})
    moe_gate_loss_transform: str = field(default="none", metadata={"help": "none, or neg_log of the combined loss"})


@dataclass
class MoELabelSmoothedCrossEntropyConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Label-smoothed cross entropy with the load-balancing loss and the loss of CMR gates."""

    moe_gate_loss_wt: float = field(default=0.0, metadata={"help": "weight of the load-balancing loss"})
    moe_gate_loss_combine_method: str = field(default="average", metadata={"help": "average or sum over layers"})
    moe_gate_loss_transform: str = field(default="none", metadata={"help": "none, or neg_log of the combined loss"})
    cmr_gate_loss_p: float = field(default=1.0, metadata={"help": "share of tokens that CMR should send to experts"})
    cmr_gate_loss_wt: float = field(default=0.0, metadata={"help": "weight of the distance from that share"})
    moe_cmr_xgpu: bool = field(default=False, metadata={"help": "accepted: the share is of this process's tokens"})


def combined_gate_loss(losses: Sequence[Tensor], method: str, transform: str) -> Tensor | None:
    """The layers' ``l_aux`` as one 0-dim loss; None without layers. ``method`` and ``transform`` as the flags."""
    if not losses:
        return None
    total = torch.stack([loss.float() for loss in losses]).sum()
    if method == "average":
        total = total / len(losses)
    return -torch.log(total) if transform == "neg_log" else total


def cmr_gate_loss(losses: GateLosses, share: float) -> Tensor | None:
    """|mean gate over real tokens of all CMR layers - ``share``|, 0-dim; None without CMR layers."""
    if not losses.cmr_share:
        return None
    tokens = sum(torch.as_tensor(count, device=losses.cmr_share[0].device) for count in losses.cmr_tokens)
    return (torch.stack([part.float() for part in losses.cmr_share]).sum() / tokens - share).abs()


def quick_attention(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Attention whose backward pass is quick: torch's flash attention takes six times as long in bfloat16 on CPU."""
    weight = next(model.parameters())
    slow = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


class _GateLossCriterion:
    """Adds the gates' losses to what another criterion gives; comes before it among the bases."""

    def set_gate_losses(
        self, weight: float, method: str, transform: str, cmr_share: float = 1.0, cmr_weight: float = 0.0
    ) -> None:
        """Check and keep the flags; OptionError for one that does not exist."""
        for name, value, known in (("combine_method", method, COMBINE_METHODS), ("transform", transform, TRANSFORMS)):
            if value not in known:
                raise OptionError(f"moe_gate_loss_{name}", f"{value!r} is not one of {', '.join(known)}")
        self._weight, self._method, self._transform = weight, method, transform
        self._cmr_share, self._cmr_weight = cmr_share, cmr_weight

    def forward(self, model: Any, sample: Mapping[str, Any], reduce: bool = True) -> tuple[Tensor, Any, dict[str, Any]]:
        """fairseq's three: loss, sample size, values to log (``inner_loss`` is the loss without the gates')."""
        with collect_gate_losses() as losses, quick_attention(model):
            loss, sample_size, logging = super().forward(model, sample, reduce)  # type: ignore[misc]
        logging["inner_loss"] = loss.data
        gate = combined_gate_loss(losses.balance, self._method, self._transform)
        conditional = cmr_gate_loss(losses, self._cmr_share)
        for name, part, weight in (("moe", gate, self._weight), ("cmr", conditional, self._cmr_weight)):
            if part is not None:
                logging[f"{name}_gate_loss"] = part.data * sample_size
                loss = loss + weight * sample_size * part
        logging["loss"] = loss.data
        return loss, sample_size, logging

    @staticmethod
    def log_gate_losses(logging_outputs: Sequence[Mapping[str, Any]]) -> None:
        """Means a unit of sample size; the inner loss in bits."""
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        for name, unit in (("inner_loss", math.log(2)), ("moe_gate_loss", 1.0), ("cmr_gate_loss", 1.0)):
            found = [log[name] for log in logging_outputs if name in log]
            if found and sample_size:
                metrics.log_scalar(name, sum(found) / sample_size / unit, sample_size, round=4)


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(_GateLossCriterion, CrossEntropyCriterion):
    """loss = CE + weight * sample_size * combine(l_aux of every layer), as in both branches."""

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        moe_gate_loss_transform: str,
    ) -> None:
        super().__init__(task, sentence_avg)
        self.set_gate_losses(moe_gate_loss_wt, moe_gate_loss_combine_method, moe_gate_loss_transform)

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Mapping[str, Any]]) -> None:
        """fairseq's values and the gates'."""
        CrossEntropyCriterion.reduce_metrics(logging_outputs)
        cls.log_gate_losses(logging_outputs)


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyConfig)
class MoELabelSmoothedCrossEntropyCriterion(_GateLossCriterion, LabelSmoothedCrossEntropyCriterion):
    """The same over smoothed labels, plus cmr_weight * sample_size * |mean CMR gate - share|, as in ``nllb``."""

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        label_smoothing: float,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        moe_gate_loss_transform: str,
        cmr_gate_loss_p: float,
        cmr_gate_loss_wt: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
    ) -> None:
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.set_gate_losses(
            moe_gate_loss_wt,
            moe_gate_loss_combine_method,
            moe_gate_loss_transform,
            cmr_gate_loss_p,
            cmr_gate_loss_wt,
        )

    def compute_loss(
        self, model: Any, net_output: Any, sample: Mapping[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """fairseq's two losses, in one pass over the logits where they are logits and a sum is wanted."""
        if not reduce or getattr(model, "adaptive_softmax", None) is not None:
            losses: tuple[Tensor, Tensor] = super().compute_loss(model, net_output, sample, reduce)
            return losses
        target = model.get_targets(sample, net_output).clone()
        # Skipping them among the targets spares a copy of all logits.
        target[:, : self.ignore_prefix_size] = self.padding_idx
        return label_smoothed_cross_entropy(net_output[0].flatten(0, 1), target.flatten(), self.eps, self.padding_idx)

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[Mapping[str, Any]]) -> None:
        """fairseq's values and the gates'."""
        LabelSmoothedCrossEntropyCriterion.reduce_metrics(logging_outputs)
        cls.log_gate_losses(logging_outputs)
