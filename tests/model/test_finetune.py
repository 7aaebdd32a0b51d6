"""Finetuning: settings, losses by hand, whole runs on a tiny model, exact resume, and bad input."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from latent_shift import LatentShiftPipeline
from latent_shift.cli import main
from latent_shift.data.cache import CacheError, build_cache
from latent_shift.data.clips import Batch, ClipFormat, open_source
from latent_shift.data.moving_shapes import MovingShapes, render
from latent_shift.temporal import LatentVDMUNet
from latent_shift.training import (
    CheckpointWriteError,
    DamagedCheckpointError,
    Finetune,
    RecipeError,
    TrainingError,
    checkpoints,
    load_recipe,
    train,
    trainer,
)
from latent_shift.training.config import OptimizerConfig
from latent_shift.training.dry_run import dry_run
from latent_shift.training.finetune import FinetuneStage, load_model, make_ranks, run
from latent_shift.training.finetune_config import ModelConfig
from latent_shift.training.measuring import kept_for_backward
from latent_shift.training.validation import motion, say_collapse
from latent_shift.video import write_clip
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]
SHAPES = "moving-shapes:clips=5,frames=4"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_image_pipeline(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def recipe(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "mine.toml"
    path.write_text(
        f"""
        kind = "finetune"
        trackers = []
        [model]
        source = "{model}"
        [data]
        clips = "{SHAPES}"
        num_frames = 3
        height = 16
        width = 16
        batch = 2
        image_every = 3
        image_batch = 2
        [train]
        steps = 4
        accumulate = 2
        [optimizer]
        learning_rate = 1e-3
        warmup = 1
        [checkpoints]
        every = 1
        [validation]
        every = 0
        steps = 1
        clips = 2
        """
    )
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """A run of clips and images, with everything on."""
    root = tmp_path_factory.mktemp("run")
    held_out = f'validation.held_out="{SHAPES}"'
    assert train(recipe, ["validation.every=2", held_out, "train.snr_gamma=5.0"], output_dir=root)
    return root


def stage_of(recipe, *overrides, **objects) -> FinetuneStage:
    settings = load_recipe(recipe, overrides)
    return FinetuneStage(settings, make_ranks(settings), **objects)


def newest(root: Path):
    return checkpoints.load_latest(root / "finetune" / "checkpoints")


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


# settings


def test_the_kind_of_a_recipe_is_told_by_its_key(recipe, tmp_path):
    assert isinstance(load_recipe(recipe), Finetune)
    assert isinstance(load_recipe("finetune"), Finetune)
    # a table in part keeps the other defaults of finetuning
    assert load_recipe(recipe, ["optimizer.warmup=2"]).optimizer.weight_decay == 1e-2
    with pytest.raises(RecipeError, match="kind must be one of"):
        load_recipe(recipe, ["kind=tune"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", r"train\.step; did you mean train\.steps"),
        ("learning_rate=3", r"learning_rate; did you mean optimizer\.learning_rate"),
        ("image.steps=3", "did you mean name|did you mean"),
        ("model.source=''", "model.source is empty"),
        ("data.clips=''", "data.clips is empty"),
        ("data.batch=0", "data.batch must be >= 1"),
        ("data.images=p", "never used: set data.image_every"),
        ("model.temporal=conv", "must be one of"),
        ("model.fold_div=4", "fold_div belongs to the presets"),
        ("train.what=parts", "needs train.patterns"),
        ("train.caption_dropout=1.5", r"must lie in \[0, 1\)"),
        ("optimizer.warmup=4", "leaves none of train.steps"),
        ("optimizer.beta1=1.0", r"beta1 must lie in \[0, 1\)"),
        ("checkpoints.keep=0", "keep must be >= 1"),
        ("precision=fp8", "must be one of"),
    ],
)
def test_wrong_settings_are_named(recipe, override, message):
    if override.startswith("data.images"):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, [override, "data.image_every=0"])
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.zero_terminal_snr=true", "model.prediction=epsilon"], "ends in pure noise"),
        (["model.temporal=vdm", "model.preset=tsm"], "preset belongs to the shift"),
        (["train.patterns=['*']"], "chooses nothing"),
        (["train.what=lora", "train.text_encoder=true"], "text_encoder = false"),
        (["model.temporal=none", "model.boundary=circular"], "boundary belongs to the shift"),
        (["train.lora_rank=4"], "train.lora_rank is never used: set train.what"),
        (["train.text_learning_rate=0.5"], "text_learning_rate is never used"),
    ],
)
def test_settings_that_contradict_each_other(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.zero_terminal_snr=true"], "predicted noise .epsilon. of this checkpoint"),
        (["train.what=parts", "train.patterns=['*.tempral.*']"], "matches no parameter"),
        (["train.what=lora", "train.lora_targets=['to_x']"], "train.lora_targets"),
        (["data.height=17"], "multiples of 2"),
        (["precision=fp16"], "needs a GPU"),
        (["model.layout=runwayml/some"], "model.layout is of single files"),
    ],
)
def test_settings_that_the_checkpoint_contradicts(recipe, overrides, message):
    with pytest.raises(TrainingError, match=message):
        stage_of(recipe, *overrides)


def test_what_is_missing_is_named(recipe, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        stage_of(recipe, "model.source=./nothing")
    with pytest.raises(FileNotFoundError, match="no data set"):
        stage_of(recipe, "data.clips=./nothing")
    with pytest.raises(TrainingError, match="is none of"):
        train(recipe, ['trackers=["tensorbord"]'], output_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match="pip install bitsandbytes"):
        dry_run(load_recipe(recipe, ["optimizer.kind=adamw8bit"]))


def test_adam_of_eight_bits_is_taken_where_it_is_installed(monkeypatch):
    library = ModuleType("bitsandbytes.optim")
    library.AdamW8bit = torch.optim.AdamW  # stands in: what is tested is whose it is, and on what
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)
    settings = OptimizerConfig(kind="adamw8bit", learning_rate=3e-4, beta2=0.98, weight_decay=0.1)
    groups = [{"params": [torch.nn.Parameter(torch.empty(2, device="meta"))]}]
    optimizer = trainer.make_optimizer(settings, groups)
    assert type(optimizer) is library.AdamW8bit
    taken = optimizer.param_groups[0]
    assert (taken["lr"], taken["betas"], taken["weight_decay"]) == (3e-4, (0.9, 0.98), 0.1)
    with pytest.raises(TrainingError, match="needs a GPU"):
        trainer.make_optimizer(settings, [{"params": [torch.nn.Parameter(torch.empty(2))]}])


def test_a_name_on_the_hub_is_a_model(model, tmp_path):
    # as a download leaves it behind; offline, so that nothing else can answer
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model, repo / "snapshots" / ("0" * 40))
    code = (
        "from latent_shift.training.finetune import load_model\n"
        "from latent_shift.training.finetune_config import ModelConfig\n"
        "print(type(load_model(ModelConfig(source='someone/tiny')).unet).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "LatentShiftUNet", done.stderr[-2000:]


def test_the_document_names_every_key_with_its_default(recipe):
    text = (ROOT / "docs" / "training.md").read_text()
    count = 0

    def check(kind: type, where: str) -> None:
        nonlocal count
        hints = get_type_hints(kind)
        for field in fields(kind):
            if is_dataclass(hints[field.name]):
                check(hints[field.name], f"{field.name}.")
                continue
            value = field.default
            shown = json.dumps(list(value) if isinstance(value, tuple) else value)
            assert f"| `{where}{field.name}` | `{shown}` |" in text, f"{where}{field.name} {shown}"
            count += 1

    check(Finetune, "")
    assert count > 60
    rows = [line for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4]
    assert len(rows) == count  # and none that there is not


# schedules, losses, weights


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_warm_up_and_fall(schedule):
    settings = Finetune.__dataclass_fields__["optimizer"].default_factory()
    settings = replace(settings, schedule=schedule, warmup=10)
    factors = [trainer.learning_rate_factor(step, 100, settings) for step in range(100)]
    assert 0 < factors[0] < 0.1 < factors[8] < 1
    assert max(factors) == pytest.approx(1.0, abs=0.01)
    last = {"constant": 1.0, "linear": 0.5 / 90, "cosine": 0.0}[schedule]
    assert factors[-1] == pytest.approx(last, abs=1e-3) and factors[-1] > 0
    middle = {"constant": 1.0, "linear": 44.5 / 90, "cosine": 0.4913}[schedule]
    assert factors[55] == pytest.approx(middle, abs=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_what_the_paper_says(recipe, prediction):
    stage = stage_of(
        recipe,
        f"model.prediction={prediction}",
        "train.snr_gamma=5.0",
        "train.caption_dropout=0.0",
        "train.noise_shift=2.0",
    )
    stage.pipeline.unet.eval()
    latents = torch.randn(2, 3, 4, 8, 8)
    batch = Batch(None, latents, None, ["a red circle", "a blue square"])
    with torch.no_grad():
        found = stage.loss_of(batch, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    noise, u = torch.randn(latents.shape, generator=generator), torch.rand(2, generator=generator)
    times = (2 * u / (1 + u) * 1000).long()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[times].view(2, 1, 1, 1, 1).float()
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    text = stage.pipeline.encode_prompt(batch.captions, "cpu", 1, False)[0]
    with torch.no_grad():
        predicted = stage.pipeline.unet(noisy.transpose(1, 2), times, text).sample.transpose(1, 2)
    snr = (alpha / (1 - alpha)).flatten()
    if prediction == "epsilon":
        target, weight = noise, snr.clamp(max=5.0) / snr
    else:
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        weight = snr.clamp(max=5.0) / (snr + 1)
    expected = (weight * (predicted - target).square().mean((1, 2, 3, 4))).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_dropped_captions_are_the_empty_one(recipe):
    stage = stage_of(recipe)
    batch = Batch(None, torch.zeros(2, 1, 4, 8, 8), None, ["a red circle", "a blue square"])
    text = stage._text(batch, [True, False])
    both = stage.pipeline.encode_prompt(["", "a blue square"], "cpu", 1, False)[0]
    assert torch.allclose(text, both, atol=1e-5)
    trained = stage_of(recipe, "train.text_encoder=true")
    text = trained._text(batch, [True, False])
    assert torch.allclose(text, both, atol=1e-5) and text.requires_grad


def test_zero_terminal_snr_is_trained_and_saved(recipe):
    stage = stage_of(recipe, "model.zero_terminal_snr=true", "model.prediction=v_prediction")
    assert float(stage.scheduler.alphas_cumprod[-1]) == 0.0
    assert stage.weights(torch.tensor([999])).isfinite()
    saved = stage.pipeline.scheduler
    assert isinstance(saved, DDIMScheduler) and saved.config.timestep_spacing == "trailing"
    assert saved.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        (["train.what=parts", "train.patterns=['*.resnets.*.conv1.*']"], "conv1"),
        (["model.temporal=vdm", "train.what=parts", "train.patterns=['*.temporal.*']"], "temporal"),
        (["train.what=lora"], "lora_"),
    ],
)
def test_only_what_is_chosen_learns(recipe, overrides, chosen):
    stage = stage_of(recipe, *overrides)
    config = trainer.LoopConfig(seed=0, keep=1)
    before = {name: p.detach().clone() for name, p in stage.pipeline.unet.named_parameters()}
    loop = trainer.Loop(stage, config, stage.ranks)
    loop.step(0)
    loop.step(1)
    changed = {
        name
        for name, parameter in stage.pipeline.unet.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert changed and all(chosen in name for name in changed)
    assert changed >= {name for name in before if chosen in name and "bias" not in name} or (
        chosen == "temporal"
    )
    assert set(loop.state()["modules"]["unet"]) == {name for name in before if chosen in name}


def test_accumulated_batches_are_one_large_batch(recipe):
    plain = ["data.image_every=0", "train.caption_dropout=0.0", "optimizer.max_grad_norm=0.0"]
    gradients = []
    for sizes in (["data.batch=4", "train.accumulate=1"], ["data.batch=2", "train.accumulate=2"]):
        stage = stage_of(recipe, *plain, *sizes)
        stage.loss_of = lambda batch, generator: _simple_loss(stage, batch)  # noqa: B023
        loop = trainer.Loop(
            stage,
            trainer.LoopConfig(seed=0, keep=1, accumulate=stage.config.train.accumulate),
            stage.ranks,
        )
        loop.step(0)
        state = loop.optimizer.state
        gradients.append(torch.cat([state[p]["exp_avg"].flatten() for p in loop.parameters]))
    assert torch.allclose(*gradients, atol=1e-7)


def _simple_loss(stage, batch):
    generator = torch.Generator().manual_seed(0)
    times = torch.full((len(batch.captions),), 500)
    latents = stage._latents(batch, generator)  # the mean of the posterior differs in noise alone
    latents = torch.ones_like(latents)
    text = stage._text(batch, [False] * len(batch.captions))
    return stage.predict(latents, times, text).square().mean()


# whole runs


def test_a_run_makes_a_pipeline_that_both_libraries_load(finished, recipe):
    pipe = LatentShiftPipeline.from_pretrained(finished / "model")
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle", output_type="pt", num_inference_steps=1).frames
    assert frames.shape == (1, 3, 3, 16, 16)
    _, state = newest(finished)
    average = dict(zip(state["modules"]["unet"], state["average"]["shadow_params"], strict=True))
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, average[name]), name
    unet = UNet2DConditionModel.from_pretrained(finished / "model" / "unet")
    image = StableDiffusionPipeline.from_pretrained(
        finished / "model", unet=unet, safety_checker=None
    )
    image.set_progress_bar_config(disable=True)
    assert image("a", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    assert (finished / "model" / "unet" / "config.json").stat().st_mode & 0o044 == 0o044


def test_a_run_is_validated_from_its_first_step(finished):
    scores = json.loads((finished / "scores.json").read_text())["finetune"]
    assert [entry["step"] for entry in scores] == [0, 2, 4]
    assert {"difference", "second_difference", "loss"} <= scores[0]["scores"].keys()
    clips = sorted(path.name for path in (finished / "validation" / "step-00000002").iterdir())
    assert clips == ["00.gif", "01.gif"]
    first = json.loads((finished / "finetune" / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["loss"] > 0
    saved = [path.name for path in (finished / "finetune" / "checkpoints").iterdir()]
    assert sorted(saved) == ["step-00000003", "step-00000004"]


# One process for all launches, since importing takes longer than training: it forks the ranks of
# each, and prints how they ended.
LAUNCHER = """
import json, os, sys, traceback
import torch
from accelerate import DistributedType, PartialState
from latent_shift.training import train, trainer
torch.set_num_threads(1)
step = trainer.Loop.step
def rank_of(job, rank):
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "WORLD_SIZE": str(job["ranks"]), "MASTER_PORT": job["port"],
                       **job.get("environment", {})}
    if "environment" in job:  # accelerate shards over GPUs alone; torch over anything
        state = PartialState(cpu=True)
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    def step_and_die(loop, number):
        if number == job["die_at"]: os.kill(os.getpid(), 9)
        return step(loop, number)
    trainer.Loop.step = step_and_die
    return 0 if train(job["recipe"], job["overrides"], output_dir=job["output"]) else 3
