"""The operators' matrix (tests/kernels/test_operators.py) with the CUDA kernels on the host executor,
in every way that a device's limits make them take."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels import naive
from tests.kernels.test_operators import (
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
    "one launch": {"arch": 90},
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
