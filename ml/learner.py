"""What a training changes: the network, its average and the optimizer's state, and the one step that changes them.

B labeled and U pseudo-labeled images of a step, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ml import losses
from ml.checkpoints import State
from ml.config import NoiseConfig, RuntimeConfig, StudentConfig, TeacherConfig
from ml.data import Batch
from ml.determinism import torch_seed
from ml.devices import autocast, shield_small_convolutions, translate_oom
from ml.ema import EmaWeights
from ml.losses import StepLoss
from ml.model_noise import Rows, built_noise, differs, split_rows
from ml.normalization import Normalization
from ml.optimizers import build_optimizer, set_learning_rate
from ml.pixels import Preprocessing
from ml.schedules import TrainingPlan, ema_decay_at, learning_rate_at, noised_ratio_at
from ml.tasks import Role


class Loss(NamedTuple):
    """The losses of one step, on the host."""

    total: float
    labeled: float
    unlabeled: float


class Learner:
    """A network in training. Equal arguments, batches and steps give equal bits, whether or not it was saved and loaded between.

    `training_side` is the side of the training images in pixels.
    """

    def __init__(
        self,
        network: nn.Module,
        config: TeacherConfig | StudentConfig,
        plan: TrainingPlan,
        *,
        role: Role,
        preprocessing: Preprocessing,
        training_side: int,
        runtime: RuntimeConfig,
        seed: int,
    ) -> None:
        device = torch.device(runtime.device)
        self.network = network.to(device=device).to(memory_format=torch.channels_last).train()
        self._rows = _split_rows(self.network, config, role, device)
        self.ema = EmaWeights(self.network)
        shield_small_convolutions(self.network, runtime, side=training_side)
        self.optimizer = build_optimizer(self.network, config.training.optimizer)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self.network) if runtime.compile else self.network
        self._config = config
        self._plan = plan
        self._runtime = runtime
        self._seed = seed
        self._device = device
        self._normalize = Normalization(preprocessing, device)
        self._recent: list[Tensor] = []

    def step(self, step: int, batch: Batch) -> None:
        """Make update number `step` (from 0) with this batch: forward, backward, clip, optimizer, average."""
        training = self._config.training
        set_learning_rate(self.optimizer, self.learning_rate(step))
        parts = list(self._micro_batches(batch))
        recent = torch.zeros(3, device=self._device)
        for index, part in enumerate(parts):
            # Model noise is named by its step, so that no generator's state has to survive a kill.
            torch.manual_seed(torch_seed(self._seed, "model noise", step, index))
            with translate_oom(f"a micro-batch of {len(part.images)} images"):
                loss = self._loss(part, step)
                (loss.total / len(parts)).backward()  # type: ignore[no-untyped-call]
            recent += torch.stack([value.detach() for value in loss]) / len(parts)
        # Kept on the device: asking for a number here would make the host wait for every step.
        self._recent.append(recent)
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(ema_decay_at(training.ema_decay, step))

    def learning_rate(self, step: int) -> float:
        """The rate of update number `step`."""
        return learning_rate_at(self._plan, self._config.training.schedule, step)

    def recent_losses(self) -> list[Loss]:
        """The losses of the steps since the last call, in order. Waits for the device."""
        found = [Loss(*values) for values in torch.stack(self._recent).tolist()] if self._recent else []
        self._recent.clear()
        return found

    def is_finite(self) -> bool:
        """Whether every weight of network and average is a number. Waits for the device."""
        weights = [*self.network.state_dict().values(), *self.ema.network.state_dict().values()]
        largest = [weight.abs().max() for weight in weights if weight.is_floating_point()]
        return bool(torch.isfinite(torch.stack(largest)).all())

    def state(self) -> State:
        """Everything that the next step depends on."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: State) -> None:
        """Go on from `state`."""
        self.network.load_state_dict(state["network"])
        self.ema.network.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _micro_batches(self, batch: Batch) -> Iterator[_Part]:
        """The batch in `accumulation` parts, each with its share of labeled and of pseudo-labeled images, labeled first."""
        count = self._config.training.accumulation
        images = batch.images.to(self._device, non_blocking=True)
        labels_B = batch.labels_B.to(self._device, non_blocking=True)
        soft_BK, soft_UK = (None if soft is None else soft.to(self._device, non_blocking=True) for soft in (batch.soft_BK, batch.soft_UK))
        if count == 1:
            yield _Part(images, labels_B, soft_BK, soft_UK)
            return
        of_labeled, of_unlabeled = images[: len(labels_B)], images[len(labels_B) :]
        for index in range(count):
            labeled, unlabeled = _share(of_labeled, index, count), _share(of_unlabeled, index, count)
            shares = [None if soft is None else _share(soft, index, count) for soft in (soft_BK, soft_UK)]
            yield _Part(torch.cat([labeled, unlabeled]), _share(labels_B, index, count), *shares)

    def _loss(self, part: _Part, step: int) -> StepLoss:
        """Forward of labeled and pseudo-labeled images together, so that batch norm sees the mixed batch; then the loss."""
        num_labeled = len(part.labels_B)
        if self._rows is not None and isinstance(self._config, StudentConfig):
            unlabeled_steps, fade_ratio = self._plan.unlabeled_steps, self._config.unlabeled_noise_fade_ratio
            self._rows.set(num_labeled, noised_ratio_at(unlabeled_steps.stop, fade_ratio, min(step, unlabeled_steps.stop)))
        with autocast(self._runtime):
            logits = self._forward(self._normalize(part.images.permute(0, 2, 3, 1)))
        zero = torch.zeros((), device=self._device)
        mean_L = self._labeled_loss(logits[:num_labeled], part) if num_labeled else zero
        if part.soft_UK is None or not isinstance(self._config, StudentConfig):
            return StepLoss(mean_L, mean_L.detach(), zero)
        mean_U = self._unlabeled_loss(logits[num_labeled:], part.soft_UK, self._config)
        total = losses.combine(self._config.loss, mean_L, mean_U, self._config.ratio) if num_labeled else mean_U
        return StepLoss(total, mean_L, mean_U)

    def _labeled_loss(self, logits_BK: Tensor, part: _Part) -> Tensor:
        """Cross-entropy with the labels; of a distilled student mixed with what its teacher says of the images."""
        of_labels = losses.labeled_cross_entropy(logits_BK, part.labels_B, smoothing=self._config.training.label_smoothing)
        if part.soft_BK is None or not isinstance(self._config, StudentConfig) or self._config.distillation is None:
            return of_labels
        alpha, temperature = self._config.distillation.labels_ratio, self._config.distillation.temperature
        return alpha * of_labels + (1 - alpha) * losses.distillation(logits_BK, part.soft_BK, temperature=temperature)

    def _unlabeled_loss(self, logits_UK: Tensor, soft_UK: Tensor, student: StudentConfig) -> Tensor:
        if student.distillation is not None:
            return losses.distillation(logits_UK, soft_UK, temperature=student.distillation.temperature)
        smoothing = self._config.training.label_smoothing
        return losses.pseudo_label_cross_entropy(
            logits_UK, soft_UK, kind=student.pseudo_labels, temperature=student.temperature, smoothing=smoothing
        )


