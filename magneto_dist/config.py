"""Every setting: one dataclass per concern, every field with meaning, unit and scope.

The same names are YAML keys and command-line options (`--section.field value`). A value is checked
when its dataclass is made (`config_checks.py`); what is wrong is an InputError that names the key.
"Global" means over all ranks, "per rank" means in each process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from magneto_dist import config_checks

ModelKind = Literal["magneto", "tf-it", "tf-t", "ff"]
Decoder = Literal["auto", "cpu", "dali_cpu", "dali_gpu"]
Precision = Literal["no", "fp16", "bf16"]
FrozenPrecision = Literal["no", "fp16", "bf16", "auto"]
FeatureDtype = Literal["fp16", "bf16"]
CommHook = Literal["none", "fp16", "bf16", "power_sgd"]


@dataclass(frozen=True)
class AugmentConfig:
    """How a picture becomes pixels (paper, appendix A.5)."""

    image_size: int = 224
    """Side of the square that the model sees, in pixels."""
    crop_scale_min: float = 0.3
    """Training: smallest area of the random crop, as a fraction of the picture's area."""
    crop_scale_max: float = 1.0
    """Training: largest area of the random crop, as a fraction of the picture's area."""
    crop_aspect_max: float = 4 / 3
    """Training: widest aspect ratio of the random crop; the narrowest is its inverse."""
    flip_probability: float = 0.5
    """Training: probability of a horizontal flip."""
    policy: Literal["none", "imagenet"] = "imagenet"
    """Training: AutoAugment policy applied after crop and flip."""
    eval_crop_fraction: float = 0.875
    """Evaluation: side of the centre crop as a fraction of the shorter side."""

    def __post_init__(self) -> None:
        config_checks.check_augment(self)


@dataclass(frozen=True)
class TagsConfig:
    """How a tag list becomes slots, and tag adding & dropping (paper, section 5.1)."""

    max_tags: int = 64
    """Slots per item, the paper's l."""
    beta_add: float = 0.3
    """Tag-adding: most tags added, as a fraction of the item's unimportant tags (beta)."""
    beta_drop: float = 0.3
    """Tag-dropping: most tags dropped, as a fraction of the item's unimportant tags (beta hat)."""
    irrelevant_ratio: float = 0.5
    """Pre-training: irrelevant tags added, as a fraction of the item's tags (at least one tag)."""
    trim_padding: bool = False
    """Compute on as many slots as the longest tag list of a micro-batch has, and not on `max_tags`;
    the encoders, on a CPU, on the tags alone: faster where most lists are short. Rounding then
    depends on how a batch is cut over ranks. No effect under train.compile, which wants one
    shape."""

    def __post_init__(self) -> None:
        config_checks.check_tags(self)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they reach the model."""

    path: str | None = None
    """Data set: folder or URL prefix with dataset.json; None: the demo data, made on first use."""
    decoder: Decoder = "auto"
    """Who decodes pictures; auto: dali_gpu where a GPU and DALI are present, else cpu."""
    num_workers: int | None = None
    """Loader processes per rank; 0: none, load in the training process; None: cores - 1, 1 to 8."""
    prefetch_batches: int = 4
    """Micro-batches for each loader process that may be made ahead, by whichever is free; where the
    others stand still, one has the memory of all."""
    dali_queue_depth: int = 2
    """DALI decoders: micro-batches decoded before they are needed, per rank, in the memory of the
    decoder's device (256 pictures of 224 px: 39 MB)."""
    loader_timeout_s: float = 1800.0
    """Longest wait for a micro-batch of the loader processes, in s, after which the run ends with
    an error; longer than a network is asked again (10 minutes a file); 0: no limit. A cold cache
    may need many shards for the first micro-batch. Several ranks wait no longer for one than three
    times train.collective_timeout_s: raise that, too."""
    ledger: bool = False
    """Write the keys of all trained samples to RUN_DIR/ledger, one file per rank."""
    num_streams: int = 64
    """Spans into which an epoch is cut; a power of two. A global batch draws from all in turn."""
    shuffle_window: int = 2048
    """Samples permuted together within a span."""
    max_bad_fraction: float = 0.01
    """Quarantined fraction of a split above which the run stops; one bad sample is allowed."""
    max_image_megapixels: float = 100.0
    """Pictures larger than this (by their header, in 1e6 pixels) are refused as bombs."""
    cache_dir: str | None = None
    """Folder for shards of remote data sets, and for cached features in its subfolder features;
    None: ~/.cache/magneto_dist/shards, ~/.cache/magneto_dist/features."""
    cache_gb: float = 200.0
    """Most disk space for cached remote shards, in 1e9 bytes per node."""
    read_ahead_steps: int = 64
    """Remote data: how many steps before it is needed a shard is fetched."""
    feature_views: int = 0
    """Frozen backbones: augmented views of each picture whose features are computed once, on disk,
    and read in every epoch instead of the picture; 0: none, pictures are decoded, augmented and run
    through the backbone anew in each epoch. Fewer views are less augmentation. Views, and the
    validation pictures, take 2 bytes a picture, region and channel each (ResNet-18 at 112 px: 16
    kB)."""
    feature_dtype: FeatureDtype = "fp16"
    """Cached features: fp16 rounds to 11 bits, bf16 to 8 bits, for features above 65,504."""
    feature_seed: int = 0
    """Cached features: seed of the views' augmentation, so that runs with another seed share
    them."""
    feature_cache_gb: float = 200.0
    """Most disk space for the cached features of all runs, in 1e9 bytes per node. Before new ones
    are made, those that no run uses go, the ones unused for longest first, as far as this or the
    disk asks for."""
    constant_image: bool = False
    """Ablation: replace every picture by grey, to see what the tags alone can do."""
    stages: tuple[str, ...] = ()
    """Your own steps between reading and batching, in order, each `module:function`; the module is
    installed or lies in the working folder. They act on training, validation and evaluate.py."""

    def __post_init__(self) -> None:
        config_checks.check_data(self)


