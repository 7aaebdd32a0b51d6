"""Latents and text embeddings of a data set, computed once.

A cache is a folder of `manifest.json`, `null.safetensors` (the embedding of the empty caption) and
`shard-00000.safetensors`, ... Each shard holds `shard_clips` clips in the source's order, without
those that cannot be read: "mean" and, unless the mean alone was asked for, "std" of the
autoencoder's posterior, (N, T, C, h, w), not scaled, and "text", (N, L, D); its header names the
clips, their captions, and what was skipped and why. Every file is whole or absent.

With mean and standard deviation a latent is drawn anew at every reading, as training without a
cache does; `posterior="mean"` halves the latents and always gives the mean.

The manifest holds a fingerprint of everything that the content depends on. A cache is read, and
gone on with, only by what has the same one.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .base import Clip, ClipError, ClipFormat, ClipSource, Facts, Row, seeded
from .encode import encode_frames, encode_text, is_cut, model_digest, tokenizer_digest
from .sources import fingerprint

# Goes up whenever the same clips, models and settings would give other content.
_CODE = 1
_MANIFEST = "manifest.json"
_NULL = "null.safetensors"
_FRAMES_AT_ONCE = 16

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Posterior = Literal["sample", "mean"]

_log = logging.getLogger("latent_shift.data")


class CacheError(RuntimeError):
    """A cache that is incomplete or damaged, or was made of something else."""


@dataclass
class CacheReport:
    """What one process did: shards written and found done, and what is in either.

    `cut_captions` are those of the shards written that are too long for the text encoder.
    """

    written: int = 0
    found: int = 0
    clips: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    cut_captions: int = 0

    def add(self, content: dict[str, Any]) -> None:
        self.clips += len(content["rows"])
        self.skipped.update(reason for _, reason, _ in content["skipped"])


def build_cache(
    source: ClipSource,
    form: ClipFormat,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    posterior: Posterior = "sample",
    dtype: str = "float16",
    compute: str = "float32",
    shard_clips: int = 256,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> CacheReport:
    """Computes the shards of this rank that are not there yet.

    Shard `k` is rank `k % world`'s, so processes need not know of each other, and an interrupted
    build goes on with the same call, also with another `world`.

    Args:
        form: must take one sample of each clip: `crop="center"`, `start="middle"`, no flips.
        vae, text_encoder, tokenizer: on the device to compute on, in the dtype that training will
            load them in (float32), for their weights are part of the fingerprint.
        dtype: stored, one of `DTYPES`.
        compute: what copies of them compute in, one of `DTYPES`.
        shard_clips: clips in a shard; of no effect on a cache that was begun.
        workers: threads that read clips while others are encoded.
        progress: called with the number of clips of this rank that are done.

    Raises:
        ValueError: `form` asks for what a cache cannot hold.
        CacheError: the folder holds a cache of something else.
    """
    _refuse_augmentation(form)
    if not 0 <= rank < world or shard_clips < 1 or workers < 0:
        raise ValueError(
            "need 0 <= rank < world, shard_clips >= 1 and workers >= 0, got "
            f"{rank}, {world}, {shard_clips} and {workers}"
        )
    if not {dtype, compute} <= DTYPES.keys() or posterior not in get_args(Posterior):
        raise ValueError(
            f"dtype and compute must be of {', '.join(DTYPES)} and posterior one of "
            f"{', '.join(get_args(Posterior))}, got {dtype!r}, {compute!r} and {posterior!r}"
        )
    source.check(form)
    folder = Path(folder)
    now = {
        **_identity(
            source=source, form=form, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        ),
        "posterior": posterior,
        "dtype": dtype,
        "compute": compute,
        "code": _CODE,
    }
    if compute != "float32":
        vae, text_encoder = (
            copy.deepcopy(model).to(DTYPES[compute]) for model in (vae, text_encoder)
        )
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _MANIFEST).exists():
        manifest = _manifest(folder)
        _compare(folder, manifest["fingerprint"], now)
    else:
        manifest = {
            "fingerprint": now,
            "source": source.where,
            "clips": len(source),
            "shard_clips": shard_clips,
            "scaling_factor": float(vae.config.scaling_factor),
        }
        text = json.dumps(manifest, indent=2)
        _put(folder / _MANIFEST, partial(Path.write_text, data=text))
    null = folder / _NULL
    if not null.exists():
        state = {"text": encode_text(text_encoder, tokenizer, [""])[0].to(DTYPES[dtype])}
        _put(null, partial(save_file, state))

    report = CacheReport()
    encode = _Encoder(source, form, vae, text_encoder, tokenizer, posterior, DTYPES[dtype], workers)
    for shard, indices in _shards(manifest):
        if shard % world != rank:
            continue
        path = _shard_path(folder, shard)
        if (content := _done(path, now)) is not None:
            report.found += 1
            report.add(content)
            if progress:
                progress(len(indices))
            continue
        for stale in folder.glob(f".{path.name}.*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        tensors, content = encode(indices, report, progress)
        report.add(content)
        header = {"content": json.dumps({**content, "fingerprint": now})}
        _put(path, partial(save_file, tensors, metadata=header))
        report.written += 1
    return report


def share(clips: int, shard_clips: int, rank: int, world: int) -> int:
    """Clips of a source of `clips` that `build_cache` gives to `rank`."""
    shards = _shards({"clips": clips, "shard_clips": shard_clips})
    return sum(len(indices) for shard, indices in shards if shard % world == rank)


def open_cache(
    folder: str | Path,
    *,
    form: ClipFormat | None = None,
    vae: Any = None,
    text_encoder: Any = None,
    tokenizer: Any = None,
    source: ClipSource | None = None,
) -> LatentCache:
    """Opens a complete cache, as a source for `Batches`.

    Args:
        form, vae, text_encoder, tokenizer, source: what the cache has to be made of, where given.

    Raises:
        FileNotFoundError: there is no cache in `folder`.
        CacheError: it is incomplete or damaged, or made of something else.
        ValueError: `form` asks for what a cache cannot hold.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if form is not None:
        _refuse_augmentation(form)
    given = {
        "form": form,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "source": source,
    }
    now = _identity(**{name: value for name, value in given.items() if value is not None})
    _compare(folder, manifest["fingerprint"], {"code": _CODE, **now})
    return LatentCache(folder, manifest)


