"""How much accuracy is left when the pixels are changed against a network: FGSM and PGD.

Both move pixels in [0, 1], before normalization, by at most epsilon each (L∞), and know the network's gradient (white box).
Sources: Goodfellow et al. 2015 (arXiv 1412.6572), Madry et al. 2018 (arXiv 1706.06083). The network stands in eval mode, the
result depends on the seed and each image's index, and it says everything that decides how strong the attack was.

N images, H W rows and columns, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ml.determinism import generator_for
from ml.devices import translate_oom
from ml.errors import DataError
from ml.pixels import Preprocessing
from ml.robustness.corruptions import check_images
from ml.validation import check_annotations

EPSILONS = tuple(levels / 255 for levels in (2, 4, 8, 16))
"""Of the paper's FGSM sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One attack, with everything that decides how strong it is."""

    name: Literal["fgsm", "pgd"]
    epsilon: Annotated[float, Interval(ge=0, le=1)]
    """How far a value of a pixel in [0, 1] may move."""
    num_steps: Annotated[int, Interval(ge=1)] = 1
    step_size: Annotated[float, Interval(ge=0, le=1)]
    """How far it moves a step."""
    num_restarts: Annotated[int, Interval(ge=1)] = 1
    """Times that the attack is tried; an image counts as wrong when one try succeeded."""
    random_start: bool = False
    """Begin at a random place within epsilon instead of at the image."""
    targeted: bool = False
    """Towards a class that is drawn for each image among the wrong ones, instead of away from its label."""

    def __post_init__(self) -> None:
        check_annotations(self)


def fgsm(epsilon: float) -> Attack:
    """One step of epsilon along the sign of the gradient."""
    return Attack(name="fgsm", epsilon=epsilon, step_size=epsilon)


def pgd(
    epsilon: float = 16 / 255, *, num_steps: int = 10, step_size: float | None = None, num_restarts: int = 1, targeted: bool = False
) -> Attack:
    """Many small steps, each back into the ball around the image, from a random start.

    The paper takes 10 steps at epsilon 16/255 and does not state the rest; the step is 2.5 * epsilon / steps by default, so that
    the far side of the ball can be reached (Madry et al.).
    """
    size = 2.5 * epsilon / num_steps if step_size is None else step_size
    return Attack(
        name="pgd",
        epsilon=epsilon,
        num_steps=num_steps,
        step_size=size,
        num_restarts=num_restarts,
        random_start=True,
        targeted=targeted,
    )


def attack_all(
    network: nn.Module,
    images_NHWC: NDArray[np.uint8],
    labels_N: NDArray[np.integer[Any]],
    preprocessing: Preprocessing,
    attacks: Sequence[Attack],
    *,
    num_classes: int,
    seed: int,
    batch_size: int = 64,
) -> list[dict[str, Any]]:
    """One result an attack: its fields, `seed`, `num_images`, `clean_accuracy`, `accuracy` under attack, `loss` and `clean_loss`.

    Losses are mean cross-entropies against the labels, in nats, of the tries that hurt most. A targeted attack also says
    `hit_ratio`, the share of images that became their target. `images_NHWC` are weak views; the index of an image is its row.
    """
    check_images(images_NHWC, range(len(images_NHWC)))
    if len(labels_N) != len(images_NHWC) or len(labels_N) == 0:
        raise DataError(f"an attack needs images with a label each, got {len(images_NHWC)} images and {len(labels_N)} labels")
    if any(module.training for module in network.modules()):
        raise ValueError("the network is in train mode and would be attacked with its noise: call eval() first")
    device = next(network.parameters()).device
    pixels = _Pixels(network, preprocessing, device)
    found: list[list[dict[str, NDArray[Any]]]] = [[] for _ in attacks]
    with _without_gradients_of(network):
        for start in range(0, len(images_NHWC), batch_size):
            part = slice(start, start + batch_size)
            rows = range(start, min(start + batch_size, len(images_NHWC)))
            clean_NCHW = torch.from_numpy(np.ascontiguousarray(images_NHWC[part].transpose(0, 3, 1, 2))).to(device).float() / 255
            labels = torch.from_numpy(np.asarray(labels_N[part], np.int64)).to(device)
            with translate_oom(f"a batch of {len(rows)} images under attack"):
                for results, attack in zip(found, attacks, strict=True):
                    results.append(_attack_batch(pixels, clean_NCHW, labels, attack, rows, num_classes=num_classes, seed=seed))
    return [_summary(attack, batches, seed) for attack, batches in zip(attacks, found, strict=True)]


