"""ShiftSpec and the checks of the public functions: bad input gets one clear sentence."""

import dataclasses
import pickle

import pytest
import torch

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec


@pytest.mark.parametrize(
    ("channels", "thirds"),
    [(320, [106, 108, 106]), (640, [213, 214, 213]), (3, [1, 1, 1]), (2, [0, 2, 0])],
)
def test_latent_shift_keeps_the_remainder(channels, thirds):
    spec = ShiftSpec.latent_shift(channels)
    assert spec.sizes == thirds and spec.channels == channels
    assert spec.offsets(2) == [-1, 0, 1]


def test_presets_differ_in_order_and_direction():
    assert ShiftSpec.tsm(64).sizes == [8, 8, 48] and ShiftSpec.tsm(64).offsets(4) == [1, -1, 0]
    causal = ShiftSpec.causal(64)
    assert (causal.prev, causal.keep, causal.next) == (8, 56, 0)


def test_single_frame():
    assert ShiftSpec.latent_shift(6).offsets(1) == [0, 0, 0]
    x = torch.ones(1, 6, 1, 1)
    assert torch.equal(lsk.temporal_shift(x, ShiftSpec.latent_shift(6), 1), x)
    wiped = lsk.temporal_shift(x, ShiftSpec.latent_shift(6, single_frame="shift"), 1)
    assert wiped.flatten().tolist() == [0, 0, 1, 1, 0, 0]


