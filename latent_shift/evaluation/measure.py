"""Scores of generated clips, each with its protocol: `measure` and the metrics it knows.

real = StoredClips(open_source("clips/"), ClipFormat(16, 256, 256), 2048)
generated = StoredClips(open_source("samples/"), ClipFormat(16, 256, 256), 2048)
scores = measure(["fvd", "kvd"], generated, real, weights="weights/", cache="cache/")
scores["fvd"].value, scores["fvd"].interval, scores["fvd"].protocol
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import scores as estimators
from .moving_shapes import score_clip
from .networks import NETWORKS, EvaluationError, Located, locate
from .sets import ClipSet

_CUSTOMARY = 2048  # clips that published distances between sets are made of


@dataclass(frozen=True)
class Metric:
    """A score, as data.

    Attributes:
        name: as the user writes it.
        kind: what is computed of the features.
        network: whose features; "" for the readings of moving shapes, which need none.
        minimum: clips of either set below which the score is refused.
        resamples: draws of the bootstrap unless told otherwise; few where one takes seconds.
        better: which way is better.
    """

    name: str
    kind: Literal["frechet", "kernel", "inception", "similarity", "readings"]
    network: str
    minimum: int
    resamples: int
    better: Literal["lower", "higher"]

    @property
    def compares(self) -> bool:
        """Whether it needs a real set."""
        return self.kind in ("frechet", "kernel")


METRICS = {
    metric.name: metric
    for metric in (
        Metric("shapes", "readings", "", 1, 1000, "higher"),
        Metric("fvd[shapes]", "frechet", "shapes-classifier", 256, 200, "lower"),
        Metric("clipsim[shapes]", "similarity", "shapes-two-tower", 1, 1000, "higher"),
        Metric("fvd", "frechet", "i3d", _CUSTOMARY, 100, "lower"),
        Metric("kvd", "kernel", "i3d", _CUSTOMARY, 100, "lower"),
        Metric("fid", "frechet", "inception", _CUSTOMARY, 20, "lower"),
        Metric("fid[clip]", "frechet", "clip", _CUSTOMARY, 100, "lower"),
        Metric("is", "inception", "inception-logits", _CUSTOMARY, 20, "higher"),
        Metric("is[ucf101]", "inception", "c3d-ucf101", _CUSTOMARY, 100, "higher"),
        Metric("clipsim", "similarity", "clip", 1, 1000, "higher"),
    )
}
_DEFINITIONS = {
    "frechet": "squared Fréchet distance of fitted Gaussians, unbiased covariances",
    "kernel": "unbiased squared MMD, kernel (x.y / D + 1)^3",
    "inception": f"inception score, mean over {estimators.SPLITS} parts",
    "similarity": "mean cosine of a caption and its clip's embeddings",
    "readings": "share of clips, or mean over clips",
}


@dataclass(frozen=True)
class Score:
    """A score with what it takes to compare it.

    Attributes:
        value: the score.
        interval: 95% bootstrap interval of what it is on average over sets of as many clips; None
            where it was not asked for, or there is one clip.
        protocol: everything that it is a function of.
    """

    value: float
    interval: tuple[float, float] | None
    protocol: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "interval": list(self.interval) if self.interval else None,
            "protocol": self.protocol,
        }


def parse_metrics(names: str | Iterable[str]) -> list[Metric]:
    """Looks metrics up by name.

    Args:
        names: names, or one text with commas between them.

    Raises:
        EvaluationError: there is none of that name; the nearest is suggested.
    """
    wanted = names.split(",") if isinstance(names, str) else list(names)
    found = []
    for name in dict.fromkeys(word.strip().lower() for word in wanted if word.strip()):
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1, 0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EvaluationError(f"{name!r} is not one of {', '.join(METRICS)}{hint}")
        found.append(METRICS[name])
    if not found:
        raise EvaluationError(f"no metric is named; there are {', '.join(METRICS)}")
    return found


class Plan:
    """Metrics whose networks have been found and whose sets have been found large enough.

    Made before anything is generated, so that nothing is generated in vain.

    Args:
        metrics: what to measure, see `parse_metrics`.
        weights: folder of the networks' files, see `networks.locate`.
        force: measure on fewer clips than a metric's minimum; the protocol then says so.

    Raises:
        EvaluationError: a network's file is missing or is another.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        *,
        weights: str | os.PathLike[str] | None = None,
        force: bool = False,
    ) -> None:
        self.metrics = list(metrics)
        self.force = force
        names = dict.fromkeys(metric.network for metric in metrics if metric.network)
        self.located = {name: locate(NETWORKS[name], weights) for name in names}

    @property
    def compares(self) -> bool:
        return any(metric.compares for metric in self.metrics)

    @property
    def minimum(self) -> int:
        """Clips that all metrics are content with."""
        return max(metric.minimum for metric in self.metrics)

    def networks(self, real: bool) -> dict[str, Located]:
        """The networks that the real or the generated clips go through."""
        wanted = {metric.network for metric in self.metrics if metric.compares or not real}
        return {name: found for name, found in self.located.items() if name in wanted}

    def captions(self) -> set[str]:
        """The networks that read captions too."""
        return {metric.network for metric in self.metrics if metric.kind == "similarity"}

    def check(self, clips: ClipSet, real: bool, count: int | None = None) -> None:
        """Raises `EvaluationError` if a set does not do for every metric asked of it."""
        count = clips.count if count is None else count
        which = "real" if real else "generated"
        for metric in self.metrics:
            if real and not metric.compares:
                continue
            if count < metric.minimum and not self.force:
                raise EvaluationError(
                    f"{metric.name} needs at least {metric.minimum} {which} clips, there are "
                    f"{count}: a distance between sets is dominated by their size below that; "
                    "take more, or force it, and the protocol will say so"
                )
            if count < 2 and metric.compares:
                raise EvaluationError(
                    f"{metric.name} has no covariance to compare with one {which} clip, whatever "
                    "is forced"
                )
            if metric.kind == "readings" and clips.prompts is None:
                raise EvaluationError(
                    f"{metric.name} needs captions of moving shapes whose truth is known: clips "
                    "of a model asked for them, not stored clips"
                )
            if metric.network:
                fewest = NETWORKS[metric.network].min_frames
                if clips.num_frames < fewest:
                    raise EvaluationError(
                        f"{metric.name} needs clips of at least {fewest} frames, the {which} "
                        f"ones have {clips.num_frames}"
                    )


