"""What a finetuning run would take: parameters, memory, and the time of a step by its parts."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from latent_shift.data.clips import ClipSource
from latent_shift.training.finetune import FinetuneStage, make_ranks
from latent_shift.training.finetune_config import Finetune
from latent_shift.training.trainer import Loop, LoopConfig, OutOfMemory

_TIMED = 2  # steps


@dataclass(frozen=True)
class DryRun:
    """The findings of `dry_run`, on one rank.

    Attributes:
        trained, total: parameters of the U-Net and, where it is trained, the text encoder.
        weights, gradients, moments, average: bytes of all models, of the trained parameters'
            gradients, of the optimizer's state and of the moving average.
        peak: bytes that the process held at most; on a GPU, that PyTorch had allocated there.
        step: seconds.
        parts: seconds of a step by part.
        steps: of the whole run.
    """

    trained: int
    total: int
    weights: int
    gradients: int
    moments: int
    average: int
    peak: int
    step: float
    parts: dict[str, float]
    steps: int

    def __str__(self) -> str:
        lines = [
            f"trained     {self.trained:,} of {self.total:,} parameters "
            f"({self.trained / self.total:.1%})",
            *(
                f"{name:<11} {getattr(self, name) / 2**20:,.1f} MiB"
                for name in ("weights", "gradients", "moments", "average", "peak")
            ),
            f"step        {self.step:.3f} s ({_TIMED} steps measured); "
            f"{self.steps:,} steps take {self.step * self.steps / 3600:.1f} h",
            *(
                f"  {name:<11} {seconds:8.3f} s  {seconds / self.step:6.1%}"
                for name, seconds in self.parts.items()
            ),
        ]
        return "\n".join(lines)


def dry_run(
    config: Finetune,
    *,
    pipeline: DiffusionPipeline | None = None,
    clips: ClipSource | None = None,
    images: ClipSource | None = None,
) -> DryRun:
    """Trains for three steps, writes nothing, and measures the last two.

    Raises:
        TrainingError: the run could not begin; or a step ran out of memory.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    ranks = make_ranks(config)
    stage = FinetuneStage(config, ranks, pipeline=pipeline, clips=clips, images=images)
    loop = Loop(stage, LoopConfig(config.seed, 1, config.train.accumulate), ranks)
    watch, begin = stage.watch, 0.0
    for step in range(1 + _TIMED):
        if step == 1:  # the first made the optimizer's state, and whatever is made at first use
            watch.seconds = Counter()
            begin = watch.now()
        try:
            loop.step(step)
        except OutOfMemory as error:
            raise error.advised(stage) from None
    seconds = (watch.now() - begin) / _TIMED
    names = ("data", "autoencoder", "text", "forward", "backward", "optimizer")
    assert watch.seconds is not None
    parts = {name: watch.seconds[name] / _TIMED for name in names}
    parts["other"] = seconds - sum(parts.values())
    models: list[nn.Module] = [
        stage.pipeline.unet,
        stage.pipeline.vae,
        stage.pipeline.text_encoder,
    ]
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(ranks.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    state = [
        value
        for moments in loop.optimizer.state.values()
        for value in moments.values()
        if isinstance(value, Tensor)
    ]
    trained = [p for module in stage.modules().values() for p in module.parameters()]
    return DryRun(
        trained=sum(p.numel() for p in loop.parameters),
        total=sum(p.numel() for p in trained),
        weights=_bytes([p for model in models for p in model.parameters()]),
        gradients=_bytes(loop.parameters),
        moments=_bytes(state),
        average=_bytes(loop.parameters) if loop.average is not None else 0,
        peak=peak,
        step=seconds,
        parts=parts,
        steps=config.train.steps,
    )


def _bytes(tensors: list[Tensor] | list[nn.Parameter]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
