"""``fuse`` against the models as diffusers has them."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from torch import nn

from latent_shift.training.measuring import kept_for_backward
from latent_shift.unet import LatentShiftUNet, insert_shift, remove_shift
from latent_shift_kernels import ShiftSpec, backends, functional
from latent_shift_kernels.integrations import diffusers as integration
from latent_shift_kernels.integrations.diffusers import (
    fuse,
    fused,
    recompute_activations,
    shift_resnet_block,
    text_kept,
    unfuse,
)
from latent_shift_kernels.integrations.fusion import AppliedSiLU, FusedShift, GroupNormSiLU, Joined
from latent_shift_kernels.integrations.source import activated, fingerprint

from . import zoo

EVERY_MODEL = pytest.mark.parametrize("name", zoo.ZOO)


def error(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


def run(model, args):
    with torch.no_grad():
        return zoo.output(model, args)


def state(model):
    """Everything that ``fuse`` may touch: classes, instance attributes and hooks."""
    return [
        (type(module), sorted(module.__dict__), len(module._forward_pre_hooks))
        for module in model.modules()
    ]


def gradients(model, args):
    output = zoo.output(model, args)
    output.double().square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


# Equal results.


@EVERY_MODEL
def test_results_are_the_models_own(name):
    """Nearer to fp64 than twice the original, in fp32 and bf16; unfused, the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        model, args = zoo.build(name).to(dtype), zoo.arguments(name, dtype)
        wide = tuple(a.double() if a.is_floating_point() else a for a in args)
        truth = run(copy.deepcopy(model).double(), wide)
        before, plain = run(model, args), state(model)
        report = fuse(model, strict=True)
        assert len(report.fused) == len(report) > 4
        again = run(model, args)
        eps = torch.finfo(dtype).eps
        assert error(again, truth) <= max(2 * error(before, truth), 4 * eps)
        assert fuse(model) == report
        unfuse(model)
        assert state(model) == plain
        assert torch.equal(run(model, args), before)


@EVERY_MODEL
def test_gradients_are_the_models_own(name):
    args = zoo.arguments(name)
    wide = tuple(a.double() if a.is_floating_point() else a for a in args)
    truth = gradients(zoo.build(name).double(), wide)
    eager = gradients(zoo.build(name), args)
    model = zoo.build(name)
    fuse(model)
    ours = gradients(model, args)
    assert error(ours, truth) <= max(2 * error(eager, truth), 4 * torch.finfo(torch.float32).eps)


def test_clips_of_channels_last_frames_are_not_copied():
    """(B, C, T, H, W) of channels_last frames reaches the operator dense, and leaves so."""
    layer = TemporalConvLayer(16, 16, norm_num_groups=4).eval()
    layer.to(memory_format=torch.channels_last_3d)
    nn.init.normal_(layer.conv4[-1].weight)
    frames = torch.randn(6, 16, 5, 4).to(memory_format=torch.channels_last)
    expected = layer(frames, num_frames=3)
    assert len(fuse(layer).fused) == 4
    dense = []
    layer.conv1[0].register_forward_hook(
        lambda _, inputs, y: dense.extend(
            tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in (inputs[0], y)
        )
    )
    torch.testing.assert_close(layer(frames, num_frames=3), expected, rtol=1e-4, atol=1e-5)
    assert dense == [True, True]


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 5, 4), (2, 8, 3, 5, 4)])
def test_norms_of_every_rank(shape):
    model = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU())
    x = torch.randn(shape)
    expected = model(x)
    fuse(model)
    assert [type(module) for module in model] == [GroupNormSiLU, AppliedSiLU]
    torch.testing.assert_close(model(x), expected)


# What people do with models.


@pytest.mark.parametrize("name", ["unet2d_condition", "unet3d", "unet_spatio_temporal"])
def test_compiles_to_one_graph(name):
    model, args = zoo.build(name), zoo.arguments(name)
    fuse(model)
    expected = run(model, args)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, args), expected, rtol=1e-4, atol=1e-5)


