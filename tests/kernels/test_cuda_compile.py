"""Every CUDA kernel compiles for every architecture without a GPU, without spilling a register and
with 16-byte accesses.

``KERNELS`` lists instantiations, and the architectures of those that are not compiled for all. Run
with ``-s`` for registers, shared memory and occupancy.
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
class Kernel:
    """An instantiation, and what it must compile to."""

    header: str
    name: str
    params: str
    threads: int
    sass: tuple[str, ...] = ()  # instructions that must be there
    plan: str = ""  # the host module's function that knows its shared memory and threads
    resident: int = 1  # blocks a multiprocessor that the planning counts on
    threads_per_sm: int = 0  # that the planning takes the registers to allow
    registers: int = 0  # that a launch must have, where warps hand them on (setmaxnreg)
    archs: tuple[int, ...] = tuple(MACHINES)

    @property
    def symbol(self) -> str:
        """The kernel's name as the demangled symbol begins."""
        return self.name.partition("<")[0]

    @property
    def declaration(self) -> str:
        if "<" not in self.name:
            return ""  # no template, there as soon as its header is
        return (
            f"template __global__ void latent_shift::cuda::{self.name}"
            f"(const __grid_constant__ latent_shift::cuda::{self.params});"
        )


def norm(header: str, prefix: str, params: str, types: tuple[str, ...], **options) -> list[Kernel]:
    return [
        Kernel(header, f"{prefix}_kernel<{t}>", params, 512, (LOAD, STORE, COPY), **options)
        for t in types
    ]


def only(*archs: int) -> dict[str, tuple[int, ...]]:
    return {"archs": archs}


FORWARD = ("shift_add_group_norm_silu.cuh", "shift_add_group_norm_silu", "NormParams")
BACKWARD = (
    "shift_add_group_norm_silu_backward.cuh",
    "shift_add_group_norm_silu_backward",
    "NormBackwardParams",
)
COMMON = ("__nv_bfloat16, 8, 1", "__nv_bfloat16, 1, 8")
# channels_last and NCHW of the other dtypes
OTHERS = ("__half, 1, 8", "float, 4, 1", "float, 1, 4", "double, 2, 1")
MOVE = (LOAD, STORE)
CONV = "shift_group_norm_silu_conv2d"


def conv(kernel: str, params: str, threads: int, *sass: str, **options) -> Kernel:
    return Kernel(f"{CONV}.cuh", kernel, params, threads, sass, **options)


