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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from latent_shift.evaluation.moving_shapes import held_out_prompts
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.training.config import Recipe, load_recipe
from latent_shift.training.export import load_run
from latent_shift.training.measuring import Stopwatch, kept_for_backward
from latent_shift.training.trainer import train
from latent_shift.video import write_sheet

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

IMAGE = Arm("image", "the image model that all start from")


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
    measure_finished(output_dir, source, overrides)
    return True


def measure_finished(root: Path, source: str | Path, overrides: Sequence[str] = ()) -> None:
    """Writes `costs.json`: what every arm costs whose first seed is trained, unless it says."""
    recipes = {
        arm.name: recipe_of(arm, 0, source, overrides)
        for arm in ARMS
        if (root / f"video-{arm.name}-0" / "done").exists()
    }
    if recipes.keys() != _costs(root).keys():
        (root / "costs.json").write_text(json.dumps(measure(root, recipes), indent=1) + "\n")


def measure(root: Path, recipes: dict[str, Recipe], rounds: int = 7) -> dict[str, dict[str, float]]:
    """What finished arms cost: millions of parameters, seconds of a training step, megabytes that
    one clip keeps for its backward pass, seconds to sample a clip.

    The arms take turns, so that whatever else the machine does hits all of them alike; times are
    medians.

    Args:
        recipes: of finished arms, by name.
        rounds: turns of every arm.
    """
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    costs: dict[str, dict[str, float]] = {}
    times: dict[tuple[str, str], list[float]] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = Stopwatch(device)
    for name, recipe in recipes.items():
        pipe = load_run(root, f"video-{recipe.video.run}", recipe)
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
        pipe.unet.to(memory_format=torch.channels_last).train()
        kept = kept_for_backward(pipe.unet, partial(_predicted, pipe, recipe, clips=1))
        pipe.unet.eval()
        costs[name] = {
            "million_parameters": sum(p.numel() for p in pipe.unet.parameters()) / 1e6,
            "megabytes_for_backward": kept / 1e6,
        }
        calls[name] = {
            "seconds_per_step": training_step(pipe, recipe),
            "seconds_per_clip": partial(pipe, "a red circle moving right", seed=0),
        }
        for call in calls[name].values():
            call()
    for _ in range(rounds):
        for name, own in calls.items():
            for what, call in own.items():
                began = watch.now()
                call()
                times.setdefault((name, what), []).append(watch.now() - began)
    for (name, what), seconds in times.items():
        costs[name][what] = statistics.median(seconds)
    return costs


def training_step(pipe: LatentShiftPipeline, recipe: Recipe) -> Callable[[], object]:
    """A step on a batch of clips, as a call: text encoder, forward, backward and optimizer."""
    unet = pipe.unet
    predicted = partial(_predicted, pipe, recipe, clips=recipe.video.batch)
    # a rate of zero: the arm is sampled from after it
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        unet.train()
        predicted().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        unet.eval()

    return step


def _predicted(pipe: LatentShiftPipeline, recipe: Recipe, clips: int) -> Tensor:
    """What the U-Net makes of a batch of ones, with gradients."""
    unet, side = pipe.unet, recipe.latent_size
    with torch.no_grad():
        prompts = ["a red circle moving right"] * clips
        text = pipe.encode_prompt(prompts, unet.device, 1, False)[0]
    shape = clips, unet.config.in_channels, recipe.data.num_frames, side, side
    batch = torch.ones(shape, device=unet.device)
    steps = torch.full((clips,), 500, device=unet.device)
    half = recipe.precision == "bf16"
    with torch.autocast(unet.device.type, dtype=torch.bfloat16, enabled=half):
        return unet(batch, steps, text, added_cond_kwargs={}).sample


def results(root: Path, arms: Sequence[Arm] = ARMS) -> dict[str, list[dict[str, Any]]]:
    """Per arm, what its finished seeds scored, each with what the arm costs."""
    scores, costs = _scores(root), _costs(root)
    found: dict[str, list[dict[str, Any]]] = {}
    if image := [entry["scores"] for entry in scores.get("image", []) if entry["last"]]:
        found[IMAGE.name] = [{f"image/{key}": value for key, value in image[-1].items()}]
    for arm in arms:
        for folder in sorted(root.glob(f"video-{arm.name}-[0-9]*")):
            last = [entry for entry in scores.get(folder.name, []) if entry["last"]]
            if last:
                found.setdefault(arm.name, []).append(last[-1]["scores"] | costs.get(arm.name, {}))
    return found


