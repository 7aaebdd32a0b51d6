"""Where the time and the memory of a training step go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Stopwatch:
    """Adds up the seconds spent in named parts; costs nothing while it is off.

    Attributes:
        seconds: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] | None = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.seconds is None:
            yield
            return
        begin = self.now()
        yield
        self.seconds[part] += self.now() - begin  # type: ignore[assignment]

    def now(self) -> float:
        """Returns the time, when all work on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def kept_for_backward(module: nn.Module, forward: Callable[[], object]) -> int:
    """Counts the bytes that autograd keeps of a forward pass until its backward pass, parameters
    aside: the same on every machine. It does not see what a function keeps past autograd's hooks.

    Args:
        module: whose parameters do not count.
        forward: runs it, with gradients recorded.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    # held until here: nothing that was counted may have been freed and its address given away
    del output
    return sum(kept.values())
