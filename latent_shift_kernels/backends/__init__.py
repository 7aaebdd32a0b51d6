"""Attaches kernels to the operators: ``_C`` and ``_C_cuda``, else Triton, else plain PyTorch.

Runs once, at import. An operator looks for nothing at call time: whatever stands on its dispatch
key serves it. ``LATENT_SHIFT_BACKEND`` chooses:

============= ====================================================================================
``auto``      CPU tensors: C++. CUDA tensors: CUDA C++, or Triton where it was not built
``native``    C++ and CUDA C++ only
``triton``    CUDA tensors: Triton. CPU tensors too where ``TRITON_INTERPRET=1``, else C++
``reference`` plain PyTorch everywhere
============= ====================================================================================

``shift_group_norm_silu_conv2d`` is composed of the norm's kernel and PyTorch's convolution. Where
``LATENT_SHIFT_FUSED_CONV2D=1`` and there is a kernel that does both, it serves the calls it takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .. import ops, reference

CHOICES = ("auto", "native", "triton", "reference")
REBUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir <the sources>"
)

# device type -> operator -> the kernel that serves it: "cpu", "cuda", "triton", "reference", or
# "composed" of others
SERVING: dict[str, dict[str, str]] = {
    device: {op: "composed" if op in ops.COMPOSED else "reference" for op in ops.SCHEMAS}
    for device in ("cpu", "cuda")
}
# kernel -> the dtypes of the convolutions it fuses
FUSED_CONV2D_DTYPES = {
    "cuda": (torch.bfloat16, torch.float16),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
}
# (device type, kernel) -> why it does not serve
REFUSED: dict[tuple[str, str], str] = {}
# (device type, operator) -> how to choose the kernel that stands by
UNCHOSEN: dict[tuple[str, str], str] = {}

_PACKAGE = Path(__file__).parent.parent
_python_kernels: list[Library] = []  # a registration lasts as long as its Library
_loaded = False


def choice() -> str:
    """The backend asked for by ``LATENT_SHIFT_BACKEND``."""
    name = os.environ.get("LATENT_SHIFT_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(f"LATENT_SHIFT_BACKEND must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


def load() -> None:
    """Attaches what this machine and ``LATENT_SHIFT_BACKEND`` allow; later calls do nothing."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    asked = choice()
    if asked == "reference":
        for device, kernels in (("cpu", ("cpu",)), ("cuda", ("cuda", "triton"))):
            for kernel in kernels:
                REFUSED[device, kernel] = "LATENT_SHIFT_BACKEND=reference"
        return

    if asked == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        REFUSED["cpu", "cpu"] = "LATENT_SHIFT_BACKEND=triton with TRITON_INTERPRET=1"
        served = _attach_triton("cpu")
        _attach_fused_conv2d("cpu")
    else:
        REFUSED["cpu", "triton"] = "Triton runs on GPUs"
        served = _attach_library("cpu", "_C")
    if not served:
        _warn_on_use("cpu")

    if torch.version.cuda is None:
        for kernel in ("cuda", "triton"):
            REFUSED["cuda", kernel] = f"torch {torch.__version__} is built without CUDA"
        return
    served = False
    if asked == "triton":
        REFUSED["cuda", "cuda"] = "LATENT_SHIFT_BACKEND=triton"
    else:
        served = _attach_library("cuda", "_C_cuda")
    if asked == "native":
        REFUSED["cuda", "triton"] = "LATENT_SHIFT_BACKEND=native"
    elif served:
        REFUSED["cuda", "triton"] = "CUDA C++ serves; LATENT_SHIFT_BACKEND=triton chooses Triton"
    else:
        served = _attach_triton("cuda")
    if not served:
        _warn_on_use("cuda")
    _attach_fused_conv2d("cuda")


def library_path(name: str) -> Path | None:
    """The file of ``_C`` or ``_C_cuda``, None where it was not built."""
    return next(
        iter(sorted(_PACKAGE.glob(f"{name}.*so")) + sorted(_PACKAGE.glob(f"{name}.pyd"))), None
    )