def test_fusing_a_compiled_model_takes_effect():
    model, args = zoo.build("autoencoder_kl"), zoo.arguments("autoencoder_kl")
    compiled = torch.compile(model, backend="eager")
    before = run(compiled, args)
    assert fuse(compiled).fused
    torch.testing.assert_close(run(compiled, args), before, rtol=1e-4, atol=1e-5)
    unfuse(compiled)
    assert torch.equal(run(compiled, args), before)


@pytest.mark.parametrize("name", ["unet3d", "unet_motion"])
def test_copies_pickles_and_state_dicts(name):
    model, args = zoo.build(name), zoo.arguments(name)
    before, parameters = run(model, args), dict(model.named_parameters())
    fuse(model)
    expected = run(model, args)
    assert all(parameter is parameters[n] for n, parameter in model.named_parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, args), expected)
        unfuse(other)
        assert torch.equal(run(other, args), before)
        other.load_state_dict(model.state_dict())
    assert torch.equal(run(model, args), expected)


def test_saved_models_do_not_know(tmp_path):
    model = zoo.build("unet2d_condition")
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    args = zoo.arguments("unet2d_condition")
    assert torch.equal(run(loaded, args), run(zoo.build("unet2d_condition"), args))


@pytest.mark.parametrize("name", ["unet2d_condition", "unet_spatio_temporal", "autoencoder_kl"])
def test_gradient_checkpointing(name):
    model, args = zoo.build(name).train(), zoo.arguments(name)
    fuse(model)
    plain = gradients(model, args)
    model.zero_grad()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model, args), plain, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("change", [fuse, insert_shift])
def test_recomputed_activations_give_the_same_gradients(change):
    model = zoo.build("unet2d_condition").train()
    args = (torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24))
    if change is fuse:
        args = zoo.arguments("unet2d_condition")
    with pytest.raises(ValueError, match="call fuse or insert_shift first"):
        recompute_activations(model)
    before = state(model)
    change(model)
    plain, expected = state(model), gradients(model, args)
    model.zero_grad()
    kept = kept_for_backward(model, lambda: model(*args))
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    assert recompute_activations(model) == len(blocks)
    torch.testing.assert_close(gradients(model, args), expected, rtol=1e-3, atol=1e-7)
    model.zero_grad()
    assert kept_for_backward(model, lambda: model(*args)) < 0.95 * kept
    assert recompute_activations(model, False) == 0
    assert kept_for_backward(model, lambda: model(*args)) == kept
    recompute_activations(model)
    (unfuse if change is fuse else remove_shift)(model)
    assert state(model) == before != plain


def test_recomputed_activations_halve_what_a_block_keeps():
    block = ResnetBlock2D(in_channels=32, temb_channels=16, groups=8)
    shift_resnet_block(block, ShiftSpec.latent_shift(32))
    x = torch.randn(6, 32, 16, 16, requires_grad=True)
    temb = torch.randn(2, 16)
    four = kept_for_backward(block, lambda: block(x, temb))
    assert recompute_activations(block) == 1
    two = kept_for_backward(block, lambda: block(x, temb))
    assert 2 * x.nbytes <= two < 0.51 * four
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(block(x, temb).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x, temb).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("change", ["hook", "norm's hook", "circular", "dropout", "conv_forward"])
def test_blocks_that_cannot_recompute_go_on_as_before(change):
    block, seen = ResnetBlock2D(in_channels=32, temb_channels=16, groups=8).train(), []
    fuse(block)
    if change == "hook":
        block.conv1.register_forward_hook(lambda *_: seen.append(1))
    elif change == "norm's hook":
        block.norm2.register_forward_hook(lambda *_: seen.append(1))
    elif change == "circular":
        block.conv2.padding_mode = "circular"
        block.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]
    elif change == "dropout":
        block.dropout.p = 0.5
    else:
        block.conv1._conv_forward = lambda x, weight, bias: (
            0.5 * F.conv2d(x, weight, bias, padding=1)
        )
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    torch.manual_seed(0)
    expected = block(x, temb)
    assert recompute_activations(block) == 0
    torch.manual_seed(0)
    assert torch.equal(block(x, temb), expected)
    assert len(seen) == (2 if "hook" in change else 0)


