"""The pipeline: the same files, images and names as diffusers' own, and clips on top."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from latent_shift import LatentShiftPipeline, LatentShiftUNet, ShiftConfig, insert_shift
from tests.model import tiny

# Fused and diffusers' own operators round differently; guidance multiplies that.
CLOSE = {"rtol": 0, "atol": 2e-5}
FAST = {"num_inference_steps": 3, "output_type": "np"}
PROMPTS = ["a red circle moving right", "a blue square"]
NO_SHIFT = ShiftConfig(preset="causal", fold_div=10_000)  # 0 of every block's channels move
SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
}
FRESH = """
import sys
import numpy as np, torch
torch.set_num_threads({threads})
from latent_shift import LatentShiftPipeline
pipe = LatentShiftPipeline.from_pretrained({folder!r})
pipe.set_progress_bar_config(disable=True)
call = torch.load({call!r})
np.save({target!r}, pipe(**call).frames)
"""


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny tensors gain nothing from threads, and on a busy machine wait for them."""
    before = torch.get_num_threads()
    if "slow" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(shift: ShiftConfig | None = None, **unet: object) -> LatentShiftPipeline:
    return quiet(LatentShiftPipeline.from_t2i(tiny.image_pipeline(**unet), shift))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def in_fresh_process(folder: Path, call: dict, tmp_path: Path):
    """The frames that another process makes of the saved pipeline."""
    torch.save(call, tmp_path / "call.pt")
    target = tmp_path / "frames.npy"
    script = FRESH.format(
        threads=torch.get_num_threads(),
        folder=str(folder),
        call=str(tmp_path / "call.pt"),
        target=str(target),
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.load(target)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    tiny.image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared() -> LatentShiftPipeline:
    """For tests that only call it."""
    return make()


# files


def test_saved_pipeline_makes_the_same_frames_in_a_fresh_process(tmp_path):
    pipe = make(ShiftConfig(boundary="replicate"))
    call = {"prompt": PROMPTS, "num_frames": 5, "seed": 7, **FAST}
    here = pipe(**call).frames
    pipe.save_pretrained(tmp_path / "model")
    there = in_fresh_process(tmp_path / "model", call, tmp_path)
    assert here.shape == there.shape == (2, 5, 16, 16, 3)
    assert np.array_equal(here, there)


def test_saved_model_opens_as_an_image_model(tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    noise = torch.randn(1, 4, 1, 8, 8)
    ours = pipe(PROMPTS[0], latents=noise, **FAST).frames[:, 0]

    opened = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False))
    assert np.array_equal(opened(PROMPTS[0], latents=noise[:, :, 0], **FAST).images, ours)

    unet, notes = UNet2DConditionModel.from_pretrained(
        tmp_path, subfolder="unet", output_loading_info=True
    )
    assert type(unet) is UNet2DConditionModel
    assert not any(notes.values())
    plain = tiny.image_pipeline()
    plain.unet = unet
    images = quiet(plain)(PROMPTS[0], latents=noise[:, :, 0], **FAST).images
    np.testing.assert_allclose(images, ours, **CLOSE)


def test_saved_index_names_importable_classes_and_keeps_the_defaults(tmp_path):
    defaults = {"default_num_frames": 3, "default_steps": 2, "default_guidance_scale": 2.0}
    pipe = LatentShiftPipeline.from_t2i(tiny.image_pipeline(), default_fps=4.0, **defaults)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["latent_shift.unet", "LatentShiftUNet"]
    assert index["_class_name"] == "LatentShiftPipeline"

    again = quiet(LatentShiftPipeline.from_pretrained(tmp_path))
    assert again.unet.shift_config == pipe.unet.shift_config
    out = again("a red circle", seed=0)
    assert len(out.frames[0]) == 3 and out.fps == 4.0
    assert (out.metadata[0]["steps"], out.metadata[0]["guidance_scale"]) == (2, 2.0)


def test_folder_and_object_make_the_same_pipeline(image_folder):
    source = tiny.image_pipeline()
    from_object = quiet(LatentShiftPipeline.from_t2i(source))
    assert all(source.components[name] is part for name, part in from_object.components.items())
    from_folder = quiet(LatentShiftPipeline.from_t2i(image_folder))
    call = {"prompt": PROMPTS[0], "num_frames": 4, "seed": 1, **FAST}
    assert np.array_equal(from_object(**call).frames, from_folder(**call).frames)