def noise_of_network(config: TeacherConfig | StudentConfig, role: Role) -> NoiseConfig:
    """The model noise that the network is to be built with."""
    unlabeled = _unlabeled_noise(config, role)
    return config.noise if unlabeled is None else built_noise(config.noise, unlabeled)


def _unlabeled_noise(config: TeacherConfig | StudentConfig, role: Role) -> NoiseConfig | None:
    """That of pseudo-labeled images, where one rate for all images of a step cannot serve."""
    if role != "student" or not isinstance(config, StudentConfig):
        return None
    unlabeled = config.unlabeled_noise or config.noise
    return unlabeled if differs(config.noise, unlabeled, config.unlabeled_noise_fade_ratio) else None


def _split_rows(network: nn.Module, config: TeacherConfig | StudentConfig, role: Role, device: torch.device) -> Rows | None:
    unlabeled = _unlabeled_noise(config, role)
    return None if unlabeled is None else split_rows(network, config.noise, unlabeled, device)


class _Part(NamedTuple):
    """One micro-batch on the device; `images` are uint8 [B + U, C, H, W], the labeled ones first."""

    images: Tensor
    labels_B: Tensor
    soft_BK: Tensor | None
    soft_UK: Tensor | None


def _share(values: Tensor, index: int, count: int) -> Tensor:
    size = len(values) // count
    return values[index * size : (index + 1) * size]
