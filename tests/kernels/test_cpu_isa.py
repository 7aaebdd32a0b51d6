"""The CPU kernels' vector helpers at every register width, and the library's instruction sets."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_shift_kernels import backends, reference

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cpu"
COMPILER = os.environ.get("CXX") or shutil.which("c++")
LIBRARY = backends.library_path("_C")

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
needs_library = pytest.mark.skipif(LIBRARY is None, reason="the CPU library is not built")


def runs_avx2() -> bool:
    try:
        return "avx2" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class Helpers:
    """``tests/kernels/cpu_isa.cpp`` at one register width, on numpy arrays."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.sum_first_bf16.restype = self.library.sum_first_float.restype = ctypes.c_float
        self.library.lanes_float.restype = ctypes.c_int64

    def __call__(self, name: str, x: np.ndarray, dtype: type) -> np.ndarray:
        # a sentinel behind the output catches a store past the last element
        y = np.full(x.size + 64, 77, dtype=dtype)
        pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (x, y))
        getattr(self.library, name)(*pointers, ctypes.c_int64(x.size))
        assert (y[x.size :] == 77).all()
        return y[: x.size]


@pytest.fixture(scope="module", params=[16, 32, 64])
def helpers(request, tmp_path_factory) -> Helpers:
    if not COMPILER:
        pytest.skip("no C++ compiler")
    if request.param == 32 and not runs_avx2():
        pytest.skip("no AVX2")
    path = tmp_path_factory.mktemp("isa") / f"isa{request.param}.so"
    command = [COMPILER, "-O2", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi"]
    command += ["-ffp-contract=fast", f"-DLS_BYTES={request.param}"]
    subprocess.run([*command, str(Path(__file__).with_name("cpu_isa.cpp")), "-o", path], check=True)
    return Helpers(path)


def ulps(got: np.ndarray, truth: np.ndarray) -> float:
    """The largest error in units of the last place of ``got``'s type."""
    spacing = np.spacing(np.abs(truth).astype(got.dtype)).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - truth) / spacing))


def test_exp2_is_within_an_ulp(helpers):
    t = np.linspace(-124.9, 127.9, 1_000_003, dtype=np.float32)
    assert ulps(helpers("exp2_float", t, np.float32), np.exp2(t.astype(np.float64))) <= 1.5
    short = helpers("exp2_short", t, np.float32).astype(np.float64)
    assert np.max(np.abs(short / np.exp2(t.astype(np.float64)) - 1)) <= 3.5e-6
    t64 = np.linspace(-1000, 1020, 100_003)
    truth = np.exp2(t64.astype(np.longdouble)).astype(np.float64)
    assert ulps(helpers("exp2_double", t64, np.float64), truth) <= 2.5


