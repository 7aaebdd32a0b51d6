"""LatentShiftUNet against diffusers' own U-Net with the shift written in by hooks."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from latent_shift.unet import LatentShiftUNet, ShiftConfig, insert_shift, remove_shift
from latent_shift_kernels import Placement, ShiftSpec
from latent_shift_kernels.integrations.diffusers import shift_resnet_block

from ..kernels import naive

TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# Residual blocks that resample inside, with AdaGN in place of the added time embedding.
ADAGN = {
    **TINY,
    "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}


@pytest.fixture(scope="module", params=["tiny", "adagn"])
def unet(request) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{"tiny": TINY, "adagn": ADAGN}[request.param]).eval()


def inputs(clips=2, frames=5):
    return (
        torch.randn(clips, 4, frames, 8, 8),
        torch.linspace(3, 800, clips).long(),
        torch.randn(clips, 7, 24),
    )


def with_hooks(unet, config: ShiftConfig, sample, timestep, text):
    """The same network with the shift as a hook on diffusers' own modules, everything repeated per
    frame."""
    unet = copy.deepcopy(unet)
    frames = sample.shape[2]

    def shift(h):
        return naive.temporal_shift(h, frames, config.spec(h.shape[1]))

    for block in unet.modules():
        if type(block) is not ResnetBlock2D:
            continue
        if config.placement == "branch_output":
            block.conv2.register_forward_hook(lambda _, __, output: shift(output))
        elif config.placement == "conv1_output":
            block.conv1.register_forward_hook(lambda _, __, output: shift(output))
        elif config.placement == "conv1_input":
            block.conv1.register_forward_pre_hook(lambda _, args: (shift(args[0]),))
        else:
            block.norm1.register_forward_pre_hook(lambda _, args: (shift(args[0]),))
    folded = sample.transpose(1, 2).flatten(0, 1)
    output = unet(
        folded, timestep.repeat_interleave(frames), text.repeat_interleave(frames, 0)
    ).sample
    return output.unflatten(0, (-1, frames)).transpose(1, 2)


@pytest.mark.parametrize("placement", [p.value for p in Placement])
@pytest.mark.parametrize("boundary", ["zeros", "circular"])
def test_every_placement_is_the_hooked_network(unet, placement, boundary):
    config = ShiftConfig(placement=placement, boundary=boundary)
    sample, timestep, text = inputs()
    with torch.no_grad():
        expected = with_hooks(unet, config, sample, timestep, text)
        shifted = insert_shift(copy.deepcopy(unet), config)
        torch.testing.assert_close(
            shifted(sample, timestep, text).sample, expected, rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("preset", ["tsm", "causal"])
def test_other_presets(unet, preset):
    config = ShiftConfig(preset=preset, fold_div=4)
    sample, timestep, text = inputs()
    with torch.no_grad():
        expected = with_hooks(unet, config, sample, timestep, text)
        got = insert_shift(copy.deepcopy(unet), config)(sample, timestep, text).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_those_of_the_hooked_network(unet, dtype):
    """Through the whole U-Net the fused operators are as near to fp64 as diffusers' own."""
    sample, timestep, text = inputs(1, 4)

    def gradients(model, dtype, forward):
        model = copy.deepcopy(model).to(dtype)
        output = forward(model, sample.to(dtype), timestep, text.to(dtype))
        output.double().square().mean().backward()
        return output.detach().double(), {n: p.grad.double() for n, p in model.named_parameters()}

    hooked = copy.deepcopy(unet)

    def eager(model, *args):
        nonlocal hooked
        hooked = model
        return with_hooks_in_place(model, *args)

    truth, truth_grads = gradients(unet, torch.float64, eager)
    naive_output, naive_grads = gradients(unet, dtype, eager)
    ours = insert_shift(copy.deepcopy(unet))
    output, grads = gradients(ours, dtype, lambda m, *args: m(*args).sample)

    def error(a, b):
        return (a - b).norm() / b.norm()

    eps = torch.finfo(dtype).eps
    assert error(output, truth) <= max(2 * error(naive_output, truth), eps)
    ours_total = torch.cat([g.flatten() for g in grads.values()])
    naive_total = torch.cat([naive_grads[n].flatten() for n in grads])
    truth_total = torch.cat([truth_grads[n].flatten() for n in grads])
    assert error(ours_total, truth_total) <= max(2 * error(naive_total, truth_total), eps)


