"""Builds latent_shift_host: CUDA kernels compiled for the host, and the executor that runs them.

``python -m tests.host.build`` builds all of it, or with the stems of binding files those only, and
says what did not compile; the tests build on first use. A file is compiled again only when it, a
header it includes, or the compiler has changed.
"""

import fcntl
import hashlib
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "host"
MACHINE = HERE / "executor"
JOBS = 2
# Another process may be about to load an older module.
KEEP_SECONDS = 3600
# GCC's instrumentation alone; the executor defines what it calls. Alignment is checked before the
# optimiser takes vectors apart.
COMMON = ["-std=c++17", "-fPIC", "-g1", "-Wall", "-Wextra", "-fvisibility=hidden"]
EXECUTOR = [*COMMON, "-O3"]
KERNELS = [
    *COMMON,
    "-O1",
    "-fsanitize=thread,alignment",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]
# Copies are calls that the executor checks, not instructions it does not see.
COPIES = ["memcpy", "memmove", "memset"]


def why_not() -> str | None:
    """Why this environment cannot build the module, if so."""
    for tool in ("g++", "objcopy"):
        if shutil.which(tool) is None:
            return f"{tool} is not there to compile kernels for the host"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed (pip install pybind11)"
    if not sys.platform.startswith("linux"):
        return "the host executor runs on Linux"
    return None


class CompileError(RuntimeError):
    """A file did not compile; the text is the compiler's."""


@contextmanager
def locked(path: Path):
    """One process makes what a file names, the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


def digest(command: list[str], depends: Path, since: float = math.inf) -> str | None:
    """A key of a compilation: its command and the content of every file it read last time.

    None where there is no telling, such as a file that was written after ``since``.
    """
    if not depends.exists():
        return None
    key = hashlib.sha256(" ".join(command).encode())
    for name in re.sub(r"\\\n", " ", depends.read_text()).split(":", 1)[1].split():
        # system headers go with the compiler
        if name.startswith("/usr/"):
            continue
        if not Path(name).exists() or Path(name).stat().st_mtime > since:
            return None
        key.update(Path(name).read_bytes())
    return key.hexdigest()


def compile_file(source: Path, compiler: str) -> Path:
    """The object file of one source, compiled if it must be."""
    import pybind11

    kernels = source.parent != MACHINE
    flags = [*KERNELS, *(f"-fno-builtin-{copy}" for copy in COPIES)] if kernels else EXECUTOR
    includes = [HERE / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    target, depends, stamp, fresh = (
        BUILD / f"{source.stem}.{suffix}" for suffix in ("o", "d", "key", "new.o")
    )
    command = ["g++", *flags, *(f"-I{i}" for i in includes), "-MMD", "-MF", str(depends)]
    command += ["-c", str(source), "-o", str(fresh)]
    identity = [compiler, *command]
    with locked(target):
        key = digest(identity, depends)
        if key is not None and target.exists() and stamp.exists() and stamp.read_text() == key:
            return target
        started = time.time()
        run(command)
        if kernels:
            run(["objcopy", *(f"--redefine-sym={copy}=ls_{copy}" for copy in COPIES), str(fresh)])
        fresh.replace(target)
        # a header that changed meanwhile is not what this object was made of
        stamp.write_text(digest(identity, depends, since=started) or "")
    return target


def build(only: Sequence[str] | None = None) -> tuple[Path, dict[str, str]]:
    """The module's path, and the compiler's words on bindings that it had to leave out.

    ``only`` names the bindings that are wanted, by the stems of their files.
    """
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    required = [*MACHINE.glob("*.cpp"), HERE / "module.cpp"]
    bindings = [*HERE.glob("bind_*.cpp"), HERE / "faults.cpp", HERE / "features.cpp"]
    if only is not None:
        bindings = [source for source in bindings if source.stem in only]
    left_out: dict[str, str] = {}

    def attempt(source: Path) -> Path | None:
        try:
            return compile_file(source, compiler)
        except CompileError as error:
            if source in required:
                raise
            left_out[source.name] = str(error)
            return None

    with ThreadPoolExecutor(JOBS) as pool:
        # the slow ones first
        order = sorted([*required, *bindings], key=lambda source: -source.stat().st_size)
        made = sorted(o for o in pool.map(attempt, order) if o is not None)
    # The executor's first: of a library's inline functions the linker keeps the first copy, and the
    # executor must not run into its own checks.
    own = {source.stem for source in MACHINE.glob("*.cpp")}
    objects = sorted(made, key=lambda path: path.stem not in own)
    contents = hashlib.sha256(b"".join(o.read_bytes() for o in objects))
    library = BUILD / contents.hexdigest()[:16] / "latent_shift_host.so"
    with locked(library):
        if not library.exists():
            part = library.with_suffix(".part")
            run(["g++", "-shared", *map(str, objects), "-o", str(part)])
            part.replace(library)
            for old in BUILD.glob("*/latent_shift_host.so"):
                if old.stat().st_mtime < time.time() - KEEP_SECONDS:
                    shutil.rmtree(old.parent)
    return library, left_out


class HostModule(ModuleType):
    """Stands for the module, and says of a missing binding why it is missing."""

    left_out: dict[str, str]

    def __getattr__(self, name: str):
        try:
            return getattr(self.__dict__["loaded"], name)
        except AttributeError:
            said = "\n".join(self.__dict__["left_out"].values())
            raise AttributeError(f"latent_shift_host has no {name!r}\n{said[:8000]}") from None


def load(only: Sequence[str] | None = None) -> HostModule:
    """The module, built if it must be."""
    library, left_out = build(only)
    spec = importlib.util.spec_from_file_location("latent_shift_host", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    module = HostModule("latent_shift_host")
    module.__dict__.update(loaded=loaded, left_out=left_out)
    return module


if __name__ == "__main__":
    path, missing = build(sys.argv[1:] or None)
    for source, text in missing.items():
        print(f"{source} did not compile:\n{text}", file=sys.stderr)
    print(path)
    sys.exit(bool(missing))
