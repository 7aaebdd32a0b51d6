"""What the planning of the CUDA kernels chooses, and the cost model on top of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import roofline
from benchmarks.sites import unet_sites
from latent_shift_kernels import cost
from latent_shift_kernels.cost import DEVICES, Work

from .backend import HostBackend

BYTES = 2  # of bfloat16
H200 = DEVICES["h200"]
# What a block may have, and the registers of a multiprocessor, on every architecture.
MACHINES = [*DEVICES.values(), cost.Device(120, 170, 99 << 10), cost.Device(86, 82, 99 << 10)]

pytestmark = pytest.mark.skipif(
    cost._library() is None, reason="the CPU library, which holds the planning, is not built"
)


def norm(site, op: str = cost.NORM) -> Work:
    return Work(op, site.shape)


def test_sites_without_a_skip_take_one_block_a_slab():
    """And there is a block for nearly every multiprocessor, in rows of whole sectors."""
    for site in unet_sites(256, 32):
        plan = cost.plan_norm(norm(site), H200)
        assert plan.tile_c * 16 % 32 == 0, (site, plan)
        if site.block.startswith("down"):
            assert plan.variant == "one launch" and plan.blocks >= 128, (site, plan)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"sm_{machine.arch}")
def test_sites_without_a_skip_are_read_once_everywhere(machine):
    for site in unet_sites(256, 32):
        if site.block.startswith("down"):
            assert cost.plan_norm(norm(site), machine).variant != "split", site


def test_what_is_not_aligned_is_planned_by_elements():
    site = unet_sites(256, 32)[0]
    assert cost.plan_norm(norm(site), H200).vector == 8
    assert cost.plan_norm(replace(norm(site), aligned=False), H200).vector == 1


@pytest.mark.parametrize("frames", [16, 32, 64])
def test_hopper_reads_once(frames):
    for site in unet_sites(256, frames) + unet_sites(512, frames):
        assert cost.plan_norm(norm(site), H200).variant != "split", site
    for site in unet_sites(256, frames):
        assert cost.plan_norm(norm(site), H200, backward=True).variant != "split", site


def test_bytes_are_the_least_there_are():
    for site in unet_sites(256, 32):
        elements = site.frames * site.channels * site.side**2
        forward = cost.cuda(norm(site), H200)
        assert forward.launches == 1 and forward.bytes <= 1.01 * 2 * elements * BYTES
        backward = cost.cuda(norm(site, f"{cost.NORM}_backward"), H200)
        assert backward.launches == 2 and backward.bytes <= 1.6 * 3 * elements * BYTES


def test_the_library_plans_as_the_kernels_do(host):
    """The planning is compiled twice: into what explains, and into what launches."""
    shared = H200.shared_per_block
    host.configure(0, False, H200.arch, shared, H200.num_sms)
    for site in unet_sites(256, 32):
        told = {
            "dtype": 1, "channels_last": True, "frames": site.frames, "channels": site.channels,
            "pixels": site.side**2, "groups": 32, "aligned": True,
        }  # fmt: skip
        for backward in (False, True):
            mine = cost.plan_norm(norm(site), H200, backward=backward)
            theirs = getattr(host, f"plan_norm_{'backward' if backward else 'forward'}")(told)
            for name in ("variant", "vector", "tiles", "threads", "shared", "blocks"):
                assert getattr(mine, name) == theirs[name], (site, name)


@settings(max_examples=200, deadline=None)
@given(
    machine=st.sampled_from(MACHINES),
    frames=st.integers(1, 64),
    groups=st.integers(1, 64),
    width=st.integers(1, 80),
    side=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    last=st.booleans(),
    backward=st.booleans(),
)
def test_a_norm_fits_every_device(machine, frames, groups, width, side, dtype, last, backward):
    """No launch asks for too much shared memory, too many threads, or a cluster where there is
    none, and every pixel and channel has a block."""
    shape = (frames, groups * width, *side)
    work = Work(cost.NORM, shape, dtype, last, groups)
    plan = cost.plan_norm(work, machine, backward=backward)
    assert plan is not None
    assert plan.shared <= machine.shared_per_block
    assert 0 < plan.threads <= 512 and plan.threads % 32 == 0
    assert plan.cluster in (1, 2, 4, 8) and (plan.cluster == 1 or machine.arch >= 90)
    assert plan.blocks % plan.cluster == 0 and plan.blocks < 2**31
    spans = -(-groups // plan.span)
    assert plan.blocks == frames * spans * plan.tiles
    unit_c = plan.vector if last else 1
    covered_c = -(-plan.tiles // plan.tiles_p) * plan.tile_c * unit_c
    covered_p = plan.tiles_p * plan.tile_p * (1 if last else plan.vector)
    assert covered_c >= min(plan.span, groups) * width and covered_p >= side[0] * side[1]


@settings(max_examples=200, deadline=None)
@given(
    machine=st.sampled_from(MACHINES),
    frames=st.integers(1, 64),
    eighths=st.tuples(st.integers(1, 320), st.integers(0, 160), st.integers(1, 320)),
    side=st.tuples(st.integers(1, 130), st.integers(1, 130)),
)
def test_a_convolution_fits_every_device(machine, frames, eighths, side):
    channels, skip, out = (8 * count for count in eighths)
    work = Work(cost.CONV2D, (frames, channels, *side), skip_channels=skip, out_channels=out)
    plan = cost.plan_conv(work, machine)
    assert plan is not None
    assert plan.shared <= machine.shared_per_block
    assert plan.ctas % plan.cluster == 0 and (plan.cluster == 1 or machine.arch == 90)
    assert (plan.arch == 90) == (machine.arch == 90), "wgmma is Hopper's alone"
    assert plan.columns * plan.cta_columns >= out > plan.columns * (plan.cta_columns - 1)
    assert plan.tiles == frames * -(-side[0] // 8) * -(-side[1] // 8) <= 2 * plan.ctas
    assert 32 * plan.blocks >= channels + skip > 32 * (plan.blocks - 1)


def test_a_convolution_counts_the_blocks_that_a_multiprocessor_holds():
    """One of 160 columns, whose registers leave no room for a second: 16 of them are as fast on 16
    multiprocessors as 32 of 128, which share."""
    wide = Work(cost.CONV2D, (2, 320, 32, 32), out_channels=160)
    assert cost.plan_conv(wide, cost.Device(80, 16, 163 << 10)).columns == 160


def test_hopper_without_its_own_kernels_has_those_of_ampere():
    work = Work(cost.CONV2D, (32, 320, 32, 32))
    assert cost.plan_conv(work, H200).arch == 90
    assert cost.plan_conv(work, replace(H200, wgmma=False)).arch == 80


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8), (10, 34), (16, 17)])
def test_a_convolution_reads_the_borders_of_its_tiles(size):
    """Counted pixel by pixel: a tile reads its pixels and what touches them, inside the image."""
    read = 0
    for top, left in product(range(0, size[0], 8), range(0, size[1], 8)):
        rows = [r for r in range(top - 1, top + 9) if 0 <= r < size[0]]
        read += len(rows) * len([c for c in range(left - 1, left + 9) if 0 <= c < size[1]])
    work = Work(cost.CONV2D, (3, 16, *size), out_channels=8)
    found, plan = cost.cuda(work, H200), cost.plan_conv(work, H200)
    assert found.special == 2 * 3 * read * 16 * plan.cta_columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("size", "offset"), [((40, 9, 8), 0), ((40, 9, 8), 1), ((5, 3, 7), 0)])
def test_elementwise_kernels_are_launched_as_explained(host, dtype, size, offset):
    """``offset`` elements from where an access of 16 bytes may be."""
    backend = HostBackend(host, offset=offset, races=False)
    backend.temporal_shift(
        torch.randn(3, *size).to(dtype), None, 3, [size[0], 0, 0], [0] * 3, "zeros"
    )
    work = Work("temporal_shift", (3, *size), dtype, False, aligned=not offset)
    found, (launch,) = cost.cuda(work, H200), backend.launches
    assert (found.blocks, found.threads) == (launch["blocks"][0], launch["threads"][0])
    whole = not offset and torch.Size(size).numel() * dtype.itemsize % 16 == 0
    assert found.variant.endswith(f" {16 if whole else dtype.itemsize} bytes an access")


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "refused"),
    [
        ((32, 320, 32, 32), torch.bfloat16, H200, []),
        (
            (32, 320, 64, 64),
            torch.bfloat16,
            H200,
            ["one block a slab: 4 of the groups of a frame are 327680 bytes"],
        ),
        (
            (4, 64, 512, 512),
            torch.float32,
            DEVICES["a100"],
            ["one block a slab: 2 of the groups", "a cluster: sm_80 has none"],
        ),
        (
            (4, 64, 512, 512),
            torch.float32,
            H200,
            ["one block a slab: 2 of the groups", "a cluster: 4194304 bytes are more than eight"],
        ),
        ((200, 37 * 32, 5, 7), torch.bfloat16, H200, []),
    ],
)
def test_faster_launches_are_refused_with_a_reason(shape, dtype, device, refused):
    found = cost.cuda(Work(cost.NORM, shape, dtype), device).refused
    assert len(found) == len(refused)
    assert all(said.startswith(begin) for said, begin in zip(found, refused, strict=True)), found
    crooked = cost.cuda(Work(cost.NORM, shape, dtype, aligned=False), device).refused
    assert crooked[-1].startswith("16 bytes an access: a tensor does not begin")


def test_refused_calls_have_no_plan():
    assert cost.plan_conv(Work(cost.CONV2D, (2, 12, 4, 4)), H200) is None
    assert cost.plan_conv(Work(cost.CONV2D, (2, 16, 4, 4), torch.float32), H200) is None
    assert cost.plan_norm(Work(cost.NORM, (2, 12, 4, 4), num_groups=5), H200) is None


def test_the_page_has_the_table():
    """``python -m benchmarks.roofline --write docs/kernels.md`` writes it."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    text = roofline.markdown(unet_sites(256, 32), "h200", 256)
    assert roofline.written(page, text) == page
