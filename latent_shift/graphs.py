"""CUDA graphs of the U-Net: its call in every denoising step one launch, whatever the prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor | None]
Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]

_WARM_UPS = 3  # calls before a capture, in which libraries choose kernels and allocate workspaces


@dataclass(frozen=True)
class _Graph:
    replay: Replay
    inputs: Inputs
    output: Tensor


class UNetGraphs:
    """Calls of a U-Net, recorded once for every shape of the inputs and replayed from then on.

    A replay copies the inputs into the recorded buffers, so prompts, latents and time steps change
    freely. Weights may change in place (a LoRA merged, an optimizer's step); where they move to
    other memory, or a module changes its class, its attention processor or its adapters, everything
    is recorded anew.

    Args:
        record: Records a call: returns what replays it, and the tensor that a replay writes.
        limit: Shapes kept; beyond it the one that was not used for longest is dropped.
    """

    def __init__(self, record: Record | None = None, limit: int = 4) -> None:
        self._record = _CudaRecorder() if record is None else record
        self._limit = limit
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._state: Hashable = None

    def __call__(self, unet: nn.Module, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """Returns ``unet(**inputs, return_dict=False)[0]``.

        Args:
            inputs: Tensors by name of the argument, all on the device of ``unet``, or None.
        """
        state = _state(unet)
        if state != self._state:
            self._graphs.clear()
            self._state = state
        key = tuple(
            (name, None if value is None else (value.shape, value.dtype, value.stride()))
            for name, value in inputs.items()
        )
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(unet, inputs)
            while len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for name, buffer in graph.inputs.items():
            value = inputs[name]
            if buffer is not None and value is not None:
                buffer.copy_(value)
        graph.replay()
        # a multistep scheduler keeps what it is given, and the next replay writes over the output
        return graph.output.clone()

    def _capture(self, unet: nn.Module, inputs: Mapping[str, Tensor | None]) -> _Graph:
        buffers: Inputs = {
            name: None if value is None else value.clone() for name, value in inputs.items()
        }

        def call() -> Tensor:
            return unet(**buffers, added_cond_kwargs={}, return_dict=False)[0]

        replay, output = self._record(call)
        return _Graph(replay, buffers, output)


class _CudaRecorder:
    """Captures on a stream of its own, all graphs in one memory pool: their outputs are cloned
    before another replays."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = call()
        return graph.replay, output


def _state(unet: nn.Module) -> Hashable:
    """What a recorded call depends on, beside its inputs and the weights' values."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return (
        tuple(_kind(module) for module in unet.modules()),
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors),
        unet.training,
    )


def _kind(module: Any) -> Hashable:
    kind = (
        type(module),
        type(getattr(module, "processor", None)),
        getattr(module, "spec", None),  # of the shift
        getattr(module, "placement", None),
    )
    if isinstance(scaling := getattr(module, "scaling", None), dict):  # a layer of peft's
        active = tuple(module.active_adapters), module.disable_adapters, module.merged
        return (*kind, *active, tuple(sorted(scaling.items())))
    return kind
