"""How a time is taken: calls in turns, medians with quantiles, and the machine they ran on."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_MIN_ROUNDS, _MAX_ROUNDS = 7, 200
# Cycles for which the GPU waits while the host enqueues a call, so that a call of many kernels is
# not charged for its launches: about 0.5 ms at 2 GHz.
_LAUNCH_AHEAD_CYCLES = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the 20 % and 80 % quantiles."""

    ms: float
    ms_low: float
    ms_high: float


def interleave(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    warm: bool,
    seconds: float,
    each: int = 1,
) -> dict[str, Timing]:
    """Times several calls in turns, so that whatever else the machine does hits all of them alike.

    Args:
        calls: For every name the same call on one or more sets of buffers, taken in rotation. What
            a call returns on one of several sets is kept until its turn comes again, so that
            results do not go to memory that the cache still holds.
        device: Where the calls run.
        warm: Runs each call once, untimed, directly before it is timed.
        seconds: Time to spend on all calls together; at least seven rounds are made.
        each: How many calls one of ``calls`` stands for, such as a graph of many.

    Returns:
        One timing per name.
    """
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    kept = {name: [call() for call in rotation] for name, rotation in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() - start < seconds):
        for name, rotation in calls.items():
            turn = rounds % len(rotation)
            kept[name][turn] = None  # freed outside the measurement
            if warm:
                rotation[turn]()
            elapsed, result = sample(rotation[turn])
            samples[name].append(elapsed / each)
            if len(rotation) > 1:
                kept[name][turn] = result
            del result
        rounds += 1
    return {name: _summary(times) for name, times in samples.items()}


def captured(rotation: Sequence[Call], count: int, *, keep: bool) -> Call:
    """``count`` calls, in rotation, as one CUDA graph on the current stream, where each of them
    must have run before.

    Args:
        keep: Gives every call memory of its own for its results; otherwise all but the last may
            share it.

    Returns:
        A call that replays the graph and returns the results of its last call.
    """
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for turn in range(count):
            result = rotation[turn % len(rotation)]()
            if keep or turn == count - 1:
                kept.append(result)
            del result

    def replay() -> Any:
        graph.replay()
        return kept[-1]

    return replay


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache that buffers must outgrow to come from memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(
        (int(size.read_text().strip().rstrip("K")) << 10 for size in sizes), default=32 << 20
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place the numbers: hardware, software, commit, date."""
    cuda = device.type == "cuda"
    git = (
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    )
    smi = (
        "nvidia-smi",
        "--query-gpu=driver_version",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    )
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device)))
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_mib": last_level_cache(device) >> 20,
        "driver": _output(*smi) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if find_spec("triton") else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _output(*git),
        "sources": _sources(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _sample_cpu(call: Call) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _sample_cuda(call: Call) -> tuple[float, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_LAUNCH_AHEAD_CYCLES)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


def _summary(times: list[float]) -> Timing:
    quintiles = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), quintiles[0], quintiles[-1])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sources() -> str:
    """A digest of everything that is measured, the same wherever it lies."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for folder in ("benchmarks", "csrc", "latent_shift", "latent_shift_kernels"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
