"""Which of two kernels is the faster: what was measured, for the package or on this machine.

A choice is about one call: a device, an operator, a dtype and a shape. Those of this machine are
stored by ``python -m latent_shift_kernels tune`` in the user's cache folder
(``$XDG_CACHE_HOME/latent-shift``, or ``~/.cache/latent-shift``), one file for each device and
version; they go before the shipped ones. Where both are silent the caller has a rule of its own.
Nothing here measures anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SHIPPED: dict[str, dict[str, str]] = {}
"""Architecture ("sm_90", "cpu") -> call (see :func:`key`) -> kernel. It holds what was measured and
is empty where nothing was: no GPU has been timed so far, and on a CPU one kernel serves each
operator."""


def key(
    op: str, dtype: torch.dtype, shape: tuple[int, ...], out_channels: int | None = None
) -> str:
    """A call as the tables know it.

    Example:
        >>> key("shift_add", torch.bfloat16, (32, 320, 32, 32))
        'shift_add bfloat16 32x320x32x32'
    """
    size = "x".join(map(str, shape))
    to = "" if out_channels is None else f"->{out_channels}"
    return f"{op} {str(dtype).removeprefix('torch.')} {size}{to}"


def folder() -> Path:
    """Where this machine's choices are."""
    # Where a user has no home this is no folder, and nothing is found in it.
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_home) / "latent-shift"


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement belongs to: the device, and the versions of what ran."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        name = _cpu_name()
        capability = f"{device.type}, {torch.get_num_threads()} threads"
    return {"type": device.type, "name": name, "capability": capability, **versions()}


@cache
def versions() -> dict[str, str]:
    from . import __version__

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {"package": __version__, "torch": torch.__version__, "triton": triton}


def path_of(device: torch.device) -> Path:
    """The file with this device's choices, whether or not there is one."""
    words = "-".join(identity(device).values())
    return folder() / f"{re.sub(r'[^A-Za-z0-9.+]+', '-', words).lower()}.json"


def lookup(device: torch.device, call: str) -> tuple[str, str] | None:
    """The kernel chosen for ``call`` on ``device`` and by whom, None where nothing was measured."""
    if _trial is not None:
        return (_trial[call], "on trial") if call in _trial else None
    return _lookup(device, call)


@contextlib.contextmanager
def trial(chosen: Mapping[str, str]) -> Iterator[None]:
    """Puts ``chosen`` (call -> kernel) in place of every table, for as long as something is
    measured."""
    global _trial
    before, _trial = _trial, dict(chosen)
    try:
        yield
    finally:
        _trial = before


_trial: dict[str, str] | None = None


@cache
def _lookup(device: torch.device, call: str) -> tuple[str, str] | None:
    if call in (tuned := _read(path_of(device))):
        return tuned[call], "measured on this machine"
    architecture = device.type
    if device.type == "cuda":
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    shipped = SHIPPED.get(architecture, {})
    return (shipped[call], "the shipped table") if call in shipped else None


def chosen(device_type: str) -> Iterator[tuple[str, str]]:
    """Every (call, kernel) that may concern a device of a type, asking no device which it is."""
    for path in sorted(folder().glob(f"{device_type}-*.json")):
        yield from _read(path).items()
    prefix = "sm_" if device_type == "cuda" else device_type
    for architecture, table in SHIPPED.items():
        if architecture.startswith(prefix):
            yield from table.items()


def store(device: torch.device, rows: dict[str, dict[str, Any]]) -> Path:
    """Writes ``rows`` (call -> {"choice": kernel, "ms": {kernel: milliseconds}}) as this device's
    choices, in place of what was there: a reader finds the old file or the new one.

    Raises:
        OSError: If the cache folder cannot be written.
    """
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": identity(device), "measured": rows}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", suffix=".part", delete=False
    ) as part:
        try:
            json.dump(record, part, indent=1)
            part.write("\n")
            part.flush()
            os.fsync(part.fileno())
        except BaseException:
            os.unlink(part.name)
            raise
    os.replace(part.name, path)
    _read.cache_clear()
    _lookup.cache_clear()
    return path


@cache
def _read(path: Path) -> dict[str, str]:
    try:
        text = path.read_text()
    except OSError:
        return {}
    try:
        record = json.loads(text)
        if {name: record["device"][name] for name in versions()} != versions():
            return {}
        return {str(call): str(row["choice"]) for call, row in record["measured"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"latent_shift_kernels: {path} is damaged ({error!r}) and ignored; delete it, or write "
            "it again with: python -m latent_shift_kernels tune",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
