"""The training loop of every recipe, resumable at any step, bitwise.

Everything random in step `n` of a stage is drawn from a generator seeded by `(seed, stage, n)`, and
by the rank where each rank draws its own batch; a checkpoint holds weights, optimizer, moving
average and step. So a run that is killed and resumed computes the same bits, on one machine's CPU,
as one that was not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ProjectConfiguration, reduce
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm

from latent_shift.training.checkpoints import (
    CheckpointWriteError,
    list_checkpoints,
    load_latest,
    save_checkpoint,
    set_newest_aside,
)
from latent_shift.training.config import OptimizerConfig, Recipe, flat, load_recipe, to_dict
from latent_shift.training.finetune_config import Finetune
from latent_shift.training.measuring import Stopwatch

_SECOND_INTERRUPT = 5.0  # seconds; torchrun sends the terminal's Ctrl-C a second time


class Stage(Protocol):
    """One part of a recipe; the loop trains whatever implements this.

    Attributes:
        own_batches: each rank draws a batch of its own; else all draw the same and share its rows.
        everywhere: all ranks take part in `evaluate` and `finish`; else the first alone.
    """

    name: str
    steps: int
    gate: float
    own_batches: bool
    everywhere: bool

    @property
    def seed(self) -> int:
        """What everything random in the stage is a function of."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer's settings."""

    @property
    def watch(self) -> Stopwatch:
        """Times the parts of a step."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns AdamW parameter groups; "scale" is a factor on the learning rate."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns the trained modules by name."""

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Returns the loss of one batch, all randomness drawn from `generator`."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores the modules as they are."""

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        """Returns the scores that the gate looks at."""

    def finish(self) -> None:
        """Writes what the next stage needs; the modules hold the moving average by then."""

    def unsharded(self, weights: dict[str, Any]) -> AbstractContextManager[None]:
        """Puts whole weights, named `module.parameter`, in place of shards for a while."""

    def advice(self, batch: int) -> str:
        """Says which settings would fit, after the loss of `batch` has run out of memory."""


class Interrupted(Exception):
    """The run was told to stop, or its time is over; a checkpoint has been written."""


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why and what to change."""


class OutOfMemory(TrainingError):
    """A step ran out of memory.

    Attributes:
        batch: the argument of the `Stage.loss` that did.
        whole: whether the weights are still those before the step.
    """

    def __init__(self, step: int, batch: int, reason: str, whole: bool) -> None:
        super().__init__(f"step {step} ran out of memory ({reason})")
        self.batch, self.whole = batch, whole

    def advised(self, stage: Stage) -> TrainingError:
        """The error with what would fit."""
        return TrainingError(f"{self}: {stage.advice(self.batch)}")


class Clock:
    """Decides when to stop and when to save; SIGTERM and SIGINT ask for a stop at the next step."""

    def __init__(self, max_seconds: float | None, save_seconds: float) -> None:
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._save_seconds = save_seconds
        self._last_save = time.monotonic()
        self._asked = 0.0

    def ask_to_stop(self, number: int = signal.SIGTERM, *_: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked and now - self._asked > _SECOND_INTERRUPT:
            raise KeyboardInterrupt
        self._asked = self._asked or now

    @property
    def over(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return bool(self._asked) or late

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
    if config.schedule == "tail":
        rise = min(1.0, (step + 1) / max(config.warmup, 1))
        fall = min(1.0, (steps - step) / max(config.decay * steps, 1.0))
        return min(rise, fall)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    # diffusers keeps the curve as a function inside a scheduler
    none = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    curve = get_scheduler(
        name, none, num_warmup_steps=config.warmup, num_training_steps=steps
    ).lr_lambdas[0]
    # from the middle of a step: the first and the last would do nothing
    return curve(step + 0.5)


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns AdamW, in eight bits where that is asked for.

    Raises:
        TrainingError: bitsandbytes is not installed, or there is no GPU for it.
    """
    # Over hundreds of small tensors the default takes a tenth of a training step on a CPU.
    kind: Any = functools.partial(torch.optim.AdamW, fused=True)
    if config.kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise TrainingError(
                'optimizer.kind = "adamw8bit" needs bitsandbytes, which is not to be had here '
                f'({error}): pip install bitsandbytes, or take "adamw"'
            ) from error
        if all(p.device.type == "cpu" for group in groups for p in group["params"]):
            raise TrainingError('optimizer.kind = "adamw8bit" needs a GPU: take "adamw"')
        kind = AdamW8bit
    return kind(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


class Ranks:
    """The processes of a run, one for each device or CPU core; a single one needs no launcher.

    Launch several with `torchrun --nproc-per-node N -m latent_shift train ...` or `accelerate
    launch`, whose settings for FSDP are taken over.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        # one process may train twice, in another precision
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=accumulate,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=folder and str(folder), logging_dir=folder and str(folder / "logs")
            ),
            kwargs_handlers=[
                # else the gradients' buckets are laid out anew after the first step, and a resumed
                # run adds up in another order
                DistributedDataParallelKwargs(
                    find_unused_parameters=True, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
        self.world = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """Returns this rank's rows of a batch, which has to split evenly."""
        if batch % self.world:
            raise ValueError(f"a batch of {batch} does not split evenly over {self.world} ranks")
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is set on some rank."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=self.device)
        return [bool(count) for count in reduce(counts, "sum")]

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of `value` over the ranks."""
        return value if self.world == 1 else reduce(value, "mean")

    def wait(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            self.accelerator.wait_for_everyone()


class Results:
    """Scores of all stages, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def record(self, stage: str, entry: dict[str, Any]) -> None:
        """Adds the scores of a step, in place of those of a run that had come further before it
        was killed."""
        values = self.read()
        before = [old for old in values.get(stage, []) if old["step"] < entry["step"]]
        values[stage] = [*before, entry]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=2))
        os.replace(temporary, self.path)


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs of a recipe.

    Attributes:
        accumulate: batches in one step.
        save_every: steps between checkpoints, beside those that the clock asks for; 0 for none.
        evaluate_every, evaluate_first: steps between evaluations, and whether to begin with one.
        about: what a checkpoint says of the run; a resumed run tells of differences.
    """

    seed: int
    keep: int
    accumulate: int = 1
    save_every: int = 0
    evaluate_every: int = 0
    evaluate_first: bool = False
    about: dict[str, Any] | None = None


class _Objective(nn.Module):
    """What DDP and FSDP wrap: the trained modules, and a forward pass that ends in the loss."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(stage.modules())
        self._loss = stage.loss

    def forward(self, step: int, generator: torch.Generator) -> Tensor:
        return self._loss(step, generator)