def measure(
    metrics: str | Iterable[str] | Plan,
    generated: ClipSet,
    real: ClipSet | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    force: bool = False,
    resamples: int | None = None,
    seed: int = 0,
    batch: int = 8,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Score]:
    """Measures generated clips, going through them once and keeping features only.

    Under `torchrun` or `accelerate launch` every process takes its share of the clips; the scores
    are the same for any number of processes.

    Args:
        metrics: names from `METRICS`, or a `Plan`, which then stands for `weights` and `force`.
        generated: the clips to be scored.
        real: the clips to compare with, for the metrics that do.
        cache: folder where the real set's features are kept from one call to the next.
        resamples: draws of the bootstrap; the metric's own number if None, 0 for no intervals.
        seed: of the bootstrap.
        batch: clips generated and seen at once.
        device: where the networks run.
        progress: called with the number of clips after every batch.

    Returns:
        Scores by name, "shapes" as one score for every reading; in the main process only.

    Raises:
        EvaluationError: a score cannot be had as asked; the message says what to do.
    """
    plan = (
        metrics
        if isinstance(metrics, Plan)
        else Plan(parse_metrics(metrics), weights=weights, force=force)
    )
    plan.check(generated, real=False)
    known: dict[str, Tensor] = {}
    device = torch.device(device)
    if plan.compares:
        if real is None:
            names = ", ".join(metric.name for metric in plan.metrics if metric.compares)
            raise EvaluationError(f"{names} compares with real clips: name a set of them")
        plan.check(real, real=True)
        known = _real_features(plan, real, cache, batch, device, progress)
    found = _extract(plan.networks(real=False), generated, plan, batch, device, progress)
    if not _state().is_main_process:
        return {}
    count = _count(found)
    plan.check(generated, real=False, count=count)
    counts = {"generated": count}
    if known:
        counts["real"] = len(next(iter(known.values())))
        assert real is not None  # it is where its features come from
        plan.check(real, real=True, count=counts["real"])
    scores: dict[str, Score] = {}
    for metric in plan.metrics:
        protocol = _protocol(plan, metric, generated, real, counts)
        draws = metric.resamples if resamples is None else resamples
        protocol["bootstrap"] = {"draws": draws, "level": estimators.LEVEL, "seed": seed}

        for name, function, samples in _statistics(metric, found, known):
            ends = estimators.interval(
                function, *samples, resamples=draws, seed=seed, percentile=function is _mean
            )
            scores[name] = Score(function(*samples), ends, protocol)
    return scores