def test_recomputing_under_offloading_and_checkpoints():
    """Hooks that bring parameters are run, and a checkpoint is given tensors."""
    from accelerate import cpu_offload

    model = insert_shift(zoo.build("unet2d_condition")).train()
    args = (torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24))
    recompute_activations(model)
    expected = gradients(model, args)
    model.zero_grad()
    reentrant = partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    model.enable_gradient_checkpointing(reentrant)
    torch.testing.assert_close(gradients(model, args), expected, rtol=1e-3, atol=1e-7)
    model.disable_gradient_checkpointing()
    output = model(*args).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(*args).sample, output, rtol=1e-4, atol=1e-5)


def test_autocast():
    model, args = zoo.build("unet3d"), zoo.arguments("unet3d")
    expected = run(model, args)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, args)
        fuse(model)
        ours = run(model, args)
    assert ours.dtype is eager.dtype
    assert error(ours, expected.double()) <= 2 * error(eager, expected.double())


@pytest.mark.parametrize("first", ["fuse", "adapter"])
def test_lora_adapters(first):
    peft = pytest.importorskip("peft")
    model, args = zoo.build("unet2d_condition"), zoo.arguments("unet2d_condition")
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(
        target_modules=["conv1", "conv2", "time_emb_proj", "to_k", "to_v"], init_lora_weights=False
    )
    for each in (plain, model):
        torch.manual_seed(0)
        if each is model and first == "fuse":
            fuse(each)
        each.add_adapter(config)
        if each is model and first == "adapter":
            fuse(each)
    expected = run(plain, args)
    assert error(expected, run(zoo.build("unet2d_condition"), args).double()) > 1e-3
    torch.testing.assert_close(run(model, args), expected, rtol=1e-4, atol=1e-4)
    unfuse(model)
    assert torch.equal(run(model, args), expected)


@pytest.mark.parametrize("first", ["fuse", "offload"])
@pytest.mark.parametrize("kind", ["accelerate", "group", "casting"])
def test_offloading(first, kind):
    """Hooks that wrap ``forward`` work around the new one, whichever came first."""
    model, args = zoo.build("unet2d_condition"), zoo.arguments("unet2d_condition")
    if first == "fuse":
        fuse(model, strict=True)
    if kind == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert next(model.parameters()).is_meta
    elif kind == "group":
        cpu = torch.device("cpu")
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        model.enable_layerwise_casting(torch.float16, torch.float32)
    if first == "offload":
        plain = run(model, args)
        fuse(model, strict=True)
    fused_output = run(model, args)
    unfuse(model)
    expected = run(model, args)
    assert first == "fuse" or torch.equal(expected, plain)
    torch.testing.assert_close(fused_output, expected, rtol=1e-4, atol=1e-4)
    if kind == "accelerate":
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(run(model, args), expected)
        assert fuse(model, strict=True).fused


def test_hooks_on_blocks_and_convolutions_see_the_same():
    model, args = zoo.build("unet2d_condition"), zoo.arguments("unet2d_condition")
    seen = []
    for module in model.modules():
        if isinstance(module, (ResnetBlock2D, nn.Conv2d, Attention)):
            module.register_forward_hook(lambda _, inputs, y: seen.append(y.double().norm()))
    run(model, args)
    before = torch.stack(seen)
    seen.clear()
    fuse(model, strict=True)
    run(model, args)
    torch.testing.assert_close(torch.stack(seen), before, rtol=1e-4, atol=1e-4)


# A kernel that holds the convolution: the block as two calls, the skip input beside x.


@pytest.fixture
def halves(monkeypatch):
    """Has blocks call the operator as where such a kernel serves; the list of the skip inputs that
    it was given."""
    monkeypatch.setitem(backends.SERVING["cpu"], backends.CONV2D, "cpu")
    given, operator = [], functional.shift_group_norm_silu_conv2d

    def recorded(*args, skip=None, **kwargs):
        given.append(skip)
        return operator(*args, skip=skip, **kwargs)

    monkeypatch.setattr(functional, "shift_group_norm_silu_conv2d", recorded)
    return given


WITH_SKIPS = {
    "unet2d_condition": lambda model: None,
    "unet3d": lambda model: None,
    "unet_motion": lambda model: None,
    "free-u": lambda model: model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "checkpointing": lambda model: model.train().enable_gradient_checkpointing(),
}