def build_record() -> dict[str, str]:
    """Library -> why setup.py left it out."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())["missing"]
    except (OSError, ValueError, KeyError):
        return {}


def cpu_isa() -> str | None:
    """The C++ kernels' instruction set: "baseline", "avx2" or "avx512".

    It is the widest the machine runs; ``LATENT_SHIFT_CPU_ISA``, read once, chooses another.
    """
    path = library_path("_C")
    if path is None or "cpu" not in SERVING["cpu"].values():
        return None
    isa = ctypes.CDLL(str(path)).latent_shift_cpu_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()


def _attach_library(device: str, name: str) -> bool:
    """Loads a native library; its static initialisers register the kernels."""
    path = library_path(name)
    if path is None:
        reason = build_record().get(name, "it was not built")
        REFUSED[device, device] = f"{name}: {reason}; {REBUILD}"
        return False
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        REFUSED[device, device] = f"{name} does not load: {reason}; {REBUILD}"
        warnings.warn(
            f"latent_shift_kernels: {path.name} does not load ({reason}), slower kernels serve "
            f"{device} tensors. It was built for another torch or machine, or is damaged; "
            f"to rebuild it: {REBUILD}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    for op in ops.SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"latent_shift::{op}", device.upper()):
            SERVING[device][op] = device
    return True


def _attach_triton(device: str) -> bool:
    if importlib.util.find_spec("triton") is None:
        REFUSED[device, "triton"] = "Triton is not installed; pip install triton"
        return False
    try:
        from .triton import IMPLEMENTATIONS
    except ImportError as error:
        REFUSED[device, "triton"] = f"Triton does not import: {error}"
        return False
    _register(device, IMPLEMENTATIONS)
    SERVING[device].update({op: "triton" for op in IMPLEMENTATIONS if op in ops.SCHEMAS})
    return True


def _attach_fused_conv2d(device: str) -> None:
    """Puts a kernel that holds the convolution in front of the composition, if one is wanted."""
    name = "shift_group_norm_silu_conv2d"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"latent_shift::{name}_fused", device.upper()
    ):
        return
    if os.environ.get("LATENT_SHIFT_FUSED_CONV2D") != "1":
        UNCHOSEN[device, name] = "LATENT_SHIFT_FUSED_CONV2D=1 chooses the kernel that holds it all"
        return
    kernel = SERVING[device]["shift_add_group_norm_silu"]
    fused, composed = torch.ops.latent_shift.shift_group_norm_silu_conv2d_fused, ops.COMPOSED[name]

    def fused_or_composed(x: Tensor, skip: Tensor | None, *args: Any) -> Any:
        refused = refused_conv2d(kernel, x, skip, args[7])
        return (composed if refused else fused)(x, skip, *args)

    _register(device, {name: fused_or_composed})
    SERVING[device][name] = kernel


def refused_conv2d(
    kernel: str, x: Tensor, skip: Tensor | None = None, filter: Tensor | None = None
) -> str | None:
    """Why the convolution fused by ``kernel`` does not take these tensors, None where it does."""
    dtypes = FUSED_CONV2D_DTYPES[kernel]
    if x.dtype not in dtypes or reference.memory_format(x) != torch.channels_last or not x.numel():
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"its convolution takes channels_last {names}"
    counts = [
        x.shape[1],
        0 if skip is None else skip.shape[1],
        0 if filter is None else len(filter),
    ]
    if kernel == "cuda" and any(count % 8 for count in counts):
        return "its convolution takes channels by eights"
    return None


def _register(device: str, kernels: dict[str, Callable[..., Any]]) -> None:
    library = Library("latent_shift", "IMPL", device.upper())
    for op, kernel in kernels.items():
        library.impl(op, kernel)
    _python_kernels.append(library)


def _warn_on_use(device: str) -> None:
    """Leaves the reference to serve ``device``, saying so at its first call."""
    pending = [True]

    def announced(op: str) -> Callable[..., Any]:
        kernel = getattr(reference, op)

        def call(*args: Any) -> Any:
            if pending:
                pending.clear()
                reasons = "; ".join(f"{k}: {r}" for (d, k), r in REFUSED.items() if d == device)
                warnings.warn(
                    f"latent_shift_kernels: plain PyTorch serves {device} tensors, slowly "
                    f"({reasons}). "
                    "LATENT_SHIFT_BACKEND=reference silences this.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return kernel(*args)

        return call

    _register(device, {op: announced(op) for op in ops.SCHEMAS if op not in ops.COMPOSED})
