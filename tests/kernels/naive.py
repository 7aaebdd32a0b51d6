"""The operators as a user would write them in eager PyTorch: what kernels are compared with, in
fp64 and in kind.

Written apart from ``latent_shift_kernels.reference`` on purpose: frame by frame, with torch's own
GroupNorm and SiLU, and gradients from autograd.
"""

from dataclasses import dataclass, field

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

        return Case(
            convert(self.x),
            self.num_groups,
            self.lengths,
            self.spec,
            self.shift,
            {name: convert(t) for name, t in self.tensors.items()},
            convert(self.dy),
            convert(self.dsum),
            self.eps,
        )


def group_norm_silu(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of the eager chain, by name."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.arguments().items()}
    x, residual, temb = leaves["x"], leaves.get("residual"), leaves.get("temb")
    if case.spec is not None and case.shift == "before":
        x = temporal_shift(x, case.lengths, case.spec)
    if residual is not None:
        x = x + residual
    frames = x.shape[0]

    def rows(table: Tensor) -> Tensor:
        return table.repeat_interleave(frames // max(table.shape[0], 1), 0)[:, :, None, None]

    if temb is not None:
        x = x + rows(temb)
    total = x
    # torch's GroupNorm wants parameters of the input's dtype or fp32; half of the matrix mixes
    # them.
    weight, bias = (
        None if (t := leaves.get(name)) is None else t.to(x.dtype) for name in ("weight", "bias")
    )
    y = F.group_norm(x, case.num_groups, weight, bias, case.eps)
    if "ada_scale" in leaves:
        y = y * (1 + rows(leaves["ada_scale"]))
    if "ada_shift" in leaves:
        y = y + rows(leaves["ada_shift"])
    y = F.silu(y).to(case.x.dtype)
    if case.spec is not None and case.shift == "after":
        y = temporal_shift(y, case.lengths, case.spec)
    outputs = {"y": y}
    upstream = [case.dy]
    if residual is not None:
        outputs["sum"] = total
        upstream.append(case.dsum)
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in {**outputs, **named}.items()}
