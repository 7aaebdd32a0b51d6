"""The stages of a recipe: autoencoder, text to image, text to video."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latent_shift.data.moving_shapes import MovingShapes, Prompt, caption, render, vocabulary
from latent_shift.evaluation import moving_shapes as scorer
from latent_shift.pipeline import LatentShiftPipeline
from latent_shift.temporal import insert_temporal_layers
from latent_shift.training.config import (
    ImageConfig,
    Recipe,
    ScheduleConfig,
    TextConfig,
    VideoConfig,
)
from latent_shift.training.measuring import Stopwatch
from latent_shift.training.trainer import (
    Clock,
    Interrupted,
    Ranks,
    Stage,
    TrainingError,
    derive_seed,
)
from latent_shift.unet import LatentShiftUNet, insert_shift, remove_shift

_CHUNK = 125  # clips in one file of cached latents


class Workspace:
    """What the stages of one run share: recipe, folders, device, clock."""

    def __init__(self, recipe: Recipe, root: Path, clock: Clock) -> None:
        self.recipe = recipe
        self.root = root
        self.clock = clock
        name = recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = torch.device(name)
        self.ranks = Ranks(self.device)

    def directory_of(self, stage: str) -> str:
        """Returns a stage's folder name; several video stages may start from one image stage."""
        video = self.recipe.video
        return f"video-{video.run or video.temporal}" if stage == "video" else stage

    def autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)


class SmallStage:
    """What the stages here have in common: all ranks draw the same batch, the first one scores."""

    name: str
    workspace: Workspace
    own_batches = False
    everywhere = False

    @property
    def seed(self) -> int:
        """What everything random in the stage is a function of."""
        return self.workspace.recipe.seed

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch(self.workspace.device)

    def unsharded(self, weights: dict[str, Any]) -> AbstractContextManager[None]:
        # `Stage` asks for it; only FSDP calls it, which `train` refuses for these recipes
        raise NotImplementedError("these stages are not sharded")

    def advice(self, batch: int) -> str:
        return f"lower {self.name}.batch, or train on more ranks"