def test_exp2_overflows_to_infinity_and_keeps_nan(helpers):
    t = np.array([127.99, 128.5, 1e4, 3e38, np.inf, np.nan, -np.inf, -1e4], np.float32)
    y = helpers("exp2_plus_one_float", t, np.float32)
    assert np.isfinite(y[0]) and np.isinf(y[1:5]).all() and np.isnan(y[5])
    assert (y[6:] == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silu_is_torchs(helpers, dtype):
    z = np.concatenate([np.linspace(-80, 80, 400_001), np.geomspace(1e-30, 1e30, 1001)])
    z = np.concatenate([z, -z]).astype(dtype)
    name = "silu_float" if dtype is np.float32 else "silu_double"
    got = torch.from_numpy(helpers(name, z, dtype))
    truth = F.silu(torch.from_numpy(z).double())
    error = (got.double() - truth).abs()
    # the exponential of z carries z's own rounding, |z| / 2 ulp of the result
    eps = torch.finfo(got.dtype).eps
    bound = truth.abs() * eps * (3 + torch.from_numpy(z).double().abs().clamp(max=1000))
    tiny = torch.finfo(got.dtype).tiny * 1000
    assert (error <= bound + tiny).all()


def test_silu_of_special_values_is_torchs(helpers):
    z = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, -1e4, 1e4, -2e38], np.float32)
    got = torch.from_numpy(helpers("silu_float", z, np.float32))
    torch.testing.assert_close(got, F.silu(torch.from_numpy(z)), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_16_bit_conversions_are_torchs(helpers, name, dtype):
    bits = np.arange(65536, dtype=np.uint16)
    widened = torch.from_numpy(helpers(f"widen_{name}", bits, np.float32))
    truth = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
    torch.testing.assert_close(widened, truth, rtol=0, atol=0, equal_nan=True)

    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 200_001, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        values = widened.numpy().astype(np.float64)
        ties = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    x = np.concatenate([x, ties, np.float32([np.inf, -np.inf, 65519, 65520])])
    narrowed = helpers(f"narrow_{name}", x, np.uint16).view(np.int16)
    got, truth = torch.from_numpy(narrowed).view(dtype), torch.from_numpy(x).to(dtype)
    torch.testing.assert_close(got, truth, rtol=0, atol=0, equal_nan=True)


def test_first_lanes_are_elements(helpers):
    lanes = helpers.library.lanes_float()
    x = np.arange(1, lanes + 1, dtype=np.float32)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    for count in range(1, lanes + 1):
        expected = count * (count + 1) / 2
        for name, source in (("sum_first_float", x), ("sum_first_bf16", bits)):
            pointer = source.ctypes.data_as(ctypes.c_void_p)
            assert getattr(helpers.library, name)(pointer, ctypes.c_int64(count)) == expected


# What a subprocess runs with another library or instruction set.
CHECK = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
os.environ["LATENT_SHIFT_BACKEND"] = "reference"
from latent_shift_kernels import reference
import ctypes
torch.ops.load_library(sys.argv[1])
isa = ctypes.CDLL(sys.argv[1]).latent_shift_cpu_isa
isa.restype = ctypes.c_char_p
torch.manual_seed(0)
op = torch.ops.latent_shift
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for layout in (torch.contiguous_format, torch.channels_last):
        for channels, side, groups in ((37, 3, 1), (96, 9, 8), (160, 5, 32)):
            for after in (False, True):
                x = torch.randn(6, channels, side, side).to(dtype).contiguous(memory_format=layout)
                weight, bias = torch.randn(channels), torch.randn(channels)
                temb = torch.randn(2, channels)
                fold = channels // 3
                shift = (None, 3, [fold, channels - 2 * fold, fold], [-1, 0, 1], after, "zeros")
                args = (x, x.flip(0), temb, weight, bias, None, None, groups, 1e-5, *shift)
                got = op.shift_add_group_norm_silu(*args)
                want = reference.shift_add_group_norm_silu(*args)
                back = (x, x, want[1], True, temb, weight, bias, None, None, *want[2:], groups)
                got += op.shift_add_group_norm_silu_backward(*back, *shift)
                want += reference.shift_add_group_norm_silu_backward(*back, *shift)
                plain = (x, None, 3, shift[2], shift[3], "replicate")
                for name in ("temporal_shift", "temporal_shift_backward"):
                    got += (getattr(op, name)(*plain),)
                    want += (getattr(reference, name)(*plain),)
                for g, w in zip(got, want, strict=True):
                    assert g.shape == w.shape
                    largest = max(1, w.abs().max().item()) if w.numel() else 1
                    error = (g.double() - w.double()).abs()
                    assert error.le(64 * torch.finfo(g.dtype).eps * largest).all(), (dtype, layout)
print(isa().decode())
"""


def run_check(library: Path, isa: str) -> str:
    environment = {**os.environ, "LATENT_SHIFT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECK, str(library), str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_library
@pytest.mark.slow
def test_the_baseline_serves_when_asked():
    assert run_check(LIBRARY, "baseline") == "baseline"


@needs_library
def test_an_unknown_instruction_set_is_ignored_with_a_message():
    code = "import sys, ctypes; ctypes.CDLL(sys.argv[1]).latent_shift_cpu_isa()"
    environment = {**os.environ, "LATENT_SHIFT_CPU_ISA": "mmx"}
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {code}", str(LIBRARY)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "LATENT_SHIFT_CPU_ISA=mmx" in done.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not runs_avx2(), reason="no AVX2 to lower 64-byte vectors to")
def test_the_64_byte_source_computes_the_same_on_avx2(tmp_path):
    torch_root = Path(torch.__file__).parent
    library = tmp_path / "emulated.so"
    command = [
        COMPILER,
        "-O1",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-Wno-psabi",
        "-ffp-contract=fast",
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DLATENT_SHIFT_EMULATE_AVX512"]
    command += [f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}", "-o", str(library)]
    objects = []
    pending = []
    for source in sorted(SOURCES.glob("*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        single = [flag for flag in command if flag != "-shared"]
        single[single.index(str(library))] = objects[-1]
        pending.append(subprocess.Popen([*single, "-c", str(source)]))
        if len(pending) == 2:
            assert all(process.wait() == 0 for process in pending)
            pending = []
    assert all(process.wait() == 0 for process in pending)
    subprocess.run([*command, *objects, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    assert run_check(library, "avx512") == "avx512"


@needs_library
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_wide_registers_appear_only_in_their_own_functions():
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    widths: dict[str, set[str]] = {}
    name = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.split("<", 1)[1][:-2]
        elif register := re.search(r"%([xyz]mm)", line):
            widths.setdefault(name, set()).add(register.group(1))
    if not any("avx512::" in function for function in widths):
        pytest.skip("not an x86-64 library, or stripped")
    for function, registers in widths.items():
        if "avx512::" in function:
            continue
        assert "zmm" not in registers, function
        assert "avx2::" in function or "ymm" not in registers, function
    kernels = [registers for function, registers in widths.items() if "avx512::" in function]
    assert any("zmm" in registers for registers in kernels)


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_threads_change_no_bit(layout):
    x = torch.randn(6, 96, 16, 16).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    weight, temb = torch.randn(96), torch.randn(2, 96)
    shift = (None, 3, [32, 32, 32], [-1, 0, 1], False, "zeros")
    op = torch.ops.latent_shift

    def run() -> tuple:
        y = op.shift_add_group_norm_silu(x, None, temb, weight, None, None, None, 32, 1e-5, *shift)
        back = (dy, None, x, False, temb, weight, None, None, None, y[2], y[3], 32, *shift)
        return (*y, *op.shift_add_group_norm_silu_backward(*back))

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
def test_a_mean_far_from_zero_costs_no_more_than_in_torch():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(2, 64, 16, 16) + 1000).contiguous(memory_format=layout)
        shift = (None, 2, [64, 0, 0], [0, 0, 0], False, "zeros")
        args = (None, None, None, None, None, None, 8, 1e-5, *shift)
        y = torch.ops.latent_shift.shift_add_group_norm_silu(x, *args)[0]
        truth = reference.shift_add_group_norm_silu(x.double(), *args)[0]
        eager = F.silu(F.group_norm(x, 8))
        assert (y - truth).abs().max() <= 2 * (eager - truth).abs().max()


@needs_library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_statistics_survive_an_unlucky_sample(layout, offset):
    # a map that is nothing like its mean in the places a kernel might look at first
    x = torch.randn(2, 64, 16, 16)
    x[:, :, ::2] += 5000
    x[:, :, 8, :] = -20000
    x[1, :, :, :] = torch.randn(64, 16, 16) * 1e-3
    x[1, :, 8, :2] = 7
    x = (x + offset).contiguous(memory_format=layout)
    args = (None, None, None, None, None, None, 8, 1e-5)
    args += (None, 2, [64, 0, 0], [0, 0, 0], False, "zeros")
    got = torch.ops.latent_shift.shift_add_group_norm_silu(x, *args)
    truth = reference.shift_add_group_norm_silu(x.double(), *args)
    eager = F.silu(F.group_norm(x, 8))
    assert (got[0] - truth[0]).abs().max() <= 2 * (eager - truth[0]).abs().max()
    assert (got[3] / truth[3] - 1).abs().max() <= 2e-6 + 1e-7 * offset