@pytest.mark.parametrize("case", WITH_SKIPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_blocks_as_two_operators(case, layout, halves):
    name = case if case in zoo.ZOO else "unet2d_condition"
    args = zoo.arguments(name)
    model, plain = zoo.build(name), zoo.build(name)
    for each in (model, plain):
        for convolution in filter(lambda module: isinstance(module, nn.Conv2d), each.modules()):
            convolution.to(memory_format=layout)
        WITH_SKIPS[case](each)
    fuse(model, strict=True)
    torch.testing.assert_close(run(model, args), run(plain, args), rtol=1e-4, atol=1e-4)
    blocks = [block for block in model.modules() if isinstance(block, ResnetBlock2D)]
    decoders = [
        block for name, block in model.named_modules() if re.search(r"up.*resnets\.\d$", name)
    ]
    assert len(halves) == 2 * len(blocks)
    # FreeU computes with both, so they are tensors before they are joined
    skips = 0 if case == "free-u" else len(decoders)
    assert sum(skip is not None for skip in halves) == skips and decoders
    torch.testing.assert_close(gradients(model, args), gradients(plain, args), rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = run(model, args), run(plain, args)
    assert error(ours, run(plain, args).double()) <= 2 * error(eager, run(plain, args).double())
    unfuse(model)
    assert state(model) == state(plain)


def test_a_compiler_sees_the_concatenation(halves):
    model = zoo.build("unet2d_condition")
    fuse(model)
    block = model.up_blocks[0]
    torch.manual_seed(0)
    args = torch.randn(2, 64, 4, 4), (torch.randn(2, 32, 4, 4), torch.randn(2, 64, 4, 4))
    temb = torch.randn(2, model.time_embedding.linear_2.out_features)
    expected = block(*args, temb)
    assert any(skip is not None for skip in halves)
    halves.clear()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args, temb), expected, rtol=1e-4, atol=1e-4)
    assert halves and all(skip is None for skip in halves)


def test_blocks_that_cannot_read_two_inputs_are_given_one(halves):
    """A hook would see something other than a tensor; dropout stands between the convolutions."""
    seen = []

    def hook(block):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(type(inputs[0])))

    def drop(block):
        block.dropout.p = 0.5

    for change in (hook, drop):
        model, args = zoo.build("unet2d_condition").train(), zoo.arguments("unet2d_condition")
        change(model.up_blocks[1].resnets[0])
        fuse(model, strict=True)
        halves.clear()
        run(model, args)
        assert sum(skip is not None for skip in halves) == len(model.up_blocks[0].resnets)
    assert seen == [torch.Tensor]


def test_a_shortcut_of_another_kind_gets_one_tensor(halves):
    peft = pytest.importorskip("peft")
    model, args = zoo.build("unet2d_condition"), zoo.arguments("unet2d_condition")
    config = peft.LoraConfig(target_modules=["conv_shortcut"], init_lora_weights=False)
    model.add_adapter(config)
    expected = run(model, args)
    fuse(model)
    torch.testing.assert_close(run(model, args), expected, rtol=1e-4, atol=1e-4)


def test_joined_channels_are_one_tensor_to_everything_else():
    x, skip = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    both = torch.cat([x, Joined(skip)], dim=1)
    assert isinstance(both, Joined) and both.parts == (x, skip)
    expected = torch.cat([x, skip], 1)
    assert both.shape == expected.shape and torch.equal(both.relu(), expected.relu())
    assert torch.equal(x.new_ones(1) * both, expected)
    assert torch.equal(torch.cat([both, both], dim=0), torch.cat([expected, expected]))
    assert torch.equal(nn.functional.silu(both), nn.functional.silu(expected))
    again = torch.cat((both, x), 1)
    assert [part.shape[1] for part in again.parts] == [3, 5, 3]
    assert copy.deepcopy(both).shape == expected.shape


# The shift.


