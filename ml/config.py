"""Every knob, documented and validated, as frozen dataclasses without torch.

These dataclasses are the API's schema too: Pydantic reads them, `__pydantic_config__` makes unknown keys errors, the string
under a field becomes its OpenAPI description, and `Interval` annotations become the ranges of the 422. For plain Python use
`__post_init__` enforces the same annotations through `ml.validation`.

An *epoch* is one pass over the labeled training images, as in the paper; a *step* is one optimizer update.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len

from ml.errors import RecipeError
from ml.validation import check_annotations

PYDANTIC_CONFIG: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}


class Checked:
    """Validates every annotated field on construction; raises RecipeError naming the field and its value."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_annotations(self)
        self.check()

    def check(self) -> None:
        """Refuse combinations of fields that make no sense together; each range is checked before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig(Checked):
    """What an image is before the network sees it: size, weak view, normalization."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    size: Annotated[int, Interval(ge=8, le=1024)] = 224
    """Side in pixels of the square that the network is trained on."""
    evaluation_size: Annotated[int, Interval(ge=8, le=1024)] | None = None
    """Side in pixels for evaluation, labeling and serving; None means `size`."""
    crop_ratio: Annotated[float, Interval(gt=0, le=1)] = 0.875
    """Evaluation resizes the shorter side to evaluation size / crop ratio and cuts the center. 1 squeezes nothing away."""
    small_images: bool = False
    """The 32-pixel path: evaluation resizes straight to the square, training pads by reflection and crops at random."""
    flip: bool = True
    """Mirror training images at random. Off where a mirrored image is another class (digits, signs)."""
    padding: Annotated[int, Interval(ge=0, le=64)] = 4
    """Small images only: pixels of reflected border before the random crop."""
    min_crop_area: Annotated[float, Interval(gt=0, le=1)] = 0.08
    """Large images only: smallest share of the image that a random-resized crop may keep."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean in [0, 1] that is subtracted on the device (ImageNet's by default)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation in [0, 1] that the image is divided by on the device."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Pillow's filter for every resize, in training, labeling, evaluation and serving."""

    def check(self) -> None:
        if min(self.std) <= 0:
            raise RecipeError(f"std {self.std} must be above 0 in every channel", pointer="/std")


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig(Checked):
    """The noise that a student learns with. Everything at 0 is a student without noise (crop and flip included)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    randaugment_operations: Annotated[int, Interval(ge=0, le=8)] = 2
    """Operations drawn per image, uniformly with replacement and always applied; 0 turns RandAugment off."""
    randaugment_magnitude: Annotated[float, Interval(ge=0, le=40)] = 9
    """Strength on the paper's scale, where 10 is the reference and 27 is what B7 and L2 use."""
    translate_pixels: Annotated[float, Interval(ge=0, le=512)] | None = None
    """Translation at magnitude 10. None: 100 px at 224 px and above, image size // 8 below 64, linear in between."""
    cutout_pixels: Annotated[float, Interval(ge=0, le=512)] | None = None
    """Half side of RandAugment's Cutout at magnitude 10. None: 40 px at 224 and above, image size // 8 below 64."""
    extra_cutout_pixels: Annotated[int, Interval(ge=0, le=512)] = 0
    """Side of one more gray square put on every image after RandAugment (16 in the paper's 32-pixel path)."""
    crop_and_flip: bool = True
    """Random crop and, where the image config allows it, flip. Off: the student trains on the weak view."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Probability of dropping a feature before the classifier."""
    stochastic_depth: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Probability of skipping the last residual block; linear from 0 at the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig(Checked):
    """Which network, and what it starts from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    architecture: Annotated[str, Len(1, 100)] = "efficientnet_b0"
    """A timm model name without a pretrained tag, for example `efficientnet_b0` or `resnet50`."""
    initial_weights: Annotated[str, Len(1, 500)] | None = None
    """None: from scratch. `timm:NAME.TAG`: that pretrained tag (never untagged). `local-dir:PATH`: a timm folder. `generation:ID`: one
    that this service holds. `teacher`: warm start from the iteration's teacher (same architecture)."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further keyword arguments of `timm.create_model`, for example `{"stem_width": 16}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Checked):
    """How gradients move weights."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    name: Literal["sgd", "adamw", "rmsprop_tf"] = "sgd"
    """`rmsprop_tf` is the paper's: TensorFlow's RMSProp with decay 0.9 and epsilon 1e-3 inside the root."""
    learning_rate: Annotated[float, Interval(gt=0, le=100)] = 0.1
    """Peak learning rate at `reference_batch` labeled images a step."""
    reference_batch: Annotated[int, Interval(ge=1, le=65536)] | None = None
    """The learning rate scales with batch_size / reference_batch; None takes it as it is. The paper: 0.016 at 256."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Momentum (beta1 for adamw)."""
    nesterov: bool = True
    """Nesterov's momentum; sgd only."""
    weight_decay: Annotated[float, Interval(ge=0, le=1)] = 5e-4
    """L2 for sgd and rmsprop_tf, decoupled for adamw; never on batch-norm or biases (timm's parameter groups)."""
    epsilon: Annotated[float, Interval(gt=0, le=1)] | None = None
    """None: 1e-3 for rmsprop_tf (the paper's), 1e-8 for adamw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Checked):
    """How the learning rate changes; evaluated per step."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    name: Literal["cosine", "step", "constant"] = "cosine"
    """`step` is the paper's staircase: x decay_rate every decay_epochs."""
    warmup_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.05
    """Share of all steps with a linearly rising rate (the paper: 5 of 350 epochs)."""
    decay_rate: Annotated[float, Interval(gt=0, le=1)] = 0.97
    """Factor of one stair; `step` only."""
    decay_epochs: Annotated[float, Interval(gt=0, le=10000)] = 2.4
    """Epochs a stair lasts; `step` only (the paper: 2.4 of 350 epochs, 4.8 of 700)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(Checked):
    """How long and in what portions one network is trained."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    epochs: Annotated[float, Interval(gt=0, le=100000)] | None = None
    """Passes over the labeled training images. Exactly one of epochs and steps is given."""
    steps: Annotated[int, Interval(ge=1, le=100_000_000)] | None = None
    """Optimizer updates. Exactly one of epochs and steps is given."""
    batch_size: Annotated[int, Interval(ge=1, le=65536)] = 64
    """Labeled images a step (B). A student adds ratio x B pseudo-labeled ones; the control takes (1 + ratio) x B labeled ones."""
    accumulation: Annotated[int, Interval(ge=1, le=1024)] = 1
    """Micro-batches a step; each holds its share of labeled and pseudo-labeled images."""
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Applies to labels and hard pseudo-labels, never to soft ones (the paper: 0.1)."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """Ceiling of the weights' exponential moving average, warmed up as min(decay, (1+t)/(10+t)); 0 turns it off."""
    clip_norm: Annotated[float, Interval(gt=0, le=1e6)] | None = None
    """Largest norm of all gradients together; None does not clip."""
    evaluate_every_steps: Annotated[int, Interval(ge=1)] | None = None
    """Steps between looks at validation, which choose the best checkpoint; None: twenty looks a training."""
    checkpoint_every_seconds: Annotated[float, Interval(gt=0, le=86400)] = 60.0
    """Longest stretch of work that a kill can cost."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its peak learning rate."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate changes."""

    def check(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise RecipeError(
                f"exactly one of epochs and steps is needed, got epochs={self.epochs} and steps={self.steps}", pointer="/epochs"
            )
        if self.batch_size % self.accumulation:
            raise RecipeError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}", pointer="/accumulation")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig(Checked):
    """Generation 0: trained on the labeled images alone, with noise of its own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Which network."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The noise that it learns with."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=100))
    """How long and in what portions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig(Checked):
    """Knowledge distillation (Hinton et al. 2015): the student imitates the teacher's softened distributions, on labeled images too."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    temperature: Annotated[float, Interval(gt=0, le=100)] = 4.0
    """T, which divides the logits of both; the loss is multiplied by its square, so that its gradient does not fade with it."""
    labels_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Alpha: the loss of a labeled image is alpha x cross-entropy with its label + (1 - alpha) x distillation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Checked):
    """One iteration's student: trained with noise on labeled and pseudo-labeled images together."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Which network; equal to or larger than the teacher's in the paper."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The noise on labeled images, and on pseudo-labeled ones unless `unlabeled_noise` is another."""
    unlabeled_noise: NoiseConfig | None = None
    """The noise on pseudo-labeled images alone, as in the paper's ablation; None: that of labeled ones."""
    unlabeled_noise_fade_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Share of all steps, the last ones, over which the noise on pseudo-labeled images falls to none: the share of noised images and the
    rates of dropout and stochastic depth go down linearly. 0: the noise stays; 1: it falls from the first step on."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=100))
    """How long and in what portions."""
    mixing: Literal["joint", "pretrain-finetune", "pseudo-labels-alone"] = "joint"
    """`joint`: every step holds both kinds of images (the paper). `pretrain-finetune`: pseudo-labeled ones alone, then labeled ones alone.
    `pseudo-labels-alone`: no labeled image at all. Each step has (1 + ratio) x B images whatever the mixing."""
    finetune_ratio: Annotated[float, Interval(gt=0, lt=1)] = 0.25
    """Share of the steps that finetune on labeled images; `pretrain-finetune` only."""
    ratio: Annotated[int, Interval(ge=1, le=64)] = 3
    """Pseudo-labeled images for each labeled one in a step (r)."""
    loss: Literal["sum", "concat", "ratio"] = "sum"
    """`sum`: mean_L + mean_U (the paper's Algorithm 1). `concat`: (mean_L + r mean_U)/(1 + r) (its text).
    `ratio`: mean_L + r mean_U (its code)."""
    pseudo_labels: Literal["soft", "hard"] = "soft"
    """Soft: the teacher's whole distribution. Hard: its largest class."""
    temperature: Annotated[float, Interval(gt=0, le=100)] = 1.0
    """Sharpens (< 1) or flattens (> 1) soft pseudo-labels: p^(1/T) / sum p^(1/T)."""
    distillation: DistillationConfig | None = None
    """Imitate the teacher instead of learning its guesses; None does not. Usually with a smaller network."""

    def check(self) -> None:
        if self.distillation is not None and (self.pseudo_labels != "soft" or self.temperature != 1):
            raise RecipeError("distillation needs soft pseudo-labels at temperature 1; it has its own", pointer="/distillation")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig(Checked):
    """Which views of an image the teacher looks at; its guess is their mean (data distillation, Radosavovic et al. 2018).

    All are made of the weak view, so one view that is neither mirrored nor zoomed is the weak view itself.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    flip: bool = False
    """Each view, and its mirror image."""
    zooms: Annotated[tuple[Annotated[float, Interval(ge=0.25, le=1)], ...], Len(1, 8)] = (1.0,)
    """Sides of the parts looked at, as shares of the whole view's, each enlarged to its size; 1 is all of it."""
    corners: bool = False
    """Of a part smaller than the whole, the four in the corners beside the one in the middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelingConfig(Checked):
    """How the un-noised teacher's guesses are made and stored."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    stored_probabilities: Annotated[int, Interval(ge=1, le=65536)] | Literal["all"] = "all"
    """Keep the k largest in fp16 and the residual mass, or all K of them."""
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 64
    """Images in one forward pass."""
    shard_size: Annotated[int, Interval(ge=1, le=1_000_000)] = 2048
    """Images in one shard: the unit of work that any worker can take."""
    calibrate: bool = False
    """Divide the logits by the teacher's fitted temperature before the softmax."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """What the teacher looks at for one guess."""
    selection_model: Annotated[str, Len(1, 500)] | None = None
    """`generation:ID` of another model whose confidences choose the images; the teacher still labels them. None: the teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig(Checked):
    """Which of the teacher's guesses the student gets to see."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    min_confidence: Annotated[float, Interval(ge=0, le=1)] = 0.3
    """Keep an image when the teacher's largest probability reaches this; both are compared in fp16."""
    min_confidence_of: dict[str, Annotated[float, Interval(ge=0, le=1)]] = field(default_factory=dict)
    """The threshold of single classes, by name, instead of `min_confidence`: lower for one that the teacher is seldom sure of."""
    max_confidence: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Keep only images below this, to study one interval of confidence; None has no upper end."""
    cap_per_class: Annotated[int, Interval(ge=1)] | Literal["largest-class", "none"] = "largest-class"
    """Most images kept per predicted class, the most confident first, and what smaller classes are filled up to (the paper: 130 000)."""
    balance: bool = True
    """Fill classes under the cap by repeating their images; off keeps every image once."""
    max_repeat: Annotated[int, Interval(ge=1, le=1_000_000)] = 1_000_000
    """Most times one image may stand in for its class."""
    sample_ratio: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Uniform share of the pool that is looked at, before anything else (the paper's pool-size study)."""
    near_duplicate_distance: Annotated[int, Interval(ge=0, le=16)] | None = 0
    """Pool images whose 64-bit perceptual hash is within this many bits of an evaluation image are removed, equal pixels
    in any case; None removes equal pixels only."""
    require_every_class: bool = True
    """End with the histogram when a class has no selected image; off lets the student go without pseudo-labels of it."""
    reselect: bool = True
    """Iteration 2 and later: select again. Off: keep the first selection and only take the new teacher's labels."""

    def check(self) -> None:
        highest = max(self.min_confidence, *self.min_confidence_of.values(), 0.0)
        if self.max_confidence is not None and self.max_confidence <= highest:
            raise RecipeError(
                f"max_confidence {self.max_confidence} must exceed every threshold, of which the highest is {highest}",
                pointer="/max_confidence",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class IterationConfig(Checked):
    """How often the student becomes the teacher, and when to stop."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    count: Annotated[int, Interval(ge=0, le=100)] = 3
    """Iterations to run (the paper: three); 0 trains generation 0 and waits."""
    min_validation_gain: Annotated[float, Interval(ge=-1, le=1)] | None = None
    """Stop when a student's validation top-1 gains less than this on its teacher's; None never stops early."""
    smaller_student: Literal["warn", "refuse"] = "warn"
    """What happens when a student has fewer parameters than its teacher."""
    control: bool = False
    """Also train the control of each iteration: the student's network, noise, steps and images a step, on labels alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig(Checked):
    """On what the recipe runs. Recorded resolved at a run's first job and kept, so that a resumed run ends with the same bits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one; in the service, where a worker offers it when the job is made."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the training forward pass; `auto` takes bf16 where the processor has instructions for it. Evaluation is fp32."""
    num_threads: Annotated[int, Interval(ge=0, le=1024)] = 0
    """torch's intra-operation threads; 0 picks all cores, and one beside CUDA. Another number gives other bits. They wait for
    each other at every operation, so on a machine that other programs load, 1 is faster for small images."""
    num_loader_workers: Annotated[int, Interval(ge=0, le=128)] | Literal["auto"] = "auto"
    """Processes that decode and augment; the bits do not depend on it. 0 does it in the training process."""
    cache_bytes: Annotated[int, Interval(ge=0)] = 1_000_000_000
    """Decoded small images are held in memory when all of them fit into this; 0 always decodes anew."""
    compile: bool = False
    """torch.compile the network. Slower to start; worthwhile on long trainings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Checked):
    """A complete experiment: with the datasets and the seed it determines every weight."""

    __pydantic_config__: ClassVar[dict[str, Any]] = PYDANTIC_CONFIG

    name: Annotated[str, Len(1, 100)] = "custom"
    """A word for people."""
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    """Seeds the validation cut, initial weights, sampling, noise and duplication."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """What an image is before the network sees it."""
    validation_ratio: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    """Share of each class's labeled images that chooses (checkpoint, temperature, stopping, gate) when no validation split is given."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Generation 0."""
    students: Annotated[tuple[StudentConfig, ...], Len(1, 100)] = field(default_factory=lambda: (StudentConfig(),))
    """The student of iteration 1, 2, ...; the last one serves all further iterations."""
    labeling: LabelingConfig = field(default_factory=LabelingConfig)
    """How guesses are made and stored."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which guesses the student gets to see."""
    iterations: IterationConfig = field(default_factory=IterationConfig)
    """How often, and when to stop."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """On what it runs."""