class LatentCache(ClipSource):
    """A complete cache as a source of latents and text for `Batches`.

    Attributes:
        form: the format it was built in.
        null_text: (L, D) float32, the embedding of the empty caption.
        skipped: clips of the data set that the cache leaves out, by reason.
    """

    form: ClipFormat

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.kind, self.where = "cache", str(folder)
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.form = ClipFormat(**self.fingerprint["form"])
        self.skipped: Counter[str] = Counter()
        self._scale = float(manifest["scaling_factor"])
        self._rows: list[tuple[Path, int, str, str]] = []  # shard, row in it, name, caption
        self._local = threading.local()
        shards = [_shard_path(folder, shard) for shard, _ in _shards(manifest)]
        missing = [path for path in [*shards, folder / _NULL] if not path.exists()]
        if missing:
            raise CacheError(
                f"{folder} is incomplete: {len(missing)} of {len(shards) + 1} files are missing, "
                f"{missing[0].name} first; run `latent-shift data cache` again to go on"
            )
        self.null_text: Tensor = _load(
            folder / _NULL, lambda file: file.get_tensor("text").to(torch.float32, copy=True)
        )
        for path in shards:
            content = _content(path)
            if content["fingerprint"] != self.fingerprint:
                raise CacheError(f"{path} belongs to another cache: delete it and build again")
            for row, (name, caption) in enumerate(content["rows"]):
                self._rows.append((path, row, name, caption))
            self.skipped.update(reason for _, reason, _ in content["skipped"])

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._rows[index][2]

    def caption(self, index: int) -> str:
        return self._rows[index][3]

    def facts(self, index: int, thorough: bool = False) -> Facts:
        form = self.form
        return Facts(form.num_frames, form.fps or 0.0, form.height, form.width)

    def digest(self, index: int) -> bytes:
        return json.dumps([self.fingerprint, index]).encode()

    def read(self, index: int, form: ClipFormat, generator: torch.Generator) -> Clip:
        raise TypeError(f"{self.where} is a cache: it holds latents, not frames")

    def check(self, form: ClipFormat) -> None:
        _refuse_augmentation(form)
        _compare(Path(self.where), self.fingerprint, {"form": asdict(form)})

    def row(self, index: int, form: ClipFormat, generator: torch.Generator) -> Row:
        path, row, _, caption = self._rows[index]
        file = self._open(path)
        # the file's memory is shared by all who read it: nothing here may work in place
        latents = file.get_slice("mean")[row].float()
        if self.fingerprint["posterior"] == "sample":
            noise = torch.randn(latents.shape, generator=generator)
            latents = latents + file.get_slice("std")[row].float() * noise
        text = file.get_slice("text")[row].to(torch.float32, copy=True)
        return Row(caption, latents=latents * self._scale, text=text)

    def _open(self, path: Path) -> Any:
        """The shard, kept open by every thread for itself."""
        files = self._local.__dict__.setdefault("files", {})
        if path not in files:
            files[path] = _load(path, lambda file: file)
        return files[path]


