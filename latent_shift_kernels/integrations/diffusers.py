"""diffusers' models on the fused operators: :func:`fuse`, :func:`unfuse`, and the shift inside a
ResNet block.

A block keeps its submodules, parameter names, hooks and adapters; only its class, and that of its
norms and activations, changes, so the exchange is free, exact and reversible. The clip length is
never stored: a shifted block is given frames (B*T, C, H, W) and a time embedding with one row per
clip (B, D), and T is the quotient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet3DConditionModel, UNetSpatioTemporalConditionModel
from diffusers.models import attention_processor as processors
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from diffusers.models.unets import unet_2d_blocks, unet_3d_blocks, unet_motion_model
from torch import Tensor, nn

from .. import backends, functional
from ..modules import ShiftGroupNormSiLU
from ..spec import Placement, ShiftSpec
from .fusion import (
    Describe,
    Fused,
    FusionReport,
    GroupNormSiLU,
    Joined,
    Plan,
    Site,
    Step,
    exchange,
    is_bare,
    itemsize,
    joined,
    left,
    obstacle,
    parts_of,
    plain_class,
    plan_norms,
    plan_shifts,
    runs_other_forward,
)
from .source import fingerprint

__all__ = [
    "FusionReport",
    "ShiftResnetBlock2D",
    "fuse",
    "fused",
    "recompute_activations",
    "restore_resnet_block",
    "share_inputs",
    "shift_resnet_block",
    "shifted_channels",
    "text_kept",
    "unfuse",
    "unshare_inputs",
]


class FusedResnetBlock2D(Fused, ResnetBlock2D):
    """A diffusers ``ResnetBlock2D`` on fused norms, and with a temporal shift where ``spec`` is
    given. Its class is given to blocks by exchange; it is never constructed."""

    plain = ResnetBlock2D
    spec: ShiftSpec | None = None
    placement: Placement | None = None
    recompute: bool = False

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: object, **kwargs: object
    ) -> Tensor:
        """As ``ResnetBlock2D.forward``.

        Args:
            input_tensor: Frames (B*T, C, H, W), channels_last preferred; hidden states and a skip
                input (:class:`Joined`) are brought together only where no operator reads both.
            temb: Time embedding, one row per clip (B, D), or without a shift also one per frame.

        Raises:
            ValueError: If there is a shift and no time embedding to read the number of clips from,
                or it does not divide the batch.
        """
        x, *skips = parts_of(input_tensor)
        num_frames = self._num_frames(x, temb)
        resample = self.upsample or self.downsample
        halves = resample is None and len(skips) < 2 and self._as_halves(x)
        if halves:
            skip = skips[0] if skips else None
            hidden_states = _half(self.norm1, self.conv1, x, num_frames, skip=skip)
        else:
            input_tensor = joined(input_tensor)
            hidden_states = self.norm1(input_tensor, num_frames)
            if resample is not None:
                input_tensor = resample(input_tensor)
                hidden_states = resample(hidden_states)
            hidden_states = self.conv1(hidden_states)

        modulation: dict[str, Tensor] = {}
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)
            if self.time_embedding_norm == "scale_shift":
                modulation["ada_scale"], modulation["ada_shift"] = temb.chunk(2, dim=1)
            else:
                modulation["temb"] = temb
        if not halves:
            hidden_states = self.norm2(hidden_states, num_frames, **modulation)
            hidden_states = self.conv2(self.dropout(hidden_states))

        if self.conv_shortcut is None:
            input_tensor = joined(input_tensor)
        elif isinstance(input_tensor, Joined) and _is_plain(self.conv_shortcut, 1):
            input_tensor = _pointwise(self.conv_shortcut, *input_tensor.parts)
        else:
            input_tensor = self.conv_shortcut(joined(input_tensor))
        if halves:
            return _half(
                self.norm2,
                self.conv2,
                hidden_states,
                num_frames,
                out_spec=self.spec if self.placement is Placement.BRANCH_OUTPUT else None,
                residual=input_tensor,
                scale=1.0 / self.output_scale_factor,
                **modulation,
            )
        if self.spec is not None and self.placement is Placement.BRANCH_OUTPUT:
            return functional.shift_add(
                input_tensor,
                hidden_states,
                self.spec,
                num_frames,
                scale=1.0 / self.output_scale_factor,
            )
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def _as_halves(self, x: Tensor) -> bool:
        """Whether the block is two calls of ``shift_group_norm_silu_conv2d``: where a kernel that
        holds the convolution serves this device, or the activation is to be computed again in
        backward, and nothing stands around the convolutions."""
        serving = backends.SERVING.get(x.device.type, {})
        composed = serving.get(backends.CONV2D, "composed") == "composed"
        if composed and not (self.recompute and torch.is_grad_enabled()):
            return False
        return self._has_bare_halves()

    def _has_bare_halves(self) -> bool:
        bare = is_bare(self.norm1) and is_bare(self.norm2)
        bare = bare and _is_plain(self.conv1, 3) and _is_plain(self.conv2, 3)
        return bare and not (self.training and self.dropout.p > 0)

    def _num_frames(self, x: Tensor, temb: Tensor | None) -> int:
        if self.spec is None:
            return 1
        if temb is None:
            raise ValueError(
                "a shifted ResnetBlock2D reads the number of clips from its time embedding, "
                "got temb=None"
            )
        frames, clips = x.shape[0], temb.shape[0]
        if frames % max(clips, 1):
            raise ValueError(
                f"{frames} frames do not split over the {clips} rows of the time embedding: "
                "pass one row per clip"
            )
        return frames // max(clips, 1) or 1

    @staticmethod
    def parts(block: ResnetBlock2D) -> tuple[str, int]:
        """What the class fuses in ``block``, and the elements per pixel that it need not move."""
        channels1, channels2 = block.norm1.num_channels, block.norm2.num_channels
        parts, moved = ["norm1 + silu", "norm2 + silu"], 2 * (channels1 + channels2)
        if block.time_emb_proj is not None:
            ada = block.time_embedding_norm == "scale_shift"
            parts[1] = "norm2 + scale, shift + silu" if ada else "temb + norm2 + silu"
            moved += (4 if ada else 2) * channels2
        if block.output_scale_factor == 1:
            # diffusers divides by it all the same
            moved += 2 * block.conv2.weight.shape[0]
        if isinstance(block, ShiftResnetBlock2D):
            parts.append("temporal shift")
        return ", ".join(parts), moved


def _half(norm: Any, conv: nn.Conv2d, x: Tensor, num_frames: int, **tensors: Any) -> Any:
    """Norm, activation and convolution of a block as one operator."""
    return functional.shift_group_norm_silu_conv2d(
        x,
        norm.weight,
        norm.bias,
        norm.num_groups,
        conv.weight,
        conv.bias,
        norm.eps,
        spec=norm.spec,
        shift=norm.shift,
        num_frames=num_frames,
        **tensors,
    )


def _is_plain(conv: nn.Module, side: int) -> bool:
    """Whether ``conv`` is a bare convolution of ``side`` x ``side`` that keeps the size of an image
    by zeros."""
    return (
        type(conv) is nn.Conv2d
        and is_bare(conv)
        and conv.kernel_size == (side, side)
        and conv.padding == (side // 2, side // 2)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _pointwise(conv: Any, x: Tensor, skip: Tensor) -> Tensor:
    """``conv``, 1x1, over the channels of ``x`` and ``skip``; channels_last without a copy."""
    filters = conv.weight.flatten(1).split((x.shape[1], skip.shape[1]), 1)
    out = F.linear(x.movedim(1, -1), filters[0], conv.bias)  # (N, H, W, Cout)
    # The second product adds itself to the first: a sum of two would move three more tensors.
    rows = skip.movedim(1, -1).flatten(0, 2).to(out.dtype)
    out.view(-1, out.shape[-1]).addmm_(rows, filters[1].t().to(out.dtype))
    return out.movedim(-1, 1)


class ShiftResnetBlock2D(FusedResnetBlock2D):
    """A diffusers ``ResnetBlock2D`` whose residual branch carries a temporal shift, on fused
    operators. Made by :func:`shift_resnet_block`, never constructed.

    ``unshifted`` is the class without the shift: ``ResnetBlock2D``, or ``FusedResnetBlock2D`` where
    the model is fused.
    """

    unshifted: type[ResnetBlock2D]


class FusedTemporalResnetBlock(Fused, TemporalResnetBlock):
    """Stable Video Diffusion's temporal block on fused norms, for clips (B, C, T, H, W)."""

    plain = TemporalResnetBlock

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """As ``TemporalResnetBlock.forward``."""
        hidden_states = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None:
            # One row per frame, while a norm's statistics run over the clip: added on its own.
            temb = self.time_emb_proj(self.nonlinearity(temb))
            hidden_states = hidden_states + temb.transpose(1, 2)[..., None, None]
        hidden_states = self.conv2(self.dropout(self.norm2(hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden_states

    @staticmethod
    def parts(block: TemporalResnetBlock) -> tuple[str, int]:
        """As :meth:`FusedResnetBlock2D.parts`."""
        moved = 2 * (block.norm1.num_channels + block.norm2.num_channels)
        return "norm1 + silu, norm2 + silu", moved


BLOCKS: dict[type[nn.Module], Any] = {
    ResnetBlock2D: FusedResnetBlock2D,
    TemporalResnetBlock: FusedTemporalResnetBlock,
}
"""Blocks whose forward is replaced. Everything else is found by :func:`fusion.plan_norms`."""
_BLOCKS = tuple(BLOCKS)

KNOWN_FORWARDS: dict[type[nn.Module], set[str]] = {
    ResnetBlock2D: {"cc809f96f5b1"},
    TemporalResnetBlock: {"1df39ae55ba8"},
    UNet3DConditionModel: {"6e026eb44033"},
}
"""Fingerprints of the forwards that this file stands for or relies on, over the supported releases
of diffusers (0.40 to 0.42)."""

# Processors that treat every query on its own.
_PROCESSORS = tuple(
    getattr(processors, name)
    for name in (
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )
)


def fuse(
    model: nn.Module,
    *,
    shifts: Mapping[type[nn.Module], Describe] | None = None,
    strict: bool = False,
) -> FusionReport:
    """Puts a model on the fused operators, in place: the same parameters, the same results, less
    memory traffic.

    Fused are the ResNet blocks of diffusers, every GroupNorm directly followed by SiLU in any
    module, the shift modules that ``shifts`` names, and, where a clip shares its text, the
    projections of the text. What carries hooks inside, or is not known well enough, is left alone.

    Args:
        model: Any module tree: ``UNet2DConditionModel``, ``UNet2DModel``, ``UNet3DConditionModel``,
            ``UNetMotionModel``, ``UNetSpatioTemporalConditionModel``, ControlNets,
            ``AutoencoderKL``, your own.
        shifts: Your own shift modules: class -> ``describe(module, channels)``, which returns the
            :class:`ShiftSpec` and the number of frames of a clip. Such a module takes frames
            (N*T, C, H, W), shifts them, and hands them to its one child, if it has one.
        strict: Whether to raise where something would be left.

    Returns:
        The report, which prints as a table. Fusing twice changes nothing and reports the same.

    Raises:
        ValueError: If ``strict`` and something would be left; the model is then untouched.

    Example:
        >>> unet = UNet3DConditionModel.from_pretrained("text-to-video", subfolder="unet")
        >>> print(fuse(unet))
    """
    plan = [*_plan_blocks(model), *plan_shifts(model, shifts or {})]
    taken = {module for module in model.modules() if isinstance(module, _BLOCKS)}
    plan += plan_norms(model, taken)
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    plan.sort(key=lambda entry: order[entry[0].name])
    text, notes = _plan_text(model)
    plan += text
    report = FusionReport(site for site, _ in plan)
    report.notes = (*_norm_notes(model, plan), *notes)
    if strict and report.left:
        reasons = "\n".join(f"  {site.name} ({site.block}): {site.what}" for site in report.left)
        raise ValueError(f"fuse(strict=True): {len(report.left)} would be left\n{reasons}")
    _apply([*(step for _, steps in plan for step in steps), *_joining_steps(model)])
    for module in model.modules():
        if isinstance(module, ShiftResnetBlock2D):
            module.unshifted = FusedResnetBlock2D
        elif text and repeats_text(module) and not _text_hooks(module):
            module.register_forward_pre_hook(_tell_repeats, with_kwargs=True)
    return report


def unfuse(model: nn.Module) -> None:
    """Takes :func:`fuse` back, in place and exactly; a shift that was inserted stays."""
    _unfuse(model, model.modules())


@contextlib.contextmanager
def fused(
    model: nn.Module,
    *,
    shifts: Mapping[type[nn.Module], Describe] | None = None,
    strict: bool = False,
) -> Iterator[FusionReport]:
    """:func:`fuse` for the length of a ``with`` block; what was fused before stays so after it."""
    before = {module for module in model.modules() if _is_fused(module) or _shares(module)}
    report = fuse(model, shifts=shifts, strict=strict)
    try:
        yield report
    finally:
        added = [module for module in model.modules() if module not in before]
        _unfuse(model, added)
        _unshare(added)


def _plan_blocks(model: nn.Module) -> Plan:
    block: Any
    for name, block in model.named_modules():
        if not isinstance(block, _BLOCKS):
            continue
        kind = plain_class(block)
        why = refusal(block)
        if why:
            yield left(name, kind.__name__, why)
            continue
        cls = BLOCKS[kind]
        parts, moved = cls.parts(block)
        steps: Any = ()
        if not isinstance(block, ShiftResnetBlock2D):
            steps = (block, cls), (block.norm1, GroupNormSiLU), (block.norm2, GroupNormSiLU)
        yield Site(name, kind.__name__, True, parts, moved * itemsize(block)), steps


def refusal(block: Any) -> str | None:
    """Why the forward of ``block`` cannot be replaced, if it cannot."""
    if isinstance(block, ShiftResnetBlock2D):
        return None
    kind = plain_class(block)
    if kind not in BLOCKS:
        return f"a subclass of {kind.__mro__[1].__name__}, with a forward of its own"
    if runs_other_forward(block):
        return "its forward was replaced"
    return (
        _unknown_forward(kind)
        or obstacle("nonlinearity", block.nonlinearity, nn.SiLU)
        or obstacle("norm1", block.norm1, nn.GroupNorm)
        or obstacle("norm2", block.norm2, nn.GroupNorm)
    )


def _unknown_forward(kind: Any) -> str | None:
    if fingerprint(kind.forward) in KNOWN_FORWARDS[kind]:
        return None
    return (
        f"{kind.__name__}.forward of diffusers {diffusers.__version__} is not known to this "
        "release of latent-shift: update it"
    )


def _norm_notes(model: nn.Module, plan: list) -> Iterator[str]:
    planned = {module for _, steps in plan for module, _ in steps}
    alone = [
        module
        for module in model.modules()
        if plain_class(module) is nn.GroupNorm and module not in planned
    ]
    if alone:
        yield f"{len(alone)} GroupNorms as they were: left above, or not followed by SiLU"


def _apply(steps: Iterable[Step]) -> None:
    """All exchanges or none."""
    done: list[Step] = []
    try:
        for module, cls in steps:
            if type(module) is not cls:
                done.append((module, type(module)))
                exchange(module, cls)
    except BaseException:
        for module, cls in reversed(done):
            exchange(module, cls)
        raise


def _is_fused(module: nn.Module) -> bool:
    if isinstance(module, ShiftResnetBlock2D):
        return issubclass(module.unshifted, Fused)
    return isinstance(module, Fused)


def _unfuse(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    for module in list(modules):
        if isinstance(module, FusedResnetBlock2D):
            module.__dict__.pop("recompute", None)
        if isinstance(module, ShiftResnetBlock2D):
            module.unshifted = ResnetBlock2D
        elif isinstance(module, Fused):
            exchange(module, module.plain)
    unshare_inputs(model)


class ClipCrossAttention(Attention):
    """A diffusers ``Attention`` that reads the text once per clip: queries (B*T, S, C), text (B, L,
    D).

    The frames of a clip attend as one sequence (B, T*S, C), which is the same sum for every query,
    so keys and values are projected once per clip and the text is never copied per frame. Under a
    processor that may look at more than one query at a time, the text is repeated instead. Made by
    :func:`share_inputs`, never constructed.
    """

    plain = Attention

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple | None = None,
        attention_mask: Tensor | None = None,
        *,
        frames_per_text: int = 1,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """As ``Attention.forward``, with B dividing the batch of ``hidden_states``.

        Args:
            frames_per_text: How often each row of the text was repeated by the model.
        """
        text, frames = encoder_hidden_states, hidden_states.shape[0]
        by_query = isinstance(self.processor, _PROCESSORS) and not cross_attention_kwargs.get(
            "ip_adapter_masks"
        )
        if isinstance(text, Tensor) and frames_per_text > 1 and attention_mask is None and by_query:
            text = text[::frames_per_text]
        # IP-Adapter hands over (text, image embeddings).
        rows = frames if text is None else (text[0] if isinstance(text, tuple) else text).shape[0]
        if rows != frames and by_query:
            hidden_states = hidden_states.reshape(rows, -1, hidden_states.shape[-1])
        elif rows != frames:
            text, attention_mask = _repeat((text, attention_mask), frames // rows)
        output = super().forward(hidden_states, text, attention_mask, **cross_attention_kwargs)
        return output.reshape(frames, -1, output.shape[-1])


class JoiningUpBlock:
    """A block of diffusers' decoders whose ResNet blocks are handed hidden states and skip input as
    they are, where an operator reads both, and not as the copy that ``torch.cat`` makes. Made by
    :func:`share_inputs`, never constructed."""

    plain: ClassVar[type[nn.Module]]

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # A compiler makes the copy part of what reads it.
        # To a checkpoint that runs it twice it has to be one tensor.
        twice = getattr(self, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if not (torch.compiler.is_compiling() or twice) and all(
            isinstance(resnet, FusedResnetBlock2D)
            and resnet._as_halves(hidden_states)
            and not obstacle("", resnet, ResnetBlock2D)
            for resnet in self.resnets  # type: ignore[attr-defined]
        ):
            skips: Any = tuple(map(Joined, res_hidden_states_tuple))
            res_hidden_states_tuple = skips
        return super().forward(  # type: ignore[misc]
            hidden_states, res_hidden_states_tuple, *args, **kwargs
        )


def _joining(plain: type[nn.Module]) -> type[nn.Module]:
    names = {"plain": plain, "__module__": __name__, "__doc__": JoiningUpBlock.__doc__}
    return type(f"Joining{plain.__name__}", (JoiningUpBlock, plain), names)


_JOINING = {
    plain: _joining(plain)
    for plain in (
        unet_2d_blocks.UpBlock2D,
        unet_2d_blocks.AttnUpBlock2D,
        unet_2d_blocks.CrossAttnUpBlock2D,
        unet_3d_blocks.UpBlock3D,
        unet_3d_blocks.CrossAttnUpBlock3D,
        unet_motion_model.UpBlockMotion,
        unet_motion_model.CrossAttnUpBlockMotion,
    )
}
# Where pickle looks for them.
globals().update({cls.__name__: cls for cls in _JOINING.values()})


def _repeat(rows: Any, count: int) -> Any:
    if isinstance(rows, Tensor):
        return rows.repeat_interleave(count, dim=0)
    return rows if rows is None else type(rows)(_repeat(row, count) for row in rows)


class _Kept:
    """A forward that does not run again for the tensor that it ran for last."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, text: Tensor) -> Tensor:
        if self._last is None or text is not self._last[0]:
            self._last = text, self._forward(text)
        return self._last[1]

    def forget(self) -> None:
        self._last = None


@contextlib.contextmanager
def text_kept(model: nn.Module) -> Iterator[Callable[[], None]]:
    """For the denoising steps of one clip: in the ``with`` block every cross-attention projects a
    text to keys and values once, and uses them again whenever it is given that very tensor.

    Processors that make the text anew in every call project it every time, and a compiled model
    does all it did.

    Args:
        model: A diffusers model, fused, shifted or plain, whose text is (B, L, D).

    Yields:
        A function to call where the text or a weight may have changed in place.

    Raises:
        RuntimeError: If gradients are recorded: they would reach the first call only.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("text_kept is for sampling: use it under torch.no_grad()")
    compiled = any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )
    projections = [
        getattr(attention, name)
        for attention in _attentions(model)
        if attention.is_cross_attention and not compiled
        for name in ("to_k", "to_v", "to_kv")
        if getattr(attention, name, None) is not None
    ]
    own = [vars(projection).get("forward") for projection in projections]
    kept = [_Kept(projection.forward) for projection in projections]
    for projection, forward in zip(projections, kept, strict=True):
        projection.forward = forward

    def forget() -> None:
        for forward in kept:
            forward.forget()

    try:
        yield forget
    finally:
        for projection, forward in zip(projections, own, strict=True):
            del projection.forward
            if forward is not None:
                projection.forward = forward


def _plan_text(model: nn.Module) -> tuple[list, list[str]]:
    attentions = list(_attentions(model))
    cross = sum(attention.is_cross_attention for attention in attentions)
    if not cross:
        return [], []
    if any(isinstance(module, UNetSpatioTemporalConditionModel) for module in model.modules()):
        why = "UNetSpatioTemporalConditionModel repeats its context inside and tells no one"
        return [], [f"keys and values of the context are projected once per frame: {why}"]
    name, what = f"{cross} cross-attentions", "keys and values once per row of the text"
    for module in model.modules():
        if isinstance(module, UNet3DConditionModel):
            if unknown := _unknown_forward(UNet3DConditionModel):
                return [left(name, "Attention", unknown)], []
            what = "keys and values once per clip"
    steps = tuple((attention, ClipCrossAttention) for attention in attentions)
    return [(Site(name, "Attention", True, what), steps)], []


def repeats_text(module: nn.Module) -> bool:
    """Whether ``module`` is a model that repeats the text for every frame inside."""
    return type(module) is UNet3DConditionModel


def _tell_repeats(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Lets the cross-attentions of a model that repeats the text know how often."""
    sample = args[0] if args else kwargs["sample"]
    # The seventh positional argument would be these.
    if len(args) > 6:
        return args, kwargs
    told = {**(kwargs.get("cross_attention_kwargs") or {}), "frames_per_text": sample.shape[2]}
    return args, {**kwargs, "cross_attention_kwargs": told}


def _text_hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _tell_repeats]


def shift_resnet_block(
    block: ResnetBlock2D,
    spec: ShiftSpec | None,
    placement: Placement | str = Placement.BRANCH_OUTPUT,
) -> ShiftResnetBlock2D:
    """Puts ``block`` on the fused operators, in place, with a shift of ``spec`` at ``placement``.

    Args:
        block: A pre-norm SiLU block; parameters, hooks and adapters stay as they are.
        spec: What moves where, or None for no shift. Its channels are the block's output channels
            for ``branch_output`` and ``conv1_output``, its input channels for ``conv1_input`` and
            ``block_input``.
        placement: See :class:`Placement`.

    Returns:
        ``block`` itself. :func:`restore_resnet_block` takes it back.

    Raises:
        TypeError: If ``block`` is not a ``ResnetBlock2D`` (or is one already exchanged).
        ValueError: If its activation is not SiLU, or ``spec`` is for another channel count.
    """
    if type(block) not in (ResnetBlock2D, FusedResnetBlock2D):
        raise TypeError(f"expected a diffusers ResnetBlock2D, got {type(block).__name__}")
    if why := refusal(block):
        raise ValueError(f"this ResnetBlock2D cannot be put on the fused operators: {why}")
    placement = Placement(placement)
    if spec is not None and spec.channels != shifted_channels(block, placement):
        raise ValueError(
            f"spec is for {spec.channels} channels, at {placement.value} this block has "
            f"{shifted_channels(block, placement)}"
        )
    unshifted = type(block)
    exchange(block, ShiftResnetBlock2D)
    block.unshifted, block.spec, block.placement = unshifted, spec, placement
    for norm, at in (
        (block.norm1, {Placement.BLOCK_INPUT: "before", Placement.CONV1_INPUT: "after"}),
        (block.norm2, {Placement.CONV1_OUTPUT: "before"}),
    ):
        exchange(norm, ShiftGroupNormSiLU)
        norm.spec = spec if placement in at else None
        norm.shift = at.get(placement, "before")
        norm.num_frames = None
    return block


def restore_resnet_block(block: ShiftResnetBlock2D) -> ResnetBlock2D:
    """Takes :func:`shift_resnet_block` back, in place."""
    unshifted = block.unshifted
    exchange(block, unshifted)
    del block.unshifted, block.spec, block.placement
    if unshifted is ResnetBlock2D:
        block.__dict__.pop("recompute", None)
    for norm in (block.norm1, block.norm2):
        exchange(norm, GroupNormSiLU if unshifted is FusedResnetBlock2D else nn.GroupNorm)
        del norm.spec, norm.shift, norm.num_frames
    return block


def shifted_channels(block: ResnetBlock2D, placement: Placement) -> int:
    """The channel count of the tensor that a shift at ``placement`` moves in ``block``."""
    if placement in (Placement.BLOCK_INPUT, Placement.CONV1_INPUT):
        return block.norm1.num_channels
    return (
        block.conv2.weight.shape[0]
        if placement is Placement.BRANCH_OUTPUT
        else block.norm2.num_channels
    )


def recompute_activations(model: nn.Module, enabled: bool = True) -> int:
    """Lets the ResNet blocks of a fused or shifted model compute norm and activation again in the
    backward pass, in place: they then keep the inputs of their two norms and nothing else, half of
    what they do otherwise, for one more pass of each norm. Results and gradients stay what they
    are; where autocast meets a wider input, the block's result has autocast's dtype.

    Args:
        model: After :func:`fuse` or a shift; :func:`unfuse` ends it, and so does taking a shift
            back.
        enabled: False takes it back.

    Returns:
        The number of blocks that do so now; one that carries hooks or adapters on its norms and
        convolutions, drops activations, resamples, or has convolutions of another kind keeps what
        it kept.

    Raises:
        ValueError: If no ResNet block of ``model`` is fused or shifted.
    """
    blocks = [module for module in model.modules() if isinstance(module, FusedResnetBlock2D)]
    if not blocks:
        raise ValueError(
            "no ResNet block of this model is fused or shifted: call fuse or insert_shift first"
        )
    for block in blocks:
        block.recompute = enabled
    return sum(
        enabled and not (block.upsample or block.downsample) and block._has_bare_halves()
        for block in blocks
    )


def share_inputs(model: nn.Module) -> None:
    """Spares ``model`` copies of what its blocks are given, in place: every cross-attention takes
    text (B, L, D) for frames (B*T, ...), and decoder blocks are :class:`JoiningUpBlock`."""
    _apply((attention, ClipCrossAttention) for attention in _attentions(model))
    _apply(_joining_steps(model))


def unshare_inputs(model: nn.Module) -> None:
    """Takes :func:`share_inputs` back, in place, once nothing in ``model`` is fused or shifted any
    more."""
    if not any(isinstance(module, Fused) for module in model.modules()):
        _unshare(model.modules())


def _joining_steps(model: nn.Module) -> Iterator[Step]:
    for block in model.modules():
        if type(block) in _JOINING:
            yield block, _JOINING[type(block)]


def _shares(module: nn.Module) -> bool:
    return isinstance(module, (ClipCrossAttention, JoiningUpBlock)) or bool(_text_hooks(module))


def _unshare(modules: Iterable[nn.Module]) -> None:
    for module in filter(_shares, list(modules)):
        for key in _text_hooks(module):
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        if isinstance(module, (ClipCrossAttention, JoiningUpBlock)):
            exchange(module, module.plain)


def _attentions(model: nn.Module) -> Iterator[Attention]:
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock):
            for attention in (block.attn1, block.attn2):
                if type(attention) in (Attention, ClipCrossAttention):
                    yield attention