def test_spec_is_a_frozen_picklable_value():
    spec = ShiftSpec.tsm(64)
    assert pickle.loads(pickle.dumps(spec)) == spec and hash(spec) == hash(ShiftSpec.tsm(64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.prev = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prev": -1, "keep": 2, "next": 0}, "prev must be a channel count"),
        ({"prev": 1.5, "keep": 2, "next": 0}, "prev must be a channel count"),
        ({"prev": 0, "keep": 0, "next": 0}, "at least one channel"),
        ({"prev": 1, "keep": 1, "next": 1, "order": ("prev", "prev", "next")}, "once each"),
        ({"prev": 1, "keep": 1, "next": 1, "boundary": "wrap"}, "zeros, replicate, circular"),
        ({"prev": 1, "keep": 1, "next": 1, "single_frame": "no"}, "identity, shift"),
    ],
)
def test_bad_specs(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShiftSpec(**arguments)


@pytest.mark.parametrize("call", [lambda: ShiftSpec.tsm(64, 1), lambda: ShiftSpec.causal(64, 0)])
def test_bad_fold_div(call):
    with pytest.raises(ValueError, match="fold_div must be >="):
        call()


SPEC = ShiftSpec.latent_shift(12)
X = torch.zeros(4, 12, 2, 2)
FILTER = torch.zeros(8, 12, 3, 3)
CU_FRAMES = torch.tensor([0, 3, 4], dtype=torch.int32)


def conv2d(x, filter, **arguments):
    return lsk.shift_group_norm_silu_conv2d(x, None, None, 4, filter, **arguments)


def conv2d_module(conv):
    return lsk.ShiftGroupNormSiLUConv2d(torch.nn.GroupNorm(4, 12), conv)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lsk.temporal_shift(X, SPEC), "pass num_frames"),
        (lambda: lsk.temporal_shift(X, SPEC, 3), "does not split into clips of num_frames = 3"),
        (lambda: lsk.temporal_shift(X, SPEC, 0), "num_frames = 0"),
        (lambda: lsk.temporal_shift(X[0], SPEC, 2), "got \\(12, 2, 2\\)"),
        (lambda: lsk.temporal_shift(X.long(), SPEC, 2), "got torch.int64"),
        (lambda: lsk.temporal_shift(X, ShiftSpec.latent_shift(15), 2), "15 channels .* has 12"),
        (lambda: lsk.temporal_shift(torch.zeros(2, 12, 4, 2, 2), SPEC, 3), "leave num_frames out"),
        (lambda: lsk.temporal_shift(X, SPEC, 2, cu_frames=CU_FRAMES), "pass one of the two"),
        (lambda: lsk.temporal_shift(X, SPEC, cu_frames=CU_FRAMES.long()), "got torch.int64"),
        (lambda: lsk.temporal_shift(X, SPEC, cu_frames=CU_FRAMES[:1]), "least one clip"),
        (lambda: lsk.temporal_shift(X, SPEC, cu_frames=CU_FRAMES.to("meta")), "is on meta"),
        (lambda: lsk.temporal_shift(X[None], SPEC, cu_frames=CU_FRAMES), "must be \\(N, C, H, W"),
        (
            lambda: lsk.shift_add(
                X, X, ShiftSpec.causal(12, single_frame="shift"), cu_frames=CU_FRAMES
            ),
            'must have single_frame="identity"',
        ),
        (lambda: lsk.shift_add(X[:2], X, SPEC, 2), "residual must be \\(4, 12, 2, 2\\)"),
        (lambda: lsk.shift_add(X.double(), X, SPEC, 2), "cast one of them"),
        (lambda: lsk.shift_add(X.to("meta"), X, SPEC, 2), "is on meta"),
        (lambda: lsk.shift_add_group_norm_silu(X, None, None, 5), "num_groups must divide the 12"),
        (
            lambda: lsk.shift_add_group_norm_silu(X, X[0, :3, 0, 0], None, 4),
            "weight must be \\(12,\\)",
        ),
        (
            lambda: lsk.shift_add_group_norm_silu(X, None, None, 4, temb=torch.zeros(3, 12)),
            "temb must be \\(R, 12\\) with R dividing 4",
        ),
        (lambda: lsk.shift_add_group_norm_silu(X, None, None, 4, shift="both"), 'must be "before"'),
        (lambda: lsk.ShiftGroupNormSiLU(4, 24, spec=SPEC), "spec is for 12 channels"),
        (lambda: conv2d(X, FILTER[:, :8]), "filter must be \\(Cout, 12, 3, 3\\)"),
        (lambda: conv2d(X, FILTER.double()), "cast one of them"),
        (lambda: conv2d(X, FILTER, skip=X[:, :4]), "filter must be \\(Cout, 16, 3, 3\\)"),
        (lambda: conv2d(X, FILTER, skip=X[:2]), "skip must be .* but for its channels"),
        (lambda: conv2d(X, FILTER, residual=X), "residual must be \\(4, 8, 2, 2\\)"),
        (lambda: conv2d(X, FILTER, out_temb=X[:, :, 0, 0]), "out_temb must be \\(R, 8\\)"),
        (lambda: conv2d(X, FILTER, out_spec=SPEC, num_frames=2), "12 channels .* has 8"),
        (
            lambda: conv2d(
                X,
                FILTER,
                spec=SPEC,
                out_spec=ShiftSpec.latent_shift(8, boundary="circular"),
                num_frames=2,
            ),
            "need one boundary",
        ),
        (lambda: conv2d_module(torch.nn.Conv2d(12, 8, 3)), "must have padding = \\(1, 1\\)"),
        (lambda: conv2d_module(torch.nn.Conv2d(6, 8, 3, padding=1)), "conv is for 6 channels"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "arguments",
    [
        (None, 3, [4, 4, 4], [-1, 0, 1], "zeros"),
        (None, 2, [4, 4, 5], [-1, 0, 1], "zeros"),
        (None, 2, [4, 4, 4], [-2, 0, 1], "zeros"),
        (None, 2, [4, 4, 4], [-1, 0, 1], "wrap"),
        (CU_FRAMES.long(), 1, [4, 4, 4], [-1, 0, 1], "zeros"),
        (CU_FRAMES[:1], 1, [4, 4, 4], [-1, 0, 1], "zeros"),
        (CU_FRAMES[None], 1, [4, 4, 4], [-1, 0, 1], "zeros"),
    ],
)
def test_operators_check_for_themselves(arguments):
    """Whoever calls ``torch.ops`` directly is still never read out of bounds."""
    if lsk.serving("cpu")["temporal_shift"] != "cpu":
        pytest.skip("the CPU library is not built")
    with pytest.raises(RuntimeError):
        torch.ops.latent_shift.temporal_shift(X, *arguments)


def test_public_api():
    assert all(hasattr(lsk, name) for name in lsk.__all__)
    assert sorted(lsk.__all__) == lsk.__all__
