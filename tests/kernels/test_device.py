"""What only a GPU can show: streams, captured graphs, a hundred equal runs, 2^31 elements, memory.

The matrix of tests/kernels/test_operators.py runs there too, with LATENT_SHIFT_TEST_DEVICE=cuda.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import latent_shift_kernels as lsk
from latent_shift_kernels import ShiftSpec, cost, reference
from latent_shift_kernels.cost import Work
from tests.host import test_conv as conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CHANNELS, FRAMES = 320, 8
SPEC = ShiftSpec.latent_shift(CHANNELS)


def batch(layout: torch.memory_format = torch.channels_last, dtype=torch.bfloat16) -> Tensor:
    x = torch.randn(2 * FRAMES, CHANNELS, 32, 32, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=layout)


def block(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both joins of a ResNet block."""
    y, total = lsk.shift_add_group_norm_silu(
        x, weight, None, 32, spec=SPEC, num_frames=FRAMES, residual=residual
    )
    return lsk.shift_add(total, lsk.temporal_shift(y, SPEC, FRAMES), SPEC, FRAMES), y


def gradients(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
    out, y = block(*leaves)
    return out, *torch.autograd.grad((out, y), leaves, (residual, x))


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return batch(), batch(), torch.randn(CHANNELS, device="cuda")


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``call``, and what it writes its results to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # every lazy initialisation before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_a_captured_graph_follows_changed_inputs(arguments):
    graph, captured = capture(partial(block, *arguments))
    for _ in range(3):
        for argument in arguments:
            argument.copy_(torch.randn_like(argument))
        graph.replay()
        for got, expected in zip(captured, block(*arguments), strict=True):
            assert torch.equal(got, expected)


def test_a_captured_backward_follows_changed_inputs(arguments):
    graph, captured = capture(partial(gradients, *arguments))
    for argument in arguments:
        argument.copy_(torch.randn_like(argument))
    graph.replay()
    for got, expected in zip(captured, gradients(*arguments), strict=True):
        assert torch.equal(got, expected)


CONVOLUTIONS = {
    **conv.CASES,
    # more than the host executor has time for
    "site": conv.Case(
        lengths=(16,),
        size=(32, 32),
        channels=320,
        skip=320,
        out=320,
        groups=32,
        tables=True,
        residual=True,
        out_offsets=(-1, 0, 1),
        sums=True,
        filter_last=True,
    ),
    # what the planning takes each of its tiles for, on all that an H200 has
    **{
        f"tile-{out}": conv.Case(
            lengths=(16,), size=(32, 32), channels=64, out=out, out_offsets=(-1, 0, 1), sums=True
        )
        for out in (64, 80, 128, 160, 320)
    },
}


def convolve(case: conv.Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The case on the kernel that holds the convolution."""
    on = {name: None if t is None else t.cuda() for name, t in given.items()}
    tables = (on[name] for name in ("temb", "weight", "bias", "ada_scale", "ada_shift"))
    starts = torch.tensor([0, *case.lengths]).cumsum(0).int().cuda() if case.packed else None
    out, mean, rstd, sums = torch.ops.latent_shift.shift_group_norm_silu_conv2d_fused(
        on["x"], on["skip"], *tables, case.groups, conv.EPS,
        on["filter"], on["filter_bias"], on["out_temb"], on["residual"], case.scale,
        starts, 1 if case.packed else case.lengths[0],
        case.slices or conv.thirds(case.all_channels), case.offsets, case.after,
        case.out_slices or conv.thirds(case.out), case.out_offsets, case.boundary, case.sums,
    )  # fmt: skip
    return {"out": out, "mean": mean, "rstd": rstd, "sums": sums}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_convolution_matches_fp64(name):
    case = CONVOLUTIONS[name]
    given = conv.problem(case)
    got = {key: value.cpu() for key, value in convolve(case, given).items()}
    conv.check(case, got, conv.expected(case, given))


def test_a_hundred_convolutions_agree_in_every_bit():
    case = CONVOLUTIONS["site"]
    given = conv.problem(case)
    first = convolve(case, given)
    for _ in range(99):
        again = convolve(case, given)
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_captured_convolution_follows_changed_inputs():
    case = CONVOLUTIONS["site"]
    given = {k: None if t is None else t.cuda() for k, t in conv.problem(case).items()}
    graph, captured = capture(partial(convolve, case, given))
    given["x"].copy_(torch.randn_like(given["x"]))
    graph.replay()
    expected = convolve(case, given)
    assert all(torch.equal(captured[key], expected[key]) for key in captured)


# What the sanitizers see: every way of launching the norm, in small.
VARIANTS = ("one launch", "cluster", "split", "odd")
SMALL = ((200, 40, 4, 4, 5), (2, 40, 16, 16, 5), (1, 40, 256, 256, 1))
ODD = (3, 37, 5, 7, 1)  # channels and pixels of which no vector is whole


def smallest(variant: str, dtype: torch.dtype, channels_last: bool, backward: bool) -> tuple:
    """Frames, channels, height, width and groups that this device's plan serves in that way."""
    if variant == "odd":
        return ODD
    device = cost.Device.of(torch.device("cuda"))
    for *shape, groups in SMALL:
        work = Work(cost.NORM, tuple(shape), dtype, channels_last, groups)
        if cost.plan_norm(work, device, backward=backward).variant == variant:
            return *shape, groups
    pytest.skip(f"no small call is a {variant} on sm_{device.arch}")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sanitized_norm(variant, layout, dtype, backward):
    """With a residual and every table; whole vectors, and slices that straddle them."""
    *shape, groups = smallest(variant, dtype, layout is torch.channels_last, backward)
    frames, channels = shape[:2]
    spec = ShiftSpec.latent_shift(channels)
    x, residual, dy = (
        torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        for _ in range(3)
    )
    rows = ((1,), (), (), (frames,), (1,))
    tables = [torch.randn(*n, channels, device="cuda") for n in rows]
    shift = (None, frames, spec.sizes, spec.offsets(frames), False, "zeros")
    ops = torch.ops.latent_shift
    y, total, mean, rstd = ops.shift_add_group_norm_silu(x, residual, *tables, groups, 1e-5, *shift)
    results = y, total
    if backward:
        results = ops.shift_add_group_norm_silu_backward(
            dy, x, total, True, *tables, mean, rstd, groups, *shift
        )
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [40, 37], ids=["vectors", "odd"])
def test_sanitized_shift(channels, layout, dtype):
    shape, spec = (6, channels, 9, 8), ShiftSpec.latent_shift(channels, boundary="replicate")
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    shift = (None, 3, spec.sizes, spec.offsets(3), "replicate")
    ops = torch.ops.latent_shift
    moved = ops.temporal_shift(x, *shift)
    total = ops.shift_add(x, moved, 0.5, *shift)
    assert torch.isfinite(ops.temporal_shift_backward(total, *shift)).all()


@pytest.mark.parametrize("name", ["everything", *(n for n in CONVOLUTIONS if "tile-" in n)])
def test_sanitized_convolution(name):
    case = CONVOLUTIONS[name]
    got = convolve(case, conv.problem(case))
    assert torch.isfinite(got["out"]).all() and torch.isfinite(got["sums"]).all()


def test_the_current_stream_is_used(arguments):
    expected = gradients(*arguments)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # kernels on another stream would overtake this
        late = [argument * 1 for argument in arguments]
        got = gradients(*late)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_hundred_runs_agree_in_every_bit(layout):
    arguments = batch(layout), batch(layout), torch.randn(CHANNELS, device="cuda")
    first = gradients(*arguments)
    for _ in range(100):
        again = gradients(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_threads_do_not_disturb_each_other(arguments):
    expected = gradients(*arguments)
    failures = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                got = gradients(*arguments)
                torch.cuda.current_stream().synchronize()
                if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                    failures.append("results differ")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_the_tensors_device_is_used(arguments):
    expected = gradients(*arguments)
    got = gradients(*(argument.to("cuda:1") for argument in arguments))
    assert all(t.device.index == 1 for t in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_more_than_two_to_the_31_elements(layout):
    side, channels, frames = 336, 1280, 16  # 2.3e9
    x = torch.empty(frames, channels, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=layout)
    for frame in range(frames):
        x[frame].normal_()
    assert x.numel() > 2**31
    spec = ShiftSpec.latent_shift(channels)
    y = lsk.temporal_shift(x, spec, frames)
    begin = 0
    for size, offset in zip(spec.sizes, spec.offsets(frames), strict=True):
        for t in (0, 7, frames - 1):
            for channel in (begin, begin + size - 1):
                inside = 0 <= t + offset < frames
                expected = x[t + offset, channel] if inside else torch.zeros_like(x[t, channel])
                assert torch.equal(y[t, channel], expected), (t, channel)
        begin += size
    del y
    z = lsk.shift_add_group_norm_silu(
        x, None, None, 32, spec=spec, shift="after", num_frames=frames
    )
    last = reference.shift_add_group_norm_silu(
        x[-1:].float(), None, None, None, None, None, None, 32, 1e-5,
        None, 1, [channels, 0, 0], [0, 0, 0], False, "zeros",
    )[0]  # fmt: skip
    kept = slice(spec.prev, spec.prev + spec.keep)
    torch.testing.assert_close(z[-1:, kept].float(), last[:, kept], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_more_than_two_to_the_31_elements_backward_and_added(layout):
    """The last frame of what does not move, against PyTorch on that frame alone."""
    side, channels, frames = 336, 1280, 16
    x = torch.randn(channels, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.expand(frames, -1, -1, -1).contiguous(memory_format=layout)
    shift = (None, frames, [0, channels, 0], [-1, 0, 1], "zeros")
    ops = torch.ops.latent_shift
    total = ops.shift_add(x, x, 0.5, *shift)
    assert torch.equal(total[-1], x[-1]) and torch.equal(total[0], x[0])
    del total
    none = (None,) * 5
    *clip, boundary = shift
    _, _, mean, rstd = ops.shift_add_group_norm_silu(
        x, None, *none, 32, 1e-5, *clip, False, boundary
    )
    dx, *_ = ops.shift_add_group_norm_silu_backward(
        x, None, x, False, *none, mean, rstd, 32, *clip, False, boundary
    )
    last = x[-1:].float().requires_grad_()
    y = torch.nn.functional.silu(torch.nn.functional.group_norm(last, 32))
    (expected,) = torch.autograd.grad(y, last, x[-1:].float())
    torch.testing.assert_close(dx[-1:].float(), expected, rtol=2e-2, atol=2e-2)


def test_a_convolution_of_more_than_two_to_the_31_elements():
    side, channels, out = 336, 1280, 64
    x = torch.randn(channels, side, side, device="cuda", dtype=torch.bfloat16)
    x = x.expand(16, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, channels, 3, 3, device="cuda", dtype=torch.bfloat16) / 107
    still = ([0, channels, 0], [0, 0, 0], False, [0, out, 0], [0, 0, 0], "zeros")
    y, *_ = torch.ops.latent_shift.shift_group_norm_silu_conv2d_fused(
        x, *(None,) * 6, 32, 1e-5, weight, None, None, None, 1.0, None, 16, *still, False
    )
    a = torch.nn.functional.silu(torch.nn.functional.group_norm(x[-1:].float(), 32)).bfloat16()
    expected = torch.nn.functional.conv2d(a.float(), weight.float(), padding=1)
    torch.testing.assert_close(y[-1:].float(), expected, rtol=2e-2, atol=3e-2)


def test_a_view_at_any_offset():
    """Storage that is aligned to two bytes and no more."""
    memory = torch.randn(FRAMES * CHANNELS * 64 + 8, device="cuda", dtype=torch.bfloat16)
    for offset in range(8):
        flat = memory[offset : offset + FRAMES * CHANNELS * 64]
        nchw = flat.view(FRAMES, CHANNELS, 8, 8)
        channels_last = flat.view(FRAMES, 8, 8, CHANNELS).permute(0, 3, 1, 2)
        shift = (None, FRAMES, SPEC.sizes, SPEC.offsets(FRAMES), "zeros")
        for x in (nchw, channels_last):
            expected = reference.temporal_shift(x, *shift)
            assert torch.equal(lsk.temporal_shift(x, SPEC, FRAMES), expected)


def test_backward_keeps_inputs_and_statistics_only(arguments):
    x, residual, weight = (argument.requires_grad_() for argument in arguments)
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lsk.shift_add_group_norm_silu(
            x, weight, None, 32, spec=SPEC, num_frames=FRAMES, residual=residual
        )
    assert sum(saved.values()) < 1.1 * x.nbytes  # the sum, the weight, mean and rstd
