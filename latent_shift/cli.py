"""The ``latent-shift`` command.

Heavy libraries are imported inside the commands, so that ``--help`` and mistakes in the arguments
answer at once. Everything that can be checked is checked before a model is loaded. Errors are one
line on stderr: exit status 2 for wrong usage, 1 for the rest; ``LATENT_SHIFT_DEBUG=1`` shows the
traceback.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__

if TYPE_CHECKING:
    from .pipeline import LatentShiftPipeline

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
DTYPES = ("float32", "float16", "bfloat16")
SPLITS = ("held_out", "train", "all")
_BARE_SUFFIXES = (".gif", ".mp4", ".png")  # what an output name without suffix stands for
_TIME_IS_UP = 3
_INTERRUPTED = 130

app = typer.Typer(
    name="latent-shift",
    help="Text to video by Latent-Shift: an image diffusion model, a channel shift, and no new "
    "parameters.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The generated training clips: moving shapes with captions.")
app.add_typer(data_app, name="data")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="embedded|DIR|NAME",
        help="The model that comes with the package, a folder (also a Stable Diffusion one), or a "
        "name on the Hugging Face Hub. Only a name touches the network.",
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|" + "|".join(DTYPES), help="auto: float32 on the CPU, else float16."
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of the first clip, the others' follow; random if absent.")
]
Scale = Annotated[int, typer.Option(min=1, help="Show every pixel as K x K pixels.", metavar="K")]


class CommandError(Exception):
    """A failure whose message is all that the user needs."""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"latent-shift {__version__}")
        raise typer.Exit


@app.command()
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
    texts = _prompts(prompt, prompts)
    names = [text for text in texts for _ in range(num_videos)]
    scheduler = scheduler and _choice(scheduler, SCHEDULERS, "--scheduler")
    boundary = boundary and _choice(boundary, BOUNDARIES, "--boundary")
    width, height = _size(size)
    files = _outputs(output or [_slug(texts[0]) if prompts is None else prompts.stem], len(names))
    seed = secrets.randbelow(2**31) if seed is None else seed

    started = time.perf_counter()
    pipe = _load(model, device, dtype)
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
    with _progress("denoising", total) as advance:
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
                    written.append(_write(clip, path, result.fps, scale, result.metadata[row]))

    say = _console().print
    for path in written:
        say(f"wrote {path}")
    count, height, width = clips[0].shape[:3]
    about = result.metadata[0]
    say(
        f"{_many(len(names), 'clip')} of {_many(count, 'frame')}, {width}x{height}, "
        f"{result.fps:g} fps; {_many(about['steps'], 'step')} of {about['scheduler']}, "
        f"guidance {about['guidance_scale']:g}, seed {seed}"
    )
    say(f"load {loaded - started:.1f} s, denoise {denoise:.1f} s, decode {decode:.1f} s")
    say(_kernels(pipe.device.type))


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a recipe of the package.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TABLE.KEY=VALUE]...", help="Changes to the recipe."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/ and the recipe's name.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=1.0, help="Stop with a checkpoint after this long.")
    ] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Run only this stage; repeatable.")
    ] = None,
) -> int:
    """Trains a model, going on from whatever the output folder holds. Exit status 3: the time ran
    out first.
    """
    wrong = [item for item in overrides or () if "=" not in item]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} is not of the form table.key=value")
    output = output or Path("runs") / Path(config).stem
    _check_folder(output)
    from .training import RecipeError, load_recipe
    from .training import train as run

    try:
        recipe = load_recipe(config, overrides or ())
    except (RecipeError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="CONFIG") from error
    try:
        done = run(recipe, output_dir=output, stages=stage, max_seconds=max_seconds)
    except ValueError as error:
        if not stage:
            raise
        raise typer.BadParameter(str(error), param_hint="--stage") from error
    return 0 if done else _TIME_IS_UP


@app.command()
def evaluate(
    model: Model = "embedded",
    number: Annotated[int, typer.Option(min=1, help="Captions.")] = 64,
    split: Annotated[
        str,
        typer.Option(
            metavar="|".join(SPLITS), help="Which combinations of colour, shape and motion."
        ),
    ] = "held_out",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames a clip.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses captions and noise.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Clips generated at once.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Store the scores.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Scores a model on moving shapes: does each clip show what its caption says?"""
    split = _choice(split, SPLITS, "--split")
    if output:
        _check_file(output)
    pipe = _load(model, device, dtype)
    from .evaluation import moving_shapes

    config = pipe.config
    settings: dict[str, Any] = {
        "num_frames": frames or config.default_num_frames,
        "num_inference_steps": steps or config.default_steps,
        "guidance_scale": config.default_guidance_scale if guidance is None else guidance,
        "split": split,
        "seed": seed,
    }
    with _progress("generating", number) as advance:

        def generate_some(texts: Sequence[str], **call: Any) -> Any:
            result = pipe(texts, **call)
            advance(len(texts))
            return result

        scores = moving_shapes.evaluate(generate_some, number, batch_size=batch, **settings)
    say = _console().print
    for name, value in scores.items():
        say(f"{name:<16} {value:.3f}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": pipe.model_name, "number": number, **settings}
        output.write_text(json.dumps({**content, "scores": scores}, indent=2) + "\n")
        say(f"wrote {output}")


