"""Two small networks that see what a MovingShapes clip shows; `fvd[shapes]` and `clipsim[shapes]`
stand on them.

`ShapeClassifier` names the attributes of a clip; its features, one layer before the names, feed the
Fréchet distance. `ShapeTwoTower` puts clips and captions into one space. Both are trained
here, on clips rendered as they are needed, and are stored with what they can do on clips of another
seed. They ship in ``latent_shift/assets/metrics``; to train them again:

    python -m latent_shift.evaluation.shape_networks --output DIR --max-seconds 600

The same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latent_shift.data.moving_shapes import (
    ClipTruth,
    MovingShapes,
    caption,
    render,
    vocabulary,
)
from latent_shift.evaluation.moving_shapes import OF_OBJECTS, VALUES, altered, describes

SIZE = 64  # pixels a side that the networks see
MIN_FRAMES = 4
WIDTH = 64  # features of a clip, and the dimension of the common space
NAMES = {name: VALUES[name] for name in (*OF_OBJECTS, "background")} | {"objects": ("one", "two")}
_OF_FRAMES = ("colour", "shape", "size", "background")
_POINTS = 8  # things in a frame whose way through the clip is followed
_PAD, _UNKNOWN = 0, 1
_TWO = 0.2  # share of training clips with two objects
_SHORT = 8  # frames of every fourth training batch
_CHECK = 256  # clips that the report is made on


class Trunk(nn.Module):
    """Convolutions over every frame, then over time.

    Its parts can learn in turn: what a frame shows from single frames, and motion from clips.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            *_convolution(3, 16), *_convolution(16, 32), *_convolution(32, 64)
        )
        self.points = nn.Conv3d(64, _POINTS, 1)
        self.motion = nn.Sequential(
            nn.Conv1d(2 * _POINTS, 64, 3), nn.ReLU(), nn.Conv1d(64, 64, 1), nn.ReLU()
        )
        self.join = nn.Linear(128 + 64 + 64, WIDTH)
        steps = torch.linspace(-1.0, 1.0, SIZE // 8)
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)
        self.register_buffer("grid", grid, persistent=False)  # [2, 64]: x, y

    def forward(self, clips: Tensor) -> Tensor:
        """Features (B, WIDTH) of clips (B, T, 3, H, W), see `as_input`."""
        maps = self.frames(as_input(clips))
        look = pooled(maps)  # [B, 128, T]
        weight = self.points(maps).flatten(3).softmax(3)  # [B, points, T, 64]
        tracks = torch.einsum("bpts,cs->bpct", weight, self.grid).flatten(1, 2)
        # where a thing is does not matter, how it moves does: some 0.05 a frame
        motion = self.motion(8.0 * (tracks - tracks.mean(2, keepdim=True))).mean(2)
        change = look[:, :64].std(2)
        return F.relu(self.join(torch.cat((look.mean(2), change, motion), dim=1)))


def pooled(maps: Tensor) -> Tensor:
    """The largest and the mean value over space of maps (B, C, T, h, w): (B, 2 C, T)."""
    return torch.cat((maps.amax((3, 4)), maps.mean((3, 4))), dim=1)


def _convolution(before: int, after: int) -> list[nn.Module]:
    convolution = nn.Conv3d(before, after, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
    return [convolution, nn.BatchNorm3d(after), nn.ReLU()]


def as_input(clips: Tensor) -> Tensor:
    """Brings clips to what the networks see.

    Args:
        clips: (B, T, 3, H, W), uint8, or floating point in [0, 1].

    Returns:
        (B, 3, T, 64, 64) float32 in [-1, 1]; other sizes are resized bilinearly with antialiasing.
    """
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] < MIN_FRAMES:
        raise ValueError(
            f"clips must be (B, T, 3, H, W) with T >= {MIN_FRAMES}, got {tuple(clips.shape)}"
        )
    pixels = clips.float() / 255.0 if clips.dtype == torch.uint8 else clips.float()
    if clips.shape[-2:] != (SIZE, SIZE):
        flat = pixels.flatten(0, 1)
        flat = F.interpolate(flat, (SIZE, SIZE), mode="bilinear", antialias=True)
        pixels = flat.unflatten(0, clips.shape[:2])
    pixels = pixels.mul(2.0).sub(1.0).transpose(1, 2)
    return pixels.contiguous(memory_format=torch.channels_last_3d)