class AutoencoderStage(SmallStage):
    """Trains `AutoencoderKL` on frames, then folds the latents' statistics into it."""

    name = "autoencoder"

    def __init__(self, workspace: Workspace) -> None:
        recipe = workspace.recipe
        self.workspace = workspace
        self.config = config = recipe.autoencoder
        self.steps, self.optimizer, self.gate = (
            config.steps,
            config.optimizer,
            recipe.gates.autoencoder,
        )
        levels = len(config.block_out_channels)
        self.factor = 2 ** (levels - 1)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=False,
            sample_size=recipe.data.size,
            scaling_factor=1.0,
        ).to(workspace.device, memory_format=torch.channels_last)
        if config.init_from:
            source = AutoencoderKL.from_pretrained(config.init_from)
            self.vae.load_state_dict(source.state_dict())
        self.data = MovingShapes(
            derive_seed(recipe.seed, "frames"),
            num_frames=recipe.data.num_frames,
            size=recipe.data.size,
            split="all",
            two_object_share=config.two_object_share,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.vae.parameters())}]

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        size = self.workspace.recipe.data.size
        crop, batch = size, self.config.full_batch
        if step < self.config.crop_share * self.steps:
            crop, batch = self.config.crop, self.config.batch
        frames = torch.randint(self.data.num_frames, (batch,), generator=generator).tolist()
        corner = torch.rand(batch, 2, generator=generator)
        noise = torch.randn(
            batch, self.config.latent_channels, *[crop // self.factor] * 2, generator=generator
        )
        mine = self.workspace.ranks.rows(batch)
        truths = []
        for row, frame in list(enumerate(frames))[mine]:
            truth = self.data.truth(step * self.config.batch + row)
            objects = tuple(replace(item, track=(item.track[frame],)) for item in truth.objects)
            truths.append(replace(truth, objects=objects))
        images = render(truths, size)[:, 0]
        if crop < size:
            cut = []
            for row, truth in enumerate(truths):
                cut.append(
                    crop_around(images[row], truth.objects[0].track[0], corner[mine][row], crop)
                )
            images = torch.stack(cut)
        images = (
            images.mul(2.0).sub(1.0).to(self.workspace.device, memory_format=torch.channels_last)
        )
        with self.workspace.autocast():
            posterior = self.vae.encode(images).latent_dist
            noise = noise[mine].to(self.workspace.device)
            decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        weight = 1.0 + self.config.edge_weight * near_edges(images)
        error = weight * (error.abs() + 2.0 * error.square())
        return error.mean() + self.config.kl_weight * kl

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        recipe = self.workspace.recipe
        data = MovingShapes(
            derive_seed(recipe.seed, "check"), num_frames=recipe.data.num_frames, split="all"
        )
        truths = [data.truth(index) for index in range(64)]
        frames = render(truths, recipe.data.size)
        decoded = torch.cat([self.reconstruct(clip) for clip in frames]).view_as(frames)
        scores = scorer.score_truths(list(decoded), truths)
        scores["psnr"] = float(-10.0 * (decoded - frames).square().mean().log10())
        return scores

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in scores.items() if key in scorer.ATTRIBUTES}

    def finish(self) -> None:
        fold_latent_statistics(self.vae, self._sample_frames(2048))
        self.vae.save_pretrained(self.workspace.root / "pipeline" / "vae")

    def reconstruct(self, frames: Tensor) -> Tensor:
        """Encodes and decodes frames (N, 3, H, W) in [0, 1]."""
        images = (
            frames.mul(2.0).sub(1.0).to(self.workspace.device, memory_format=torch.channels_last)
        )
        decoded = self.vae.decode(self.vae.encode(images).latent_dist.mode()).sample
        return decoded.float().cpu().add(1.0).div(2.0).clamp(0.0, 1.0)

    def _sample_frames(self, number: int) -> list[Tensor]:
        chunks = []
        for start in range(0, number, 64):
            truths = [self.data.truth(10**7 + start + row) for row in range(64)]
            images = render(
                truths, self.workspace.recipe.data.size, frames=[start // 64 % self.data.num_frames]
            )[:, 0]
            chunks.append(images.mul(2.0).sub(1.0).to(self.workspace.device))
        return chunks


def crop_around(image: Tensor, centre: tuple[float, float], corner: Tensor, crop: int) -> Tensor:
    """Cuts a square that holds an object's centre: most of a frame is plain background.

    Args:
        image: (..., H, W) with H = W.
        centre: (x, y) in frame units.
        corner: (2,), where in the square the centre comes to lie, x and y in [0, 1).
        crop: side of the square.
    """
    size = image.shape[-1]
    left, top = (
        min(max(int(place * size) - int(part * crop), 0), size - crop)
        for place, part in zip(centre, corner, strict=True)
    )
    return image[..., top : top + crop, left : left + crop]


def near_edges(images: Tensor) -> Tensor:
    """Mask (N, 1, H, W) of pixels within two of an edge; images (N, 3, H, W) in [-1, 1]."""
    highest = F.max_pool2d(images, 5, stride=1, padding=2)
    lowest = -F.max_pool2d(-images, 5, stride=1, padding=2)
    return ((highest - lowest).amax(dim=1, keepdim=True) > 0.2).float()


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, chunks: list[Tensor]) -> None:
    """Makes every latent channel zero-mean and unit-variance, in the two 1x1 convolutions.

    Stable Diffusion pipelines know a scaling factor but no shift, and a weak KL term leaves means
    of several units.

    Args:
        vae: changed in place; decodes its own latents to the same images as before, up to rounding.
        chunks: images (N, 3, H, W) in [-1, 1] to measure on.
    """
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks]).double()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = mean.numel()
    encode, decode = vae.quant_conv, vae.post_quant_conv
    weight, bias = encode.weight.double(), encode.bias.double()
    weight[:channels] /= std.view(-1, 1, 1, 1)
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2.0 * std.log()
    encode.weight.copy_(weight)
    encode.bias.copy_(bias)
    weight = decode.weight.double()
    decode.bias.copy_(decode.bias.double() + weight[:, :, 0, 0] @ mean)
    decode.weight.copy_(weight * std.view(1, -1, 1, 1))


