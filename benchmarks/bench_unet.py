"""Times whole ResNet blocks and whole U-Nets: the shift on the fused operators against what PyTorch
users write, against no shift at all, and against temporal layers with parameters.

    python benchmarks/bench_unet.py                     # what this machine has
    python benchmarks/bench_unet.py --quick             # the smallest block and the tiny U-Nets
    python benchmarks/bench_unet.py --model unet --size sd15 --pass forward --json rows.json

Models: one ResNet block of Stable Diffusion 1.5 per width (``block``), and a whole U-Net with 16
frames of 256x256 or 512x512 (``unet``), of Stable Diffusion 1.5's size on a GPU and of the embedded
model's on a CPU. Providers:

latent-shift  diffusers' model with the shift in it, on the operators of this repository
...+recompute with recompute_activations(): half of the memory that blocks keep; training alone
roll          diffusers' model with torch.roll of the moved slices, their wrapped frames zeroed and
              torch.cat on every branch's output; text and time embedding repeated per frame
tsm           the same with TSM's slice assignment (arXiv 1811.08383)
...+compile   torch.compile of those
image         diffusers' model without any shift, on as many images: what time costs
image+fuse    the same after latent_shift_kernels' fuse()
vdm           temporal convolution and attention after every block (latent_shift.temporal)
unet3d        diffusers' UNet3DConditionModel (ModelScope), and with fuse()
motion        diffusers' UNetMotionModel (AnimateDiff), and with fuse()

All are given channels_last inputs, random weights and one seed. Forward is timed without gradients,
train is forward, mean squared error and backward to every parameter (the optimizer's step is the
same for all). Providers take turns. Nothing is timed before it agrees with the provider that it
stands for, computed in fp32. Memory is the peak of what torch allocates during one call, beyond
weights and inputs; kept is what autograd holds from forward to backward, weights aside.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # a line per profile otherwise

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
import command
from bench_shift import DTYPES, roll_shift, tsm_shift
from sites import CLIP_FRAMES
from timing import Call, environment, interleave

from latent_shift.temporal import insert_temporal_layers
from latent_shift.training.measuring import kept_for_backward
from latent_shift.unet import insert_shift
from latent_shift_kernels import Placement, ShiftSpec
from latent_shift_kernels.integrations.diffusers import (
    fuse,
    recompute_activations,
    shift_resnet_block,
)

Inputs = tuple[Tensor, ...]
PASSES = ("forward", "train")
# RMS of the difference from fp32 over RMS of the result, through the whole model.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1, "fp16": 2e-2}
TIME_WIDTH = 1280  # of Stable Diffusion's time embedding

# Block, channels in, channels out, latent side / side: one of every width and resolution.
BLOCKS = {
    "down0.res": (320, 320, 1),
    "up3.res0": (960, 320, 1),
    "down1.res": (640, 640, 2),
    "down2.res": (1280, 1280, 4),
    "up1.res0": (2560, 1280, 4),
    "down3.res": (1280, 1280, 8),
}
MAIN_BLOCKS = ("down0.res", "down1.res", "down2.res", "down3.res")

_SD = {
    "down_block_types": (*("CrossAttnDownBlock{0}",) * 3, "DownBlock{0}"),
    "up_block_types": ("UpBlock{0}", *("CrossAttnUpBlock{0}",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}
_TINY = {
    "down_block_types": ("DownBlock{0}", "CrossAttnDownBlock{0}", "CrossAttnDownBlock{0}"),
    "up_block_types": ("CrossAttnUpBlock{0}", "CrossAttnUpBlock{0}", "UpBlock{0}"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "norm_num_groups": 8,
}
# Name: architecture, attention heads, channels of the latents, pixels of a latent, tokens of text.
SIZES: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "tiny": (_TINY, 4, 4, 4, 24),
    "sd15": (_SD, 8, 4, 8, 77),
}


@dataclass(frozen=True)
class Case:
    """A model, what is done with it, and how many clips of ``CLIP_FRAMES`` frames it is given."""

    model: str  # "block" or "unet"
    part: str  # block, or size of the U-Net
    resolution: int
    clips: int  # two under classifier-free guidance
    dtype: str
    direction: str

    def __str__(self) -> str:
        return (
            f"{self.model} {self.part}, {self.resolution} px, {self.clips} clips, {self.dtype} "
            f"{self.direction}"
        )


@dataclass(frozen=True)
class Contender:
    """A model on its inputs, and the provider that it has to agree with, if there is one."""

    module: nn.Module
    inputs: Inputs
    like: str | None = None
    run: Callable[..., Any] | None = None  # ``module``, compiled; it has no truth value

    @property
    def inner(self) -> bool:
        """Whether there is more of a network before it, which wants a gradient."""
        return isinstance(self.module, ResnetBlock2D)

    def output(self) -> Tensor:
        result = (self.module if self.run is None else self.run)(*self.inputs)
        return result if isinstance(result, Tensor) else result[0]


# The models.


class NaiveShift(nn.Module):
    """A shift in plain PyTorch, as a module."""

    def __init__(self, shift: Callable[[Tensor, ShiftSpec], Tensor], channels: int) -> None:
        super().__init__()
        self.shift, self.spec = shift, ShiftSpec.latent_shift(channels)

    def forward(self, frames: Tensor) -> Tensor:
        return self.shift(frames, self.spec)


def shift_naively(model: nn.Module, shift: Callable[[Tensor, ShiftSpec], Tensor]) -> nn.Module:
    """A copy of ``model`` with a naive shift on the output of every ResNet block's branch."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if type(block) is ResnetBlock2D:
            block.conv2 = nn.Sequential(block.conv2, NaiveShift(shift, block.conv2.out_channels))
    return model


