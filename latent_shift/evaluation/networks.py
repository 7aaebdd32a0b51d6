"""The networks whose features the scores are made of: which file each is, and how it is asked.

Nothing here touches the network. A file is looked for in ``--weights DIR`` or the folder that
``LATENT_SHIFT_WEIGHTS`` names, and has to hash to what is written here. Where no hash of it is
published, what the user's file hashes to goes into the score's protocol instead.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

VARIABLE = "LATENT_SHIFT_WEIGHTS"
_FRAMES_AT_ONCE = 64  # images of 299 x 299 that go through an image network together


class EvaluationError(Exception):
    """A score that cannot be had as asked; the message says what to do."""


class Extractor(Protocol):
    """A network, loaded: it turns clips into features."""

    def clips(self, clips: Tensor) -> Tensor:
        """Features (B, K, D) float32 of clips (B, T, 3, H, W) uint8; K is T, or 1 for a clip."""
        ...


class TextExtractor(Extractor, Protocol):
    """A network that also reads captions."""

    def captions(self, texts: Sequence[str]) -> Tensor:
        """Features (B, D) float32 of captions."""
        ...


@dataclass(frozen=True)
class Network:
    """A feature network, as data.

    Attributes:
        name: what it is called here.
        files: its file by name, or those of which one is enough, with the SHA-256 that it has to
            have; None where none is known for certain.
        origin: where the file comes from.
        sees: "clips", or "frames" one by one.
        layer: where the features are taken, for the protocol.
        resize: what happens to the frames before, for the protocol.
        min_frames: the fewest frames that a clip needs.
        load: makes an extractor of the file found.
    """

    name: str
    files: Mapping[str, str | None]
    origin: str
    sees: Literal["clips", "frames"]
    layer: str
    resize: str
    min_frames: int
    load: Callable[[Path, torch.device], Any]


@dataclass(frozen=True)
class Located:
    """A network's file on this machine."""

    network: Network
    path: Path
    sha256: str

    def protocol(self) -> dict[str, Any]:
        """What a score has to say of the network it stands on."""
        return {
            "network": self.network.name,
            "weights": self.path.name,
            "weights_sha256": self.sha256,
            "layer": self.network.layer,
            "resize": self.network.resize,
        }


def locate(network: Network, folder: str | os.PathLike[str] | None = None) -> Located:
    """Finds and checks a network's file.

    Args:
        network: one of `NETWORKS`.
        folder: where the user keeps weights; what `LATENT_SHIFT_WEIGHTS` names if None. The
            networks that come with the package are found without it.

    Raises:
        EvaluationError: the file is missing, or is another than the one meant.
    """
    folder = folder or os.environ.get(VARIABLE)
    shipped = Path(str(files("latent_shift") / "assets" / "metrics"))
    for place in [Path(folder), shipped] if folder else [shipped]:
        for name, wanted in network.files.items():
            path = place / name
            if not path.is_file():
                continue
            found = sha256(path)
            if wanted is not None and found != wanted:
                raise EvaluationError(
                    f"{path} is not the file that {network.name} needs: its sha256 is {found}, "
                    f"expected {wanted}; get it again from {network.origin}"
                )
            return Located(network, path, found)
    wanted_files = " or ".join(
        f"{name} (sha256 {digest or 'not published, yours is recorded'})"
        for name, digest in network.files.items()
    )
    where = f"in {folder}" if folder else f"in the folder of --weights DIR or {VARIABLE}"
    raise EvaluationError(
        f"the weights of {network.name} are missing: put {wanted_files} {where}; "
        f"it comes from {network.origin}"
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Script:
    """A TorchScript video network that rescales and resizes by itself."""

    def __init__(self, path: Path, device: torch.device, **call: bool) -> None:
        try:
            self._network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise EvaluationError(
                f"{path} is no TorchScript file: {str(error).splitlines()[0]}"
            ) from None
        self._device, self._call = device, call

    @torch.no_grad()
    def clips(self, clips: Tensor) -> Tensor:
        pixels = clips.transpose(1, 2).contiguous().to(self._device)  # [B, 3, T, H, W] uint8
        return self._network(pixels, **self._call).float().cpu().unsqueeze(1)


class _Probabilities(_Script):
    """The same for a network that ends in a softmax; the score wants logits."""

    def clips(self, clips: Tensor) -> Tensor:
        return super().clips(clips).clamp(min=1e-30).log()


class _Inception:
    """torch-fidelity's Inception, whose resizing and pooling are those of the original FID."""

    def __init__(self, path: Path, device: torch.device, layer: str) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:
            raise EvaluationError(library_advice("torch-fidelity", error)) from error
        self._device = device
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=str(path)
        ).to(device)

    @torch.no_grad()
    def clips(self, clips: Tensor) -> Tensor:
        parts = [
            self._network(frames.to(self._device))[0].float().cpu()
            for frames in clips.flatten(0, 1).split(_FRAMES_AT_ONCE)
        ]
        return torch.cat(parts).unflatten(0, clips.shape[:2])


