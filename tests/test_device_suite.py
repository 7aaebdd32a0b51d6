"""The course of benchmarks/device_suite.sh, with stand-ins for Python and the CUDA tools."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/bash
case "$*" in
  *get_device_name*) echo "NVIDIA Stand-in 1" ;;
  *get_device_capability*) echo 9.0 ;;
  *serving*) [[ -e $STATE/library ]] ;;
  *setup.py*) echo "arch $TORCH_CUDA_ARCH_LIST" >>"$STATE/calls"
    [[ -e $STATE/nvcc ]] && touch "$STATE/library" ;;
  *"import apex"*) false ;;
  *) echo "$*" >>"$STATE/calls"; [[ "$*" != *"$(cat "$STATE/broken")"* ]] ;;
esac
"""
SANITIZER = """#!/bin/bash
[[ $2 == "$(cat "$STATE/finds")" ]] && echo "at void latent_shift::cuda::kernel<float>+0x10"
exit 0
"""


@pytest.fixture
def suite(tmp_path):
    """Runs the suite; returns its exit status, what it said, and the calls it made."""
    bin_, state, out = tmp_path / "bin", tmp_path / "state", tmp_path / "out"
    bin_.mkdir()
    state.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER), ("ncu", SANITIZER)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)

    def run(*parts: str, nvcc: bool = True, broken: str = "nothing", finds: str = "nothing"):
        (state / "calls").write_text("")
        (state / "broken").write_text(broken)
        (state / "finds").write_text(finds)
        (state / "nvcc").unlink(missing_ok=True)
        if nvcc:
            (state / "nvcc").touch()
        path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
        told = {"PATH": path, "PYTHON": "python", "STATE": str(state), "SUITE_OUT": str(out)}
        done = subprocess.run(
            [ROOT / "benchmarks" / "device_suite.sh", *parts],
            env={**os.environ, **told}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, (state / "calls").read_text()

    run.out, run.state = out, state
    return run


def passed(suite) -> set[str]:
    return {path.stem for path in suite.out.glob("*.passed")}


def test_every_part_runs_once(suite):
    status, said, calls = suite()
    assert status == 0, said
    parts = {"build", "aims", "matrix", "memcheck", "initcheck", "profile", "bench512", "compiled"}
    assert parts < passed(suite) and len(passed(suite)) == 16
    assert "arch 9.0" in calls and "not triton" in calls and "--frames 16 32 64" in calls
    status, said, calls = suite()
    assert status == 0 and "== build" in said and "== matrix" not in said


def test_nothing_is_measured_on_other_kernels(suite):
    """A build that failed, or a library that is not there any more, is no reason to test Triton."""
    status, said, calls = suite(nvcc=False)
    assert status == 1 and "build failed" in said and not passed(suite)
    assert "pytest" not in calls and "bench_shift" not in calls
    status, said, calls = suite("matrix", nvcc=False)
    assert status == 1 and "CUDA C++ does not serve" in said and "pytest" not in calls


def test_what_a_tool_finds_fails_its_part(suite):
    status, said, _ = suite("build", "memcheck", "racecheck", finds="racecheck")
    assert status == 1 and "racecheck failed" in said
    assert passed(suite) == {"build", "memcheck"}
    assert suite("racecheck")[0] == 0 and "racecheck" in passed(suite)


def test_a_part_that_fails_is_tried_again(suite):
    status, said, _ = suite("build", "matrix", "conv", broken="test_device.py")
    assert status == 1 and passed(suite) == {"build", "conv"}
    (suite.out / "sources").write_text("of yesterday\n")
    assert suite("build")[0] == 0 and passed(suite) == {"build"}


def test_an_unknown_part_is_named(suite):
    status, said, _ = suite("benchmark")
    assert status == 2 and "unknown part benchmark, choose from build aims" in said
