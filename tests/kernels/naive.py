"""The operators as a user would write them in eager PyTorch: what kernels are compared with, in
fp64 and in kind.

Written apart from ``latent_shift_kernels.reference`` on purpose: frame by frame, with torch's own
GroupNorm and SiLU, and gradients from autograd.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_shift_kernels import ShiftSpec


def temporal_shift(x: Tensor, lengths: int | list[int], spec: ShiftSpec) -> Tensor:
    """Clips of one length, or of the lengths of a list."""
    if not x.shape[0]:
        return x.clone()
    clips = []
    for clip in x.split(lengths):
        num_frames = clip.shape[0]
        if not num_frames:
            continue
        offsets = spec.offsets(num_frames)
        frames = []
        for t in range(num_frames):
            slices, begin = [], 0
            for size, offset in zip(spec.sizes, offsets, strict=True):
                source = t + offset
                channels = slice(begin, begin + size)
                begin += size
                if 0 <= source < num_frames:
                    slices.append(clip[source, channels])
                elif spec.boundary == "zeros":
                    slices.append(torch.zeros_like(clip[t, channels]))
                elif spec.boundary == "replicate":
                    slices.append(clip[min(max(source, 0), num_frames - 1), channels])
                else:
                    slices.append(clip[source % num_frames, channels])
            frames.append(torch.cat(slices))
        clips.append(torch.stack(frames))
    return torch.cat(clips)


@dataclass
class Case:
    """One call of ``shift_add_group_norm_silu`` with everything it was given, and the upstream
    gradients."""

    x: Tensor
    num_groups: int
    lengths: int | list[int]
    spec: ShiftSpec | None
    shift: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dy: Tensor | None = None
    dsum: Tensor | None = None
    eps: float = 1e-5

    def arguments(self) -> dict[str, Tensor]:
        return {"x": self.x, **self.tensors}

    def cast(self, dtype: torch.dtype) -> "Case":
        def convert(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype)

        return replace(
            self,
            x=convert(self.x),
            tensors={name: convert(t) for name, t in self.tensors.items()},
            dy=convert(self.dy),
            dsum=convert(self.dsum),
        )


@dataclass
class ConvCase(Case):
    """One call of ``shift_group_norm_silu_conv2d``."""

    out_spec: ShiftSpec | None = None
    scale: float = 1.0


def group_norm_silu(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of the eager chain, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.arguments().items()}
    x, residual, temb = leaves["x"], leaves.get("residual"), leaves.get("temb")
    if case.spec is not None and case.shift == "before":
        x = temporal_shift(x, case.lengths, case.spec)
    if residual is not None:
        x = x + residual
    total = x if temb is None else x + rows(temb, x)
    y = _activated(total, leaves, case)
    outputs = {"y": y}
    upstream = [case.dy]
    if residual is not None:
        outputs["sum"] = total
        upstream.append(case.dsum)
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in {**outputs, **named}.items()}


def group_norm_silu_conv2d(case: ConvCase) -> dict[str, Tensor]:
    """Outputs and gradients of the eager chain with its convolution, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.arguments().items()}
    x = leaves["x"] if "skip" not in leaves else torch.cat((leaves["x"], leaves["skip"]), 1)
    if case.spec is not None and case.shift == "before":
        x = temporal_shift(x, case.lengths, case.spec)
    if "temb" in leaves:
        x = x + rows(leaves["temb"], x)
    y = _activated(x, leaves, case)
    if y.numel():
        out = F.conv2d(y, leaves["filter"], leaves.get("filter_bias"), padding=1)
    else:
        out = y.new_empty(y.shape[0], leaves["filter"].shape[0], *y.shape[2:])
        out = out + 0 * sum(t.sum() for t in leaves.values())
    if "out_temb" in leaves:
        out = out + rows(leaves["out_temb"], out)
    if case.out_spec is not None:
        out = temporal_shift(out, case.lengths, case.out_spec)
    if "residual" in leaves:
        out = leaves["residual"] + out
    out = out * case.scale
    grads = torch.autograd.grad([out], list(leaves.values()), [case.dy], allow_unused=True)
    named = {
        f"d{name}": torch.zeros_like(leaves[name]) if grad is None else grad
        for name, grad in zip(leaves, grads, strict=True)
    }
    return {name: t.detach() for name, t in {"out": out, **named}.items()}


def rows(table: Tensor, like: Tensor) -> Tensor:
    """A table (R, C) spread over the frames of ``like``."""
    return table.repeat_interleave(like.shape[0] // max(table.shape[0], 1), 0)[:, :, None, None]


def _activated(total: Tensor, leaves: dict[str, Tensor], case: Case) -> Tensor:
    # torch's GroupNorm wants parameters of the input's dtype or fp32; half of the matrix mixes
    # them.
    weight, bias = (
        None if (t := leaves.get(name)) is None else t.to(total.dtype)
        for name in ("weight", "bias")
    )
    y = F.group_norm(total, case.num_groups, weight, bias, case.eps)
    if "ada_scale" in leaves:
        y = y * (1 + rows(leaves["ada_scale"], y))
    if "ada_shift" in leaves:
        y = y + rows(leaves["ada_shift"], y)
    y = F.silu(y).to(case.x.dtype)
    if case.spec is not None and case.shift == "after":
        y = temporal_shift(y, case.lengths, case.spec)
    return y
