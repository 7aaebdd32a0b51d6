"""Checkpoints that are either whole or not there.

A checkpoint is a directory `step-00001200` holding `state.pt` and `state.json` (step, SHA-256 of
`state.pt`). It is written under a temporary name and renamed, so a process killed at any moment, or
a disk that is full, leaves the older ones intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

_PREFIX = "step-"


class DamagedCheckpointError(RuntimeError):
    """A checkpoint's content is not what was written."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `state` as the checkpoint of `step` and removes all but the last `keep`.

    Args:
        directory: holds all checkpoints of one stage; created if missing.
        state: nested dicts and lists of tensors and plain values.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointWriteError: the disk is full or refuses; nothing half-written is left.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    temporary = directory / f".{final.name}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "state.json").write_text(
            json.dumps({"step": step, "sha256": _digest(temporary / "state.pt")})
        )
        if final.exists():  # a directory cannot be renamed onto one that is not empty
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, RuntimeError) as error:  # torch wraps some failures of the file
        shutil.rmtree(temporary, ignore_errors=True)
        whole = list_checkpoints(directory)
        free = shutil.disk_usage(directory).free / 2**20 if directory.exists() else 0.0
        raise CheckpointWriteError(
            f"the checkpoint of step {step} could not be written to {directory} ({error}; "
            f"{free:.0f} MiB free); "
            + (f"{whole[-1].name} is whole" if whole else "there is none before it")
        ) from error
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in directory.glob(f".{_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints in `directory`, oldest first."""
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())


def set_newest_aside(directory: Path) -> Path:
    """Renames the newest checkpoint, so that the one before it is the newest.

    Returns:
        The new path of what was the newest.

    Raises:
        FileNotFoundError: there are fewer than two.
    """
    found = list_checkpoints(directory)
    if len(found) < 2:
        raise FileNotFoundError(
            f"{directory} holds {len(found)} checkpoint(s), and none before the newest"
        )
    aside = found[-1].with_name(f"aside-{found[-1].name}")
    if aside.exists():
        shutil.rmtree(aside)
    return found[-1].rename(aside)


def load_checkpoint(path: Path) -> tuple[int, dict[str, Any]]:
    """Reads one checkpoint onto the CPU.

    Returns:
        The step it was written at, and its state.

    Raises:
        DamagedCheckpointError: the files are incomplete or differ from what was written.
    """
    try:
        note = json.loads((path / "state.json").read_text())
        found = _digest(path / "state.pt")
        step, expected = note["step"], note["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(_advice(path, f"cannot be read ({error})")) from error
    if found != expected:
        raise DamagedCheckpointError(
            _advice(path, f"has SHA-256 {found[:12]}, expected {expected[:12]}")
        )
    return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def load_latest(directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Reads the newest checkpoint in `directory`; None if there is none."""
    found = list_checkpoints(directory)
    return load_checkpoint(found[-1]) if found else None


def _advice(path: Path, what: str) -> str:
    before = [other.name for other in list_checkpoints(path.parent) if other < path]
    if before:
        what += f"; add --resume-from previous to go on from {before[-1]}, or"
    else:
        what += "; there is none before it:"
    return f"checkpoint {path} is damaged: it {what} delete this directory"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
