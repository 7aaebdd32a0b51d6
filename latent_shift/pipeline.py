"""Text to video with a Stable-Diffusion-family model whose U-Net carries the temporal shift.

The module path of :class:`LatentShiftPipeline` belongs to the saved format, so this file never
moves.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from latent_shift_kernels.integrations.diffusers import text_kept

from . import __version__
from .graphs import UNetGraphs
from .unet import LatentShiftUNet, ShiftConfig, insert_shift, remove_shift
from .video import numbered, write_clip

logger = logging.get_logger(__name__)

# diffusers looks for these bases in the namespace of a module that defines a saved component.
__all__ = [
    "LatentShiftPipeline",
    "LatentShiftPipelineOutput",
    "ModelMixin",
    "SchedulerMixin",
]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class LatentShiftPipelineOutput(BaseOutput):
    """Clips.

    Attributes:
        frames: By ``output_type``: ``"pil"`` a list of frames for each clip; ``"np"`` float32
            (B, T, H, W, 3) in [0, 1]; ``"pt"`` float32 (B, T, 3, H, W) in [0, 1]; ``"latent"``
            (B, C, T, h, w).
        nsfw_content_detected: For each clip and frame, where the pipeline has a safety checker.
        fps: Frames a second that :meth:`save` writes.
        metadata: For each clip what made it; :meth:`save` stores it in the file's comment.
        output_type: What ``frames`` are.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | Tensor
    nsfw_content_detected: list[list[bool]] | None = None
    fps: float = 8.0
    metadata: list[dict[str, Any]] | None = None
    output_type: str = "pil"

    def save(
        self, path: str | os.PathLike[str], *, fps: float | None = None, scale: int = 1
    ) -> list[Path]:
        """Writes every clip with :func:`latent_shift.video.write_clip`.

        Args:
            path: ``.gif``, ``.mp4``, ``.webp``, ``.png`` (a sheet of all frames), or no suffix for
                a folder of frames. Several clips become ``name-00.gif``, ``name-01.gif``, ...
            fps: Overrides ``self.fps``.
            scale: Shows every pixel as ``scale`` x ``scale`` pixels.

        Returns:
            The paths written.

        Raises:
            ValueError: If the frames are latents, or on another suffix.
        """
        clips = self.to_uint8()
        return [
            write_clip(
                clip,
                numbered(path, index, len(clips)),
                fps=self.fps if fps is None else fps,
                scale=scale,
                metadata=self.metadata[index] if self.metadata else None,
            )
            for index, clip in enumerate(clips)
        ]

    def to_uint8(self) -> list[np.ndarray]:
        """The clips as uint8 (T, H, W, 3).

        Raises:
            ValueError: If the frames are latents.
        """
        if isinstance(self.frames, list):
            return [np.stack([np.asarray(f.convert("RGB")) for f in clip]) for clip in self.frames]
        frames = self.frames
        if isinstance(frames, Tensor):
            if self.output_type == "latent":
                raise ValueError(
                    f"these are latents {tuple(frames.shape)}, not frames: generate with another "
                    "output_type"
                )
            frames = frames.permute(0, 1, 3, 4, 2).float().cpu().numpy()
        return list((frames * 255).round().astype(np.uint8))


