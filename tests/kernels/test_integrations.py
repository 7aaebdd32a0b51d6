"""What a U-Net of ours shares and leaves out: projections of the text, intermediates of a block."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from latent_shift.unet import insert_shift

pytest.importorskip("triton")

CLIPS, FRAMES = 2, 3
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


class Plain:
    """A processor of somebody else's, which may look at several queries at a time."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor, Plain])
def test_text_is_projected_once_per_clip(processor):
    """Outputs and gradients are those of a text per frame, to rounding: the sums over the text are
    the same, over more queries at a time."""
    torch.manual_seed(0)
    unet = insert_shift(UNet2DConditionModel(**UNET).eval())
    rows = []
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn2.set_processor(processor())
            for projection in (block.attn2.to_k, block.attn2.to_v):
                projection.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    sample, steps = torch.randn(CLIPS, 4, FRAMES, 8, 8), torch.tensor([3, 700])
    text = torch.randn(CLIPS, 7, 24)

    def run(repeats):
        given = text.clone().requires_grad_()
        model = copy.deepcopy(unet)
        rows.clear()
        output = model(sample, steps, given.repeat_interleave(repeats, 0)).sample
        output.square().mean().backward()
        key = model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        return output.detach(), given.grad, key.grad, set(rows)

    *per_frame, rows_per_frame = run(FRAMES)
    *per_clip, rows_per_clip = run(1)
    torch.testing.assert_close(per_clip, per_frame, rtol=1e-4, atol=1e-6)
    assert rows_per_frame == {CLIPS * FRAMES}
    assert rows_per_clip == {CLIPS * FRAMES if processor is Plain else CLIPS}


def test_a_block_is_two_operators_where_a_kernel_holds_the_convolution():
    """In a process of its own, with Triton's kernel in the interpreter. A hook on a convolution
    brings the modules back."""
    script = """
import torch
from diffusers.models.resnet import ResnetBlock2D
from latent_shift_kernels import Placement, ShiftSpec, functional
from latent_shift_kernels.integrations.diffusers import shift_resnet_block, shifted_channels
calls, op = [], functional.shift_group_norm_silu_conv2d
functional.shift_group_norm_silu_conv2d = lambda *a, **k: calls.append(k) or op(*a, **k)
for placement in Placement:
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=8, out_channels=12, temb_channels=6, groups=4, groups_out=4,
        output_scale_factor=2.0,
        time_embedding_norm="scale_shift" if placement is Placement.CONV1_INPUT else "default",
    )
    spec = ShiftSpec.latent_shift(shifted_channels(block, placement))
    shift_resnet_block(block, spec, placement).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    temb = torch.randn(2, 6)
    def run():
        y = block(x, temb)
        return y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    got = run()
    assert len(calls) == 2
    hook = block.conv1.register_forward_hook(lambda *_: None)
    expected = run()
    assert len(calls) == 2, "a hook on a convolution was passed over"
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    calls.clear()
print("done")
"""
    told = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "LATENT_SHIFT_BACKEND": "triton,fused",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **told}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"
