"""Presets for machines that people have: digits, CIFAR-sized images, and a person's own photographs."""

from __future__ import annotations

from ml.config import (
    ImageConfig,
    IterationConfig,
    LabelingConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    Recipe,
    RuntimeConfig,
    ScheduleConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)


def digits() -> Recipe:
    """scikit-learn's handwritten digits on a CPU: 38 400 images through each network, about half a minute on one core.

    Made for 5 training and 5 validation labels a class; docs/experiments/digits.md holds the measured table.
    """
    network = NetworkConfig(architecture="test_resnet")
    noise = NoiseConfig(randaugment_operations=2, randaugment_magnitude=9, dropout=0.1)
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=5e-4)
    teacher = TrainingConfig(steps=800, batch_size=48, ema_decay=0.99, optimizer=optimizer, evaluate_every_steps=80)
    student = TrainingConfig(steps=400, batch_size=24, ema_decay=0.99, optimizer=optimizer, evaluate_every_steps=40)
    return Recipe(
        name="digits",
        image=ImageConfig(size=32, small_images=True, flip=False, padding=3, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35), crop_ratio=1.0),
        validation_ratio=0.5,
        teacher=TeacherConfig(network=network, noise=noise, training=teacher),
        students=(StudentConfig(network=network, noise=noise, training=student, ratio=3),),
        labeling=LabelingConfig(shard_size=512),
        iterations=IterationConfig(count=2, control=True),
        # A step takes some 30 ms: a second thread would mostly wait for the first, and for whatever else the machine does.
        runtime=RuntimeConfig(num_threads=1),
    )


def small_32px() -> Recipe:
    """CIFAR-sized photographs on a CPU: 768 000 images through each network, a few minutes on one core.

    The small network with its 16-wide deep stem, SGD, cosine and RandAugment M = 9; dropout stays small and there is no stochastic
    depth, which tiny networks do not bear.
    """
    network = NetworkConfig(architecture="test_resnet")
    noise = NoiseConfig(randaugment_operations=2, randaugment_magnitude=9, dropout=0.1)
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=5e-4)
    teacher = TrainingConfig(steps=3000, batch_size=256, ema_decay=0.998, optimizer=optimizer)
    student = TrainingConfig(steps=3000, batch_size=64, ema_decay=0.998, optimizer=optimizer)
    return Recipe(
        name="small-32px",
        image=ImageConfig(size=32, small_images=True, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), crop_ratio=1.0),
        teacher=TeacherConfig(network=network, noise=noise, training=teacher),
        students=(StudentConfig(network=network, noise=noise, training=student, ratio=3),),
        labeling=LabelingConfig(batch_size=256),
        iterations=IterationConfig(count=2),
    )


def photos_224() -> Recipe:
    """A person's own photographs: EfficientNet-B0 at 224 px, from scratch unless `initial_weights` names something better."""
    network = NetworkConfig(architecture="efficientnet_b0")
    noise = NoiseConfig(randaugment_operations=2, randaugment_magnitude=9, dropout=0.2, stochastic_depth=0.2)
    optimizer = OptimizerConfig(name="adamw", learning_rate=2e-3, weight_decay=0.02)
    training = TrainingConfig(
        epochs=120,
        batch_size=32,
        ema_decay=0.9995,
        label_smoothing=0.1,
        clip_norm=5.0,
        optimizer=optimizer,
        schedule=ScheduleConfig(name="cosine", warmup_ratio=0.05),
    )
    return Recipe(
        name="photos-224",
        image=ImageConfig(size=224),
        teacher=TeacherConfig(network=network, noise=noise, training=training),
        students=(StudentConfig(network=network, noise=noise, training=training, ratio=3),),
        labeling=LabelingConfig(batch_size=16),
        iterations=IterationConfig(count=3),
    )