def perturbed(
    network: nn.Module,
    clean_NCHW: Tensor,
    labels_N: Tensor,
    preprocessing: Preprocessing,
    attack: Attack,
    *,
    num_classes: int,
    seed: int,
    restart: int = 0,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """The attacked pixels in [0, 1], at most epsilon from `clean_NCHW`: one try. Labels become targets when the attack has some."""
    pixels = _Pixels(network, preprocessing, clean_NCHW.device)
    indices = range(len(clean_NCHW)) if rows is None else rows
    goals_N = _targets(labels_N, indices, num_classes=num_classes, seed=seed) if attack.targeted else labels_N
    with _without_gradients_of(network):
        return _one_try(pixels, clean_NCHW, goals_N, attack, indices, seed=seed, restart=restart)


class _Pixels:
    """A network that takes pixels in [0, 1]."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, device: torch.device) -> None:
        self._network = network
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)

    def __call__(self, pixels_NCHW: Tensor) -> Tensor:
        logits_NK: Tensor = self._network((pixels_NCHW - self._mean) / self._std)
        return logits_NK.float()


@contextmanager
def _without_gradients_of(network: nn.Module) -> Iterator[None]:
    """Within the block only the pixels get gradients, not the weights."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _attack_batch(
    pixels: _Pixels, clean_NCHW: Tensor, labels_N: Tensor, attack: Attack, rows: Sequence[int], *, num_classes: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Per image: correct and loss, clean and at the worst try; whether the target was hit."""
    goals_N = _targets(labels_N, rows, num_classes=num_classes, seed=seed) if attack.targeted else labels_N
    with torch.no_grad():
        clean_NK = pixels(clean_NCHW)
    correct_N = clean_NK.argmax(dim=-1) == labels_N
    clean_losses_N = functional.cross_entropy(clean_NK, labels_N, reduction="none")
    survives_N, hit_N, losses_N = torch.ones_like(correct_N), torch.zeros_like(correct_N), torch.full_like(clean_losses_N, -torch.inf)
    for restart in range(attack.num_restarts):
        moved_NCHW = _one_try(pixels, clean_NCHW, goals_N, attack, rows, seed=seed, restart=restart)
        with torch.no_grad():
            logits_NK = pixels(moved_NCHW)
        predicted_N = logits_NK.argmax(dim=-1)
        survives_N &= predicted_N == labels_N
        hit_N |= predicted_N == goals_N
        losses_N = torch.maximum(losses_N, functional.cross_entropy(logits_NK, labels_N, reduction="none"))
    values = {"clean": correct_N, "correct": survives_N, "hit": hit_N, "clean_loss": clean_losses_N, "loss": losses_N}
    return {name: value.cpu().numpy() for name, value in values.items()}


def _one_try(
    pixels: _Pixels, clean_NCHW: Tensor, goals_N: Tensor, attack: Attack, rows: Sequence[int], *, seed: int, restart: int
) -> Tensor:
    low_NCHW, high_NCHW = (clean_NCHW - attack.epsilon).clamp_min(0), (clean_NCHW + attack.epsilon).clamp_max(1)
    moved_NCHW = clean_NCHW
    if attack.random_start:
        shape = tuple(clean_NCHW.shape[1:])
        start_NCHW = np.stack([generator_for(seed, "attack", restart, row).uniform(-1, 1, shape).astype(np.float32) for row in rows])
        moved_NCHW = torch.clamp(clean_NCHW + attack.epsilon * torch.from_numpy(start_NCHW).to(clean_NCHW.device), low_NCHW, high_NCHW)
    direction = -1 if attack.targeted else 1
    for _ in range(attack.num_steps):
        variable_NCHW = moved_NCHW.detach().requires_grad_()
        with torch.enable_grad():
            # Summed, not averaged: an image's gradient is its own, however large the batch.
            loss = functional.cross_entropy(pixels(variable_NCHW), goals_N, reduction="sum")
            [gradient_NCHW] = torch.autograd.grad(loss, variable_NCHW)
        moved_NCHW = torch.clamp(moved_NCHW.detach() + direction * attack.step_size * gradient_NCHW.sign(), low_NCHW, high_NCHW)
    return moved_NCHW.detach()


def _targets(labels_N: Tensor, rows: Sequence[int], *, num_classes: int, seed: int) -> Tensor:
    """A wrong class for each image."""
    if num_classes < 2:
        raise DataError(f"a targeted attack needs another class to aim at, this network knows {num_classes}")
    steps = [int(generator_for(seed, "target", row).integers(1, num_classes)) for row in rows]
    return (labels_N + torch.tensor(steps, device=labels_N.device)) % num_classes


def _summary(attack: Attack, batches: Sequence[dict[str, NDArray[Any]]], seed: int) -> dict[str, Any]:
    values = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    result = {
        **asdict(attack),
        "norm": "linf",
        "seed": seed,
        "num_images": len(values["correct"]),
        "clean_accuracy": float(values["clean"].mean()),
        "accuracy": float(values["correct"].mean()),
        "clean_loss": float(values["clean_loss"].mean()),
        "loss": float(values["loss"].mean()),
    }
    return result | ({"hit_ratio": float(values["hit"].mean())} if attack.targeted else {})
