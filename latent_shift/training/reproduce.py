"""The paper's claim in miniature: one image model, and every way to make clips with it.

    python -m latent_shift.training.reproduce --output runs/reproduce          # or: make reproduce
    python -m latent_shift.training.reproduce --output runs/reproduce --report docs/reproduction

All arms start from the same image model and see the same clips, noise and time steps; they differ
in what lets frames meet, and nothing else. Runs resume where they stopped. The report is made of
whatever is there, and says what is not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from latent_shift.training.config import Recipe, load_recipe
from latent_shift.training.export import load_run
from latent_shift.training.trainer import train

SCORES = ("direction", "colour", "shape", "size", "background")
CONSTANT = ("colour_constant", "shape_constant")


@dataclass(frozen=True)
class Arm:
    """One way to make an image model a video model."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()


ARMS = (
    Arm("shift", "Latent-Shift: thirds, at the branch's output"),
    Arm("none", "no shift", ("video.temporal=none",)),
    Arm("vdm", "temporal convolution and attention", ("video.temporal=vdm",)),
    *(
        Arm(name, f"thirds, at {name.replace('_', ' ')}", (f"video.placement={name}",))
        for name in ("conv1_output", "conv1_input", "block_input")
    ),
    Arm("quarters", "quarters (TSM)", ("video.preset=tsm", "video.fold_div=4")),
    Arm("eighths", "eighths (TSM)", ("video.preset=tsm", "video.fold_div=8")),
)


def recipe_of(arm: Arm, seed: int, source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of one arm with one seed."""
    own = (*arm.overrides, f"video.run={arm.name}-{seed}", f"video.seed={seed}")
    recipe = load_recipe(source, (*overrides, *own))
    assert isinstance(recipe, Recipe)
    return recipe


def reproduce(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    output_dir: Path,
    arms: Sequence[Arm] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    max_seconds: float | None = None,
) -> bool:
    """Trains the image model once, then every arm with every seed; the first seed of all arms
    comes first.

    Returns:
        Whether all of it is done; False if the time ran out.
    """
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds

    def left() -> float | None:
        return None if max_seconds is None else max(deadline - time.monotonic(), 0.0)

    first = load_recipe(source, overrides)
    stages = ["autoencoder", "text", "image"]
    if not train(first, output_dir=output_dir, stages=stages, max_seconds=left()):
        return False
    for seed in seeds:
        for arm in arms:
            recipe = recipe_of(arm, seed, source, overrides)
            if not train(recipe, output_dir=output_dir, stages=["video"], max_seconds=left()):
                return False
            costs = output_dir / f"video-{arm.name}-{seed}" / "costs.json"
            if not costs.exists():
                costs.write_text(json.dumps(measure(output_dir, recipe), indent=1) + "\n")
    return True


def measure(root: Path, recipe: Recipe) -> dict[str, float]:
    """What an arm costs: parameters, seconds a training step, seconds to sample one clip."""
    folder = root / f"video-{recipe.video.run}"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pairs = [
        (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(lines, lines[1:], strict=False)
        if later["step"] > earlier["step"]
    ]
    pipe = load_run(root, folder.name, recipe)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe("a red circle", seed=0, num_inference_steps=2)
    began = time.perf_counter()
    pipe("a red circle moving right", seed=0)
    return {
        "parameters": sum(parameter.numel() for parameter in pipe.unet.parameters()),
        "seconds_per_step": statistics.median(pairs) if pairs else math.nan,
        "seconds_per_clip": time.perf_counter() - began,
    }


def results(root: Path, arms: Sequence[Arm] = ARMS) -> dict[str, list[dict[str, Any]]]:
    """Per arm, what its finished seeds scored and cost."""
    path = root / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in arms:
        for folder in sorted(root.glob(f"video-{arm.name}-[0-9]*")):
            last = [entry for entry in scores.get(folder.name, []) if entry["last"]]
            if last and (folder / "costs.json").exists():
                costs = json.loads((folder / "costs.json").read_text())
                found.setdefault(arm.name, []).append(last[-1]["scores"] | costs)
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % interval over seeds; of those that have a value."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    t = stats.t.ppf(0.975, len(values) - 1)
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}"


def tables(found: dict[str, list[dict[str, Any]]], arms: Sequence[Arm] = ARMS) -> str:
    """The results as Markdown; arms that have not run are named."""
    columns = {
        "clips": {**{key: key for key in SCORES}, "everything": "all right"},
        "motion": {**{key: key.replace("_", " ") for key in CONSTANT}, "jerk": "jerk"},
        "single frames": {
            f"image/{key}": key for key in ("colour", "shape", "size", "background", "everything")
        },
        "cost": {
            "parameters": "parameters",
            "seconds_per_step": "s a step",
            "seconds_per_clip": "s a clip",
        },
    }
    parts = []
    for title, keys in columns.items():
        lines = [
            f"| {title} | seeds | " + " | ".join(keys.values()) + " |",
            "|---" * (len(keys) + 2) + "|",
        ]
        for arm in arms:
            rows = found.get(arm.name, [])
            cells = ["not run"] * len(keys)
            if rows:
                cells = [interval([row[key] for row in rows if key in row]) for key in keys]
            lines.append(f"| {arm.title} | {len(rows)} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def curves(root: Path, path: Path, arms: Sequence[Arm] = ARMS) -> None:
    """Draws the training loss of every arm over its steps."""
    from matplotlib import pyplot  # needed for nothing else

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, arm in enumerate(arms):
        for folder in sorted(root.glob(f"video-{arm.name}-[0-9]*")):
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            steps, losses = [], []
            running = None
            for line in lines:
                running = line["loss"] if running is None else 0.98 * running + 0.02 * line["loss"]
                steps.append(line["step"])
                losses.append(running)
            label = arm.title if folder.name.endswith("-0") else None
            axes.plot(steps, losses, color=f"C{number}", label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="loss, moving average", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 3 if the time ran out first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument("overrides", nargs="*", metavar="TABLE.KEY=VALUE")
    parser.add_argument("--recipe", default="embedded", help="a TOML file, or a recipe's name")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--arm", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--report", type=Path, help="only write PATH.md and PATH.png")
    args = parser.parse_args(argv)
    arms = [arm for arm in ARMS if arm.name in args.arm]
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.with_suffix(".md").write_text(tables(results(args.output)))
        curves(args.output, args.report.with_suffix(".png"))
        return 0
    done = reproduce(
        args.recipe,
        args.overrides,
        output_dir=args.output,
        arms=arms,
        seeds=range(args.seeds),
        max_seconds=args.max_seconds,
    )
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
