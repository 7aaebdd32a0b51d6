"""Makes the pictures of generated clips in the README and the docs.

    python docs/figures/gallery.py                                # the model in the package
    python docs/figures/gallery.py --model runs/shift --model runs/none --output ablation

Captions are of combinations of colour, shape and direction that were never trained on, in the order
in which they are drawn from a seed: nothing is picked by its looks. Several models get the same
captions and noise, one row each.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latent_shift import LatentShiftPipeline
from latent_shift.evaluation.moving_shapes import held_out_prompts
from latent_shift.video import write_clip, write_sheet

SCALE, GAP, LINES = 2, 8, 3
PAPER, INK = (255, 255, 255), (30, 30, 30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="embedded (default), a folder; repeatable")
    parser.add_argument(
        "--output", default="embedded_gallery", help="name beside this file, no suffix"
    )
    parser.add_argument("--number", type=int, default=8, help="captions")
    parser.add_argument("--columns", type=int, default=4, help="of the moving picture")
    parser.add_argument("--seed", type=int, default=0, help="chooses captions and noise")
    args = parser.parse_args()
    models = args.model or ["embedded"]
    captions = [prompt.text for prompt in held_out_prompts(args.number, seed=args.seed)]
    rows = [generate(model, captions, args.seed) for model in models]
    labels = [Path(model).name for model in models]
    stem = Path(__file__).parent / args.output
    clips = [row[index] for index in range(len(captions)) for row in rows]
    lines = [
        caption if len(models) == 1 else f"{label}: {caption}"
        for caption in captions
        for label in labels
    ]
    about = {"models": models, "captions": captions, "seed": args.seed}
    write_sheet(clips, stem.with_suffix(".png"), captions=lines, metadata=about)
    tiles = [captioned(clip, line) for clip, line in zip(clips, lines, strict=True)]
    write_clip(grid(tiles, args.columns), stem.with_suffix(".gif"), metadata=about)


def generate(model: str, captions: list[str], seed: int) -> list[np.ndarray]:
    """Clips of a model, uint8 (T, H, W, 3)."""
    if model == "embedded":
        pipe = LatentShiftPipeline.from_embedded()
    else:
        pipe = LatentShiftPipeline.from_pretrained(model)
    return pipe(captions, seed=seed, output_type="np").to_uint8()


def captioned(clip: np.ndarray, text: str) -> np.ndarray:
    """The clip, enlarged, over its caption."""
    clip = clip.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    frames, height, width, _ = clip.shape
    font = ImageFont.load_default(size=10)
    strip = Image.new("RGB", (width, 13 * LINES), PAPER)
    wrapped = textwrap.wrap(text, width // 6)[:LINES]
    ImageDraw.Draw(strip).multiline_text((0, 2), "\n".join(wrapped), INK, font)
    below = np.broadcast_to(np.asarray(strip), (frames, 13 * LINES, width, 3))
    return np.concatenate([clip, below], axis=1)


def grid(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Clips of one size, in reading order."""
    frames, height, width, _ = tiles[0].shape
    rows = -(-len(tiles) // columns)
    shape = (frames, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    page = np.full(shape, PAPER, np.uint8)
    for index, tile in enumerate(tiles):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        page[:, top : top + height, left : left + width] = tile
    return page


if __name__ == "__main__":
    main()
