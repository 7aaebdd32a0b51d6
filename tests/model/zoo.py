"""One tiny model of every architecture that ``fuse`` serves: from its configuration, with random
weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.utils import BaseOutput
from torch import Tensor, nn

_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_CROSS = {
    **_UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
CLIPS, FRAMES, TOKENS = 2, 3, 5


def _frames() -> Tensor:
    return torch.randn(CLIPS, 4, 8, 8)


def _clips() -> Tensor:
    return torch.randn(CLIPS, 4, FRAMES, 8, 8)


def _text(rows: int = CLIPS) -> Tensor:
    return torch.randn(rows, TOKENS, 24)


_TIMES = torch.tensor([3, 700])
# Architecture -> how to build it, and the arguments of a call.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple]]] = {
    "unet2d_condition": (
        lambda: UNet2DConditionModel(**_CROSS),
        lambda: (_frames(), _TIMES, _text()),
    ),
    # Blocks that resample inside, and AdaGN in place of the added time embedding.
    "unet2d_condition_adagn": (
        lambda: UNet2DConditionModel(
            **{
                **_CROSS,
                "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                "resnet_time_scale_shift": "scale_shift",
            }
        ),
        lambda: (_frames(), _TIMES, _text()),
    ),
    # NCSN++: FIR resampling, a norm and SiLU on its second output, residuals divided by a factor.
    "unet2d": (
        lambda: UNet2DModel(
            **_UNET,
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            attention_head_dim=8,
            mid_block_scale_factor=1.414,
        ),
        lambda: (_frames()[:, :3], _TIMES),
    ),
    "unet3d": (
        lambda: UNet3DConditionModel(
            **{
                **_CROSS,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            }
        ),
        lambda: (_clips(), _TIMES, _text()),
    ),
    "unet_motion": (
        lambda: UNetMotionModel(
            **{
                **{k: v for k, v in _CROSS.items() if k != "attention_head_dim"},
                "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            },
            num_attention_heads=4,
            motion_num_attention_heads=4,
            motion_max_seq_length=FRAMES,
        ),
        lambda: (_clips(), _TIMES, _text(CLIPS * FRAMES)),
    ),
    "unet_spatio_temporal": (
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=24,
            num_attention_heads=(4, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=FRAMES,
        ),
        lambda: (
            _clips().transpose(1, 2),
            _TIMES,
            torch.randn(CLIPS, 1, 24),
            torch.rand(CLIPS, 3),
        ),
    ),
    "controlnet": (
        lambda: ControlNetModel(
            **{k: v for k, v in _CROSS.items() if k not in ("sample_size", "up_block_types")},
            conditioning_embedding_out_channels=(8, 16),
        ),
        lambda: (_frames(), _TIMES, _text(), torch.randn(CLIPS, 3, 16, 16)),
    ),
    "autoencoder_kl": (
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            sample_size=16,
        ),
        lambda: (torch.randn(CLIPS, 3, 16, 16),),
    ),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo, with every parameter random: as initialised, some layers are zeros."""
    torch.manual_seed(seed)
    model = ZOO[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0 or (parameter == 1).all():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def arguments(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple:
    """Inputs for a model of the zoo."""
    torch.manual_seed(seed)
    return tuple(a.to(dtype) if a.is_floating_point() else a for a in ZOO[name][1]())


def output(model: nn.Module, args: tuple) -> Tensor:
    """All tensors that a model returns, in one."""
    return torch.cat([tensor.flatten() for tensor in _tensors(model(*args))])


def _tensors(result: Tensor | BaseOutput | tuple) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.to_tuple() if isinstance(result, BaseOutput) else result
    return [tensor for part in parts for tensor in _tensors(part)]
