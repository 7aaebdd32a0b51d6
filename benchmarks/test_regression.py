"""The benchmark's calls under pytest-benchmark, to compare commits on one machine.

pytest benchmarks --benchmark-autosave
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:15%
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_shift

CASES = bench_shift.plan(bench_shift.parser().parse_args(["--layout", "channels_last"])).cases


@pytest.mark.parametrize("provider", ["clone", "latent-shift"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(benchmark, case, provider):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = bench_shift.ShiftSpec.latent_shift(case.site.channels)
    if provider == "clone":
        call = bench_shift.prepare(
            bench_shift.replace(case, direction="forward"), bench_shift.clone, device
        )
    else:
        call = bench_shift.prepare(case, bench_shift.fused(case.op, spec), device)

    def run():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.pedantic(run, rounds=15, warmup_rounds=3)
