"""What the CUDA kernels move and compute at every norm of the U-Net, and the least time that takes.

    python -m benchmarks.roofline --device h200 --resolution 256 --frames 32

Bytes and operations follow from the launch parameters that the kernels' own planning chooses for
the device (csrc/cuda/norm_plan.h, through the host module of the tests, which needs g++ and
pybind11). Two floors: bytes over bandwidth, and exponentials and reciprocals (two a sigmoid) over
the rate of the special-function units. Traffic counts every access of memory as one of DRAM; of a
second read L2 may serve part.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.sites import NUM_GROUPS, Site, unet_sites

BFLOAT16 = 1
ITEM = 2  # bytes
SUM = 4  # bytes of a sum or a statistic
SPECIAL_PER_CLOCK = 16  # exponentials and reciprocals, per multiprocessor


@dataclass(frozen=True)
class Device:
    """What the floors are taken from; ``bandwidth`` is bytes a second."""

    arch: int
    num_sms: int
    shared_per_block: int  # KiB
    bandwidth: float
    clock: float  # Hz
    source: str

    @property
    def special_rate(self) -> float:
        return SPECIAL_PER_CLOCK * self.num_sms * self.clock


DEVICES = {
    "h200": Device(90, 132, 227, 4.3e12, 1.755e9, "copy bandwidth as measured"),
    "h100": Device(90, 132, 227, 3.35e12, 1.755e9, "data sheet, SXM"),
    "a100": Device(80, 108, 163, 2.04e12, 1.41e9, "data sheet, 80 GB SXM"),
    "b200": Device(100, 148, 227, 8.0e12, 1.85e9, "data sheet"),
    "l40s": Device(89, 142, 99, 0.864e12, 2.52e9, "data sheet"),
}


@dataclass(frozen=True)
class Row:
    """One operator at one site."""

    site: str
    operator: str
    variant: str
    blocks: int
    threads: int
    shared: int  # bytes a block
    launches: int
    bytes: int
    flops: int
    floor_us: float  # of the bytes
    special_us: float  # of exponentials and reciprocals


class Model:
    """The kernels' planning under one device's limits."""

    def __init__(self, device: Device, host: ModuleType) -> None:
        self.device = device
        self.host = host
        shared = device.shared_per_block << 10
        host.configure(0, False, device.arch, shared, device.num_sms)

    def plan(self, which: str, site: Site) -> dict[str, Any]:
        return getattr(self.host, f"plan_norm_{which}")(
            {
                "dtype": BFLOAT16,
                "channels_last": True,
                "frames": site.frames,
                "channels": site.channels,
                "pixels": site.side**2,
                "groups": NUM_GROUPS,
                "aligned": True,
            }
        )

    def rows(self, site: Site) -> list[Row]:
        elements = site.frames * site.channels * site.side**2
        moved = [
            ("temporal_shift", 2, 0),
            ("shift_add", 3, 2),
        ]
        rows = []
        for operator, tensors, flops in moved:
            frame = site.channels * site.side**2
            blocks = site.frames * -(-frame // (256 * 4 * 8))
            rows.append(
                self.row(site, operator, "one launch", (blocks, 256, 0), 1,
                         tensors * elements * ITEM, flops * elements, 0)
            )  # fmt: skip
        plan = self.plan("forward", site)
        launch = (plan["blocks"], plan["threads"], plan["shared"])
        split = plan["variant"] == "split"
        statistics = 2 * site.frames * NUM_GROUPS * SUM
        for operator, tensors in (
            ("shift_add_group_norm_silu", 3 if split else 2),
            ("shift_add_group_norm_silu, residual", 5 if split else 4),
        ):
            traffic = tensors * elements * ITEM + statistics
            if split:
                traffic += 2 * plan["workspace"] * SUM + 2 * statistics
            rows.append(
                self.row(site, operator, plan["variant"], launch, 3 if split else 1, traffic,
                         14 * elements, 2 * elements)
            )  # fmt: skip
        plan = self.plan("backward", site)
        launch = (plan["blocks"], plan["threads"], plan["shared"])
        split = plan["variant"] == "split"
        # dz and dz * xhat per frame, tile and channel, written and read by the last launch
        sums = 2 * 2 * site.frames * plan["tiles"] * site.channels * SUM
        traffic = (5 if split else 3) * elements * ITEM + sums + statistics
        rows.append(
            self.row(site, "shift_add_group_norm_silu_backward", plan["variant"], launch,
                     4 if split else 2, traffic, 34 * elements, 4 * elements)
        )  # fmt: skip
        return rows

    def row(
        self,
        site: Site,
        operator: str,
        variant: str,
        launch: tuple[int, int, int],
        launches: int,
        traffic: int,
        flops: int,
        special: int,
    ) -> Row:
        blocks, threads, shared = launch
        floor = traffic / self.device.bandwidth * 1e6
        return Row(
            site.name, operator, variant, blocks, threads, shared, launches, traffic, flops,
            round(floor, 2), round(special / self.device.special_rate * 1e6, 2),
        )  # fmt: skip


def load_host() -> ModuleType:
    from tests.host import build

    reason = build.why_not()
    if reason:
        raise SystemExit(f"benchmarks.roofline needs the host module: {reason}")
    return build.load()


def print_table(rows: list[Row]) -> None:
    names = (
        "site",
        "operator",
        "variant",
        "blocks",
        "threads",
        "shared",
        "MB",
        "floor us",
        "SFU us",
    )
    print(f"{names[0]:26} {names[1]:36} {names[2]:10} " + " ".join(f"{n:>8}" for n in names[3:]))
    for row in rows:
        print(
            f"{row.site:26} {row.operator:36} {row.variant:10} {row.blocks:8} {row.threads:8} "
            f"{row.shared:8} {row.bytes / 1e6:8.1f} {row.floor_us:8.2f} {row.special_us:8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--bandwidth", type=float, help="bytes a second, instead of the table's")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    device = DEVICES[given.device]
    if given.bandwidth:
        device = Device(**{**asdict(device), "bandwidth": given.bandwidth, "source": "given"})
    model = Model(device, load_host())
    rows = [row for site in unet_sites(given.resolution, given.frames) for row in model.rows(site)]
    print_table(rows)
    if given.json:
        record = {
            "device": {"name": given.device, **asdict(device)},
            "resolution": given.resolution,
            "frames": given.frames,
            "rows": [asdict(row) for row in rows],
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
