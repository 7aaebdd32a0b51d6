"""The CUDA operators on the host executor, with the signatures of ``torch.ops.latent_shift.*``.

What ``csrc/cuda/*.cu`` does on a device, done here: dense tensors in the layout of x, outputs,
workspaces, one call of the operator's template.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latent_shift_kernels import reference
from latent_shift_kernels.spec import BOUNDARIES

from .device import HostDevice

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
TABLES = ("temb", "weight", "bias", "ada_scale", "ada_shift")


class HostBackend:
    """Runs operators under the given limits; ``launches`` are those of the last call."""

    def __init__(self, module: ModuleType, *, offset: int = 0, **options: Any) -> None:
        self.module = module
        self.options = options
        self.offset = offset  # of every tensor's first element from a 256-byte boundary
        self.launches: list[dict[str, Any]] = []

    def implementations(self) -> dict[str, Callable[..., Any]]:
        names = (
            "temporal_shift",
            "temporal_shift_backward",
            "shift_add",
            "shift_add_group_norm_silu",
            "shift_add_group_norm_silu_backward",
        )
        return {name: getattr(self, name) for name in names}

    def temporal_shift(self, x: Tensor, *shift: Any) -> Tensor:
        return self._shift(x, shift, adjoint=False)

    def temporal_shift_backward(self, dy: Tensor, *shift: Any) -> Tensor:
        return self._shift(dy, shift, adjoint=True)

    def _shift(self, x: Tensor, shift: tuple, adjoint: bool) -> Tensor:
        with self._call(x) as call:
            y = call.like_x("y")
            call.arguments.update(
                x=call.image(x, "x"), y=y.data_ptr(), adjoint=adjoint, **call.shift(*shift)
            )
            self.module.temporal_shift(call.arguments)
        return y

    def shift_add(self, residual: Tensor, h: Tensor, scale: float, *shift: Any) -> Tensor:
        with self._call(h) as call:
            y = call.like_x("y")
            call.arguments.update(
                residual=call.image(residual, "residual"),
                h=call.image(h, "h"),
                y=y.data_ptr(),
                scale=scale,
                **call.shift(*shift),
            )
            self.module.shift_add(call.arguments)
        return y

    def shift_add_group_norm_silu(
        self, x: Tensor, residual: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tables, num_groups, eps, cu_frames, num_frames, sizes, offsets, after, boundary = rest
        with self._call(x) as call:
            y = call.like_x("y")
            total = x.new_empty(0) if residual is None else call.like_x("sum")
            mean, rstd = (call.numbers((x.shape[0], num_groups), n) for n in ("mean", "rstd"))
            if x.numel():
                call.arguments.update(
                    x=call.image(x, "x"),
                    residual=call.image(residual, "residual"),
                    y=y.data_ptr(),
                    sum=total.data_ptr(),
                    mean=mean.data_ptr(),
                    rstd=rstd.data_ptr(),
                    eps=eps,
                    **call.norm(tables, num_groups, after, offsets),
                    **call.shift(cu_frames, num_frames, sizes, offsets, boundary),
                )
                plan = self.module.plan_norm_forward(call.arguments)
                workspace = call.numbers((plan["workspace"],), "workspace")
                call.arguments["workspace"] = workspace.data_ptr()
                self.module.shift_add_group_norm_silu(call.arguments)
        return y, total, mean, rstd

    def shift_add_group_norm_silu_backward(
        self, dy: Tensor, dsum: Tensor | None, x: Tensor, is_sum: bool, *rest: Any
    ) -> tuple[Tensor, ...]:
        *tables, mean, rstd, num_groups = rest[:8]
        cu_frames, num_frames, sizes, offsets, after, boundary = rest[8:]
        with self._call(x) as call:
            dx = call.like_x("dx")
            separate = is_sum and not after and any(offsets)
            dresidual = call.like_x("dresidual") if separate else x.new_empty(0)
            grads = [
                x.new_empty(0)
                if table is None
                else call.device.output(table.shape, table.dtype, name=f"d{name}")
                for name, table in zip(TABLES, tables, strict=True)
            ]
            if x.numel():
                gradients = {
                    f"d{name}": call.rows(grad if grad.numel() else None)
                    for name, grad in zip(TABLES, grads, strict=True)
                }
                call.arguments.update(
                    dy=call.image(dy, "dy"),
                    dsum=call.image(dsum, "dsum"),
                    x=call.image(x, "x"),
                    is_sum=is_sum,
                    mean=call.address(mean, "mean"),
                    rstd=call.address(rstd, "rstd"),
                    dx=dx.data_ptr(),
                    dresidual=dresidual.data_ptr(),
                    total=0,
                    workspace=0,
                    **gradients,
                    **call.norm(tables, num_groups, after, offsets),
                    **call.shift(cu_frames, num_frames, sizes, offsets, boundary),
                )
                needed, total = self.module.norm_backward_workspace(call.arguments)
                if total:
                    call.arguments["total"] = call.like_x("total").data_ptr()
                call.arguments["workspace"] = call.numbers((needed,), "workspace").data_ptr()
                self.module.shift_add_group_norm_silu_backward(call.arguments)
            else:
                for grad in grads:
                    grad.zero_()
        return dx, dresidual, *grads

    def _call(self, x: Tensor) -> Call:
        return Call(self, x)


class Call:
    """One call: its device, its tensors in the layout of ``x``, its arguments."""

    def __init__(self, backend: HostBackend, x: Tensor) -> None:
        self.backend = backend
        self.device = HostDevice(backend.module, **backend.options)
        self.x = x
        self.memory_format = reference.memory_format(x)
        frames, channels, height, width = x.shape
        last = self.memory_format == torch.channels_last or height * width == 1
        self.arguments: dict[str, Any] = {
            "dtype": DTYPES.get(x.dtype, 0),
            "element_size": x.element_size(),
            "channels_last": last,
            "frames": frames,
            "channels": channels,
            "pixels": height * width,
            "aligned": backend.offset * x.element_size() % 16 == 0,
        }

    def __enter__(self) -> Call:
        self.device.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.device.__exit__(*error)
        self.backend.launches = self.device.launches

    def like_x(self, name: str) -> Tensor:
        return self.device.output(
            self.x.shape, self.x.dtype, self.memory_format, offset=self.backend.offset, name=name
        )

    def numbers(self, shape: tuple[int, ...], name: str) -> Tensor:
        dtype = reference.accumulate_dtype(self.x.dtype)
        return self.device.output(shape, dtype, name=name)

    def image(self, t: Tensor | None, name: str) -> int:
        """The address of ``t`` in the layout of x, as far from alignment as asked for."""
        if t is None:
            return 0
        return self.address(self._placed(t), name)

    def _placed(self, t: Tensor) -> Tensor:
        strides = torch.empty(t.shape, device="meta").to(memory_format=self.memory_format).stride()
        size = t.element_size()
        raw = torch.empty(t.numel() + 256 // size + self.backend.offset, dtype=t.dtype)
        begin = -raw.data_ptr() % 256 // size + self.backend.offset
        return raw[begin : begin + t.numel()].as_strided(t.shape, strides).copy_(t)

    def address(self, t: Tensor, name: str) -> int:
        return self.device.input(t.contiguous() if t.dim() < 4 else t, name).data_ptr()

    def rows(self, t: Tensor | None, name: str = "") -> tuple[int, int, int]:
        """A table to read, or without a name one to write."""
        if t is None:
            return 0, 0, 1
        address = self.address(t, name) if name else t.data_ptr()
        return address, DTYPES[t.dtype], t.shape[0] if t.dim() == 2 else 1

    def norm(
        self, tables: list[Tensor | None], num_groups: int, after: bool, offsets: list[int]
    ) -> dict[str, Any]:
        moves = any(offsets)
        return {
            "groups": num_groups,
            "shift_before": moves and not after,
            "shift_after": moves and after,
            **{n: self.rows(t, n) for n, t in zip(TABLES, tables, strict=True)},
        }

    def shift(
        self,
        cu_frames: Tensor | None,
        num_frames: int,
        sizes: list[int],
        offsets: list[int],
        boundary: str,
    ) -> dict[str, Any]:
        return {
            "cu_frames": 0 if cu_frames is None else self.address(cu_frames, "cu_frames"),
            "clips": 0 if cu_frames is None else len(cu_frames) - 1,
            "num_frames": num_frames if cu_frames is None else self.x.shape[0],
            "sizes": list(sizes),
            "offsets": list(offsets),
            "boundary": BOUNDARIES.index(boundary),
        }