KERNELS = [
    Kernel(
        "temporal_shift.cuh",
        "temporal_shift_kernel<uint16_t, 8, false>",
        "TemporalShiftParams",
        256,
        MOVE,
    ),
    Kernel(
        "temporal_shift.cuh",
        "temporal_shift_kernel<uint32_t, 4, false>",
        "TemporalShiftParams",
        256,
        MOVE,
    ),
    Kernel(
        "temporal_shift.cuh",
        "temporal_shift_kernel<__nv_bfloat16, 8, true>",
        "TemporalShiftParams",
        256,
        MOVE,
    ),
    Kernel("shift_add.cuh", "shift_add_kernel<__nv_bfloat16, 8>", "ShiftAddParams", 256, MOVE),
    Kernel("shift_add.cuh", "shift_add_kernel<float, 4>", "ShiftAddParams", 256, MOVE),
    *norm(*FORWARD, COMMON, plan="plan_norm_forward", threads_per_sm=640),
    *norm(*FORWARD, OTHERS, **only(90)),
    Kernel(FORWARD[0], "merge_moments_kernel<float>", "MergeParams", 128),
    *norm(*BACKWARD, COMMON, plan="plan_norm_backward", threads_per_sm=512),
    *norm(*BACKWARD, OTHERS, **only(90)),
    Kernel(BACKWARD[0], "merge_group_sums_kernel<float>", "NormBackwardParams", 128),
    Kernel(BACKWARD[0], "norm_parameters_kernel<float>", "NormParameterParams", 256),
    Kernel(FORWARD[0], f"{FORWARD[1]}_kernel<__nv_bfloat16, 1, 1>", FORWARD[2], 512, **only(90)),
    Kernel(BACKWARD[0], f"{BACKWARD[1]}_kernel<__nv_bfloat16, 1, 1>", BACKWARD[2], 512, **only(90)),
    conv("conv_statistics_kernel<__nv_bfloat16>", "StatisticsParams", 256, LOAD),
    conv("conv_pack_kernel<__nv_bfloat16>", "PackParams", 256, STORE),
    conv("conv_fold_kernel", "FoldParams", 128),
    conv("conv_sums_kernel", "SumsParams", 128),
    *(
        conv(
            f"{CONV}_mma_kernel<{dtype}, {columns}>",
            "ConvParams",
            256,
            STORE,
            COPY,
            "HMMA",
            resident=1 if columns > 128 else 2,
            **archs,
        )
        for dtype, columns, archs in (
            ("__nv_bfloat16", 128, {}),
            ("__nv_bfloat16", 64, only(80)),
            ("__nv_bfloat16", 160, only(80)),
            ("__half", 160, only(80)),
        )
    ),
    *(
        conv(
            f"{CONV}_wgmma_kernel<{dtype}, {columns}>",
            "ConvParams",
            384,
            *(LOAD, STORE, "UBLKCP", rf"HGMMA\.64x{columns // (1 + columns // 320)}x16\.F32"),
            *(r"USETMAXREG\.DEALLOC", r"USETMAXREG\.TRY_ALLOC"),
            registers=168,
            **only(90),
        )
        for dtype in ("__nv_bfloat16", "__half")
        for columns in (64, 80, 128, 160, 320)
    ),
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


def planned(host, kernel: Kernel, arch: int) -> tuple[int, int]:
    """Threads and bytes of shared memory of a launch at the site."""
    if not kernel.plan or host is None:
        return kernel.threads, 0
    frames, channels, pixels, groups = SITE
    host.configure(0, False, arch, MACHINES[arch].shared_per_block << 10, 132)
    plan = getattr(host, kernel.plan)(
        {"dtype": 1, "channels_last": True, "frames": frames, "channels": channels,
         "pixels": pixels, "groups": groups, "aligned": True}
    )  # fmt: skip
    return plan["threads"], plan["shared"]


def blocks_per_sm(machine: Machine, registers: int, threads: int, shared: int) -> int:
    warps = -(-threads // 32)
    per_warp = -(-registers // 8) * 8 * 32
    by_shared = (machine.shared << 10) // (shared + 1024)
    return min(65536 // per_warp // warps, machine.threads // (warps * 32), by_shared, 32)


def compile_all(arch: int, kernels: list[Kernel], folder: Path) -> Path:
    """One cubin with all of them."""
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    headers = dict.fromkeys(k.header for k in kernels)
    lines = [f'#include "{SOURCES / header}"' for header in headers]
    source.write_text("\n".join([*lines, *(k.declaration for k in kernels), ""]))
    machine = MACHINES[arch].code
    code = f"arch={machine.replace('sm', 'compute')},code={machine}"
    command = [tool("nvcc"), "-std=c++17", "-O3", f"-gencode={code}", "-cubin"]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, f"wgmma waits for itself: {done.stderr}"
    assert "setmaxnreg" not in done.stderr, f"registers stay where they were: {done.stderr}"
    return cubin


def dump(cubin: Path, *options: str) -> str:
    command = [tool("cuobjdump"), *options, str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return subprocess.run(
        [shutil.which("c++filt") or "cat"], input=text, capture_output=True, text=True
    ).stdout


def sections(text: str, marker: str) -> dict[str, str]:
    """Function -> what is said of it."""
    parts = re.split(rf"^\s*{marker}\s*:?\s*", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part for part in parts}


def of(kernel: Kernel, parts: dict[str, str]) -> str:
    """What is said of an instantiation: template arguments as the demangler writes them."""
    words = kernel.name.replace("uint16_t", "unsigned short").replace("uint32_t", "unsigned int")
    pattern = re.escape(words).replace(r"\ ", " ").replace(",", r"\s*,")
    # integers carry their type in some demanglers: (int)8
    pattern = re.sub(r"(?<=[ <])(\d+)", r"(\\(int\\))?\1", pattern)
    matches = [text for name, text in parts.items() if re.search(pattern, name)]
    assert len(matches) == 1, (kernel.name, list(parts))
    return matches[0]


@pytest.mark.skipif(tool("nvcc") is None, reason="nvcc was not found (set CUDA_HOME)")
@pytest.mark.skipif(tool("cuobjdump") is None, reason="cuobjdump was not found")
@pytest.mark.parametrize("arch", MACHINES)
def test_compiles(arch, plans, tmp_path):
    kernels = [kernel for kernel in KERNELS if arch in kernel.archs]
    cubin = compile_all(arch, kernels, tmp_path)
    usage = sections(dump(cubin, "-res-usage"), "Function")
    sass = sections(dump(cubin, "-sass"), "Function")
    for kernel in kernels:
        used = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", of(kernel, usage))}
        threads, shared = planned(plans, kernel, arch)
        blocks = blocks_per_sm(MACHINES[arch], used["REG"], threads, shared)
        print(
            f"{MACHINES[arch].code} {kernel.name}: {used['REG']} registers, {threads} threads, "
            f"{shared} bytes shared, {blocks} blocks a multiprocessor"
        )
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel.name} spills"
        assert blocks >= 1, f"{kernel.name} does not fit"
        by_registers = blocks_per_sm(MACHINES[arch], used["REG"], threads, 0)
        assert by_registers >= kernel.resident, f"{kernel.name}: fewer blocks than are planned with"
        per_thread = -(-used["REG"] // 8) * 8
        assert 65536 // per_thread >= kernel.threads_per_sm, f"{kernel.name}: too many registers"
        assert kernel.registers in (0, used["REG"]), f"{kernel.name} would wait for registers"
        code = of(kernel, sass)
        assert not re.search(r"\b(LDL|STL)\b", code), f"{kernel.name} uses local memory"
        for instruction in kernel.sass:
            assert re.search(instruction, code), f"{kernel.name} has no {instruction}"