@data_app.command()
def sample(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Name of the files, without suffix.")
    ] = "moving-shapes",
    number: Annotated[int, typer.Option(min=1, help="Clips.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the sequence.")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="Frames a clip.")] = 16,
    size: Annotated[int, typer.Option(min=8, help="Height and width in pixels.")] = 64,
    split: Annotated[str, typer.Option(metavar="|".join(SPLITS))] = "train",
    scale: Scale = 1,
) -> None:
    """Writes clips of the training data: a GIF of each, and one sheet of all with captions."""
    split = _choice(split, SPLITS, "--split")
    if Path(output).suffix:
        raise typer.BadParameter(f"{output!r}: give a name without suffix", param_hint="--output")
    sheet = Path(f"{output}.png")
    from .video import check_writable, numbered, write_sheet

    gifs = [numbered(f"{output}.gif", index, number) for index in range(number)]
    for path in (sheet, *gifs):
        _checked(check_writable, path)
    from .data import MovingShapes

    data = MovingShapes(seed, num_frames=frames, size=size, split=split)
    drawn = [data.sample(index) for index in range(number)]
    arrays = [
        (clip.frames.permute(0, 2, 3, 1) * 255).round().byte().numpy() for clip in drawn
    ]  # (T, H, W, 3)
    say = _console().print
    for clip, array, path in zip(drawn, arrays, gifs, strict=True):
        _write(array, path, 8.0, scale, {"prompt": clip.prompt.text})
        say(f"wrote {path}: {clip.prompt.text}")
    write_sheet(arrays, sheet, captions=[clip.prompt.text for clip in drawn], scale=scale)
    say(f"wrote {sheet}")


@data_app.command()
def inspect(
    index: Annotated[int, typer.Argument(min=0, help="Number of the clip.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the sequence.")] = 0,
    wordings: Annotated[int, typer.Option(min=1, help="Captions to show.")] = 3,
    split: Annotated[str, typer.Option(metavar="|".join(SPLITS))] = "train",
) -> None:
    """Shows the captions and the exact ground truth of one clip of the training data, as JSON."""
    import dataclasses

    split = _choice(split, SPLITS, "--split")
    from .data import MovingShapes

    data = MovingShapes(seed, split=split)
    captions = [data.prompt(index, wording=wording).text for wording in range(wordings)]
    content = {"captions": captions, "truth": dataclasses.asdict(data.truth(index))}
    typer.echo(json.dumps(content, indent=2))


@app.command()
def info() -> None:
    """Shows which kernels were built, and which serve on this machine."""
    from latent_shift_kernels.__main__ import info as kernels

    typer.echo(f"latent_shift {__version__}\n{kernels()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(arguments, prog_name="latent-shift", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:  # whatever it is, the user gets one line and no traceback
        if os.environ.get("LATENT_SHIFT_DEBUG"):
            raise
        if hasattr(error, "format_message"):  # typer's own, which older versions take from click
            return _fail(error.format_message(), 2)
        if isinstance(error, CommandError):
            return _fail(str(error), 1)
        kind = type(error).__name__
        return _fail(f"{kind}: {error} (LATENT_SHIFT_DEBUG=1 shows where)", 1)
    if status == _INTERRUPTED:  # typer's answer to Ctrl-C
        return _fail("interrupted", status)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"latent-shift: {' '.join(message.split())}", file=sys.stderr)
    return status