_TEXT, _READING = "text of ", "reading "


def _statistics(
    metric: Metric, found: dict[str, Tensor], known: dict[str, Tensor]
) -> Iterator[tuple[str, Callable[..., float], tuple[Tensor, ...]]]:
    """What a metric computes, by name: the function and the sets of clips that go in."""
    if metric.kind == "readings":
        for name, values in found.items():
            if name.startswith(_READING):
                yield name.removeprefix(_READING), _mean, (values[~values.isnan()],)
        return
    features = found[metric.network]
    if metric.kind == "similarity":
        yield metric.name, _mean, (estimators.similarity(features, found[_TEXT + metric.network]),)
    elif metric.kind == "inception":
        yield metric.name, estimators.inception_score, (features,)
    elif metric.kind == "frechet":
        yield metric.name, estimators.frechet_distance, (known[metric.network], features)
    else:
        yield metric.name, estimators.kernel_distance, (known[metric.network], features)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _state() -> Any:
    from accelerate import PartialState

    # without a GPU it takes no notice of other processes unless it is told that there is none
    return PartialState(cpu=not torch.cuda.is_available())


def _count(found: dict[str, Tensor]) -> int:
    return max((len(values) for values in found.values()), default=0)


def _extract(
    networks: dict[str, Located],
    clips: ClipSet,
    plan: Plan,
    batch: int,
    device: torch.device,
    progress: Callable[[int], None],
    real: bool = False,
) -> dict[str, Tensor]:
    """Features (N, K, D) of all networks, in the order of the clips, on every process."""
    from accelerate.utils import gather_object

    extractors = {name: found.network.load(found.path, device) for name, found in networks.items()}
    reading = not real and any(metric.kind == "readings" for metric in plan.metrics)
    captions = set() if real else plan.captions()
    state = _state()
    rows: dict[int, dict[str, Tensor]] = {}
    share = clips.batches(batch, state.process_index, state.num_processes, captions=bool(captions))
    for drawn in share:
        parts: dict[str, Tensor] = {}
        pixels = drawn.uint8()
        for name, extractor in extractors.items():
            parts[name] = extractor.clips(pixels)
            if name in captions:
                parts[_TEXT + name] = extractor.captions(drawn.captions)
        for row, index in enumerate(drawn.indices):
            rows[index] = {name: values[row].clone() for name, values in parts.items()}
            if reading:
                assert clips.prompts is not None  # the plan has seen to it
                seen = score_clip(drawn.clips[row].float(), clips.prompts[index])
                rows[index] |= {_READING + name: torch.tensor(v) for name, v in seen.items()}
        progress(len(drawn.indices))
    everything = {index: row for part in gather_object([rows]) for index, row in part.items()}
    if not everything:
        which = "real" if real else "generated"
        raise EvaluationError(
            f"none of the {which} clips can be used: they cannot be read, are too short, or have "
            "no caption; the log says which"
        )
    names = dict.fromkeys(name for index in sorted(everything) for name in everything[index])
    missing = torch.tensor(math.nan)  # a reading that a caption does not ask for
    return {
        name: torch.stack([everything[index].get(name, missing) for index in sorted(everything)])
        for name in names
    }


