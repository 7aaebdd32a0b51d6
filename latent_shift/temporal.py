"""Latent-VDM, the model that the shift is measured against: temporal layers with parameters.

The paper (arXiv 2304.08477) does not describe its layers. Ours (our decision): after every ResNet
block a temporal convolution of width 3 that starts as the identity, after every spatial transformer
a temporal self-attention whose output projection starts at zero. So an image model with new layers
computes at first what it computed without them, frame by frame.

The module path of :class:`LatentVDMUNet` is written into saved models, so this file never moves.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from latent_shift.unet import LatentShiftUNet, ShiftConfig, insert_shift
from latent_shift_kernels.integrations.diffusers import ShiftResnetBlock2D

# diffusers looks for ModelMixin in the namespace of the module that defines a saved component.
__all__ = ["LatentVDMUNet", "ModelMixin", "insert_temporal_layers"]


class TemporalConv(nn.Module):
    """Convolution over time of frames (B*T, C, H, W), the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.dirac_(torch.empty(channels, channels, 3)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, frames: Tensor, clips: int) -> Tensor:
        """Returns frames of the shape of ``frames``, of ``clips`` clips."""
        shape = frames.shape
        # one image of T rows and H * W columns a clip
        x = frames.unflatten(0, (clips, -1)).permute(0, 2, 1, 3, 4).flatten(3)  # [B, C, T, H*W]
        x = nn.functional.conv2d(x, self.weight.unsqueeze(-1), self.bias, padding=(1, 0))
        x = x.permute(0, 2, 1, 3).reshape(shape)
        return x.contiguous(memory_format=_layout(frames))


class TemporalAttention(nn.Module):
    """Self-attention over the frames of every pixel, added to its input; nothing at first."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads=heads, dim_head=channels // heads)
        nn.init.zeros_(self.attention.to_out[0].weight)
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, frames: Tensor, clips: int) -> Tensor:
        """Returns frames of the shape of ``frames`` (B*T, C, H, W), of ``clips`` clips."""
        height, width = frames.shape[2:]
        x = frames.unflatten(0, (clips, -1)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # [B*H*W, T, C]
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.norm(x) + get_timestep_embedding(positions, x.shape[2]).to(x.dtype)
        x = self.attention(x).unflatten(0, (clips, height, width))
        x = x.permute(0, 3, 4, 1, 2).reshape(frames.shape)
        return frames + x.contiguous(memory_format=_layout(frames))


class TemporalResnetBlock2D(ShiftResnetBlock2D):
    """A ResNet block with a temporal convolution after it."""

    temporal: TemporalConv

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: object, **kwargs: object
    ) -> Tensor:
        """As ``ResnetBlock2D.forward``, with a time embedding of one row per clip."""
        frames = super().forward(input_tensor, temb, *args, **kwargs)
        assert temb is not None  # the base class has raised
        return self.temporal(frames, temb.shape[0])


class TemporalTransformer2DModel(Transformer2DModel):
    """A spatial transformer with a temporal self-attention after it."""

    temporal: TemporalAttention

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor]:
        """As ``Transformer2DModel.forward``, with one text per clip."""
        kwargs["return_dict"] = False
        (frames,) = super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        return (self.temporal(frames, encoder_hidden_states.shape[0]),)


class LatentVDMUNet(LatentShiftUNet):
    """An image U-Net with temporal layers in place of the shift.

    Args:
        **config: Those of ``UNet2DConditionModel``, by keyword; ``shift`` is always ``"none"``.
    """

    def __init__(self, shift: Any = None, **config: Any) -> None:
        super().__init__(shift=ShiftConfig(preset="none"), **config)
        _add_temporal_layers(self)

    __init__.__wrapped__ = LatentShiftUNet.__init__.__wrapped__  # type: ignore[attr-defined]

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
        """As :meth:`LatentShiftUNet.forward`.

        Raises:
            ValueError: If there is not one text per clip, beside what the base class refuses.
        """
        frames = 1 if sample.dim() == 5 or num_frames is None else num_frames
        clips = sample.shape[0] // max(frames, 1)
        if encoder_hidden_states.shape[0] != clips:
            raise ValueError(
                f"expected one text per clip ({clips}), got {encoder_hidden_states.shape[0]}"
            )
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            *args,
            num_frames=num_frames,
            return_dict=return_dict,
            **kwargs,
        )


def insert_temporal_layers(unet: UNet2DConditionModel) -> LatentVDMUNet:
    """Makes a :class:`LatentVDMUNet` of an image U-Net, in place; its results are at first the
    same.

    Raises:
        TypeError: If ``unet`` is of another class than ``UNet2DConditionModel``.
        ValueError: If it has no ``ResnetBlock2D``.
    """
    insert_shift(unet, ShiftConfig(preset="none"))
    _add_temporal_layers(unet)
    unet.__class__ = LatentVDMUNet
    return unet  # type: ignore[return-value]


def _add_temporal_layers(unet: nn.Module) -> None:
    weight = next(unet.parameters())
    for module in list(unet.modules()):
        if isinstance(module, ShiftResnetBlock2D):
            module.temporal = TemporalConv(module.conv2.out_channels).to(weight)
            module.__class__ = TemporalResnetBlock2D
        elif isinstance(module, Transformer2DModel):
            heads = module.transformer_blocks[0].attn1.heads
            module.temporal = TemporalAttention(module.in_channels, heads).to(weight)
            module.__class__ = TemporalTransformer2DModel


def _layout(x: Tensor) -> torch.memory_format:
    plain = x.is_contiguous()
    return torch.contiguous_format if plain else torch.channels_last
