"""The scorer: right on real clips, at chance on shuffled captions, honest about broken ones."""

import math
import random

import pytest
import torch

from latent_shift.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, MovingShapes, combinations
from latent_shift.evaluation import moving_shapes as scorer


@pytest.fixture(scope="module")
def real():
    data = MovingShapes(1, split="all")
    return [data.sample(index) for index in range(150)]


def test_real_clips_score_at_least_99_percent(real):
    scores = scorer.score_truths([clip.frames for clip in real], [clip.truth for clip in real])
    for key in (*scorer.ATTRIBUTES, "colour_constant", "shape_constant", "everything"):
        assert scores[key] >= 0.99, (key, scores)
    assert scores["jerk"] < 0.001


def test_shuffled_captions_score_at_chance(real):
    prompts = [clip.prompt for clip in real]
    random.Random(0).shuffle(prompts)
    scores = scorer.score_prompts([clip.frames for clip in real], prompts)
    assert scores["colour"] == pytest.approx(1 / len(COLOURS), abs=0.08)
    assert scores["shape"] == pytest.approx(1 / len(SHAPES), abs=0.11)
    assert scores["direction"] == pytest.approx(1 / len(DIRECTIONS), abs=0.08)
    assert scores["background"] == pytest.approx(1 / 4, abs=0.13)
    assert scores["everything"] < 0.02


def test_two_objects_are_matched_in_any_order():
    data = MovingShapes(1, split="all", two_object_share=1.0)
    clips = [data.sample(index) for index in range(60)]
    scores = scorer.score_prompts([clip.frames for clip in clips], [clip.prompt for clip in clips])
    assert scores["everything"] >= 0.95, scores


def test_what_a_caption_leaves_out_is_not_scored(real):
    silent = [c for c in real if c.prompt.objects[0].size is None][:5]
    scores = scorer.score_prompts(
        [clip.frames for clip in silent], [clip.prompt for clip in silent]
    )
    assert "size" not in scores and scores["everything"] == 1.0


def test_an_empty_clip_is_nothing():
    reading = scorer.read_clip(torch.full((4, 3, 32, 32), 0.5))
    seen = reading.objects[0]
    assert reading.background == "gray"
    assert (seen.colour, seen.shape, seen.size, seen.direction) == (None,) * 4
    assert not seen.colour_constant and math.isnan(seen.jerk)


def test_a_flickering_clip_is_not_constant(real):
    first = next(clip for clip in real if clip.truth.objects[0].colour == "red")
    other = next(clip for clip in real if clip.truth.objects[0].colour == "blue")
    frames = first.frames.clone()
    frames[1::2] = other.frames[1::2]
    seen = scorer.read_clip(frames).objects[0]
    assert not seen.colour_constant
    assert seen.jerk > 20 * scorer.read_clip(first.frames).objects[0].jerk


def test_noise_up_to_a_tenth_does_not_matter(real):
    clips = real[:40]
    generator = torch.Generator().manual_seed(0)
    noisy = [
        (c.frames + 0.03 * torch.randn(c.frames.shape, generator=generator)).clamp(0, 1)
        for c in clips
    ]
    scores = scorer.score_truths(noisy, [clip.truth for clip in clips])
    assert min(scores[key] for key in scorer.ATTRIBUTES) >= 0.95, scores


def test_single_images_are_scored_without_motion():
    data = MovingShapes(1, split="all", num_frames=1)
    prompt = data.prompt(3, image=True)
    scores = scorer.score_prompts([data.sample(3).frames], [prompt])
    assert scores["everything"] == 1.0
    assert not {"direction", "colour_constant", "jerk"} & set(scores)


def test_held_out_prompts_go_round_the_held_out_combinations():
    prompts = scorer.held_out_prompts(64, seed=0)
    seen = {(p.objects[0].colour, p.objects[0].shape, p.objects[0].direction) for p in prompts}
    assert seen == set(combinations("held_out"))
    assert prompts == scorer.held_out_prompts(64, seed=0)


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match="T, 3, H, W"):
        scorer.read_clip(torch.zeros(4, 32, 32, 3))
