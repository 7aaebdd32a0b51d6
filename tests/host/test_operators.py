"""The operators' matrix (tests/kernels/test_operators.py) with the CUDA kernels on the host
executor, in every way that a device's limits make them take."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels import naive
from tests.kernels.cases import (
    CLIPS,
    DTYPES,
    FLAGS,
    LAYOUTS,
    SHAPES,
    SPECS,
    check,
    clip_lengths,
    laid_out,
    lower,
    make_case,
    make_spec,
)

from .backend import HostBackend

# A small slab fits, is shared by a cluster, or is cut up.
LIMITS = {
    "one launch": {"arch": 80},
    "cluster": {"arch": 90, "shared_per_block": 6 << 10},
    "split": {"arch": 80, "shared_per_block": 4 << 10},
}
WAYS = {"one launch": 1, "cluster": 1, "split": 3}  # launches of the forward


def cases(step: int, *axes) -> pytest.MarkDecorator:
    """Every ``step``-th case of the product of ``axes``; the steps divide no axis."""
    product = list(itertools.product(*axes))[::step]
    return pytest.mark.parametrize("case", product, ids="-".join)


@cases(211, SHAPES, LAYOUTS, FLAGS, SPECS, ("before", "after"), DTYPES, CLIPS, LIMITS)
def test_group_norm_silu(host, case):
    shape, layout, flags, spec, shift, dtype, clips, limits = case
    backend = HostBackend(host, races=False, **LIMITS[limits])
    check(
        backend.implementations(),
        make_case(shape, layout, flags, spec, shift, DTYPES[dtype], clips),
    )


@cases(1999, SHAPES, LAYOUTS, FLAGS, SPECS, ("before", "after"), DTYPES, CLIPS, LIMITS)
def test_group_norm_silu_does_not_race(host, case):
    shape, layout, flags, spec, shift, dtype, clips, limits = case
    backend = HostBackend(host, races=True, **LIMITS[limits])
    check(
        backend.implementations(),
        make_case(shape, layout, flags, spec, shift, DTYPES[dtype], clips),
    )


def check_shift(backend: HostBackend, case: tuple) -> None:
    shape, layout, spec, dtype, clips = case
    run = backend.implementations()
    count, frames, channels, height, width, _ = SHAPES[shape]
    size = (count * frames, channels, height, width)
    x = laid_out(torch.randn(size, dtype=torch.float64).to(DTYPES[dtype]), layout)
    shift, lengths = make_spec(spec, clips, channels), clip_lengths(shape, clips)
    lowered = lower(lengths, shift, channels)
    moved = naive.temporal_shift(x, lengths, shift)
    assert torch.equal(run["temporal_shift"](x, *lowered), moved)
    residual = laid_out(torch.randn(size, dtype=torch.float64).to(DTYPES[dtype]), layout)
    exact = (residual.double() + moved.double()) * 0.5
    assert torch.equal(run["shift_add"](residual, x, 0.5, *lowered), exact.to(x.dtype))
    wide = x.detach().double().requires_grad_()
    dy = laid_out(torch.randn(size, dtype=torch.float64).to(DTYPES[dtype]), layout)
    (exact,) = torch.autograd.grad(naive.temporal_shift(wide, lengths, shift), wide, dy.double())
    assert torch.equal(run["temporal_shift_backward"](dy, *lowered), exact.to(x.dtype))


@cases(3, SHAPES, LAYOUTS, [name for name in SPECS if name != "none"], DTYPES, CLIPS)
def test_shift(host, case):
    check_shift(HostBackend(host, races=False), case)


@cases(89, SHAPES, LAYOUTS, [name for name in SPECS if name != "none"], DTYPES, CLIPS)
def test_shift_does_not_race(host, case):
    check_shift(HostBackend(host, races=True), case)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("races", [False, True])
def test_every_way_is_taken(host, monkeypatch, limits, layout, races):
    """With groups of a few KiB the limits do choose the way they are named for, and all agree."""
    monkeypatch.setitem(SHAPES, "slab", (1, 2, 80, 16, 16, 8))
    options = dict(LIMITS[limits])
    if limits == "cluster":  # eight blocks hold both slabs of two groups
        options["shared_per_block"] = 8 << 10
    backend = HostBackend(host, races=races, **options)
    run = backend.implementations()
    case = make_case("slab", layout, "everything", "latent_shift", "before", torch.float32)
    seen = []

    def noting(name):
        def call(*arguments):
            result = run[name](*arguments)
            seen.append(backend.launches)
            return result

        return call

    check({name: noting(name) for name in run}, case)
    forward, backward = seen
    assert len(forward) == WAYS[limits]
    assert len(backward) == WAYS[limits] + 1  # the gradients of the parameters
    for launches in seen:
        assert (launches[0]["cluster"] > 1) == (limits == "cluster")


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(host, limits, dtype):
    """Tensors that begin between two vectors get the right result one element at a time."""
    backend = HostBackend(host, races=False, offset=1, **LIMITS[limits])
    for spec in ("latent_shift", "replicate"):
        for layout in ("nchw", "channels_last"):
            case = make_case("one_pixel", layout, "join", spec, "after", DTYPES[dtype])
            check(backend.implementations(), case)
            check_shift(backend, ("one_pixel", layout, spec, dtype, "even"))


@pytest.mark.parametrize("limits", LIMITS)
def test_zero_variance_and_non_finite_values(host, limits):
    run = HostBackend(host, races=False, **LIMITS[limits]).implementations()
    norm = run["shift_add_group_norm_silu"]
    shift = (None, 1, [16, 0, 0], [0, 0, 0], False, "zeros")
    x = torch.full((1, 16, 9, 9), 5.3).to(memory_format=torch.channels_last)
    y, _, mean, rstd = norm(x, *[None] * 6, 2, 1e-5, *shift)
    assert (y == 0).all() and (mean == x[0, 0, 0, 0]).all()
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e-5**-0.5))
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
        x[0, 3, 4, 4] = value
        y, _, mean, _ = norm(x, *[None] * 6, 2, 1e-5, *shift)
        assert y[0, :8].isnan().all() and y[0, 8:].isfinite().all() and y[1].isfinite().all()


def test_runs_are_bitwise_equal(host):
    """Whatever the order in which blocks and warps get on."""
    case = make_case("site", "channels_last", "everything", "latent_shift", "after", torch.float32)
    tables = [case.tensors[n] for n in ("temb", "weight", "bias", "ada_scale", "ada_shift")]
    shift = lower(case.lengths, case.spec, case.x.shape[1])

    def once(seed):
        run = HostBackend(host, races=True, seed=seed, **LIMITS["cluster"]).implementations()
        y, total, mean, rstd = run["shift_add_group_norm_silu"](
            case.x, case.tensors["residual"], *tables, 32, 1e-5, *shift[:-1], True, shift[-1]
        )
        grads = run["shift_add_group_norm_silu_backward"](
            case.dy, case.dsum, total, True, *tables, mean, rstd, 32, *shift[:-1], True, shift[-1]
        )
        return [y, total, mean, rstd, *grads]

    assert all(torch.equal(a, b) for a, b in zip(once(0), once(1), strict=True))