class Loop:
    """One stage in training: its model, optimizer and moving average on this rank."""

    def __init__(self, stage: Stage, config: LoopConfig, ranks: Ranks) -> None:
        self.stage, self.config, self.ranks = stage, config, ranks
        self.accelerator = ranks.accelerator
        optimizer = make_optimizer(stage.optimizer, stage.parameter_groups())
        self.model, self.optimizer = self.accelerator.prepare(_Objective(stage), optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = self._new_average() if stage.optimizer.ema_decay else None
        self.norm: Tensor = torch.zeros(())
        self._updating = False
        self._train()

    def step(self, step: int) -> Tensor:
        """Runs optimizer step `step`.

        Returns:
            This rank's loss, detached.

        Raises:
            OutOfMemory: the gradients are gone, and the step can be tried with other settings.
        """
        settings = self.stage.optimizer
        factor = learning_rate_factor(step, self.stage.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * group.get("scale", 1.0) * factor
        first, losses = step * self.config.accumulate, []
        self._updating = False
        try:
            for index in range(first, first + self.config.accumulate):
                losses.append(self._batch(index))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else "no memory left"
        else:
            return torch.stack(losses).mean()
        # outside the handler, whose traceback keeps the step's tensors
        self.optimizer.optimizer.zero_grad(set_to_none=True)
        raise OutOfMemory(step, first + len(losses), reason, whole=not self._updating)

    def _batch(self, index: int) -> Tensor:
        stage, watch = self.stage, self.stage.watch
        own = (self.ranks.rank,) if stage.own_batches else ()
        generator = torch.Generator().manual_seed(
            derive_seed(self.config.seed, stage.name, index, *own)
        )
        # for dropout in the layers
        torch.manual_seed(derive_seed(self.config.seed, stage.name, index, "layers", *own))
        with self.accelerator.accumulate(self.model):
            loss = self.model(index, generator)
            with watch("backward"):
                self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                with watch("optimizer"):
                    limit = stage.optimizer.max_grad_norm or float("inf")
                    self.norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                    self._updating = True
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    if self.average is not None:
                        self.average.step(self.parameters)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the moving average in the place of the weights, ready to be scored or saved."""
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        for module in self.stage.modules().values():
            module.eval()
        try:
            if self.ranks.sharded:
                whole = get_model_state_dict(
                    self.model, options=StateDictOptions(full_state_dict=True)
                )
                with self.stage.unsharded(_without_prefix(whole)):
                    yield
            else:
                yield
        finally:
            if self.average is not None:
                self.average.restore(self.parameters)
            self._train()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: what is trained, and nothing that is not."""
        state: dict[str, Any] = {"about": self.config.about or {}}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        if self.ranks.sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, moments = get_state_dict(self.model, self.optimizer.optimizer, options=options)
            state |= {"sharded": True, "weights": weights, "optimizer": moments}
            if self.average is not None:
                self.average.store(self.parameters)
                self.average.copy_to(self.parameters)
                state["average weights"] = get_model_state_dict(self.model, options=options)
                self.average.restore(self.parameters)
                state["average step"] = self.average.optimization_step
            return state
        if self.ranks.first:
            state["modules"] = {
                name: {key: v for key, v in module.state_dict().items() if key not in frozen}
                for name, module in self.stage.modules().items()
                for frozen in [_frozen(module)]
            }
            state["optimizer"] = self.optimizer.state_dict()
            if self.average is not None:
                state["average"] = self.average.state_dict()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` returned.

        Raises:
            TrainingError: it is of a run that trains something else.
        """
        told = state.get("about", {})
        changed = [
            key for key, value in (self.config.about or {}).items() if told.get(key) != value
        ]
        if told and changed and self.ranks.first:
            tqdm.write(
                f"WARNING: {', '.join(changed)} changed since the checkpoint: the run goes on, "
                "but computes something else than an uninterrupted one",
                file=sys.stderr,
            )
        try:
            self._load(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise TrainingError(
                "the checkpoint is of a run that trains something else "
                f"({str(error).splitlines()[0]}): take the settings that it began with, or another "
                "output folder"
            ) from error
        if "scaler" in state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("sharded", False) != self.ranks.sharded:
            raise ValueError("one of the two is sharded by FSDP, the other is not")
        if ("average" in state or "average weights" in state) != (self.average is not None):
            raise ValueError("one of the two keeps a moving average, the other does not")
        if self.ranks.sharded:
            options = StateDictOptions(full_state_dict=True)
            if self.average is not None:
                set_state_dict(
                    self.model,
                    self.optimizer.optimizer,
                    model_state_dict=state["average weights"],
                    optim_state_dict=state["optimizer"],
                    options=options,
                )
                self.average = self._new_average()
                self.average.optimization_step = state["average step"]
            set_state_dict(
                self.model,
                self.optimizer.optimizer,
                model_state_dict=state["weights"],
                optim_state_dict=state["optimizer"],
                options=options,
            )
            return
        for name, module in self.stage.modules().items():
            missing, unexpected = module.load_state_dict(state["modules"][name], strict=False)
            if wrong := [*unexpected, *(set(missing) - _frozen(module))]:
                raise ValueError(f"{name}.{wrong[0]} is in one of the two alone")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(device=self.parameters[0].device)

    def _new_average(self) -> EMAModel:
        # shards have no copy of many tensors at once
        foreach = not self.ranks.sharded
        return EMAModel(self.parameters, decay=self.stage.optimizer.ema_decay, foreach=foreach)

    def _train(self) -> None:
        for module in self.stage.modules().values():
            module.train()


def run_stage(
    stage: Stage,
    config: LoopConfig,
    directory: Path,
    clock: Clock,
    results: Results,
    ranks: Ranks,
    resume_from: str = "latest",
) -> None:
    """Trains one stage to its last step, from its newest checkpoint if it has one.

    Args:
        directory: the stage's own; checkpoints and log go there.
        resume_from: "latest" checkpoint, or the "previous" one, which sets the newest aside.

    Raises:
        Interrupted: the clock ran out, or a signal came; the state is saved.
        TrainingError: the run cannot go on.
        DamagedCheckpointError: the checkpoint to go on from is not what was written.
        CheckpointWriteError: the last checkpoint could not be written.
    """
    loop = Loop(stage, config, ranks)
    checkpoints = directory / "checkpoints"
    first = 0
    if resume_from == "previous":
        if ranks.first:
            set_newest_aside(checkpoints)
        ranks.wait()
    if (found := load_latest(checkpoints)) is not None:
        first, state = found
        loop.load(state)
        del state, found
    saved = first if list_checkpoints(checkpoints) else None

    def save(step: int, must: bool = True) -> None:
        nonlocal saved
        if saved == step:
            return
        if not loop.accelerator.scaler and not bool(torch.isfinite(loop.norm)):
            raise FloatingPointError(
                f"{stage.name}: the gradient before step {step} is not finite; no checkpoint was "
                "written of it: lower optimizer.learning_rate, and go on from the last one"
            )
        state = loop.state()
        if ranks.first:
            try:
                save_checkpoint(checkpoints, step, state, keep=config.keep)
            except CheckpointWriteError as error:
                if must:
                    raise
                tqdm.write(
                    f"WARNING: {error}; training goes on and tries again at the next checkpoint",
                    file=sys.stderr,
                )
                return
        saved = step

    def evaluate(step: int, last: bool) -> None:
        if stage.everywhere or ranks.first:
            with loop.averaged():
                score(step, last)
        ranks.wait()

    def score(step: int, last: bool) -> None:
        with torch.no_grad():
            scores = stage.evaluate(step)
        if ranks.first:
            gated = stage.gated(scores)
            missed = {key: value for key, value in gated.items() if value < stage.gate}
            entry = {
                "step": step,
                "scores": scores,
                "gate": stage.gate,
                "missed": missed,
                "last": last,
            }
            with going_on("the scores"):
                results.record(directory.name, entry)
                tracked = {f"validation/{key}": value for key, value in scores.items()}
                loop.accelerator.log(tracked, step=step)
            tqdm.write(
                f"{stage.name} at step {step}: "
                + "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
            )
            if last and missed:
                tqdm.write(
                    f"WARNING: stage {stage.name} misses its gate of {stage.gate}: "
                    + ", ".join(f"{key} {value:.3f}" for key, value in missed.items()),
                    file=sys.stderr,
                )
        if last:
            stage.finish()

    interval = 0.5 if sys.stderr.isatty() else 30.0
    running = None
    quiet = not ranks.first
    with tqdm(
        total=stage.steps, initial=first, desc=stage.name, mininterval=interval, disable=quiet
    ) as bar:
        for step in range(first, stage.steps):
            over, due = ranks.any(clock.over, ranks.first and clock.time_to_save())
            if over:
                save(step)
                raise Interrupted(f"{stage.name} stopped at step {step} of {stage.steps}")
            if due or (config.save_every and step and step % config.save_every == 0):
                save(step, must=False)
            if (config.evaluate_first and step == 0) or (
                config.evaluate_every and step and step % config.evaluate_every == 0
            ):
                evaluate(step, last=False)
            try:
                loss = loop.step(step)
            except OutOfMemory as error:
                if error.whole and not ranks.sharded:  # shards take all ranks to save
                    save(step, must=False)
                raise error.advised(stage) from None
            if step % 10 == 0:
                value = ranks.mean(loss).item()
                if not loop.accelerator.scaler and not torch.isfinite(loop.norm):
                    raise FloatingPointError(
                        f"{stage.name}: the gradient of step {step} is not finite"
                    )
                running = value if running is None else 0.95 * running + 0.05 * value
                rate = loop.optimizer.param_groups[0]["lr"]
                norm = float(loop.norm)
                if ranks.first:
                    line = {"step": step, "loss": value, "norm": norm, "time": time.time()}
                    with going_on("the log"):
                        with open(directory / "log.jsonl", "a", encoding="utf-8") as log:
                            log.write(f"{json.dumps(line)}\n")
                        loop.accelerator.log(
                            {"loss": value, "gradient norm": norm, "learning rate": rate}, step=step
                        )
                bar.set_postfix(loss=f"{running:.4f}", refresh=False)
            bar.update()
    save(stage.steps)
    evaluate(stage.steps, last=True)


@contextmanager
def going_on(what: str) -> Iterator[None]:
    """Tells of a disk that is full or refuses, and goes on: only checkpoints are worth stopping
    for."""
    try:
        yield
    except OSError as error:
        tqdm.write(
            f"WARNING: {what} could not be written ({error}); training goes on", file=sys.stderr
        )


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _without_prefix(weights: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("parts."): value for key, value in weights.items()}


def is_out_of_memory(error: Exception) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextmanager
def _signals(clock: Clock) -> Iterator[None]:
    """Lets SIGTERM and SIGINT ask for a stop; only the main thread may set a signal's handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, clock.ask_to_stop)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    recipe: str | Path | Recipe | Finetune,
    overrides: Sequence[str] = (),
    *,
    output_dir: str | Path,
    stages: Sequence[str] | None = None,
    max_seconds: float | None = None,
    resume_from: str = "latest",
) -> bool:
    """Runs a recipe, resuming whatever is already there.

    Args:
        recipe: path of a TOML file, name of a recipe that comes with the package, a `Recipe`, or a
            `Finetune`.
        overrides: `table.key=value` strings.
        output_dir: checkpoints, scores and the finished pipeline (`model`) go here.
        stages: of a `Recipe`, run only these, in its order; default all.
        max_seconds: stop, with a checkpoint, after this long; call again to go on.
        resume_from: "latest" checkpoint, or "previous", where the latest is damaged.

    Returns:
        True if everything asked for is done, False if the time ran out or a signal came.
    """
    if resume_from not in ("latest", "previous"):
        raise ValueError(f'resume_from must be "latest" or "previous", got {resume_from!r}')
    settings = load_recipe(recipe, overrides) if isinstance(recipe, (str, Path)) else recipe
    root = Path(output_dir)
    if isinstance(settings, Finetune):
        from latent_shift.training.finetune import run

        if stages:
            raise ValueError("a finetuning run has no stages to choose from")
        clock = Clock(max_seconds, settings.checkpoints.seconds or float("inf"))
        with _signals(clock):
            return run(settings, root, clock, resume_from)
    clock = Clock(max_seconds, settings.save_seconds)
    return _train_stages(settings, root, clock, stages, resume_from)


def _train_stages(
    settings: Recipe, root: Path, clock: Clock, stages: Sequence[str] | None, resume_from: str
) -> bool:
    from latent_shift.training.export import export, load_run
    from latent_shift.training.stages import STAGES, Workspace

    unknown = set(stages or ()) - set(STAGES)
    if unknown:
        raise ValueError(f"unknown stages {sorted(unknown)}; there are {list(STAGES)}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    root.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(settings, root, clock)
    ranks = workspace.ranks
    if ranks.sharded:
        raise TrainingError("the stages of this recipe are small and do not shard: leave FSDP out")
    results = Results(root / "scores.json")
    try:
        with _signals(clock):
            for name, build in STAGES.items():
                directory = root / workspace.directory_of(name)
                done, about = directory / "done", settings_of(settings, name)
                if done.exists():
                    if told := done.read_text():
                        refuse_another(directory, about, json.loads(told))
                    continue
                if stages is not None and name not in stages:
                    continue
                if name == "text" and settings.text.init_from:
                    continue  # the stages after it take it
                directory.mkdir(parents=True, exist_ok=True)
                if ranks.first:
                    # not before: what a folder refuses does not become its recipe
                    (root / "recipe.json").write_text(json.dumps(to_dict(settings), indent=2))
                torch.manual_seed(derive_seed(settings.seed, name, "initial weights"))
                stage = build(workspace)
                config = LoopConfig(
                    seed=stage.seed,
                    keep=settings.keep,
                    evaluate_every=settings.evaluate_every,
                    about=about,
                )
                run_stage(stage, config, directory, clock, results, ranks, resume_from)
                resume_from = "latest"
                if ranks.first:
                    if directory.name == "video-shift":
                        export(load_run(root, directory.name, settings), root / "model")
                    done.write_text(json.dumps(about, indent=1))
                ranks.wait()
    except Interrupted as stop:
        if ranks.first:
            tqdm.write(f"{stop}; run the same command again to go on")
        return False
    return True


# of each stage beside what those before it depend on
_DEPENDS_ON = {
    "autoencoder": ("seed", "precision", "data.size", "data.num_frames", "autoencoder"),
    "text": ("data", "text"),
    "image": ("unet", "schedule", "image"),
    "video": ("video",),
}


def settings_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings, by dotted key, that the weights of a stage depend on: its own, and those of the
    stages before it."""
    stages = list(_DEPENDS_ON)
    names = [name for own in stages[: stages.index(stage) + 1] for name in _DEPENDS_ON[own]]
    return {
        key: value
        for key, value in flat(to_dict(recipe)).items()
        if any(key == name or key.startswith(f"{name}.") for name in names)
    }


def refuse_another(folder: Path, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Lets a finished run, or a stage of one, pass for what is asked if its settings do.

    Args:
        folder: what it left behind.
        now, before: settings by dotted key, as from `flat`; what `now` leaves out is not compared.

    Raises:
        TrainingError: they differ.
    """
    changed = [
        f"{key} = {value!r}, not {before.get(key)!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changed:
        raise TrainingError(
            f"{folder} holds what was made of other settings ({'; '.join(changed)}): take another "
            "output folder"
        )