def test_from_t2i_keeps_a_shift_unless_told_another(image_folder):
    config = ShiftConfig(preset="tsm", boundary="circular")
    pipe = LatentShiftPipeline.from_t2i(image_folder, config)
    assert LatentShiftPipeline.from_t2i(pipe).unet.shift_config == config
    again = LatentShiftPipeline.from_t2i(pipe, ShiftConfig())
    assert again.unet is pipe.unet and pipe.unet.shift_config == ShiftConfig()


def test_from_t2i_passes_loading_options_on(image_folder):
    pipe = LatentShiftPipeline.from_t2i(image_folder, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    frames = quiet(pipe)("a red circle", num_frames=2, seed=0, **FAST).frames
    assert frames.dtype == np.float32 and np.isfinite(frames).all()


def test_half_precision_folders_load_in_one_dtype(tmp_path):
    """Otherwise transformers keeps the file's dtype, and diffusers does not."""
    half = make().to(torch.float16)
    half.save_pretrained(tmp_path)
    for load in (LatentShiftPipeline.from_pretrained, LatentShiftPipeline.from_t2i):
        pipe = load(tmp_path)
        dtypes = {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)}
        assert dtypes == {torch.float32}


def test_image_folder_is_not_loaded_by_from_pretrained(image_folder):
    with pytest.raises(TypeError, match="from_t2i"):
        LatentShiftPipeline.from_pretrained(image_folder)
    with pytest.raises(TypeError, match="carries no shift"):
        LatentShiftPipeline(**tiny.image_pipeline().components)
    with pytest.raises(TypeError, match="dtype"):
        LatentShiftPipeline.from_t2i(tiny.image_pipeline(), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "load", [LatentShiftPipeline.from_pretrained, LatentShiftPipeline.from_t2i]
)
def test_missing_and_damaged_folders(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


def test_unsupported_unets_are_named():
    with pytest.raises(ValueError, match="inpainting"):
        make(in_channels=9)
    with pytest.raises(ValueError, match="text_image"):
        make(addition_embed_type="text_image", cross_attention_dim=32)


def test_embedded_model_generates_or_says_what_is_missing():
    try:
        pipe = quiet(LatentShiftPipeline.from_embedded())
    except FileNotFoundError as error:
        assert "latent-shift train" in str(error)
        return
    out = pipe("a red circle moving right", num_frames=4, num_inference_steps=2, seed=0)
    assert len(out.frames[0]) == 4 and out.metadata[0]["model"] == "embedded"


# images


@pytest.mark.parametrize("size", [16, 18], ids=["even", "odd latents"])
def test_one_frame_is_the_image_pipeline(size, monkeypatch):
    image = quiet(tiny.image_pipeline())
    # it refuses sizes that its autoencoder and U-Net take
    monkeypatch.setattr(image, "check_inputs", lambda *_: None)
    noise = torch.randn(2, 4, 1, size // 2, size // 2)
    call = {"prompt": PROMPTS, "guidance_rescale": 0.5, "height": size, "width": size, **FAST}
    images = image(latents=noise[:, :, 0], **call).images
    frames = quiet(LatentShiftPipeline.from_t2i(image))(latents=noise, **call).frames
    np.testing.assert_allclose(frames[:, 0], images, **CLOSE)
    # the U-Net is shared, and still makes images
    assert isinstance(image.unet, LatentShiftUNet)
    np.testing.assert_allclose(image(latents=noise[:, :, 0], **call).images, images, **CLOSE)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """Without a channel moved, every frame of a clip is the image that its noise makes."""
    image = quiet(tiny.image_pipeline())
    config = image.scheduler.config
    image.scheduler = getattr(diffusers, name).from_config(config, **SCHEDULERS[name])
    video = quiet(LatentShiftPipeline.from_t2i(tiny.image_pipeline(), NO_SHIFT))
    video.scheduler = type(image.scheduler).from_config(image.scheduler.config)
    noise = torch.randn(1, 4, 3, 8, 8)
    stochastic = name in ("EulerAncestralDiscreteScheduler", "LCMScheduler")
    frames = 1 if stochastic else 3  # the noise of a step is drawn for a clip as a whole
    clip = video(PROMPTS[0], latents=noise[:, :, :frames], generator=generators(5), **FAST).frames[
        0
    ]
    for index in range(frames):
        still = image(
            PROMPTS[0], latents=noise[:, :, index], generator=generators(5), **FAST
        ).images[0]
        np.testing.assert_allclose(clip[index], still, rtol=0, atol=1e-4)
    video.set_shift(preset="latent_shift", fold_div=None)
    moved = video(PROMPTS[0], latents=noise, generator=generators(5), **FAST).frames[0]
    assert np.isfinite(moved).all()
    if not stochastic:
        assert np.abs(moved - clip).max() > 1e-3


def test_pooled_text_conditioning_needs_nothing_from_the_caller():
    pipe = make(addition_embed_type="text", addition_embed_type_num_heads=4)
    first, second = (pipe(p, num_frames=3, seed=0, **FAST).frames for p in PROMPTS)
    assert np.isfinite(first).all() and not np.array_equal(first, second)


# clips


def test_a_clip_is_the_same_alone_and_in_a_batch(shared):
    together = shared([*PROMPTS, "the circle"], num_frames=4, seed=[3, 9, 4], **FAST).frames
    for clip, prompt, seed in zip(together, [*PROMPTS, "the circle"], [3, 9, 4], strict=True):
        alone = shared(prompt, num_frames=4, seed=seed, **FAST).frames[0]
        np.testing.assert_allclose(clip, alone, **CLOSE)


def test_seeds_generators_and_latents_agree(shared):
    call = {"prompt": PROMPTS, "num_frames": 3, **FAST}
    by_first_seed = shared(seed=8, **call).frames
    assert np.array_equal(by_first_seed, shared(seed=[8, 9], **call).frames)
    assert np.array_equal(by_first_seed, shared(generator=generators(8, 9), **call).frames)
    noise = torch.cat([torch.randn(1, 4, 3, 8, 8, generator=one) for one in generators(8, 9)])
    by_latents = shared(PROMPTS, latents=noise, **FAST).frames
    assert np.array_equal(by_first_seed, by_latents)
    assert not np.array_equal(by_first_seed, shared(seed=9, **call).frames)


def test_stochastic_steps_draw_from_each_clips_own_generator(shared):
    call = {"num_frames": 3, "eta": 1.0, **FAST}
    together = shared(PROMPTS, seed=[1, 2], **call).frames
    alone = shared(PROMPTS[1], seed=2, **call).frames[0]
    np.testing.assert_allclose(together[1], alone, **CLOSE)
    assert not np.allclose(alone, shared(PROMPTS[1], seed=2, num_frames=3, **FAST).frames[0])


def test_clips_of_one_prompt_stand_together(shared):
    out = shared(PROMPTS, num_videos_per_prompt=2, num_frames=2, seed=5, **FAST)
    assert [m["prompt"] for m in out.metadata] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [m["seed"] for m in out.metadata] == [5, 6, 7, 8]
    for index, described in enumerate(out.metadata):
        alone = shared(described["prompt"], seed=described["seed"], num_frames=2, **FAST).frames
        np.testing.assert_allclose(out.frames[index], alone[0], **CLOSE)


def test_negative_prompts(shared):
    call = {"prompt": PROMPTS, "num_frames": 2, "seed": 0, **FAST}
    without, one = shared(**call).frames, shared(negative_prompt="green", **call).frames
    assert not np.array_equal(without, one)
    assert np.array_equal(one, shared(negative_prompt=["green", "green"], **call).frames)
    device = torch.device("cpu")
    texts, negatives = shared.encode_prompt(PROMPTS, device, 1, True, ["green"] * 2)
    call.pop("prompt")
    by_embeds = shared(prompt_embeds=texts, negative_prompt_embeds=negatives, **call).frames
    assert np.array_equal(one, by_embeds)
    by_mixed = shared(prompt_embeds=texts, negative_prompt="green", **call).frames
    assert np.array_equal(one, by_mixed)
    unguided = [
        shared(prompt_embeds=texts, negative_prompt=n, guidance_scale=1.0, **call).frames
        for n in ("green", None)
    ]
    assert np.array_equal(*unguided)


def test_clip_skip_is_an_encoder_with_fewer_layers(shared):
    device = torch.device("cpu")
    full, _ = shared.encode_prompt(PROMPTS, device, 1, False)
    same, _ = shared.encode_prompt(PROMPTS, device, 1, False, clip_skip=0)
    torch.testing.assert_close(full, same)
    skipped, negative = shared.encode_prompt(PROMPTS, device, 2, True, "a", clip_skip=1)

    shorter = make()
    root = getattr(shorter.text_encoder, "text_model", shorter.text_encoder)
    root.encoder.layers = root.encoder.layers[:-1]
    expected, _ = shorter.encode_prompt(PROMPTS, device, 2, False)
    torch.testing.assert_close(skipped, expected)
    assert negative.shape == expected.shape
    with pytest.raises(ValueError, match="clip_skip"):
        shared(PROMPTS[0], clip_skip=3, num_frames=2, **FAST)


def test_callback_sees_every_step_and_may_replace_tensors(shared):
    seen = []

    def clear(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: t.shape for name, t in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = shared(
        "a red circle",
        num_frames=3,
        callback_on_step_end=clear,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        **{**FAST, "output_type": "latent"},
    )
    assert [step for step, *_ in seen] == [0, 1, 2]
    assert seen[0][2]["latents"] == (1, 4, 3, 8, 8)
    assert seen[0][2]["prompt_embeds"] == (2, tiny.MAX_LENGTH, 32)
    assert out.frames.shape == (1, 4, 3, 8, 8) and not out.frames.any()


def test_keys_of_the_text_serve_all_steps_unless_a_callback_may_change_them(shared):
    attentions = (module for module in shared.unet.modules() if isinstance(module, Attention))
    linear = next(module for module in attentions if module.is_cross_attention).to_k
    computed = []
    linear.forward = lambda text: computed.append(len(text)) or nn.Linear.forward(linear, text)
    try:
        kept = shared("a red circle", num_frames=3, seed=0, **FAST).frames
        assert computed == [2]

        def change(pipe, step, timestep, tensors):
            linear.weight.mul_(1.5)
            return {}

        weight = linear.weight.clone()
        computed.clear()
        changed = shared("a red circle", num_frames=3, seed=0, callback_on_step_end=change, **FAST)
        linear.weight.data.copy_(weight)
        assert computed == [2, 2, 2] and not np.array_equal(changed.frames, kept)
    finally:
        del linear.forward


def test_interrupt_stops_after_the_step(shared):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    shared("a red circle", num_frames=2, callback_on_step_end=stop, **FAST)
    assert steps == [0, 1]
    shared("a red circle", num_frames=2, callback_on_step_end=stop, **FAST)
    assert steps == [0, 1, 0, 1]


def test_output_types_show_the_same_clip(shared):
    call = {"prompt": PROMPTS, "num_frames": 3, "seed": 2, "num_inference_steps": 2}
    pil, array, tensor = (shared(output_type=kind, **call) for kind in ("pil", "np", "pt"))
    assert array.frames.shape == (2, 3, 16, 16, 3)
    assert tensor.frames.shape == (2, 3, 3, 16, 16) and tensor.frames.dtype == torch.float32
    assert np.array_equal(tensor.frames.permute(0, 1, 3, 4, 2).numpy(), array.frames)
    assert array.frames.min() >= 0.0 and array.frames.max() <= 1.0
    for kind in (pil, tensor):
        for ours, theirs in zip(kind.to_uint8(), array.to_uint8(), strict=True):
            assert np.array_equal(ours, theirs)
    latents = shared(output_type="latent", **call)
    assert latents.frames.shape == (2, 4, 3, 8, 8)
    frames, flags = shared.decode_frames(latents.frames)
    assert torch.equal(frames, tensor.frames) and flags is None
    with pytest.raises(ValueError, match="latents"):
        latents.save("nothing.gif")
    (only,) = shared(output_type="np", return_dict=False, **call)
    assert np.array_equal(only, array.frames)


def test_decoding_in_chunks_changes_nothing(shared):
    latents = torch.randn(2, 4, 5, 8, 8)
    whole, _ = shared.decode_frames(latents, None)
    assert whole.shape == (2, 5, 3, 16, 16)
    for size in (1, 3, 10, 64):
        torch.testing.assert_close(shared.decode_frames(latents, size)[0], whole, **CLOSE)
    by_image = shared.vae.decode(latents[1, :, 2][None] / shared.vae.config.scaling_factor).sample
    torch.testing.assert_close(whole[1, 2], (by_image[0] / 2 + 0.5).clamp(0, 1), **CLOSE)
    shared.vae.enable_slicing()
    torch.testing.assert_close(shared.decode_frames(latents, 4)[0], whole, **CLOSE)
    shared.vae.disable_slicing()


def test_safety_checker_blanks_the_frames_it_flags(monkeypatch):
    pipe = make()

    def flag_second(image, device, dtype):
        image = image.clone()
        image[1] = 0.0
        return image, [index == 1 for index in range(len(image))]

    pipe.safety_checker = tiny.text_encoder(8)  # any module: what it would say is replaced
    monkeypatch.setattr(pipe, "run_safety_checker", flag_second)
    out = pipe("a red circle", num_frames=3, seed=0, **FAST)
    assert out.nsfw_content_detected == [[False, True, False]]
    assert not out.frames[0, 1].any() and out.frames[0, 0].any()


def test_metadata_tells_how_a_clip_was_made_but_not_where_the_model_lies(tmp_path, shared):
    shared.save_pretrained(tmp_path / "my-model")
    pipe = quiet(LatentShiftPipeline.from_pretrained(tmp_path / "my-model"))
    out = pipe("a red circle", negative_prompt="blue", num_frames=2, seed=11, **FAST)
    (told,) = out.metadata
    assert (told["prompt"], told["negative_prompt"], told["seed"]) == ("a red circle", "blue", 11)
    assert told["model"] == "my-model" and str(tmp_path) not in json.dumps(told)
    assert told["shift"]["preset"] == "latent_shift"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"num_frames": 0}, ValueError, "num_frames"),
        ({"num_frames": 2.0}, ValueError, "num_frames"),
        ({"height": 15}, ValueError, "multiples of 2"),
        ({"width": 0}, ValueError, "multiples of 2"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"num_videos_per_prompt": 0}, ValueError, "num_videos_per_prompt"),
        ({"decode_chunk_size": 0}, ValueError, "decode_chunk_size"),
        ({"fps": 0}, ValueError, "fps"),
        ({"prompt": 3}, TypeError, "prompt"),
        ({"prompt": [1]}, TypeError, "prompt"),
        ({"prompt": []}, ValueError, "empty"),
        ({"prompt": None}, ValueError, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 16, 32)}, ValueError, "not both"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt"),
        ({"generator": generators(1, 2)}, ValueError, "generator"),
        ({"seed": [1, 2]}, ValueError, "seed"),
        ({"seed": 1, "generator": generators(1)}, ValueError, "not both"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, ValueError, r"\(B, C, T, h, w\)"),
        ({"latents": torch.zeros(1, 4, 2, 8, 8), "num_frames": 3}, ValueError, "latents"),
        ({"output_type": "gif"}, ValueError, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(shared, call, error, message):
    with pytest.raises(error, match=message):
        shared(**{"prompt": "a red circle", **call})


# the real architecture

# configurations of the published Stable Diffusion 1.5, without what is at its default
SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}


