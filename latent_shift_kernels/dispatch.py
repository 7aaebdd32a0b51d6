"""Which kernel serves a call, and why no faster one does.

A kernel and what it refuses stand in ``CANDIDATES``, fastest first. Of those that take a call the
first one serves, unless ``LATENT_SHIFT_BACKEND`` forces another, or a table of measurements
(:mod:`latent_shift_kernels.choices`) prefers one for this very call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, choices, cost, ops
from .backends import CONV2D

_TITLES = {
    "cpu": "C++",
    "cuda": "CUDA C++",
    "triton": "Triton",
    "reference": "plain PyTorch",
    "composed": "composed",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the convolution's filter stands among the operator's arguments.
_FILTER = 9


@dataclass(frozen=True)
class Call:
    """What is known of a call: its operator and its tensors."""

    op: str
    x: Tensor
    skip: Tensor | None = None
    filter: Tensor | None = None

    @property
    def key(self) -> str:
        """The call as the tables of :mod:`latent_shift_kernels.choices` know it."""
        frames, channels, *pixels = self.x.shape
        channels += 0 if self.skip is None else self.skip.shape[1]
        out_channels = None if self.filter is None else self.filter.shape[0]
        return choices.key(self.op, self.x.dtype, (frames, channels, *pixels), out_channels)


@dataclass(frozen=True)
class Candidate:
    """A kernel, and why it does not take a call; None where it does."""

    kernel: str
    refuses: Callable[[str, Call], str | None]


@dataclass(frozen=True)
class Decision:
    """The kernel that serves, who chose it ("" where it is the fastest by rule), and the faster
    ones with the reason against each."""

    kernel: str
    by: str
    refused: tuple[tuple[str, str], ...]


def _native(kernel: str, call: Call) -> str | None:
    """Of a kernel of ours: what kept it from being attached, or the call itself."""
    device = call.x.device.type
    if reason := backends.REFUSED.get((device, kernel)):
        return reason
    offered = backends.OFFERED.get(device, {}).get(kernel, ())
    if call.op != CONV2D:
        return None if call.op in offered else "it does not have this operator"
    if f"{CONV2D}_fused" not in offered:
        return "it does not have this operator"
    return backends.refused_conv2d(kernel, call.x, call.skip, call.filter)


def _composition(kernel: str, call: Call) -> str | None:
    return None if call.op in ops.COMPOSED else "it is one operator"


def _plain(kernel: str, call: Call) -> str | None:
    return None


CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "cpu": (
        Candidate("cpu", _native),
        Candidate("triton", _native),
        Candidate("composed", _composition),
        Candidate("reference", _plain),
    ),
    "cuda": (
        Candidate("cuda", _native),
        Candidate("triton", _native),
        Candidate("composed", _composition),
        Candidate("reference", _plain),
    ),
}
_ELSEWHERE = (Candidate("composed", _composition), Candidate("reference", _plain))
_UNMEASURED = (
    "it has not been measured to win: LATENT_SHIFT_BACKEND=auto,fused chooses it, "
    "`python -m latent_shift_kernels tune` measures it"
)


def decide(call: Call) -> Decision:
    """Which kernel serves ``call``."""
    candidates = CANDIDATES.get(call.x.device.type, _ELSEWHERE)
    able: list[str] = []
    refused: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.refuses(candidate.kernel, call)
        if reason is None:
            able.append(candidate.kernel)
        elif candidate.kernel != "composed" or call.op in ops.COMPOSED:
            refused.append((candidate.kernel, reason))
    kernel, by = _preferred(call, able)
    if kernel is None:
        # A kernel that holds the convolution competes with cuDNN and oneDNN: it has to be chosen.
        kernel = "composed" if call.op == CONV2D else able[0]
        refused += [(k, _UNMEASURED) for k in able[: able.index(kernel)]]
    elif able.index(kernel):
        refused += [(k, by) for k in able[: able.index(kernel)]]
    order = [candidate.kernel for candidate in candidates]
    faster = order[: order.index(kernel)]
    refused.sort(key=lambda pair: order.index(pair[0]))
    return Decision(kernel, by, tuple(pair for pair in refused if pair[0] in faster))


def _preferred(call: Call, able: list[str]) -> tuple[str | None, str]:
    if call.op == CONV2D and backends.FORCED_CONV2D:
        by = f"LATENT_SHIFT_BACKEND asks for {backends.FORCED_CONV2D}"
        if backends.FORCED_CONV2D == "composed":
            return "composed", by
        if able[0] in backends.FUSED_CONV2D_DTYPES:
            return able[0], by
        return None, ""
    if backends.BACKEND == "auto" and call.x.dim() == 4:
        measured = choices.lookup(call.x.device, call.key)
        if measured is not None and measured[0] in able:
            return measured
    return None, ""


def choose(op: str, arguments: tuple[Any, ...]) -> str:
    """The kernel that serves a call of ``op`` with its raw arguments."""
    if op == CONV2D:
        return decide(Call(op, arguments[0], arguments[1], arguments[_FILTER])).kernel
    return decide(Call(op, arguments[0])).kernel


def serving(device_type: str) -> dict[str, str]:
    """The kernel behind each operator for tensors on a device.

    Args:
        device_type: "cpu", "cuda", or any other that torch knows.

    Returns:
        Operator name -> "cpu" (C++), "cuda" (CUDA C++), "triton", "reference" (plain PyTorch), or
        "composed" (the kernels of other operators and PyTorch's convolution).

    Example:
        >>> serving("cpu")["temporal_shift"]
        'cpu'
    """
    elsewhere = {op: "composed" if op in ops.COMPOSED else "reference" for op in ops.SCHEMAS}
    return dict(backends.SERVING.get(device_type, elsewhere))


def explain(
    op: str,
    *tensors: Tensor,
    skip: Tensor | None = None,
    filter: Tensor | None = None,
    num_groups: int = 32,
) -> str:
    """Says which kernel would serve an operator on these tensors, why every faster one was refused,
    and what it moves.

    Args:
        op: An operator of ``torch.ops.latent_shift``, e.g. "shift_add_group_norm_silu".
        tensors: Its tensor arguments, or just the first; a second of its shape is the residual.
        skip, filter: Those of ``shift_group_norm_silu_conv2d``, which decide too.
        num_groups: Of the norm; the launch of a CUDA kernel depends on it.

    Returns:
        One line for the kernel that serves, one for the bytes it moves, one per faster launch of it
        and per faster kernel that was refused, one per hidden cost.

    Raises:
        ValueError: If there is no such operator or no tensor.

    Example:
        >>> print(explain("temporal_shift", torch.randn(16, 320, 8, 8)))
        temporal_shift on cpu float32 (16, 320, 8, 8): C++ (avx2)
          moves 2.6 MB at least
    """
    if op not in ops.SCHEMAS:
        raise ValueError(f"unknown operator {op!r}; the operators are {', '.join(ops.SCHEMAS)}")
    if not tensors:
        raise ValueError("explain needs at least one tensor of the call")
    x = tensors[0]
    call = Call(op, x, skip, filter)
    decision, kernels = decide(call), serving(x.device.type)
    dtype = str(x.dtype).removeprefix("torch.")
    shape = tuple(x.shape)
    by = f", {decision.by}" if decision.by else ""
    lines = [f"{op} on {x.device.type} {dtype} {shape}: {title(decision.kernel, kernels)}{by}"]
    if x.dim() == 4 and x.dtype in _DTYPES and x.numel():
        found = _cost(call, decision.kernel, num_groups, tensors)
        lines += [f"  {found}", *(f"  not {reason}" for reason in found.refused)]
    lines += [f"  not {_TITLES[kernel]}: {reason}" for kernel, reason in decision.refused]
    if decision.kernel != "reference" and x.dtype not in _DTYPES:
        lines.append(
            f"  but {dtype} is refused: the kernels take float32, bfloat16, float16 and float64"
        )
    if decision.kernel == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        lines.append("  but it is refused here: CUDA C++ takes sm_80 and later")
    for tensor in tensors:
        if decision.kernel != "reference" and tensor.dim() == 4 and not _dense_like(tensor, x):
            lines.append(
                f"  a tensor {tuple(tensor.shape)} with strides {tensor.stride()} is copied first: "
                "it is not dense in the layout of the first"
            )
    return "\n".join(lines)


def _cost(call: Call, kernel: str, num_groups: int, tensors: tuple[Tensor, ...]) -> cost.Cost:
    x, skip, filter = call.x, call.skip, call.filter
    frames, channels, height, width = x.shape
    work = cost.Work(
        call.op,
        (frames, channels, height, width),
        x.dtype,
        x.stride(1) == 1,
        num_groups,
        residual=any(tensor.shape == x.shape for tensor in tensors[1:]),
        skip_channels=0 if skip is None else skip.shape[1],
        out_channels=0 if filter is None else filter.shape[0],
        aligned=_aligned(tensors),
    )
    limits = cost.Device.of(x.device) if x.device.type == "cuda" else None
    if kernel == "composed" and call.op == CONV2D:
        return cost.composed(work, limits if serving(x.device.type)[cost.NORM] == "cuda" else None)
    planned = cost.cuda(work, limits) if kernel == "cuda" and limits else None
    return planned or cost.least(work)


def title(kernel: str, kernels: dict[str, str]) -> str:
    """What a reader calls one of the ``kernels`` that :func:`serving` returned."""
    if kernel == "composed":
        norm = title(kernels["shift_add_group_norm_silu"], kernels)
        return f"composed of shift_add_group_norm_silu ({norm}) and PyTorch's convolution"
    return _TITLES[kernel] + (f" ({backends.cpu_isa()})" if kernel == "cpu" else "")


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    return all(
        tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor.device.type in ("cpu", "cuda")
    )


def _dense_like(tensor: Tensor, x: Tensor) -> bool:
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.is_contiguous(memory_format=layout)
