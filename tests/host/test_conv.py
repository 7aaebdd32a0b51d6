"""shift_group_norm_silu_conv2d, every kernel of it, on the host executor against fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .device import HostDevice

BOUNDARIES = ("zeros", "replicate", "circular")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One call. Channels and offsets of the slices are those of the operator."""

    lengths: tuple[int, ...] = (3,)
    packed: bool = False  # clips go by cu_frames
    size: tuple[int, int] = (8, 8)
    channels: int = 32
    skip: int = 0
    out: int = 16
    groups: int = 4
    offsets: tuple[int, int, int] = (-1, 0, 1)
    slices: tuple[int, int, int] | None = None
    after: bool = False
    out_offsets: tuple[int, int, int] = (0, 0, 0)
    out_slices: tuple[int, int, int] | None = None
    boundary: str = "zeros"
    tables: bool = False  # temb, AdaGN and out_temb, a row for each clip
    residual: bool = False
    scale: float = 1.0
    sums: bool = False
    dtype: torch.dtype = torch.bfloat16
    filter_last: bool = False  # the filter in channels_last

    @property
    def frames(self) -> int:
        return sum(self.lengths)

    @property
    def all_channels(self) -> int:
        return self.channels + self.skip


def thirds(channels: int) -> tuple[int, int, int]:
    third = channels // 3
    return third, channels - 2 * third, third


