"""Measures which of two kernels is the faster on this machine. Nothing runs it unasked.

What it measures: CUDA C++ against Triton (plain PyTorch on a CPU) for every operator, the kernel
that holds the convolution against the composition, and Triton's tiles against each other. A kernel
is timed only if its results agree with plain PyTorch, and preferred to the rule's choice only if it
is faster by more than ``MARGIN``. The norm's plan in CUDA C++ (one launch, cluster or
split) is its planner's own choice and is not measured.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import backends, choices, dispatch, ops, reference
from .backends import CONV2D
from .spec import ShiftSpec

# Frames, channels, rows and columns: two clips of 16 frames of 256x256 at every level of a Stable
# Diffusion U-Net, and where a decoder of it joins a skip input.
SHAPES = (
    (32, 320, 32, 32),
    (32, 640, 32, 32),
    (32, 640, 16, 16),
    (32, 1280, 16, 16),
    (32, 1280, 8, 8),
    (32, 1280, 4, 4),
)
MARGIN = 1.05
_ROUNDS = 7
_SECONDS = 0.02  # of a sample
_GROUPS, _CLIP = 32, 16
# Largest error over largest value, and what a rounding of another order may add.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Shape = tuple[int, int, int, int]
Run = Callable[[], Any]
Time = Callable[[dict[str, Run]], dict[str, float]]
"""Runs by name -> milliseconds by name."""


def tune(
    device: torch.device,
    shapes: Iterable[Shape] = SHAPES,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    say: Callable[[str], None] = print,
    time: Time | None = None,
) -> Path:
    """Measures and stores the choices of ``device``; they serve from the next start of Python on.

    Args:
        device: Where to measure.
        shapes: Tensors (B*T, C, H, W), channels_last; C in groups of 32, B*T in clips of 16 where
            these divide them.
        dtypes: Their dtypes.
        say: Told one line for each call that was measured.
        time: Takes the times in place of a clock, for tests.

    Returns:
        The file.

    Raises:
        ValueError: If there is nothing to choose between on this device.
        OSError: If the file cannot be written.
    """
    measured: dict[str, dict[str, Any]] = {}
    shapes = shapes if device.type in backends.OFFERED else ()
    for dtype, shape in itertools.product(dtypes, shapes):
        with choices.trial({}):
            for key, runs in _questions(device, shape, dtype):
                default = next(iter(runs))
                times = (time or _clock)(runs)
                best = min(times, key=times.__getitem__)
                if times[best] * MARGIN > times[default]:
                    best = default
                measured[key] = {"choice": best, "ms": times}
                told = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
                say(f"{key}: {best} ({told})")
    if not measured:
        raise ValueError(
            f"on {device} every operator has one kernel, so there is nothing to measure; "
            "`python -m latent_shift_kernels info` says what is missing"
        )
    return choices.store(device, measured)


def _questions(
    device: torch.device, shape: Shape, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Run]]]:
    """(call, what runs each of two or more kernels, the one that the rule chooses first)."""
    serving = dispatch.serving(device.type)
    for op, arguments in _calls(device, shape, dtype):
        of_conv2d = (arguments[1], arguments[9]) if op == CONV2D else ()
        call = dispatch.Call(op, arguments[0], *of_conv2d)
        able: dict[str, Run] = {
            kernel: partial(run, *arguments)
            for kernel, run in _implementations(op, device.type).items()
            if kernel == "composed" or op != CONV2D or not _refused(kernel, call)
        }
        rule = "composed" if op == CONV2D else serving[op]
        able = {kernel: able[kernel] for kernel in sorted(able, key=lambda k: k != rule)}
        expected = (ops.COMPOSED.get(op) or getattr(reference, op))(*arguments)
        able = {kernel: run for kernel, run in able.items() if _agrees(run(), expected, dtype)}
        if len(able) > 1 and rule in able:
            yield call.key, able
        if device.type == "cuda" and "triton" in able:
            yield from _tiles(op, arguments, able["triton"])


def _tiles(op: str, arguments: tuple[Any, ...], run: Run) -> Iterator[tuple[str, dict[str, Run]]]:
    """Triton's tiles for a call, the one that it picks by rule first."""
    from .backends.triton import _common
    from .backends.triton import shift_group_norm_silu_conv2d as conv2d

    x = arguments[0]
    frames, channels, height, width = x.shape
    known: Iterable[str]
    if op == CONV2D:
        cout = arguments[9].shape[0]
        key = conv2d.config_key(x, channels, cout)
        shape = (frames, height * width, channels, cout)
        known = conv2d.conv_configs(*shape, x.element_size(), True)
    elif op == "shift_add":
        key = _common.tile_key(x)
        known = _common.tiles(channels, height * width, x.element_size(), True)
    else:
        return

    def tried(choice: str) -> Any:
        with choices.trial({key: choice}):
            return run()

    yield key, {choice: partial(tried, choice) for choice in known}


