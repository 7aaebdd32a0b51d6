"""``latent-shift evaluate``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    SPLITS,
    CommandError,
    Device,
    Dtype,
    Model,
    check_json_file,
    choice,
    console,
    load,
    place_of,
    progress,
    prompts_of,
    size_of,
)

if TYPE_CHECKING:
    from ..data.base import ClipFormat, ClipSource
    from ..evaluation.measure import Plan, Score
    from ..evaluation.sets import GeneratedClips, StoredClips
    from ..pipeline import LatentShiftPipeline

_SHAPES = "moving-shapes"
_FRAMES = 16  # of stored clips, unless told otherwise; the field's number
_SIZE = 256  # pixels a side, likewise
# what torchrun and accelerate launch tell their processes
_WORLD = int(os.environ.get("WORLD_SIZE", "1"))
_FIRST = os.environ.get("RANK", "0") == "0"


def evaluate(
    model: Model = "embedded",
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            metavar="NAME,NAME,...",
            help="shapes, fvd[shapes], clipsim[shapes], fvd, kvd, fid, fid[clip], is, is[ucf101], "
            "clipsim.",
        ),
    ] = "shapes",
    generated: Annotated[
        str | None,
        typer.Option(metavar="CLIPS", help="Score these clips instead of a model's."),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="CLIPS",
            help="What to compare with, moving shapes if absent: a folder, a table, tars, or "
            "moving-shapes:seed=1,clips=2048. Its captions are what a model is asked.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Captions for the model, one a line.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(min=1, help="Clips, of either set; what the metrics ask for if absent."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="|".join(SPLITS), help="Which combinations of colour, shape and motion."
        ),
    ] = "held_out",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames a clip.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels; the model's, or 256x256.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, help="Bring stored clips to this rate first.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Classifier-free guidance.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses captions, noise and clips.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Clips at once.")] = 8,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the metrics' networks are; docs/evaluation.md."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the real clips' features here.")
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(min=0, help="Bootstrap draws; 0 for no intervals.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure on too few clips; the protocol says so.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Store the scores.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Scores a model, or stored clips. Without options: does each clip of moving shapes show what
    its caption says?
    """
    split = choice(split, SPLITS, "--split")
    width, height = size_of(size)
    if generated and prompts:
        raise typer.BadParameter(
            "--prompts is for a model; --generated clips have captions of their own",
            param_hint="--prompts",
        )
    texts = prompts_of(None, prompts) if prompts else None
    if output:
        check_json_file(output)
    if weights and not weights.is_dir():
        raise typer.BadParameter(f"there is no folder {str(weights)!r}", param_hint="--weights")

    from ..evaluation import measure as measuring
    from ..evaluation.networks import EvaluationError

    try:
        metrics = measuring.parse_metrics(metric)
    except EvaluationError as error:
        raise typer.BadParameter(str(error), param_hint="--metric") from None
    try:
        plan = measuring.Plan(metrics, weights=weights, force=force)
    except EvaluationError as error:
        raise CommandError(str(error)) from error
    named = _open(real, "--real") if real else None
    made = _open(generated, "--generated") if generated else None
    place = _place(device)

    settings: dict[str, Any]
    clips: StoredClips | GeneratedClips
    if made is not None:
        frames = frames or _FRAMES
        form = _format(frames, height or _SIZE, width or _SIZE, fps)
        clips = _stored(made, form, number, seed, "--generated")
        settings = {"generated": made.kind, "num_frames": frames, "seed": seed}
    else:
        pipe = load(model, place, dtype)
        config = pipe.config
        frames = frames or config.default_num_frames
        own = pipe.unet.config.sample_size
        own_height, own_width = (own, own) if isinstance(own, int) else own
        form = _format(
            frames,
            height or own_height * pipe.vae_scale_factor,
            width or own_width * pipe.vae_scale_factor,
            fps,
        )
        call = {
            "num_inference_steps": steps or config.default_steps,
            "guidance_scale": config.default_guidance_scale if guidance is None else guidance,
            "height": form.height,
            "width": form.width,
        }
        about: dict[str, Any] = {
            "model": pipe.model_name,
            "weights": _weights(pipe),
            "fps": config.default_fps,
        }
        asked: Sequence[Any]
        wanted = number or max(64, 0 if force else plan.minimum)
        if texts is not None:
            asked = texts[: number or None]
        elif named is not None and named.kind != _SHAPES:
            asked = _captions(named, number or len(named), seed)
        else:
            from ..evaluation.moving_shapes import held_out_prompts

            asked = held_out_prompts(wanted, seed, split=split, image=frames == 1)
            about["split"] = split
        from ..evaluation.sets import GeneratedClips

        clips = GeneratedClips(pipe, asked, frames, seed=seed, about=about, **call)
        settings = {**about, "num_frames": frames, **call, "seed": seed}
    compared = None
    if plan.compares:
        source = named or _open(
            f"{_SHAPES}:seed=1,clips={clips.count},split={split},frames={frames}", "--real"
        )
        compared = _stored(source, form, number or clips.count, seed, "--real")
    try:
        # before anything is generated
        plan.check(clips, real=False)
        if compared is not None:
            plan.check(compared, real=True)
        total = clips.count + (compared.count if compared else 0)
        bar = progress("clips", -(-total // _WORLD)) if _FIRST else nullcontext(_silent)
        with bar as advance:
            scores = measuring.measure(
                plan,
                clips,
                compared,
                cache=cache,
                resamples=resamples,
                seed=seed,
                batch=batch,
                device=place,
                progress=advance,
            )
    except EvaluationError as error:
        raise CommandError(str(error)) from error
    if scores:
        _tell(scores, {"number": clips.count, **settings}, plan, output)


def _tell(
    scores: dict[str, Score], settings: dict[str, Any], plan: Plan, output: Path | None
) -> None:
    say = console().print
    say(f"{'':<16} {'score':>9}   95% interval")
    for name, score in scores.items():
        ends = "{:.3f} .. {:.3f}".format(*score.interval) if score.interval else ""
        say(f"{name:<16} {score.value:>9.3f}   {ends}".rstrip())
    for metric in plan.metrics:
        if metric.name in scores and "forced" in scores[metric.name].protocol:
            say(f"{metric.name}: {scores[metric.name].protocol['forced']}, compare with nothing")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **settings,
            "scores": {name: score.value for name, score in scores.items()},
            "details": {name: score.as_json() for name, score in scores.items()},
        }
        output.write_text(json.dumps(content, indent=2) + "\n")
        say(f"wrote {output}")


def _open(where: str, option: str) -> ClipSource:
    from ..data.clips import open_source

    try:
        return open_source(where)
    except (OSError, ValueError, ImportError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _format(frames: int, height: int, width: int, fps: float | None) -> ClipFormat:
    from ..data.base import ClipFormat

    return ClipFormat(frames, height, width, fps)


def _weights(pipe: LatentShiftPipeline) -> str:
    """Hexadecimal digest of everything that is learned in a pipeline."""
    from ..data.encode import model_digest

    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return hashlib.sha256("".join(map(model_digest, parts)).encode()).hexdigest()


def _stored(
    source: ClipSource, form: ClipFormat, count: int | None, seed: int, option: str
) -> StoredClips:
    from ..evaluation.sets import StoredClips

    try:
        return StoredClips(source, form, count, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _captions(source: ClipSource, number: int, seed: int) -> list[str]:
    from ..evaluation.sets import captions

    found = captions(source, number, seed)
    if not found:
        raise typer.BadParameter(
            f"{source.where!r} has no captions: name some with --prompts", param_hint="--real"
        )
    return found


def _place(device: str) -> str:
    """The device of this process, which may be one of several."""
    if _WORLD > 1 and device == "auto":
        import torch
        from accelerate import PartialState

        return str(PartialState(cpu=not torch.cuda.is_available()).device)
    return str(place_of(device))


def _silent(_: int) -> None:
    pass
