"""Questions to the dispatcher: what serves, and why nothing faster does."""

import pytest
import torch

from latent_shift_kernels import backends, explain, ops, serving

native = pytest.mark.skipif(
    serving("cpu")["temporal_shift"] != "cpu", reason="the CPU library is not what serves"
)


def test_serving_names_every_operator():
    for device in ("cpu", "cuda", "meta"):
        assert set(serving(device)) == set(ops.SCHEMAS)
    assert set(serving("meta").values()) == {"reference", "composed"}


@native
def test_explain_names_the_instruction_set():
    text = explain("shift_add", torch.zeros(2, 3, 4, 4))
    assert text == (
        f"shift_add on cpu float32 (2, 3, 4, 4): C++ ({backends.cpu_isa()})\n"
        "  moves 1.2 kB at least"
    )


@native
def test_explain_names_copies():
    x = torch.zeros(2, 3, 4, 4)
    other = x.contiguous(memory_format=torch.channels_last)
    assert "copied first" in explain("shift_add", x, other)
    assert "copied first" not in explain("shift_add", other, other)


@native
def test_explain_counts_what_it_is_given():
    x = torch.zeros(2, 32, 8, 8)  # 16 kB
    alone, joined = (explain("shift_add_group_norm_silu", *[x] * count) for count in (1, 2))
    assert "moves 32.8 kB" in alone and "moves 65.5 kB" in joined


def test_explain_names_refused_dtypes():
    assert "int32 is refused" in explain("shift_add", torch.zeros(2, 3, 4, 4, dtype=torch.int32))


def test_explain_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown operator"):
        explain("temporal_drift", torch.zeros(1))
    with pytest.raises(ValueError, match="at least one tensor"):
        explain("shift_add")
