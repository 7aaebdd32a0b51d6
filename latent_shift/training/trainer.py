"""The training loop: stages in order, resumable at any step, bitwise.

Everything random in step `n` of a stage is drawn from a generator seeded by `(seed, stage, n)`, and
a checkpoint holds weights, optimizer, moving average and step. So a run that is killed and resumed
computes the same bits, on one machine, as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from latent_shift.training.checkpoints import load_latest, save_checkpoint
from latent_shift.training.config import OptimizerConfig, Recipe, load_recipe, to_dict


class Stage(Protocol):
    """One part of a recipe; the loop trains whatever implements this."""

    name: str
    steps: int
    optimizer: OptimizerConfig
    gate: float

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns AdamW parameter groups; "scale" is a factor on the learning rate."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns the trained modules by name."""

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Returns the loss of one step, all randomness drawn from `generator`."""

    def evaluate(self) -> dict[str, float]:
        """Scores the modules as they are."""

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        """Returns the scores that the gate looks at."""

    def finish(self) -> None:
        """Writes what the next stage needs; the modules hold the moving average by then."""


class Interrupted(Exception):
    """The time given to the run is over; a checkpoint has been written."""


class Clock:
    """Decides when to stop and when to save; a SIGTERM asks for a stop at the next step."""

    def __init__(self, max_seconds: float | None, save_seconds: float) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._save_seconds = save_seconds
        self._last_save = time.monotonic()
        self._asked = False

    def ask_to_stop(self, *_: object) -> None:
        self._asked = True

    @property
    def over(self) -> bool:
        return self._asked or (self._deadline is not None and time.monotonic() >= self._deadline)

    def time_to_save(self) -> bool:
        if time.monotonic() - self._last_save < self._save_seconds:
            return False
        self._last_save = time.monotonic()
        return True


def derive_seed(*parts: object) -> int:
    """Returns a 63-bit seed that depends on every part."""
    return (
        int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
    )


def learning_rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the factor on the learning rate at `step` of `steps`."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = min(1.0, (steps - step) / max(config.decay * steps, 1.0))
    return min(rise, fall)


class Ranks:
    """The processes of a run, one for each device or CPU core; a single one needs no launcher.

    Every rank draws the randomness of the whole batch, computes its own rows, and the gradients are
    averaged: the number of ranks changes rounding and nothing else. Launch with `torchrun
    --nproc-per-node N -m latent_shift.training ...`.
    """

    def __init__(self, device: torch.device) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = device
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1)
            )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """Returns this rank's rows of a batch, which has to split evenly."""
        if batch % self.world:
            raise ValueError(f"a batch of {batch} does not split evenly over {self.world} ranks")
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages gradients over the ranks, as one message."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def agree(self, flag: bool) -> bool:
        """Returns the first rank's `flag` on every rank."""
        if self.world == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8, device=self.device)
        dist.broadcast(shared, src=0)
        return bool(shared)

    def wait(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()


class Results:
    """Scores of all stages, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def record(self, stage: str, entry: dict[str, Any]) -> None:
        values = self.read()
        values.setdefault(stage, []).append(entry)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=2))
        os.replace(temporary, self.path)


def run_stage(
    stage: Stage, recipe: Recipe, directory: Path, clock: Clock, results: Results, ranks: Ranks
) -> None:
    """Trains one stage to its last step, from its newest checkpoint if it has one.

    Raises:
        Interrupted: the clock ran out; the state is saved.
    """
    groups = stage.parameter_groups()
    parameters = [parameter for group in groups for parameter in group["params"]]
    config = stage.optimizer
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    average = EMAModel(parameters, decay=config.ema_decay, foreach=True)
    checkpoints = directory / "checkpoints"
    first = 0
    if (found := load_latest(checkpoints)) is not None:
        first, state = found
        for name, module in stage.modules().items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        average.to(device=parameters[0].device)

    def save(step: int) -> None:
        if not ranks.first:
            return
        state = {
            "modules": {name: module.state_dict() for name, module in stage.modules().items()},
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict(),
        }
        save_checkpoint(checkpoints, step, state, keep=recipe.keep)

    def evaluate(step: int, last: bool) -> None:
        if ranks.first:
            score(step, last)
        ranks.wait()

    def score(step: int, last: bool) -> None:
        average.store(parameters)
        average.copy_to(parameters)
        for module in stage.modules().values():
            module.eval()
        with torch.no_grad():
            scores = stage.evaluate()
        gated = stage.gated(scores)
        missed = {key: value for key, value in gated.items() if value < stage.gate}
        entry = {"step": step, "scores": scores, "gate": stage.gate, "missed": missed, "last": last}
        results.record(directory.name, entry)
        tqdm.write(
            f"{stage.name} at step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
        )
        if last and missed:
            tqdm.write(
                f"WARNING: stage {stage.name} misses its gate of {stage.gate}: "
                + ", ".join(f"{key} {value:.3f}" for key, value in missed.items()),
                file=sys.stderr,
            )
        if last:
            stage.finish()
        average.restore(parameters)

    for module in stage.modules().values():
        module.train()
    log = open(directory / "log.jsonl" if ranks.first else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
    interval = 0.5 if sys.stderr.isatty() else 30.0
    running = None
    quiet = not ranks.first
    with (
        log,
        tqdm(
            total=stage.steps, initial=first, desc=stage.name, mininterval=interval, disable=quiet
        ) as bar,
    ):
        for step in range(first, stage.steps):
            if ranks.agree(clock.over):
                save(step)
                raise Interrupted(f"{stage.name} stopped at step {step} of {stage.steps}")
            if clock.time_to_save():
                save(step)
            if recipe.evaluate_every and step and step % recipe.evaluate_every == 0:
                evaluate(step, last=False)
                for module in stage.modules().values():
                    module.train()
            factor = learning_rate_factor(step, stage.steps, config)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * group.get("scale", 1.0) * factor
            generator = torch.Generator().manual_seed(derive_seed(recipe.seed, stage.name, step))
            loss = stage.loss(step, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.average_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            average.step(parameters)
            if step % 10 == 0:
                value = loss.item()
                if not torch.isfinite(norm):
                    raise FloatingPointError(
                        f"{stage.name}: the gradient of step {step} is not finite"
                    )
                running = value if running is None else 0.95 * running + 0.05 * value
                log.write(
                    json.dumps(
                        {"step": step, "loss": value, "norm": norm.item(), "time": time.time()}
                    )
                    + "\n"
                )
                log.flush()
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
            bar.update()
    save(stage.steps)
    evaluate(stage.steps, last=True)


def train(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path,
    stages: Sequence[str] | None = None,
    max_seconds: float | None = None,
) -> bool:
    """Runs a recipe's stages in order, resuming whatever is already there.

    Args:
        recipe: path of a TOML file, name of a recipe that comes with the package, or a `Recipe`.
        overrides: `table.key=value` strings.
        output_dir: checkpoints, scores and the finished pipeline (`model`) go here.
        stages: run only these, in the recipe's order; default all.
        max_seconds: stop, with a checkpoint, after this long; call again to go on.

    Returns:
        True if everything asked for is done, False if the time ran out.
    """
    from latent_shift.training.export import export, load_run
    from latent_shift.training.stages import STAGES, Workspace

    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    unknown = set(stages or ()) - set(STAGES)
    if unknown:
        raise ValueError(f"unknown stages {sorted(unknown)}; there are {list(STAGES)}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    clock = Clock(max_seconds, settings.save_seconds)
    # only the main thread may set a signal's handler
    handles = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, clock.ask_to_stop) if handles else None
    workspace = Workspace(settings, root, clock)
    ranks = workspace.ranks
    if ranks.first:
        (root / "recipe.json").write_text(json.dumps(to_dict(settings), indent=2))
    results = Results(root / "scores.json")
    try:
        for name, build in STAGES.items():
            directory = root / workspace.directory_of(name)
            if (stages is not None and name not in stages) or (directory / "done").exists():
                continue
            directory.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(derive_seed(settings.seed, name, "initial weights"))
            stage = build(workspace)
            run_stage(stage, settings, directory, clock, results, ranks)
            if ranks.first:
                if name == "video" and settings.video.temporal == "shift":
                    export(load_run(root, directory.name, settings), root / "model")
                (directory / "done").touch()
            ranks.wait()
    except Interrupted as stop:
        tqdm.write(f"{stop}; run the same command again to go on")
        return False
    finally:
        if handles:
            signal.signal(signal.SIGTERM, previous)
    return True
