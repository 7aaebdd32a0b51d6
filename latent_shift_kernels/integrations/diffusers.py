"""diffusers' blocks on the fused operators, by exchanging classes in place.

A block keeps its submodules, parameter names, hooks and adapters; only its class, and that of its
two norms, changes, so the exchange is free, exact and reversible. The clip length is never stored:
a block is given frames (B*T, C, H, W) and a time embedding with one row per clip (B, D), and T is
the quotient.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from .. import functional
from ..modules import ShiftGroupNormSiLU
from ..spec import Placement, ShiftSpec


class ShiftResnetBlock2D(ResnetBlock2D):
    """A diffusers ``ResnetBlock2D`` whose residual branch carries a temporal shift, on fused
    operators.

    Made by :func:`shift_resnet_block`, never constructed. ``spec`` is None for a block without a
    shift, which still runs on the fused norms.
    """

    spec: ShiftSpec | None
    placement: Placement

    def forward(
        self, input_tensor: Tensor, temb: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        """As ``ResnetBlock2D.forward``.

        Args:
            input_tensor: Frames (B*T, C, H, W), channels_last preferred.
            temb: Time embedding (B, D), one row per clip.

        Raises:
            ValueError: If there is no time embedding to read the number of clips from, or it does
                not divide the batch.
        """
        num_frames = self._num_frames(input_tensor, temb)
        hidden_states = self.norm1(input_tensor, num_frames)

        resample = self.upsample or self.downsample
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
        hidden_states = self.norm2(hidden_states, num_frames, **modulation)
        hidden_states = self.conv2(self.dropout(hidden_states))

        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        if self.spec is not None and self.placement is Placement.BRANCH_OUTPUT:
            return functional.shift_add(
                input_tensor,
                hidden_states,
                self.spec,
                num_frames,
                scale=1.0 / self.output_scale_factor,
            )
        return (input_tensor + hidden_states) / self.output_scale_factor

    def _num_frames(self, input_tensor: Tensor, temb: Tensor | None) -> int:
        if temb is None:
            if self.spec is None:
                return 1
            raise ValueError(
                "a shifted ResnetBlock2D reads the number of clips from its time embedding, "
                "got temb=None"
            )
        frames, clips = input_tensor.shape[0], temb.shape[0]
        if frames % max(clips, 1):
            raise ValueError(
                f"{frames} frames do not split over the {clips} rows of the time embedding: "
                "pass one row per clip"
            )
        return frames // max(clips, 1) or 1


class ClipCrossAttention(Attention):
    """A diffusers ``Attention`` that reads the text once per clip: queries (B*T, S, C), text (B, L,
    D).

    The frames of a clip attend as one sequence (B, T*S, C), which is the same sum for every query,
    so keys and values are projected once per clip and the text is never copied per frame. Works
    under any attention processor. Made by :func:`share_text`, never constructed.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: object,
    ) -> Tensor:
        """As ``Attention.forward``, with B dividing the batch of ``hidden_states``."""
        text = encoder_hidden_states
        # IP-Adapter hands over (text, image embeddings).
        clips = (
            (text[0] if isinstance(text, tuple) else text).shape[0] if text is not None else None
        )
        frames = hidden_states.shape[0]
        if clips is not None and clips != frames:
            hidden_states = hidden_states.reshape(clips, -1, hidden_states.shape[-1])
        output = super().forward(
            hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
        )
        if clips is not None and clips != frames:
            output = output.reshape(frames, -1, output.shape[-1])
        return output


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
    if type(block) is not ResnetBlock2D:
        raise TypeError(f"expected a diffusers ResnetBlock2D, got {type(block).__name__}")
    if not isinstance(block.nonlinearity, nn.SiLU):
        raise ValueError(f"the fused norm applies SiLU, this block has {block.nonlinearity}")
    placement = Placement(placement)
    if spec is not None and spec.channels != shifted_channels(block, placement):
        raise ValueError(
            f"spec is for {spec.channels} channels, at {placement.value} this block has "
            f"{shifted_channels(block, placement)}"
        )
    block.__class__ = ShiftResnetBlock2D
    block.spec, block.placement = spec, placement
    for norm, at in (
        (block.norm1, {Placement.BLOCK_INPUT: "before", Placement.CONV1_INPUT: "after"}),
        (block.norm2, {Placement.CONV1_OUTPUT: "before"}),
    ):
        norm.__class__ = ShiftGroupNormSiLU
        norm.spec = spec if placement in at else None
        norm.shift = at.get(placement, "before")
        norm.num_frames = None
    return block


def restore_resnet_block(block: ShiftResnetBlock2D) -> ResnetBlock2D:
    """Takes :func:`shift_resnet_block` back, in place."""
    block.__class__ = ResnetBlock2D
    del block.spec, block.placement
    for norm in (block.norm1, block.norm2):
        norm.__class__ = nn.GroupNorm
        del norm.spec, norm.shift, norm.num_frames
    return block


def shifted_channels(block: ResnetBlock2D, placement: Placement) -> int:
    """The channel count of the tensor that a shift at ``placement`` moves in ``block``."""
    if placement in (Placement.BLOCK_INPUT, Placement.CONV1_INPUT):
        return block.norm1.num_channels
    return (
        block.conv2.out_channels
        if placement is Placement.BRANCH_OUTPUT
        else block.norm2.num_channels
    )


def share_text(model: nn.Module) -> None:
    """Lets every cross-attention of ``model`` take text (B, L, D) for frames (B*T, ...), in
    place."""
    for attention in _cross_attentions(model, Attention):
        attention.__class__ = ClipCrossAttention


def unshare_text(model: nn.Module) -> None:
    """Takes :func:`share_text` back, in place."""
    for attention in _cross_attentions(model, ClipCrossAttention):
        attention.__class__ = Attention


def _cross_attentions(model: nn.Module, kind: type[Attention]) -> Iterator[Attention]:
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock):
            for attention in (block.attn1, block.attn2):
                if type(attention) is kind:
                    yield attention
