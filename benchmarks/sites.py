"""Shapes of the Stable Diffusion 1.5 U-Net: every width and resolution its norms see."""

from __future__ import annotations

from dataclasses import dataclass

NUM_GROUPS = 32
EPS = 1e-5
CLIP_FRAMES = 16  # the paper's clip; 32 frames are two clips, as under classifier-free guidance

# Block whose norms see it, channels, latent side / side, norms of the U-Net's 44 with this shape.
_SITES = (
    ("down0.res", 320, 1, 7),
    ("up3.res1", 640, 1, 2),
    ("up3.res0", 960, 1, 1),
    ("down1.res0", 320, 2, 1),
    ("down1.res", 640, 2, 6),
    ("up2.res2", 960, 2, 1),
    ("up2.res1", 1280, 2, 1),
    ("up2.res0", 1920, 2, 1),
    ("down2.res0", 640, 4, 1),
    ("down2.res", 1280, 4, 6),
    ("up1.res2", 1920, 4, 1),
    ("up1.res0", 2560, 4, 2),
    ("down3.res", 1280, 8, 11),
    ("up0.res", 2560, 8, 3),
)

MAIN = (
    "down0.res",
    "down1.res",
    "down2.res",
)  # the commonest site of each of the three upper resolutions
RESOLUTIONS = (256, 512)  # pixels; the latent is an eighth


@dataclass(frozen=True)
class Site:
    """One activation (frames, channels, side, side) of the U-Net, and how many norms see it."""

    block: str
    frames: int
    channels: int
    side: int
    count: int
    out_channels: int  # of the 3x3 convolution behind the norm: the width of its level

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Frames folded into the batch, in clips of ``CLIP_FRAMES``."""
        return self.frames, self.channels, self.side, self.side

    @property
    def name(self) -> str:
        """The block and what a frame holds, as in ``down0.res 320x32x32``."""
        return f"{self.block} {self.channels}x{self.side}x{self.side}"

    @property
    def aliases(self) -> tuple[str, ...]:
        """Everything a command line may call it."""
        frame = f"{self.channels}x{self.side}x{self.side}"
        return self.block, frame, f"{self.frames}x{frame}", self.name


def unet_sites(resolution: int = 256, frames: int = CLIP_FRAMES) -> list[Site]:
    """The U-Net's shapes for frames of ``resolution`` pixels, ``frames`` of them in the batch."""
    latent = resolution // 8
    return [
        Site(block, frames, channels, latent // scale, count, 320 * min(scale, 4))
        for block, channels, scale, count in _SITES
    ]