def random_weights(cls: type, config: dict) -> nn.Module:
    """A model with random weights, without the minute that drawing every one of them takes."""
    with torch.device("meta"):
        model = cls(**config)
    model = model.to_empty(device="cpu")
    pool = torch.randn(2**20 + 7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        scaled = pool * parameter[0].numel() ** -0.5
        for part in parameter.data.view(-1).split(len(pool)):
            part.copy_(scaled[: len(part)])
    return model.eval()


@pytest.mark.slow
def test_stable_diffusion_15_saves_loads_and_makes_the_same_clip(tmp_path):
    source = tiny.image_pipeline()
    unet = random_weights(UNet2DConditionModel, SD15_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    components = {
        **source.components,
        "unet": unet,
        "vae": random_weights(AutoencoderKL, SD15_VAE),
        "text_encoder": tiny.text_encoder(len(source.tokenizer), 768, layers=1),
    }
    pipe = quiet(LatentShiftPipeline(**{**components, "unet": insert_shift(unet)}))
    call = {"prompt": "a red circle", "num_frames": 2, "height": 64, "width": 64, "seed": 3}
    # without guidance and in one step: the point is the architecture, not the picture
    call |= {"guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "np"}
    here = pipe(**call).frames
    assert here.shape == (1, 2, 64, 64, 3) and np.isfinite(here).all() and here.std() > 0.01
    folder = tmp_path / "model"
    try:
        pipe.save_pretrained(folder)
        # two copies of the weights at once would not fit every machine
        del pipe, unet, components
        assert np.array_equal(here, in_fresh_process(folder, call, tmp_path))
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # 4 GB, which pytest would keep
