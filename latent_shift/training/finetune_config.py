"""The recipe of a finetuning run: `kind = "finetune"`, read by `config.load_recipe`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from latent_shift.training.config import OptimizerConfig, TemporalConfig


@dataclass(frozen=True)
class ModelConfig(TemporalConfig):
    """The checkpoint to start from, and what lets its frames meet.

    Attributes:
        source: diffusers folder, single-file checkpoint (.safetensors, .ckpt), or hub name.
        layout: for a single file, the folder or hub name of a pipeline of the same layout; empty
            leaves it to diffusers, which asks the hub.
        revision, variant: of a folder or hub name, as diffusers' `from_pretrained`.
        prediction: "auto" is what the checkpoint's scheduler says.
        zero_terminal_snr: rescale the betas to end in pure noise; needs v-prediction.
    """

    source: str = ""
    layout: str = ""
    revision: str = ""
    variant: str = ""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(
                "model.source is empty: name a folder, a checkpoint file or a hub name"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "model.zero_terminal_snr ends in pure noise, of which a predicted noise tells "
                'nothing: set model.prediction = "v_prediction", or zero_terminal_snr = false'
            )
        super().__post_init__()


@dataclass(frozen=True)
class ClipsConfig:
    """What to train on.

    Attributes:
        clips: folder, table, tar or data set of captioned clips, or a cache of latents and text;
            see docs/data.md. A cache has one sample of each clip, in one format.
        format: of `clips`; "auto" looks, see docs/data.md for the kinds.
        caption_column, path_column: of tables, for pictures and held-out clips as well.
        frames_fps: the rate of frame folders, which do not tell theirs.
        images: pictures with captions, of the same kinds, for the image batches; empty takes single
            frames of the clips.
        num_frames, height, width: of every clip.
        fps: clips are resampled to this rate; 0 takes them as stored.
        stride: take every so many frames.
        start: where in a longer video the frames are taken.
        crop: where in frames of other proportions the window lies.
        flip: mirror half of the clips; captions that speak of left and right forbid it.
        batch: clips in a process's batch.
        image_batch: pictures in a process's batch of pictures.
        image_every: one in so many batches is of pictures; 0 for none.
        workers: threads that read and decode ahead; 0 reads when a batch is due.
    """

    clips: str = ""
    format: str = "auto"
    caption_column: str = "caption"
    path_column: str = "path"
    frames_fps: float = 8.0
    images: str = ""
    num_frames: int = 16
    height: int = 256
    width: int = 256
    fps: float = 0.0
    stride: int = 1
    start: Literal["middle", "random"] = "random"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    batch: int = 1
    image_batch: int = 8
    image_every: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("data.clips is empty: name a folder, table, tar or data set of clips")
        for name in ("num_frames", "height", "width", "stride", "batch", "image_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be >= 1, got {getattr(self, name)}")
        if not self.frames_fps > 0:
            raise ValueError(f"data.frames_fps must be > 0, got {self.frames_fps}")
        for name in ("fps", "image_every", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be >= 0, got {getattr(self, name)}")
        if self.images and not self.image_every:
            raise ValueError("data.images is given and never used: set data.image_every, say to 4")


@dataclass(frozen=True)
class TrainConfig:
    """Which parameters learn, from which loss.

    Attributes:
        what: "all" of the U-Net; "parts" whose names match `patterns`; or "lora" adapters, and in
            full what matches `patterns` besides.
        patterns: of parameter names, with * and ?, as "*.temporal.*" or "up_blocks.*.resnets.*".
        lora_rank, lora_alpha, lora_dropout: as peft's `LoraConfig`; `lora_alpha` 0 is the rank.
        lora_targets: ends of the names of layers that get adapters.
        text_encoder: train the text encoder too.
        text_learning_rate: factor on the learning rate for it.
        steps: optimizer steps.
        accumulate: batches a step.
        recompute_activations: compute norms and activations of the ResNet blocks again in the
            backward pass: half of the memory that these blocks keep, for one more pass of each
            norm. Not for convolutions with adapters.
        gradient_checkpointing: compute the U-Net's blocks again in the backward pass: less memory,
            about a third more time.
        snr_gamma: min-SNR weighting, arXiv 2303.09556 (5 there); 0 weighs all times alike.
        caption_dropout: share of clips that are shown without their caption.
        noise_shift: 1 draws time steps uniformly, more draws them nearer to pure noise: time t of
            [0, 1) becomes s t / (1 + (s - 1) t), arXiv 2403.03206, equation 23.
    """

    what: Literal["all", "parts", "lora"] = "all"
    patterns: tuple[str, ...] = ()
    lora_rank: int = 16
    lora_alpha: int = 0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    text_encoder: bool = False
    text_learning_rate: float = 1.0
    steps: int = 10000
    accumulate: int = 1
    recompute_activations: bool = False
    gradient_checkpointing: bool = False
    snr_gamma: float = 0.0
    caption_dropout: float = 0.1
    noise_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.what == "parts" and not self.patterns:
            raise ValueError(
                'train.what = "parts" needs train.patterns, such as ["*.resnets.*", "*.temporal.*"]'
            )
        if self.what == "all" and self.patterns:
            raise ValueError(
                'train.patterns chooses nothing where train.what = "all": take "parts"'
            )
        own = {item.name: item.default for item in fields(TrainConfig)}
        for used, names, how in (
            (self.what == "lora", [n for n in own if n.startswith("lora_")], 'what = "lora"'),
            (self.text_encoder, ["text_learning_rate"], "text_encoder = true"),
        ):
            for name in names:
                if not used and getattr(self, name) != own[name]:
                    raise ValueError(f"train.{name} is never used: set train.{how}, or leave it")
        if self.what == "lora" and self.text_encoder:
            raise ValueError(
                'train.what = "lora" puts adapters into the U-Net: set train.text_encoder = false'
            )
        for name in ("lora_rank", "steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "snr_gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be >= 0, got {getattr(self, name)}")
        for name in ("lora_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.noise_shift > 0:
            raise ValueError(f"train.noise_shift must be > 0, got {self.noise_shift}")


@dataclass(frozen=True)
class FinetuneOptimizerConfig(OptimizerConfig):
    """As `config.OptimizerConfig`, with defaults for weights that have been trained before."""

    learning_rate: float = 1e-5
    beta2: float = 0.999
    weight_decay: float = 1e-2
    schedule: Literal["tail", "constant", "linear", "cosine"] = "cosine"
    ema_decay: float = 0.9995


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written, and how often.

    Attributes:
        every: steps between checkpoints; 0 leaves it to `seconds`.
        seconds: and at least this often; 0 leaves it to `every`.
        keep: how many to keep.
        model_dtype: of the finished pipeline.
    """

    every: int = 500
    seconds: float = 1800.0
    keep: int = 2
    model_dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoints.keep must be >= 1, got {self.keep}")
        if self.every < 0 or self.seconds < 0:
            raise ValueError("checkpoints.every and checkpoints.seconds must be >= 0")