def _refused(kernel: str, call: dispatch.Call) -> str | None:
    return backends.refused_conv2d(kernel, call.x, call.skip, call.filter)


def _implementations(op: str, device: str) -> dict[str, Callable[..., Any]]:
    """Kernel -> what runs it, for the kernels that offer ``op`` on a device."""
    offered = backends.OFFERED[device]
    found: dict[str, Callable[..., Any]] = {}
    name = f"{op}_fused" if op == CONV2D else op
    if op == CONV2D:
        found["composed"] = ops.COMPOSED[op]
    for kernel in ("cpu", "cuda"):
        if name in offered.get(kernel, ()):
            found[kernel] = getattr(torch.ops.latent_shift, name)
    if (triton := _triton(device)) is not None and name in triton:
        found["triton"] = triton[name]
    if device == "cpu" and op not in ops.COMPOSED:
        found["reference"] = getattr(reference, op)
    return found


def _triton(device: str) -> dict[str, Callable[..., Any]] | None:
    if device != "cuda" and "triton" not in backends.OFFERED[device]:
        return None
    try:
        from .backends.triton import IMPLEMENTATIONS
    except ImportError:
        return None
    return IMPLEMENTATIONS


def _calls(
    device: torch.device, shape: Shape, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operator with its raw arguments: the paper's thirds, zeros at the ends of a clip."""
    frames, channels, height, width = shape
    clip = _CLIP if frames % _CLIP == 0 else frames
    groups = _GROUPS if channels % _GROUPS == 0 else 1
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    def image(*size: int) -> Tensor:
        return normal(*size).contiguous(memory_format=torch.channels_last)

    spec = ShiftSpec.latent_shift(channels)
    shift = (None, clip, spec.sizes, spec.offsets(clip), spec.boundary)
    unmoved = (None, clip, [channels, 0, 0], [0, 0, 0])
    x, other = image(*shape), image(*shape)
    weight, bias = normal(channels), normal(channels)
    tables = (None, weight, bias, None, None)
    yield "temporal_shift", (x, *shift)
    yield "temporal_shift_backward", (x, *shift)
    yield "shift_add", (other, x, 1.0, *shift)
    norm: tuple[Any, ...] = (*unmoved, False, "zeros")
    yield "shift_add_group_norm_silu", (x, None, *tables, groups, 1e-5, *norm)
    _, _, mean, rstd = reference.shift_add_group_norm_silu(x, None, *tables, groups, 1e-5, *norm)
    yield (
        "shift_add_group_norm_silu_backward",
        (other, None, x, False, *tables, mean, rstd, groups, *norm),
    )
    filter = image(channels, channels, 3, 3) * (9 * channels) ** -0.5
    yield (
        CONV2D,
        (x, None, *tables, groups, 1e-5, filter, bias, None, other, 1.0, *unmoved, False,
         spec.sizes, spec.offsets(clip), spec.boundary, False),
    )  # fmt: skip


def _agrees(got: Any, expected: Any, dtype: torch.dtype) -> bool:
    results = got if isinstance(got, (tuple, list)) else (got,)
    targets = expected if isinstance(expected, (tuple, list)) else (expected,)
    for result, target in zip(results, targets, strict=True):
        if not target.numel():
            continue
        error = (result.double() - target.double()).abs().max() / target.double().abs().max()
        if not error <= _TOLERANCE[dtype]:  # NaN must not pass
            return False
    return True


def _clock(runs: dict[str, Run]) -> dict[str, float]:
    """Medians of rounds in turns, so that whatever else the machine does hits all alike."""
    threads = torch.get_num_threads()
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=threads)
        for name, run in runs.items()
    }
    once = min(timer.timeit(1).mean for timer in timers.values())
    count = max(int(_SECONDS / max(once, 1e-9)), 1)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(count).mean * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}