def shifted(x: Tensor, case: Case, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
    """The shift of x (N, C, H, W), frame by frame."""
    y = torch.zeros_like(x)
    begin = 0
    for length in case.lengths:
        for t in range(length):
            channel = 0
            for size, offset in zip(sizes, offsets, strict=True):
                source = t if case.packed and length == 1 else t + offset
                if case.boundary == "circular":
                    source %= length
                elif case.boundary == "replicate":
                    source = min(max(source, 0), length - 1)
                if 0 <= source < length:
                    part = slice(channel, channel + size)
                    y[begin + t, part] = x[begin + source, part]
                channel += size
        begin += length
    return y


def rows(table: Tensor, frames: int) -> Tensor:
    return table.double().repeat_interleave(frames // len(table), 0)[:, :, None, None]


def problem(case: Case) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def pixels(channels: int) -> Tensor:
        x = normal(case.frames, channels, *case.size) + 0.5
        return x.to(memory_format=torch.channels_last)

    n, c, out = case.frames, case.all_channels, case.out
    count = n if case.packed else len(case.lengths)
    filters = normal(out, c, 3, 3) / 8
    if case.filter_last:
        filters = filters.to(memory_format=torch.channels_last)
    return {
        "x": pixels(case.channels),
        "skip": pixels(case.skip) if case.skip else None,
        "filter": filters,
        "residual": pixels(out) if case.residual else None,
        "temb": normal(count, c) if case.tables else None,
        "weight": normal(c, dtype=torch.float32) if not case.tables else normal(c),
        "bias": normal(c, dtype=torch.float32) if not case.tables else normal(c),
        "ada_scale": normal(count, c) if case.tables else None,
        "ada_shift": normal(n, c, dtype=torch.float32) if case.tables else None,
        "filter_bias": normal(out),
        "out_temb": normal(count, out) if case.tables else None,
    }


def expected(case: Case, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The operator in fp64, with its one rounding inside: that of the activation."""
    n = case.frames
    sizes = case.slices or thirds(case.all_channels)
    out_sizes = case.out_slices or thirds(case.out)
    parts = [t.double() for t in (given["x"], given["skip"]) if t is not None]
    u = torch.cat(parts, 1)
    if not case.after:
        u = shifted(u, case, sizes, case.offsets)
    if given["temb"] is not None:
        u = u + rows(given["temb"], n)
    grouped = u.unflatten(1, (case.groups, -1)).flatten(2)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, unbiased=False) + EPS).rsqrt()
    z = ((grouped - mean[..., None]) * rstd[..., None]).view_as(u)
    z = z * given["weight"].double()[:, None, None] + given["bias"].double()[:, None, None]
    if given["ada_scale"] is not None:
        z = z * (1 + rows(given["ada_scale"], n)) + rows(given["ada_shift"], n)
    a = F.silu(z)
    if case.after:
        a = shifted(a, case, sizes, case.offsets)
    a = a.to(case.dtype).double()
    filters = given["filter"].double()
    conv = F.conv2d(a, filters, given["filter_bias"].double(), padding=1)
    if given["out_temb"] is not None:
        conv = conv + rows(given["out_temb"], n)
    out = shifted(conv, case, out_sizes, case.out_offsets)
    if given["residual"] is not None:
        out = out + given["residual"].double()
    noise = a.square().mean().sqrt() * filters.square().mean().sqrt() * (9 * a.shape[1]) ** 0.5
    return {"out": out * case.scale, "mean": mean, "rstd": rstd, "noise": noise * case.scale}


def arguments(case: Case, given: dict[str, Tensor | None]) -> dict[str, object]:
    """The call in the binding's terms; pointers of outputs are still 0."""

    def address(name: str) -> int:
        tensor = given[name]
        return 0 if tensor is None else tensor.data_ptr()

    def table(name: str) -> tuple[int, int, int]:
        tensor = given[name]
        if tensor is None:
            return 0, 0, 1
        return tensor.data_ptr(), DTYPES[tensor.dtype], len(tensor) if tensor.dim() == 2 else 1

    tables = ["temb", "weight", "bias", "ada_scale", "ada_shift", "filter_bias", "out_temb"]
    return {
        **{name: address(name) for name in ("x", "skip", "filter", "residual")},
        **{name: table(name) for name in tables},
        **dict.fromkeys(("out", "mean", "rstd", "sums", "workspace", "cu_frames"), 0),
        "dtype": DTYPES[case.dtype],
        "filter_strides": list(given["filter"].stride()),
        "frames": case.frames,
        "height": case.size[0],
        "width": case.size[1],
        "x_channels": case.channels,
        "skip_channels": case.skip,
        "out_channels": case.out,
        "groups": case.groups,
        "eps": EPS,
        "scale": case.scale,
        "num_frames": case.frames if case.packed else case.lengths[0],
        "clips": len(case.lengths) if case.packed else 0,
        "sizes": list(case.slices or thirds(case.all_channels)),
        "offsets": list(case.offsets),
        "out_sizes": list(case.out_slices or thirds(case.out)),
        "out_offsets": list(case.out_offsets),
        "boundary": BOUNDARIES.index(case.boundary),
        "shift_after": case.after,
    }


def run(
    host,
    case: Case,
    given: dict[str, Tensor | None],
    variant: int,
    *,
    plant: Callable[[dict], None] = lambda call: None,
    missing: int = 0,
    **options,
) -> dict[str, Tensor]:
    """``plant`` changes the call, ``missing`` bytes of workspace are not there."""
    arch, *_ = host.conv_variants()[variant]
    call = arguments(case, given)
    with HostDevice(host, arch=arch, **options) as device:
        for name, tensor in given.items():
            if tensor is not None:
                device.input(tensor, name)
        got = {
            "out": device.output(
                (case.frames, case.out, *case.size),
                case.dtype,
                torch.channels_last,
                name="out",
            ),
            "mean": device.output((case.frames, case.groups), torch.float32, name="mean"),
            "rstd": device.output((case.frames, case.groups), torch.float32, name="rstd"),
        }
        if case.sums:
            got["sums"] = device.output((case.frames, case.out, 2), torch.float32, name="sums")
        if case.packed:
            starts = torch.tensor([0, *case.lengths]).cumsum(0).int()
            call["cu_frames"] = device.input(starts, "cu_frames").data_ptr()
        call.update({name: tensor.data_ptr() for name, tensor in got.items()})
        size = host.conv_workspace(call, variant)
        workspace = device.output(((size - missing) // 4,), torch.float32, name="workspace")
        call["workspace"] = workspace.data_ptr()
        plant(call)
        host.shift_group_norm_silu_conv2d(call, variant)
    return got


def check(case: Case, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got["mean"].double(), want["mean"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got["rstd"].double(), want["rstd"], atol=1e-6, rtol=1e-5)
    unit = torch.finfo(case.dtype).eps
    out = got["out"].double()
    assert out.isfinite().all()
    # the result is rounded once, and a few activations fall on the other side of a tie
    allowed = unit * want["out"].abs() + unit / 4 * want["noise"]
    worst = ((out - want["out"]).abs() / allowed).max()
    assert worst <= 1, f"{worst:.2f} of the allowed error"
    if case.sums:
        total = out.sum((2, 3))
        centred = (out - out.mean((2, 3), keepdim=True)).square().sum((2, 3))
        sums = got["sums"].double()
        torch.testing.assert_close(sums[..., 0], total, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(sums[..., 1], centred, atol=1e-3, rtol=1e-5)


def variant_of(host, arch: int, columns: int) -> int:
    return [variant[:2] for variant in host.conv_variants()].index((arch, columns))


BASE = Case()
CASES = {
    "plain": replace(BASE, offsets=(0, 0, 0)),
    "before": BASE,
    "many-blocks": replace(BASE, offsets=(0, 0, 0), channels=160, groups=8),
    "after": replace(BASE, after=True),
    "before-replicate": replace(BASE, boundary="replicate"),
    "after-circular": replace(BASE, boundary="circular", after=True, lengths=(2, 2)),
    "tiny-slices": replace(BASE, slices=(3, 2, 27), lengths=(2, 2), after=True),
    "everything": Case(
        lengths=(2, 2),
        size=(9, 5),
        channels=40,
        skip=16,
        out=24,
        groups=7,
        after=True,
        out_offsets=(1, 0, -1),
        boundary="replicate",
        tables=True,
        residual=True,
        scale=0.75,
        sums=True,
        filter_last=True,
    ),
    "many-tiles": replace(BASE, size=(10, 34), lengths=(2,), out_offsets=(-1, 0, 1), sums=True),
    "half": replace(BASE, dtype=torch.float16, skip=8, tables=True, residual=True),
    "out-zeros": replace(BASE, out_offsets=(-1, 0, 1), residual=True, sums=True),
    "out-zeros-alone": replace(BASE, out_offsets=(-1, 1, 0), out_slices=(3, 2, 11)),
    "out-circular": replace(BASE, out_offsets=(-1, 0, 1), boundary="circular", sums=True),
    "packed": replace(BASE, lengths=(1, 3, 2), packed=True, out_offsets=(-1, 0, 1), tables=True),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_matches_fp64(host, name: str, arch: int) -> None:
    case = CASES[name]
    given = problem(case)
    # races, preemption and the order of asynchronous copies where everything comes together
    races = name in ("before", "everything", "many-blocks")
    got = run(host, case, given, variant_of(host, arch, 64), races=races)
    check(case, got, expected(case, given))


@pytest.mark.parametrize(
    ("arch", "columns"), [(80, 128), (80, 160), (90, 80), (90, 128), (90, 160), (90, 320)]
)
def test_wide_tiles(host, arch: int, columns: int) -> None:
    case = replace(BASE, size=(10, 18), out=columns + 8, out_offsets=(-1, 0, 1), sums=True)
    given = problem(case)
    got = run(host, case, given, variant_of(host, arch, columns), races=True)
    check(case, got, expected(case, given))


@pytest.mark.parametrize("arch", [80, 90])
def test_every_order_gives_the_same_bits(host, arch: int) -> None:
    """The executor interleaves threads anew with every seed."""
    case = replace(BASE, skip=8, out_offsets=(-1, 0, 1), residual=True, sums=True)
    given = problem(case)
    variant = variant_of(host, arch, 64)
    first, *others = (run(host, case, given, variant, seed=seed) for seed in (0, 1))
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
def test_what_is_not_a_number_stays_in_its_frames(host, value: float, arch: int) -> None:
    """One value of one frame: its group has no statistics, and every frame that reads the group is
    NaN, where fp64 says so. A frame of one value has no variance and is finite."""
    case = replace(BASE, offsets=(-1, 0, 0), boundary="replicate")
    given = problem(case)
    if value == 3.0:
        given["x"][0] = value
    else:
        given["x"][0, 0, 1, 1] = value
    got = run(host, case, given, variant_of(host, arch, 64), races=False)
    want = expected(case, given)
    lost = want["out"].isnan()
    assert torch.equal(got["out"].isnan(), lost)
    assert lost.flatten(1).any(1).sum() == (0 if value == 3.0 else 2)
    noise = torch.finfo(case.dtype).eps * given["filter"].double().abs().sum((1, 2, 3)).max()
    difference = (got["out"].double() - want["out"])[~lost].abs()
    assert difference.max() <= noise * 8


PLANTED = {
    "short workspace": ({"missing": 16}, "out of bounds: write of"),
    "misaligned input": ({"plant": lambda call: call.update(x=call["x"] + 2)}, "misaligned"),
    "channels too many": (
        {"plant": lambda call: call.update(x_channels=call["x_channels"] + 8, groups=5)},
        "out of bounds: read of",
    ),
    "output over input": (
        {"plant": lambda call: call.update(out=call["residual"])},
        "which is an input",
    ),
    "rows too many": (
        {"plant": lambda call: call.update(bias=(call["bias"][0] + 4, *call["bias"][1:]))},
        "out of bounds: read of",
    ),
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_reported(host, fault: str, arch: int) -> None:
    planted, report = PLANTED[fault]
    case = replace(BASE, residual=True)
    with pytest.raises(host.KernelError, match=report):
        run(host, case, problem(case), variant_of(host, arch, 64), races=False, **planted)


@pytest.mark.parametrize(
    ("arch", "out", "columns"), [(80, 1280, 128), (90, 320, 320), (90, 64, 64), (120, 64, 64)]
)
def test_chooses_columns_that_fill_the_device(host, arch: int, out: int, columns: int) -> None:
    case = replace(BASE, lengths=(16, 16), size=(32, 32), channels=64, out=out)
    given = dict.fromkeys(problem(BASE))
    given["filter"] = torch.empty(0, 0, 0, 0)
    with HostDevice(host, arch=arch):
        variant = host.conv_choice(arguments(case, given))
    assert host.conv_variants()[variant][:2] == (90 if arch == 90 else 80, columns)
