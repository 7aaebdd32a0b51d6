"""Every way setup.py can end: native, asked to skip, no torch, broken compiler, forced."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
COMPILER = os.environ.get("CXX") or shutil.which("c++")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the sources without anything built."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns(
        "*.so", "_build.json", "__pycache__", "assets", "*.cu", "*.cuh"
    )
    for name in ("csrc", "latent_shift_kernels", "latent_shift"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    return copy


def build(project: Path, **variables: str) -> subprocess.CompletedProcess:
    """``setup.py bdist_wheel``; it is what pip runs, without pip's start-up time."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LATENT_SHIFT_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=project,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


def wheel_of(project: Path) -> tuple[str, list[str], dict]:
    """The wheel's name, its files and the build record in it."""
    (wheel,) = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("latent_shift_kernels/_build.json"))
        return wheel.name, archive.namelist(), record["missing"]


def assert_pure(project: Path, reason: str) -> None:
    name, files, missing = wheel_of(project)
    assert name.endswith("-py3-none-any.whl")
    assert not any(file.endswith(".so") for file in files)
    assert "latent_shift_kernels/ops.py" in files
    assert reason in missing["_C"]


def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch cannot be imported, as in pip's isolated builds."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    return {"PYTHONPATH": str(hidden)}


def test_no_torch_gives_a_pure_wheel_and_says_how_to_get_the_rest(project, tmp_path):
    done = build(project, **without_torch(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "latent_shift_kernels._C was not built" in done.stderr
    assert "--no-build-isolation" in done.stderr
    assert_pure(project, "No module named 'torch'")


def test_no_torch_is_fatal_where_the_build_is_forced(project, tmp_path):
    done = build(project, LATENT_SHIFT_FORCE_BUILD="1", **without_torch(tmp_path))
    assert done.returncode != 0
    assert "LATENT_SHIFT_FORCE_BUILD" in done.stderr


def test_skipping_is_silent(project):
    done = build(project, LATENT_SHIFT_SKIP_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert "was not built" not in done.stderr
    assert_pure(project, "LATENT_SHIFT_SKIP_BUILD=1")


@pytest.mark.slow
def test_a_broken_compiler_gives_a_pure_wheel_or_a_failure_where_forced(project):
    done = build(project, CXX="false", CC="false")
    assert done.returncode == 0, done.stderr
    assert "latent_shift_kernels._C was not built" in done.stderr
    name, _, _ = wheel_of(project)
    assert_pure(project, "")
    shutil.rmtree(project / "dist")
    forced = build(project, CXX="false", CC="false", LATENT_SHIFT_FORCE_BUILD="1")
    assert forced.returncode != 0 and not list((project / "dist").glob("*.whl"))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_the_native_wheel_serves_every_python_and_uses_stable_symbols_only(project, tmp_path):
    # unoptimised: what is in the wheel is tested here, not how fast it is
    quick = tmp_path / "quick-cxx"
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    quick.chmod(0o755)
    done = build(project, CXX=str(quick), CC=str(quick), LATENT_SHIFT_FORCE_BUILD="1")
    assert done.returncode == 0, done.stderr
    name, files, missing = wheel_of(project)
    assert re.search(r"-cp310-abi3-\w+\.whl$", name), name
    assert missing == {}
    libraries = [file for file in files if file.startswith("latent_shift_kernels/_C.")]
    assert libraries == ["latent_shift_kernels/_C.abi3.so"]
    if not shutil.which("nm"):
        return
    (library,) = (project / "build").glob("lib*/latent_shift_kernels/_C.abi3.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    unstable = re.findall(r"\b_ZNK?(?:2at|3c10|5torch)\w*", symbols)
    assert not unstable
    assert "torch_library_impl" in symbols


def imported(package: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LATENT_SHIFT_")}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=package,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


SERVED = "import latent_shift_kernels as k; print(k.serving('cpu')['temporal_shift'])"


def test_a_corrupt_library_warns_with_the_fix_and_the_reference_serves(project):
    (project / "latent_shift_kernels" / "_C.abi3.so").write_bytes(b"not a library")
    done = imported(project, SERVED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("does not load") == 1
    assert "--no-build-isolation" in done.stderr


def test_a_package_without_libraries_says_so_at_the_first_call_only(project):
    call = "import torch; x = torch.zeros(2, 3, 1, 1)\nspec = k.ShiftSpec.latent_shift(3)\n"
    done = imported(project, f"{SERVED}\n{call}for _ in range(2): k.temporal_shift(x, spec, 2)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("plain PyTorch serves cpu tensors") == 1


def test_the_reference_can_be_asked_for_in_silence(project):
    done = imported(project, SERVED, LATENT_SHIFT_BACKEND="reference")
    assert done.stdout.strip() == "reference"
    assert "RuntimeWarning" not in done.stderr


def test_an_unknown_backend_is_refused(project):
    done = imported(project, SERVED, LATENT_SHIFT_BACKEND="cudnn")
    assert done.returncode != 0
    assert "LATENT_SHIFT_BACKEND is one of auto, native, triton, reference" in done.stderr


def test_the_interpreter_serves_cpu_tensors_where_triton_is_asked_for(project):
    pytest.importorskip("triton")
    done = imported(project, SERVED, LATENT_SHIFT_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "triton", done.stderr


def test_info_names_what_is_missing_and_why(project):
    record = {"missing": {"_C": "the compiler had a bad day"}}
    (project / "latent_shift_kernels" / "_build.json").write_text(json.dumps(record))
    code = "from latent_shift_kernels.__main__ import info; print(info())"
    done = imported(project, code)
    assert done.returncode == 0, done.stderr
    assert "_C: the compiler had a bad day" in done.stdout
    assert "temporal_shift: reference" in done.stdout