def test_fuse_and_the_shift_know_of_each_other():
    name, frames = "unet2d_condition", 3
    sample, timestep, text = (
        torch.randn(2, 4, frames, 8, 8),
        torch.tensor([3, 700]),
        torch.randn(2, 5, 24),
    )
    plain = zoo.build(name)
    image = run(plain, zoo.arguments(name))
    shifted = insert_shift(copy.deepcopy(plain))
    expected = run(shifted, (sample, timestep, text))

    report = fuse(shifted, strict=True)
    assert sum("temporal shift" in site.what for site in report) == len(report) - 2
    torch.testing.assert_close(
        run(shifted, (sample, timestep, text)), expected, rtol=1e-4, atol=1e-4
    )
    unfuse(shifted)
    assert state(shifted) == state(insert_shift(copy.deepcopy(plain)))
    assert torch.equal(run(shifted, (sample, timestep, text)), expected)

    both = copy.deepcopy(plain)
    fuse(both)
    assert type(insert_shift(both)) is LatentShiftUNet
    torch.testing.assert_close(run(both, (sample, timestep, text)), expected, rtol=1e-4, atol=1e-4)
    only_fused = copy.deepcopy(plain)
    fuse(only_fused)
    assert state(remove_shift(copy.deepcopy(both))) == state(only_fused)
    unfuse(both)
    assert torch.equal(run(both, (sample, timestep, text)), expected)
    remove_shift(both)
    assert state(both) == state(plain) and torch.equal(run(both, zoo.arguments(name)), image)


class Shift(nn.Module):
    """A user's shift, with or without a convolution behind it."""

    def __init__(self, n_segment, net=None):
        super().__init__()
        self.n_segment = n_segment
        if net is not None:
            self.net = net

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.n_segment))
        fold = clips.shape[2] // 8
        shifted = torch.zeros_like(clips)
        shifted[:, :-1, :fold] = clips[:, 1:, :fold]
        shifted[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        shifted[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        return self.net(shifted.flatten(0, 1)) if hasattr(self, "net") else shifted.flatten(0, 1)


def describe(shift, channels):
    return ShiftSpec.tsm(channels, 8, single_frame="shift"), shift.n_segment


@pytest.mark.parametrize("n_segment", [1, 4])
def test_named_shift_modules(n_segment):
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    model = nn.Sequential(Shift(n_segment), nn.ReLU(), Shift(n_segment, convolution))
    x = torch.randn(2 * n_segment, 16, 5, 5)
    expected = model(x)
    report = fuse(model, shifts={Shift: describe}, strict=True)
    assert [site.what for site in report] == ["temporal shift"] * 2
    assert isinstance(model[0], FusedShift) and isinstance(model[0], Shift)
    for fused_model in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(fused_model(x), expected)
    assert fuse(model, shifts={Shift: describe}) == report
    unfuse(model)
    assert [type(module) for module in model] == [Shift, nn.ReLU, Shift]


def test_a_shift_module_with_two_children_is_left():
    model = nn.Sequential(Shift(4, nn.Identity()))
    model[0].other = nn.Identity()
    (site,) = fuse(model, shifts={Shift: describe})
    assert not site.fused and "one child" in site.what and type(model[0]) is Shift


# The text.


@pytest.mark.parametrize("name", ["unet3d", "unet_motion"])
def test_text_is_projected_once_per_clip(name):
    model, args = zoo.build(name), list(zoo.arguments(name))
    per_clip = torch.randn(zoo.CLIPS, zoo.TOKENS, 24)
    repeated = name == "unet3d"
    args[2] = per_clip if repeated else per_clip.repeat_interleave(zoo.FRAMES, 0)
    expected = run(model, args)
    fuse(model)
    args[2] = per_clip
    rows = []
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock) and block.attn2.is_cross_attention:
            block.attn2.to_k.register_forward_hook(
                lambda _, inputs, __: rows.append(len(inputs[0]))
            )
    torch.testing.assert_close(run(model, args), expected, rtol=1e-4, atol=1e-5)
    assert rows and set(rows) == {zoo.CLIPS}

    class Own:
        """A processor that may look at anything: it gets what diffusers would give it."""

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            text = encoder_hidden_states
            assert text is None or len(text) == len(hidden_states) == zoo.CLIPS * zoo.FRAMES
            return AttnProcessor(attn, hidden_states, text, attention_mask)

    AttnProcessor = type(next(m for m in model.modules() if isinstance(m, Attention)).processor)()
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock) and block.attn2.is_cross_attention:
            block.attn2.set_processor(Own())
    torch.testing.assert_close(run(model, args), expected, rtol=1e-4, atol=1e-5)


