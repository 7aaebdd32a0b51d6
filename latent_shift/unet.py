"""A Stable-Diffusion-family U-Net that makes video: every ResNet block carries the temporal shift,
and no parameter.

The module path of :class:`LatentShiftUNet` is written into saved models, so this file never moves.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from latent_shift_kernels import Placement, ShiftSpec
from latent_shift_kernels.integrations.diffusers import (
    ShiftResnetBlock2D,
    restore_resnet_block,
    share_inputs,
    shift_resnet_block,
    shifted_channels,
    unshare_inputs,
)
from latent_shift_kernels.spec import Boundary, SingleFrame

# diffusers looks for ModelMixin in the namespace of the module that defines a saved component.
__all__ = ["LatentShiftUNet", "ModelMixin", "ShiftConfig", "insert_shift", "remove_shift"]

_PRESETS = ("latent_shift", "tsm", "causal", "none")


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    """The shift of a whole U-Net; :meth:`spec` is what it means at one channel count.

    Args:
        preset: ``"latent_shift"`` (thirds, arXiv 2304.08477), ``"tsm"`` or ``"causal"`` (arXiv
            1811.08383), or ``"none"``: frames that never meet, to compare with.
        fold_div: C // fold_div channels move each way; only for ``"tsm"`` and ``"causal"``, 8 if
            None.
        placement: Where in the ResNet block; see :class:`latent_shift_kernels.Placement`.
        boundary, single_frame: See :class:`latent_shift_kernels.ShiftSpec`.

    Raises:
        ValueError: On unknown names, or a ``fold_div`` for a preset that has none.
    """

    preset: Literal["latent_shift", "tsm", "causal", "none"] = "latent_shift"
    fold_div: int | None = None
    placement: str = Placement.BRANCH_OUTPUT.value
    boundary: Boundary = "zeros"
    single_frame: SingleFrame = "identity"

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {self.preset!r}")
        placements = [placement.value for placement in Placement]
        if self.placement not in placements:
            raise ValueError(
                f"placement must be one of {', '.join(placements)}, got {self.placement!r}"
            )
        object.__setattr__(self, "placement", Placement(self.placement).value)
        if self.preset in ("latent_shift", "none") and self.fold_div is not None:
            raise ValueError(
                "fold_div belongs to the presets tsm and causal; latent_shift always moves thirds"
            )
        self.spec(64)

    def spec(self, channels: int) -> ShiftSpec:
        """The shift at ``channels`` channels."""
        ends: dict[str, Any] = {"boundary": self.boundary, "single_frame": self.single_frame}
        if self.preset == "latent_shift":
            return ShiftSpec.latent_shift(channels, **ends)
        if self.preset == "none":
            return ShiftSpec(0, channels, 0, **ends)
        return getattr(ShiftSpec, self.preset)(channels, self.fold_div or 8, **ends)


class LatentShiftUNet(UNet2DConditionModel):
    """``UNet2DConditionModel`` with a temporal shift in every ResNet block (arXiv 2304.08477).

    Parameter names and shapes are those of the image U-Net: any Stable-Diffusion-family state dict
    loads with no missing and no unexpected key, and what is trained here loads as an image model.
    Frames are folded into the batch inside; text and time embeddings stay one per clip.

    Args:
        shift: A :class:`ShiftConfig`, or its fields as a mapping (as saved in ``config.json``).
        **config: Those of ``UNet2DConditionModel``, by keyword.

    Raises:
        ValueError: If the architecture has no ``ResnetBlock2D`` to put the shift into.
    """

    @register_to_config
    def __init__(self, shift: ShiftConfig | Mapping[str, Any] | None = None, **config: Any) -> None:
        super().__init__(**config)
        settings = _shift_config(shift)
        _insert(self, settings)
        self.register_to_config(shift=dataclasses.asdict(settings))

    # diffusers reads the accepted configuration off the signature.
    __init__.__wrapped__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DConditionModel.__init__).parameters.values(),
            inspect.Parameter("shift", inspect.Parameter.KEYWORD_ONLY, default=None),
        ]
    )

    @property
    def shift_config(self) -> ShiftConfig:
        """The shift that this U-Net carries."""
        return _shift_config(self.config.shift)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        *args: Any,
        num_frames: int | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicts the noise (or velocity) of every frame.

        Args:
            sample: Latent clips (B, C, T, h, w), or frames folded into the batch (B*T, C, h, w).
            timestep: A number, a scalar, or (B,): one per clip.
            encoder_hidden_states: Text (B, L, D), one per clip (or one per frame, (B*T, L, D)).
            num_frames: T of folded frames; 1, plain images, if left out.
            *args, return_dict, **kwargs: As ``UNet2DConditionModel.forward``; additional residuals
                are per frame, (B*T, ...), other conditions per clip.

        Returns:
            The prediction, in the shape of ``sample``.

        Raises:
            ValueError: If rank, ``num_frames`` or the number of timesteps do not fit ``sample``.
        """
        clips = sample.dim() == 5
        if clips:
            if num_frames not in (None, sample.shape[2]):
                raise ValueError(
                    f"sample (B, C, T, h, w) = {tuple(sample.shape)} has {sample.shape[2]} frames, "
                    f"num_frames says {num_frames}: leave num_frames out"
                )
            num_frames = sample.shape[2]
            sample = sample.transpose(1, 2).flatten(0, 1)
        elif sample.dim() != 4:
            raise ValueError(
                f"sample must be (B, C, T, h, w) or (B*T, C, h, w), got {tuple(sample.shape)}"
            )
        num_frames = 1 if num_frames is None else num_frames
        if num_frames < 1 or sample.shape[0] % num_frames:
            raise ValueError(
                f"a batch of {sample.shape[0]} frames does not split into clips of "
                f"num_frames = {num_frames}"
            )
        batch = sample.shape[0] // num_frames
        timestep = torch.as_tensor(timestep, device=sample.device)
        if timestep.dim() == 1 and timestep.shape[0] not in (1, batch):
            raise ValueError(
                f"expected one timestep or one per clip ({batch}), got {timestep.shape[0]}"
            )
        output = super().forward(
            sample,
            timestep.expand(batch),
            encoder_hidden_states,
            *args,
            return_dict=False,
            **kwargs,
        )[0]
        if clips:
            output = output.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def get_time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor | None:
        """One row per clip (B, D): the base class would expand the timesteps to the frames of
        ``sample``."""
        return super().get_time_embed(sample[: timestep.shape[0]], timestep)


