"""Recipes: everything that decides what a run computes, as dataclasses read from TOML.

A recipe is one file. Those of this module train a small model from nothing, in stages; a file that
says `kind = "finetune"` is read as `finetune_config.Finetune`, by the same rules. Every key has a
default, an unknown key is refused with the nearest known one named, and any key can be overridden
from the command line as `table.key=value` (value in TOML syntax; bare words are strings).
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from latent_shift.unet import ShiftConfig
from latent_shift_kernels.spec import Boundary, SingleFrame


@dataclass(frozen=True)
class DataConfig:
    """The MovingShapes clips to train on.

    Attributes:
        size, num_frames: pixels a side, frames a clip.
        clips: clips encoded once and kept as latents; each serves forwards and backwards.
        two_object_share: share of clips with two objects.
    """

    size: int = 64
    num_frames: int = 16
    clips: int = 6000
    two_object_share: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the learning-rate schedule, and the moving average of the weights.

    Attributes:
        kind: "adamw", or "adamw8bit" for moments of eight bits (needs bitsandbytes and a GPU).
        schedule: after `warmup` steps of climbing, "tail" stays and falls linearly to zero over the
            last `decay` of all steps; "constant" stays, "linear" and "cosine" fall from there on.
        decay: share of all steps; only for "tail".
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        ema_decay: of the moving average, which is what is scored and saved; 0 for none.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["tail", "constant", "linear", "cosine"] = "tail"
    warmup: int = 100
    decay: float = 0.5
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be > 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder stage: single frames, mean absolute and squared error, a weak KL term.

    Attributes:
        batch: crops a step.
        crop: side of the crops around an object that the first `crop_share` of the steps train on.
        full_batch: whole frames a step, afterwards.
        kl_weight: per latent value. At an eighth of the resolution three parts in 10,000 already
            cost two of eight channels and the corners of squares; at a quarter five parts cost
            nothing that scores, and latents that bear noise are easier to generate.
        edge_weight: what pixels near an edge weigh on top of the others' 1: a frame is nine tenths
            background.
        two_object_share: share of frames with two objects; the autoencoder should not care.
        init_from: folder of a saved autoencoder to start from; empty for new weights.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 64, 64)
    layers_per_block: int = 1
    latent_channels: int = 8
    norm_num_groups: int = 8
    steps: int = 2000
    batch: int = 16
    crop: int = 32
    crop_share: float = 0.7
    full_batch: int = 8
    kl_weight: float = 1e-5
    edge_weight: float = 4.0
    two_object_share: float = 0.25
    init_from: str = ""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(ema_decay=0.99))


@dataclass(frozen=True)
class TextConfig:
    """The tokenizer (BPE learned from captions) and the CLIP text encoder, which learns to tell the
    captions of clips apart by contrast with the clips (arXiv 2103.00020, section 2.3) and is frozen
    from then on. Learned with the denoiser instead, the words for shapes came to mean all the same:
    what a wrong one adds to the loss is small beside what a wrong colour does.

    Attributes:
        batch: clips a step.
        group: clips that are contrasted with each other.
        frames: how many frames of a clip the tower for clips looks at.
        widths: channels of its convolutions.
        init_from: folder of a pipeline, or "embedded" for that of the package, whose tokenizer and
            text encoder are taken as they are: then the stage has nothing to learn. Empty for new
            ones.
    """

    vocab_size: int = 768
    max_length: int = 24
    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    steps: int = 2000
    batch: int = 128
    group: int = 64
    frames: int = 4
    widths: tuple[int, ...] = (64, 96, 128)
    init_from: str = ""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(ema_decay=0.99))


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser: a diffusers `UNet2DConditionModel`.

    Attributes:
        attention: which levels have cross-attention, highest resolution first.
        heads: attention heads in every transformer.
    """

    block_out_channels: tuple[int, ...] = (64, 96, 128)
    layers_per_block: int = 1
    attention: tuple[bool, ...] = (False, True, True)
    heads: int = 4
    norm_num_groups: int = 8


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule: betas linear in their roots, ending in pure noise; v-prediction.

    Stable Diffusion's ends at .012, which leaves about a tenth of the steps to the noise in which a
    clip of these small latents, flat but for one object, is decided; .02 gives it more.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.02


