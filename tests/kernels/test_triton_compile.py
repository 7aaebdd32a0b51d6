"""Every Triton kernel compiles for every architecture at shapes of the model, without a GPU and
without spilling a register.

The launches are recorded from the host functions on tensors without memory, and compiled in a
process of their own: where tests run in the interpreter, this one's Triton cannot compile.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)
# (channels, side, dtype, layout): slabs that stay in registers, that are streamed, that are cut up
SITES = [
    (320, 32, "bfloat16", "channels_last"),
    (320, 64, "bfloat16", "channels_last"),
    (1280, 8, "float32", "channels_last"),
    (640, 32, "float16", "contiguous_format"),
]
# which calls of `record` a site of the short list is compiled for
CALLS = {
    SITES[0]: ("shift", "shift_backward", "shift_add", "join", "join_backward", "conv1", "conv2"),
    SITES[1]: ("temb", "temb_backward"),
    SITES[2]: ("join", "after_backward", "conv2"),
    SITES[3]: ("shift", "after", "join_backward"),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture):
    check(compiled(architecture, [(site, CALLS[site]) for site in SITES]))


def check(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        print(
            f"sm_{row['architecture']} {row['kernel']}: {row['registers']} registers, "
            f"{row['shared']} bytes shared, {row['spilled']} bytes spilled"
        )
    assert not [row for row in rows if row["spilled"]]


def compiled(architecture: int, work: list) -> list[dict]:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, __file__, str(architecture), json.dumps(work)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# The rest runs in the other process.


def record(channels: int, side: int, dtype: str, layout: str, calls: list[str] | None):
    """The launches of each operator at a site of 32 frames in two clips: (call, kernel, ...)."""
    import torch

    from latent_shift_kernels.backends.triton import IMPLEMENTATIONS as run
    from latent_shift_kernels.backends.triton import _common

    launches = []

    def launch(kernel, programs, x, num_warps, num_stages=3, maxnreg=None, **arguments):
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        launches.append((kernel, options, arguments))

    for module in (_common, *(sys.modules[host.__module__] for host in run.values())):
        module.launch = launch

    def image():
        x = torch.empty(32, channels, side, side, dtype=getattr(torch, dtype), device="meta")
        return x.contiguous(memory_format=getattr(torch, layout))

    x, dy, dsum = image(), image(), image()
    weight, bias = (torch.empty(channels, device="meta") for _ in range(2))
    table = torch.empty(2, channels, device="meta", dtype=x.dtype)
    stats = torch.empty(32, 32, device="meta")
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    third = channels // 3
    sizes, moved, kept = [third, channels - 2 * third, third], [-1, 0, 1], [0, 0, 0]
    norm = run["shift_add_group_norm_silu"]
    norm_backward = run["shift_add_group_norm_silu_backward"]
    affine = (weight, bias)
    conv = run["shift_group_norm_silu_conv2d_fused"]
    filter = torch.empty(channels, channels, 3, 3, device="meta", dtype=x.dtype)
    wide_filter = torch.empty(channels, 2 * channels, 3, 3, device="meta", dtype=x.dtype)
    wide = (torch.empty(2 * channels, device="meta") for _ in range(2))
    wide_sizes = [2 * third, 2 * channels - 4 * third, 2 * third]
    zeros, last = (
        (None, 16, sizes, moved, False, "zeros"),
        (cu, 16, sizes, moved, True, "replicate"),
    )
    none = (None, 16, sizes, kept, False, "zeros")
    # fmt: off
    known = {
        "shift": lambda: run["temporal_shift"](x, cu, 16, sizes, moved, "zeros"),
        "shift_backward": lambda: run["temporal_shift_backward"](
            x, cu, 16, sizes, moved, "replicate"),
        "shift_add": lambda: run["shift_add"](x, dy, 1.0, None, 16, sizes, moved, "zeros"),
        "join": lambda: norm(x, dy, None, *affine, None, None, 32, 1e-5, *zeros),
        "temb": lambda: norm(x, None, table, *affine, None, None, 32, 1e-5, *none),
        "after": lambda: norm(x, None, None, *affine, table, table, 32, 1e-5, *last),
        "join_backward": lambda: norm_backward(
            dy, dsum, x, True, None, *affine, None, None, stats, stats, 32, *zeros),
        "temb_backward": lambda: norm_backward(
            dy, None, x, False, table, *affine, None, None, stats, stats, 32, *none),
        "after_backward": lambda: norm_backward(
            dy, None, x, False, None, *affine, table, table, stats, stats, 32, *last),
        "before_backward": lambda: norm_backward(
            dy, None, x, False, table, *affine, None, None, stats, stats, 32, *zeros),
        "conv1": lambda: conv(
            x, None, None, *affine, None, None, 32, 1e-5, filter, bias, table, None, 1.0,
            None, 16, sizes, kept, False, sizes, kept, "zeros", False),
        "conv2": lambda: conv(
            x, dy, None, *wide, None, None, 32, 1e-5, wide_filter, bias, None, dsum, 1.0,
            cu, 16, wide_sizes, moved, False, sizes, moved, "zeros", True),
    }
    # fmt: on
    for name in calls or known:
        launches.clear()
        known[name]()
        yield from ((name, *launch) for launch in launches)


def compile_kernel(kernel, options: dict, arguments: dict, architecture: int) -> dict:
    """Compiles a launch as the launcher would specialise it, and reads its use of the machine."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    pointers = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.float64: "*fp64",
        torch.int32: "*i32",
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or special:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if parameter.do_not_specialize:
            continue
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={**options, "enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout

    def used(name: str) -> int:
        return int(re.search(rf"{name}:(\d+)", usage).group(1))

    return {
        "registers": used("REG"),
        "spilled": used("STACK") + used("LOCAL"),
        "shared": result.metadata.shared,
    }


if __name__ == "__main__":
    rows = []
    for (channels, side, dtype, layout), calls in json.loads(sys.argv[2]):
        for call, kernel, options, arguments in record(channels, side, dtype, layout, calls):
            stage = arguments.get("STAGE", kernel.__name__)
            rows.append(
                {
                    "kernel": f"{channels}x{side} {dtype} {layout} {call} {stage}",
                    "architecture": int(sys.argv[1]),
                    **compile_kernel(kernel, options, arguments, int(sys.argv[1])),
                }
            )
    print(json.dumps(rows))