class Normal:
    """Normal numbers from one seed."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device = device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def block_contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Builders of every provider of a ResNet block."""
    channels_in, channels_out, scale = BLOCKS[case.part]
    normal, side = Normal(device), case.resolution // 8 // scale
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=channels_in, out_channels=channels_out, temb_channels=TIME_WIDTH
    )
    block = block.to(device, memory_format=torch.channels_last)
    frames = normal(case.clips * CLIP_FRAMES, channels_in, side, side)
    frames = frames.contiguous(memory_format=torch.channels_last)
    temb = normal(case.clips, TIME_WIDTH)
    repeated = temb.repeat_interleave(CLIP_FRAMES, 0)
    spec = ShiftSpec.latent_shift(channels_out)

    def shifted(recompute: bool = False) -> nn.Module:
        ours = copy.deepcopy(block)
        shift_resnet_block(ours, spec, Placement.BRANCH_OUTPUT)
        recompute_activations(ours, recompute)
        return ours

    def fused_image() -> nn.Module:
        model = copy.deepcopy(block)
        fuse(model, strict=True)
        return model

    return {
        "latent-shift": lambda: Contender(shifted(), (frames, temb), "roll"),
        "latent-shift+recompute": lambda: Contender(shifted(True), (frames, temb), "roll"),
        "roll": lambda: Contender(shift_naively(block, roll_shift), (frames, repeated)),
        "tsm": lambda: Contender(shift_naively(block, tsm_shift), (frames, repeated), "roll"),
        "image": lambda: Contender(copy.deepcopy(block), (frames, repeated)),
        "image+fuse": lambda: Contender(fused_image(), (frames, repeated), "image"),
    }