class Latents:
    """The training clips as latents, encoded once and kept on disk.

    Attributes:
        values: (clips, T, C, h, w) float16.
    """

    def __init__(self, workspace: Workspace) -> None:
        recipe = workspace.recipe
        about: dict[str, Any] = {
            "seed": derive_seed(recipe.seed, "clips"),
            "num_frames": recipe.data.num_frames,
            "size": recipe.data.size,
            "split": "train",
            "two_object_share": recipe.data.two_object_share,
        }
        self.data = MovingShapes(**about)
        pipeline = workspace.root / "pipeline"
        digest = hashlib.sha256(json.dumps(about).encode())
        digest.update((pipeline / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
        folder = workspace.root / f"latents-{digest.hexdigest()[:12]}"
        folder.mkdir(exist_ok=True)
        ranges = [
            range(start, min(start + _CHUNK, recipe.data.clips))
            for start in range(0, recipe.data.clips, _CHUNK)
        ]
        paths = [folder / f"{part.start:07d}-{part.stop:07d}.safetensors" for part in ranges]
        ranks = workspace.ranks
        missing = [item for item in zip(ranges, paths, strict=True) if not item[1].exists()]
        ranks.wait()  # so that every rank has seen the same files missing
        if missing:
            vae = AutoencoderKL.from_pretrained(pipeline / "vae")
            vae.to(workspace.device, memory_format=torch.channels_last)
            for indices, path in missing[ranks.rank :: ranks.world]:
                if workspace.clock.over:
                    raise Interrupted(
                        f"encoding stopped at clip {indices.start} of {recipe.data.clips}"
                    )
                temporary = path.with_suffix(".tmp")
                save_file({"latents": self._encode(vae, indices, workspace.device)}, temporary)
                os.replace(temporary, path)
            ranks.wait()
        parts = [load_file(path)["latents"] for path in paths]
        self.values = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL, indices: range, device: torch.device) -> Tensor:
        clips = []
        for index in tqdm(indices, desc="latents", mininterval=30.0):
            images = render([self.data.truth(index)], self.data.size)[0].mul(2.0).sub(1.0)
            images = images.to(device, memory_format=torch.channels_last)
            clips.append(vae.encode(images).latent_dist.mode().half().cpu().contiguous())
        return torch.stack(clips)


class CaptionedLatents(SmallStage):
    """What the stages after the autoencoder share: clips as latents, their captions, and the
    tokenizer."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.recipe = workspace.recipe
        self.pipeline = workspace.root / "pipeline"
        self.latents = Latents(workspace)
        if workspace.ranks.first:
            if self.recipe.text.init_from:
                self._take_text_encoder()
            self._learn_tokenizer()
        workspace.ranks.wait()
        self.tokenizer = CLIPTokenizer.from_pretrained(self.pipeline / "tokenizer")

    def tokenize(self, captions: list[str]) -> Tensor:
        """Returns token ids (N, L)."""
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.workspace.device)

    def _take_text_encoder(self) -> None:
        source, folder = self.recipe.text.init_from, self.pipeline / "text_encoder"
        if source == "embedded":
            pipe = LatentShiftPipeline.from_embedded()
            encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
        else:
            encoder = CLIPTextModel.from_pretrained(Path(source) / "text_encoder")
            tokenizer = CLIPTokenizer.from_pretrained(Path(source) / "tokenizer")
        width, expected = encoder.config.hidden_size, self.recipe.text.hidden_size
        if width != expected:
            raise TrainingError(
                f"the text encoder of text.init_from = {source} is {width} wide, and "
                f"text.hidden_size is {expected}: set it to {width}"
            )
        if folder.exists():
            there = CLIPTextModel.from_pretrained(folder).state_dict()
            # in the precision that packages keep
            same = all(
                name in there and torch.equal(there[name].half(), value.half())
                for name, value in encoder.state_dict().items()
            )
            if not same:
                raise TrainingError(
                    f"{folder} is not the text encoder of text.init_from = {source}, and what was "
                    "trained here may know its words only: train in another --output-dir"
                )
            return
        tokenizer.save_pretrained(self.pipeline / "tokenizer")
        unfinished = folder.with_suffix(".tmp")
        encoder.float().save_pretrained(unfinished)
        os.replace(unfinished, folder)

    def _learn_tokenizer(self) -> None:
        folder = self.pipeline / "tokenizer"
        if not folder.exists():
            texts = [
                self.latents.data.prompt(index, image=bool(index % 4 == 0)).text
                for index in range(min(len(self.latents), 5000))
            ]
            make_tokenizer([*texts, *vocabulary()], self.recipe.text).save_pretrained(folder)


class ClipTower(nn.Module):
    """Sees in latents what captions speak of: what single frames look like, and how a few points in
    them move."""

    POINTS = 8

    def __init__(self, config: TextConfig, channels: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, width in enumerate(config.widths):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.SiLU()]
            channels, side = width, -(-side // stride)
        self.frames = nn.Sequential(*layers)
        self.points = nn.Conv2d(channels, self.POINTS, 1)
        self.motion = nn.Linear(config.frames * 2 * self.POINTS, channels)
        self.join = nn.Linear(3 * channels, config.hidden_size)
        steps = torch.linspace(-1.0, 1.0, side)
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)
        self.register_buffer("grid", grid, persistent=False)  # [2, side * side]: x, y
        self.num_frames = config.frames

    def forward(self, clips: Tensor) -> Tensor:
        """Features (B, D) of latents (B, T, C, h, w)."""
        chosen = torch.linspace(0, clips.shape[1] - 1, self.num_frames).round().long()
        maps = self.frames(clips[:, chosen].flatten(0, 1))
        look = torch.cat((maps.amax((2, 3)), maps.mean((2, 3))), dim=1)
        look = look.unflatten(0, (-1, self.num_frames)).mean(1)
        weight = self.points(maps).flatten(2).softmax(2)
        tracks = (weight @ self.grid.T).unflatten(0, (-1, self.num_frames))  # [B, T, points, 2]
        # where a thing is does not matter, how it moves does
        motion = F.silu(self.motion((tracks - tracks.mean(1, keepdim=True)).flatten(1)))
        return self.join(torch.cat((look, motion), dim=1))


class ContrastiveModel(nn.Module):
    """A text encoder and a small tower for clips, which meet in one space (arXiv 2103.00020)."""

    def __init__(
        self, config: TextConfig, text_encoder: CLIPTextModel, channels: int, side: int
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.tower = ClipTower(config, channels, side)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_clips(self, clips: Tensor) -> Tensor:
        """Unit vectors (B, D) of latents (B, T, C, h, w)."""
        return F.normalize(self.tower(clips), dim=-1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors (B, D) of token ids (B, L)."""
        return F.normalize(self.projection(self.text_encoder(tokens).pooler_output), dim=-1)


class TextStage(CaptionedLatents):
    """Trains the text encoder by contrast of captions with clips."""

    name = "text"

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        recipe = self.recipe
        self.config = config = recipe.text
        self.steps, self.optimizer, self.gate = config.steps, config.optimizer, recipe.gates.text
        self.model = ContrastiveModel(
            config,
            make_text_encoder(config, self.tokenizer),
            recipe.autoencoder.latent_channels,
            recipe.latent_size,
        ).to(workspace.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """The symmetric contrastive loss. Every clip also meets its caption with one attribute
        changed; a caption that happens to be true of another clip counts for nothing there."""
        batch, group = self.config.batch, self.config.group
        chosen = torch.randint(len(self.latents), (batch,), generator=generator)
        backwards = torch.rand(batch, generator=generator) < 0.5
        groups = range(batch // group)[self.workspace.ranks.rows(batch // group)]
        mine = slice(groups.start * group, groups.stop * group)
        clips = self.latents.values[chosen[mine]].float()
        clips = torch.where(backwards[mine].view(-1, 1, 1, 1, 1), clips.flip(1), clips)
        device = self.workspace.device
        with self.workspace.autocast():
            seen = self.model.embed_clips(clips.to(device)).float().split(group)
        losses = []
        for number, clip in zip(groups, seen, strict=True):
            rows = range(number * group, (number + 1) * group)
            truths = [self.latents.data.truth(int(chosen[row])) for row in rows]
            truths = [
                truth.reversed() if backwards[row] else truth
                for row, truth in zip(rows, truths, strict=True)
            ]
            rng = random.Random(f"{self.recipe.seed}/text/{step}/{number}")
            prompts = [
                # a clip's altered caption is worded as its own, so that one word tells them apart;
                # every fourth caption is one of a picture, silent on motion, as images have them
                caption(
                    truth, random.Random(f"{step}/{number}/{i % group}"), image=i % group % 4 == 0
                )
                for i, truth in enumerate([*truths, *(scorer.altered(t, rng) for t in truths)])
            ]
            true = torch.tensor(
                [[scorer.describes(prompt, truth) for prompt in prompts] for truth in truths]
            )
            true[:, :group].fill_diagonal_(False)
            with self.workspace.autocast():
                read = self.model.embed_text(self.tokenize([prompt.text for prompt in prompts]))
            logits = self.model.log_scale.exp().clamp(max=100.0) * clip @ read.float().T
            logits = logits.masked_fill(true.to(device), -torch.inf)
            own = torch.arange(group, device=device)
            losses.append(F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :group].T, own))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """For every attribute, how often clips that were not trained on fit their own caption best
        of those that differ in this attribute alone."""
        recipe, device = self.recipe, self.workspace.device
        data = MovingShapes(
            derive_seed(recipe.seed, "check"), num_frames=recipe.data.num_frames, split="all"
        )
        truths = [data.truth(index) for index in range(4 * recipe.sampling.prompts)]
        vae = AutoencoderKL.from_pretrained(self.pipeline / "vae").to(device)
        seen = []
        for truth in truths:
            frames = render([truth], recipe.data.size)[0].mul(2.0).sub(1.0).to(device)
            seen.append(self.model.embed_clips(vae.encode(frames).latent_dist.mode().unsqueeze(0)))
        right = dict.fromkeys(scorer.VALUES, 0)
        for truth, clip in zip(truths, seen, strict=True):
            for attribute, values in scorer.VALUES.items():
                captions = [
                    scorer.full_caption(scorer.with_attribute(truth, attribute, value))
                    for value in values
                ]
                fits = self.model.embed_text(self.tokenize(captions)) @ clip[0]
                best = values[int(fits.argmax())]
                right[attribute] += best == scorer.value_of(truth, attribute)
        return {attribute: count / len(truths) for attribute, count in right.items()}

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        return scores

    def finish(self) -> None:
        self.model.text_encoder.save_pretrained(self.pipeline / "text_encoder")


class DiffusionStage(CaptionedLatents):
    """What the two diffusion stages share: models, captions, noise, loss, sampling."""

    config: ImageConfig | VideoConfig
    unet: LatentShiftUNet

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.text_encoder = CLIPTextModel.from_pretrained(self.pipeline / "text_encoder")
        self.text_encoder.requires_grad_(False).eval().to(workspace.device)
        self.scheduler = make_scheduler(self.recipe.schedule)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.unet.parameters())}]

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Returns the text encoder's last hidden states (N, L, D)."""
        return self.text_encoder(self.tokenize(captions))[0]

    def velocity_loss(
        self, clean: Tensor, captions: list[str], generator: torch.Generator
    ) -> Tensor:
        """Returns the mean squared error of the predicted velocity.

        Args:
            clean: latents (B, T, C, h, w); every clip gets one time step for all its frames.
            captions: B captions.
        """
        batch = clean.shape[0]
        noise = torch.randn(clean.shape, generator=generator)
        time = self._times(batch, generator)
        steps = (time * self.scheduler.config.num_train_timesteps).long()
        mine = self.workspace.ranks.rows(batch)
        captions = captions[mine]
        clean, noise, steps = (
            tensor[mine].to(self.workspace.device) for tensor in (clean.float(), noise, steps)
        )
        noisy = self.scheduler.add_noise(clean, noise, steps)
        target = self.scheduler.get_velocity(clean, noise, steps)
        with self.workspace.autocast():
            predicted = self.predict(noisy, steps, self.encode_text(captions))
        return F.mse_loss(predicted.float(), target)

    def _times(self, batch: int, generator: torch.Generator) -> Tensor:
        config = self.config
        normal, uniform, choice = (
            draw(batch, generator=generator) for draw in (torch.randn, torch.rand, torch.rand)
        )
        time = torch.sigmoid(config.time_mean + config.time_std * normal)
        return torch.where(choice < config.time_uniform, uniform, time)

    def predict(self, noisy: Tensor, steps: Tensor, text: Tensor) -> Tensor:
        """Runs the U-Net on clips (B, T, C, h, w), one time step and one text (L, D) for each."""
        velocity = self.unet(
            noisy.transpose(1, 2), steps, encoder_hidden_states=text, added_cond_kwargs={}
        ).sample
        return velocity.transpose(1, 2)

    @torch.no_grad()
    def sample(self, prompts: list[Prompt], num_frames: int, seed: int) -> list[Tensor]:
        """Samples clips (T, 3, H, W) in [0, 1] for captions, clip by clip from its own noise."""
        settings, size = self.recipe.sampling, self.recipe.latent_size
        vae = AutoencoderKL.from_pretrained(self.pipeline / "vae").to(self.workspace.device)
        scheduler = make_scheduler(self.recipe.schedule)
        clips: list[Tensor] = []
        for start in range(0, len(prompts), settings.batch):
            chunk = prompts[start : start + settings.batch]
            text = self.encode_text([""] * len(chunk) + [prompt.text for prompt in chunk])
            shape = (num_frames, self.unet.config.in_channels, size, size)
            latents = torch.stack(
                [
                    torch.randn(
                        shape,
                        generator=torch.Generator().manual_seed(derive_seed(seed, start + row)),
                    )
                    for row in range(len(chunk))
                ]
            ).to(self.workspace.device)
            scheduler.set_timesteps(settings.steps)
            for step in scheduler.timesteps:
                steps = step.expand(2 * len(chunk)).to(self.workspace.device)
                free, bound = self.predict(torch.cat((latents, latents)), steps, text).chunk(2)
                latents = scheduler.step(
                    free + settings.guidance_scale * (bound - free), step, latents
                ).prev_sample
            for clip in latents:
                clips.append(
                    vae.decode(clip).sample.float().cpu().add(1.0).div(2.0).clamp(0.0, 1.0)
                )
        return clips

    def image_scores(self) -> dict[str, float]:
        """Scores of single frames."""
        number = self.recipe.sampling.prompts
        prompts = scorer.held_out_prompts(number, seed=2, split="all", image=True)
        return scorer.score_prompts(self.sample(prompts, 1, seed=2), prompts)

    def _captions(
        self, chosen: list[int], step: int, image: bool, generator: torch.Generator, backwards=None
    ):
        dropout = self.config.caption_dropout
        dropped = (torch.rand(len(chosen), generator=generator) < dropout).tolist()
        backwards = backwards or [False] * len(chosen)
        return [
            ""
            if drop
            else self.latents.data.prompt(index, wording=step, image=image, backwards=back).text
            for index, drop, back in zip(chosen, dropped, backwards, strict=True)
        ]


