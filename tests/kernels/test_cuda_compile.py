"""Every CUDA kernel that the launches name compiles for every architecture without a GPU, without
spilling a register and with 16-byte accesses.

What is compiled is what the operators instantiate; ``RULES`` says what becomes of it. Run with
``-s`` for registers, shared memory and occupancy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"

LOAD, STORE, COPY = r"LDG\.E\.128", r"STG\.E\.128", r"LDGSTS\.E\.(BYPASS\.)?(\w+\.)*128"
# One site of the U-Net at 256x256: frames, channels, pixels, groups.
SITE = (32, 320, 1024, 32)

# What the shipped library instantiates, in its own words.
PROGRAM = """
#include "launch.h"
#include "shift_add.cuh"
#include "shift_add_group_norm_silu.cuh"
#include "shift_add_group_norm_silu_backward.cuh"
#include "shift_group_norm_silu_conv2d.cuh"
#include "temporal_shift.cuh"

namespace latent_shift::cuda {
template void temporal_shift(const CudaLauncher&, TemporalShiftArgs);
template void shift_add(const CudaLauncher&, const ShiftAddArgs&);
template void shift_add_group_norm_silu(const CudaLauncher&, const NormArgs&, const NormPlan&);
template void shift_add_group_norm_silu_backward(const CudaLauncher&, const NormBackwardArgs&,
                                                 const NormPlan&);
template void shift_group_norm_silu_conv2d(const CudaLauncher&, const ConvArgs&, const ConvPlan&);
}  // namespace latent_shift::cuda
"""


@dataclass(frozen=True)
class Machine:
    """What one multiprocessor holds, and what the compiler calls it."""

    code: str
    threads: int
    shared: int  # KiB
    shared_per_block: int  # KiB


MACHINES = {
    80: Machine("sm_80", 2048, 164, 163),
    86: Machine("sm_86", 1536, 100, 99),
    89: Machine("sm_89", 1536, 100, 99),
    90: Machine("sm_90a", 2048, 228, 227),
    100: Machine("sm_100", 2048, 228, 227),
    120: Machine("sm_120", 1536, 100, 99),
}


@dataclass(frozen=True)
class Rule:
    """What the kernels of a name must compile to."""

    pattern: str
    threads: int
    sass: tuple[str, ...] = ()  # instructions that must be there
    plan: str = ""  # the host module's function that knows shared memory and threads
    resident: int = 1  # blocks a multiprocessor that the planning counts on
    threads_per_sm: int = 0  # that the planning takes the registers to allow
    registers: int = 0  # that a launch must have, where warps hand them on (setmaxnreg)
    count: int = 1  # kernels that it is of
    arch: int = 0  # traps elsewhere


NORM = "shift_add_group_norm_silu"
CONV = "shift_group_norm_silu_conv2d"
VECTOR, SCALAR = r"\w+, (?!1, 1>)\d+, \d+", r"\w+, 1, 1"
HALF = "(__nv_bfloat16|__half)"
MOVE, WHOLE = (LOAD, STORE), (LOAD, STORE, COPY)


def mma(columns: int) -> Rule:
    resident = 1 if columns > 128 else 2
    sass = (STORE, COPY, "HMMA")
    name = f"{CONV}_mma_kernel<{HALF}, {columns}>"
    return Rule(name, 256, sass, "conv", resident=resident, count=2)


def wgmma(columns: int) -> Rule:
    product = rf"HGMMA\.64x{columns // (1 + columns // 320)}x16\.F32"
    registers = r"USETMAXREG\.DEALLOC", r"USETMAXREG\.TRY_ALLOC"
    sass = (LOAD, STORE, "UBLKCP", product, *registers)
    name = f"{CONV}_wgmma_kernel<{HALF}, {columns}>"
    return Rule(name, 384, sass, "conv", registers=168, count=2, arch=90)


RULES = [
    Rule(r"temporal_shift_kernel<(uint4, 1|\w+, (?!1,)\d+), \w+>", 256, MOVE, count=9),
    Rule(r"temporal_shift_kernel<(?!uint4)\w+, 1, \w+>", 256, count=8),
    Rule(r"shift_add_kernel<\w+, (?!1>)\d+>", 256, MOVE, count=4),
    Rule(r"shift_add_kernel<\w+, 1>", 256, count=4),
    Rule(f"{NORM}_kernel<{VECTOR}>", 512, WHOLE, "norm_forward", threads_per_sm=640, count=8),
    Rule(f"{NORM}_kernel<{SCALAR}>", 512, threads_per_sm=640, count=4),
    Rule(
        f"{NORM}_backward_kernel<{VECTOR}>",
        512,
        WHOLE,
        "norm_backward",
        threads_per_sm=512,
        count=8,
    ),
    Rule(f"{NORM}_backward_kernel<{SCALAR}>", 512, threads_per_sm=512, count=4),
    Rule(r"merge_moments_kernel<\w+>", 128, count=2),
    Rule(r"merge_group_sums_kernel<\w+>", 128, count=2),
    Rule(r"norm_parameters_kernel<\w+>", 256, count=2),
    Rule(f"conv_statistics_kernel<{HALF}>", 256, (LOAD,), count=2),
    Rule(f"conv_pack_kernel<{HALF}>", 256, (STORE,), count=2),
    Rule("conv_fold_kernel", 128),
    Rule("conv_sums_kernel", 128),
    *map(mma, (64, 128, 160)),
    *map(wgmma, (64, 80, 128, 160, 320)),
    Rule("architecture_probe", 1),
]


@cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, from CUDA_HOME, the path, or Triton's own."""
    folders = [os.environ.get("CUDA_HOME", ""), *map(str, Path("/usr/local").glob("cuda*"))]
    found = [shutil.which(name), *(shutil.which(name, path=f"{f}/bin") for f in folders if f)]
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        found.append(str(bundled) if bundled.exists() else None)
    except ImportError:
        pass
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def plans():
    """The host module, which plans launches; None where it cannot be built."""
    from tests.host import build

    return None if build.why_not() else build.load()


