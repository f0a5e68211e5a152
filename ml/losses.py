"""What the student minimizes. B labeled and U pseudo-labeled images of a step, K classes; all losses are in nats."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import functional

LossName = Literal["sum", "concat", "ratio"]


class StepLoss(NamedTuple):
    """The loss that is minimized, and the two means it is made of (the second is 0 without pseudo-labels)."""

    total: Tensor
    labeled: Tensor
    unlabeled: Tensor


def labeled_cross_entropy(logits_BK: Tensor, labels_B: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy against class indices, `smoothing` of each target spread evenly over all K classes."""
    return functional.cross_entropy(logits_BK.float(), labels_B, label_smoothing=smoothing)


def soft_cross_entropy(logits_UK: Tensor, targets_UK: Tensor) -> Tensor:
    """Mean cross-entropy against one target distribution per image.

    Each row of `targets_UK` sums to 1; a one-hot row gives the ordinary cross-entropy. No gradient reaches the targets.
    """
    return -(targets_UK.detach() * functional.log_softmax(logits_UK.float(), dim=-1)).sum(dim=-1).mean()


def sharpen(probs_UK: Tensor, temperature: float) -> Tensor:
    """p^(1/T) / sum p^(1/T): peakier below 1, flatter above, unchanged at 1."""
    if temperature == 1:
        return probs_UK
    # Divided by its largest first, so that a small temperature cannot drive a whole row to 0.
    powers_UK = (probs_UK / probs_UK.amax(dim=-1, keepdim=True)) ** (1 / temperature)
    return powers_UK / powers_UK.sum(dim=-1, keepdim=True)


def pseudo_label_cross_entropy(
    logits_UK: Tensor, probs_UK: Tensor, *, kind: Literal["soft", "hard"], temperature: float = 1.0, smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy against the teacher's guesses: the sharpened distribution, or its largest class smoothed.

    Smoothing never touches soft labels: they are smooth already.
    """
    if kind == "hard":
        return labeled_cross_entropy(logits_UK, probs_UK.argmax(dim=-1), smoothing=smoothing)
    return soft_cross_entropy(logits_UK, sharpen(probs_UK, temperature))


def distillation(logits_NK: Tensor, probs_NK: Tensor, *, temperature: float) -> Tensor:
    """T^2 x mean KL(teacher || student), both softened by T; `probs_NK` are the teacher's at temperature 1.

    The gradient of a softened cross-entropy falls as 1/T^2 (Hinton et al. 2015, section 2); the factor makes up for it.
    """
    targets_NK = sharpen(probs_NK.detach(), temperature)
    logs_NK = functional.log_softmax(logits_NK.float() / temperature, dim=-1)
    return temperature**2 * functional.kl_div(logs_NK, targets_NK, reduction="batchmean")


def combine(name: LossName, mean_L: Tensor, mean_U: Tensor, ratio: float) -> Tensor:
    """Add the two means the way `name` says; `ratio` is r, the pseudo-labeled images for each labeled one."""
    if name == "sum":
        return mean_L + mean_U
    if name == "ratio":
        return mean_L + ratio * mean_U
    return (mean_L + ratio * mean_U) / (1 + ratio)