def with_hooks_in_place(unet, sample, timestep, text):
    """As :func:`with_hooks` for the default shift, on ``unet`` itself so that it receives the
    gradients."""
    frames = sample.shape[2]
    hooks = [
        block.conv2.register_forward_hook(
            lambda _, __, h: naive.temporal_shift(h, frames, ShiftSpec.latent_shift(h.shape[1]))
        )
        for block in unet.modules()
        if type(block) is ResnetBlock2D
    ]
    output = unet(
        sample.transpose(1, 2).flatten(0, 1),
        timestep.repeat_interleave(frames),
        text.repeat_interleave(frames, 0),
    ).sample
    for hook in hooks:
        hook.remove()
    return output.unflatten(0, (-1, frames)).transpose(1, 2)


def test_one_frame_is_the_image_model(unet):
    sample, timestep, text = inputs(frames=1)
    shifted = insert_shift(copy.deepcopy(unet))
    with torch.no_grad():
        expected = unet(sample[:, :, 0], timestep, text).sample
        for output in (
            shifted(sample, timestep, text).sample[:, :, 0],
            shifted(sample[:, :, 0], timestep, text, num_frames=1).sample,
            shifted(sample[:, :, 0], timestep, text).sample,
        ):
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)


def test_clips_and_folded_frames_agree_and_never_mix(unet):
    sample, timestep, text = inputs()
    shifted = insert_shift(copy.deepcopy(unet))
    with torch.no_grad():
        clips = shifted(sample, timestep, text).sample
        folded = shifted(
            sample.transpose(1, 2).flatten(0, 1), timestep, text, num_frames=5, return_dict=False
        )[0]
        assert torch.equal(folded.unflatten(0, (2, 5)).transpose(1, 2), clips)
        per_frame = shifted(sample, timestep, text.repeat_interleave(5, 0)).sample
        torch.testing.assert_close(per_frame, clips, rtol=1e-4, atol=2e-5)
        other = sample.clone()
        other[1] += 1
        again = shifted(other, timestep, text).sample
        torch.testing.assert_close(again[0], clips[0], rtol=1e-4, atol=2e-5)
        assert not torch.allclose(again[1], clips[1], atol=1e-2)


def test_no_parameter_is_added_and_the_shift_comes_out_again(unet):
    sample, timestep, text = inputs(frames=1)
    shifted = copy.deepcopy(unet)
    before = {name: id(p) for name, p in shifted.named_parameters()}
    assert insert_shift(shifted) is shifted and type(shifted) is LatentShiftUNet
    assert {name: id(p) for name, p in shifted.named_parameters()} == before
    assert shifted.config.shift["placement"] == "branch_output"
    remove_shift(shifted)
    assert type(shifted) is UNet2DConditionModel and "shift" not in shifted.config
    assert [type(m) for m in shifted.modules()] == [type(m) for m in unet.modules()]
    assert shifted.__dict__.keys() == unet.__dict__.keys()
    with torch.no_grad():
        args = (sample[:, :, 0], timestep, text)
        assert torch.equal(shifted(*args).sample, unet(*args).sample)


