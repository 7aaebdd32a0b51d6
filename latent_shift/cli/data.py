"""``latent-shift data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import SPLITS, Scale, checked, choice, console, write

app = typer.Typer(help="The generated training clips: moving shapes with captions.")


@app.command()
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


@app.command()
def inspect(
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
