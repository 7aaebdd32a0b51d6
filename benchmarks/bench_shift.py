"""Times the operators against what PyTorch users write, at the shapes of the SD 1.5 U-Net.

    python benchmarks/bench_shift.py                 # what this machine has, a few minutes
    python benchmarks/bench_shift.py --quick         # one small site, under a minute
    python benchmarks/bench_shift.py --op shift_add --dtype bf16 --json rows.json --plot rows.png

Providers compute the same function, with the paper's thirds (arXiv 2304.08477) and zeros at the
ends of a clip:

latent-shift  the operators of this repository
...+fused     their kernel that holds the convolution; forward only
roll          torch.roll of the moved slices, their wrapped frames zeroed, torch.cat; then PyTorch's
              own addition, group_norm, silu and conv2d
tsm           TSM's slice assignment into zeros (arXiv 1811.08383), then the same
...+compile   torch.compile of those, fixed shapes, max-autotune on a GPU; its CUDA graphs are those
              of --launch graph, which everybody gets
clone         x.clone(), the copy that bandwidths are a share of

but for two that compute a part, and are held to that part:

group_norm    PyTorch's group_norm and silu, nothing shifted
conv2d        PyTorch's conv2d alone: no shift, norm or activation

Forward is timed with no gradient required. Backward is torch.autograd.grad(retain_graph=True) on a
graph that is built once, for every provider; forward+backward builds it in every call. Nothing is
timed before its results agree with fp64 on that very shape. Providers take turns, so that ratios
come from one run. A provider that loses the layout of its input is marked and not charged for the
conversion back.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
import command
from sites import CLIP_FRAMES, EPS, MAIN, NUM_GROUPS, Site, unet_sites
from timing import Call, captured, environment, interleave, last_level_cache

import latent_shift_kernels as kernels
from latent_shift_kernels import ShiftSpec, reference

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]
Shift = Callable[[Tensor, ShiftSpec], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "backward", "forward+backward")
LAUNCHES = ("calls", "graph")
GRAPH_CALLS = 20  # at least, in a graph: its own launch is shared by them
# Largest error over largest value. Eager bf16 rounds between its kernels: a few units of 2**-9.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}


@dataclass(frozen=True)
class Op:
    """What is computed, and how many tensors of the size of x a perfect kernel reads and writes,
    besides those of the convolution's size."""

    name: str
    operator: str
    forward_tensors: int
    backward_tensors: int
    residual: bool = False
    norm: bool = False
    shift_after: bool = False
    conv: bool = False

    def floor_bytes(self, direction: str, site: Site, dtype: torch.dtype) -> int:
        """Bytes that must move: the same for every provider."""
        elements = torch.Size(site.shape).numel()
        forward, backward = self.forward_tensors * elements, self.backward_tensors * elements
        if self.conv:
            out, filter = elements // site.channels * site.out_channels, _filter_of(site).numel()
            forward, backward = forward + out + filter, backward + out + 2 * filter
        moved = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        return moved[direction] * dtype.itemsize


def _filter_of(site: Site) -> torch.Size:
    return torch.Size((site.out_channels, site.channels, 3, 3))


_NORM = "shift_add_group_norm_silu"
_CONV = "shift_group_norm_silu_conv2d"
OPS = {
    op.name: op
    for op in (
        Op("temporal_shift", "temporal_shift", 2, 2),
        Op("shift_add", "shift_add", 3, 2, residual=True),  # the residual's gradient is dy itself
        Op("shift+group_norm_silu", _NORM, 2, 3, norm=True),
        Op("group_norm_silu+shift", _NORM, 2, 3, norm=True, shift_after=True),
        Op(_NORM, _NORM, 4, 5, residual=True, norm=True),  # returns the sum as well
        Op(_CONV, _CONV, 1, 2, norm=True, conv=True),
    )
}


@dataclass(frozen=True)
class Case:
    """An operator at a site, in one direction, dtype, layout and state of the cache."""

    site: Site
    op: Op
    dtype: str
    layout: str
    direction: str
    cache: str
    launch: str

    def __str__(self) -> str:
        frames = self.site.shape[0]
        return (
            f"{self.op.name} {self.direction}, {self.site.name}, {frames} frames, {self.dtype} "
            f"{self.layout}, {self.cache} cache, {self.launch}"
        )


# Providers.


