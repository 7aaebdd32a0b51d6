"""``python -m latent_shift_kernels info`` and ``explain``: what is built, what serves, and why."""

from __future__ import annotations

import argparse
import platform

import torch

from . import __version__, backends, dispatch, ops
from .reference import memory_format


def info() -> str:
    """Version, build, torch, devices, and the kernel behind every operator."""
    lines = [
        f"latent_shift_kernels {__version__}",
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        f"LATENT_SHIFT_BACKEND={backends.choice()}",
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
    for device in ("cpu", "cuda"):
        lines.append(f"operators on {device}:")
        lines += [f"  {op}: {kernel}" for op, kernel in dispatch.serving(device).items()]
        lines += [
            f"  no {kernel}: {reason}"
            for (d, kernel), reason in backends.REFUSED.items()
            if d == device
        ]
    return "\n".join(lines)


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(prog="python -m latent_shift_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is built and what serves")
    asked = commands.add_parser("explain", help="which kernel would serve a call, and why")
    asked.add_argument("op", choices=sorted(ops.SCHEMAS))
    asked.add_argument("--shape", default="16,320,32,32", help="B*T,C,H,W (%(default)s)")
    asked.add_argument("--dtype", default="float32", help="%(default)s")
    asked.add_argument("--device", default="cpu", help="%(default)s")
    asked.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    if args.command == "info":
        print(info())
        return
    shape = [int(size) for size in args.shape.split(",")]
    x = torch.empty(shape, dtype=getattr(torch, args.dtype), device=args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    print(dispatch.explain(args.op, x))
    print(f"  tensors come back {str(memory_format(x)).removeprefix('torch.')}")


if __name__ == "__main__":
    main()