def _choice(value: str, choices: Sequence[str] | dict[str, Any], option: str) -> str:
    if value.lower() in choices:
        return value.lower()
    near = difflib.get_close_matches(value.lower(), list(choices), 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise typer.BadParameter(
        f"{value!r} is not one of {', '.join(choices)}{hint}", param_hint=option
    )


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE", param_hint="PROMPT")
    if file is None:
        if prompt is None or not prompt.strip():
            raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
        return [prompt]
    hint = "--prompts"
    try:
        lines = file.read_text(encoding="utf-8").rstrip().splitlines()
    except OSError as error:
        raise typer.BadParameter(
            f"cannot read {str(file)!r}: {error.strerror}", param_hint=hint
        ) from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{str(file)!r} is not UTF-8 text", param_hint=hint) from None
    if not lines:
        raise typer.BadParameter(f"{str(file)!r} holds no prompt", param_hint=hint)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise typer.BadParameter(
                f"{str(file)!r}: line {number} is empty; put one prompt on every line",
                param_hint=hint,
            )
    return [line.strip() for line in lines]


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if not match:
        raise typer.BadParameter(
            f"{text!r} is not WIDTHxHEIGHT in pixels, such as 256x256", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def _slug(text: str) -> str:
    return "-".join(re.findall(r"\w+", text.lower()))[:48].rstrip("-") or "clip"


def _outputs(names: Sequence[str], count: int) -> list[list[Path]]:
    """The files of each of ``count`` clips, every one checked to be writable."""
    from .video import check_writable, numbered

    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if name.endswith(("/", os.sep)) or path.suffix:
            paths.append(path)
        else:
            paths += [path.with_name(path.name + suffix) for suffix in _BARE_SUFFIXES]
    files = [[numbered(path, index, count) for path in paths] for index in range(count)]
    for path in (path for clip in files for path in clip):
        _checked(check_writable, path)
    return files


def _checked(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None


def _check_file(path: Path) -> None:
    from .video import check_writable

    if path.suffix.lower() != ".json":
        raise typer.BadParameter(f"{str(path)!r} must end in .json", param_hint="--output")
    # the same question asked of a name with a suffix that is known there
    _checked(check_writable, path.with_suffix(".png"))


def _check_folder(path: Path) -> None:
    from .video import check_writable

    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is not a folder", param_hint="--output")
    _checked(check_writable, path / "recipe.png")


def _write(clip: Any, path: Path, fps: float, scale: int, metadata: dict[str, Any] | None) -> Path:
    from .video import write_clip

    try:
        return write_clip(clip, path, fps=fps, scale=scale, metadata=metadata)
    except (OSError, ImportError) as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def _load(model: str, device: str, dtype: str) -> LatentShiftPipeline:
    if dtype != "auto":
        dtype = _choice(dtype, ("auto", *DTYPES), "--dtype")
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"{device!r} is not to be had here ({reason}): use --device cpu", param_hint="--device"
        ) from None
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "float16"

    import transformers.utils.logging

    # before diffusers, whose import makes transformers warn of packages that nothing here needs
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    level = diffusers.utils.logging.get_verbosity()
    # what goes wrong in loading is told once, below
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    from .pipeline import LatentShiftPipeline

    options = {"dtype": getattr(torch, dtype)}
    try:
        if model == "embedded":
            pipe = LatentShiftPipeline.from_embedded(**options)
        else:
            try:
                pipe = LatentShiftPipeline.from_pretrained(model, **options)
            except TypeError:  # an image model
                pipe = LatentShiftPipeline.from_t2i(model, **options)
                _note("this is an image model: its video was never trained, expect little motion")
    except Exception as error:  # a damaged folder fails in any of a dozen libraries
        if os.environ.get("LATENT_SHIFT_DEBUG"):
            raise
        raise CommandError(f"cannot load the model {model!r}: {_why(error)}") from error
    finally:
        diffusers.utils.logging.set_verbosity(level)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _why(error: Exception) -> str:
    """Puts a loading error in one line."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    text = " ".join(str(error).split())
    if "SafetensorError" in kinds:
        return f"a weights file is damaged, get the folder again ({text})"
    if missing := re.search(r"no file named \S+\.bin found in directory (\S+?)\.?$", text):
        return f"there are no weights (*.safetensors) in {missing[1]}, get the folder again"
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError"}:
        return (
            "it is not on this machine and the Hugging Face Hub cannot be reached; download it "
            "first, or pass a folder"
        )
    return text


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
        _note(
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


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _note(message: str) -> None:
    print(f"latent-shift: note: {message}", file=sys.stderr)


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a bar on stderr; there is no bar where stderr is not a
    terminal.
    """
    console = _console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
