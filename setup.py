"""Builds the optional native libraries; everything else about the package is in pyproject.toml.

``latent_shift_kernels._C`` (CPU) and ``._C_cuda`` (where torch has CUDA and nvcc is there) use
LibTorch's stable ABI and the CPython limited API, so one binary serves torch >= 2.11 and
Python >= 3.10. A library that cannot be built is left out, with a message on stderr and the reason
in ``latent_shift_kernels/_build.json``; the package then runs on Triton or plain PyTorch.
LATENT_SHIFT_FORCE_BUILD=1 makes that an error, LATENT_SHIFT_SKIP_BUILD=1 asks for it.
"""

import json
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "latent_shift_kernels"
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
# sm_80 code also runs on sm_86 and sm_89, sm_90a is Hopper's own, PTX serves what has no code
ARCHITECTURES = "8.0;9.0a;9.0+PTX"
ARCHITECTURES_OF_12_8 = "8.0;9.0a;9.0+PTX;10.0;12.0"
FIX = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."
FORCE = os.environ.get("LATENT_SHIFT_FORCE_BUILD") == "1"

missing: dict[str, str] = {}


def leave_out(library: str, reason: str) -> None:
    """Notes why a library is missing, says so, and stops where the build is forced."""
    missing[library] = reason
    print(
        f"{PACKAGE}.{library} was not built: {reason}.\n"
        f"The package works without it, on {'plain PyTorch' if library == '_C' else 'Triton'}, "
        f"but more slowly. To build it: {FIX}",
        file=sys.stderr,
        flush=True,
    )
    if FORCE:
        raise SystemExit(f"{PACKAGE}.{library} is required by LATENT_SHIFT_FORCE_BUILD=1")


def record(folder: str) -> None:
    """Stores the reasons inside the package, for ``python -m latent_shift_kernels info``."""
    package = Path(folder, PACKAGE)
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps({"missing": missing}, indent=1) + "\n")


class BuildPy(build_py):
    """Records what is known to be missing even where there is nothing to compile."""

    def run(self) -> None:
        super().run()
        record("." if getattr(self, "editable_mode", False) else self.build_lib)


def choose_architectures(cuda_home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, with sm_90a wherever it asks for sm_90, or what this nvcc compiles for:
    torch asks the visible GPU where the list is empty, and fails where there is none."""
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";"):
        return asked if "9.0a" in asked else re.sub(r"\b9\.0(?!\d)", "9.0a;9.0", asked)
    nvcc = Path(cuda_home, "bin", "nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    new = release is not None and tuple(map(int, release.groups())) >= (12, 8)
    return ARCHITECTURES_OF_12_8 if new else ARCHITECTURES


def native() -> tuple[list, type]:
    """The extensions this environment can try, and the command that builds them."""
    if os.environ.get("LATENT_SHIFT_SKIP_BUILD") == "1":
        missing.update(_C="LATENT_SHIFT_SKIP_BUILD=1")
        return [], build_ext
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        leave_out("_C", f"torch is not there at build time ({error}); isolated builds hide it")
        return [], build_ext

    class BuildNative(BuildExtension):
        """Builds each library on its own and goes on without those that fail."""

        def build_extensions(self) -> None:
            built, wanted = [], self.extensions
            for extension in wanted:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:  # torch raises RuntimeError, setuptools its own kinds
                    summary = str(error).strip().splitlines() or [type(error).__name__]
                    leave_out(extension.name.rpartition(".")[2], summary[0].rstrip("."))
            self.extensions = self.distribution.ext_modules = built
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel and not built:
                wheel.root_is_pure = True
            record(self.build_lib)

        def copy_extensions_to_source(self) -> None:  # in-place and editable builds
            super().copy_extensions_to_source()
            record(".")

    common = {"define_macros": MACROS, "py_limited_api": True}
    sources = sorted(glob("csrc/cpu/*.cpp"))
    headers = glob("csrc/common/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cuda/*plan.h")
    extensions = [
        CppExtension(
            f"{PACKAGE}._C",
            sources,
            extra_compile_args=CXX_FLAGS,
            depends=sorted(headers),
            **common,
        )
    ]
    cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    if cuda_sources and torch.version.cuda:
        if CUDA_HOME:
            architectures = choose_architectures(CUDA_HOME)
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
            hopper = ["-DLATENT_SHIFT_SM90A"] if "9.0a" in architectures else []
            flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + hopper}
            extensions.append(
                CUDAExtension(
                    f"{PACKAGE}._C_cuda",
                    cuda_sources,
                    extra_compile_args=flags,
                    depends=sorted(glob("csrc/common/*.h") + glob("csrc/cuda/*.*h")),
                    **common,
                )
            )
        else:
            leave_out("_C_cuda", "nvcc was not found (set CUDA_HOME to the CUDA toolkit)")
    return extensions, BuildNative


extensions, build_native = native()
setup(
    ext_modules=extensions,
    cmdclass={"build_py": BuildPy, "build_ext": build_native},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