for job in json.load(sys.stdin):
    children, ends = [], []
    for rank in range(job["ranks"]):
        children.append(os.fork())
        if not children[-1]:
            try:
                os._exit(rank_of(job, rank))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    for child in children:
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends), flush=True)
"""


# What `accelerate launch` tells its processes of FSDP2.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "LOCAL_WORLD_SIZE": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(recipe, tmp_path_factory) -> Path:
    """Runs in processes of their own, on one rank and on two, killed and not."""
    root = tmp_path_factory.mktemp("launched")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    quick = ["data.batch=1", "validation.every=2"]
    jobs = [
        {"output": "one", "ranks": 1, "die_at": 2, "overrides": ["train.snr_gamma=5.0"]},
        {"output": "whole", "ranks": 2, "die_at": None, "overrides": quick},
        {"output": "killed", "ranks": 2, "die_at": 2, "overrides": quick},
        {"output": "killed", "ranks": 2, "die_at": None, "overrides": quick},
        *(
            {"output": name, "ranks": 2, "die_at": die_at, "overrides": quick, "environment": FSDP}
            for name, die_at in (("sharded", None), ("cut", 2), ("cut", None))
        ),
    ]
    for number, job in enumerate(jobs):
        job["port"], job["recipe"] = str(port + number), str(recipe)
        job["output"] = str(root / str(job["output"]))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        input=json.dumps(jobs),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    dead, fine = [-9, -9], [0, 0]
    assert ends == [[-9], fine, dead, fine, fine, dead, fine], done.stderr[-3000:]
    return root


def test_a_killed_run_resumes_to_the_same_bits(finished, launched, recipe):
    assert newest(launched / "one")[0] == 2
    assert train(recipe, ["train.snr_gamma=5.0"], output_dir=launched / "one")
    (step, state), (_, expected) = newest(launched / "one"), newest(finished)
    assert step == 4
    for part in ("modules", "optimizer", "average"):
        assert same(state[part], expected[part]), part


def test_two_ranks_share_the_work_and_resume_to_the_same_bits(finished, launched, recipe):
    (step, state), (_, expected) = newest(launched / "killed"), newest(launched / "whole")
    assert step == 4
    for part in ("modules", "optimizer", "average"):
        assert same(state[part], expected[part]), part
    # two ranks of one clip see the clips of one rank of two, and make as many of validation's
    assert state["about"]["the number of ranks"] == 2
    clips = launched / "whole" / "validation" / "step-00000000"
    assert sorted(path.name for path in clips.iterdir()) == ["00.gif", "01.gif"]
    scores = json.loads((launched / "whole" / "scores.json").read_text())["finetune"]
    alone = json.loads((finished / "scores.json").read_text())["finetune"]
    for key in ("difference", "second_difference", "training_difference"):
        # before any step, the same clips
        assert scores[0]["scores"][key] == pytest.approx(alone[0]["scores"][key], rel=1e-4)


def test_shards_learn_what_whole_models_do_and_resume_to_the_same_bits(launched):
    (step, state), (_, expected) = newest(launched / "cut"), newest(launched / "sharded")
    assert step == 4 and state["sharded"]
    for part in ("weights", "average weights"):
        assert same(state[part], expected[part]), part
    assert same(state["optimizer"]["state"], expected["optimizer"]["state"])
    sharded, whole = (
        LatentShiftPipeline.from_pretrained(launched / name / "model").unet.state_dict()
        for name in ("sharded", "whole")
    )
    apart = torch.cat([(sharded[name] - value).abs().flatten() for name, value in whole.items()])
    assert apart.max() < 1e-4 and apart.mean() < 1e-6  # Adam makes much of the last bits


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_makes_a_checkpoint_and_stops(number, recipe, tmp_path, monkeypatch):
    step = trainer.Loop.step

    def step_and_signal(loop, index):
        if index == 1:
            os.kill(os.getpid(), number)
        return step(loop, index)

    monkeypatch.setattr(trainer.Loop, "step", step_and_signal)
    before = signal.getsignal(number)
    assert not train(recipe, ["checkpoints.every=0"], output_dir=tmp_path)
    assert newest(tmp_path)[0] == 2
    assert signal.getsignal(number) is before


def test_lora_with_dropout_resumes_exactly_and_is_saved_both_ways(recipe, model, tmp_path):
    overrides = ["train.what=lora", "train.lora_rank=2", "train.lora_dropout=0.5", "train.steps=2"]
    overrides += ["data.image_every=0", "train.accumulate=1"]
    assert train(recipe, overrides, output_dir=tmp_path / "a")
    clock = trainer.Clock(None, float("inf"))
    monkey, trainer.Loop.step = trainer.Loop.step, _stop_after_one(trainer.Loop.step, clock)
    try:
        assert not run(load_recipe(recipe, overrides), tmp_path / "b", clock)
    finally:
        trainer.Loop.step = monkey
    assert train(recipe, overrides, output_dir=tmp_path / "b")
    expected, found = newest(tmp_path / "a")[1], newest(tmp_path / "b")[1]
    assert same(found["modules"], expected["modules"])
    assert all("lora_" in name for name in found["modules"]["unet"])
    merged = LatentShiftPipeline.from_pretrained(tmp_path / "a" / "model")
    base = LatentShiftPipeline.from_t2i(model)
    assert list(merged.unet.state_dict()) == list(base.unet.state_dict())
    base.load_lora_weights(tmp_path / "a" / "lora")
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(1, 16, 32)
    with torch.no_grad():
        apart, inside = base.unet(*inputs).sample, merged.unet(*inputs).sample
    assert torch.allclose(apart, inside, atol=1e-4)
    plain = LatentShiftPipeline.from_t2i(model)
    with torch.no_grad():
        assert not torch.allclose(plain.unet(*inputs).sample, inside, atol=1e-5)


def _stop_after_one(step, clock):
    def stopping(loop, index):
        clock.ask_to_stop()
        return step(loop, index)

    return stopping


def test_temporal_layers_begin_by_the_seed(recipe):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        stage = stage_of(recipe, "model.temporal=vdm", f"seed={seed}")
        weights.append(stage.pipeline.unet.state_dict())
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_latent_vdm_starts_as_the_image_model_and_is_saved(recipe, model, tmp_path):
    overrides = ["model.temporal=vdm", "train.steps=2", "train.accumulate=1", "data.batch=1"]
    fresh = stage_of(recipe, *overrides).pipeline.unet.eval()
    image = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).unet
    noisy, times, text = torch.randn(2, 4, 8, 8), torch.tensor([7]), torch.randn(1, 16, 32)
    with torch.no_grad():
        frames = fresh(noisy, times, text, num_frames=2, added_cond_kwargs={}).sample
        assert torch.allclose(frames, image(noisy, times, text.expand(2, -1, -1)).sample, atol=1e-5)
    assert train(recipe, overrides, output_dir=tmp_path)
    pipe = LatentShiftPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(pipe.unet, LatentVDMUNet)
    names = [name for name, _ in pipe.unet.named_parameters() if ".temporal." in name]
    assert names and set(names) < set(newest(tmp_path)[1]["modules"]["unet"])
    # and is gone on from, as what it is
    again = stage_of(recipe, f"model.source={tmp_path / 'model'}", *overrides)
    name = names[0]
    assert torch.equal(again.pipeline.unet.get_parameter(name), pipe.unet.get_parameter(name))
    with pytest.raises(TrainingError, match="holds Latent-VDM layers"):
        stage_of(recipe, f"model.source={tmp_path / 'model'}")


def save_single_file(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Writes a pipeline of `tiny` as one file, under the names of the first Stable Diffusion."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    unet = {
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "conv_in.": "input_blocks.0.0.",
        "down_blocks.0.attentions.0.": "input_blocks.1.1.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
        "mid_block.attentions.0.": "middle_block.1.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
        "up_blocks.1.attentions.0.": "output_blocks.2.1.",
        "up_blocks.1.attentions.1.": "output_blocks.3.1.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    for ours, theirs in {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
    }.items():
        unet |= {f"{ours}.{a}.": f"{theirs}.{b}." for a, b in resnet.items()}
    vae = {
        "down_blocks.0.downsamplers.0.": "down.0.downsample.",
        "down_blocks.": "down.",
        "up_blocks.0.upsamplers.0.": "up.1.upsample.",
        "up_blocks.0.": "up.1.",
        "up_blocks.1.": "up.0.",
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.group_norm.": "mid.attn_1.norm.",
        "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out.",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "resnets.": "block.",
        "conv_shortcut.": "nin_shortcut.",
        "conv_norm_out.": "norm_out.",
    }
    state = {}
    for names, module, begin in (
        (unet, pipe.unet, "model.diffusion_model."),
        (vae, pipe.vae, "first_stage_model."),
        ({}, pipe.text_encoder, "cond_stage_model.transformer."),
    ):
        for name, value in module.state_dict().items():
            new = name
            for ours, theirs in names.items():
                if names is vae or new.startswith(ours):
                    new = new.replace(ours, theirs)
            if begin.startswith("cond") and not new.startswith("text_model."):
                new = f"text_model.{new}"
            state[begin + new] = value.contiguous()
    save_file(state, path)


def test_a_single_file_is_the_model_that_its_folder_is(model, tmp_path):
    path = tmp_path / "one.safetensors"
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    save_single_file(pipe, path)
    loaded = load_model(ModelConfig(source=str(path), layout=str(model), preset="tsm", fold_div=4))
    for name in ("unet", "vae", "text_encoder"):
        assert same(getattr(loaded, name).state_dict(), getattr(pipe, name).state_dict()), name
    assert (loaded.unet.shift_config.preset, loaded.unet.shift_config.fold_div) == ("tsm", 4)


def test_a_video_model_is_gone_on_from_with_the_shift_that_is_asked_for(finished, recipe):
    stage = stage_of(recipe, f"model.source={finished / 'model'}", "model.boundary=circular")
    assert stage.pipeline.unet.shift_config.boundary == "circular"
    still = stage_of(recipe, f"model.source={finished / 'model'}", "model.temporal=none")
    assert still.pipeline.unet.shift_config.preset == "none"


def test_tensorboard_gets_losses_and_scores(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    short = ["train.steps=1", "optimizer.warmup=0", "train.accumulate=1", "data.image_every=0"]
    assert train(recipe, [*short, "trackers=['tensorboard']"], output_dir=tmp_path)
    tags = {
        value.tag
        for path in (tmp_path / "logs").rglob("events.*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert {"loss", "gradient norm", "learning rate", "validation/difference"} <= tags


def test_half_precision_checkpointing_and_a_source_of_ones_own(recipe):
    settings = load_recipe(
        recipe, ["precision=bf16", "train.gradient_checkpointing=true", "train.what=lora"]
    )
    stage = FinetuneStage(
        settings,
        make_ranks(settings),
        pipeline=tiny.image_pipeline(),
        clips=open_source(SHAPES),
    )
    loop = trainer.Loop(stage, trainer.LoopConfig(seed=0, keep=1), stage.ranks)
    assert torch.isfinite(loop.step(0))
    assert {p.dtype for p in loop.parameters} == {torch.float32}
    assert stage.pipeline.unet.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["all", "lora"])
def test_half_precision_saves_what_is_not_trained_as_it_was(recipe, model, tmp_path, what):
    overrides = ["precision=bf16", f"train.what={what}", "train.steps=2", "data.image_every=0"]
    assert train(recipe, [*overrides, "optimizer.learning_rate=1e-4"], output_dir=tmp_path)
    source = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    saved = LatentShiftPipeline.from_pretrained(tmp_path / "model")
    for name in ("vae", "text_encoder"):
        assert same(getattr(saved, name).state_dict(), getattr(source, name).state_dict()), name
    if what == "lora":
        before, after = source.unet.state_dict(), saved.unet.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed and all(".to_" in name or ".conv" in name for name in changed)
        base = LatentShiftPipeline.from_t2i(source)
        base.load_lora_weights(tmp_path / "lora")
        base.unet.fuse_lora()
        base.unet.unload_lora()
        for name, value in base.unet.state_dict().items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-7)


def test_recomputed_activations_are_a_setting(recipe):
    whole = stage_of(recipe, "train.recompute_activations=true")
    batch = whole.batch(1)
    losses, kept = [], []
    for stage in (whole, stage_of(recipe)):
        loss = partial(stage.loss_of, batch, torch.Generator().manual_seed(0))
        losses.append(loss())
        loss = partial(stage.loss_of, batch, torch.Generator().manual_seed(0))
        kept.append(kept_for_backward(stage.pipeline.unet, loss))
    torch.testing.assert_close(*losses)
    assert kept[0] < kept[1]
    with pytest.raises(TrainingError, match='leave "conv1" and "conv2" out'):
        loop = stage_of(recipe, "train.recompute_activations=true", "train.what=lora")
        trainer.Loop(loop, trainer.LoopConfig(seed=0, keep=1), loop.ranks)


def test_a_cache_trains_like_the_clips_it_was_made_of(recipe, model, tmp_path):
    form = ClipFormat(3, 16, 16, crop="center", start="middle")
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    parts = (pipe.vae, pipe.text_encoder, pipe.tokenizer)
    build_cache(open_source(SHAPES), form, *parts, tmp_path / "cache", posterior="mean",
                dtype="float32")  # fmt: skip
    still = ["data.start=middle", f"data.clips={tmp_path / 'cache'}"]
    stage = stage_of(recipe, *still)
    batch = stage.batch(1)
    assert batch.pixels is None and batch.latents.shape == (2, 3, 4, 8, 8)
    assert stage.batch(0).latents.shape == (2, 1, 4, 8, 8)  # an image step: a frame of each
    text = stage._text(batch, [False, True])
    live = stage.pipeline.encode_prompt([batch.captions[0], ""], "cpu", 1, False)[0]
    assert torch.allclose(text, live, atol=1e-5)
    prompts, truth = stage._reference()
    assert len(prompts) == 2 and truth["difference"] > 0
    for wrong in ("data.start=random", "data.crop=random", "data.flip=true"):
        with pytest.raises(ValueError, match="a cache holds one sample of each clip"):
            stage_of(recipe, *still, wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_the_command_is_the_one_that_training_takes(recipe, model, tmp_path, dtype):
    """In half precision too, as a GPU makes it; images and held-out clips may be caches."""
    call = ["data", "cache", SHAPES, "-m", str(model), "--size", "16x16", "--dtype", dtype]
    assert main([*call, "-o", str(tmp_path / "clips"), "--frames", "3"]) == 0
    assert main([*call, "-o", str(tmp_path / "images"), "--frames", "1"]) == 0
    stage = stage_of(
        recipe, "data.start=middle", f"data.clips={tmp_path / 'clips'}",
        f"data.images={tmp_path / 'images'}", f"validation.held_out={tmp_path / 'clips'}",
    )  # fmt: skip
    assert stage.batch(1).latents.shape == (2, 3, 4, 8, 8)
    assert stage.batch(0).latents.shape == (2, 1, 4, 8, 8)
    assert stage._held_out_loss() > 0
    again = main([*call[:-1], "float16", "-o", str(tmp_path / "clips"), "--frames", "3"])
    assert again == 1  # computed in another dtype
    (tmp_path / "clips" / "manifest.json").write_text('{"clips": 3, "other": 1}')
    with pytest.raises(CacheError, match="entries are missing"):
        stage_of(recipe, "data.start=middle", f"data.clips={tmp_path / 'clips'}")


def test_a_cache_of_a_single_file(recipe, model, tmp_path, capsys):
    path = tmp_path / "one.safetensors"
    save_single_file(StableDiffusionPipeline.from_pretrained(model, safety_checker=None), path)
    call = ["data", "cache", SHAPES, "-m", str(path), "--size", "16x16", "--frames", "3", "-o"]
    assert main([*call, str(tmp_path / "a")]) == 1
    assert "name a folder of the same layout" in capsys.readouterr().err
    assert main([*call, str(tmp_path / "a"), "--layout", str(model)]) == 0
    source = [f"model.source={path}", f"model.layout={model}", f"data.clips={tmp_path / 'a'}"]
    assert stage_of(recipe, "data.start=middle", *source).batch(1).latents is not None


# trouble on the way


def test_a_finished_folder_is_said_to_be_so(recipe, finished, capsys):
    """As it was trained, in "finished"."""
    held_out = f'validation.held_out="{SHAPES}"'
    same = ["validation.every=2", held_out, "train.snr_gamma=5.0"]
    assert train(recipe, same, output_dir=finished)
    assert "holds this run, finished" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="of other settings .train.snr_gamma = 0.0, not 5.0"):
        train(recipe, output_dir=finished)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(recipe, tmp_path):
    short = ["train.accumulate=1", "data.image_every=0"]
    assert train(recipe, short, output_dir=tmp_path)
    folder = tmp_path / "finetune" / "checkpoints"
    expected = newest(tmp_path)[1]["modules"]
    content = (folder / "step-00000004" / "state.pt").read_bytes()
    (folder / "step-00000004" / "state.pt").write_bytes(content[:-100])
    (tmp_path / "finetune" / "done").unlink()
    with pytest.raises(DamagedCheckpointError, match="--resume-from previous .* step-00000003"):
        train(recipe, short, output_dir=tmp_path)
    assert train(recipe, short, output_dir=tmp_path, resume_from="previous")
    assert same(newest(tmp_path)[1]["modules"], expected)
    assert (folder / "aside-step-00000004").is_dir()
    with pytest.raises(ValueError, match='"latest" or "previous"'):
        train(recipe, output_dir=tmp_path, resume_from="first")


def test_a_checkpoint_of_other_settings_is_refused_or_told_of(recipe, tmp_path, capsys):
    short = ["train.steps=1", "optimizer.warmup=0", "train.accumulate=1", "data.image_every=0"]
    assert train(recipe, short, output_dir=tmp_path)
    longer = [*short, "train.steps=2"]
    with pytest.raises(TrainingError, match="trains something else"):
        train(recipe, [*longer, "train.what=lora"], output_dir=tmp_path)
    with pytest.raises(TrainingError, match="moving average"):
        train(recipe, [*longer, "optimizer.ema_decay=0.0"], output_dir=tmp_path)
    capsys.readouterr()
    assert train(recipe, [*longer, "data.batch=1"], output_dir=tmp_path)
    told = capsys.readouterr().err
    assert "WARNING: data.batch, train.steps changed since the checkpoint" in told


def test_a_full_disk_leaves_the_old_checkpoint_and_training_goes_on(
    recipe, tmp_path, capsys, monkeypatch
):
    """A limit on the size of files is what a process can set itself; writing fails half-way."""
    save, tries = trainer.save_checkpoint, Counter()

    def save_where_there_is_room(directory, step, *arguments, **named):
        tries[step] += 1
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step in (2, 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            return save(directory, step, *arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(trainer, "save_checkpoint", save_where_there_is_room)
    short = ["train.accumulate=1", "data.image_every=0", "data.batch=1"]
    with pytest.raises(CheckpointWriteError, match="step 4 .* MiB free.*step-00000003 is whole"):
        train(recipe, short, output_dir=tmp_path)
    told = capsys.readouterr().err
    assert "WARNING: the checkpoint of step 2" in told and "step-00000001 is whole" in told
    folder = tmp_path / "finetune" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]
    monkeypatch.undo()
    assert train(recipe, short, output_dir=tmp_path)


def test_a_step_without_memory_says_what_would_fit(recipe, monkeypatch):
    loss_of = FinetuneStage.loss_of

    def hungry(stage, batch, generator):
        rows = len(batch.captions)
        if rows > limit:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
        return loss_of(stage, batch, generator)

    monkeypatch.setattr(FinetuneStage, "loss_of", hungry)
    plain = ["data.image_every=0", "data.batch=4", "train.accumulate=1"]
    stage = stage_of(recipe, *plain)
    loop = trainer.Loop(stage, trainer.LoopConfig(seed=0, keep=1), stage.ranks)

    def told(loop: trainer.Loop, step: int = 0) -> str:
        with pytest.raises(trainer.OutOfMemory) as failure:
            loop.step(step)
        assert all(parameter.grad is None for parameter in loop.parameters)
        return str(failure.value.advised(loop.stage))

    limit = 1
    assert "this fits: data.batch = 1, train.accumulate = 4" in told(loop)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStage, "_fits", lambda *given: "recompute" in given[-1])
        assert "this fits: train.recompute_activations = true" in told(loop)
    limit = -1
    assert "fewer data.num_frames or pixels" in told(loop)


@pytest.mark.parametrize(("clips", "images"), [(4, 2), (2, 4), (4, 4)])
def test_the_batch_that_failed_is_the_one_to_change(recipe, monkeypatch, clips, images):
    """A step of three batches, the first of images: whichever does not fit is named, and what is
    said fits both."""
    loss_of, tried = FinetuneStage.loss_of, []
    sizes = [f"data.batch={clips}", f"data.image_batch={images}"]
    stage = stage_of(recipe, "data.image_every=3", "train.accumulate=3", *sizes)
    loop = trainer.Loop(stage, trainer.LoopConfig(seed=0, keep=1, accumulate=3), stage.ranks)

    def hungry(stage, batch, generator):
        single = batch.pixels.shape[1] == 1
        tried.append((single, len(batch.captions)))
        # clips need more than images do
        if len(batch.captions) * (1 if single else 3) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(stage, batch, generator)

    monkeypatch.setattr(FinetuneStage, "loss_of", hungry)
    monkeypatch.setattr("latent_shift.training.finetune.recompute_activations", lambda *_: 0)
    limit = max(images, 3)
    with pytest.raises(trainer.OutOfMemory) as failure:
        loop.step(0)
    assert failure.value.batch == 1 and failure.value.whole
    said = str(failure.value.advised(stage))
    assert f"this fits: data.batch = 1, train.accumulate = {3 * clips}" in said
    assert tried[-1] == (True, images)
    limit = 1
    with pytest.raises(trainer.OutOfMemory) as failure:
        loop.step(0)
    assert failure.value.batch == 0
    assert "set train.gradient_checkpointing" in str(failure.value.advised(stage))


def test_a_step_without_memory_loses_nothing(recipe, tmp_path, monkeypatch):
    loss_of = FinetuneStage.loss_of

    def hungry(stage, batch, generator):
        steps.append(len(batch.captions))
        if len(steps) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(stage, batch, generator)

    steps: list[int] = []
    rare = ["checkpoints.every=0", "data.image_every=0"]
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneStage, "loss_of", hungry)
        with pytest.raises(TrainingError, match="step 2 ran out of memory"):
            train(recipe, rare, output_dir=tmp_path / "a")
    assert newest(tmp_path / "a")[0] == 2
    assert train(recipe, rare, output_dir=tmp_path / "a")
    assert train(recipe, rare, output_dir=tmp_path / "b")
    assert same(newest(tmp_path / "a")[1]["modules"], newest(tmp_path / "b")[1]["modules"])


def test_a_full_disk_costs_the_log_and_not_the_run(recipe, tmp_path, capsys):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "log.jsonl").symlink_to("/dev/full")
    (tmp_path / "validation").write_text("in the way of validation clips")
    assert train(recipe, ["train.steps=2"], output_dir=tmp_path)
    told = capsys.readouterr().err
    assert "WARNING: the log could not be written ([Errno 28]" in told
    assert "WARNING: a validation clip could not be written" in told
    assert newest(tmp_path)[0] == 2


def test_weights_that_are_not_finite_are_not_saved(recipe, tmp_path, monkeypatch):
    loss_of = FinetuneStage.loss_of
    monkeypatch.setattr(
        FinetuneStage, "loss_of", lambda *arguments: loss_of(*arguments) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        train(recipe, output_dir=tmp_path)
    assert checkpoints.list_checkpoints(tmp_path / "finetune" / "checkpoints") == []


def test_clips_in_a_folder_train_and_damaged_ones_are_counted(recipe, tmp_path, caplog):
    truths = MovingShapes(0, num_frames=4, size=16)
    for index in range(3):
        frames = (render([truths.truth(index)], 16)[0].permute(0, 2, 3, 1) * 255).byte().numpy()
        write_clip(frames, tmp_path / f"{index}.mp4", fps=8.0)
        (tmp_path / f"{index}.txt").write_text(truths.prompt(index).text)
    (tmp_path / "3.mp4").write_bytes((tmp_path / "2.mp4").read_bytes()[:500])
    (tmp_path / "3.txt").write_text("a red circle")
    stage = stage_of(recipe, f"data.clips={tmp_path}", "data.image_every=0", "data.batch=4")
    batch = stage.batch(0)
    assert batch.pixels.shape == (4, 3, 3, 16, 16) and "a red circle" not in batch.captions
    assert stage.loss_of(batch, torch.Generator().manual_seed(0)).isfinite()
    with caplog.at_level(logging.WARNING, "latent_shift"):
        stage.evaluate(0)
    assert "so far 1 clips were skipped: unreadable" in caplog.text


# measures


def test_motion_and_its_collapse():
    ramp = torch.arange(5.0).view(1, 5, 1, 1, 1).expand(1, 5, 3, 2, 2) / 10
    assert motion(ramp) == {
        "difference": pytest.approx(0.1),
        "second_difference": pytest.approx(0.0, abs=1e-6),
    }
    noise = torch.rand(2, 5, 3, 8, 8)
    assert motion(noise)["second_difference"] > motion(noise)["difference"] > 0.2
    assert motion(ramp[:, :1]) == {"difference": 0.0, "second_difference": 0.0}
    (still,) = say_collapse(motion(ramp * 0.1), motion(ramp))
    assert "stand still" in still
    (flicker,) = say_collapse(motion(noise), motion(ramp))
    assert "flicker" in flicker
    assert say_collapse(motion(ramp), motion(ramp)) == []


def test_a_dry_run_measures_and_writes_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run(load_recipe(recipe, ["train.accumulate=1"]))
    count = sum(p.numel() for p in tiny.image_pipeline().unet.parameters())
    assert found.trained == found.total == count
    assert found.gradients == found.average == 4 * count
    assert 8 * count <= found.moments < 8.1 * count
    assert found.step > 0 and sum(found.parts.values()) == pytest.approx(found.step)
    assert all(found.parts[part] > 0 for part in ("autoencoder", "text", "forward", "backward"))
    assert "trained" in str(found) and "backward" in str(found)
    assert list(tmp_path.iterdir()) == []
