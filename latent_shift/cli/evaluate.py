"""``latent-shift evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    SPLITS,
    Device,
    Dtype,
    Model,
    check_json_file,
    choice,
    console,
    load,
    progress,
)


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
    split = choice(split, SPLITS, "--split")
    if output:
        check_json_file(output)
    pipe = load(model, device, dtype)
    from ..evaluation import moving_shapes

    config = pipe.config
    settings: dict[str, Any] = {
        "num_frames": frames or config.default_num_frames,
        "num_inference_steps": steps or config.default_steps,
        "guidance_scale": config.default_guidance_scale if guidance is None else guidance,
        "split": split,
        "seed": seed,
    }
    with progress("generating", number) as advance:

        def generate_some(texts: Sequence[str], **call: Any) -> Any:
            result = pipe(texts, **call)
            advance(len(texts))
            return result

        scores = moving_shapes.evaluate(generate_some, number, batch_size=batch, **settings)
    say = console().print
    for name, value in scores.items():
        say(f"{name:<16} {value:.3f}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": pipe.model_name, "number": number, **settings}
        output.write_text(json.dumps({**content, "scores": scores}, indent=2) + "\n")
        say(f"wrote {output}")