class ShapeClassifier(nn.Module):
    """Names what a clip shows."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(WIDTH, len(values)) for name, values in NAMES.items()}
        )

    def features(self, clips: Tensor) -> Tensor:
        """Features (B, WIDTH) of clips (B, T, 3, H, W), one layer before the names."""
        return self.trunk(clips)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Logits (B, values) of every attribute in `NAMES`."""
        features = self.features(clips)
        return {name: head(features) for name, head in self.heads.items()}


class ShapeTwoTower(nn.Module):
    """Puts clips and captions into one space, where what belongs together is near."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = list(words)
        self._numbers = {word: number for number, word in enumerate(words, start=_UNKNOWN + 1)}
        self.trunk = Trunk()
        self.of_clip = nn.Linear(WIDTH, WIDTH)
        self.embedding = nn.Embedding(len(words) + 2, 48, padding_idx=_PAD)
        self.reader = nn.GRU(48, 48, batch_first=True, bidirectional=True)
        self.of_text = nn.Linear(96, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def clips(self, clips: Tensor) -> Tensor:
        """Unit vectors (B, WIDTH) of clips (B, T, 3, H, W), see `as_input`."""
        return F.normalize(self.of_clip(self.trunk(clips)), dim=-1)

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, WIDTH) of captions; a word never seen in training counts as unknown."""
        rows = [
            [self._numbers.get(word, _UNKNOWN) for word in text.lower().replace(",", " ,").split()]
            or [_UNKNOWN]
            for text in texts
        ]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), _PAD)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        embedded = self.embedding(tokens.to(self.embedding.weight.device))
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded, lengths, batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.reader(packed)[0], batch_first=True)
        mean = states.sum(1) / lengths.to(states.device).unsqueeze(1)
        return F.normalize(self.of_text(mean), dim=-1)


