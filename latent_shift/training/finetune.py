"""Finetuning a Stable-Diffusion-family checkpoint on captioned clips, with or without the shift."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from tqdm import tqdm

from latent_shift.data.cache import open_cache
from latent_shift.data.clips import Batch, Batches, ClipFormat, ClipSource, fingerprint, open_source
from latent_shift.data.encode import encode_frames, encode_text
from latent_shift.pipeline import LatentShiftPipeline, LatentShiftPipelineOutput
from latent_shift.temporal import LatentVDMUNet, insert_temporal_layers
from latent_shift.training.config import flat, to_dict
from latent_shift.training.finetune_config import ClipsConfig, Finetune, ModelConfig, TrainConfig
from latent_shift.training.measuring import Stopwatch
from latent_shift.training.trainer import (
    Clock,
    Interrupted,
    LoopConfig,
    Ranks,
    Results,
    TrainingError,
    derive_seed,
    going_on,
    is_out_of_memory,
    refuse_another,
    run_stage,
)
from latent_shift.training.validation import motion, say_collapse, write_clips
from latent_shift.unet import LatentShiftUNet, remove_shift
from latent_shift_kernels.integrations.diffusers import recompute_activations

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ENCODED = 8  # frames that the autoencoder takes at a time
# settings that do not change what a step computes
_FREE = ("name", "device", "threads", "trackers", "checkpoints", "validation")

_log = logging.getLogger("latent_shift.training")


def load_model(config: ModelConfig) -> LatentShiftPipeline:
    """Returns the pipeline to train: the checkpoint's weights, and the temporal layers in them.

    Raises:
        TrainingError: the settings contradict what the checkpoint is.
    """
    path = Path(config.source).expanduser()
    options: dict[str, Any] = {"dtype": torch.float32}
    if config.layout and not path.is_file():
        raise TrainingError(
            f"model.layout is of single files, and model.source = {config.source!r} is none: "
            "leave it out"
        )
    if path.is_file():
        if config.layout:
            options["config"] = config.layout
        try:
            image = StableDiffusionPipeline.from_single_file(
                str(path), **options, safety_checker=None, requires_safety_checker=False
            )
        # what a file without a layout or a damaged one raises has no base in common: it comes from
        # diffusers, safetensors, pickle or the Hub's client
        except Exception as error:
            if config.layout:
                raise
            raise TrainingError(
                f"cannot load the single file {config.source} ({' '.join(str(error).split())}): "
                "diffusers asks the Hub for its layout; where that cannot be reached, name a "
                "folder of the same layout by model.layout"
            ) from error
        return make_video_model(image, config)
    options |= {
        name: value
        for name, value in (("revision", config.revision), ("variant", config.variant))
        if value
    }
    try:
        return make_video_model(
            LatentShiftPipeline.from_pretrained(config.source, **options), config
        )
    except TypeError:  # an image model
        image = StableDiffusionPipeline.from_pretrained(
            config.source, **options, safety_checker=None, requires_safety_checker=False
        )
        return make_video_model(image, config)


def make_video_model(source: DiffusionPipeline, config: ModelConfig) -> LatentShiftPipeline:
    """Puts the temporal layers of `config` into a pipeline's U-Net, in place, and its scheduler.

    Raises:
        TrainingError: the settings contradict what the pipeline is.
    """
    if config.temporal == "vdm":
        if not isinstance(source.unet, LatentVDMUNet):
            if isinstance(source.unet, LatentShiftUNet):
                remove_shift(source.unet)
            insert_temporal_layers(source.unet)
        pipeline = LatentShiftPipeline.from_t2i(source)
    elif isinstance(source.unet, LatentVDMUNet):
        raise TrainingError(
            f'{config.source!r} holds Latent-VDM layers: set model.temporal = "vdm", or start from '
            "the image model"
        )
    else:
        pipeline = LatentShiftPipeline.from_t2i(source, shift=config.shift())
    found = pipeline.scheduler.config
    changes: dict[str, Any] = {}
    if config.prediction != "auto":
        changes["prediction_type"] = config.prediction
    if config.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    prediction = changes.get("prediction_type", found.get("prediction_type", "epsilon"))
    if prediction not in ("epsilon", "v_prediction"):
        raise TrainingError(
            f"the checkpoint's scheduler predicts {prediction!r}; epsilon and v_prediction can be "
            "trained: set model.prediction"
        )
    if prediction == "epsilon" and (
        config.zero_terminal_snr or found.get("rescale_betas_zero_snr", False)
    ):
        raise TrainingError(
            "zero terminal SNR ends in pure noise, of which the predicted noise (epsilon) of this "
            'checkpoint tells nothing: set model.prediction = "v_prediction", or '
            "zero_terminal_snr = false"
        )
    if changes:
        kind = type(pipeline.scheduler)
        if config.zero_terminal_snr and "rescale_betas_zero_snr" not in found:
            kind = DDIMScheduler  # the checkpoint's own, such as PNDM, cannot start at pure noise
        pipeline.scheduler = kind.from_config(found, **changes)
    return pipeline


def choose_parameters(pipeline: LatentShiftPipeline, config: TrainConfig) -> None:
    """Freezes everything but what `config` trains; adds adapters where it says LoRA.

    Raises:
        TrainingError: a pattern matches nothing, or no layer has the name of a LoRA target.
    """
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False)
    unet = pipeline.unet
    names = [name for name, _ in unet.named_parameters()]
    if config.what == "all":
        unet.requires_grad_(True)
    for pattern in config.patterns:
        chosen = set(fnmatch.filter(names, pattern))
        if not chosen:
            raise TrainingError(
                f"train.patterns: {pattern!r} matches no parameter of the U-Net; names read like "
                f"{names[len(names) // 2]!r}"
            )
        for name, parameter in unet.named_parameters():
            if name in chosen:
                parameter.requires_grad_(True)
    if config.what == "lora":
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise TrainingError(
                'train.what = "lora" needs peft: pip install "latent-shift-video[train]"'
            ) from error
        full = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        try:
            unet.add_adapter(
                LoraConfig(
                    r=config.lora_rank,
                    lora_alpha=config.lora_alpha or config.lora_rank,
                    lora_dropout=config.lora_dropout,
                    target_modules=list(config.lora_targets),
                    init_lora_weights="gaussian",
                )
            )
        except ValueError as error:
            raise TrainingError(f"train.lora_targets: {error}") from error
        for parameter in full:  # peft freezes all but its own
            parameter.requires_grad_(True)
    if config.text_encoder:
        pipeline.text_encoder.requires_grad_(True)


def open_data(where: str, data: ClipsConfig, pipeline: LatentShiftPipeline) -> ClipSource:
    """Opens the clips, images or held-out clips of a run; `data.format` is of `data.clips`.

    Raises:
        CacheError: a cache is incomplete, or was made with other models than `pipeline`'s.
    """
    kind = data.format if where == data.clips else "auto"
    if kind == "cache" or (kind == "auto" and (Path(where) / "manifest.json").is_file()):
        return open_cache(
            where,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
        )
    return open_source(
        where,
        kind=kind,  # type: ignore[arg-type]
        caption_column=data.caption_column,
        path_column=data.path_column,
        frames_fps=data.frames_fps,
    )


class FinetuneStage:
    """Trains a pipeline's U-Net on clips and images, as one stage of the training loop.

    Args:
        pipeline: from `load_model`, or an image pipeline of your own, which is changed in place.
        clips, images: in place of those that `config` names.
        folder: for validation clips and the finished model; None writes nothing.
    """

    name = "finetune"
    gate = 0.0
    own_batches = True
    everywhere = True

    def __init__(
        self,
        config: Finetune,
        ranks: Ranks,
        folder: Path | None = None,
        *,
        pipeline: DiffusionPipeline | None = None,
        clips: ClipSource | None = None,
        images: ClipSource | None = None,
    ) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.steps, self.optimizer = config.train.steps, config.optimizer
        self.watch = Stopwatch(ranks.device)
        if pipeline is not None and ranks.sharded:
            raise TrainingError(
                "FSDP loads the model again to save it: name it by model.source, in place of "
                "pipeline="
            )
        self._whole: dict[str, dict[str, Tensor]] = {}
        self.pipeline = self._load(pipeline)
        self._open(clips, images)
        self._prepare_model(self.pipeline)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.prediction = self.scheduler.config.prediction_type
        self._empty: Tensor | None = None
        self._measure: tuple[list[str], dict[str, float]] | None = None

    @property
    def seed(self) -> int:
        return self.config.seed

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": _trained(self.pipeline.unet)}]
        if self.config.train.text_encoder:
            scale = self.config.train.text_learning_rate
            groups.append({"params": _trained(self.pipeline.text_encoder), "scale": scale})
        return groups

    def modules(self) -> dict[str, nn.Module]:
        modules = {"unet": self.pipeline.unet}
        if self.config.train.text_encoder:
            modules["text_encoder"] = self.pipeline.text_encoder
        return modules

    def batch(self, step: int) -> Batch:
        """Returns this rank's batch of clips, or of images where it is their turn."""
        every = self.config.data.image_every
        if not every:
            return self.clips[step]
        if step % every:
            return self.clips[step - step // every - 1]
        batch = self.images[step // every]
        if batch.latents is None or batch.latents.shape[1] == 1:
            return batch
        # a cache has whole clips: take a frame of each
        seed = derive_seed(self.seed, "frame", step, self.ranks.rank)
        generator = torch.Generator().manual_seed(seed)
        rows, frames = batch.latents.shape[:2]
        chosen = torch.randint(frames, (rows,), generator=generator)
        return replace(batch, latents=batch.latents[torch.arange(rows), chosen].unsqueeze(1))

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        with self.watch("data"):
            batch = self.batch(step)
        return self.loss_of(batch, generator)

    def loss_of(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns the weighted mean squared error of the predicted noise or velocity.

        Args:
            batch: B clips; each gets one time step for all its frames.
            generator: on the CPU; noise, times and dropped captions come from it.
        """
        config, device = self.config.train, self.ranks.device
        clean = self._latents(batch, generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        time = torch.rand(len(clean), generator=generator)
        time = config.noise_shift * time / (1.0 + (config.noise_shift - 1.0) * time)
        times = (time * self.scheduler.config.num_train_timesteps).long().to(device)
        dropped = torch.rand(len(clean), generator=generator) < config.caption_dropout
        with self.watch("text"):
            text = self._text(batch, dropped.tolist())
        with self.watch("forward"):
            noisy = self.scheduler.add_noise(clean, noise, times)
            predicted = self.predict(noisy, times, text)
            target = noise
            if self.prediction == "v_prediction":
                target = self.scheduler.get_velocity(clean, noise, times)
            losses = F.mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3, 4))
            return (self.weights(times) * losses).mean()

    def predict(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """Runs the U-Net on clips (B, T, C, h, w), one time step and one text (L, D) for each."""
        predicted = self.pipeline.unet(
            noisy.transpose(1, 2), times, encoder_hidden_states=text, added_cond_kwargs={}
        ).sample
        return predicted.transpose(1, 2)

    def weights(self, times: Tensor) -> Tensor:
        """Returns the weight of each clip's loss: min-SNR's, or 1.

        For noise min(SNR, gamma) / SNR, for velocity min(SNR, gamma) / (SNR + 1): arXiv 2303.09556,
        sections 3.4 and 4.
        """
        gamma = self.config.train.snr_gamma
        if not gamma:
            return torch.ones(len(times), device=times.device)
        snr = compute_snr(self.scheduler, times)
        return snr.clamp(max=gamma) / (snr + 1.0 if self.prediction == "v_prediction" else snr)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Makes the validation clips, each rank its share, and measures their motion."""
        config = self.config.validation
        prompts, truth = self._reference()
        # every rank as many, for a sharded model is computed by all together
        share = -(-len(prompts) // self.ranks.world)
        mine = [(self.ranks.rank + turn * self.ranks.world) for turn in range(share)]
        sums = torch.zeros(3, dtype=torch.float64)
        self.pipeline.set_progress_bar_config(disable=True)
        for index in mine:
            with self.ranks.accelerator.autocast():
                clip = self.pipeline(
                    prompts[index % len(prompts)],
                    num_frames=self.form.num_frames,
                    height=self.form.height,
                    width=self.form.width,
                    num_inference_steps=config.steps,
                    guidance_scale=config.guidance_scale,
                    seed=derive_seed(self.config.seed, "validation", index) % 2**31,
                    output_type="pt",
                )
            assert isinstance(clip, LatentShiftPipelineOutput)
            if index >= len(prompts) or not isinstance(clip.frames, Tensor):
                continue
            found = motion(clip.frames)
            sums += torch.tensor([1.0, found["difference"], found["second_difference"]])
            if self.folder is not None:
                with going_on("a validation clip"):
                    write_clips(clip, self.folder / "validation" / f"step-{step:08d}", index)
        total = self.ranks.mean(sums.float().to(self.ranks.device)).cpu()
        scores = {
            "difference": float(total[1] / total[0]),
            "second_difference": float(total[2] / total[0]),
        }
        if self.form.num_frames > 2 and self.ranks.first:
            for line in say_collapse(scores, truth):
                tqdm.write(f"WARNING: step {step}: {line}", file=sys.stderr)
        scores |= {f"training_{key}": value for key, value in truth.items()}
        if self.held_out is not None:
            scores["loss"] = self._held_out_loss()
        images = Counter() if self.images is self.clips else self.images.skipped
        skipped: Counter[str] = sum(gather_object([self.clips.skipped + images]), Counter())
        if self.ranks.first:
            for reason, count in skipped.items():
                _log.warning("so far %d clips were skipped: %s", count, reason)
        return scores

    def gated(self, scores: dict[str, float]) -> dict[str, float]:
        return {}

    def finish(self) -> None:
        """Writes the pipeline, LoRA adapters in its weights and by themselves."""
        if self.folder is None or not self.ranks.first:
            return
        pipeline, folder = self.pipeline, self.folder
        for name, weights in self._whole.items():  # as they were before they were halved
            module = getattr(pipeline, name)
            module.float().load_state_dict(weights, strict=False)
        if self.config.train.what == "lora":
            from peft.utils import get_peft_model_state_dict

            layers = get_peft_model_state_dict(pipeline.unet)
            StableDiffusionPipeline.save_lora_weights(
                folder / "lora",
                # safetensors takes no other layout
                unet_lora_layers={name: layer.contiguous() for name, layer in layers.items()},
            )
            pipeline.unet.fuse_lora()
            pipeline.unet.unload_lora()
        dtype = getattr(torch, self.config.checkpoints.model_dtype)
        temporary = folder / f".model.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        pipeline.to(dtype=dtype).save_pretrained(temporary, safe_serialization=True)
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600
        shutil.rmtree(folder / "model", ignore_errors=True)
        temporary.rename(folder / "model")

    @contextmanager
    def unsharded(self, weights: dict[str, Any]) -> Iterator[None]:
        """Puts a whole copy of the pipeline in place of the sharded one."""
        sharded = self.pipeline
        self.pipeline = self._load(None)
        self._prepare_model(self.pipeline)
        for name, module in self.modules().items():
            begin = f"{name}."
            own = {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}
            module.load_state_dict(own)
            module.eval()
        try:
            yield
        finally:
            self.pipeline = sharded

    def _load(self, pipeline: DiffusionPipeline | None) -> LatentShiftPipeline:
        # the layers that a video model gets have weights of their own
        torch.manual_seed(derive_seed(self.seed, "temporal layers"))
        if pipeline is None:
            return load_model(self.config.model)
        return make_video_model(pipeline, self.config.model)

    def advice(self, batch: int) -> str:
        """Tries smaller batches until one fits, beside one of the other kind and on this rank
        alone."""
        config, every = self.config, self.config.data.image_every
        size = len(self.batch(batch).captions)
        images = bool(every) and batch % every == 0
        other = None
        if every > 1:
            other = batch + 1 if images else batch - batch % every
        smaller = [size >> halves for halves in range(1, size.bit_length())]
        # what costs the least time first
        train, unet = config.train, self.pipeline.unet
        tries = [(rows, "") for rows in smaller]
        if not train.recompute_activations:
            if recompute_activations(unet):
                tries.insert(0, (size, "recompute_activations"))
            recompute_activations(unet, False)
        if not train.gradient_checkpointing:
            tries += [(rows, "gradient_checkpointing") for rows in (size, *smaller)]
        for rows, saving in [] if self.ranks.sharded else tries:
            if not self._fits(batch, rows, saving):
                continue
            if other is not None and not self._fits(other, None, saving):
                continue
            settings = []
            if rows < size:
                settings += [
                    f"data.{'image_batch' if images else 'batch'} = {rows}",
                    f"train.accumulate = {config.train.accumulate * size // rows}",
                ]
            if saving:
                settings.append(f"train.{saving} = true")
            return f"tried here, this fits: {', '.join(settings)}"
        return (
            "set train.gradient_checkpointing = true, fewer data.num_frames or pixels, "
            'train.what = "lora", optimizer.kind = "adamw8bit", or shard it over more GPUs by '
            "`accelerate launch --use_fsdp`"
        )

    def _fits(self, index: int, rows: int | None, saving: str) -> bool:
        """Whether a batch, or some rows of it, goes through forward and backward passes."""
        parameters = [p for group in self.parameter_groups() for p in group["params"]]
        fresh = index < self.config.train.accumulate  # the moments are not there before a step
        whole = self.batch(index)
        pixels, latents, text = (
            part if part is None else part[:rows]
            for part in (whole.pixels, whole.latents, whole.text)
        )
        cut = Batch(pixels, latents, text, whole.captions[:rows])
        if saving:
            _save_memory(self.pipeline.unet, saving, True)
        try:
            moments = [torch.empty_like(p) for p in parameters for _ in range(2 * fresh)]
            with self.ranks.accelerator.autocast():
                loss = self.loss_of(cut, torch.Generator().manual_seed(0))
            # not backward(), whose hooks would wait for the other ranks
            torch.autograd.grad(loss, parameters, allow_unused=True)
            del moments
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if saving:
                _save_memory(self.pipeline.unet, saving, False)
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()

    def _prepare_model(self, pipeline: LatentShiftPipeline) -> None:
        config, device = self.config, self.ranks.device
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        choose_parameters(pipeline, config.train)
        if not any(p.requires_grad for p in pipeline.unet.parameters()):
            raise TrainingError("nothing of the U-Net is trained: change [train]")
        self._whole = {}
        half = _HALF.get(config.precision)
        if half == torch.float16 and device.type == "cpu":
            raise TrainingError('precision = "fp16" needs a GPU: take "bf16" or "fp32" on the CPU')
        pipeline.vae.to(device)
        pipeline.text_encoder.to(device)
        pipeline.unet.to(device)
        if not self.ranks.sharded:  # FSDP takes contiguous parameters alone
            pipeline.unet.to(memory_format=torch.channels_last)
        if half is not None:
            if half == torch.bfloat16:  # float16 overflows in some autoencoders
                self._halve(pipeline, "vae", half)
            if not config.train.text_encoder:
                self._halve(pipeline, "text_encoder", half)
            if config.train.what == "lora":
                self._halve(pipeline, "unet", half)
        for saving in ("recompute_activations", "gradient_checkpointing"):
            if getattr(config.train, saving):
                _save_memory(pipeline.unet, saving, True)

    def _halve(self, pipeline: LatentShiftPipeline, name: str, dtype: torch.dtype) -> None:
        """Casts what is not trained of a model, and keeps it as it was for `finish`."""
        frozen = [
            (key, parameter)
            for key, parameter in getattr(pipeline, name).named_parameters()
            if not parameter.requires_grad
        ]
        if self.ranks.first:
            self._whole[name] = {key: p.detach().to("cpu", copy=True) for key, p in frozen}
        for _, parameter in frozen:
            parameter.data = parameter.data.to(dtype)

    def _open(self, clips: ClipSource | None, images: ClipSource | None) -> None:
        config, ranks = self.config, self.ranks
        data = config.data
        if clips is None:
            clips = open_data(data.clips, data, self.pipeline)
            if images is None and data.images:
                images = open_data(data.images, data, self.pipeline)
        form = ClipFormat(
            data.num_frames,
            data.height,
            data.width,
            fps=data.fps or None,
            stride=data.stride,
            crop=data.crop,
            flip=data.flip,
            start=data.start,
        )
        factor = self.pipeline.vae_scale_factor
        levels = 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)
        if data.height % factor or data.width % factor:
            raise TrainingError(
                f"data.height and data.width must be multiples of {factor}, the autoencoder's "
                f"factor ({factor * levels} is better), got {data.height} x {data.width}"
            )
        self.form = form
        shared: dict[str, Any] = {
            "rank": ranks.rank,
            "world": ranks.world,
            "workers": data.workers,
        }
        seed = derive_seed(config.seed, "clips")
        self.source = clips
        self.clips = Batches(clips, form, batch_size=data.batch, seed=seed, **shared)
        self.images = self.clips
        if data.image_every:
            images = clips if images is None else images
            seed = derive_seed(config.seed, "images")
            single = images.form or replace(form, num_frames=1)
            self.images = Batches(images, single, batch_size=data.image_batch, seed=seed, **shared)
        self.held_out: Batches | None = None
        if config.validation.held_out:
            still = replace(form, start="middle", crop="center", flip=False)
            source = open_data(config.validation.held_out, data, self.pipeline)
            shared["workers"] = 0
            still = source.form or still
            self.held_out = Batches(source, still, batch_size=data.batch, seed=0, **shared)
        size = (data.height // factor, data.width // factor)
        known = self.pipeline.unet.config.sample_size
        if size != ((known, known) if isinstance(known, int) else tuple(known)):
            self.pipeline.unet.register_to_config(sample_size=size)
        self.pipeline.register_to_config(
            default_num_frames=data.num_frames,
            default_steps=config.validation.steps,
            default_guidance_scale=config.validation.guidance_scale,
            **({"default_fps": data.fps / data.stride} if data.fps else {}),
        )

    @torch.no_grad()
    def _latents(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Returns latents (B, T, C, h, w), sampled from the autoencoder's posterior."""
        device = self.ranks.device
        if batch.latents is not None:
            return batch.latents.to(device)
        assert batch.pixels is not None  # a batch has the one or the other
        with self.watch("autoencoder"):
            vae = self.pipeline.vae
            mean, std = encode_frames(vae, batch.pixels, _ENCODED)
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            return latents.to(device) * vae.config.scaling_factor

    def _text(self, batch: Batch, dropped: list[bool]) -> Tensor:
        """Returns the text encoder's hidden states (B, L, D)."""
        if self.config.train.text_encoder:
            return self._encode(
                ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
            )
        with torch.no_grad():
            if batch.text is None:
                text = self._encode(batch.captions)
            else:
                text = batch.text.to(self.ranks.device)
            if self._empty is None:
                cached = batch.text is not None and getattr(self.source, "null_text", None)
                self._empty = cached if isinstance(cached, Tensor) else self._encode([""])
            mask = torch.tensor(dropped, device=text.device).view(-1, 1, 1)
            return torch.where(mask, self._empty.to(text), text)

    def _encode(self, captions: list[str]) -> Tensor:
        if not self.config.train.text_encoder:
            found = encode_text(self.pipeline.text_encoder, self.pipeline.tokenizer, captions)
            return found.to(self.ranks.device)
        # data.encode's is without gradients
        encoder, tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.ranks.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        return encoder(tokens.input_ids, tokens.attention_mask if masked else None)[0]

    def _reference(self) -> tuple[list[str], dict[str, float]]:
        """The validation prompts, and the motion of some training clips; the same on all ranks."""
        if self._measure is None:
            config = self.config.validation
            form = self.form
            if self.source.form is None:
                form = replace(form, start="middle", crop="center", flip=False)
            number = min(config.clips, len(self.source))
            batch = Batches(self.source, form, batch_size=number, seed=self.config.seed)[0]
            frames = batch.pixels
            if frames is None:
                assert batch.latents is not None
                latents = batch.latents.transpose(1, 2).to(self.ranks.device)
                frames = self.pipeline.decode_frames(latents)[0] * 2.0 - 1.0
            truth = motion(frames.float().add(1.0).div(2.0))
            self._measure = list(config.prompts) or batch.captions, truth
        return self._measure

    def _held_out_loss(self) -> float:
        assert self.held_out is not None
        ranks, losses = self.ranks, []
        rows = self.config.data.batch * ranks.world
        for index in range(max(1, self.config.validation.clips // rows)):
            seed = derive_seed("held out", index, ranks.rank)
            with ranks.accelerator.autocast():
                losses.append(
                    self.loss_of(self.held_out[index], torch.Generator().manual_seed(seed))
                )
        return float(ranks.mean(torch.stack(losses).mean()))


def run(
    config: Finetune,
    root: Path,
    clock: Clock,
    resume_from: str = "latest",
    *,
    pipeline: DiffusionPipeline | None = None,
    clips: ClipSource | None = None,
    images: ClipSource | None = None,
) -> bool:
    """Runs a finetuning recipe, going on from whatever `root` holds; see `training.train`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    _check_trackers(config.trackers)
    directory = root / FinetuneStage.name
    done = directory / "done"
    if done.exists() and int(done.read_text() or 0) >= config.train.steps:
        now = {key: value for key, value in _fixed(config).items() if key != "train.steps"}
        refuse_another(root, now, flat(json.loads((root / "recipe.json").read_text())))
        tqdm.write(f"{root} holds this run, finished", file=sys.stderr)
        return True
    ranks = make_ranks(config, root)
    if ranks.first:
        directory.mkdir(parents=True, exist_ok=True)
        (root / "recipe.json").write_text(json.dumps(to_dict(config), indent=2))
    ranks.wait()
    stage = FinetuneStage(config, ranks, root, pipeline=pipeline, clips=clips, images=images)
    about = _fixed(config)
    about["the number of ranks"] = ranks.world
    about["what data.clips holds"] = fingerprint(stage.source) if ranks.first else ""
    loop = LoopConfig(
        seed=config.seed,
        keep=config.checkpoints.keep,
        accumulate=config.train.accumulate,
        save_every=config.checkpoints.every,
        evaluate_every=config.validation.every,
        evaluate_first=bool(config.validation.every),
        about=about,
    )
    accelerator = ranks.accelerator
    accelerator.init_trackers(
        "latent-shift", config={key: str(value) for key, value in about.items()}
    )
    try:
        run_stage(stage, loop, directory, clock, Results(root / "scores.json"), ranks, resume_from)
    except Interrupted as stop:
        if ranks.first:
            tqdm.write(f"{stop}; run the same command again to go on")
        return False
    finally:
        # not end_training(), after which this process could not train again
        for tracker in accelerator.trackers:
            tracker.finish()
    if ranks.first:
        done.write_text(str(config.train.steps))
    ranks.wait()
    return True


def make_ranks(config: Finetune, root: Path | None = None) -> Ranks:
    """Returns the processes of a finetuning run."""
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    assert device is not None
    return Ranks(
        device,
        precision=config.precision,
        accumulate=config.train.accumulate,
        trackers=config.trackers if root is not None else (),
        folder=root,
    )


def _save_memory(unet: LatentShiftUNet, how: str, enabled: bool) -> None:
    """Turns one of `TrainConfig`'s ways to keep less for the backward pass on or off."""
    if how == "gradient_checkpointing":
        switch = (
            unet.enable_gradient_checkpointing if enabled else unet.disable_gradient_checkpointing
        )
        switch()
    elif recompute_activations(unet, enabled) == 0 and enabled:
        raise TrainingError(
            "train.recompute_activations changes nothing here: every ResNet block has adapters on "
            'its convolutions, or dropout; leave "conv1" and "conv2" out of train.lora_targets, or '
            "take train.gradient_checkpointing"
        )


def _check_trackers(names: tuple[str, ...]) -> None:
    known = list(LOGGER_TYPE_TO_CLASS)
    there = [str(kind.value) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise TrainingError(f"trackers: {name!r} is none of {', '.join(known)}")
        if name not in there:
            raise TrainingError(
                f"trackers: {name} is not installed: pip install {name}, or set trackers = []"
            )


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _fixed(config: Finetune) -> dict[str, Any]:
    """The settings, all but those that do not change what a step computes."""
    settings = flat(to_dict(config))
    return {key: value for key, value in settings.items() if key.split(".")[0] not in _FREE}