def _scores(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> its evaluations; of a run that has none yet, nothing."""
    return _read(root / "scores.json")


def _costs(root: Path) -> dict[str, dict[str, float]]:
    """Arm -> what it costs, of those that were measured."""
    return _read(root / "costs.json")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


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
            "million_parameters": "M parameters",
            "seconds_per_step": "s a step",
            "megabytes_for_backward": "MB kept a clip",
            "seconds_per_clip": "s a clip",
        },
    }
    parts = []
    for title, keys in columns.items():
        lines = [
            f"| {title} | seeds | " + " | ".join(keys.values()) + " |",
            "|---" * (len(keys) + 2) + "|",
        ]
        first = [IMAGE] if title == "single frames" else []
        for arm in [*first, *arms]:
            rows = found.get(arm.name, [])
            seeds, cells = len(rows), ["not run"] * len(keys)
            if rows and title == "cost":  # the first seed's
                seeds, costs = 1, rows[0]
                cells = [f"{costs[key]:.3g}" if key in costs else "not measured" for key in keys]
            elif rows:
                cells = [interval([row[key] for row in rows if key in row]) for key in keys]
            lines.append(f"| {arm.title} | {seeds} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def curves(root: Path, path: Path, arms: Sequence[Arm] = ARMS) -> None:
    """Draws over the steps how much less every arm's loss on clips is than the first arm's on the
    same ones, and how many of its clips move the right way: means and ranges of the seeds."""
    from matplotlib import pyplot  # needed for nothing else

    scores = _scores(root)
    images = _read(root / "recipe.json").get("video", {}).get("image_every", 0)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for number, arm in enumerate(arms):
        less: dict[int, list[float]] = {}
        told: dict[int, list[float]] = {}
        for folder in sorted(root.glob(f"video-{arm.name}-[0-9]*")):
            seed = folder.name.rpartition("-")[2]
            mine, first = _losses(folder), _losses(root / f"video-{arms[0].name}-{seed}")
            running = 0.0
            for step in sorted(mine.keys() & first.keys()):
                if images and step % images == 0:
                    continue
                running = 0.97 * running + 0.03 * (first[step] - mine[step])
                less.setdefault(step, []).append(running)
            for entry in scores.get(folder.name, []):
                told.setdefault(entry["step"], []).append(
                    entry["scores"].get("direction", math.nan)
                )
        for axes, values, marker in ((left, less, ""), (right, told, ".")):
            steps, columns = sorted(values), [values[step] for step in sorted(values)]
            means = [statistics.fmean(column) for column in columns]
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.plot(steps, means, color=f"C{number}", label=arm.title, marker=marker)
            axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="loss of the first arm less own, moving average")
    right.set(xlabel="step", ylabel="direction right", ylim=(0, 1))
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _losses(folder: Path) -> dict[int, float]:
    """Step -> loss, of what a stage has logged."""
    log = folder / "log.jsonl"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
    return {line["step"]: line["loss"] for line in lines}


def clips(
    root: Path,
    path: Path,
    source: str | Path,
    overrides: Sequence[str] = (),
    arms: Sequence[Arm] = ARMS,
    number: int = 3,
) -> None:
    """Writes one picture of what the first seed of every finished arm draws for the same captions
    and noise; the captions are the first of the held-out ones, not picked."""
    texts = [prompt.text for prompt in held_out_prompts(number, seed=5)]
    drawn: dict[str, list] = {}
    for arm in arms:
        if (root / f"video-{arm.name}-0" / "unet").exists():
            pipe = load_run(root, f"video-{arm.name}-0", recipe_of(arm, 0, source, overrides))
            pipe.set_progress_bar_config(disable=True)
            output: Any = pipe(texts, seed=5, output_type="np")
            drawn[arm.title] = output.to_uint8()
    lines = [(text, title, drawn[title][i]) for i, text in enumerate(texts) for title in drawn]
    if lines:
        write_sheet(
            [clip for *_, clip in lines],
            path,
            captions=[f"{title}: {text}" for text, title, _ in lines],
            scale=2,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 3 if the time ran out first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument("overrides", nargs="*", metavar="TABLE.KEY=VALUE")
    parser.add_argument("--recipe", default="reproduce", help="a TOML file, or a recipe's name")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--arm", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument(
        "--report", type=Path, help="only write PATH.md, PATH.png and PATH-clips.png"
    )
    args = parser.parse_args(argv)
    arms = [arm for arm in ARMS if arm.name in args.arm]
    if args.report:
        measure_finished(args.output, args.recipe, args.overrides)
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.with_suffix(".md").write_text(tables(results(args.output)))
        curves(args.output, args.report.with_suffix(".png"))
        sheet = args.report.with_name(f"{args.report.name}-clips.png")
        clips(args.output, sheet, args.recipe, args.overrides)
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
