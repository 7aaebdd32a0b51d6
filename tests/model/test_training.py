"""Training: recipes, whole checkpoints, bitwise resume, and every stage once on a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import CLIPTextModel

from latent_shift.training import checkpoints, config, load_recipe, recipe_names, train, trainer
from latent_shift.training.export import load_run
from latent_shift.training.stages import (
    Latents,
    TextStage,
    VideoStage,
    Workspace,
    crop_around,
    fold_latent_statistics,
)

TINY = """
name = "tiny"
save_seconds = 0.0
[data]
size = 32
num_frames = 4
clips = 6
[autoencoder]
block_out_channels = [4, 8]
latent_channels = 2
norm_num_groups = 2
steps = 4
batch = 2
full_batch = 2
crop = 16
crop_share = 0.5
[text]
hidden_size = 16
layers = 1
heads = 2
steps = 3
batch = 4
group = 2
frames = 2
widths = [4, 4]
[unet]
block_out_channels = [8, 16]
attention = [false, true]
heads = 2
norm_num_groups = 4
[image]
steps = 4
batch = 4
crop_share = 0.5
crop = 8
crop_batch = 6
[video]
steps = 6
batch = 2
image_every = 3
image_batch = 2
[sampling]
steps = 2
prompts = 2
batch = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    assert train(recipe, output_dir=root)
    return root


def test_the_shipped_recipes_load():
    assert "embedded" in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_text_encoder_that_is_there_is_taken_as_it_is(finished, recipe, tmp_path):
    source = f"text.init_from={finished / 'pipeline'}"
    assert train(recipe, [source], output_dir=tmp_path, stages=["autoencoder", "text", "image"])
    assert not (tmp_path / "text").exists()
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        taken, given = (root / "pipeline" / name for root in (tmp_path, finished))
        assert taken.read_bytes() == given.read_bytes()
    (tmp_path / "image" / "done").unlink()
    assert train(recipe, [source], output_dir=tmp_path, stages=["image"])
    (tmp_path / "image" / "done").unlink()
    shutil.copytree(finished / "pipeline", tmp_path / "other")
    encoder = CLIPTextModel.from_pretrained(tmp_path / "other" / "text_encoder")
    next(encoder.parameters()).data += 1
    encoder.save_pretrained(tmp_path / "other" / "text_encoder")
    source = f"text.init_from={tmp_path / 'other'}"
    with pytest.raises(trainer.TrainingError, match="is not the text encoder of text.init_from"):
        train(recipe, [source], output_dir=tmp_path, stages=["image"])
    shutil.rmtree(tmp_path / "pipeline" / "text_encoder")
    with pytest.raises(trainer.TrainingError, match="128 wide.*text.hidden_size is 16: set it"):
        train(recipe, ["text.init_from=embedded"], output_dir=tmp_path, stages=["image"])


def test_scores_of_a_run_that_had_come_further_are_replaced(tmp_path):
    results = trainer.Results(tmp_path / "scores.json")
    for step, score in ((0, 1), (2, 2), (4, 3), (2, 4)):
        results.record("video", {"step": step, "score": score})
    results.record("image", {"step": 2, "score": 5})
    kept = [(entry["step"], entry["score"]) for entry in results.read()["video"]]
    assert kept == [(0, 1), (2, 4)] and len(results.read()["image"]) == 1