class _Encoder:
    """Makes the content of one shard."""

    def __init__(
        self,
        source: ClipSource,
        form: ClipFormat,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        posterior: Posterior,
        dtype: torch.dtype,
        workers: int,
    ) -> None:
        self._source, self._form, self._vae = source, form, vae
        self._text_encoder, self._tokenizer = text_encoder, tokenizer
        self._posterior, self._dtype, self._workers = posterior, dtype, workers

    def __call__(
        self, indices: range, report: CacheReport, progress: Callable[[int], None] | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        parts: dict[str, list[Tensor]] = {}
        rows: list[tuple[str, str]] = []
        skipped: list[tuple[str, str, str]] = []
        waiting: list[Row] = []

        def flush() -> None:
            for name, value in self._encode(waiting).items():
                parts.setdefault(name, []).append(value)
            waiting.clear()

        at_once = max(1, _FRAMES_AT_ONCE // self._form.num_frames)
        for index, found in zip(indices, self._read(indices), strict=True):
            if isinstance(found, ClipError):
                skipped.append((found.name, found.reason, found.detail))
                _log.warning("skipped %s", found)
            else:
                name = self._source.name(index)
                if is_cut(self._tokenizer, found.caption):
                    report.cut_captions += 1
                    _log.warning("%s: only the beginning of its caption fits", name)
                rows.append((name, found.caption))
                waiting.append(found)
                if len(waiting) == at_once:
                    flush()
            if progress:
                progress(1)
        if waiting:
            flush()
        tensors = {name: torch.cat(values) for name, values in parts.items()}
        return tensors, {"rows": rows, "skipped": skipped}

    def _encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        pixels = torch.stack([row.pixels for row in rows if row.pixels is not None])
        mean, std = encode_frames(self._vae, pixels, _FRAMES_AT_ONCE)
        text = encode_text(self._text_encoder, self._tokenizer, [row.caption for row in rows])
        state = {"mean": mean, "text": text}
        if self._posterior == "sample":
            state["std"] = std
        return {name: value.to(self._dtype) for name, value in state.items()}

    def _read(self, indices: Iterable[int]) -> Iterator[Row | ClipError]:
        if not self._workers:
            yield from map(self._one, indices)
            return
        with ThreadPoolExecutor(self._workers) as pool:
            ahead: deque[Future[Row | ClipError]] = deque()
            for index in indices:
                ahead.append(pool.submit(self._one, index))
                if len(ahead) > 2 * self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _one(self, index: int) -> Row | ClipError:
        try:
            return self._source.row(index, self._form, seeded("cache", index))
        except ClipError as error:
            return error


def _refuse_augmentation(form: ClipFormat) -> None:
    if found := form.augmentations():
        raise ValueError(
            f"a cache holds one sample of each clip, it cannot hold {', '.join(found)}: set "
            "crop='center', start='middle' and flip=False, or train without a cache"
        )


def _identity(**parts: Any) -> dict[str, Any]:
    """The entries of a fingerprint that the parts given make."""
    made: dict[str, Callable[[Any], Any]] = {
        "source": fingerprint,
        "form": asdict,
        "vae": model_digest,
        "text_encoder": model_digest,
        "tokenizer": tokenizer_digest,
    }
    return {name: made[name](value) for name, value in parts.items()}


def _compare(folder: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `CacheError` that names what in `now` differs from what is stored."""
    differing = []
    for name, value in now.items():
        old = stored.get(name)
        if name == "form":
            old = old or {}
            differing += [
                f"{key} (cache: {old.get(key)}, now: {item})"
                for key, item in value.items()
                if old.get(key) != item
            ]
        elif old != value:
            differing.append(f"{name} (cache: {str(old)[:12]}, now: {str(value)[:12]})")
    if differing:
        raise CacheError(
            f"the cache {folder} was made with another {', another '.join(differing)}: build one "
            "in another folder, or delete this one"
        )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if not manifest.keys() >= {"fingerprint", "clips", "shard_clips", "scaling_factor"}:
            raise ValueError("entries are missing")
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no cache: it has no {_MANIFEST}") from None
    except (ValueError, AttributeError) as error:
        raise CacheError(f"{path} is damaged: {error}") from error
    return manifest


def _shards(manifest: dict[str, Any]) -> Iterator[tuple[int, range]]:
    clips, size = manifest["clips"], manifest["shard_clips"]
    for shard, first in enumerate(range(0, clips, size)):
        yield shard, range(first, min(first + size, clips))


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _load(path: Path, get: Callable[[Any], Any]) -> Any:
    try:
        return get(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} is damaged ({error}): delete it and build again") from error


def _content(path: Path) -> dict[str, Any]:
    return _load(path, lambda file: json.loads(file.metadata()["content"]))


def _done(path: Path, now: dict[str, Any]) -> dict[str, Any] | None:
    """What a shard holds if it is there and whole."""
    if not path.exists():
        return None
    with contextlib.suppress(CacheError):
        content = _content(path)
        return content if content["fingerprint"] == now else None
    return None


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is whole whenever it is there."""
    handle, name = tempfile.mkstemp(".part", f".{path.name}.", path.parent)
    part = Path(name)
    try:
        write(part)
        os.fsync(handle)
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        os.close(handle)
        part.unlink(missing_ok=True)