def test_text_is_projected_once_for_all_steps():
    """Counts what the projections compute; a text that changed is projected again."""
    model = insert_shift(zoo.build("unet2d_condition"))
    plain = state(model)
    (sample, timestep, text), computed = zoo.arguments("unet2d_condition"), []
    attentions = (module for module in model.modules() if isinstance(module, Attention))
    linear = next(module for module in attentions if module.is_cross_attention).to_k
    linear.forward = lambda given: computed.append(given) or nn.Linear.forward(linear, given)
    other = torch.randn_like(text)
    texts = (text, text, other, other, text)
    expected = [run(model, (sample, timestep, given)) for given in texts]
    assert len(computed) == 5
    computed.clear()
    with torch.no_grad(), text_kept(model) as forget:
        for given, result in zip(texts, expected, strict=True):
            assert torch.equal(run(model, (sample, timestep, given)), result)
        assert len(computed) == 3
        text.mul_(2)
        forget()
        changed = run(model, (sample, timestep, text))
    assert torch.equal(run(model, (sample, timestep, text)), changed)
    del linear.forward
    assert state(model) == plain
    with pytest.raises(RuntimeError, match="no_grad"), text_kept(model):
        pass


# What is left, and why.


def leave(change):
    """The report on a U-Net in which ``change`` was done to the first block."""
    model = zoo.build("unet2d_condition")
    block = next(module for module in model.modules() if isinstance(module, ResnetBlock2D))
    change(block)
    args = zoo.arguments("unet2d_condition")
    before, plain = run(model, args), state(model)
    with pytest.raises(ValueError, match="1 would be left\n  down_blocks.0.resnets.0"):
        fuse(model, strict=True)
    assert state(model) == plain
    (site,) = (report := fuse(model)).left
    assert f"left: {site.what}" in str(report)
    torch.testing.assert_close(run(model, args), before, rtol=1e-4, atol=1e-4)
    unfuse(model)
    assert state(model) == plain and torch.equal(run(model, args), before)
    return site.what


def test_what_cannot_be_fused_is_left_with_the_reason():
    class Other(ResnetBlock2D):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    def become(block):
        block.__class__ = Other

    def patch(block):
        block.forward = lambda *args, **kwargs: 2 * ResnetBlock2D.forward(block, *args, **kwargs)

    def hook(block):
        block.norm1.register_forward_hook(lambda _, __, y: 2 * y)

    def mish(block):
        block.nonlinearity = nn.Mish()

    def parametrise(block):
        nn.utils.parametrize.register_parametrization(block.norm2, "weight", nn.Softplus())

    assert leave(become) == "a subclass of ResnetBlock2D, with a forward of its own"
    assert leave(patch) == "its forward was replaced"
    assert leave(hook) == "norm1 carries hooks, which would see another tensor"
    assert leave(mish) == "nonlinearity is Mish, not SiLU"
    assert leave(parametrise) == "norm2 is ParametrizedGroupNorm, not GroupNorm"


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4), nn.SiLU()


class Nested(Written):
    def forward(self, x):
        return self.norm2(x) if x is None else self.act(self.norm2(self.act(self.norm1(x))))


class Lines(Written):
    def forward(self, x):
        if self.norm1 and x.dim() > 3:
            x = 2 * x
            y = self.norm1(x)
        else:
            y = self.norm1(x)
        y = self.act(y)
        return self.act(self.norm2(y))


class OneBranch(Written):
    def forward(self, x):
        if x.shape[0] > 1:
            x = self.norm1(x)
        x = self.act(x)
        return self.act(self.norm2(x))


class UsedTwice(Written):
    def forward(self, x):
        y = self.norm1(x)
        z = self.act(y)
        return z + y + self.act(self.norm2(x))


class Elsewhere(Written):
    def forward(self, x):
        return self.act(self.norm1(x)) + self.helper(x)

    def helper(self, x):
        return self.act(x)


@pytest.mark.parametrize("cls", [Nested, OneBranch, UsedTwice, Elsewhere])
def test_silu_on_anything_but_norms_stays(cls):
    model, x = cls(), torch.randn(2, 4, 3, 3)
    expected = model(x)
    report = fuse(model)
    assert [site.fused for site in report] == [False], report
    assert torch.equal(model(x), expected)