def test_overrides_and_their_types(recipe):
    loaded = load_recipe(
        recipe, ["video.temporal=none", "image.steps=7", "data.clips=3", "gates.video=1"]
    )
    assert (loaded.video.temporal, loaded.image.steps, loaded.gates.video) == ("none", 7, 1.0)
    assert load_recipe(recipe, ["unet.block_out_channels=[8,8]"]).unet.block_out_channels == (8, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image.step=7", r"image\.step; did you mean image\.steps"),
        ("vido.steps=7", r"vido; did you mean video"),
        ("image.steps=many", r"image\.steps must be int, got 'many'"),
        ("video.temporal=attention", r"video\.temporal must be one of"),
        ("image=3", r"image is a table"),
        ("image.steps", "table.key=value"),
        ("data.size=33", "multiples of 2"),
        ("unet.attention=[true]", "one entry per level"),
        ("text.group=3", "text.batch must be a multiple of text.group, got 4 and 3"),
        ("image.crop=17", "image.crop must be from 1 to the latents' 16, got 17"),
        ("data.two_object_share=0.5", "a crop around one object"),
    ],
)
def test_wrong_keys_and_values_are_named(recipe, override, message):
    with pytest.raises(config.RecipeError, match=message):
        load_recipe(recipe, [override])


def test_an_unknown_recipe_or_stage_is_named(recipe, tmp_path):
    with pytest.raises(config.RecipeError, match="embedded"):
        load_recipe("embeded")
    with pytest.raises(ValueError, match="unknown stages"):
        train(recipe, output_dir=tmp_path, stages=["movie"])