def save(network: ShapeClassifier | ShapeTwoTower, path: Path, report: dict[str, Any]) -> None:
    """Stores a network in float16, its words and its report, whole or not at all."""
    words = network.words if isinstance(network, ShapeTwoTower) else []
    tensors = {
        name: value.half() if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    metadata = {"words": json.dumps(words), "report": json.dumps(report)}
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def load(path: str | os.PathLike[str]) -> ShapeClassifier | ShapeTwoTower:
    """Loads either network as `save` stored it, in float32 and for evaluation."""
    with safe_open(path, "pt") as file:
        words = json.loads((file.metadata() or {})["words"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    network = ShapeTwoTower(words) if words else ShapeClassifier()
    network.load_state_dict(state)
    return network.float().eval().requires_grad_(False)


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a stored network could do on clips that it was not trained on."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["report"])


def _truths(seed: int, step: int, batch: int, num_frames: int) -> tuple[list[ClipTruth], Tensor]:
    data = MovingShapes(seed, num_frames=num_frames, split="all", two_object_share=_TWO)
    truths = [data.truth(step * batch + row) for row in range(batch)]
    return truths, render(truths, SIZE)


def _labels(truths: Sequence[ClipTruth]) -> dict[str, Tensor]:
    """Numbers of the names; -100, which the loss leaves out, where two objects share a clip."""
    labels = {}
    for name in OF_OBJECTS:
        labels[name] = torch.tensor(
            [
                NAMES[name].index(getattr(truth.objects[0], name))
                if len(truth.objects) == 1
                else -100
                for truth in truths
            ]
        )
    labels["background"] = torch.tensor(
        [NAMES["background"].index(truth.background) for truth in truths]
    )
    labels["objects"] = torch.tensor([len(truth.objects) - 1 for truth in truths])
    return labels


class _Frames(nn.Module):
    """A trunk's first part with heads of its own, for what single frames can teach."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.frames = trunk.frames
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(NAMES[name])) for name in _OF_FRAMES})


def frames_loss(network: _Frames, seed: int, step: int, batch: int) -> Tensor:
    data = MovingShapes(seed, split="all")
    truths = [data.truth(step * batch + row) for row in range(batch)]
    frame = step % data.num_frames
    images = render(truths, SIZE, [frame]).mul(2.0).sub(1.0).transpose(1, 2)
    images = images.contiguous(memory_format=torch.channels_last_3d)
    look = pooled(network.frames(images))[:, :, 0]
    labels = _labels(truths)
    return torch.stack(
        [F.cross_entropy(head(look), labels[name]) for name, head in network.heads.items()]
    ).sum()


def classifier_loss(network: ShapeClassifier, seed: int, step: int, batch: int) -> Tensor:
    truths, clips = _truths(seed, step, batch, _SHORT if step % 4 == 3 else 16)
    labels = _labels(truths)
    logits = network(clips)
    return torch.stack([F.cross_entropy(logits[name], labels[name]) for name in NAMES]).sum()


def two_tower_loss(network: ShapeTwoTower, seed: int, step: int, batch: int) -> Tensor:
    """The symmetric contrastive loss; every clip also meets its caption with one thing changed.

    A caption that happens to be true of another clip of the batch is no counterexample there.
    """
    truths, clips = _truths(seed, step, batch, _SHORT if step % 4 == 3 else 16)
    rng = random.Random(f"{seed}/{step}/captions")
    prompts = []
    for change in (False, True):
        for row, truth in enumerate(truths):
            wording = random.Random(f"{seed}/{step}/{row}")
            prompts.append(caption(altered(truth, rng) if change else truth, wording))
    true = torch.tensor([[describes(prompt, truth) for prompt in prompts] for truth in truths])
    true[:, :batch].fill_diagonal_(False)
    scale = network.log_scale.exp().clamp(max=100.0)
    texts = network.captions([prompt.text for prompt in prompts])
    logits = scale * network.clips(clips) @ texts.T  # [batch, 2 batch]
    logits = logits.masked_fill(true, -torch.inf)
    own = torch.arange(batch)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :batch].T, own)


@torch.no_grad()
def classifier_report(network: ShapeClassifier, seed: int) -> dict[str, float]:
    """Shares of clips whose attributes are named rightly, by attribute."""
    right: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for step in range(_CHECK // 64):
        truths, clips = _truths(seed, step, 64, 16)
        labels = _labels(truths)
        for name, logits in network(clips).items():
            known = labels[name] >= 0
            right[name].append((logits.argmax(1) == labels[name])[known])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in right.items()}


@torch.no_grad()
def two_tower_report(network: ShapeTwoTower, seed: int) -> dict[str, float]:
    """Shares of clips that are nearer to their caption than to the same caption with one attribute
    changed, by attribute, and "of 64": than to the captions of 63 other clips. Cosines: "own" and
    "other" captions.
    """
    nearer: dict[str, list[bool]] = {name: [] for name in (*OF_OBJECTS, "background", "of 64")}
    own_cosine, other_cosine = [], []
    for step in range(_CHECK // 64):
        truths, clips = _truths(seed, step, 64, 16)
        rng = random.Random(f"{seed}/{step}/report")
        seen = network.clips(clips)
        prompts = [
            caption(truth, random.Random(f"{seed}/{step}/{i}")) for i, truth in _rows(truths)
        ]
        table = seen @ network.captions([prompt.text for prompt in prompts]).T
        own = table.diagonal()
        for row, truth in _rows(truths):
            wrong = torch.tensor([not describes(prompt, truth) for prompt in prompts])
            nearer["of 64"].append(bool((table[row][wrong] < own[row]).all()))
            other_cosine.append(float(table[row][wrong].mean()))
        own_cosine += own.tolist()
        for name in (*OF_OBJECTS, "background"):
            changed = [
                caption(altered(truth, rng, name), random.Random(f"{seed}/{step}/{i}"))
                for i, truth in _rows(truths)
            ]
            cosine = (seen * network.captions([prompt.text for prompt in changed])).sum(1)
            for row, truth in _rows(truths):
                if not describes(changed[row], truth):
                    nearer[name].append(bool(cosine[row] < own[row]))
    report = {name: sum(values) / len(values) for name, values in nearer.items()}
    report["own"] = sum(own_cosine) / len(own_cosine)
    report["other"] = sum(other_cosine) / len(other_cosine)
    return report


def _rows(truths: Sequence[ClipTruth]) -> list[tuple[int, ClipTruth]]:
    return list(enumerate(truths))


class _Clock:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end


def _fit(
    network: nn.Module,
    loss: Callable[..., Tensor],
    *,
    name: str,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    output: Path,
    clock: _Clock,
) -> bool:
    """Trains until `steps` are done or the clock is over; returns whether they are done."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    path, first = output / f"{name}.ckpt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"]
    network.train()
    if isinstance(network, ShapeClassifier | ShapeTwoTower):
        # frames have taught this part already; with it at rest a step takes half the time
        network.trunk.frames.eval().requires_grad_(False)

    def store(step: int) -> None:
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "step": step,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    for step in range(first, steps):
        value = loss(network, seed, step, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step + 1 == steps or clock.over:
            loss_now = float(value.detach())
            print(f"{name} step {step + 1} of {steps}: loss {loss_now:.3f}", flush=True)
            store(step + 1)
            if clock.over and step + 1 < steps:
                return False
    network.eval()
    return True


def train(
    output: Path,
    *,
    max_seconds: float = 600.0,
    frames_steps: int = 500,
    classifier_steps: int = 240,
    two_tower_steps: int = 100,
    batch: int = 32,
    seed: int = 0,
) -> bool:
    """Trains both networks into `output`: ``classifier.safetensors``, ``two_tower.safetensors``.

    Args:
        output: folder of the results and of what a stopped run leaves to go on from.
        max_seconds: after which the run stops; called again, it goes on.
        seed: chooses weights and clips; the reports are made on clips of another seed.

    Returns:
        Whether both are done.
    """
    output.mkdir(parents=True, exist_ok=True)
    clock = _Clock(max_seconds)
    options: dict[str, Any]
    common: dict[str, Any] = {"batch": batch, "seed": seed, "output": output, "clock": clock}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier, two_tower = ShapeClassifier(), ShapeTwoTower(vocabulary())
        frames = _Frames(classifier.trunk)
    done = output / "classifier.safetensors"
    if done.exists():
        loaded = load(done)
        classifier.load_state_dict(loaded.state_dict())
    else:
        options = {"name": "frames", "steps": frames_steps, "rate": 4e-3}
        if not _fit(frames, frames_loss, **options, **{**common, "batch": 2 * batch}):
            return False
        options = {"name": "classifier", "steps": classifier_steps, "rate": 5e-3}
        if not _fit(classifier, classifier_loss, **options, **common):
            return False
        save(classifier, done, classifier_report(classifier, seed + 1))
        for name in ("frames", "classifier"):
            (output / f"{name}.ckpt").unlink()
    print(f"classifier {json.dumps(read_report(done))}", flush=True)
    done = output / "two_tower.safetensors"
    if not done.exists():
        # what the classifier has learned to see is where the contrast starts from
        two_tower.trunk.load_state_dict(classifier.trunk.state_dict())
        options = {"name": "two_tower", "steps": two_tower_steps, "rate": 4e-3}
        if not _fit(two_tower, two_tower_loss, **options, **common):
            return False
        save(two_tower, done, two_tower_report(two_tower, seed + 1))
        (output / "two_tower.ckpt").unlink()
    print(f"two_tower {json.dumps(read_report(done))}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m latent_shift.evaluation.shape_networks")
    parser.add_argument("--output", type=Path, required=True, help="folder of the two networks")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not train(arguments.output, max_seconds=arguments.max_seconds, seed=arguments.seed):
        print("stopped by --max-seconds; the same command goes on from here")


if __name__ == "__main__":
    main()