@dataclass(frozen=True)
class ImageConfig:
    """The text-to-image stage, on single frames.

    Attributes:
        batch: whole frames a step.
        crop: side, in latents, of the crops around the object that the first `crop_share` of the
            steps train on. What tells a square from a circle is a few of a frame's 256 latents: on
            whole frames the words for shapes were still unlearned when all others were known.
        crop_batch: crops a step.
        time_mean, time_std: time steps of [0, 1) are drawn as sigmoid(mean + std * normal), arXiv
            2403.03206, equation 19: most where the noise hides an outline half. Below that the
            latents show everything, above it nothing, and both teach little about the caption.
        time_uniform: share of time steps drawn uniformly.
    """

    steps: int = 5000
    batch: int = 64
    crop: int = 8
    crop_batch: int = 128
    crop_share: float = 0.0
    caption_dropout: float = 0.1
    time_mean: float = 0.5
    time_std: float = 1.0
    time_uniform: float = 0.2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class TemporalConfig:
    """What lets the frames of a clip meet.

    Attributes:
        temporal: "shift", "none" (frames that never meet), or "vdm" (Latent-VDM's layers).
        preset: how the shift splits channels: "latent_shift" thirds, "tsm" one part in `fold_div`
            each way, "causal" the same from the past only.
        fold_div: 8 for TSM's eighths, 4 for quarters; 0 is the preset's own.
        placement: where in the ResNet block, see `latent_shift_kernels.Placement`.
        boundary, single_frame: see `latent_shift_kernels.ShiftSpec`.
    """

    temporal: Literal["shift", "none", "vdm"] = "shift"
    preset: Literal["latent_shift", "tsm", "causal"] = "latent_shift"
    fold_div: int = 0
    placement: Literal["branch_output", "conv1_output", "conv1_input", "block_input"] = (
        "branch_output"
    )
    boundary: Boundary = "zeros"
    single_frame: SingleFrame = "identity"

    def __post_init__(self) -> None:
        if self.temporal != "shift":
            own = {field.name: field.default for field in dataclasses.fields(TemporalConfig)}
            for name in ("preset", "fold_div", "placement", "boundary", "single_frame"):
                if getattr(self, name) != own[name]:
                    raise ValueError(
                        f'{name} belongs to the shift, and temporal is "{self.temporal}": leave '
                        "it out"
                    )
        self.shift()

    def shift(self) -> ShiftConfig:
        """Returns the shift of the U-Net."""
        return ShiftConfig(
            preset=self.preset if self.temporal == "shift" else "none",
            fold_div=self.fold_div or None,
            placement=self.placement,
            boundary=self.boundary,
            single_frame=self.single_frame,
        )


@dataclass(frozen=True)
class VideoConfig(TemporalConfig):
    """The text-to-video stage: the image model with the shift in it, finetuned on clips.

    Attributes:
        run: the stage's folder is `video-` and this, so that several can start from one image
            model; `temporal` if empty.
        seed: of this stage alone, where several differ in nothing else.
        batch: clips a step.
        image_every: every so many steps, a batch of single frames instead of clips.
        image_batch: frames in such a batch.
        time_mean, time_std, time_uniform: as for images, but nearer to pure noise: what the frames
            of a clip have to agree on is decided where one frame alone shows next to nothing.
    """

    run: str = ""
    seed: int = 0
    steps: int = 10000
    batch: int = 8
    image_every: int = 8
    image_batch: int = 64
    caption_dropout: float = 0.1
    time_mean: float = 1.5
    time_std: float = 1.2
    time_uniform: float = 0.2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class SamplingConfig:
    """How evaluation samples."""

    steps: int = 25
    guidance_scale: float = 3.0
    prompts: int = 64
    batch: int = 16


