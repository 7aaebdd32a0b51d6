"""What the U-Net sees of clips and captions, and what identifies the models that make it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_frames(vae: Any, pixels: Tensor, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """Encodes frames by an `AutoencoderKL`, `chunk` of them at a time.

    Args:
        pixels: (B, T, 3, H, W) in [-1, 1].

    Returns:
        Mean and standard deviation of the posterior, (B, T, C, h, w) float32 on the CPU, not
        scaled.
    """
    parts = pixels.flatten(0, 1).to(vae.device, vae.dtype).split(chunk)
    posteriors = [vae.encode(part).latent_dist for part in parts]
    mean, std = (
        torch.cat([getattr(posterior, name) for posterior in posteriors])
        .unflatten(0, pixels.shape[:2])
        .float()
        .cpu()
        for name in ("mean", "std")
    )
    return mean, std


@torch.no_grad()
def encode_text(text_encoder: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Encodes captions as Stable Diffusion's pipeline does: (B, L, D) float32 on the CPU."""
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(text_encoder.device) if masked else None
    states = text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]
    return states.float().cpu()


def is_cut(tokenizer: Any, caption: str) -> bool:
    """Whether the caption has more tokens than the text encoder takes."""
    return len(tokenizer(caption, verbose=False).input_ids) > tokenizer.model_max_length


def model_digest(model: Any) -> str:
    """Hexadecimal digest of a model's weights, their dtype, and its settings."""
    digest = hashlib.sha256(_settings(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Hexadecimal digest of a tokenizer's vocabulary and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # what the last call left behind
        rules.pop(state, None)
    content = [type(tokenizer).__name__, tokenizer.model_max_length, rules]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _settings(config: Any) -> str:
    """A model's settings without where it came from and what wrote it."""
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {
        key: value
        for key, value in content.items()
        if not key.startswith("_") and key not in ("transformers_version", "architectures", "dtype")
    }
    return json.dumps(kept, sort_keys=True, default=str)