def test_norms_share_a_silu():
    model, x = Lines(), torch.randn(2, 4, 3, 3)
    expected = model(x)
    report = fuse(model, strict=True)
    assert [site.what for site in report] == ["norm1 + silu, norm2 + silu"]
    torch.testing.assert_close(model(x), expected)


def test_a_shared_activation_stays():
    act = nn.SiLU()
    model = nn.Sequential(nn.Sequential(nn.GroupNorm(2, 4), act), act)
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    (site,) = fuse(model)
    assert site.what == "1 is shared with another module" and torch.equal(model(x), expected)


def test_a_failure_half_way_leaves_the_model_untouched(monkeypatch):
    model = zoo.build("unet3d")
    plain, done = state(model), []

    def failing(module, cls):
        done.append(module)
        if len(done) == 20:
            raise RuntimeError("half way")
        module.__class__ = cls

    monkeypatch.setattr(integration, "exchange", failing)
    with pytest.raises(RuntimeError, match="half way"):
        fuse(model)
    assert state(model) == plain


def test_context_manager_restores_what_it_found():
    model = zoo.build("unet3d")
    plain = state(model)
    with pytest.raises(KeyError), fused(model) as report:
        assert report.fused and state(model) != plain
        raise KeyError
    assert state(model) == plain
    model = zoo.build("autoencoder_kl")
    fuse(model.encoder)
    partly = state(model)
    with fused(model):
        assert state(model) != partly
    assert state(model) == partly


# The contract with diffusers.


@pytest.mark.parametrize("cls", integration.KNOWN_FORWARDS, ids=lambda cls: cls.__name__)
def test_diffusers_forwards_are_the_known_ones(cls):
    found = fingerprint(cls.forward)
    assert found in integration.KNOWN_FORWARDS[cls], (
        f"diffusers {diffusers.__version__} changed {cls.__name__}.forward (now {found}): compare "
        f"it with {integration.BLOCKS.get(cls, cls).__name__} in "
        "latent_shift_kernels/integrations/diffusers.py, follow the change, and add the "
        "fingerprint to KNOWN_FORWARDS; until then fuse leaves these modules"
    )


@EVERY_MODEL
def test_diffusers_still_applies_conv_act_to_conv_norm_out(name):
    for module in zoo.build(name).modules():
        if hasattr(module, "conv_norm_out"):
            assert (("conv_norm_out",), "conv_act") in activated(type(module).forward), (
                f"diffusers {diffusers.__version__}: {type(module).__name__}.forward no longer "
                "applies conv_act to conv_norm_out directly; fuse leaves them"
            )


def test_an_unknown_forward_is_left(monkeypatch):
    monkeypatch.setitem(integration.KNOWN_FORWARDS, ResnetBlock2D, {"another"})
    report = fuse(zoo.build("autoencoder_kl"))
    message = f"ResnetBlock2D.forward of diffusers {diffusers.__version__} is not known"
    assert {site.block for site in report.left} == {"ResnetBlock2D"}
    assert all(message in site.what for site in report.left)
    with pytest.raises(ValueError, match=re.escape(message)):
        insert_shift(zoo.build("unet2d_condition"))


def documented(x: int) -> int:
    """Adds."""
    return x + 1  # one


def undocumented(x):
    # fmt: off
    return (x
        + 1)
    # fmt: on


def different(x):
    return x + 2


def test_a_fingerprint_is_of_what_a_function_does():
    first, second, third = (
        fingerprint(f).replace(f.__name__, "") for f in (documented, undocumented, different)
    )
    assert first == second != third


# The page.


def test_the_page_runs_as_written(capsys, tmp_path):
    page = Path(__file__, "../../../docs/use_it_in_your_unet.md").resolve().read_text()
    names, printed = {"__name__": "page"}, []
    for language, code in re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL):
        if language == "text":
            assert printed[-1] == code
            continue
        # In a file, so that the source of its classes can be read.
        file = tmp_path / f"{len(printed)}.py"
        file.write_text(code)
        exec(compile(code, file, "exec"), names)
        printed.append(capsys.readouterr().out)
