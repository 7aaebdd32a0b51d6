"""Other projects' GroupNorm with SiLU, where they are installed, for bench_shift.py --peers.

apex    channels_last (github.com/NVIDIA/apex, contrib/group_norm)
sglang  Triton, NCHW, forward only (github.com/sgl-project/sglang, jit_kernel/diffusion)

None of them has a shift in it, and none is held to one.
"""

import torch
from bench_shift import EPS, NUM_GROUPS, Case, Provider, composed, no_shift, unshifted

PROVIDERS = {}


def add(name, norm, layout, passes):
    def serves(case: Case) -> bool:
        here = case.op.norm and not case.op.conv and case.direction in passes
        return here and case.layout == layout

    def build(op, spec, device):
        return composed(op, no_shift, spec, norm)

    PROVIDERS[name] = Provider(build, serves, unshifted, "without the shift")


try:
    from apex.contrib.group_norm import group_norm as apex

    def apex_norm(x, weight, bias):
        # as its module chooses from sm_80 on
        if x.shape[2] * x.shape[3] <= 1024:
            norm = apex.cuda_group_norm_nhwc_one_pass
        else:
            norm = apex.cuda_group_norm_nhwc_two_pass
        return norm(x, NUM_GROUPS, weight, bias, EPS, "silu")

    add("apex", apex_norm, "channels_last", ("forward", "backward", "forward+backward"))
except ImportError:
    pass

try:
    from sglang.jit_kernel.diffusion.triton import group_norm_silu as sglang

    @torch.no_grad()  # else it is PyTorch's own
    def sglang_norm(x, weight, bias):
        return sglang.triton_group_norm_silu(x, weight, bias, NUM_GROUPS, EPS)

    add("sglang", sglang_norm, "nchw", ("forward",))
except ImportError:
    pass
