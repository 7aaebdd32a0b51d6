"""Calls every operator of bench_shift.py a few times, for a profiler to look at its kernels:

ncu --kernel-name-base demangled --kernel-name regex:latent_shift python profile_kernels.py
"""

from __future__ import annotations

import sys

import torch
from bench_shift import LAYOUTS, OPS, PROVIDERS, Case, ShiftSpec, prepare, unet_sites


def main() -> None:
    """320 channels at 64x64, 32 frames, bf16, in both layouts."""
    site, device = unet_sites(512, 32)[0], torch.device(sys.argv[1] if sys.argv[1:] else "cuda")
    spec = ShiftSpec.latent_shift(site.channels)
    for op in OPS.values():
        for layout in LAYOUTS:
            for direction in ("forward", "backward"):
                case = Case(site, op, "bf16", layout, direction, "warm", "calls")
                for name in ("latent-shift", "latent-shift+fused"):
                    if PROVIDERS[name].serves(case):
                        call = prepare(case, PROVIDERS[name].build(op, spec, device), device)
                        call()
                        call()


if __name__ == "__main__":
    main()
