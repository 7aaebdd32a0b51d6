"""How a module tree is put on the fused operators and taken back: by exchanging classes in place.

A fused class is a subclass of the one it stands for, or of its base, with another ``forward``.
Exchanging ``module.__class__`` moves no parameter, so names, state dicts, hooks, adapters, copies
and pickles stay what they were, and exchanging it back is exact. This file knows torch alone: the
norms, activations and shifts that any network is made of, and the report. The blocks of diffusers
are in :mod:`.diffusers`.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..modules import ShiftGroupNormSiLU
from ..spec import ShiftSpec
from .source import activated

Describe = Callable[[Any, int], tuple[ShiftSpec, int]]
"""What a user says of a shift module: ``describe(module, channels)`` is the shift of a tensor of
``channels`` channels and the number of frames of a clip."""


class Fused:
    """Marks the classes that stand for another one, ``plain``, until they are exchanged back."""

    plain: ClassVar[type[nn.Module]]


class GroupNormSiLU(Fused, ShiftGroupNormSiLU):
    """A ``torch.nn.GroupNorm`` that applies the SiLU behind it: any input (N, C, ...), one pass."""

    plain = nn.GroupNorm
    spec = None
    shift = "before"
    num_frames = None

    def forward(  # type: ignore[override]
        self, x: Tensor, num_frames: int | None = None, **tables: Tensor
    ) -> Any:
        """``silu(group_norm(x))``; ``tables`` as in :class:`ShiftGroupNormSiLU`."""
        if x.dim() == 4:
            return super().forward(x, 1, **tables)
        # The statistics run over all trailing axes, which the operator calls height and width.
        # Clips (B, C, T, H, W) of channels_last frames are (B, C, T*H, W) without a copy.
        flat = x.flatten(2, -2) if x.dim() > 4 else x[(...,) + (None,) * (4 - x.dim())]
        y: Any = super().forward(flat, 1, **tables)
        return y.view(x.shape)

    extra_repr = nn.GroupNorm.extra_repr


class AppliedSiLU(Fused, nn.SiLU):
    """The SiLU that the norm before it has applied: hands its input on."""

    plain = nn.SiLU

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedShift(Fused):
    """A user's shift module on ``temporal_shift``; the classes are made by :func:`shift_class`."""

    describe: ClassVar[Any]

    def forward(self, x: Tensor) -> Tensor:
        """Shifts frames (N*T, C, H, W), and hands them to the one child, if there is one."""
        spec, num_frames = self.describe(self, x.shape[1])
        x = functional.temporal_shift(x, spec, num_frames)
        for inner in self.children():  # type: ignore[attr-defined]
            x = inner(x)
        return x

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self.plain, type(self).describe), self.__dict__


class Joined:
    """Tensors (N, C_i, H, W) whose channels stand for those of one: what ``torch.cat`` along
    channels makes of a tensor and one of these, without the copy. To everything else it is that
    copy."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat and (*args[1:], *kwargs.values()) == (1,):
            return cls(*(part for tensor in args[0] for part in parts_of(tensor)))
        if func is torch.cat:
            args = [joined(tensor) for tensor in args[0]], *args[1:]
        return func(*map(joined, args), **{name: joined(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask for, before there are parts
            raise AttributeError(name)
        return getattr(joined(self), name)


def parts_of(tensor: Any) -> tuple[Tensor, ...]:
    """The tensors that ``tensor`` is made of."""
    return tensor.parts if isinstance(tensor, Joined) else (tensor,)


def joined(value: Any) -> Any:
    """``value``, as one tensor if it is :class:`Joined`."""
    if not isinstance(value, Joined):
        return value
    return value.parts[0] if len(value.parts) == 1 else torch.cat(value.parts, 1)


@functools.cache
def shift_class(plain: Any, describe: Describe) -> type[FusedShift]:
    """The subclass of a user's shift class that runs on our operator."""
    names = {"plain": plain, "describe": staticmethod(describe), "__module__": plain.__module__}
    return type(f"Fused{plain.__name__}", (FusedShift, plain), names)


def _rebuild(plain: Any, describe: Describe) -> FusedShift:
    cls = shift_class(plain, describe)
    return cls.__new__(cls)


@dataclass(frozen=True)
class Site:
    """A place that can be fused: one line of the report.

    Attributes:
        name: The module's name in the tree.
        block: Its class, as the user wrote it.
        fused: Whether it is.
        what: What was fused, or why it was left.
        bytes_saved: Memory traffic saved per pixel and frame in one forward pass: the elements that
            separate modules read and write between them and the fused operator does not.
    """

    name: str
    block: str
    fused: bool
    what: str
    bytes_saved: int = 0


Step = tuple[nn.Module, type]
Plan = Iterator[tuple[Site, tuple[Step, ...]]]
"""Places, each with the modules that get another class."""


def left(name: str, block: str, why: str) -> tuple[Site, tuple[Step, ...]]:
    return Site(name, block, False, why), ()


class FusionReport(tuple[Site, ...]):
    """What :func:`fuse` did to every place it knows, in the order of the model. Prints as a
    table."""

    notes: tuple[str, ...] = ()

    @property
    def fused(self) -> tuple[Site, ...]:
        return tuple(site for site in self if site.fused)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self if not site.fused)

    def __str__(self) -> str:
        rows = [("module", "block", "fused", "bytes/pixel")]
        for site in self:
            what = site.what if site.fused else f"left: {site.what}"
            rows.append((site.name, site.block, what, str(site.bytes_saved or "")))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {block:<{widths[1]}}  {what:<{widths[2]}}  {saved:>11}".rstrip()
            for name, block, what, saved in rows
        ]
        total = f"{len(self.fused)} fused, {len(self.left)} left"
        return "\n".join([*lines, total, *self.notes])