def roll_shift(x: Tensor, spec: ShiftSpec) -> Tensor:
    """``torch.roll`` of each moved slice, the wrapped frame zeroed, and ``torch.cat``."""
    clips = x.unflatten(0, (-1, CLIP_FRAMES))  # [B, T, C, H, W]
    prev, keep, next_ = clips.split(spec.sizes, dim=2)
    prev = prev.roll(1, dims=1)
    prev[:, 0] = 0
    next_ = next_.roll(-1, dims=1)
    next_[:, -1] = 0
    return torch.cat([prev, keep, next_], dim=2).flatten(0, 1)


def tsm_shift(x: Tensor, spec: ShiftSpec) -> Tensor:
    """TSM's slice assignment into zeros, with the paper's slices."""
    clips = x.unflatten(0, (-1, CLIP_FRAMES))  # [B, T, C, H, W]
    out = torch.zeros_like(clips)
    first, last = spec.prev, spec.prev + spec.keep
    out[:, 1:, :first] = clips[:, :-1, :first]
    out[:, :, first:last] = clips[:, :, first:last]
    out[:, :-1, last:] = clips[:, 1:, last:]
    return out.flatten(0, 1)


def true_shift(x: Tensor, spec: ShiftSpec) -> Tensor:
    """The reference's shift."""
    return reference.temporal_shift(
        x, None, CLIP_FRAMES, spec.sizes, spec.offsets(CLIP_FRAMES), spec.boundary
    )


def no_shift(x: Tensor, spec: ShiftSpec) -> Tensor:
    return x


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.silu(F.group_norm(x, NUM_GROUPS, weight, bias, EPS))


def composed(
    op: Op,
    shift: Shift,
    spec: ShiftSpec,
    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = group_norm_silu,
) -> Function:
    """``op`` out of a shift, a norm with its activation, and PyTorch's own functions."""

    def run(
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        filter: Tensor | None = None,
    ) -> Tensors:
        if not op.shift_after:
            x = shift(x, spec)
        if residual is not None:
            x = residual + x
        if not op.norm:
            return (x,)
        y = norm(x, weight, bias)
        if op.shift_after:
            y = shift(y, spec)
        if op.conv:
            return (F.conv2d(y, filter, padding=1),)
        return (y,) if residual is None else (y, x)

    return run


def unshifted(op: Op, shift: Shift, spec: ShiftSpec) -> Function:
    """``op`` without its shift, for those who have none to be held to."""
    return composed(op, no_shift, spec)


def convolution(x: Tensor, filter: Tensor, **others: Tensor) -> Tensors:
    """The convolution, without what comes before it."""
    return (F.conv2d(x, filter, padding=1),)


def fused(op: Op, spec: ShiftSpec) -> Function:
    """``op`` as one operator of this repository."""

    def run(
        x: Tensor,
        residual: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        filter: Tensor | None = None,
    ) -> Tensors:
        if op.conv:
            y = kernels.shift_group_norm_silu_conv2d(
                x, weight, bias, NUM_GROUPS, filter, eps=EPS, spec=spec, num_frames=CLIP_FRAMES
            )
            return (y,)
        if op.norm:
            y = kernels.shift_add_group_norm_silu(
                x,
                weight,
                bias,
                NUM_GROUPS,
                EPS,
                spec=spec,
                shift="after" if op.shift_after else "before",
                num_frames=CLIP_FRAMES,
                residual=residual,
            )
            return y if isinstance(y, tuple) else (y,)
        if residual is not None:
            return (kernels.shift_add(residual, x, spec, CLIP_FRAMES),)
        return (kernels.temporal_shift(x, spec, CLIP_FRAMES),)

    return run


def fused_convolution(op: Op, spec: ShiftSpec) -> Function:
    """The kernel that holds the convolution, whatever is served otherwise."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, filter: Tensor) -> Tensors:
        none, out_channels = None, filter.shape[0]
        offsets = spec.offsets(CLIP_FRAMES)
        out, *_ = torch.ops.latent_shift.shift_group_norm_silu_conv2d_fused(
            x, none, none, weight, bias, none, none, NUM_GROUPS, EPS, filter, none, none, none, 1.0,
            none, CLIP_FRAMES, spec.sizes, offsets, False, [0, out_channels, 0], [0, 0, 0],
            spec.boundary, False,
        )  # fmt: skip
        return (out,)

    return run


def compiled(function: Function, device: torch.device) -> Function:
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def clone(x: Tensor, **others: Tensor) -> Tensors:
    return (x.clone(),)


@dataclass(frozen=True)
class Provider:
    """Something that computes an operator, or a part of it."""

    build: Callable[[Op, ShiftSpec, torch.device], Function]
    serves: Callable[[Case], bool] = lambda case: True
    truth: Callable[[Op, Shift, ShiftSpec], Function] = composed
    """What it is held to, given the reference's shift."""
    part: str = ""
    """What of the operator it computes, if not all."""