def unet_contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Builders of every provider of a U-Net."""
    config, heads, channels, factor, tokens = SIZES[case.part]
    normal, side, width = Normal(device), case.resolution // factor, config["cross_attention_dim"]
    clips = normal(case.clips, channels, CLIP_FRAMES, side, side)
    text, times = normal(case.clips, tokens, width), torch.full((case.clips,), 500, device=device)
    folded = clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    repeated = text.repeat_interleave(CLIP_FRAMES, 0)
    per_frame = (folded, times.repeat_interleave(CLIP_FRAMES), repeated)

    def build(kind: Any, suffix: str, **more: Any) -> nn.Module:
        torch.manual_seed(0)
        types = ("down_block_types", "up_block_types")
        named = {key: tuple(name.format(suffix) for name in config[key]) for key in types}
        with torch.device(device):
            model = kind(
                **{**config, **named, **more},
                in_channels=channels,
                out_channels=channels,
                sample_size=side,
            )
        for parameter in model.parameters():
            if parameter.dim() == 4:  # a three-dimensional convolution has no such layout
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return model.eval()

    @functools.cache
    def base() -> nn.Module:
        return build(UNet2DConditionModel, "2D", attention_head_dim=heads)

    def of_base(change: Callable[[Any], Any]) -> nn.Module:
        model = copy.deepcopy(base())
        change(model)
        return model

    def unet3d() -> nn.Module:
        # here it is the width of a head, 64 in ModelScope's
        width_of_head = min(64, *config["block_out_channels"])
        return build(UNet3DConditionModel, "3D", attention_head_dim=width_of_head)

    def motion() -> nn.Module:
        return build(
            UNetMotionModel,
            "Motion",
            num_attention_heads=heads,
            motion_num_attention_heads=heads,
            motion_max_seq_length=CLIP_FRAMES,
        )

    def fused(make: Callable[[], nn.Module]) -> nn.Module:
        model = make()
        fuse(model)
        return model

    def recomputing() -> nn.Module:
        model = of_base(insert_shift)
        recompute_activations(model)
        return model

    def per_clip(module: nn.Module, like: str | None = None) -> Contender:
        return Contender(module, (clips, times, text), like)

    def with_motion(module: nn.Module, like: str | None = None) -> Contender:
        return Contender(module, (clips, times, repeated), like)

    return {
        "latent-shift": lambda: per_clip(of_base(insert_shift), "roll"),
        "latent-shift+recompute": lambda: per_clip(recomputing(), "roll"),
        "roll": lambda: Contender(shift_naively(base(), roll_shift), per_frame),
        "tsm": lambda: Contender(shift_naively(base(), tsm_shift), per_frame, "roll"),
        "image": lambda: Contender(copy.deepcopy(base()), per_frame),
        "image+fuse": lambda: Contender(fused(lambda: of_base(id)), per_frame, "image"),
        "vdm": lambda: per_clip(of_base(insert_temporal_layers)),
        "unet3d": lambda: per_clip(unet3d()),
        "unet3d+fuse": lambda: per_clip(fused(unet3d), "unet3d"),
        "motion": lambda: with_motion(motion()),
        "motion+fuse": lambda: with_motion(fused(motion), "motion"),
    }


_TRAINING_ONLY = "+recompute"
_COMPILED = ("latent-shift", "roll", "tsm", "image")
PROVIDERS = {
    "block": ("latent-shift", "latent-shift+recompute", "roll", "tsm", "image", "image+fuse"),
    "unet": (
        *("latent-shift", "latent-shift+recompute", "roll", "tsm", "image", "image+fuse", "vdm"),
        *("unet3d", "unet3d+fuse", "motion", "motion+fuse"),
    ),
}
ALL_PROVIDERS = (*PROVIDERS["unet"], *(f"{name}+compile" for name in _COMPILED))


def prepared(
    build: Callable[[], Contender], provider: str, dtype: torch.dtype, device: torch.device
) -> Contender:
    """A contender in the dtype that is measured, compiled where its name says so."""
    built = build()
    module = built.module.to(dtype)
    inputs = tuple(t.to(dtype) if t.is_floating_point() else t for t in built.inputs)
    run = None
    if provider.endswith("+compile"):
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
        run = torch.compile(module, fullgraph=True, dynamic=False, mode=mode)
    return Contender(module, inputs, built.like, run)


# Measuring.


def call_of(contender: Contender, direction: str) -> Call:
    """What is timed."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return contender.output()

        return forward

    with torch.no_grad():
        target = torch.zeros_like(contender.output())

    if contender.inner:
        contender.inputs[0].requires_grad_()

    def train() -> None:
        F.mse_loss(contender.output(), target).backward()
        contender.module.zero_grad(set_to_none=True)
        contender.inputs[0].grad = None

    contender.module.train()
    return train