class LatentShiftPipeline(StableDiffusionPipeline):
    """Text to video by Latent-Shift (arXiv 2304.08477).

    Saving, offloading, VAE slicing and tiling, LoRA, textual inversion and FreeU are those of
    ``StableDiffusionPipeline``; with ``num_frames=1`` so are the images.

    Args:
        vae, text_encoder, tokenizer, scheduler: Those of a Stable-Diffusion-family model.
        unet: Its U-Net after :func:`latent_shift.insert_shift`; :meth:`from_t2i` does that.
        safety_checker, feature_extractor, image_encoder: Optional, as in
            ``StableDiffusionPipeline``.
        requires_safety_checker: Warn where ``safety_checker`` is None.
        default_num_frames, default_fps, default_steps, default_guidance_scale: What a call takes
            where it is not told; saved with the model.

    Raises:
        TypeError: If ``unet`` carries no shift.
        ValueError: If the U-Net wants conditions or channels that this pipeline does not make.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: LatentShiftUNet,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker = None,
        feature_extractor: CLIPImageProcessor = None,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = False,
        default_num_frames: int = 16,
        default_fps: float = 8.0,
        default_steps: int = 50,
        default_guidance_scale: float = 7.5,
    ) -> None:
        _check_unet(unet, vae)
        self._graphs: UNetGraphs | None = None
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_to_config(
            default_num_frames=default_num_frames,
            default_fps=default_fps,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> LatentShiftPipeline:
        """Loads a saved pipeline.

        Args:
            pretrained_model_name_or_path: A folder, or ``"owner/name"`` on the Hugging Face Hub;
                nothing else touches the network.
            **kwargs: As ``DiffusionPipeline.from_pretrained``; ``dtype`` is float32 if left out.

        Raises:
            FileNotFoundError: If there is no such folder, or no pipeline in it.
            TypeError: If it holds an image pipeline, which :meth:`from_t2i` loads.
        """
        source, index = _locate(pretrained_model_name_or_path, kwargs)
        unet = (index or {}).get("unet", (LatentShiftUNet.__module__, LatentShiftUNet.__name__))
        # the shift's U-Net or the one with temporal layers; an image model's is of diffusers
        if "unet" not in kwargs and unet[0].partition(".")[0] != __package__:
            raise TypeError(
                f"{source!r} holds an image model ({unet[1]}): load it with "
                "LatentShiftPipeline.from_t2i"
            )
        return super().from_pretrained(source, **_one_dtype(kwargs))

    @classmethod
    def from_t2i(
        cls,
        source: str | os.PathLike[str] | DiffusionPipeline,
        shift: ShiftConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> LatentShiftPipeline:
        """Makes a video pipeline of an image one: the same parameters, the shift in the U-Net.

        Args:
            source: A Stable Diffusion folder, a name on the Hugging Face Hub, or a pipeline. A
                pipeline's components are shared, not copied, and its U-Net is changed in place: it
                goes on making the same images. For a single-file checkpoint pass
                ``StableDiffusionPipeline.from_single_file(...)``.
            shift: What shift; Latent-Shift's thirds if None. A U-Net that carries one already keeps
                it if None.
            **kwargs: Components and ``default_*`` values of this class; for a folder or a name also
                those of ``from_pretrained`` (``dtype``, ``variant``, ``revision``, ...).

        Raises:
            FileNotFoundError: If there is no such folder, or no pipeline in it.
            TypeError: If ``source`` is no Stable-Diffusion-shaped pipeline.
        """
        components, own = cls._get_signature_keys(cls)
        defaults = {name: kwargs.pop(name) for name in own if name in kwargs}
        if not isinstance(source, DiffusionPipeline):
            source, _ = _locate(source, kwargs)
            kwargs.setdefault("safety_checker", None)
            pipeline = StableDiffusionPipeline.from_pretrained(
                source, requires_safety_checker=False, **_one_dtype(kwargs)
            )
            kwargs = {}
        else:
            pipeline = source
            if stray := sorted(set(kwargs) - set(components)):
                raise TypeError(
                    f"from_t2i takes {', '.join(stray)} only with a folder or a name, not with a "
                    "pipeline that is loaded already"
                )
        found = {**pipeline.components, **kwargs}
        unknown, missing = set(found) - set(components), set(components) - set(found)
        if unknown or missing - set(cls._optional_components):
            raise TypeError(
                "from_t2i takes pipelines shaped like Stable Diffusion 1 and 2, got "
                + type(pipeline).__name__
                + (f" with {', '.join(sorted(unknown))}" if unknown else "")
            )
        unet = found["unet"]
        if isinstance(unet, LatentShiftUNet):
            if shift is not None:
                remove_shift(unet)
                insert_shift(unet, shift)
        elif isinstance(unet, UNet2DConditionModel):
            insert_shift(unet, shift)
        made = cls(**found, **defaults)
        if pipeline.name_or_path:
            made.register_to_config(_name_or_path=pipeline.name_or_path)
        return made

    @classmethod
    def from_embedded(cls, **kwargs: Any) -> LatentShiftPipeline:
        """Loads the small model that comes with the package; no network. Arguments as
        :meth:`from_pretrained`.

        Raises:
            FileNotFoundError: If the installation lacks it.
        """
        assets = resources.files(__package__) / "assets" / "embedded"
        if not (assets / "model_index.json").is_file():
            raise FileNotFoundError(
                "the embedded model is missing from this installation of latent-shift: install the "
                "wheel, or train it with `latent-shift train embedded --output DIR`"
            )
        with resources.as_file(assets) as folder:
            made = cls.from_pretrained(folder, **kwargs)
        made.register_to_config(_name_or_path="embedded")
        return made

    def set_shift(self, **changes: Any) -> None:
        """Changes fields of the U-Net's :class:`~latent_shift.ShiftConfig`, such as
        ``boundary="circular"``.

        Raises:
            ValueError: On unknown values.
        """
        config = replace(self.unet.shift_config, **changes)
        remove_shift(self.unet)
        insert_shift(self.unet, config)

    def enable_cuda_graphs(self) -> None:
        """Records the U-Net's call once for every shape, and replays it as one launch in every step
        from then on. Prompts, seeds, sizes, weights and LoRA adapters change freely; of
        other changes to the U-Net (FreeU, hooks) tell it by calling this again.

        Calls with ``cross_attention_kwargs``, and those after a move to the CPU, run without.
        :meth:`disable_cuda_graphs` gives the graphs' memory back.

        Raises:
            ValueError: If the U-Net is not on a CUDA device, or is moved around by offloading,
                which a recorded graph cannot follow.
        """
        if hasattr(self.unet, "_hf_hook"):
            raise ValueError(
                "CUDA graphs need the U-Net to stay on its device: turn offloading off first, by "
                "pipe.remove_all_hooks()"
            )
        if self.unet.device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need the pipeline on a CUDA device, it is on {self.unet.device}: "
                "call pipe.to('cuda') first"
            )
        self._graphs = UNetGraphs()

    def disable_cuda_graphs(self) -> None:
        """Takes :meth:`enable_cuda_graphs` back."""
        self._graphs = None

    @property
    def model_name(self) -> str | None:
        """Where the model came from: a hub name, or a folder's own name without the way to it."""
        name = self.name_or_path
        return Path(name).name if name and os.path.isdir(name) else name and str(name)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = 8,
    ) -> LatentShiftPipelineOutput | tuple:
        """Generates clips, P prompts times ``num_videos_per_prompt`` = B of them, those of one
        prompt together.

        Clip i depends on its prompt and its seed alone, not on what else is in the batch; as
        convolutions of different batch sizes may sum in different orders, that is to rounding, and
        bit for bit only for the same call on the same machine.

        Args:
            prompt: What to show; one string or a list of P.
            negative_prompt: What to steer away from; one string for all prompts or a list of P. Of
                no effect without guidance.
            num_frames: T; 1 makes images. The model's default (16 for Stable Diffusion) if None.
            height, width: In pixels, multiples of the autoencoder's factor; the model's own size if
                None.
            fps: Frames a second of the saved clip; it is not a condition. The model's default (8)
                if None.
            num_inference_steps: Denoising steps; the model's default (50) if None.
            guidance_scale: Classifier-free guidance, off at 1 and below; the model's default (7.5)
                if None.
            guidance_rescale: Arxiv 2305.08891, section 3.4.
            eta: DDIM's noise level; of no effect in schedulers without it.
            num_videos_per_prompt: Clips of each prompt.
            generator: One for all noise, or a list of B, one for each clip.
            seed: Instead of ``generator``: a list of B, or the seed of the first clip, the others'
                following by ones. The noise is drawn on the CPU, so it is the same on every device.
            latents: Noise (B, C, T, h, w), standard normal; ``num_frames``, ``height`` and
                ``width`` follow it.
            prompt_embeds, negative_prompt_embeds: Instead of the prompts, (P, L, D).
            timesteps, sigmas: A custom schedule, where the scheduler takes one.
            clip_skip: Last layers of the text encoder to leave out.
            cross_attention_kwargs: For the attention processors; ``scale`` is LoRA's.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; see
                :class:`LatentShiftPipelineOutput`.
            return_dict: If False, returns ``(frames,)``.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, tensors)`` after every
                step; what it returns replaces ``latents`` and ``prompt_embeds``. Setting
                ``pipe._interrupt`` in it ends the denoising.
            callback_on_step_end_tensor_inputs: Which tensors it is given: ``latents``,
                ``prompt_embeds`` (with guidance the negative ones first),
                ``negative_prompt_embeds``.
            decode_chunk_size: Frames that the autoencoder decodes at a time; None for all at once.

        Returns:
            :class:`LatentShiftPipelineOutput`.

        Raises:
            TypeError: If a prompt is neither a string nor a list of strings.
            ValueError: If arguments are out of range or do not fit each other.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        config = self.config
        steps = config.default_steps if num_inference_steps is None else num_inference_steps
        fps = config.default_fps if fps is None else fps
        if guidance_scale is None:
            guidance_scale = config.default_guidance_scale
        prompts = _prompts(prompt, "prompt")
        negatives = _prompts(negative_prompt, "negative_prompt")
        if latents is None:
            num_frames = config.default_num_frames if num_frames is None else num_frames
            own_height, own_width = self._own_size()
            height = own_height if height is None else height
            width = own_width if width is None else width
        elif latents.dim() != 5:
            raise ValueError(f"latents must be (B, C, T, h, w), got {tuple(latents.shape)}")
        else:
            num_frames = latents.shape[2] if num_frames is None else num_frames
            height = latents.shape[3] * self.vae_scale_factor if height is None else height
            width = latents.shape[4] * self.vae_scale_factor if width is None else width
        self._check_numbers(
            num_frames=num_frames,
            num_inference_steps=steps,
            num_videos_per_prompt=num_videos_per_prompt,
            decode_chunk_size=1 if decode_chunk_size is None else decode_chunk_size,
        )
        self._check_call(
            height,
            width,
            fps,
            output_type,
            callback_on_step_end_tensor_inputs,
            prompts,
            negatives,
            prompt_embeds,
            negative_prompt_embeds,
        )
        if prompts is None:
            assert prompt_embeds is not None  # _check_call
            num_prompts = prompt_embeds.shape[0]
        else:
            num_prompts = len(prompts)
        if negatives is not None and len(negatives) == 1:
            negatives = negatives * num_prompts
        if negatives is not None and len(negatives) != num_prompts:
            raise ValueError(
                f"negative_prompt must be one string or one for each of the {num_prompts} "
                f"prompts, got {len(negatives)}"
            )
        num_clips = num_prompts * num_videos_per_prompt
        generator = _generators(generator, seed, num_clips)

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompts,
            device,
            num_videos_per_prompt,
            self.do_classifier_free_guidance,
            negatives,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        assert prompt_embeds is not None  # encoded above where it was not given
        if self.do_classifier_free_guidance:
            assert negative_prompt_embeds is not None
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        schedule, steps = retrieve_timesteps(self.scheduler, steps, device, timesteps, sigmas)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        # kept for the metadata: a generator moves on as it is used
        seeds = _seeds(generator, num_clips)
        latents = self.prepare_latents(
            num_clips,
            self.unet.config.in_channels,
            num_frames,
            *size,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)
        if eta and "eta" not in extra_step_kwargs:
            logger.warning(f"{type(self.scheduler).__name__} has no eta; eta={eta} has no effect")
        timestep_cond = self._guidance_embedding(latents)

        warmup = len(schedule) - steps * self.scheduler.order
        self._num_timesteps = len(schedule)
        # a recorded call holds its own projections of the text
        keeping = text_kept(self.unet) if self._graphs is None else nullcontext(lambda: None)
        with keeping as forget_text, self.progress_bar(total=steps) as progress_bar:
            for i, t in enumerate(schedule):
                if self.interrupt:
                    break
                guided = self.do_classifier_free_guidance
                model_input = torch.cat([latents] * 2) if guided else latents
                model_input = self.scheduler.scale_model_input(model_input, t)
                noise_pred = self._predict(
                    model_input,  # (2B, C, T, h, w)
                    t,
                    prompt_embeds,
                    timestep_cond,
                    cross_attention_kwargs,
                )
                if guided:
                    negative, positive = noise_pred.chunk(2)
                    noise_pred = negative + self.guidance_scale * (positive - negative)
                    if self.guidance_rescale > 0.0:
                        noise_pred = rescale_noise_cfg(noise_pred, positive, self.guidance_rescale)
                latents = self.scheduler.step(
                    noise_pred, t, latents, **extra_step_kwargs, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, given) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    forget_text()
                if i == len(schedule) - 1 or (
                    i + 1 > warmup and (i + 1) % self.scheduler.order == 0
                ):
                    progress_bar.update()

        flags = None
        if output_type == "latent":
            frames = latents
        else:
            frames, flags = self.decode_frames(latents, decode_chunk_size)
            if output_type != "pt":
                frames = frames.permute(0, 1, 3, 4, 2).cpu().numpy()
            if output_type == "pil":
                frames = [self.image_processor.numpy_to_pil(clip) for clip in frames]
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)

        described = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "num_frames": num_frames,
            "fps": fps,
            "scheduler": type(self.scheduler).__name__,
            "shift": asdict(self.unet.shift_config),
            "model": self.model_name,
            "versions": {
                "latent_shift": __version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
            },
        }
        metadata = []
        for clip in range(num_clips):
            row = clip // num_videos_per_prompt
            text = {"prompt": prompts[row] if prompts else None}
            if negatives:
                text["negative_prompt"] = negatives[row]
            metadata.append({**text, "seed": seeds[clip], **described})
        return LatentShiftPipelineOutput(
            frames=frames,
            nsfw_content_detected=flags,
            fps=fps,
            metadata=metadata,
            output_type=output_type,
        )

    def _predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        timestep_cond: Tensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        inputs = {
            "sample": sample,
            "timestep": timestep,
            "encoder_hidden_states": text,
            "timestep_cond": timestep_cond,
        }
        if self._graphs is not None and sample.is_cuda and not cross_attention_kwargs:
            inputs["timestep"] = torch.as_tensor(timestep, device=sample.device)
            return self._graphs(self.unet, inputs)
        return self.unet(
            **inputs,
            cross_attention_kwargs=cross_attention_kwargs,
            # addition_embed_type "text" pools the text embeddings itself, but wants a dict here
            added_cond_kwargs={},
            return_dict=False,
        )[0]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``StableDiffusionPipeline.encode_prompt``, with ``clip_skip`` for every layout of
        ``CLIPTextModel``.

        Returns:
            Embeddings (P * num_images_per_prompt, L, D) of the prompts and, with guidance, of the
            negative ones.

        Raises:
            ValueError: If ``clip_skip`` leaves no layer.
        """
        prompt = [prompt] if isinstance(prompt, str) else prompt
        if isinstance(negative_prompt, str):
            number = len(prompt or []) if prompt_embeds is None else prompt_embeds.shape[0]
            negative_prompt = [negative_prompt] * number
        if clip_skip is not None and prompt is not None and prompt_embeds is None:
            prompt_embeds = self._encode_skipping(prompt, device, clip_skip, lora_scale)
            prompt = None
        return super().encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=lora_scale,
        )

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        num_frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """The noise to start from, (B, C, T, h, w); ``height`` and ``width`` are those of the
        latents.

        With a list of generators every clip's noise is drawn by itself, (1, C, T, h, w).

        Raises:
            ValueError: If ``latents`` have another shape.
        """
        shape = (batch_size, num_channels_latents, num_frames, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(
                f"latents must be (B, C, T, h, w) = {shape} for this call, got "
                f"{tuple(latents.shape)}"
            )
        return latents.to(device) * self.scheduler.init_noise_sigma

    def decode_frames(
        self, latents: Tensor, chunk_size: int | None = 8
    ) -> tuple[Tensor, list[list[bool]] | None]:
        """Decodes latent clips frame by frame.

        Args:
            latents: (B, C, T, h, w).
            chunk_size: Frames decoded at a time; None for all.

        Returns:
            Frames, float32 (B, T, 3, H, W) in [0, 1], and the safety checker's word on each, if
            there is one.
        """
        num_clips, num_frames = latents.shape[0], latents.shape[2]
        folded = latents.transpose(1, 2).flatten(0, 1) / self.vae.config.scaling_factor
        folded = folded.to(self.vae.dtype)
        frames, flags = [], []
        for chunk in folded.split(chunk_size or len(folded)):
            decoded = self.vae.decode(chunk, return_dict=False)[0]
            decoded, flagged = self.run_safety_checker(decoded, decoded.device, self.vae.dtype)
            flagged = [False] * len(chunk) if flagged is None else [bool(flag) for flag in flagged]
            shown = self.image_processor.postprocess(
                # a flagged frame is blank already: 0 is black, not the middle of [-1, 1]
                decoded,
                output_type="pt",
                do_denormalize=[not flag for flag in flagged],
            )
            frames.append(shown.float())
            flags += flagged
        clips = torch.cat(frames).unflatten(0, (num_clips, num_frames))
        if self.safety_checker is None:
            return clips, None
        return clips, [flags[i : i + num_frames] for i in range(0, len(flags), num_frames)]

    def _own_size(self) -> tuple[int, int]:
        """Height and width in pixels that the U-Net was trained on."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _guidance_embedding(self, latents: Tensor) -> Tensor | None:
        """The guidance scale as a condition (B, D), for U-Nets distilled to take it."""
        dim = self.unet.config.time_cond_proj_dim
        if dim is None:
            return None
        scale = torch.tensor(self.guidance_scale - 1).repeat(latents.shape[0])
        return self.get_guidance_scale_embedding(scale, embedding_dim=dim).to(
            latents.device, latents.dtype
        )

    def _encode_skipping(
        self,
        prompt: list[str],
        device: torch.device,
        clip_skip: int,
        lora_scale: float | None,
    ) -> Tensor:
        """Embeddings (P, L, D) from the layer ``clip_skip`` before the last."""
        encoder = self.text_encoder
        layers = encoder.config.num_hidden_layers
        if not 0 <= clip_skip < layers:
            raise ValueError(
                f"clip_skip must lie in [0, {layers - 1}]: the text encoder has {layers} layers, "
                f"got {clip_skip}"
            )
        tokens = self.tokenizer(
            self.maybe_convert_prompt(prompt, self.tokenizer),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(device)
        if lora_scale is not None:
            self._lora_scale = lora_scale
            scale_lora_layers(encoder, lora_scale)
        states = encoder(
            tokens.input_ids.to(device), attention_mask=mask, output_hidden_states=True
        ).hidden_states[-(clip_skip + 1)]
        # transformers 5.6 took the .text_model level out of CLIPTextModel
        flat: Any = getattr(encoder, "text_model", encoder)
        states = flat.final_layer_norm(states)
        if lora_scale is not None:
            unscale_lora_layers(encoder, lora_scale)
        return states

    @staticmethod
    def _check_numbers(**numbers: int) -> None:
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")

    def _check_call(
        self,
        height: int,
        width: int,
        fps: float,
        output_type: str,
        tensor_inputs: Sequence[str],
        prompts: list[str] | None,
        negatives: list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> None:
        factor = self.vae_scale_factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, the autoencoder's factor, got "
                f"{height} x {width}"
            )
        if not fps > 0:
            raise ValueError(f"fps must be > 0, got {fps}")
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}"
            )
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs may name "
                f"{self._callback_tensor_inputs}, got {unknown}"
            )
        for kind, text, embeds in (
            ("prompt", prompts, prompt_embeds),
            ("negative_prompt", negatives, negative_prompt_embeds),
        ):
            if text is not None and embeds is not None:
                raise ValueError(f"pass {kind} or {kind}_embeds, not both")
        if prompts is None and prompt_embeds is None:
            raise ValueError("pass prompt or prompt_embeds")
        if (
            prompt_embeds is not None
            and negative_prompt_embeds is not None
            and prompt_embeds.shape != negative_prompt_embeds.shape
        ):
            raise ValueError(
                f"prompt_embeds {tuple(prompt_embeds.shape)} and negative_prompt_embeds "
                f"{tuple(negative_prompt_embeds.shape)} must have the same shape"
            )


def _prompts(value: str | Sequence[str] | None, name: str) -> list[str] | None:
    if value is None:
        return None
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    if not prompts:
        raise ValueError(f"{name} is an empty list")
    return list(prompts)


def _generators(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seed: int | Sequence[int] | None,
    num_clips: int,
) -> torch.Generator | list[torch.Generator] | None:
    """One generator for all clips, or a list with one for each."""
    if seed is not None:
        if generator is not None:
            raise ValueError("pass seed or generator, not both")
        seeds = list(seed) if isinstance(seed, Sequence) else range(seed, seed + num_clips)
        if len(seeds) != num_clips:
            raise ValueError(f"seed must be one number or one for each of {num_clips} clips")
        return [torch.Generator().manual_seed(value) for value in seeds]
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    generator = list(generator)
    if len(generator) != num_clips:
        raise ValueError(
            f"generator must be one or a list with one for each of {num_clips} clips, got "
            f"{len(generator)}"
        )
    return generator


def _seeds(
    generator: torch.Generator | list[torch.Generator] | None, num_clips: int
) -> list[int | None]:
    if isinstance(generator, list):
        return [one.initial_seed() for one in generator]
    # clips that share a generator are not made by its seed alone
    return [generator.initial_seed() if generator and num_clips == 1 else None] * num_clips


def _check_unet(unet: Any, vae: Any) -> None:
    if isinstance(unet, UNet2DConditionModel) and not isinstance(unet, LatentShiftUNet):
        raise TypeError(
            "this U-Net carries no shift: use LatentShiftPipeline.from_t2i, or call insert_shift "
            "on it"
        )
    config = getattr(unet, "config", None)
    if config is None or vae is None:
        return
    if config.addition_embed_type not in (None, "text"):
        raise ValueError(
            f'U-Nets with addition_embed_type="{config.addition_embed_type}" (SDXL and others) are '
            "not supported: take a model shaped like Stable Diffusion 1 or 2"
        )
    if config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"the U-Net takes {config.in_channels} channels, the autoencoder makes "
            f"{vae.config.latent_channels}: inpainting and other image-conditioned models are not "
            "supported"
        )


def _one_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    # left to themselves, diffusers loads in float32 and transformers 5 in the dtype of the file
    if kwargs.keys() & {"dtype", "torch_dtype"}:
        return kwargs
    return {**kwargs, "dtype": torch.float32}


def _locate(
    source: str | os.PathLike[str], given: Mapping[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """Tells a folder from a hub name.

    Args:
        source: The one or the other.
        given: Components that need not be in the folder.

    Returns:
        What to hand to diffusers, and a folder's ``model_index.json``; None for a hub name.

    Raises:
        FileNotFoundError: If it is neither, or there is no whole pipeline in the folder.
        ValueError: If ``model_index.json`` is damaged.
    """
    source = os.fspath(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(source) and not folder.exists() and source[0] != ".":
            return source, None
        raise FileNotFoundError(
            f"no model folder {source!r} (and it is not a name on the Hugging Face Hub, owner/name)"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{source!r} is not a saved pipeline: it has no model_index.json (pass the folder that "
            "save_pretrained wrote)"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(index)!r} is damaged: {error}") from None
    for name, kind in content.items():
        if (
            isinstance(kind, list)
            and kind[0]
            and name not in given
            and not (folder / name).is_dir()
        ):
            raise FileNotFoundError(f"{source!r} is incomplete: its folder {name!r} is missing")
    tokenizer = folder / "tokenizer"
    # transformers makes an empty tokenizer of an empty folder, and every prompt reads the same
    if tokenizer.is_dir() and not any(
        (tokenizer / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):
        raise FileNotFoundError(f"{source!r} is incomplete: its tokenizer has no tokenizer.json")
    return str(folder), content
