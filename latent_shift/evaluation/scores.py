"""What is computed of features: the Fréchet distance, the kernel distance, the inception score,
the mean cosine; and how sure each is.

The mathematics are torchmetrics'; features go in where it expects images, through a network that
changes nothing. Features come as (N, K, D): N clips, K vectors of each, for a network that sees
frames one by one K is the number of frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .networks import EvaluationError, library_advice

SPLITS = 10  # of the inception score, as Salimans et al. (2016) have it
BLOCK = 2048  # clips whose kernel matrix is held at once
LEVEL = 0.95
_Z = 1.959963984540054  # two-sided, of a normal distribution at LEVEL


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features:

        |m - n|^2 + tr(S + R - 2 (S R)^(1/2))

    with means m, n and unbiased covariances S, R (Heusel et al. 2017; Unterthiner et al. 2018).

    Args:
        real, fake: (N, K, D) and (M, K, D).
    """
    metric = _torchmetrics().fid.FrechetInceptionDistance(
        feature=_Given(real.shape[-1]), sync_on_compute=False
    )
    metric.update(real.flatten(0, 1).double(), real=True)
    metric.update(fake.flatten(0, 1).double(), real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al.
    2018; on video features Unterthiner et al. 2018).

    Of sets of unequal size the surplus is left out; above `BLOCK` clips the mean over blocks is
    taken, which is unbiased too.

    Args:
        real, fake: (N, K, D) and (M, K, D); vectors of one clip count as one sample, their mean.
    """
    poly_mmd = _torchmetrics().kid.poly_mmd
    number = min(len(real), len(fake))
    blocks = -(-number // BLOCK)
    real, fake = (features[:number].double().mean(1) for features in (real, fake))
    parts = zip(real.tensor_split(blocks), fake.tensor_split(blocks), strict=True)
    return float(torch.stack([poly_mmd(*pair) for pair in parts]).mean())


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """exp of the mean Kullback-Leibler divergence from a set's mean prediction to its predictions,
    averaged over `splits` parts of the shuffled set (Salimans et al. 2016).

    Args:
        logits: (N, K, classes).
    """
    inception = _torchmetrics().inception
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that features are kept; that one split has no deviation
        torch.manual_seed(0)  # of the shuffle
        metric = inception.InceptionScore(nn.Identity(), splits, sync_on_compute=False)
        metric.update(logits.flatten(0, 1).double())
        return float(metric.compute()[0])


def similarity(clips: Tensor, texts: Tensor) -> Tensor:
    """Cosine between each clip's caption and its frames, averaged over the frames (CLIPSIM of Wu
    et al. 2021, in [-1, 1]; others report it times 100).

    Args:
        clips: (N, K, D).
        texts: (N, D).

    Returns:
        (N,) float64.
    """
    return torch.cosine_similarity(clips.double(), texts.double().unsqueeze(1), dim=-1).mean(1)


def interval(
    score: Callable[..., float],
    *samples: Tensor,
    resamples: int,
    seed: int = 0,
    percentile: bool = False,
) -> tuple[float, float] | None:
    """A bootstrap interval of 95% for what a score is on average over sets of this many clips.

    Clips are drawn anew with replacement, all vectors of a clip together. The interval is the
    score, give or take 1.96 standard deviations over the draws: drawing with replacement makes a
    set look poorer than it is, which moves distances upwards in every draw, so that their
    percentiles would not do.

    Args:
        score: takes what `samples` are.
        samples: sets of clips along the first dimension, drawn independently of each other.
        resamples: number of draws; 0 for no interval.
        percentile: take the draws' percentiles after all, for means: they keep to the range of
            what is averaged.
    """
    if resamples == 0 or min(map(len, samples)) < 2:
        return None
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise EvaluationError(library_advice("scipy", error)) from error

    def drawn(*rows: np.ndarray) -> float:
        return score(
            *(part[torch.from_numpy(row)] for part, row in zip(samples, rows, strict=True))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a score that no draw changes has no spread
        draws = bootstrap(
            [np.arange(len(part)) for part in samples],
            drawn,
            n_resamples=resamples,
            confidence_level=LEVEL,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    if percentile:
        low, high = draws.confidence_interval
        return float(low), float(high)
    value, spread = score(*samples), float(draws.standard_error)
    return value - _Z * spread, value + _Z * spread


class _Given(nn.Module):
    """Stands where torchmetrics expects a network, and hands on the features it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics() -> Any:
    """torchmetrics.image, whose import takes torch-fidelity and torchvision where they are."""
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.inception
        import torchmetrics.image.kid
    except (ImportError, RuntimeError) as error:
        raise EvaluationError(library_advice("torchmetrics", error)) from error
    return torchmetrics.image
