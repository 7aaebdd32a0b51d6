"""Thin modules over :mod:`latent_shift_kernels.functional`; they add no parameter and hold no
arithmetic."""

from __future__ import annotations

from typing import Literal

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