def _real_features(
    plan: Plan,
    real: ClipSet,
    cache: str | os.PathLike[str] | None,
    batch: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    networks = plan.networks(real=True)
    known: dict[str, Tensor] = {}
    paths = {}
    if cache is not None:
        paths = {name: Path(cache) / f"{name}.safetensors" for name in networks}
        _state().wait_for_everyone()  # so that every process finds the same files
        for name, path in paths.items():
            if path.exists():
                known[name] = load_features(path, _depends_on(networks[name], real))
    missing = {name: found for name, found in networks.items() if name not in known}
    if missing:
        fresh = _extract(missing, real, plan, batch, device, progress, real=True)
        if cache is not None and _state().is_main_process:
            for name, features in fresh.items():
                save_features(paths[name], features, _depends_on(networks[name], real))
        known |= fresh
    else:
        progress(real.count)
    return known


def _depends_on(located: Located, clips: ClipSet) -> dict[str, Any]:
    return {**located.protocol(), "set": clips.protocol(), "versions": _versions(located)}


def save_features(path: Path, features: Tensor, protocol: dict[str, Any]) -> None:
    """Stores features with the protocol that they are a function of, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(protocol, sort_keys=True)
    metadata = {"protocol": text, "sha256": _digest(text, features)}
    temporary = path.with_suffix(".tmp")
    save_file({"features": features.contiguous()}, temporary, metadata)
    os.replace(temporary, path)


def load_features(path: Path, protocol: dict[str, Any]) -> Tensor:
    """Loads what `save_features` stored.

    Raises:
        EvaluationError: the features were made under another protocol, or the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            features = file.get_tensor("features")
        stored = json.loads(metadata["protocol"])
        intact = _digest(metadata["protocol"], features) == metadata["sha256"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise EvaluationError(f"{path} is damaged, delete it ({error})") from error
    wanted = json.loads(json.dumps(protocol))
    if not intact:
        raise EvaluationError(f"{path} is damaged, delete it: its hash is not what was written")
    if stored != wanted:
        differing = _differences(stored, wanted)
        raise EvaluationError(
            f"{path} holds features made under another protocol ({'; '.join(differing)}): delete "
            "it, or name another folder"
        )
    return features


def _digest(protocol: str, features: Tensor) -> str:
    content = features.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(protocol.encode() + content.tobytes()).hexdigest()


def _differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        found = []
        for key in sorted({*stored, *wanted}):
            label = f"{name}.{key}" if name else key
            found += _differences(stored.get(key), wanted.get(key), label)
        return found
    return [] if stored == wanted else [f"{name} {stored}, wanted {wanted}"]


def _versions(located: Located | None) -> dict[str, str]:
    libraries = ["torch"]
    if located is not None:
        libraries += ["torchmetrics", "scipy"]
        if located.network.name.startswith("inception"):
            libraries.append("torch-fidelity")
        if located.network.name == "clip":
            libraries += ["transformers", "pillow"]
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    from latent_shift import __version__

    return {"latent_shift": __version__, **found}


def _protocol(
    plan: Plan,
    metric: Metric,
    generated: ClipSet,
    real: ClipSet | None,
    counts: dict[str, int],
) -> dict[str, Any]:
    located = plan.located.get(metric.network)
    protocol: dict[str, Any] = {"metric": metric.name, "definition": _DEFINITIONS[metric.kind]}
    protocol |= located.protocol() if located else {}
    sets = {"generated": generated}
    if metric.compares and real is not None:
        sets["real"] = real
    protocol["count"] = {which: counts[which] for which in sets}
    protocol["num_frames"] = generated.num_frames
    protocol |= {which: clips.protocol() for which, clips in sets.items()}
    if min(protocol["count"].values()) < metric.minimum:
        protocol["forced"] = f"fewer than {metric.minimum} clips"
    protocol["versions"] = _versions(located)
    return protocol
