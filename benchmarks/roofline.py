"""What the CUDA kernels move and compute at every site of the U-Net, and the least time that takes.

    python -m benchmarks.roofline --device h200 --resolution 256 --frames 32
    python -m benchmarks.roofline --write docs/kernels.md     # the table in the documentation

Bytes and operations are those of latent_shift_kernels.cost, which has them from the launches that
the kernels' own planning chooses for the device. Three floors: bytes over bandwidth, exponentials
and reciprocals (two a sigmoid) over the rate of the special-function units, and the convolution's
products over the dense rate of the tensor cores. Nothing here is a measurement of a kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.sites import NUM_GROUPS, Site, unet_sites
from latent_shift_kernels import cost
from latent_shift_kernels.cost import DEVICES, Cost, Device, Work

OPERATORS = (
    ("temporal_shift", False),
    ("shift_add", False),
    (cost.NORM, False),
    (cost.NORM, True),
    (f"{cost.NORM}_backward", False),
    (cost.CONV2D, False),
    (cost.CONV2D, True),
)
"""Operators, and whether a residual is added in them."""
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


@dataclass(frozen=True)
class Row:
    """One operator at one site, and the way that serves it."""

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
    tensor_us: float  # of the convolution's products


def work_of(site: Site, operator: str, residual: bool) -> Work:
    """The call of an operator at a site, in bf16 and channels_last."""
    work = Work(operator, site.shape, num_groups=NUM_GROUPS, residual=residual)
    if operator == cost.CONV2D:
        return replace(work, out_channels=site.out_channels)
    return work


def rows_of(site: Site, device: Device) -> Iterator[Row]:
    """Every operator at a site; the convolution both ways."""
    for operator, residual in OPERATORS:
        work = work_of(site, operator, residual)
        name = f"{operator}, residual" if residual else operator
        found = cost.cuda(work, device)
        if found is not None:
            yield row_of(site, name, found, device)
        if operator == cost.CONV2D:
            yield row_of(site, name, cost.composed(work, device), device)


def row_of(site: Site, operator: str, found: Cost, device: Device) -> Row:
    tensor = found.flops if operator.startswith(cost.CONV2D) else 0
    return Row(
        site.name, operator, found.variant, found.blocks, found.threads, found.shared,
        found.launches, found.bytes, found.flops,
        round(found.bytes / device.bandwidth * 1e6, 2),
        round(found.special / device.special_rate * 1e6, 2),
        round(tensor / device.tensor_rate * 1e6, 2),
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """For a terminal."""
    lines = [
        f"{'site':26} {'operator':38} {'variant':30} "
        + " ".join(f"{name:>8}" for name in ("blocks", "threads", "shared", "MB", "floor us"))
        + f" {'SFU us':>8} {'MMA us':>8}"
    ]
    lines += [
        f"{row.site:26} {row.operator:38} {row.variant:30} {row.blocks:8} {row.threads:8} "
        f"{row.shared:8} {row.bytes / 1e6:8.1f} {row.floor_us:8.2f} {row.special_us:8.2f} "
        f"{row.tensor_us:8.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def markdown(sites: list[Site], name: str, resolution: int) -> str:
    """For the documentation: a line a site, the operators side by side."""
    device = DEVICES[name]
    lines = [
        f"{name.upper()}, {sites[0].frames} frames of {resolution}x{resolution} pixels, bf16, "
        "channels_last. MB moved / floor in microseconds; the convolution's floor is its products' "
        "on the tensor cores.",
        "",
        "| site, norms | shift | shift_add | norm | how | backward | how | conv | one kernel | "
        "its tile | composed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for site in sites:
        at = {row.operator: row for row in rows_of(site, device)}
        works = work_of(site, cost.CONV2D, False)
        fused, parts = cost.cuda(works, device), cost.composed(works, device)
        norm, backward = at[cost.NORM], at[f"{cost.NORM}_backward"]

        def moved(row: Row) -> str:
            return f"{row.bytes / 1e6:.1f} / {row.floor_us:.1f}"

        conv = f"{fused.bytes / 1e6:.1f}" if fused else "-"
        tile = fused.variant.replace(" channels a block", "") if fused else "-"
        lines.append(
            f"| {site.name}, {site.count} | {moved(at['temporal_shift'])} | "
            f"{moved(at['shift_add'])} | {moved(norm)} | {norm.variant} | {moved(backward)} | "
            f"{backward.variant} | {parts.flops / device.tensor_rate * 1e6:.1f} | {conv} | {tile} "
            f"| {parts.bytes / 1e6:.1f} |"
        )
    return "\n".join(lines)


def written(page: str, text: str) -> str:
    """``page`` with ``text`` in place of what stands between the marks.

    Raises:
        ValueError: If the marks are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines {BEGIN} and {END} in the page")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--bandwidth", type=float, help="bytes a second, instead of the table's")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--write", type=Path, help="a page to write the table into")
    given = parser.parse_args()
    device = DEVICES[given.device]
    if given.bandwidth:
        device = replace(device, bandwidth=given.bandwidth, source="given")
    sites = unet_sites(given.resolution, given.frames)
    rows = [row for site in sites for row in rows_of(site, device)]
    if not any(row.operator == cost.NORM for row in rows):
        parser.error("the plans are the CPU library's, which is not built: pip install .")
    if given.write:
        page = given.write.read_text()
        given.write.write_text(written(page, markdown(sites, given.device, given.resolution)))
    else:
        print(table(rows))
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