@dataclass(frozen=True)
class GateConfig:
    """Scores that a stage should reach; a missed gate is reported, and not fatal."""

    autoencoder: float = 0.97
    text: float = 0.95
    image: float = 0.95
    video: float = 0.9


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Attributes:
        name: recorded with the results.
        seed: every random number of the run is a function of it, the stage and the step.
        device: "auto" takes CUDA where there is one.
        precision: "fp32", or "bf16" autocast.
        threads: CPU threads; 0 leaves torch's choice.
        save_seconds, keep: how often to write a checkpoint, and how many to keep for each stage.
        evaluate_every: steps between small evaluations during a stage; 0 for none but the last.
    """

    name: str = "embedded"
    seed: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = 0
    save_seconds: float = 60.0
    keep: int = 2
    evaluate_every: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    gates: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        if len(self.unet.attention) != len(self.unet.block_out_channels):
            raise ValueError(
                f"unet.attention needs one entry per level: got {len(self.unet.attention)} "
                f"for {len(self.unet.block_out_channels)} levels"
            )
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        if self.data.size % factor or self.autoencoder.crop % factor:
            raise ValueError(f"data.size and autoencoder.crop must be multiples of {factor}")
        if self.text.batch % self.text.group:
            raise ValueError(
                f"text.batch must be a multiple of text.group, got {self.text.batch} and "
                f"{self.text.group}"
            )
        if self.image.crop_share and not 0 < self.image.crop <= self.latent_size:
            raise ValueError(
                f"image.crop must be from 1 to the latents' {self.latent_size}, "
                f"got {self.image.crop}"
            )
        if self.image.crop_share and self.data.two_object_share:
            raise ValueError(
                "a crop around one object does not show what a caption says of two: set "
                "image.crop_share or data.two_object_share to 0"
            )

    @property
    def latent_size(self) -> int:
        return self.data.size // 2 ** (len(self.autoencoder.block_out_channels) - 1)


class RecipeError(ValueError):
    """A recipe has an unknown key or a value of the wrong type."""


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Reads a recipe.

    Args:
        source: path of a TOML file, or the name of a recipe that comes with the package
            ("embedded", "reproduce", "finetune").
        overrides: `table.key=value` strings, applied in order.

    Returns:
        A `Recipe`, or a `latent_shift.training.finetune_config.Finetune` where the file says
        `kind = "finetune"`.

    Raises:
        RecipeError: unknown key, wrong type, settings that contradict each other, or no such
            recipe.
    """
    from latent_shift.training.finetune_config import Finetune

    kinds = {"stages": Recipe, "finetune": Finetune}
    try:
        values = tomllib.loads(_read(source))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not TOML: {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"an override reads table.key=value, got {override!r}")
        _insert(values, key.strip().split("."), _parse(text.strip()))
    kind = values.pop("kind", "stages")
    if kind not in kinds:
        raise RecipeError(f"kind must be one of {list(kinds)}, got {kind!r}")
    return _build(kinds[kind], values, "")


def to_dict(recipe: Any) -> dict[str, Any]:
    """Returns a recipe of either kind as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(recipe)


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested dicts as one of dotted keys, with lists for tuples, as JSON reads them back."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{where}{key}.")
        else:
            found[where + key] = list(value) if isinstance(value, tuple) else value
    return found


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    folder = resources.files("latent_shift.training") / "recipes"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def _read(source: str | Path) -> str:
    path = Path(source)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if str(source) in recipe_names():
        return (resources.files("latent_shift.training") / "recipes" / f"{source}.toml").read_text(
            encoding="utf-8"
        )
    raise RecipeError(
        f"no recipe file {str(source)!r}, and none of that name comes with the package: "
        f"{recipe_names()}"
    )


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _insert(values: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{'.'.join(path)}: {name!r} is a value, not a table")
    values[path[-1]] = value


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = _nearest(name, kind, where)
            raise RecipeError(f"unknown key {where}{name!s}; did you mean {near}?")
    try:
        return kind(
            **{
                name: _convert(hints[name], value, f"{where}{name}")
                for name, value in values.items()
            }
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _nearest(name: str, kind: type, where: str) -> str:
    """The known key that was meant: one of this table, or a table's that was left out."""
    hints = typing.get_type_hints(kind)
    (near,) = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
    if where or difflib.SequenceMatcher(None, name, near).ratio() > 0.6:
        return where + near
    inner = {
        key: table
        for table, hint in hints.items()
        if dataclasses.is_dataclass(hint)
        for key in typing.get_type_hints(hint)
    }
    found = difflib.get_close_matches(name, inner, n=1, cutoff=0.6)
    return f"{inner[found[0]]}.{found[0]}" if found else near


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} is a table, got {value!r}")
        return _build(hint, value, f"{where}.")
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{where} must be one of {typing.get_args(hint)}, got {value!r}")
        return value
    if origin is types.UnionType:
        raise TypeError(f"{where}: unions are not supported in recipes")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise RecipeError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