def _takes_fused(case: Case) -> bool:
    here = case.op.conv and case.direction == "forward" and torch.cuda.is_available()
    return here and case.layout == "channels_last" and case.dtype in ("bf16", "fp16")


PROVIDERS: dict[str, Provider] = {
    "latent-shift": Provider(lambda op, spec, device: fused(op, spec)),
    "latent-shift+fused": Provider(
        lambda op, spec, device: fused_convolution(op, spec), _takes_fused
    ),
    "roll": Provider(lambda op, spec, device: composed(op, roll_shift, spec)),
    "tsm": Provider(lambda op, spec, device: composed(op, tsm_shift, spec)),
    "roll+compile": Provider(
        lambda op, spec, device: compiled(composed(op, roll_shift, spec), device)
    ),
    "tsm+compile": Provider(
        lambda op, spec, device: compiled(composed(op, tsm_shift, spec), device)
    ),
    "group_norm": Provider(
        lambda op, spec, device: composed(op, no_shift, spec),
        lambda case: case.op.norm and not case.op.conv,
        unshifted,
        "without the shift",
    ),
    "conv2d": Provider(
        lambda op, spec, device: convolution,
        lambda case: case.op.conv,
        lambda op, shift, spec: convolution,
        "the convolution alone",
    ),
}


# Inputs and truth.


@lru_cache(maxsize=1)
def draw(op: Op, site: Site, device: torch.device) -> tuple[dict[str, Tensor], Tensors]:
    """Inputs and output gradients, fp32 but exact in bf16, so that all dtypes share one truth."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.bfloat16().float()

    inputs = {"x": normal(*site.shape)}
    if op.residual:
        inputs["residual"] = normal(*site.shape)
    if op.norm:
        inputs["weight"], inputs["bias"] = normal(site.channels), normal(site.channels)
    if op.conv:
        filter = normal(*_filter_of(site)) * (9 * site.channels) ** -0.5
        inputs["filter"] = filter.bfloat16().float()
        frames, _, height, width = site.shape
        return inputs, (normal(frames, site.out_channels, height, width),)
    outputs = 2 if op.norm and op.residual else 1
    return inputs, tuple(normal(*site.shape) for _ in range(outputs))


@lru_cache(maxsize=3)  # the operator, the part of it that some compute, that of peers
def truth(
    op: Op, site: Site, device: torch.device, of: Callable[[Op, Shift, ShiftSpec], Function]
) -> dict[str, Tensors]:
    """What fp64 gives, forward and backward."""
    inputs, douts = draw(op, site, device)
    function = of(op, true_shift, ShiftSpec.latent_shift(site.channels))
    leaves = {name: t.double().requires_grad_() for name, t in inputs.items()}
    outs = function(**leaves)
    grads = _gradients(outs, tuple(leaves.values()), tuple(d.double() for d in douts))
    outs = tuple(out.detach() for out in outs)
    return {"forward": outs, "backward": grads, "forward+backward": outs + grads}


def _gradients(outs: Tensors, leaves: Tensors, douts: Tensors, *, again: bool = False) -> Tensors:
    """Of what ``outs`` depend on."""
    grads = torch.autograd.grad(outs, leaves, douts, retain_graph=again, allow_unused=True)
    return tuple(grad for grad in grads if grad is not None)


def prepare(case: Case, function: Function, device: torch.device) -> Call:
    """``function`` on its own copy of the case's inputs, as a call without arguments."""
    inputs, douts = draw(case.op, case.site, device)

    def place(t: Tensor) -> Tensor:
        layout = LAYOUTS[case.layout] if t.dim() == 4 else torch.contiguous_format
        return t.to(DTYPES[case.dtype], copy=True).contiguous(memory_format=layout)

    leaves = {name: place(t) for name, t in inputs.items()}
    if case.direction == "forward":
        return lambda: function(**leaves)
    for leaf in leaves.values():
        leaf.requires_grad_()
    dys, wanted = tuple(place(d) for d in douts), tuple(leaves.values())
    if case.direction == "backward":
        outs = function(**leaves)
        return lambda: _gradients(outs, wanted, dys, again=True)

    def both() -> Tensors:
        outs = function(**leaves)
        return tuple(out.detach() for out in outs) + _gradients(outs, wanted, dys)

    return both


