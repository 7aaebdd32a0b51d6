"""What a call moves and computes, from the launch parameters of the kernel that serves it: one
source for ``explain``, benchmarks/roofline.py and the documentation.

The launches of the CUDA kernels are planned by their own code (csrc/cuda/norm_plan.h and
shift_group_norm_silu_conv2d_plan.h), which the CPU library carries, so this needs no GPU. Bytes are
those between the multiprocessors and memory, every read counted as one of DRAM unless said
otherwise; of a second read L2 may serve part.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from . import backends

SUM = 4  # bytes of a sum or a statistic
SPECIAL_PER_CLOCK = 16  # exponentials and reciprocals, per multiprocessor
# Pixels: a side of the convolution's tiles, kTile there, and what they read around it.
_TILE, _BORDER = 8, 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORM = "shift_add_group_norm_silu"
CONV2D = "shift_group_norm_silu_conv2d"


@dataclass(frozen=True)
class Device:
    """The limits that launches are planned under, and the rates that floors are taken from."""

    arch: int
    num_sms: int
    shared_per_block: int  # bytes
    bandwidth: float = 0.0  # bytes a second
    clock: float = 0.0  # Hz
    tensor_rate: float = 0.0  # dense bf16 operations a second
    source: str = ""
    wgmma: bool = True  # whether the library has Hopper's own kernels, for what is Hopper

    @property
    def special_rate(self) -> float:
        """Exponentials and reciprocals a second."""
        return SPECIAL_PER_CLOCK * self.num_sms * self.clock

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The limits of a CUDA device of this machine."""
        properties = torch.cuda.get_device_properties(device)
        return cls(
            properties.major * 10 + properties.minor,
            properties.multi_processor_count,
            getattr(
                properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
            ),
            wgmma=_has_wgmma(),
        )


DEVICES = {
    "h200": Device(90, 132, 227 << 10, 4.3e12, 1.755e9, 790e12, "0.9 and 0.8 of the data sheet"),
    "h100": Device(90, 132, 227 << 10, 3.35e12, 1.755e9, 989e12, "data sheet, SXM"),
    "a100": Device(80, 108, 163 << 10, 2.04e12, 1.41e9, 312e12, "data sheet, 80 GB SXM"),
    "b200": Device(100, 148, 227 << 10, 8.0e12, 1.85e9, 2250e12, "data sheet"),
    "l40s": Device(89, 142, 99 << 10, 0.864e12, 2.52e9, 362e12, "data sheet"),
}


@dataclass(frozen=True)
class Work:
    """One call: an operator on ``shape`` (B*T, C, H, W)."""

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    num_groups: int = 32
    residual: bool = False
    skip_channels: int = 0
    out_channels: int = 0  # of the convolution; as many as go in where 0
    aligned: bool = True  # every tensor, to 16 bytes

    @property
    def elements(self) -> int:
        """Of what the norm sees: ``shape`` with the channels of the skip input."""
        frames, channels, height, width = self.shape
        return frames * (channels + self.skip_channels) * height * width

    @property
    def outputs(self) -> int:
        """Elements of the result."""
        frames, channels, height, width = self.shape
        if not self.op.startswith(CONV2D):
            return self.elements
        return frames * (self.out_channels or channels + self.skip_channels) * height * width


@dataclass(frozen=True)
class Cost:
    """What a kernel does with a call."""

    variant: str
    launches: int
    bytes: int
    flops: int = 0
    special: int = 0  # exponentials and reciprocals
    blocks: int = 0
    threads: int = 0
    shared: int = 0  # bytes a block
    refused: tuple[str, ...] = ()  # faster ways to launch it, and why they are not taken

    def __str__(self) -> str:
        """Bytes and launches, as ``explain`` says them."""
        size = f"{self.bytes / 1e6:.1f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:.1f} kB"
        if not self.launches:
            return f"moves {size} at least"
        said = f"moves {size} in {self.launches} launch" + ("es" if self.launches > 1 else "")
        if not self.blocks:
            return said
        return (
            f"{said} ({self.variant}: {self.blocks} blocks of {self.threads} threads, "
            f"{self.shared} bytes of shared memory)"
        )


def least(work: Work) -> Cost:
    """Every input read once and every output written once."""
    item, elements, outputs = work.dtype.itemsize, work.elements, work.outputs
    if work.op.startswith(CONV2D):
        cin = elements // (work.shape[0] * work.shape[2] * work.shape[3])
        cout = outputs // (work.shape[0] * work.shape[2] * work.shape[3])
        tensors = elements + outputs * (2 if work.residual else 1) + 9 * cin * cout
        return Cost("least", 0, tensors * item, 18 * cin * outputs + 14 * elements, 2 * elements)
    if work.op == f"{NORM}_backward":
        return Cost("least", 0, 3 * elements * item, 34 * elements, 4 * elements)
    if work.op == NORM:
        return Cost(
            "least", 0, (4 if work.residual else 2) * elements * item, 14 * elements, 2 * elements
        )
    if work.op == "shift_add":
        return Cost("least", 0, 3 * elements * item, 2 * elements)
    return Cost("least", 0, 2 * elements * item)


