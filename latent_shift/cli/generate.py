"""``latent-shift generate``."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Device,
    Dtype,
    Model,
    Scale,
    Seed,
    checked,
    choice,
    console,
    load,
    many,
    note,
    progress,
    prompts_of,
    size_of,
    write,
)

if TYPE_CHECKING:
    from ..pipeline import LatentShiftPipeline

# name: diffusers class, changes to its configuration
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
BOUNDARIES = ("zeros", "replicate", "circular")
_BARE_SUFFIXES = (".gif", ".mp4", ".png")  # what an output name without suffix stands for


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to show.")] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Repeatable. The suffix chooses: .gif, .mp4, .webp, .png (a sheet of all frames), "
            "a trailing / (a folder of frames); none means .gif, .mp4 and .png. Named after the "
            "prompt if absent.",
        ),
    ] = None,
    model: Model = "embedded",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts from a file, one a line.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    seed: Seed = None,
    num_videos: Annotated[int, typer.Option(min=1, help="Clips of each prompt.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames; 1 makes an image.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="NAME", help=", ".join(SCHEDULERS))
    ] = None,
    boundary: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(BOUNDARIES),
            help="What the shift brings in at the ends of the clip; circular makes it loop.",
        ),
    ] = None,
    scale: Scale = 1,
    batch: Annotated[int, typer.Option(min=1, help="Clips generated at once.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generates clips from text; frames, size, steps and guidance default to the model's own."""
    texts = prompts_of(prompt, prompts)
    names = [text for text in texts for _ in range(num_videos)]
    scheduler = scheduler and choice(scheduler, SCHEDULERS, "--scheduler")
    boundary = boundary and choice(boundary, BOUNDARIES, "--boundary")
    width, height = size_of(size)
    files = _outputs(output or [_slug(texts[0]) if prompts is None else prompts.stem], len(names))
    seed = secrets.randbelow(2**31) if seed is None else seed

    started = time.perf_counter()
    pipe = load(model, device, dtype)
    if scheduler:
        _set_scheduler(pipe, scheduler)
    if boundary:
        pipe.set_shift(boundary=boundary)
    factor = pipe.vae_scale_factor
    if size and (width % factor or height % factor):
        raise typer.BadParameter(
            f"{size}: width and height must be multiples of {factor} for this model",
            param_hint="--size",
        )
    loaded = time.perf_counter()

    denoise = decode = 0.0
    written: list[Path] = []
    steps = steps or pipe.config.default_steps
    total = -(-len(names) // batch) * steps
    with progress("denoising", total) as advance:
        for start in range(0, len(names), batch):
            chunk = names[start : start + batch]
            began = done = time.perf_counter()

            def step_end(_pipe: Any, _step: int, _timestep: Any, _tensors: dict) -> dict:
                nonlocal done
                done = time.perf_counter()
                advance(1)
                return {}

            result: Any = pipe(
                chunk,
                negative_prompt=negative,
                num_frames=frames,
                height=height,
                width=width,
                fps=fps,
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=seed + start,
                output_type="np",
                callback_on_step_end=step_end,
            )
            denoise += done - began
            decode += time.perf_counter() - done
            clips = result.to_uint8()
            for row, clip in enumerate(clips):
                for path in files[start + row]:
                    written.append(write(clip, path, result.fps, scale, result.metadata[row]))

    say = console().print
    for path in written:
        say(f"wrote {path}")
    count, height, width = clips[0].shape[:3]
    about = result.metadata[0]
    say(
        f"{many(len(names), 'clip')} of {many(count, 'frame')}, {width}x{height}, "
        f"{result.fps:g} fps; {many(about['steps'], 'step')} of {about['scheduler']}, "
        f"guidance {about['guidance_scale']:g}, seed {seed}"
    )
    say(f"load {loaded - started:.1f} s, denoise {denoise:.1f} s, decode {decode:.1f} s")
    say(_kernels(pipe.device.type))


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))[:48].rstrip("-") or "clip"


def _outputs(names: Sequence[str], count: int) -> list[list[Path]]:
    """The files of each of ``count`` clips, every one checked to be writable."""
    from ..video import check_writable, numbered

    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if name.endswith(("/", os.sep)) or path.suffix:
            paths.append(path)
        else:
            paths += [path.with_name(path.name + suffix) for suffix in _BARE_SUFFIXES]
    files = [[numbered(path, index, count) for path in paths] for index in range(count)]
    for path in (path for clip in files for path in clip):
        checked(check_writable, path)
    return files


def _set_scheduler(pipe: LatentShiftPipeline, name: str) -> None:
    import inspect as python_inspect

    import diffusers

    kind, changes = SCHEDULERS[name]
    cls = getattr(diffusers, kind)
    config = pipe.scheduler.config
    if (
        config.get("rescale_betas_zero_snr")
        and "rescale_betas_zero_snr" not in python_inspect.signature(cls.__init__).parameters
    ):
        note(
            f"the model was trained with zero terminal SNR, which {name} does not know; ddim, "
            "euler and dpm++ do"
        )
    pipe.scheduler = cls.from_config(config, **changes)


def _kernels(device_type: str) -> str:
    from latent_shift_kernels import dispatch

    kernels = dispatch.serving(device_type)
    served: dict[str, list[str]] = {}
    for op, kernel in kernels.items():
        # no composed operator makes clips
        if not op.endswith("_backward") and kernel != "composed":
            served.setdefault(dispatch.title(kernel, kernels), []).append(op)
    told = "; ".join(f"{title} for {', '.join(ops)}" for title, ops in served.items())
    return f"kernels on {device_type}: {told}"