class ImageStage(DiffusionStage):
    """Trains the U-Net on single frames."""

    name = "image"
    config: ImageConfig

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        recipe = self.recipe
        self.config = recipe.image
        self.steps, self.optimizer, self.gate = (
            recipe.image.steps,
            recipe.image.optimizer,
            recipe.gates.image,
        )
        # one frame is not shifted, so this is the image U-Net, on the fused operators
        self.unet = insert_shift(make_unet(recipe)).to(
            workspace.device, memory_format=torch.channels_last
        )

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        cropped = step < self.config.crop_share * self.steps
        batch = self.config.crop_batch if cropped else self.config.batch
        chosen = torch.randint(len(self.latents), (batch,), generator=generator)
        frames = torch.randint(self.latents.values.shape[1], (batch,), generator=generator)
        clean = self.latents.values[chosen, frames].unsqueeze(1)
        if cropped:
            # the object whole, or nearly: its outline is what the crops are for
            corners = 0.3 + 0.4 * torch.rand(batch, 2, generator=generator)
            tracks = [
                self.latents.data.truth(index).objects[0].track[frame]
                for index, frame in zip(chosen.tolist(), frames.tolist(), strict=True)
            ]
            clean = torch.stack(
                [
                    crop_around(latent, centre, corner, self.config.crop)
                    for latent, centre, corner in zip(clean, tracks, corners, strict=True)
                ]
            )
        # half of the captions speak of motion, so that the words of motion are no news later
        half = batch // 2
        captions = self._captions(chosen[:half].tolist(), step, True, generator)
        captions += self._captions(chosen[half:].tolist(), step, False, generator)
        return self.velocity_loss(clean, captions, generator)

    def evaluate(self, step: int) -> dict[str, float]:
        return self.image_scores()

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        return {key: scores[key] for key in ("colour", "shape") if key in scores}

    def finish(self) -> None:
        folder = self.workspace.root / "image"
        remove_shift(self.unet).save_pretrained(folder / "unet")
        insert_shift(self.unet)