class _Clip:
    """CLIP as transformers has it, from a folder; Pillow prepares the images, as in training."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        options = {"local_files_only": True}
        try:
            self._model = CLIPModel.from_pretrained(path.parent, **options).to(device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
            self._prepare = CLIPImageProcessorPil.from_pretrained(path.parent, **options)
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{path.parent} is no complete CLIP folder ({' '.join(str(error).split())}): it "
                "needs config.json, preprocessor_config.json, the tokenizer's files and the weights"
            ) from error
        self._device = device

    @torch.no_grad()
    def clips(self, clips: Tensor) -> Tensor:
        parts = []
        for frames in clips.flatten(0, 1).split(_FRAMES_AT_ONCE):
            images = [frame.permute(1, 2, 0).numpy() for frame in frames.cpu()]
            pixels = self._prepare(images=images, return_tensors="pt")["pixel_values"]
            found = self._model.get_image_features(pixel_values=pixels.to(self._device))
            parts.append(found.pooler_output.float().cpu())
        return F.normalize(torch.cat(parts), dim=-1).unflatten(0, clips.shape[:2])

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        found = self._model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return F.normalize(found.pooler_output.float().cpu(), dim=-1)


class _ShapeFeatures:
    def __init__(self, path: Path, device: torch.device) -> None:
        from .shape_networks import ShapeClassifier

        self._network = _shape_network(path, device, ShapeClassifier)
        self._device = device

    @torch.no_grad()
    def clips(self, clips: Tensor) -> Tensor:
        return self._network.features(clips.to(self._device)).cpu().unsqueeze(1)


class _ShapeTowers:
    def __init__(self, path: Path, device: torch.device) -> None:
        from .shape_networks import ShapeTwoTower

        self._network = _shape_network(path, device, ShapeTwoTower)
        self._device = device

    @torch.no_grad()
    def clips(self, clips: Tensor) -> Tensor:
        return self._network.clips(clips.to(self._device)).cpu().unsqueeze(1)

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> Tensor:
        return self._network.captions(texts).cpu()


def _shape_network(path: Path, device: torch.device, kind: type) -> Any:
    from safetensors import SafetensorError

    from .shape_networks import load

    try:
        network = load(path)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise EvaluationError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(network, kind):
        raise EvaluationError(f"{path} holds a {type(network).__name__}, not a {kind.__name__}")
    return network.to(device)


def library_advice(library: str, error: Exception) -> str:
    """What to do where a library of the `eval` extra cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name != "torchvision":
        return f"{library} is missing: pip install 'latent-shift-video[eval]'"
    reason = str(error).splitlines()[0]
    return (
        f"{library} cannot be imported ({reason}): it needs a torchvision built for this torch "
        f"({torch.__version__}); install it from where torch came from"
    )


_SHIPPED = "the package itself; python -m latent_shift.evaluation.shape_networks trains it again"
_INCEPTION = {
    # the suffix is the hash's beginning, by torch.hub's convention
    "weights-inception-2015-12-05-6726825d.pth": (
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    )
}
_INCEPTION_ORIGIN = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth (95,628,359 bytes)"
)
_INCEPTION_RESIZE = "299x299, bilinear as in TensorFlow 1 (torch-fidelity)"

NETWORKS = {
    network.name: network
    for network in (
        Network(
            "i3d",
            {
                "i3d_torchscript.pt": (
                    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
                )
            },
            "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1 (51,235,320 bytes; "
            "the I3D of StyleGAN-V, trained on Kinetics-400)",
            "clips",
            "400 logits",
            "224x224, bilinear (inside the network)",
            10,
            lambda path, device: _Script(
                path, device, rescale=True, resize=True, return_features=True
            ),
        ),
        Network(
            "c3d-ucf101",
            {"c3d_ucf101.pt": None},
            "https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1 (the C3D of TGANv2 as "
            "StyleGAN-V converted it, finetuned on UCF-101)",
            "clips",
            "softmax of 101 classes",
            "inside the network",
            16,
            _Probabilities,
        ),
        Network(
            "inception",
            _INCEPTION,
            _INCEPTION_ORIGIN,
            "frames",
            "pool3, 2048",
            _INCEPTION_RESIZE,
            1,
            lambda path, device: _Inception(path, device, "2048"),
        ),
        Network(
            "inception-logits",
            _INCEPTION,
            _INCEPTION_ORIGIN,
            "frames",
            "1008 logits without bias",
            _INCEPTION_RESIZE,
            1,
            lambda path, device: _Inception(path, device, "logits_unbiased"),
        ),
        Network(
            "clip",
            {
                "clip-vit-base-patch32/model.safetensors": None,
                "clip-vit-base-patch32/pytorch_model.bin": (
                    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"
                ),
            },
            "https://huggingface.co/openai/clip-vit-base-patch32 (with config.json, "
            "preprocessor_config.json and the tokenizer's files beside it)",
            "frames",
            "image and text embeddings, normalised",
            "224 on the shorter side, bicubic (Pillow), 224x224 centre crop",
            1,
            _Clip,
        ),
        Network(
            "shapes-classifier",
            {"classifier.safetensors": None},
            _SHIPPED,
            "clips",
            "64 features before the answers",
            "64x64, bilinear with antialiasing",
            4,
            _ShapeFeatures,
        ),
        Network(
            "shapes-two-tower",
            {"two_tower.safetensors": None},
            _SHIPPED,
            "clips",
            "clip and caption embeddings, 64, normalised",
            "64x64, bilinear with antialiasing",
            4,
            _ShapeTowers,
        ),
    )
}
