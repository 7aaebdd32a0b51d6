"""Assembles what a run has trained into a pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.temporal import LatentVDMUNet
from latent_shift.training.checkpoints import load_latest
from latent_shift.training.config import Recipe
from latent_shift.training.stages import make_scheduler, make_video_unet
from latent_shift.unet import LatentShiftUNet, insert_shift


def load_run(root: Path, part: str, recipe: Recipe) -> LatentShiftPipeline:
    """Returns the pipeline of a run, also of one that is still in its video stage.

    Args:
        root: the run's output folder.
        part: whose U-Net to take: "image" (before any video), "video-shift" or another of the
            run's folders. Of an unfinished stage, the moving average in its newest checkpoint.
        recipe: the recipe of that part.

    Raises:
        FileNotFoundError: that part has not begun, or the image stage is unfinished.
    """
    folder, image = root / part, root / "image" / "unet"
    finished = part != "image" and (folder / "unet").exists()
    if not finished and not image.exists():
        raise FileNotFoundError(f"{root} holds no finished image stage to start from")
    if finished:
        kind = LatentVDMUNet if recipe.video.temporal == "vdm" else LatentShiftUNet
        unet = kind.from_pretrained(folder / "unet")
    else:
        source = UNet2DConditionModel.from_pretrained(image)
        unet = insert_shift(source) if part == "image" else make_video_unet(source, recipe)
    text_encoder = CLIPTextModel.from_pretrained(root / "pipeline" / "text_encoder")
    if not finished and part != "image":
        found = load_latest(folder / "checkpoints")
        if found is None:
            raise FileNotFoundError(f"{folder} holds neither a finished stage nor a checkpoint")
        averages = found[1]["average"]["shadow_params"]
        with torch.no_grad():
            for parameter, average in zip(unet.parameters(), averages, strict=True):
                parameter.copy_(average)
    return LatentShiftPipeline(
        vae=AutoencoderKL.from_pretrained(root / "pipeline" / "vae"),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(root / "pipeline" / "tokenizer"),
        unet=unet,
        scheduler=make_scheduler(recipe.schedule),
        default_num_frames=recipe.data.num_frames,
        default_steps=recipe.sampling.steps,
        default_guidance_scale=recipe.sampling.guidance_scale,
    )


def export(pipeline: LatentShiftPipeline, folder: Path) -> int:
    """Writes a pipeline in float16 safetensors; returns its size in bytes."""
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):
        values = json.loads(path.read_text())
        values.pop("_name_or_path", None)  # a folder of this machine
        if path.parent.name == "text_encoder":
            # transformers would load it in the dtype it is stored in, diffusers the rest in float32
            values["dtype"] = "float32"
        path.write_text(json.dumps(values, indent=2) + "\n")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600
    return sum(path.stat().st_size for path in files)