def error(results: Tensors, expected: Tensors) -> float:
    """The largest error of any result, relative to the largest value that was expected of it."""
    worst = 0.0
    for result, target in zip(results, expected, strict=True):
        relative = (result - target).abs().max() / target.abs().max()
        worst = max(worst, relative.nan_to_num(torch.inf).item())  # NaN must not compare as small
    return worst


# Measuring.


def measure(case: Case, providers: list[str], device: torch.device, seconds: float) -> list[dict]:
    """The case's rows: every provider held to fp64, those that pass timed in turns with a copy."""
    spec = ShiftSpec.latent_shift(case.site.channels)
    dtype = DTYPES[case.dtype]
    floor = case.op.floor_bytes(case.direction, case.site, dtype)
    tensor_bytes = torch.Size(case.site.shape).numel() * dtype.itemsize
    # In rotation a buffer comes round again after twice the cache has been read.
    sets = 1 if case.cache == "warm" else 2 + 2 * last_level_cache(device) // floor

    known = functions(replace(case, cache="", launch=""), device)
    rows: dict[str, dict] = {}
    calls: dict[str, list[Call]] = {}
    # the same in every graph: each set of buffers as often as the others
    each = sets * -(-GRAPH_CALLS // sets) if case.launch == "graph" else 1

    def rotate(case: Case, function: Function) -> tuple[list[Call], Tensors]:
        """The calls to time, and the results of one."""
        with stream_of(case):  # gradients are computed on the stream of the forward pass
            rotation = [prepare(case, function, device) for _ in range(sets)]
            results = rotation[0]()
            if case.launch == "graph":
                for call in rotation[1:]:
                    call()
                rotation = [captured(rotation, each, keep=case.cache == "cold")]
                results = rotation[0]()
        return rotation, results

    copying = replace(case, direction="forward")
    calls["clone"], _ = rotate(copying, clone)
    rows["clone"] = _row(case, "clone", device)
    for name in providers:
        provider = PROVIDERS[name]
        row = rows[name] = _row(case, name, device)
        if name == "latent-shift":
            row["kernel"] = kernels.serving(device.type)[case.op.operator]
        try:
            if name not in known:
                known[name] = provider.build(case.op, spec, device)
            rotation, results = rotate(case, known[name])
        except Exception as failure:  # compilers raise what they like; the run goes on
            row |= {
                "status": "error",
                "note": f"{type(failure).__name__}: {failure}".splitlines()[0],
            }
            continue
        expected = truth(case.op, case.site, device, provider.truth)
        row["error"] = error(results, expected[case.direction])
        if row["error"] > TOLERANCES[case.dtype]:
            row |= {"status": "failed", "note": f"off by {row['error']:.1e} from fp64: not timed"}
            continue
        if not results[0].is_contiguous(memory_format=LAYOUTS[case.layout]):
            row["note"] += ", " * bool(row["note"]) + "returns another layout"
        calls[name] = rotation

    timings = interleave(calls, device, warm=case.cache == "warm", seconds=seconds, each=each)
    copy = timings["clone"]
    copy_gbps = 2 * tensor_bytes / copy.ms / 1e6
    for name, timing in timings.items():
        gbps = (2 * tensor_bytes if name == "clone" else floor) / timing.ms / 1e6
        rows[name] |= {
            "ms": timing.ms,
            "ms_low": timing.ms_low,
            "ms_high": timing.ms_high,
            "gbps": gbps,
            "share_of_copy": gbps / copy_gbps,
            "ratio_to_clone": timing.ms / copy.ms,
            "speedup_vs_roll": timings["roll"].ms / timing.ms if "roll" in timings else None,
        }
    rows["clone"]["speedup_vs_roll"] = None
    return list(rows.values())


_MEASURED = (
    "error",
    "ms",
    "ms_low",
    "ms_high",
    "gbps",
    "share_of_copy",
    "ratio_to_clone",
    "speedup_vs_roll",
)


@lru_cache(maxsize=1)
def functions(case: Case, device: torch.device) -> dict[str, Function]:
    """What the providers run: compiled once for every state of the cache and way of launching."""
    torch._dynamo.reset()
    return {}


@contextmanager
def stream_of(case: Case) -> Iterator[None]:
    """Where a case is prepared: graphs on a stream of their own, which waits and is waited for."""
    if case.launch != "graph":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def _row(case: Case, provider: str, device: torch.device) -> dict[str, Any]:
    return {
        "op": case.op.name,
        "pass": case.direction,
        "site": case.site.name,
        "shape": list(case.site.shape),
        "dtype": case.dtype,
        "layout": case.layout,
        "cache": case.cache,
        "launch": case.launch,
        "device": device.type,
        "provider": provider,
        "kernel": None,
        "status": "ok",
        "note": PROVIDERS[provider].part if provider in PROVIDERS else "",
        **dict.fromkeys(_MEASURED),
    }


# The command.


@dataclass(frozen=True)
class Plan:
    """What to time."""

    cases: list[Case]
    providers: list[str]
    compiled_site: Site | None  # where the compiled providers run; None is everywhere
    device: torch.device
    seconds: float  # a case

    def providers_of(self, case: Case) -> list[str]:
        """The providers of one case."""
        everywhere = self.compiled_site in (None, case.site)
        return [
            name
            for name in self.providers
            if (everywhere or "compile" not in name) and PROVIDERS[name].serves(case)
        ]


def parser() -> argparse.ArgumentParser:
    """The options; the defaults that depend on the device are filled in by :func:`plan`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(*flags: str, help: str) -> None:
        parser.add_argument(*flags, nargs="+", metavar="NAME", help=help)

    several(
        "--op", help=f"of {', '.join(OPS)}; default all, on a CPU without the one that convolves"
    )
    several("--pass", help=f"of {', '.join(PASSES)}; default {PASSES[0]} and {PASSES[1]}")
    several(
        "--site",
        "--shape",
        help="such as down0.res, 320x32x32 or 16x320x32x32; default every site of the U-Net on a "
        f"GPU, {', '.join(MAIN)} on a CPU",
    )
    several("--resolution", help="of 256, 512 pixels; default both on a GPU, 256 on a CPU")
    several("--frames", help="of 16, 32, 64; default 16 and 32 on a GPU, 16 on a CPU")
    several("--dtype", help=f"of {', '.join(DTYPES)}; default bf16 on a GPU, fp32 on a CPU")
    several("--layout", help=f"of {', '.join(LAYOUTS)}; default both")
    several(
        "--provider",
        help=f"of {', '.join(PROVIDERS)}; default all, the compiled ones at the first site only, "
        "for compiling takes longer than timing",
    )
    parser.add_argument(
        "--cache",
        default="warm",
        help="warm: each call directly follows itself on the same buffers (the default); cold: "
        "buffers rotate through twice the last-level cache; both",
    )
    several(
        "--launch",
        help="calls: each call by itself (the default); graph: a CUDA graph of "
        f"{GRAPH_CALLS} calls or more, timed whole",
    )
    parser.add_argument("--device", help="cpu or cuda; default cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default torch's")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="FILE.py",
        help="further providers: a Python file with a dict PROVIDERS, such as peers.py",
    )
    parser.add_argument("--quick", action="store_true", help="one small site, nothing compiled")
    command.add_output_options(parser)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the speed-ups over roll")
    return parser


def plan(args: argparse.Namespace) -> Plan:
    """Checks every name and fills in what the device decides.

    Raises:
        ValueError: On an unknown name, with the choices.
    """

    choose = partial(command.choose, args)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    (device,) = choose("device", devices, devices[:1])
    gpu = device == "cuda"
    launches = choose("launch", LAUNCHES, LAUNCHES[:1])
    if "graph" in launches and not gpu:
        raise ValueError("--launch graph: CUDA graphs need a CUDA device")
    caches = choose("cache", ("warm", "cold", "both"), ())
    resolutions = choose("resolution", ("256", "512"), ("256", "512") if gpu else ("256",))
    frames = choose("frames", ("16", "32", "64"), ("16", "32") if gpu else ("16",))
    every_site = [s for r, f in product(resolutions, frames) for s in unet_sites(int(r), int(f))]
    default_sites = MAIN[-1:] if args.quick else {s.block for s in every_site} if gpu else MAIN
    aliases = {alias for site in every_site for alias in site.aliases}
    site_names = dict.fromkeys(site.name for site in every_site)
    asked = set(choose("site", aliases, default_sites, site_names))
    sites = [site for site in every_site if asked.intersection(site.aliases)]
    eager = [name for name in PROVIDERS if "compile" not in name]
    combinations = product(
        sites,
        choose("op", OPS, [name for name, op in OPS.items() if gpu or not op.conv]),
        choose("dtype", DTYPES, ["bf16" if gpu else "fp32"]),
        choose("layout", LAYOUTS, LAYOUTS),
        choose("pass", PASSES, PASSES[:2]),
        ("warm", "cold") if caches == ["both"] else caches,
        launches,
    )
    return Plan(
        # Cases that share inputs and truth follow each other.
        cases=[Case(site, OPS[op], *rest) for site, op, *rest in combinations],
        providers=choose("provider", PROVIDERS, eager if args.quick else PROVIDERS),
        compiled_site=None if args.provider else sites[0],
        device=torch.device(device),
        seconds=0.3 if args.quick or gpu else 1.0,
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, one section per case; a speed-up below 1 is red."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "pass", "site", "dtype", "layout", "cache", "launch", "provider"):
        drawn.add_column(heading, no_wrap=True)
    for heading in ("ms", "20 % .. 80 %", "GB/s", "of copy", "x clone", "vs roll"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("note")
    labels = ("op", "pass", "site", "dtype", "layout", "cache", "launch")
    shown = None
    for row in rows:
        case = tuple(row[label] for label in labels)
        if shown not in (None, case):
            drawn.add_section()
        label_cells = case if case != shown else ("",) * len(case)
        shown = case
        if row["ms"] is None:
            drawn.add_row(
                *label_cells, row["provider"], row["status"], *[""] * 5, row["note"], style="red"
            )
            continue
        speedup = row["speedup_vs_roll"]
        verdict = "" if speedup is None else f"{speedup:.2f}"
        if speedup is not None and speedup < 1:
            verdict = f"[red]{verdict}[/red]"
        drawn.add_row(
            *label_cells,
            row["provider"],
            f"{row['ms']:.3f}",
            f"{row['ms_low']:.3f} .. {row['ms_high']:.3f}",
            f"{row['gbps']:.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['ratio_to_clone']:.2f}",
            verdict,
            row["note"],
            style="bold"
            if row["provider"] == "latent-shift"
            else "dim"
            if row["provider"] == "clone"
            else None,
        )
    return drawn


def heading(where: dict[str, Any], device: torch.device) -> str:
    """What the numbers are, in a few lines."""
    served = kernels.serving(device.type)
    by_kernel = ", ".join(
        f"{op}: {served[op]}" for op in dict.fromkeys(o.operator for o in OPS.values())
    )
    floors = ", ".join(
        f"{op.name} {op.forward_tensors}/{op.backward_tensors}" + " and the convolution's" * op.conv
        for op in OPS.values()
    )
    return "\n".join(
        (
            command.machine(where),
            f"latent-shift's kernels: {by_kernel}",
            "GB/s is by the floor, the same for every provider: tensors of the size of x that must "
            f"be read or written, forward/backward: {floors}",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 where a provider failed the comparison with fp64."""
    options = parser()
    args = options.parse_args(argv)
    try:
        if args.peers:
            PROVIDERS.update(runpy.run_path(str(args.peers))["PROVIDERS"])
        todo = plan(args)
    except (ValueError, OSError, KeyError) as unknown:
        print(f"{options.prog}: {unknown}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.plot:
        from plot import draw_speedups  # matplotlib is needed for nothing else
    console = command.make_console()
    try:
        results = command.Results(environment(todo.device), args, console)
    except ValueError as wrong:
        print(f"{options.prog}: {wrong}", file=sys.stderr)
        return 2
    console.print(heading(results.where, todo.device), highlight=False)

    def rows_of(case: Case) -> command.Rows:
        return measure(case, todo.providers_of(case), todo.device, todo.seconds)

    functions.cache_clear()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is held to fp32
    torch.backends.cudnn.benchmark = True  # cuDNN's best, for everybody who calls it
    # A graph that is differentiated many times must keep its buffers.
    with functorch_config.patch(donated_buffer=False):
        results.measure(todo.cases, rows_of)
    code = results.report(table(results.rows))
    if args.plot:
        draw_speedups(results.rows, results.where, args.plot)
    return code


if __name__ == "__main__":
    sys.exit(main())