def cuda(work: Work, device: Device) -> Cost | None:
    """What the CUDA C++ kernels do with ``work``; None where they do not take it, or where no built
    library can say."""
    if work.op == NORM:
        return _norm(work, device)
    if work.op == f"{NORM}_backward":
        return _norm_backward(work, device)
    if work.op == CONV2D:
        return _conv2d(work, device)
    if work.op.startswith(CONV2D):
        return None
    frames, channels, height, width = work.shape
    shape = frames, channels * height * width, work.dtype.itemsize, work.aligned
    plan = _ask("latent_shift_plan_flat", 3, device, shape)
    if plan is None:
        return None
    (vector, blocks, threads), floor = plan, least(work)
    return Cost(
        f"one launch, {vector * work.dtype.itemsize} bytes an access", 1, floor.bytes, floor.flops,
        0, blocks, threads, refused=_crooked(work, vector, f"a frame's {shape[1]} elements"),
    )  # fmt: skip


def composed(work: Work, device: Device | None) -> Cost:
    """The convolution as the norm's kernel, the library's convolution, and shift_add with a
    residual; without a CUDA device, or its plan, at least."""
    frames, channels, height, width = work.shape
    joined = (frames, channels + work.skip_channels, height, width)
    activation = Work(NORM, joined, work.dtype, work.channels_last, work.num_groups)
    norm = (cuda(activation, device) if device else None) or least(activation)
    floor, item = least(work), work.dtype.itemsize
    traffic = norm.bytes + floor.bytes
    if work.skip_channels:
        traffic += 2 * work.elements * item
    if work.residual:
        traffic += 2 * work.outputs * item
    more = 1 + bool(work.skip_channels) + bool(work.residual)
    launches = norm.launches + more if norm.launches else 0
    return Cost("composed", launches, traffic, floor.flops, floor.special)


@dataclass(frozen=True)
class NormPlan:
    """A plan of csrc/cuda/norm_plan.h."""

    split: int
    cluster: int
    vector: int
    span: int
    tile_c: int
    tile_p: int
    tiles: int
    tiles_p: int
    threads: int
    shared: int
    blocks: int
    workspace: int

    @property
    def variant(self) -> str:
        return "split" if self.split else "cluster" if self.cluster > 1 else "one launch"


@dataclass(frozen=True)
class ConvPlan:
    """A plan of csrc/cuda/shift_group_norm_silu_conv2d_plan.h."""

    arch: int
    columns: int
    cluster: int
    ctas: int
    cta_columns: int
    threads: int
    shared: int
    tiles: int
    blocks: int
    pixel_chunks: int
    workspace: int


def plan_norm(work: Work, device: Device, *, backward: bool = False) -> NormPlan | None:
    """How the CUDA norm is launched: one launch, a cluster, or split; None if it is not known."""
    frames, channels, height, width = work.shape
    if channels % work.num_groups:
        return None
    shape = (
        _DTYPES.index(work.dtype), work.channels_last, frames, channels, height * width,
        work.num_groups, work.aligned,
    )  # fmt: skip
    said = _ask("latent_shift_plan_norm", 12, device, shape, backward)
    return None if said is None else NormPlan(*said)


def plan_conv(work: Work, device: Device, *, sums: bool = False) -> ConvPlan | None:
    """How the CUDA kernel that holds the convolution is launched; None where it does not take the
    call, or where it is not known."""
    frames, channels, height, width = work.shape
    if work.dtype not in backends.FUSED_CONV2D_DTYPES["cuda"] or not work.channels_last:
        return None
    shape = (
        frames, height, width, channels, work.skip_channels,
        work.out_channels or channels + work.skip_channels, work.num_groups, sums,
    )  # fmt: skip
    if device.arch == 90 and not device.wgmma:  # as the library does
        device = replace(device, arch=89)
    said = _ask("latent_shift_plan_conv", 11, device, shape)
    return None if said is None else ConvPlan(*said)


def _ask(
    name: str, count: int, device: Device, shape: Sequence[int], *first: bool
) -> list[int] | None:
    library = _library()
    if library is None:
        return None
    plan = (ctypes.c_int64 * count)()
    limits = (ctypes.c_int64 * 3)(device.arch, device.shared_per_block, device.num_sms)
    numbers = (ctypes.c_int64 * len(shape))(*shape)
    function = getattr(library, name)
    function.restype = ctypes.c_bool
    flags = [ctypes.c_bool(flag) for flag in first]
    return list(plan) if function(*flags, limits, numbers, plan) else None


@cache
def _library() -> ctypes.CDLL | None:
    path = backends.library_path("_C")
    try:
        library = None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None
    return library if hasattr(library, "latent_shift_plan_norm") else None


