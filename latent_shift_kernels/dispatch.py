"""Which kernel serves a call, and why no faster one does."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, ops

_TITLES = {
    "cpu": "C++",
    "cuda": "CUDA C++",
    "triton": "Triton",
    "reference": "plain PyTorch",
    "composed": "composed",
}
# Fastest first.
_LADDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "triton", "composed", "reference"),
    "cuda": ("cuda", "triton", "composed", "reference"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def explain(op: str, *tensors: Tensor) -> str:
    """Says which kernel would serve an operator on these tensors, and why every faster one was
    refused.

    Args:
        op: An operator of ``torch.ops.latent_shift``, e.g. "shift_add_group_norm_silu".
        tensors: Its tensor arguments, or just the first.

    Returns:
        One line for the kernel that serves, one per faster kernel refused, one per hidden cost.

    Raises:
        ValueError: If there is no such operator or no tensor.

    Example:
        >>> print(explain("temporal_shift", torch.randn(16, 320, 8, 8)))
        temporal_shift on cpu float32 (16, 320, 8, 8): C++ (avx2)
    """
    if op not in ops.SCHEMAS:
        raise ValueError(f"unknown operator {op!r}; the operators are {', '.join(ops.SCHEMAS)}")
    if not tensors:
        raise ValueError("explain needs at least one tensor of the call")
    x = tensors[0]
    device = x.device.type
    kernels = serving(device)
    kernel, reasons = kernels[op], dict(backends.REFUSED)
    if kernel in backends.FUSED_CONV2D_DTYPES and op in ops.COMPOSED:
        refused = backends.refused_conv2d(kernel, x)
        if refused:
            reasons[device, kernel] = refused
            kernel = "composed"
    dtype = str(x.dtype).removeprefix("torch.")
    lines = [f"{op} on {device} {dtype} {tuple(x.shape)}: {title(kernel, kernels)}"]
    ladder = _LADDER.get(device, ("composed", "reference"))
    ladder = tuple(k for k in ladder if k != "composed" or op in ops.COMPOSED)
    for faster in ladder[: ladder.index(kernel)]:
        reason = reasons.get((device, faster), "it does not have this operator")
        lines.append(f"  not {_TITLES[faster]}: {reason}")
    if (device, op) in backends.UNCHOSEN:
        lines.append(f"  not one kernel: {backends.UNCHOSEN[device, op]}")
    if kernel != "reference" and x.dtype not in _DTYPES:
        lines.append(
            f"  but {dtype} is refused: the kernels take float32, bfloat16, float16 and float64"
        )
    for tensor in tensors:
        if kernel != "reference" and tensor.dim() == 4 and not _dense_like(tensor, x):
            lines.append(
                f"  a tensor {tuple(tensor.shape)} with strides {tensor.stride()} is copied first: "
                "it is not dense in the layout of the first"
            )
    return "\n".join(lines)


def title(kernel: str, kernels: dict[str, str]) -> str:
    """What a reader calls one of the ``kernels`` that :func:`serving` returned."""
    if kernel == "composed":
        norm = title(kernels["shift_add_group_norm_silu"], kernels)
        return f"composed of shift_add_group_norm_silu ({norm}) and PyTorch's convolution"
    return _TITLES[kernel] + (f" ({backends.cpu_isa()})" if kernel == "cpu" else "")


def _dense_like(tensor: Tensor, x: Tensor) -> bool:
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.is_contiguous(memory_format=layout)
