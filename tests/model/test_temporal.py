"""Latent-VDM's layers: nothing at first, then between the frames of a clip and nowhere else."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel

from latent_shift.temporal import (
    LatentVDMUNet,
    TemporalAttention,
    TemporalConv,
    insert_temporal_layers,
)
from latent_shift.unet import ShiftConfig, insert_shift

from .test_unet import TINY, inputs


@pytest.fixture(scope="module")
def image() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


@pytest.fixture(scope="module")
def trained(image) -> LatentVDMUNet:
    """A U-Net whose temporal layers have left their start."""
    unet = insert_temporal_layers(copy.deepcopy(image))
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, TemporalConv | TemporalAttention):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


@torch.no_grad()
def test_new_layers_change_nothing(image):
    sample, timestep, text = inputs()
    frames = [image(frame, timestep, text).sample for frame in sample.unbind(2)]
    unet = insert_temporal_layers(copy.deepcopy(image))
    assert type(unet) is LatentVDMUNet
    torch.testing.assert_close(unet(sample, timestep, text).sample, torch.stack(frames, dim=2))
    assert not set(image.state_dict()) - set(unet.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("kind", [TemporalConv, TemporalAttention])
def test_each_layer_joins_the_frames_of_a_clip_alone(trained, kind):
    layer = next(module for module in trained.modules() if isinstance(module, kind))
    channels = len(layer.bias if kind is TemporalConv else layer.norm.bias)
    frames = torch.randn(2 * 4, channels, 3, 5)
    plain = layer(frames, 2)
    last = layer(frames.contiguous(memory_format=torch.channels_last), 2)
    torch.testing.assert_close(last, plain)
    assert last.is_contiguous(memory_format=torch.channels_last)
    changed = frames.clone()
    changed[2] = torch.randn_like(changed[2])  # a constant would not pass the LayerNorm
    moved = (layer(changed, 2) - plain).flatten(1).abs().amax(1) > 1e-6
    reach = [False, True, True, True] if kind is TemporalConv else [True] * 4
    assert moved.tolist() == reach + [False] * 4


@torch.no_grad()
def test_saves_and_loads_in_a_fresh_process(trained, tmp_path):
    trained.save_pretrained(tmp_path / "unet")
    sample, timestep, text = inputs()
    torch.save((sample, timestep, text, trained(sample, timestep, text).sample), tmp_path / "io.pt")
    program = (
        "import sys, torch\n"
        "from latent_shift.temporal import LatentVDMUNet\n"
        "unet = LatentVDMUNet.from_pretrained(sys.argv[1] + '/unet')\n"
        "*given, expected = torch.load(sys.argv[1] + '/io.pt')\n"
        "torch.testing.assert_close(unet(*given).sample, expected)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_bad_input(image, trained):
    with pytest.raises(TypeError, match="carries a shift already"):
        insert_temporal_layers(insert_shift(copy.deepcopy(image), ShiftConfig()))
    sample, timestep, text = inputs()
    with pytest.raises(ValueError, match="one text per clip"):
        trained(sample, timestep, text.repeat_interleave(5, dim=0))
