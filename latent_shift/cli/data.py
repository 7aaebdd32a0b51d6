"""``latent-shift data``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    SPLITS,
    CommandError,
    Device,
    Dtype,
    Model,
    Scale,
    check_folder,
    checked,
    choice,
    console,
    dtype_of,
    load,
    many,
    note,
    place_of,
    progress,
    size_of,
    why,
    write,
)

if TYPE_CHECKING:
    from ..data.base import ClipFormat, ClipSource
    from ..data.report import Report
    from ..pipeline import LatentShiftPipeline

KINDS = ("auto", "folder", "frames", "table", "webdataset", "huggingface", "moving-shapes")
_FRAMES = 16

app = typer.Typer(help="Data sets of captioned clips: look into them, cache what training sees.")
shapes = typer.Typer(help="The generated training clips: moving shapes with captions.")
app.add_typer(shapes, name="shapes")

Where = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder, a table, tars, a name on the Hugging Face Hub, or moving-shapes:clips=100.",
    ),
]
Kind = Annotated[str, typer.Option(metavar="|".join(KINDS), help="What DATA is.")]
CaptionColumn = Annotated[str, typer.Option(metavar="NAME", help="Of tables and tars' JSON.")]
PathColumn = Annotated[str, typer.Option(metavar="NAME", help="Of tables.")]
Images = Annotated[
    bool, typer.Option("--images/--no-images", help="Whether images are clips of one frame.")
]
FramesFps = Annotated[float, typer.Option(min=0.01, help="The rate of folders of frames.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="In pixels.")]
Fps = Annotated[
    float | None,
    typer.Option(min=0.01, help="Bring clips to this rate first; as stored if absent."),
]
Stride = Annotated[int, typer.Option(min=1, help="Then take every K-th frame.", metavar="K")]


@app.command()
def inspect(
    where: Where,
    kind: Kind = "auto",
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Count what clips of this many frames would leave out."),
    ] = None,
    size: Size = None,
    fps: Fps = None,
    stride: Stride = 1,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Show clips with their captions.")
    ] = None,
    number: Annotated[int, typer.Option(min=1, help="Clips on the sheet.")] = 8,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Decode every frame, to find damage inside pictures."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    caption_column: CaptionColumn = "caption",
    path_column: PathColumn = "path",
    images: Images = True,
    frames_fps: FramesFps = 8.0,
) -> None:
    """Tells what a data set holds, what in it is damaged, and what training would leave out."""
    if frames is None and (size or fps or stride > 1):
        raise typer.BadParameter("--size, --fps and --stride go with --frames")
    width, height = size_of(size)
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise typer.BadParameter(f"{str(sheet)!r} must end in .png", param_hint="--sheet")
        _checked_sheet(sheet)
    source = _open(where, kind, caption_column, path_column, images, frames_fps)
    from ..data.base import ClipFormat
    from ..data.report import contact_sheet
    from ..data.report import inspect as look

    form = None
    if frames is not None:
        form = ClipFormat(
            frames, height or 64, width or 64, fps, stride, crop="center", start="middle"
        )
    with progress("clips", len(source)) as advance:
        report = look(source, form, thorough=decode, progress=advance)
    if as_json:
        content = {**vars(report), "usable": report.usable}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        for line in _lines(report, form):
            console().print(line)
    if sheet is not None:
        try:
            contact_sheet(source, sheet, number, form)
        except ValueError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"cannot write {sheet}: {error}") from error
        if not as_json:
            console().print(f"wrote {sheet}")


@app.command()
def cache(
    where: Where,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the cache.")],
    model: Model = "embedded",
    kind: Kind = "auto",
    frames: Annotated[int, typer.Option(min=1, help="Frames a clip; 1 for images.")] = _FRAMES,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="In pixels; the model's own if absent.")
    ] = None,
    fps: Fps = None,
    stride: Stride = 1,
    posterior: Annotated[
        str,
        typer.Option(
            metavar="sample|mean",
            help="sample: latents are drawn anew at every reading, as without a cache. mean: half "
            "as large.",
        ),
    ] = "sample",
    store: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="What is stored.")
    ] = "float16",
    shard_clips: Annotated[int, typer.Option(min=1, help="Clips in a file.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Threads that read ahead.")] = 2,
    rank: Annotated[
        int | None, typer.Option(min=0, help="This process among --world; torchrun's if absent.")
    ] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Processes that share the work.")] = None,
    caption_column: CaptionColumn = "caption",
    path_column: PathColumn = "path",
    images: Images = True,
    frames_fps: FramesFps = 8.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    layout: Annotated[
        str, typer.Option(help="For a single-file checkpoint, a folder or name of its layout.")
    ] = "",
    revision: Annotated[str, typer.Option(help="Of a name on the Hub.")] = "",
    variant: Annotated[str, typer.Option(help="Of a folder's or name's files, as fp16.")] = "",
) -> None:
    """Computes latents and text embeddings once; goes on where it was interrupted.

    Clips are cropped in the middle, and their frames are taken from the middle.
    """
    width, height = size_of(size)
    posterior = choice(posterior, ("sample", "mean"), "--posterior")
    store = choice(store, ("float32", "float16", "bfloat16"), "--store")
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    if rank >= world:
        raise typer.BadParameter(f"{rank} is not below --world {world}", param_hint="--rank")
    check_folder(output)
    source = _open(where, kind, caption_column, path_column, images, frames_fps)

    import torch

    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = dtype_of(dtype, device)
    if layout or revision or variant or Path(model).is_file():
        pipe = _as_training_loads(model, layout, revision, variant).to(place_of(device))
    else:
        pipe = load(model, device, "float32")
    if height is None or width is None:
        height, width = pipe._own_size()
    factor = pipe.vae_scale_factor
    if height % factor or width % factor:
        raise typer.BadParameter(
            f"{width}x{height}: width and height must be multiples of {factor} for this model",
            param_hint="--size",
        )
    from safetensors import SafetensorError

    from ..data.base import ClipFormat
    from ..data.cache import CacheError, build_cache, share

    form = ClipFormat(frames, height, width, fps, stride, crop="center", start="middle")
    try:
        with progress("clips", share(len(source), shard_clips, rank, world)) as advance:
            report = build_cache(
                source,
                form,
                pipe.vae,
                pipe.text_encoder,
                pipe.tokenizer,
                output,
                rank=rank,
                world=world,
                posterior=posterior,  # type: ignore[arg-type]
                dtype=store,
                compute=dtype,
                shard_clips=shard_clips,
                workers=workers,
                progress=advance,
            )
    except CacheError as error:
        raise CommandError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise CommandError(
            f"cannot write {output}: {error}; what is complete is kept, the same command goes on"
        ) from error
    if report.cut_captions:
        note(
            f"{many(report.cut_captions, 'caption')} too long for the text encoder, which sees "
            f"{pipe.tokenizer.model_max_length} tokens of them"
        )
    line = f"{output}: {many(report.clips, 'clip')} in {many(report.written, 'new shard')}"
    if report.found:
        line += f", {many(report.found, 'shard')} found done"
    console().print(line)
    if report.skipped:
        console().print(f"skipped {_counts(report.skipped)}")


def _as_training_loads(model: str, layout: str, revision: str, variant: str) -> LatentShiftPipeline:
    from ..training import TrainingError
    from ..training.finetune import load_model
    from ..training.finetune_config import ModelConfig

    try:
        return load_model(
            ModelConfig(source=model, layout=layout, revision=revision, variant=variant)
        )
    except TrainingError as error:
        raise CommandError(str(error)) from error
    except Exception as error:  # as in `common.load`: of many libraries, without a base in common
        raise CommandError(f"cannot load the model {model!r}: {why(error)}") from error


@shapes.command()
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
    split = choice(split, SPLITS, "--split")
    if Path(output).suffix:
        raise typer.BadParameter(f"{output!r}: give a name without suffix", param_hint="--output")
    sheet = Path(f"{output}.png")
    from ..video import check_writable, numbered, write_sheet

    gifs = [numbered(f"{output}.gif", index, number) for index in range(number)]
    for path in (sheet, *gifs):
        checked(check_writable, path)
    from ..data import MovingShapes

    data = MovingShapes(seed, num_frames=frames, size=size, split=split)
    drawn = [data.sample(index) for index in range(number)]
    arrays = [
        (clip.frames.permute(0, 2, 3, 1) * 255).round().byte().numpy() for clip in drawn
    ]  # (T, H, W, 3)
    say = console().print
    for clip, array, path in zip(drawn, arrays, gifs, strict=True):
        write(array, path, 8.0, scale, {"prompt": clip.prompt.text})
        say(f"wrote {path}: {clip.prompt.text}")
    write_sheet(arrays, sheet, captions=[clip.prompt.text for clip in drawn], scale=scale)
    say(f"wrote {sheet}")


@shapes.command()
def truth(
    index: Annotated[int, typer.Argument(min=0, help="Number of the clip.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the sequence.")] = 0,
    wordings: Annotated[int, typer.Option(min=1, help="Captions to show.")] = 3,
    split: Annotated[str, typer.Option(metavar="|".join(SPLITS))] = "train",
) -> None:
    """Shows the captions and the exact ground truth of one clip of the training data, as JSON."""
    import dataclasses

    split = choice(split, SPLITS, "--split")
    from ..data import MovingShapes

    data = MovingShapes(seed, split=split)
    captions = [data.prompt(index, wording=wording).text for wording in range(wordings)]
    content = {"captions": captions, "truth": dataclasses.asdict(data.truth(index))}
    typer.echo(json.dumps(content, indent=2))


def _open(
    where: str,
    kind: str,
    caption_column: str,
    path_column: str,
    images: bool,
    frames_fps: float,
) -> ClipSource:
    kind = choice(kind, KINDS, "--kind")
    from ..data.sources import open_source

    try:
        return open_source(
            where,
            kind=kind,  # type: ignore[arg-type]
            caption_column=caption_column,
            path_column=path_column,
            images_as_clips=images,
            frames_fps=frames_fps,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error


def _checked_sheet(path: Path) -> None:
    from ..video import check_writable

    try:
        check_writable(path)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--sheet") from None


def _lines(report: Report, form: ClipFormat | None) -> list[str]:
    """The report for readers."""
    lines = [f"{report.where}: {many(report.clips, 'clip')}, kind {report.kind}"]
    if report.frames and report.widths and report.heights:
        read = f"{many(report.videos, 'video')}, {many(report.images, 'still image')}"
        lines.append(f"readable  {read}")
        lines.append(f"frames    {_span(report.frames)}")
        if report.fps and report.seconds:
            lines.append(f"fps       {_span(report.fps)}; {_span(report.seconds)} seconds")
        lines.append(f"width     {_span(report.widths)}; height {_span(report.heights)}")
    captions = f"captions  {report.captions}"
    if report.words:
        low, mean, high = report.words
        captions += f", of {_span((low, high))} words, {mean:.1f} on average"
    lines.append(captions)
    lines += [f"  {text!r}" for text in report.examples]
    lines.append(f"damaged   {_counts(report.damaged)}")
    if form is not None:
        at = f" at {form.fps:g} fps" if form.fps else ""
        stride = f", one in {form.stride}," if form.stride > 1 else ""
        lines.append(f"{form.num_frames} frames{at}{stride} leave out {_counts(report.refused)}")
    lines += [f"  {reason}" for reason in report.reasons]
    if report.unmatched:
        belong = "belongs" if len(report.unmatched) == 1 else "belong"
        lines.append(
            f"unmatched {many(len(report.unmatched), 'caption')} {belong} to no clip, such as "
            f"{report.unmatched[0]}"
        )
    lines.append(f"usable    {report.usable} of {report.clips}")
    return lines


def _span(pair: tuple[Any, Any]) -> str:
    low, high = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in pair)
    return low if low == high else f"{low} to {high}"


def _counts(counts: Any) -> str:
    if not counts:
        return "none"
    total = sum(counts.values())
    return f"{total}: " + ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