def test_checkpoints_are_kept_replaced_and_pruned(tmp_path):
    for step in (1, 2, 3, 3):
        checkpoints.save_checkpoint(tmp_path, step, {"x": torch.full((3,), step)}, keep=2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "step-00000002",
        "step-00000003",
    ]
    step, state = checkpoints.load_latest(tmp_path)
    assert step == 3 and torch.equal(state["x"], torch.full((3,), 3))
    assert checkpoints.load_latest(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "no note"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = checkpoints.save_checkpoint(tmp_path, 5, {"x": torch.zeros(100)})
    content = (path / "state.pt").read_bytes()
    if damage == "cut":
        (path / "state.pt").write_bytes(content[:-10])
    elif damage == "flip":
        (path / "state.pt").write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    else:
        (path / "state.json").unlink()
    with pytest.raises(checkpoints.DamagedCheckpointError, match="delete this directory"):
        checkpoints.load_latest(tmp_path)


def test_the_learning_rate_rises_stays_and_falls():
    settings = config.OptimizerConfig(warmup=10, decay=0.5)
    factors = [trainer.learning_rate_factor(step, 100, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[10:50] == [1.0] * 40
    assert factors[75] == pytest.approx(0.5) and 0.0 < factors[-1] < 0.03


def test_every_stage_runs_and_reports(finished):
    scores = json.loads((finished / "scores.json").read_text())
    assert set(scores) == {"autoencoder", "text", "image", "video-shift"}
    assert scores["video-shift"][-1]["last"] and "direction" in scores["video-shift"][-1]["scores"]
    assert scores["image"][-1]["missed"]  # four steps cannot reach a gate
    assert (finished / "video-shift" / "done").exists()
    lines = (finished / "video-shift" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 0
    assert json.loads((finished / "recipe.json").read_text())["video"]["steps"] == 6


def test_a_finished_run_is_not_run_again(recipe, finished):
    before = (finished / "scores.json").stat().st_mtime_ns
    assert train(recipe, output_dir=finished)
    assert (finished / "scores.json").stat().st_mtime_ns == before


def test_a_finished_stage_of_other_settings_is_refused(recipe, finished):
    before = (finished / "recipe.json").read_bytes()
    for override, stage, changed in (
        ("image.steps=5", "image", "image.steps = 5, not 4"),
        ("data.size=16", "autoencoder", "data.size = 16, not 32"),
        ("video.placement=block_input", "video-shift", "video.placement = 'block_input', not"),
        ("seed=1", "autoencoder", "seed = 1, not 0"),
    ):
        with pytest.raises(trainer.TrainingError, match=f"{stage} holds .*{changed}"):
            train(recipe, [override], output_dir=finished)
    assert (finished / "recipe.json").read_bytes() == before
    # what changes no weights may change
    free = ["sampling.prompts=3", "keep=1", "evaluate_every=2", "gates.video=1"]
    assert train(recipe, free, output_dir=finished)


def test_a_killed_run_resumes_to_the_same_bits(recipe, finished, tmp_path):
    code = (
        "import os, sys, torch; from latent_shift.training import train, trainer\n"
        "save = trainer.save_checkpoint\n"
        "def save_and_die(directory, step, *args, **kwargs):\n"
        "    save(directory, step, *args, **kwargs)\n"
        "    if directory.parent.name == sys.argv[3] and step == 2: os.kill(os.getpid(), 9)\n"
        "trainer.save_checkpoint = save_and_die\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "train(sys.argv[1], output_dir=sys.argv[2])\n"
    )
    root = tmp_path / "run"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("video-shift"))
    arguments = [sys.executable, "-c", code, recipe, root, "video-shift"]
    result = subprocess.run([*arguments, str(torch.get_num_threads())], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()[-2000:]
    found, state = checkpoints.load_latest(root / "video-shift" / "checkpoints")
    assert found == 2
    unfinished = load_run(root, "video-shift", load_recipe(recipe))
    assert torch.equal(unfinished.unet.conv_in.weight, state["average"]["shadow_params"][0])
    assert train(recipe, output_dir=root)
    _, expected = checkpoints.load_latest(finished / "video-shift" / "checkpoints")
    _, resumed = checkpoints.load_latest(root / "video-shift" / "checkpoints")
    _assert_same(resumed, expected)


def test_a_run_that_is_out_of_time_says_so_and_goes_on(recipe, finished, tmp_path):
    assert not train(recipe, output_dir=tmp_path, stages=["autoencoder"], max_seconds=0.0)
    assert train(recipe, output_dir=tmp_path, stages=["autoencoder"])
    _, expected = checkpoints.load_latest(finished / "autoencoder" / "checkpoints")
    _, found = checkpoints.load_latest(tmp_path / "autoencoder" / "checkpoints")
    _assert_same(found, expected)


def test_latents_are_of_the_clips_that_are_asked_for(recipe, finished):
    def latents(*overrides):
        settings = load_recipe(recipe, ["image.crop_share=0", *overrides])
        return Latents(Workspace(settings, finished, trainer.Clock(None, 60.0)))

    before = latents().values
    assert torch.equal(latents("data.clips=4").values, before[:4])
    for other in ("data.two_object_share=1", "data.num_frames=5", "seed=1"):
        assert not torch.equal(latents(other).values[:, :4], before), other
    assert torch.equal(latents().values, before)


def test_the_ablation_differs_in_the_shift_alone(recipe, finished):
    stages = []
    for temporal in ("shift", "none"):
        settings = load_recipe(recipe, [f"video.temporal={temporal}"])
        workspace = Workspace(settings, finished, trainer.Clock(None, 60.0))
        assert workspace.directory_of("video") == f"video-{temporal}"
        stages.append(VideoStage(workspace))
    shift, none = stages
    assert list(shift.unet.state_dict()) == list(none.unet.state_dict())
    generator = torch.Generator().manual_seed(0)
    noisy, steps = torch.randn(2, 4, 2, 16, 16, generator=generator), torch.tensor([10, 900])
    with torch.no_grad():
        text = shift.encode_text(["a red circle", "a blue square moving left"])
        both = [stage.predict(noisy, steps, text) for stage in stages]
        assert not torch.allclose(*both)
        # without the shift, a frame does not depend on the others
        changed = noisy.clone()
        changed[:, 2:] += 1.0
        assert torch.allclose(none.predict(changed, steps, text)[:, :2], both[1][:, :2], atol=1e-5)
        # and one frame is the image model in both arms
        single = [stage.predict(noisy[:, :1], steps, text) for stage in stages]
        assert torch.allclose(*single, atol=1e-5)


def test_a_crop_holds_the_centre_that_it_is_given():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        x, y, *corner = torch.rand(4, generator=generator).tolist()
        row, column = int(y * 16), int(x * 16)
        image = torch.zeros(2, 16, 16)
        image[:, row, column] = 1.0
        cut = crop_around(image, (x, y), torch.tensor(corner), 8)
        assert cut.shape == (2, 8, 8)
        assert cut.sum() == 2


@pytest.mark.parametrize(("mean", "uniform"), [(0.6, 0.0), (1.4, 0.0), (0.0, 1.0)])
def test_time_steps_lie_where_the_recipe_says(recipe, finished, mean, uniform):
    settings = [f"video.time_mean={mean}", "video.time_std=0.9", f"video.time_uniform={uniform}"]
    workspace = Workspace(load_recipe(recipe, settings), finished, trainer.Clock(None, 60.0))
    times = VideoStage(workspace)._times(20_000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.0 and times.max() < 1.0
    low, middle, high = times.quantile(torch.tensor([0.16, 0.5, 0.84])).tolist()
    if uniform:
        assert (low, middle, high) == pytest.approx((0.16, 0.5, 0.84), abs=0.02)
    else:
        logits = torch.tensor([mean - 0.9, mean, mean + 0.9])
        assert (low, middle, high) == pytest.approx(torch.sigmoid(logits).tolist(), abs=0.02)


def test_the_text_encoder_is_learned_once_and_frozen(recipe, finished):
    settings = load_recipe(recipe)
    trained = load_run(finished, "video-shift", settings).text_encoder.state_dict()
    torch.manual_seed(trainer.derive_seed(settings.seed, "text", "initial weights"))
    stage = TextStage(Workspace(settings, finished, trainer.Clock(None, 60.0)))
    first = stage.model.text_encoder.state_dict()
    assert any(not torch.equal(first[name], trained[name]) for name in trained)
    image = load_run(finished, "image", settings).text_encoder.state_dict()
    assert all(torch.equal(image[name], trained[name]) for name in trained)


def test_an_exported_model_tells_nothing_of_the_machine(finished):
    configs = list((finished / "model").rglob("*.json"))
    assert {path.name for path in configs} >= {"model_index.json", "config.json"}
    assert not [path for path in configs if str(finished) in path.read_text()]


def test_folding_the_statistics_changes_latents_and_not_images(finished):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(finished / "pipeline" / "vae")
    with torch.no_grad():
        vae.quant_conv.bias[:2] += torch.tensor([2.0, -1.0])
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        before = vae.decode(vae.encode(images).latent_dist.mode()).sample
        fold_latent_statistics(vae, [images])
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mode()).sample
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(posterior.mean.mean((0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(posterior.mean.std((0, 2, 3)), torch.ones(2), atol=1e-3)
    assert vae.config.scaling_factor == 1.0


def test_every_process_learns_the_same_tokenizer():
    program = (
        "from latent_shift.training.config import TextConfig\n"
        "from latent_shift.training.stages import make_tokenizer\n"
        "texts = ['a red circle', 'a blue square', 'moving up and left']\n"
        "print(sorted(make_tokenizer(texts, TextConfig()).get_vocab().items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "circle</w>" in outputs.pop()


def test_captions_are_whole_words_to_the_tokenizer(finished):
    from transformers import CLIPTokenizer

    from latent_shift.data.moving_shapes import vocabulary

    tokenizer = CLIPTokenizer.from_pretrained(finished / "pipeline" / "tokenizer")
    for word in vocabulary():
        assert len(tokenizer.tokenize(word)) == 1, word
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert len(ids) == 24 and ids[0] == tokenizer.bos_token_id and ids[4] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red circle"


def test_a_finished_run_is_a_pipeline(finished):
    from latent_shift.pipeline import LatentShiftPipeline

    pipe = LatentShiftPipeline.from_pretrained(finished / "model")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle moving right", num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 32, 32)
    files = [path for path in (finished / "model").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    assert (finished / "model" / "unet" / "config.json").exists()


def _assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _assert_same(*pair)
    else:
        assert found == expected