def insert_shift(
    unet: UNet2DConditionModel, config: ShiftConfig | Mapping[str, Any] | None = None
) -> LatentShiftUNet:
    """Makes a :class:`LatentShiftUNet` of an image U-Net, in place and without touching a
    parameter.

    Args:
        unet: A ``UNet2DConditionModel``; hooks, adapters, dtype and device stay as they are.
        config: The shift; Latent-Shift's thirds at the branch's end if None.

    Returns:
        ``unet`` itself. :func:`remove_shift` takes it back.

    Raises:
        TypeError: If ``unet`` is of another class, a subclass included (its own forward would be
            lost).
        ValueError: If it has no ``ResnetBlock2D``.
    """
    if type(unet) is LatentShiftUNet:
        raise TypeError("this U-Net carries a shift already: call remove_shift first")
    if type(unet) is not UNet2DConditionModel:
        raise TypeError(
            f"insert_shift takes a diffusers UNet2DConditionModel, got {type(unet).__name__}; for "
            "other models use latent_shift_kernels.integrations.diffusers.shift_resnet_block on "
            "their blocks"
        )
    config = _shift_config(config)
    _insert(unet, config)
    unet.__class__ = LatentShiftUNet
    unet.register_to_config(shift=dataclasses.asdict(config))
    return unet


def remove_shift(unet: LatentShiftUNet) -> UNet2DConditionModel:
    """Takes :func:`insert_shift` back, in place: the plain image U-Net, on diffusers' own
    operators.

    Raises:
        TypeError: If ``unet`` is not a :class:`LatentShiftUNet`.
    """
    if not isinstance(unet, LatentShiftUNet):
        raise TypeError(f"remove_shift takes a LatentShiftUNet, got {type(unet).__name__}")
    for block in unet.modules():
        if isinstance(block, ShiftResnetBlock2D):
            restore_resnet_block(block)
    unshare_inputs(unet)
    unet.__class__ = UNet2DConditionModel
    unet._internal_dict = FrozenDict({k: v for k, v in unet.config.items() if k != "shift"})
    return unet


def _insert(unet: UNet2DConditionModel, config: ShiftConfig) -> None:
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    if not blocks:
        raise ValueError(
            "this U-Net has no ResnetBlock2D, so there is nowhere to put the shift; blocks with "
            "resnet_time_scale_shift of another kind than default and scale_shift are not supported"
        )
    placement = Placement(config.placement)
    for block in blocks:
        shift_resnet_block(block, config.spec(shifted_channels(block, placement)), placement)
    share_inputs(unet)


def _shift_config(config: ShiftConfig | Mapping[str, Any] | None) -> ShiftConfig:
    if config is None:
        return ShiftConfig()
    if isinstance(config, ShiftConfig):
        return config
    known = {field.name for field in dataclasses.fields(ShiftConfig)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"unknown shift settings {unknown}; known are {sorted(known)}")
    return ShiftConfig(**config)