class VideoStage(DiffusionStage):
    """Finetunes the image model on clips, with the shift in it or, for the ablation, without."""

    name = "video"
    config: VideoConfig

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        recipe = self.recipe
        self.config = recipe.video
        self.steps, self.optimizer, self.gate = (
            recipe.video.steps,
            recipe.video.optimizer,
            recipe.gates.video,
        )
        folder = workspace.root / "image"
        image_unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.unet = make_video_unet(image_unet, recipe)
        self.unet.to(workspace.device, memory_format=torch.channels_last)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        if self.config.image_every and step % self.config.image_every == 0:
            batch = self.config.image_batch
            chosen = torch.randint(len(self.latents), (batch,), generator=generator)
            frames = torch.randint(self.latents.values.shape[1], (batch,), generator=generator)
            clean = self.latents.values[chosen, frames].unsqueeze(1)
            return self.velocity_loss(
                clean, self._captions(chosen.tolist(), step, True, generator), generator
            )
        batch = self.config.batch
        chosen = torch.randint(len(self.latents), (batch,), generator=generator)
        # played backwards, a clip is another clip, of the opposite direction
        backwards = torch.rand(batch, generator=generator) < 0.5
        clean = self.latents.values[chosen]
        clean = torch.where(backwards.view(-1, 1, 1, 1, 1), clean.flip(1), clean)
        captions = self._captions(chosen.tolist(), step, False, generator, backwards.tolist())
        return self.velocity_loss(clean, captions, generator)

    @property
    def seed(self) -> int:
        seed = self.config.seed
        return derive_seed(self.recipe.seed, "video", seed) if seed else self.recipe.seed

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores of clips, and under "image/" those of single frames: finetuning may cost them."""
        number, frames = self.recipe.sampling.prompts, self.recipe.data.num_frames
        prompts = scorer.held_out_prompts(number, seed=3)
        scores = scorer.score_prompts(self.sample(prompts, frames, seed=3), prompts)
        pictures = self.image_scores()
        return scores | {f"image/{key}": value for key, value in pictures.items()}

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        return {key: scores[key] for key in ("colour", "direction") if key in scores}

    def finish(self) -> None:
        folder = self.workspace.root / self.workspace.directory_of("video")
        self.unet.save_pretrained(folder / "unet")


def make_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """Returns the noise schedule; sampling starts where training ends, at pure noise."""
    return DDIMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def make_tokenizer(texts: Iterable[str], config: TextConfig) -> CLIPTokenizer:
    """Learns a BPE vocabulary of CLIP's form from captions, the same one in every run."""
    ends = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(ByteLevel.alphabet())
    final = [letter + "</w>" for letter in letters]
    clip = CLIPTokenizer(vocab={token: i for i, token in enumerate(ends)}, merges=[])
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    # the trainer meets final letters in the order of a hash table, and breaks ties by number: with
    # their numbers given, two runs agree on every token
    trainer = BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[*ends, *letters, *final],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=config.max_length,
    )


def make_text_encoder(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns a CLIP text encoder with new weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(recipe: Recipe) -> UNet2DConditionModel:
    """Returns a new text-to-image U-Net, whose time embedding takes the pooled text in."""
    config, channels = recipe.unet, recipe.autoencoder.latent_channels
    return UNet2DConditionModel(
        sample_size=recipe.latent_size,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention)
        ),
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=recipe.text.hidden_size,
        attention_head_dim=config.heads,  # diffusers reads this as the number of heads
        norm_num_groups=config.norm_num_groups,
        addition_embed_type="text",
        addition_embed_type_num_heads=config.heads,
    )


def make_video_unet(unet: UNet2DConditionModel, recipe: Recipe) -> LatentShiftUNet:
    """Puts into an image U-Net what lets its frames meet, in place."""
    video = recipe.video
    if video.temporal == "vdm":
        torch.manual_seed(derive_seed(recipe.seed, "video", video.seed, "initial weights"))
        return insert_temporal_layers(unet)
    return insert_shift(unet, video.shift())


STAGES: dict[str, Callable[[Workspace], Stage]] = {
    "autoencoder": AutoencoderStage,
    "text": TextStage,
    "image": ImageStage,
    "video": VideoStage,
}
