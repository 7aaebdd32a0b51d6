"""What holds for any shift of any shape, on shapes that nobody chose."""

import pytest
import torch

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec

from . import naive
from .cases import LAYOUTS, laid_out, prefix_sums

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_adjoint_and_truth_for_any_spec_and_shape(data):
    """<shift(x), y> == <x, unshift(y)>, and the operator is the definition, whatever the sizes."""
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any))
        clips, single_frame = {"cu_frames": prefix_sums(lengths)}, "identity"
        frames = sum(lengths)
    else:
        lengths = data.draw(st.integers(1, 5))
        clips = {"num_frames": lengths}
        single_frame = data.draw(st.sampled_from(["identity", "shift"]))
        frames = lengths * data.draw(st.integers(1, 3))
    sizes = data.draw(st.tuples(*[st.integers(0, 9)] * 3).filter(any))
    spec = ShiftSpec(
        *sizes,
        order=data.draw(st.permutations(["prev", "keep", "next"])),
        boundary=data.draw(st.sampled_from(["zeros", "replicate", "circular"])),
        single_frame=single_frame,
    )
    height, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    layout = data.draw(st.sampled_from(LAYOUTS))
    size = (frames, spec.channels, height, width)
    # Small integers: sums are exact, so equality is.
    x = laid_out(torch.randint(-8, 9, size).double(), layout).requires_grad_()
    y = torch.randint(-8, 9, size).double()
    shifted = lsk.temporal_shift(x, spec, **clips)
    assert torch.equal(shifted, naive.temporal_shift(x.detach(), lengths, spec))
    (back,) = torch.autograd.grad(shifted, x, y)
    assert (shifted * y).sum() == (x * back).sum()


@pytest.mark.parametrize("boundary", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("prev", [8, 6])
def test_before_and_after_the_norm_are_one_model_for_slices_of_whole_groups(boundary, prev):
    """As docs/operators.md has it: 8 channels are two groups of 4, 6 mix frames in one."""
    frames, channels = 4, 16
    x, weight, bias = torch.randn(frames, channels, 3, 3), torch.randn(channels), torch.randn(16)
    spec = ShiftSpec(prev, channels - prev, 0, boundary=boundary)
    before, after = (
        lsk.shift_add_group_norm_silu(x, weight, bias, 4, spec=spec, shift=side, num_frames=frames)
        for side in ("before", "after")
    )
    same = torch.isclose(before, after, rtol=1e-4, atol=1e-5).flatten(1).all(1)
    if prev == 6:
        assert not same[1:].any()
        return
    assert same[1:].all() and same[0] == (boundary != "zeros")
    if boundary == "zeros":
        edge = torch.nn.functional.silu(bias[:prev])[:, None, None].expand(prev, 3, 3)
        torch.testing.assert_close(before[0, :prev], edge)
        assert not after[0, :prev].any()
        torch.testing.assert_close(before[0, prev:], after[0, prev:], rtol=1e-4, atol=1e-5)


def test_the_papers_order_is_tsms_after_a_rotation_of_channels():
    x = torch.randn(4, 12, 3, 3)
    paper = ShiftSpec(3, 6, 3)
    tsm = ShiftSpec(3, 6, 3, order=("next", "prev", "keep"))
    rotated = lsk.temporal_shift(x.roll(3, dims=1), tsm, 4)
    assert torch.equal(rotated.roll(-3, dims=1), lsk.temporal_shift(x, paper, 4))