@dataclass(frozen=True)
class ModelConfig:
    """MAGNeto and its baselines (paper, figure 2 and appendix A)."""

    kind: ModelKind = "magneto"
    """magneto: two streams and a gate; tf-it: image stream; tf-t: tag stream; ff: no attention."""
    d_model: int = 512
    """Features per tag and per image region."""
    num_heads: int = 8
    """Attention heads."""
    d_ff: int = 2048
    """Features inside feed-forward blocks and the gate."""
    dropout: float = 0.1
    """Dropout probability everywhere (appendix A.3: one value for the whole architecture)."""
    image_layers: int = 2
    """Encoder layers of the image stream, the paper's N."""
    tag_layers: int = 6
    """Encoder layers of the tag stream (or residual blocks of ff), the paper's M."""
    backbone: str = "resnet50"
    """A torchvision classification model by name, e.g. resnet18, resnet50, mobilenet_v2."""
    backbone_weights: str = "none"
    """none, imagenet (torchvision's default weights), or the path of a state_dict."""
    backbone_stages: int | None = None
    """Keep only the first stages of the backbone (resnet: stem, layer1 ... layer4); None: all."""
    frozen_stages: int | Literal["all"] = 4
    """First stages that are never trained; the paper's "first 3 residual blocks" of a ResNet are 4
    (stem and layer1 to layer3); "all" freezes the whole backbone, 0 none of it."""
    backbone_batch_norm: Literal["ghost", "frozen", "local", "sync"] = "frozen"
    """Batch norms in the trained stages of the backbone; frozen: statistics, scale and shift all
    stand still, as usual for pre-trained backbones (torchvision's FrozenBatchNorm2d), so that the
    convolutions alone are trained; ghost: see batch_norm_group_size."""
    frozen_batch_norm: Literal["fixed", "drifting"] = "fixed"
    """Batch norms in the frozen stages; fixed: folded into the convolutions; drifting: in training
    they normalise by the batch (in ghost groups) and their running statistics move, as in the
    authors' code; scale and shift stay. Slower; to reproduce their numbers alone."""
    frozen_precision: FrozenPrecision = "no"
    """What the frozen stages compute in; no: as the rest (float32, or train.precision); fp16 (GPU)
    and bf16: 16 bits for them alone, whose output goes on as before; auto: no where the
    machine that begins the run is slow in 16 bits, else train.precision if that is fp16 or bf16,
    else what the machine is fast in (bf16 on GPUs from Ampere on and CPUs with AVX512_BF16, fp16 on
    older GPUs with tensor cores). Weights and checkpoints stay as they are. Evaluation and
    prediction do as training did."""
    projection_batch_norm: Literal["ghost", "local", "sync"] = "ghost"
    """The batch norm after the 1x1 convolution."""
    batch_norm_group_size: int = 16
    """Ghost batch norm: consecutive rows of the global batch whose statistics are shared; the unit
    in which a global batch is cut over ranks, so that results do not depend on their number."""
    mapping: Literal["attention", "bilinear"] = "attention"
    """From tags to what the encoder of the image stream reads; attention: what each tag sees in the
    regions, as published; bilinear (beyond the paper): that times a projection of the tag."""
    tag_embedding_init: str | None = None
    """word2vec or GloVe text file to start the tag embedding from."""

    def __post_init__(self) -> None:
        config_checks.check_model(self)

    @property
    def sees_pictures(self) -> bool:
        """Whether the model has an image stream."""
        return self.kind in ("magneto", "tf-it")

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether these settings say that no stage of the backbone is trained."""
        kept, frozen = self.backbone_stages, self.frozen_stages
        return frozen == "all" or (kept is not None and frozen >= kept)


@dataclass(frozen=True)
class LossConfig:
    """The objective (paper, section 3.2)."""

    kind: Literal["bce", "bce-dice"] = "bce-dice"
    """Per head: equation 2 alone, or equation 4."""
    auxiliary: bool = True
    """Add the losses of both streams (equation 5); False: the gated output alone."""
    normalisation: Literal["slots", "tags"] = "slots"
    """BCE is averaged over all slots, padding included (as published), or over real tags."""
    dice_smoothing: float = 1.0
    """Added to numerator and denominator of the Dice ratio."""

    def __post_init__(self) -> None:
        config_checks.check_loss(self)


@dataclass(frozen=True)
class OptimConfig:
    """SGD and its schedule (paper, appendix A.4)."""

    lr: float = 1e-2
    """Learning rate at global_batch_size, after warm-up."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 0.0
    """L2 penalty."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "plateau", "cosine"] = "constant"
    """plateau: times plateau_factor when validation loss stalls; cosine: to 0 at the last step."""
    plateau_factor: float = 0.1
    """Factor of the plateau schedule."""
    plateau_patience: int = 5
    """Evaluations without improvement that the plateau schedule waits for."""
    clip_norm: float = 0.0
    """Largest gradient norm, global; 0: no clipping."""

    def __post_init__(self) -> None:
        config_checks.check_optim(self)


@dataclass(frozen=True)
class TrainConfig:
    """The run as a whole."""

    global_batch_size: int = 256
    """Samples per optimizer step, over all ranks."""
    max_micro_batch_size: int = 256
    """Most samples per forward pass and rank; smaller needs less memory and accumulates more."""
    epochs: int = 10
    """Passes over the training split."""
    eval_every_epochs: int = 1
    """Epochs between evaluations; the end of the run is always evaluated."""
    precision: Precision = "no"
    """Mixed precision: no (float32), fp16 (Turing and later), bf16 (Ampere and later, CPU)."""
    param_dtype: Literal["float32", "float64"] = "float32"
    """float64 is for checking equality over ranks; slow."""
    objective: Literal["important", "relevance"] = "important"
    """important: supervised; relevance: unsupervised pre-training (section 5.2)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    overlap: bool = True
    """Do beside other steps what need not wait for its own, for the same result to the last bit: on
    a CPU the frozen stages of the backbone, in as many threads as there are cores for, up to 4,
    each of which takes the memory that they take for a micro-batch (not with compile or ZeRO-3); on
    a GPU the way of the pictures to it. False: less memory."""
    tf32: bool = False
    """Float32 matrix products and convolutions of GPUs from Ampere on in TF32: inputs rounded to 10
    bits of mantissa, several times as fast. Nothing changes on CPU and under fp16 or bf16."""
    activation_checkpointing: bool = False
    """Run the trained stages of the backbone a second time in the backward pass instead of keeping
    their activations: less memory, more time, the same gradients."""
    ddp_comm_hook: CommHook = "none"
    """DDP: how gradients travel between ranks; fp16, bf16: rounded to half the bytes (float32
    gradients); power_sgd: as products of thin matrices, with what is lost added to the next step's
    gradients. Results then depend on the number of ranks. Checkpoints do not hold PowerSGD's state:
    a resumed run goes on, but not bit for bit."""
    power_sgd_rank: int = 1
    """power_sgd: columns of the thin matrices; more keep more and send more."""
    power_sgd_start_step: int = 1000
    """power_sgd: steps after a start of the processes in which gradients still travel whole."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, e.g. 0.9998; the average is what is
    evaluated, kept as the best, predicted with and exported. 0: none."""
    channels_last: bool = True
    """Memory format of the convolutions."""
    threshold: float = 0.5
    """Probability from which a tag counts as predicted."""
    collective_timeout_s: float = 600.0
    """Several ranks: longest time in s that they wait for one that does not come, or gives no sign
    of life, after which the run ends with a line that names it. Three times as long where a rank
    may take its time: data (see data.loader_timeout_s, too), evaluation, saving, and all up to the
    first step. Four times as long, and at least half an hour, is the timeout of the process group.
    0: no limit but that half hour."""

    def __post_init__(self) -> None:
        config_checks.check_train(self)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run while it goes on."""

    every_steps: int = 1000
    """Global steps between checkpoints; one is always written at the end of every evaluation."""
    keep: int = 2
    """Newest checkpoints kept, besides the best by validation F1."""
    asynchronous: bool = True
    """Write while training goes on, one at a time; takes CPU memory of the main process for a copy
    of weights and momentum. False: training stands still until a checkpoint is on disk."""

    def __post_init__(self) -> None:
        config_checks.check_checkpoint(self)


@dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    every_steps: int = 10
    """Global steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write RUN_DIR/tensorboard."""
    pictures: int = 16
    """Validation pictures shown in TensorBoard; 0: none."""
    profile_steps: int = 0
    """Training steps that torch.profiler records on the main process, into RUN_DIR/profile, as a
    trace to open in ui.perfetto.dev; they take longer than others. 0: none."""
    profile_after_steps: int = 10
    """Steps of this launch, resumed or not, before the first one that is recorded; the last of them
    warms the profiler up."""

    def __post_init__(self) -> None:
        config_checks.check_log(self)


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    output_dir: str = "runs/default"
    """RUN_DIR: configuration, metrics, checkpoints; one writer at a time."""
    resume: str = "auto"
    """auto: the newest complete checkpoint in RUN_DIR, if any; never; or a checkpoint's path."""
    init_from: str | None = None
    """RUN_DIR of a (pre-)trained model to start from; copies weights, not progress."""
    seed: int = 0
    """Seed of order, augmentation, initial weights and dropout."""
    max_steps: int | None = None
    """Stop after this many global steps, even if epochs are left."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tags: TagsConfig = field(default_factory=TagsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        config_checks.check_config(self)
