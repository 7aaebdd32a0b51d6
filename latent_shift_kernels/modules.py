"""Thin modules over :mod:`latent_shift_kernels.functional`; they add no parameter and hold no
arithmetic."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from .spec import ShiftSpec


class TemporalShift(nn.Module):
    """:func:`functional.temporal_shift` as a module: no parameters, no buffers.

    Args:
        spec: What moves where.
        num_frames: T of the clips folded into the batch; None for inputs (B, C, T, H, W).
    """

    def __init__(self, spec: ShiftSpec, num_frames: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.num_frames = num_frames

    def forward(self, x: Tensor, *, cu_frames: Tensor | None = None) -> Tensor:
        """Shifts ``x`` (B*T, C, H, W) or (B, C, T, H, W); clips as ``cu_frames`` says if given."""
        num_frames = self.num_frames if x.dim() == 4 and cu_frames is None else None
        return functional.temporal_shift(x, self.spec, num_frames, cu_frames=cu_frames)

    def extra_repr(self) -> str:
        return f"{self.spec}, num_frames={self.num_frames}"


class ShiftGroupNormSiLU(nn.GroupNorm):
    """A ``torch.nn.GroupNorm`` (same parameters, same state dict) with the shift and SiLU fused
    into it.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: As ``torch.nn.GroupNorm``.
        spec: What moves where, or None for no shift.
        shift: ``"before"`` the norm or ``"after"`` the activation.
        num_frames: T of the clips folded into the batch where ``forward`` is not told; None for
            inputs (B, C, T, H, W).

    Raises:
        ValueError: If ``spec`` is for another channel count.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        spec: ShiftSpec | None = None,
        shift: Literal["before", "after"] = "before",
        num_frames: int | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if spec is not None and spec.channels != num_channels:
            raise ValueError(f"spec is for {spec.channels} channels, the norm has {num_channels}")
        self.spec = spec
        self.shift = shift
        self.num_frames = num_frames

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        num_frames: int | None = None,
        *,
        cu_frames: Tensor | None = None,
        residual: Tensor | None = None,
        temb: Tensor | None = None,
        ada_scale: Tensor | None = None,
        ada_shift: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``y``, or ``(y, sum)`` with a residual, see
        :func:`functional.shift_add_group_norm_silu`."""
        if num_frames is None and x.dim() == 4 and cu_frames is None:
            num_frames = self.num_frames
        return functional.shift_add_group_norm_silu(
            x,
            self.weight,
            self.bias,
            self.num_groups,
            self.eps,
            spec=self.spec,
            shift=self.shift,
            num_frames=num_frames,
            cu_frames=cu_frames,
            residual=residual,
            temb=temb,
            ada_scale=ada_scale,
            ada_shift=ada_shift,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.spec}, shift={self.shift}"


class ShiftGroupNormSiLUConv2d(nn.Module):
    """Half a ResNet block, :func:`functional.shift_group_norm_silu_conv2d`, over a
    ``torch.nn.GroupNorm`` and a ``torch.nn.Conv2d``.

    Args:
        norm: The norm, over the channels that go into ``conv``.
        conv: 3x3, stride 1, padding 1 with zeros, one group.
        spec: What moves where in the channels of ``norm``, or None.
        shift: ``"before"`` the norm or ``"after"`` the activation.
        out_spec: What moves where in the channels that come out of ``conv``, or None.
        num_frames: T of the clips folded into the batch where ``forward`` is not told; None for
            inputs (B, C, T, H, W).

    Raises:
        ValueError: If ``conv`` is another convolution, or channels do not agree.
    """

    def __init__(
        self,
        norm: nn.GroupNorm,
        conv: nn.Conv2d,
        *,
        spec: ShiftSpec | None = None,
        shift: Literal["before", "after"] = "before",
        out_spec: ShiftSpec | None = None,
        num_frames: int | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            got, expected = getattr(conv, name), getattr(plain, name)
            if got != expected:
                raise ValueError(f"conv must have {name} = {expected}, got {got}")
        for name, channels, expected in (
            ("conv", conv.in_channels, norm.num_channels),
            ("spec", spec.channels if spec else norm.num_channels, norm.num_channels),
            ("out_spec", out_spec.channels if out_spec else conv.out_channels, conv.out_channels),
        ):
            if channels != expected:
                raise ValueError(f"{name} is for {channels} channels, expected {expected}")
        self.norm = norm
        self.conv = conv
        self.spec = spec
        self.shift = shift
        self.out_spec = out_spec
        self.num_frames = num_frames

    def forward(
        self,
        x: Tensor,
        num_frames: int | None = None,
        *,
        cu_frames: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``skip``, ``temb``, ``ada_scale``, ``ada_shift``, ``out_temb``, ``residual``, ``scale``
        and ``return_sums`` as of :func:`functional.shift_group_norm_silu_conv2d`."""
        if num_frames is None and x.dim() == 4 and cu_frames is None:
            num_frames = self.num_frames
        return functional.shift_group_norm_silu_conv2d(
            x,
            self.norm.weight,
            self.norm.bias,
            self.norm.num_groups,
            self.conv.weight,
            self.conv.bias,
            self.norm.eps,
            spec=self.spec,
            shift=self.shift,
            out_spec=self.out_spec,
            num_frames=num_frames,
            cu_frames=cu_frames,
            **tensors,
        )

    def extra_repr(self) -> str:
        return f"{self.spec}, shift={self.shift}, out_spec={self.out_spec}"
