"""Recorded calls of the U-Net: the same results through changing prompts, shapes and weights."""

from __future__ import annotations

import pytest
import torch

from latent_shift import LatentShiftPipeline, ShiftConfig, insert_shift, remove_shift
from latent_shift.graphs import UNetGraphs
from tests.model import tiny


class Recorder:
    """Stands for a GPU: a replay runs the recorded call again, on its buffers, into its output."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, call):
        self.recorded += 1
        output = call()

        def replay() -> None:
            output.copy_(call())

        return replay, output


@pytest.fixture
def unet():
    return insert_shift(tiny.image_pipeline().unet)


def inputs(clips: int = 2, frames: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(clips, 4, frames, 8, 8, generator=generator),
        "timestep": torch.tensor(100 + seed),
        "encoder_hidden_states": torch.randn(clips, 5, 32, generator=generator),
        "timestep_cond": None,
    }


@torch.no_grad()
def same(graphs, unet, given) -> bool:
    return torch.equal(graphs(unet, given), unet(**given, return_dict=False)[0])


@torch.no_grad()
def test_inputs_and_shapes_change_freely(unet):
    recorder = Recorder()
    graphs = UNetGraphs(recorder, limit=2)
    for seed in range(3):
        assert same(graphs, unet, inputs(seed=seed))
    assert recorder.recorded == 1
    assert same(graphs, unet, inputs(frames=2))
    assert same(graphs, unet, inputs(seed=4))
    assert recorder.recorded == 2
    assert same(graphs, unet, inputs(clips=1))  # the third shape drives out the oldest, two frames
    assert same(graphs, unet, inputs(seed=5))
    assert recorder.recorded == 3
    assert same(graphs, unet, inputs(frames=2))
    assert recorder.recorded == 4


@torch.no_grad()
def test_an_output_survives_the_next_replay(unet):
    graphs = UNetGraphs(Recorder())
    first = graphs(unet, inputs(seed=1))
    kept = first.clone()
    graphs(unet, inputs(seed=2))
    assert torch.equal(first, kept)


@torch.no_grad()
def test_what_a_graph_cannot_follow_is_recorded_again(unet):
    recorder = Recorder()
    graphs = UNetGraphs(recorder)
    assert same(graphs, unet, inputs())
    for parameter in unet.parameters():
        parameter.mul_(1.01)
    assert same(graphs, unet, inputs())
    assert recorder.recorded == 1  # in place: the graph reads the new values
    first = next(unet.parameters())
    first.data = first.data.clone()
    assert same(graphs, unet, inputs())
    assert recorder.recorded == 2
    unet.set_attn_processor(_Processor())
    assert same(graphs, unet, inputs())
    assert recorder.recorded == 3
    remove_shift(unet)
    insert_shift(unet, ShiftConfig(boundary="circular"))
    assert same(graphs, unet, inputs())
    assert recorder.recorded == 4


class _Processor:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


def test_the_switch_says_what_it_needs():
    pipe = LatentShiftPipeline.from_t2i(tiny.image_pipeline())
    with pytest.raises(ValueError, match=r"is on cpu: call pipe.to\('cuda'\) first"):
        pipe.enable_cuda_graphs()
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match="turn offloading off"):
        pipe.enable_cuda_graphs()
    pipe.disable_cuda_graphs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clips_are_those_without_graphs():
    pipe = LatentShiftPipeline.from_embedded().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    calls = [
        {"prompt": "a red circle moving right", "seed": 0},
        {"prompt": "a small blue square moving up", "seed": 1},
        {"prompt": ["a red circle", "a green triangle"], "seed": 2, "num_frames": 4},
    ]
    options = {"num_inference_steps": 4, "output_type": "pt"}
    expected = [pipe(**call, **options).frames for call in calls]
    pipe.enable_cuda_graphs()
    for call, frames in zip(calls * 2, expected * 2, strict=True):
        torch.testing.assert_close(pipe(**call, **options).frames, frames, rtol=0, atol=2e-3)
    pipe.set_shift(boundary="circular")
    looped = pipe(**calls[0], **options).frames
    pipe.disable_cuda_graphs()
    torch.testing.assert_close(pipe(**calls[0], **options).frames, looped, rtol=0, atol=2e-3)
    assert pipe.unet.shift_config == ShiftConfig(boundary="circular")