def exchange(module: nn.Module, cls: type) -> None:
    """Gives ``module`` another class, in place, and hooks that wrap its forward the new one."""
    old = type(module).forward
    module.__class__ = cls
    for holder, name in _forwards(module):
        if getattr(holder.get(name), "__func__", None) is old:
            holder[name] = types.MethodType(cls.forward, module)  # type: ignore[attr-defined]


def plain_class(module: Any) -> type[nn.Module]:
    """The class that ``module`` has where it is not fused."""
    return module.plain if isinstance(module, Fused) else type(module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def obstacle(name: str, module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why the ``kind`` called ``name`` cannot be merged with its neighbour, if it cannot."""
    if plain_class(module) is not kind:
        return f"{name} is {type(module).__name__}, not {kind.__name__}"
    if any(getattr(module, hook) for hook in _HOOKS):
        return f"{name} carries hooks, which would see another tensor"
    if runs_other_forward(module):
        return f"the forward of {name} was replaced"
    return None


def is_bare(module: nn.Module) -> bool:
    """Whether reading the parameters of ``module`` is as good as calling it: nobody hooks or wraps
    it, be it to bring its parameters from elsewhere."""
    own = vars(module)
    wrapped = "forward" in own or "_conv_forward" in own
    return not (wrapped or any(own[hooks] for hooks in _HOOKS))


def runs_other_forward(module: nn.Module) -> bool:
    """Whether something other than the class's forward runs: not so where accelerate or diffusers
    wrap it."""
    if "forward" not in vars(module):
        return False
    own = type(module).forward
    return not any(
        getattr(holder.get(name), "__func__", None) is own for holder, name in _forwards(module)
    )


def _forwards(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """The places beside its class that keep a forward of ``module``."""
    yield vars(module), "forward"
    # accelerate.hooks.add_hook_to_module
    yield vars(module), "_old_forward"
    # diffusers.hooks.HookRegistry
    for reference in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ()):
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"


def itemsize(module: nn.Module) -> int:
    """Bytes of an element of ``module``'s activations, taken to be those of its parameters."""
    return next((p.element_size() for p in module.parameters() if p.is_floating_point()), 4)


def plan_shifts(model: nn.Module, shifts: Mapping[type[nn.Module], Describe]) -> Plan:
    """The shift modules that the user named."""
    for name, module in model.named_modules():
        describe = shifts.get(plain_class(module))
        if describe is None:
            continue
        block = plain_class(module).__name__
        if runs_other_forward(module):
            yield left(name, block, "its forward was replaced")
        elif len(list(module.children())) > 1:
            yield left(name, block, "a shift module has one child or none")
        else:
            fused = shift_class(plain_class(module), describe)  # type: ignore[arg-type]
            yield Site(name, block, True, "temporal shift"), ((module, fused),)


def plan_norms(model: nn.Module, taken: set[nn.Module]) -> Plan:
    """Every SiLU that is applied to fresh outputs of GroupNorms and to nothing else, in modules
    other than ``taken``."""
    parents = collections.Counter(
        id(child) for module in model.modules() for child in module._modules.values()
    )

    def why_not(name: str, child: nn.Module) -> str | None:
        if parents[id(child)] > 1:
            return f"{name} is shared with another module"
        return obstacle(name, child, plain_class(child))

    for name, module in model.named_modules():
        children = dict(module.named_children())
        kinds = {child: plain_class(module) for child, module in children.items()}
        if module in taken or not {nn.GroupNorm, nn.SiLU} <= set(kinds.values()):
            continue
        block, found = type(module).__name__, False
        for norms, silu in _activated(module):
            if kinds.get(silu) is not nn.SiLU or {kinds.get(n) for n in norms} != {nn.GroupNorm}:
                continue
            found = True
            numbered = isinstance(module, nn.Sequential)
            path = name if numbered else ".".join(filter(None, (name, norms[0])))
            reasons = [
                why for member in (*norms, silu) if (why := why_not(member, children[member]))
            ]
            if reasons:
                yield left(path, block, reasons[0])
                continue
            steps: list[Step] = [(children[norm], GroupNormSiLU) for norm in norms]
            channels = sum(norm.num_channels for norm, _ in steps)  # type: ignore[misc]
            what = ", ".join(f"{'norm' if numbered else norm} + silu" for norm in norms)
            # What SiLU alone would read and write.
            saved = 2 * channels * itemsize(module)
            yield Site(path, block, True, what, saved), (*steps, (children[silu], AppliedSiLU))
        if not found and not isinstance(module, nn.Sequential):
            yield left(name, block, "forward does not apply SiLU to GroupNorms alone")


def _activated(module: nn.Module) -> list[tuple[tuple[str, ...], str]]:
    """As :func:`source.activated`, for the class of ``module`` and all its methods."""
    if runs_other_forward(module):
        return []
    if type(module).forward is nn.Sequential.forward:
        return [((first,), second) for first, second in itertools.pairwise(module._modules)]
    forward, elsewhere = None, set[str]()
    for base in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if not isinstance(method, types.FunctionType) or name == "__init__":
                continue
            code = inspect.unwrap(method).__code__
            # The first forward that does not hand over to the one of its base, by super().
            if name == "forward" and forward is None and "__class__" not in code.co_freevars:
                forward = method
            else:
                elsewhere.update(code.co_names)
    if forward is None:
        return []
    return [pair for pair in activated(forward) if elsewhere.isdisjoint((*pair[0], pair[1]))]
