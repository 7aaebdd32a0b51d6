"""What the planning of the norm kernels chooses, and the cost model on top of it."""

from __future__ import annotations

import pytest

from benchmarks.roofline import DEVICES, Model
from benchmarks.sites import unet_sites

BYTES = 2  # of bfloat16


@pytest.fixture
def h200(host):
    return Model(DEVICES["h200"], host)


def test_sites_without_a_skip_take_one_block_a_slab(h200):
    """And there is a block for nearly every multiprocessor, in rows of whole sectors."""
    for site in unet_sites(256, 32):
        plan = h200.plan("forward", site)
        assert plan["tile_c"] * 16 % 32 == 0, (site, plan)
        if site.block.startswith("down"):
            assert plan["variant"] == "one launch" and plan["blocks"] >= 128, (site, plan)


@pytest.mark.parametrize("frames", [16, 32, 64])
def test_hopper_reads_once(h200, frames):
    for site in unet_sites(256, frames) + unet_sites(512, frames):
        assert h200.plan("forward", site)["variant"] != "split", site
    for site in unet_sites(256, frames):
        assert h200.plan("backward", site)["variant"] != "split", site


def test_bytes_are_the_least_there_are(h200):
    for site in unet_sites(256, 32):
        elements = site.frames * site.channels * site.side**2
        rows = {row.operator: row for row in h200.rows(site)}
        forward = rows["shift_add_group_norm_silu"]
        assert forward.launches == 1 and forward.bytes <= 1.01 * 2 * elements * BYTES
        backward = rows["shift_add_group_norm_silu_backward"]
        assert backward.launches == 2 and backward.bytes <= 1.6 * 3 * elements * BYTES