def difference(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over RMS of ``b``; clips and folded frames count as equal."""
    if a.dim() == 5:
        a = a.transpose(1, 2).flatten(0, 1)
    if b.dim() == 5:
        b = b.transpose(1, 2).flatten(0, 1)
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).norm() / b.norm()).nan_to_num(torch.inf).item()


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes that torch holds at most during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    held = peak = 0
    events = (e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def share_beside_products(call: Call, device: torch.device) -> float:
    """The share of a call's time that is no convolution, matrix product or attention: norms,
    activations, additions, shifts and copies."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as recorded:
        call()
    products = total = 0.0
    for event in recorded.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        total += spent
        if any(part in event.key for part in ("conv", "mm", "attention", "gemm", "fmha", "flash")):
            products += spent
    return 1.0 - products / total


def measure(case: Case, names: list[str], device: torch.device, seconds: float) -> list[dict]:
    """The case's rows: every provider held to the one it stands for, then all timed in turns."""
    torch._dynamo.reset()
    builders = (block_contenders if case.model == "block" else unet_contenders)(case, device)

    @functools.cache
    def truth(name: str) -> Tensor:
        with torch.no_grad():
            return builders[name]().output()

    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name in names:
        eager = name.removesuffix("+compile")
        if eager not in builders or (_TRAINING_ONLY in name and case.direction == "forward"):
            continue
        row = rows[name] = _row(case, name, device)
        try:
            contender = prepared(builders[eager], name, DTYPES[case.dtype], device)
            row["parameters"] = sum(p.numel() for p in contender.module.parameters())
            with torch.no_grad():
                row["error"] = difference(
                    contender.output().float(), truth(contender.like or eager)
                )
            if row["error"] > TOLERANCES[case.dtype]:
                row |= {"status": "failed", "note": f"off by {row['error']:.1e}: not timed"}
                continue
            calls[name] = call_of(contender, case.direction)
            calls[name]()
            row["peak_mib"] = peak_memory(calls[name], device) / 2**20
            if case.direction == "train":
                kept = kept_for_backward(contender.module, contender.output)
                row["kept_mib"] = kept / 2**20
            row["share_beside_products"] = share_beside_products(calls[name], device)
        except Exception as failure:  # compilers and allocators raise what they like
            calls.pop(name, None)
            row |= {
                "status": "error",
                "note": f"{type(failure).__name__}: {failure}".splitlines()[0],
            }
    truth.cache_clear()
    timings = interleave(
        {name: [call] for name, call in calls.items()}, device, warm=False, seconds=seconds
    )
    for name, timing in timings.items():
        rows[name] |= {"ms": timing.ms, "ms_low": timing.ms_low, "ms_high": timing.ms_high}
        for other in ("roll", "image"):
            if other in timings:
                rows[name][f"speedup_vs_{other}"] = timings[other].ms / timing.ms
        like = name.removesuffix("+fuse")
        if like != name and like in timings:
            rows[name]["speedup_vs_unfused"] = timings[like].ms / timing.ms
    return list(rows.values())


def _row(case: Case, provider: str, device: torch.device) -> dict[str, Any]:
    return {
        "model": case.model,
        "part": case.part,
        "pass": case.direction,
        "resolution": case.resolution,
        "frames": CLIP_FRAMES,
        "clips": case.clips,
        "guidance": case.clips == 2,
        "dtype": case.dtype,
        "layout": "channels_last",
        "device": device.type,
        "provider": provider,
        "parameters": None,
        "status": "ok",
        "note": "",
        **dict.fromkeys(_MEASURED),
    }


_MEASURED = (
    *("error", "ms", "ms_low", "ms_high", "peak_mib", "kept_mib", "share_beside_products"),
    *("speedup_vs_roll", "speedup_vs_image", "speedup_vs_unfused"),
)


# The command.


@dataclass(frozen=True)
class Plan:
    """What to time."""

    cases: list[Case]
    providers: list[str]
    device: torch.device
    seconds: float  # a case


def parser() -> argparse.ArgumentParser:
    """The options; the defaults that depend on the device are filled in by :func:`plan`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(flag: str, help: str) -> None:
        parser.add_argument(flag, nargs="+", metavar="NAME", help=help)

    several("--model", "of block, unet; default both")
    several("--block", f"of {', '.join(BLOCKS)}; default {', '.join(MAIN_BLOCKS)}")
    several("--size", "of tiny, sd15: the U-Net; default sd15 on a GPU, tiny on a CPU")
    several("--resolution", "of 256, 512 pixels; default 256, and 64 for the tiny U-Net")
    several("--guidance", "of without, with: one clip or two; default both on a GPU, with on a CPU")
    several("--pass", f"of {', '.join(PASSES)}; default both")
    several("--dtype", f"of {', '.join(DTYPES)}; default bf16 on a GPU, fp32 on a CPU")
    several("--provider", f"of {', '.join(ALL_PROVIDERS)}; default all, the compiled ones on a GPU")
    parser.add_argument("--device", help="cpu or cuda; default cuda where there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default torch's")
    parser.add_argument("--seconds", type=float, metavar="S", help="timed a case; default 5, or 1")
    parser.add_argument("--quick", action="store_true", help="the smallest block, tiny U-Nets")
    command.add_output_options(parser)
    return parser


def plan(args: argparse.Namespace) -> Plan:
    """Checks every name and fills in what the device decides.

    Raises:
        ValueError: On an unknown name, with the choices.
    """

    choose = functools.partial(command.choose, args)
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    (device,) = choose("device", devices, devices[:1])
    gpu = device == "cuda"
    models = choose("model", ("block", "unet"), ("block", "unet"))
    blocks = choose("block", tuple(BLOCKS), MAIN_BLOCKS[-1:] if args.quick else MAIN_BLOCKS)
    sizes = choose("size", tuple(SIZES), ("sd15",) if gpu and not args.quick else ("tiny",))
    resolutions = choose("resolution", ("64", "256", "512"), ())
    guided = choose("guidance", ("without", "with"), ("without", "with") if gpu else ("with",))
    passes = choose("pass", PASSES, PASSES)
    dtypes = choose("dtype", tuple(DTYPES), ("bf16",) if gpu else ("fp32",))
    eager = tuple(name for name in ALL_PROVIDERS if "+compile" not in name)
    providers = choose("provider", ALL_PROVIDERS, ALL_PROVIDERS if gpu else eager)
    parts = [("block", block) for block in blocks if "block" in models]
    parts += [("unet", size) for size in sizes if "unet" in models]
    cases = []
    for (model, part), guidance, dtype, direction in product(parts, guided, dtypes, passes):
        for resolution in resolutions or (["64"] if part == "tiny" else ["256"]):
            # a block sees frames, and whether they are one clip or two changes nothing
            clips = 2 if guidance == "with" and (model == "unet" or gpu) else 1
            cases.append(Case(model, part, int(resolution), clips, dtype, direction))
    return Plan(
        cases=list(dict.fromkeys(cases)),
        providers=providers,
        device=torch.device(device),
        seconds=args.seconds or (1.0 if args.quick else 5.0),
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, one section per case; a speed-up below 1 is red."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "pass", "px", "clips", "dtype", "provider"):
        drawn.add_column(heading, no_wrap=True)
    right = ("M param.", "ms", "20 % .. 80 %", "MiB", "kept", "beside products")
    for heading in (*right, "vs roll", "vs image", "vs unfused"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("note")
    shown = None
    for row in rows:
        case = (
            f"{row['model']} {row['part']}",
            *(row["pass"], str(row["resolution"]), str(row["clips"]), row["dtype"]),
        )
        if shown not in (None, case):
            drawn.add_section()
        cells = case if case != shown else ("",) * len(case)
        shown = case
        name = (row["provider"], f"{(row['parameters'] or 0) / 1e6:.1f}")
        if row["ms"] is None:
            drawn.add_row(*cells, *name, row["status"], *[""] * 7, row["note"], style="red")
            continue
        ratios = (row[f"speedup_vs_{other}"] for other in ("roll", "image", "unfused"))
        drawn.add_row(
            *cells,
            *name,
            f"{row['ms']:.1f}",
            f"{row['ms_low']:.1f} .. {row['ms_high']:.1f}",
            f"{row['peak_mib']:.0f}",
            "" if row["kept_mib"] is None else f"{row['kept_mib']:.0f}",
            f"{row['share_beside_products']:.0%}",
            *(
                "" if ratio is None else f"[red]{ratio:.2f}[/red]" if ratio < 1 else f"{ratio:.2f}"
                for ratio in ratios
            ),
            row["note"],
            style="bold" if row["provider"] == "latent-shift" else None,
        )
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 where a provider disagreed with the one it stands for."""
    options = parser()
    args = options.parse_args(argv)
    try:
        todo = plan(args)
    except ValueError as unknown:
        print(f"{options.prog}: {unknown}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    console = command.make_console()
    try:
        results = command.Results(environment(todo.device), args, console)
    except ValueError as wrong:
        print(f"{options.prog}: {wrong}", file=sys.stderr)
        return 2
    console.print(command.machine(results.where), highlight=False)

    def rows_of(case: Case) -> command.Rows:
        return measure(case, todo.providers, todo.device, todo.seconds)

    results.measure(todo.cases, rows_of)
    return results.report(table(results.rows))


if __name__ == "__main__":
    sys.exit(main())