@dataclass(frozen=True)
class ValidationConfig:
    """Clips made on the way, and what is measured on them.

    Attributes:
        every: steps between validations, the first before any step; 0 for none but the last.
        prompts: what to make; empty takes the captions of the first `clips` training clips.
        clips: training clips whose motion is the measure.
        held_out: clips never trained on, for a loss at fixed noise and times; empty for none.
        steps, guidance_scale: of sampling.
    """

    every: int = 500
    prompts: tuple[str, ...] = ()
    clips: int = 4
    held_out: str = ""
    steps: int = 25
    guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"validation.every must be >= 0, got {self.every}")
        for name in ("clips", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Finetune:
    """A finetuning run of a Stable-Diffusion-family checkpoint on captioned clips.

    Attributes:
        name: recorded with the results.
        seed: every random number of the run is a function of it, the step and the rank.
        device: "auto" takes a GPU where there is one, or "cpu".
        precision: of the forward pass; trained weights and optimizer stay in float32.
        threads: CPU threads a process; 0 leaves torch's choice.
        trackers: as accelerate's `log_with`, such as "tensorboard" or "wandb".
    """

    name: str = "finetune"
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    threads: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: ClipsConfig = field(default_factory=ClipsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: FinetuneOptimizerConfig = field(default_factory=FinetuneOptimizerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if self.optimizer.schedule != "constant" and self.optimizer.warmup >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup = {self.optimizer.warmup} leaves none of train.steps = "
                f"{self.train.steps} for the rest of the schedule"
            )
