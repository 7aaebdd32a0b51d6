"""Attaches kernels to the operators: ``_C`` and ``_C_cuda``, else Triton, else plain PyTorch.

Runs once, at import: whatever stands on an operator's dispatch key serves it.
``LATENT_SHIFT_BACKEND`` forces a backend (docs/kernels.md); without it, ``auto``:

============= ====================================================================================
``auto``      CPU tensors: C++. CUDA tensors: CUDA C++, or Triton where it was not built
``native``    C++ and CUDA C++ only
``triton``    CUDA tensors: Triton. CPU tensors too where ``TRITON_INTERPRET=1``, else C++
``reference`` plain PyTorch everywhere
============= ====================================================================================

``,fused`` or ``,composed`` after it forces how ``shift_group_norm_silu_conv2d`` is served: by one
kernel wherever there is one that takes the call, or by the norm's kernel and PyTorch's convolution.

Where two kernels offer an operator and a table of measurements prefers the other one for some call
(:mod:`latent_shift_kernels.choices`), a function that asks :mod:`latent_shift_kernels.dispatch`
stands on the key; without such a table nothing is looked up at call time.
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

from .. import choices, ops, reference

BACKENDS = ("auto", "native", "triton", "reference")
CONVOLUTIONS = ("fused", "composed")
CONV2D = "shift_group_norm_silu_conv2d"
REBUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir <the sources>"
)

# device type -> operator -> the kernel that serves it: "cpu", "cuda", "triton", "reference", or
# "composed" of others
SERVING: dict[str, dict[str, str]] = {
    device: {op: "composed" if op in ops.COMPOSED else "reference" for op in ops.SCHEMAS}
    for device in ("cpu", "cuda")
}
# device type -> kernel -> the operators it offers there, serving or not
OFFERED: dict[str, dict[str, set[str]]] = {"cpu": {}, "cuda": {}}
# kernel -> the dtypes of the convolutions it fuses
FUSED_CONV2D_DTYPES = {
    "cuda": (torch.bfloat16, torch.float16),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
}
# (device type, kernel) -> why it does not serve
REFUSED: dict[tuple[str, str], str] = {}
# What LATENT_SHIFT_BACKEND asked for at import: a backend, and "fused" or "composed" if it says so
BACKEND = "auto"
FORCED_CONV2D: str | None = None

Choose = Callable[[str, tuple[Any, ...]], str]
"""(operator, arguments) -> the kernel that serves the call."""

_PACKAGE = Path(__file__).parent.parent
_python_kernels: list[Library] = []  # a registration lasts as long as its Library
_loaded = False


def asked() -> tuple[str, str | None]:
    """The backend and the way of the convolution that ``LATENT_SHIFT_BACKEND`` asks for.

    Raises:
        ValueError: If it names something else.
    """
    text = os.environ.get("LATENT_SHIFT_BACKEND") or "auto"
    words = [word.strip() for word in text.split(",")]
    backend = words.pop(0) if words[0] in BACKENDS else "auto"
    convolution = words.pop(0) if words and words[0] in CONVOLUTIONS else None
    if words:
        raise ValueError(
            f"LATENT_SHIFT_BACKEND is one of {', '.join(BACKENDS)}, with ,fused or ,composed after "
            f"it for the convolution; got {text!r}"
        )
    return backend, convolution


def load(choose: Choose) -> None:
    """Attaches what this machine and ``LATENT_SHIFT_BACKEND`` allow; later calls do nothing.

    Args:
        choose: Says which kernel serves a call where more than one could.
    """
    global _loaded, BACKEND, FORCED_CONV2D
    if _loaded:
        return
    _loaded = True
    backend, FORCED_CONV2D = asked()
    BACKEND = backend
    if backend == "reference":
        for device, kernels in (("cpu", ("cpu",)), ("cuda", ("cuda", "triton"))):
            for kernel in kernels:
                REFUSED[device, kernel] = "LATENT_SHIFT_BACKEND=reference"
        return

    triton: dict[str, Callable[..., Any]] | None = None  # that which stands beside C++
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        REFUSED["cpu", "cpu"] = "LATENT_SHIFT_BACKEND=triton with TRITON_INTERPRET=1"
        served = _attach_triton("cpu") is not None
        _attach_fused_conv2d("cpu", choose, None)
    else:
        REFUSED["cpu", "triton"] = "Triton runs on GPUs"
        served = _attach_library("cpu", "_C")
        if served and backend == "auto":
            plain = {op: getattr(reference, op) for op in OFFERED["cpu"]["cpu"]}
            _attach_choice("cpu", "cpu", "reference", plain, choose)
    if not served:
        _warn_on_use("cpu")

    if torch.version.cuda is None:
        for kernel in ("cuda", "triton"):
            REFUSED["cuda", kernel] = f"torch {torch.__version__} is built without CUDA"
        return
    served = False
    if backend == "triton":
        REFUSED["cuda", "cuda"] = "LATENT_SHIFT_BACKEND=triton"
    else:
        served = _attach_library("cuda", "_C_cuda")
    if backend == "native":
        REFUSED["cuda", "triton"] = "LATENT_SHIFT_BACKEND=native"
    elif served:
        triton = _import_triton("cuda") if _prefers("cuda", "triton") else None
        if triton is not None:
            _attach_choice("cuda", "cuda", "triton", triton, choose)
        else:
            REFUSED.setdefault(
                ("cuda", "triton"),
                "CUDA C++ serves; LATENT_SHIFT_BACKEND=triton chooses Triton, and "
                "`python -m latent_shift_kernels tune` the faster one for each call",
            )
    else:
        served = _attach_triton("cuda") is not None
    if not served:
        _warn_on_use("cuda")
    _attach_fused_conv2d("cuda", choose, triton)


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
    every = (*ops.SCHEMAS, *ops.OPTIONAL_SCHEMAS)
    OFFERED[device][device] = {op for op in every if _stands(device, op)}
    SERVING[device].update({op: device for op in OFFERED[device][device] if op in ops.SCHEMAS})
    return True


def _stands(device: str, op: str) -> bool:
    key = device.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"latent_shift::{op}", key)


def _import_triton(device: str) -> dict[str, Callable[..., Any]] | None:
    if importlib.util.find_spec("triton") is None:
        REFUSED[device, "triton"] = "Triton is not installed; pip install triton"
        return None
    try:
        from .triton import IMPLEMENTATIONS
    except ImportError as error:
        REFUSED[device, "triton"] = f"Triton does not import: {error}"
        return None
    OFFERED[device]["triton"] = set(IMPLEMENTATIONS)
    return IMPLEMENTATIONS


def _attach_triton(device: str) -> dict[str, Callable[..., Any]] | None:
    implementations = _import_triton(device)
    if implementations is not None:
        _register(device, implementations)
        SERVING[device].update({op: "triton" for op in implementations if op in ops.SCHEMAS})
    return implementations


def _prefers(device: str, kernel: str, op: str = "") -> bool:
    """Whether a table prefers ``kernel`` for a call of an operator, any of them by default."""
    return any(
        choice == kernel and call.startswith(f"{op} " if op else "")
        for call, choice in choices.chosen(device)
    )


def _attach_choice(
    device: str,
    serving: str,
    other: str,
    implementations: dict[str, Callable[..., Any]],
    choose: Choose,
) -> None:
    """Lets ``other`` serve the calls that a table prefers it for, and ``serving`` the rest."""
    wanted = {call.split(" ", 1)[0] for call, kernel in choices.chosen(device) if kernel == other}
    OFFERED[device][other] = set(implementations)
    library = Library("latent_shift", "IMPL", device.upper())
    for op in sorted(wanted & set(implementations) & OFFERED[device][serving]):
        standing = torch.library.get_kernel(f"latent_shift::{op}", device.upper())

        def serve(
            keys: Any,
            *args: Any,
            op: str = op,
            standing: Any = standing,
            implementation: Callable[..., Any] = implementations[op],
        ) -> Any:
            if choose(op, args) == other:
                return implementation(*args)
            return standing.call_boxed(keys, *args)

        with warnings.catch_warnings():  # that a kernel stands there is what this is about
            warnings.simplefilter("ignore", UserWarning)
            library.impl(op, serve, device.upper(), with_keyset=True)
    _python_kernels.append(library)


def _attach_fused_conv2d(
    device: str, choose: Choose, triton: dict[str, Callable[..., Any]] | None
) -> None:
    """Puts the kernels that hold the convolution in front of the composition, where something may
    choose one."""
    name, fused = f"{CONV2D}_fused", dict[str, Callable[..., Any]]()
    if _stands(device, name):
        fused[SERVING[device]["shift_add_group_norm_silu"]] = getattr(torch.ops.latent_shift, name)
    if triton is not None:
        fused.setdefault("triton", triton[name])
    preferred = [k for k in fused if FORCED_CONV2D == "fused" or _prefers(device, k, CONV2D)]
    if FORCED_CONV2D == "composed" or not preferred:
        return
    composed = ops.COMPOSED[CONV2D]

    def fused_or_composed(*args: Any) -> Any:
        return fused.get(choose(CONV2D, args), composed)(*args)

    _register(device, {CONV2D: fused_or_composed})
    SERVING[device][CONV2D] = preferred[0]


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
