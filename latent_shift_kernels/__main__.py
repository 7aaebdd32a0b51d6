"""``python -m latent_shift_kernels``: ``info`` says what is built and what serves, ``explain`` why
and at what cost, ``tune`` measures which kernels are the faster here."""

from __future__ import annotations

import argparse
import platform

import torch
from torch import Tensor

from . import __version__, backends, choices, dispatch, ops
from .reference import memory_format


def info() -> str:
    """Version, build, torch, devices, and the kernel behind every operator."""
    lines = [
        f"latent_shift_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        "LATENT_SHIFT_BACKEND=" + ",".join(word for word in backends.asked() if word),
    ]
    for name in ("_C", "_C_cuda"):
        path = backends.library_path(name)
        missing = backends.build_record().get(name, "not built")
        lines.append(f"{name}: {path.name if path else missing}")
    isa = backends.cpu_isa()
    if isa:
        lines.append(f"CPU instruction set: {isa}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    else:
        lines.append("cuda: no device")
    tuned = sorted(choices.folder().glob("*.json"))
    lines += [f"measured choices: {path}" for path in tuned]
    for device in ("cpu", "cuda"):
        lines.append(f"operators on {device}:")
        lines += [f"  {op}: {kernel}" for op, kernel in dispatch.serving(device).items()]
        lines += [
            f"  no {kernel}: {reason}"
            for (d, kernel), reason in backends.REFUSED.items()
            if d == device
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m latent_shift_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and what serves")
    asked = commands.add_parser("explain", help="which kernel would serve a call, and why")
    asked.add_argument("op", choices=sorted(ops.SCHEMAS))
    asked.add_argument(
        "--shape", type=_shape, default="16,320,32,32", help="B*T,C,H,W (%(default)s)"
    )
    asked.add_argument("--dtype", type=_dtype, default="float32", help="%(default)s")
    asked.add_argument("--device", type=_device, default="cpu", help="%(default)s")
    asked.add_argument("--channels-last", action="store_true")
    asked.add_argument(
        "--skip-channels", type=int, default=0, help="of the convolution's skip input"
    )
    asked.add_argument("--out-channels", type=int, default=0, help="of the convolution")
    measured = commands.add_parser(
        "tune", help="measure which kernels are the faster on this machine, and keep to that"
    )
    measured.add_argument("--device", type=_device, help="cuda where there is one, else cpu")
    measured.add_argument(
        "--shape", type=_shape, action="append", help="B*T,C,H,W, repeatable; or those of a U-Net"
    )
    measured.add_argument("--dtype", type=_dtype, default="bfloat16", help="%(default)s")
    args = parser.parse_args(arguments)
    try:
        if args.command == "info":
            print(info())
        elif args.command == "explain":
            _explain(args)
        else:
            _tune(args)
    except (ValueError, OSError) as error:
        parser.exit(1, f"latent_shift_kernels {args.command}: {error}\n")


def _explain(args: argparse.Namespace) -> None:
    def image(frames: int, channels: int, height: int, width: int) -> Tensor:
        x = torch.empty(frames, channels, height, width, dtype=args.dtype, device=args.device)
        return x.contiguous(memory_format=torch.channels_last) if args.channels_last else x

    frames, channels, *pixels = args.shape
    skip = image(frames, args.skip_channels, *pixels) if args.skip_channels else None
    channels_in = channels + args.skip_channels
    filter = image(args.out_channels, channels_in, 3, 3) if args.out_channels else None
    x = image(*args.shape)
    print(dispatch.explain(args.op, x, skip=skip, filter=filter))
    print(f"  tensors come back {str(memory_format(x)).removeprefix('torch.')}")


def _tune(args: argparse.Namespace) -> None:
    from .tune import SHAPES, tune

    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    path = tune(device, args.shape or SHAPES, (args.dtype,))
    print(f"stored in {path}; it serves from the next start of Python on, delete it to forget it")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.strip().isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected four sizes B*T,C,H,W, got {text!r}")
    return tuple(map(int, sizes))


def _dtype(text: str) -> torch.dtype:
    names = ("float32", "bfloat16", "float16")
    if text not in names:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
    return getattr(torch, text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of torch") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here")
    return device


if __name__ == "__main__":
    main()
