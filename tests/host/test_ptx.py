"""Every wrapper of csrc/cuda/ptx.cuh becomes the instruction it is named after."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROBE = Path(__file__).with_name("ptx_probe.cu")
AMPERE = {
    "cp_async_16": r"LDGSTS\.E\.BYPASS\.128",
    "cp_async_commit": "LDGDEPBAR",
    "cp_async_wait": r"DEPBAR\.LE SB0, 0x1",
    "cp_async_arrive_noinc": r"ARRIVES\.LDGSTSBAR\.64",
    "exp2_approx": r"MUFU\.EX2",
    "rcp_approx": r"MUFU\.RCP",
    "named_barrier_sync": r"BAR\.SYNC\S* 0x1, 0x40",
    "named_barrier_arrive": r"BAR\.ARV 0x2, 0x40",
    "ldmatrix_x4": r"LDSM\.16\.M88\.4",
    "mma_m16n8k16 of __nv_bfloat16": r"HMMA\.16816\.F32\.BF16",
    "mma_m16n8k16 of __half": r"HMMA\.16816\.F32 ",
}
HOPPER = {
    "mbarrier_init": r"SYNCS\.EXCH\.64",
    "mbarrier_arrive": r"SYNCS\.ARRIVE\.TRANS64\.A1T0",
    "mbarrier_arrive_expect_tx": r"SYNCS\.ARRIVE\.TRANS64 ",
    "mbarrier_arrive_cluster": r"SYNCS\.ARRIVE\.TRANS64\.RED",
    "mbarrier_wait": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    "mbarrier_wait_cluster": r"CCTL\.IVALL",
    "fence_proxy_async": r"FENCE\.VIEW\.ASYNC",
    "bulk_copy_to_shared": r"UBLKCP\S* \[",
    "bulk_copy_to_shared_multicast": r"UBLKCP\S*\.MULTICAST",
    "elect_one": "ELECT",
    "cluster_arrive": "UCGABAR_ARV",
    "cluster_wait": "UCGABAR_WAIT",
    "wgmma_fence": r"WARPGROUP\.ARRIVE",
    "wgmma_wait": r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0",
    "set_max_registers_increase": r"USETMAXREG[^;]* 0xf0",
    "set_max_registers_decrease": r"USETMAXREG[^;]* 0x18",
    **{
        f"wgmma_m64k16 of {dtype}, {n}": rf"HGMMA\.64x{n}x16\.F32{suffix} "
        for dtype, n, suffix in [
            ("__nv_bfloat16", 16, r"\.BF16"),
            ("__nv_bfloat16", 64, r"\.BF16"),
            ("__half", 80, ""),
            ("__nv_bfloat16", 160, r"\.BF16"),
            ("__half", 256, ""),
        ]
    },
}


def nvdisasm() -> str | None:
    """CUDA's disassembler, or the one that comes with Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = pytest.importorskip("triton")
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(found) if found.exists() else None


def disassemble(arch: str, folder: Path, *defines: str) -> str:
    nvcc, tool = shutil.which("nvcc"), nvdisasm()
    if nvcc is None or tool is None:
        pytest.skip(f"{'nvcc' if nvcc is None else 'nvdisasm'} is not there to compile for a GPU")
    cubin = folder / f"{arch}.cubin"
    command = [nvcc, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    done = subprocess.run(
        [*command, *defines, "-o", str(cubin), str(PROBE)],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    return subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, defines, expected",
    [
        ("80", [], AMPERE),
        ("90a", ["-DLS_HOPPER"], {**AMPERE, **HOPPER}),
        ("120", [], AMPERE),
    ],
)
def test_wrappers_become_their_instructions(tmp_path, arch, defines, expected):
    code = disassemble(arch, tmp_path, *defines)
    missing = {name: want for name, want in expected.items() if not re.search(want, code)}
    assert not missing
    local = re.findall(r"\b(?:LDL|STL)\b", code)
    assert not local, "accumulators were spilled to local memory"