def test_image_checkpoints_load_unchanged_and_the_other_way_round(unet, tmp_path):
    unet.save_pretrained(tmp_path / "image")
    loaded, info = LatentShiftUNet.from_pretrained(tmp_path / "image", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.shift_config == ShiftConfig()
    loaded.save_pretrained(tmp_path / "video")
    image = UNet2DConditionModel.from_pretrained(tmp_path / "video")
    for name, parameter in unet.state_dict().items():
        assert torch.equal(image.state_dict()[name], parameter)


def test_saved_model_gives_the_same_bits_in_a_fresh_process(unet, tmp_path):
    config = ShiftConfig(preset="tsm", placement="conv1_input", boundary="circular")
    shifted = insert_shift(copy.deepcopy(unet), config)
    sample, timestep, text = inputs()
    with torch.no_grad():
        expected = shifted(sample, timestep, text).sample
    shifted.save_pretrained(tmp_path)
    torch.save((sample, timestep, text), tmp_path / "inputs.pt")
    script = (
        "import sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from diffusers import AutoModel\n"
        "from latent_shift.unet import LatentShiftUNet\n"
        "folder = sys.argv[1]\n"
        "unet = LatentShiftUNet.from_pretrained(folder)\n"
        "assert unet.shift_config.preset == 'tsm' and unet.shift_config.boundary == 'circular'\n"
        "with torch.no_grad():\n"
        "    output = unet(*torch.load(folder + '/inputs.pt')).sample\n"
        "torch.save(output, folder + '/output.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "output.pt"), expected)


def test_training_conveniences(unet):
    sample, timestep, text = inputs()
    shifted = insert_shift(copy.deepcopy(unet)).train()

    def gradients():
        shifted.zero_grad()
        shifted(sample, timestep, text).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in shifted.named_parameters()}

    plain = gradients()
    shifted.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        output = shifted(sample, timestep, text).sample
    assert output.dtype is torch.bfloat16
    output.float().sum().backward()


def test_channels_last_is_kept_and_changes_nothing(unet):
    sample, timestep, text = inputs()
    shifted = insert_shift(copy.deepcopy(unet))
    with torch.no_grad():
        expected = shifted(sample, timestep, text).sample
        shifted.to(memory_format=torch.channels_last)
        layouts = []
        for block in shifted.modules():
            if isinstance(block, ResnetBlock2D):
                block.register_forward_hook(
                    lambda _, __, h: layouts.append(
                        h.is_contiguous(memory_format=torch.channels_last)
                    )
                )
        torch.testing.assert_close(
            shifted(sample, timestep, text).sample, expected, rtol=1e-4, atol=2e-5
        )
    assert layouts and all(layouts)


def test_offloaded_parameters_come_back_for_the_call(unet):
    """accelerate's hooks sit on the leaf modules, so norms must be called, not read."""
    from accelerate import cpu_offload

    sample, timestep, text = inputs()
    shifted = insert_shift(copy.deepcopy(unet))
    with torch.no_grad():
        expected = shifted(sample, timestep, text).sample
        cpu_offload(shifted, execution_device=torch.device("cpu"))
        assert next(shifted.parameters()).is_meta
        assert torch.equal(shifted(sample, timestep, text).sample, expected)


def test_compiles_to_one_graph(unet):
    sample, timestep, text = inputs(1, 3)
    shifted = insert_shift(copy.deepcopy(unet))
    compiled = torch.compile(shifted, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(sample, timestep, text).sample, shifted(sample, timestep, text).sample
        )


def test_bad_input(unet):
    sample, timestep, text = inputs()
    shifted = insert_shift(copy.deepcopy(unet))
    with pytest.raises(ValueError, match="one per clip \\(2\\), got 3"):
        shifted(sample, torch.tensor([1, 2, 3]), text)
    with pytest.raises(ValueError, match="does not split into clips of num_frames = 4"):
        shifted(sample[:, :, 0], timestep, text, num_frames=4)
    with pytest.raises(ValueError, match="leave num_frames out"):
        shifted(sample, timestep, text, num_frames=2)
    with pytest.raises(ValueError, match="got \\(5, 8, 8\\)"):
        shifted(sample[0, 0], timestep, text)
    with pytest.raises(TypeError, match="call remove_shift first"):
        insert_shift(shifted)
    with pytest.raises(TypeError, match="got UNet2DModel"):
        insert_shift(
            UNet2DModel(
                block_out_channels=(32,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
            )
        )
    with pytest.raises(ValueError, match="branch_output, conv1_output"):
        ShiftConfig(placement="somewhere")
    with pytest.raises(ValueError, match="latent_shift always moves thirds"):
        ShiftConfig(fold_div=8)
    with pytest.raises(ValueError, match="unknown shift settings \\['fold'\\]"):
        insert_shift(copy.deepcopy(unet), {"fold": 3})
    block = next(m for m in unet.modules() if type(m) is ResnetBlock2D)
    with pytest.raises(ValueError, match="spec is for 5 channels"):
        shift_resnet_block(copy.deepcopy(block), ShiftSpec.latent_shift(5))
