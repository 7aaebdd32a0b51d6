"""The host executor as a device for tests: tensors it knows, poisoned outputs, what it launched."""

from __future__ import annotations

from types import ModuleType

import torch

# Bytes of shared memory a block can ask for.
SHARED_PER_BLOCK = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
GUARD = 256
GUARD_BYTE = 0xA5


class HostDevice:
    """Registers buffers with the executor for the length of a ``with`` block.

    Accesses outside them, writes to inputs, races and every other misuse raise ``KernelError``; so
    do guard zones around outputs that have changed when the block ends. ``races=False`` is several
    times faster, and leaves out races, the order of asynchronous accesses and preemption.
    """

    def __init__(
        self,
        module: ModuleType,
        *,
        arch: int = 90,
        seed: int = 0,
        races: bool = True,
        num_sms: int = 132,
        shared_per_block: int | None = None,
    ) -> None:
        self.module = module
        self.options = {
            "seed": seed,
            "races": races,
            "arch": arch,
            "shared_per_block": shared_per_block or SHARED_PER_BLOCK[arch] * 1024,
            "num_sms": num_sms,
        }
        self.guarded: list[tuple[str, torch.Tensor, int, int]] = []
        self.keep: list[torch.Tensor] = []

    def __enter__(self) -> HostDevice:
        self.module.clear_buffers()
        self.module.configure(**self.options)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.launches = self.module.launches()
        self.module.clear_buffers()
        if kind is None:
            for name, raw, begin, end in self.guarded:
                outside = torch.cat([raw[:begin], raw[end:]])
                if not bool((outside == GUARD_BYTE).all()):
                    raise self.module.KernelError(f"bytes around '{name}' were written")
        self.keep.clear()

    def _register(self, tensor: torch.Tensor, name: str, writable: bool) -> torch.Tensor:
        self.keep.append(tensor)
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            self.module.register_buffer(
                tensor.data_ptr(), (last + 1) * size, size, name or "a tensor", writable
            )
        return tensor

    def input(self, tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        """Lets kernels read a tensor."""
        return self._register(tensor, name, False)

    def output(
        self,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        *,
        offset: int = 0,
        name: str = "output",
    ) -> torch.Tensor:
        """A tensor of NaN (-1 for integers) between guard zones, which kernels may write.

        ``offset`` moves it by so many elements from a 256-byte boundary.
        """
        strides = torch.empty(shape, device="meta").to(memory_format=memory_format).stride()
        size = torch.empty((), dtype=dtype).element_size()
        count = torch.Size(shape).numel()
        raw = torch.full((count * size + offset * size + 3 * GUARD,), GUARD_BYTE, dtype=torch.uint8)
        begin = GUARD + -raw.data_ptr() % GUARD + offset * size
        raw[begin : begin + count * size] = 0xFF
        flat = raw[begin : begin + count * size].view(dtype)
        self.guarded.append((name, raw, begin, begin + count * size))
        return self._register(flat.as_strided(shape, strides), name, True)