def planned(host, rule: Rule, name: str, arch: int) -> tuple[int, int]:
    """Threads and bytes of shared memory of a launch, the norm's at the site."""
    if not rule.plan or host is None:
        return rule.threads, 0
    if rule.plan == "conv":
        variant = (90 if "wgmma" in name else 80), int(re.search(r"(\d+)>", name)[1])
        shared = {v[:2]: v[2:] for v in host.conv_variants()}
        return shared[variant]
    frames, channels, pixels, groups = SITE
    dtype, by_channels = re.search(r"<(\w+), (\d+)", name).groups()
    host.configure(0, False, arch, MACHINES[arch].shared_per_block << 10, 132)
    plan = getattr(host, f"plan_{rule.plan}")(
        {
            "dtype": ("float", "__nv_bfloat16", "__half", "double").index(dtype),
            "channels_last": by_channels != "1", "frames": frames, "channels": channels,
            "pixels": pixels, "groups": groups, "aligned": True,
        }
    )  # fmt: skip
    return plan["threads"], plan["shared"]


def blocks_per_sm(machine: Machine, registers: int, threads: int, shared: int) -> int:
    warps = -(-threads // 32)
    per_warp = -(-registers // 8) * 8 * 32
    by_shared = (machine.shared << 10) // (shared + 1024)
    return min(65536 // per_warp // warps, machine.threads // (warps * 32), by_shared, 32)


def compile_all(arch: int, folder: Path) -> Path:
    """One cubin with all of them."""
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(PROGRAM)
    machine = MACHINES[arch].code
    code = f"arch={machine.replace('sm', 'compute')},code={machine}"
    command = [tool("nvcc"), "-std=c++17", "-O3", f"-gencode={code}", "-cubin", f"-I{SOURCES}"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, f"wgmma waits for itself: {done.stderr}"
    if arch == 90:  # elsewhere those who would use them trap
        assert "setmaxnreg" not in done.stderr, f"registers stay where they were: {done.stderr}"
    return cubin


def dump(cubin: Path, *options: str) -> dict[str, str]:
    """Kernel -> what is said of it."""
    command = [tool("cuobjdump"), *options, str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run([tool("c++filt")], input=text, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*Function\s*:?\s*", text, flags=re.MULTILINE)[1:]
    return {short(part.partition("\n")[0]): part for part in parts}


def short(name: str) -> str:
    """A demangled kernel as the source has it: (int)8 and unsigned short in some demanglers."""
    for found, meant in (
        (r"\((int|bool)\)", ""), (r"\(.*", ""), (r"unsigned short", "uint16_t"),
        (r"unsigned char", "uint8_t"), (r"unsigned int", "uint32_t"), (r"\s*,\s*", ", "),
        (r"^.*::(?=\w+(<|$))", ""),
    ):  # fmt: skip
        name = re.sub(found, meant, name)
    return name


@pytest.mark.skipif(tool("nvcc") is None, reason="nvcc was not found (set CUDA_HOME)")
@pytest.mark.skipif(tool("cuobjdump") is None, reason="cuobjdump was not found")
@pytest.mark.skipif(tool("c++filt") is None, reason="c++filt was not found (binutils)")
@pytest.mark.parametrize("arch", MACHINES)
def test_compiles(arch, plans, tmp_path):
    cubin = compile_all(arch, tmp_path)
    usage, sass = dump(cubin, "-res-usage"), dump(cubin, "-sass")
    assert usage.keys() == sass.keys()
    unknown = set(usage)
    for rule in RULES:
        names = sorted(name for name in usage if re.fullmatch(rule.pattern, name))
        assert len(names) == rule.count, (rule.pattern, names, sorted(usage))
        unknown -= set(names)
        if rule.arch in (0, arch):
            for name in names:
                check(rule, name, arch, usage[name], sass[name], plans)
    assert not unknown, "kernels that no rule is for"


def check(rule: Rule, name: str, arch: int, usage: str, code: str, plans) -> None:
    used = {what: int(count) for what, count in re.findall(r"(\w+):(\d+)", usage)}
    threads, shared = planned(plans, rule, name, arch)
    machine = MACHINES[arch]
    fits = shared <= machine.shared_per_block << 10
    blocks = blocks_per_sm(machine, used["REG"], threads, shared)
    print(
        f"{machine.code} {name}: {used['REG']} registers, {threads} threads, {shared} bytes "
        f"shared, {blocks} blocks a multiprocessor" + ("" if fits else " (not used there)")
    )
    assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills"
    assert blocks >= 1 or not fits, f"{name} does not fit"
    by_registers = blocks_per_sm(machine, used["REG"], threads, 0)
    assert by_registers >= rule.resident, f"{name}: fewer blocks than are planned with"
    per_thread = -(-used["REG"] // 8) * 8
    if "double" not in name:  # which is there for tests, and planned as the others are
        assert 65536 // per_thread >= rule.threads_per_sm, f"{name}: too many registers"
    assert rule.registers in (0, used["REG"]), f"{name} would wait for registers"
    assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
    for instruction in rule.sass:
        assert re.search(instruction, code), f"{name} has no {instruction}"
