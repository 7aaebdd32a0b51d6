"""What the commands share: kinds of options, checks, loading a model, and talking to the user."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from ..pipeline import LatentShiftPipeline

DTYPES = ("float32", "float16", "bfloat16")
SPLITS = ("held_out", "train", "all")

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="embedded|DIR|NAME",
        help="The model that comes with the package, a folder (also a Stable Diffusion one), or a "
        "name on the Hugging Face Hub. Only a name touches the network.",
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.")
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|" + "|".join(DTYPES), help="auto: float32 on the CPU, else float16."
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of the first clip, the others' follow; random if absent.")
]
Scale = Annotated[int, typer.Option(min=1, help="Show every pixel as K x K pixels.", metavar="K")]


class CommandError(Exception):
    """A failure whose message is all that the user needs."""


def choice(value: str, choices: Sequence[str] | dict[str, Any], option: str) -> str:
    if value.lower() in choices:
        return value.lower()
    near = difflib.get_close_matches(value.lower(), list(choices), 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise typer.BadParameter(
        f"{value!r} is not one of {', '.join(choices)}{hint}", param_hint=option
    )


def prompts_of(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or those of a file, one a line; exactly one of the two has to be given."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either a prompt or --prompts FILE", param_hint="PROMPT")
    if file is None:
        if prompt is None or not prompt.strip():
            raise typer.BadParameter("the prompt is empty", param_hint="PROMPT")
        return [prompt]
    hint = "--prompts"
    try:
        lines = file.read_text(encoding="utf-8").rstrip().splitlines()
    except OSError as error:
        raise typer.BadParameter(
            f"cannot read {str(file)!r}: {error.strerror}", param_hint=hint
        ) from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{str(file)!r} is not UTF-8 text", param_hint=hint) from None
    if not lines:
        raise typer.BadParameter(f"{str(file)!r} holds no prompt", param_hint=hint)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise typer.BadParameter(
                f"{str(file)!r}: line {number} is empty; put one prompt on every line",
                param_hint=hint,
            )
    return [line.strip() for line in lines]


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of ``WIDTHxHEIGHT``."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if not match:
        raise typer.BadParameter(
            f"{text!r} is not WIDTHxHEIGHT in pixels, such as 256x256", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def checked(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None


def check_json_file(path: Path) -> None:
    from ..video import check_writable

    if path.suffix.lower() != ".json":
        raise typer.BadParameter(f"{str(path)!r} must end in .json", param_hint="--output")
    # the same question asked of a name with a suffix that is known there
    checked(check_writable, path.with_suffix(".png"))


def check_folder(path: Path) -> None:
    from ..video import check_writable

    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{str(path)!r} is not a folder", param_hint="--output")
    checked(check_writable, path / "recipe.png")


def write(clip: Any, path: Path, fps: float, scale: int, metadata: dict[str, Any] | None) -> Path:
    from ..video import write_clip

    try:
        return write_clip(clip, path, fps=fps, scale=scale, metadata=metadata)
    except (OSError, ImportError) as error:
        raise CommandError(f"cannot write {path}: {error}") from error


def place_of(device: str) -> torch.device:
    """The device of that name, which is tried out; ``"auto"`` is a GPU where there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(
            f"{device!r} is not to be had here ({reason}): use --device cpu", param_hint="--device"
        ) from None
    return place


def dtype_of(dtype: str, device: str) -> str:
    """One of `DTYPES`; ``"auto"`` is by the device."""
    if dtype != "auto":
        return choice(dtype, ("auto", *DTYPES), "--dtype")
    return "float32" if place_of(device).type == "cpu" else "float16"


def load(model: str, device: str, dtype: str) -> LatentShiftPipeline:
    dtype, place = dtype_of(dtype, device), place_of(device)
    import torch
    import transformers.utils.logging

    # before diffusers, whose import makes transformers warn of packages that nothing here needs
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    level = diffusers.utils.logging.get_verbosity()
    # what goes wrong in loading is told once, below
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    from ..pipeline import LatentShiftPipeline

    options = {"dtype": getattr(torch, dtype)}
    try:
        if model == "embedded":
            pipe = LatentShiftPipeline.from_embedded(**options)
        else:
            try:
                pipe = LatentShiftPipeline.from_pretrained(model, **options)
            except TypeError:  # an image model
                pipe = LatentShiftPipeline.from_t2i(model, **options)
                note("this is an image model: its video was never trained, expect little motion")
    # errors of diffusers, transformers, safetensors, pickle and json have no base in common, and a
    # damaged folder is no reason for a traceback
    except Exception as error:
        if os.environ.get("LATENT_SHIFT_DEBUG"):
            raise
        raise CommandError(f"cannot load the model {model!r}: {why(error)}") from error
    finally:
        diffusers.utils.logging.set_verbosity(level)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def why(error: Exception) -> str:
    """Puts a loading error in one line."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(link).__name__ for link in chain}
    text = " ".join(str(error).split())
    if "SafetensorError" in kinds:
        return f"a weights file is damaged, get the folder again ({text})"
    if missing := re.search(r"no file named \S+\.bin found in directory (\S+?)\.?$", text):
        return f"there are no weights (*.safetensors) in {missing[1]}, get the folder again"
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError"}:
        return (
            "it is not on this machine and the Hugging Face Hub cannot be reached; download it "
            "first, or pass a folder"
        )
    return text


def many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def note(message: str) -> None:
    print(f"latent-shift: note: {message}", file=sys.stderr)


def console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a bar on stderr; there is no bar where stderr is not a
    terminal.
    """
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