def _has_wgmma() -> bool:
    path = backends.library_path("_C_cuda")
    if path is None:
        return False
    function = ctypes.CDLL(str(path)).latent_shift_has_wgmma
    function.restype = ctypes.c_bool
    return function()


def _norm(work: Work, device: Device) -> Cost | None:
    plan = plan_norm(work, device)
    if plan is None:
        return None
    floor, statistics = least(work), 2 * work.shape[0] * work.num_groups * SUM
    traffic = floor.bytes + statistics
    if plan.split:  # x, or the sum that was stored, is read again
        traffic += work.elements * work.dtype.itemsize
        traffic += 2 * plan.workspace * SUM + 2 * statistics
    return Cost(
        plan.variant, 3 if plan.split else 1, traffic, floor.flops, floor.special,
        plan.blocks, plan.threads, plan.shared, _refused(work, device, plan, 1),
    )  # fmt: skip


def _norm_backward(work: Work, device: Device) -> Cost | None:
    plan = plan_norm(work, device, backward=True)
    if plan is None:
        return None
    floor, (frames, channels, *_) = least(work), work.shape
    # dz and dz * xhat per frame, tile of pixels and channel, written, and read by the last launch
    sums = 2 * 2 * frames * plan.tiles_p * channels * SUM
    traffic = floor.bytes + sums + 2 * frames * work.num_groups * SUM
    if plan.split:
        traffic += 2 * work.elements * work.dtype.itemsize
    return Cost(
        plan.variant, 4 if plan.split else 2, traffic, floor.flops, floor.special,
        plan.blocks, plan.threads, plan.shared, _refused(work, device, plan, 2),
    )  # fmt: skip


def _refused(work: Work, device: Device, plan: NormPlan, tensors: int) -> tuple[str, ...]:
    """Why a norm of so many resident tensors is not launched in a faster way."""
    frames, channels, height, width = work.shape
    item, may = work.dtype.itemsize, device.shared_per_block
    width_bytes = channels // work.num_groups * item
    # groups whose channels are whole vectors together
    groups = plan.vector * item // math.gcd(width_bytes, plan.vector * item)
    groups = groups if work.channels_last else 1
    slab = groups * width_bytes * height * width * tensors
    slower = f"slower by the plan's count for {frames} frames on {device.num_sms} multiprocessors"
    found = []
    if plan.variant != "one launch":
        holds = f"{groups} of the groups of a frame are {slab} bytes, and a block holds {may}"
        found.append(f"one block a slab: {holds if slab >= may else slower}")
    if plan.split and device.arch < 90:
        found.append(f"a cluster: sm_{device.arch} has none")
    elif plan.split:
        holds = f"{slab} bytes are more than eight blocks of {may}"
        found.append(f"a cluster: {holds if slab >= 8 * may else slower}")
    row = f"{channels} channels" if work.channels_last else f"{height * width} pixels"
    return *found, *_crooked(work, plan.vector, row)


_START = "a tensor does not begin at a multiple of 16 bytes"


def _crooked(work: Work, vector: int, row: str) -> tuple[str, ...]:
    """Why a kernel accesses so few elements at once, whose rows are of so many."""
    if vector > 1:
        return ()
    why = f"{row} are no whole number of them" if work.aligned else _START
    return (f"16 bytes an access: {why}",)


def _halo_pixels(length: int) -> int:
    """Of a row or column of ``length`` pixels, what its tiles read with their borders."""
    starts = range(0, length, _TILE)
    return sum(min(at + _TILE + _BORDER, length) - max(at - _BORDER, 0) for at in starts)


def _conv2d(work: Work, device: Device) -> Cost | None:
    plan = plan_conv(work, device)
    if plan is None:
        return None
    floor, item, frames = least(work), work.dtype.itemsize, work.shape[0]
    cin = work.elements // (frames * work.shape[2] * work.shape[3])
    # the halo of every tile once: the other blocks of columns find it in L2, as all find the filter
    halo = _halo_pixels(work.shape[2]) * _halo_pixels(work.shape[3]) * frames * cin
    halos = halo * item
    sums = 2 * 2 * frames * plan.pixel_chunks * cin * SUM
    packed = 2 * plan.cta_columns * plan.columns * plan.blocks * 32 * 9 * item
    traffic = floor.bytes + halos + sums + packed
    # every block of columns activates the halo for itself
    special = 2 * halo * plan.cta_columns
    refused = []
    if device.arch == 90 and not device.wgmma:
        refused.append("wgmma: the library holds no code for sm_90a")
    if not work.aligned:
        refused.append(f"without a copy: {_START}")
    return Cost(
        f"{'wgmma' if plan.arch == 90 else 'mma'}, {plan.columns} channels a block", 4, traffic,
        floor.flops, special, plan.ctas * plan.cta_columns, plan.threads, plan.shared,
        tuple(refused),
    )  # fmt: skip
