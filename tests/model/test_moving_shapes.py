"""The generated data: determinism, exact geometry, captions that say what is shown."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from latent_shift.data import moving_shapes as data
from latent_shift.data.moving_shapes import COLOURS, DIRECTIONS, SHAPES, SIZES, MovingShapes, render


def test_a_clip_depends_on_seed_and_index_alone():
    first, second = MovingShapes(3, two_object_share=0.5), MovingShapes(3, two_object_share=0.5)
    second.sample(11)
    for index in (0, 5, 4):
        a, b = first.sample(index), second.sample(index)
        assert a.truth == b.truth and a.prompt == b.prompt and torch.equal(a.frames, b.frames)
    assert MovingShapes(4).truth(0) != MovingShapes(3).truth(0)


def test_known_values_do_not_drift():
    clip = MovingShapes(0).sample(0)
    item = clip.truth.objects[0]
    assert (
        clip.prompt.text == "a purple triangle moving down and to the right on a white background"
    )
    assert (item.colour, item.shape, item.direction) == ("purple", "triangle", "down-right")


@pytest.mark.parametrize("size", [32, 64, 96])
def test_shapes_of_one_size_have_the_same_area(size):
    radius = 0.2
    areas = []
    for shape in SHAPES:
        item = data.ObjectTruth(
            shape, "red", "large", "still", radius, (1.0, 0.0, 0.0), ((0.5, 0.5),)
        )
        frame = render([data.ClipTruth((item,), "black", (0.0, 0.0, 0.0))], size)[0, 0]
        areas.append(float(frame[0].sum()) / size**2)
        weight = frame[0] / frame[0].sum()
        centre = (torch.arange(size) + 0.5) / size
        assert float((weight.sum(0) * centre).sum()) == pytest.approx(0.5, abs=0.5 / size)
        assert float((weight.sum(1) * centre).sum()) == pytest.approx(0.5, abs=0.5 / size)
    assert areas == pytest.approx([math.pi * radius**2] * 3, rel=0.02)


def test_objects_stay_inside_and_move_as_told():
    dataset = MovingShapes(1, split="all", two_object_share=0.3)
    for index in range(300):
        truth = dataset.truth(index)
        for item in truth.objects:
            side, up, down = data.half_extents(item.shape, item.radius)
            for x, y in item.track:
                assert side <= x <= 1 - side and up <= y <= 1 - down
            moved = [b - a for a, b in zip(item.track[0], item.track[-1], strict=True)]
            length = math.hypot(*moved)
            if item.direction == "still":
                assert length == 0.0
            else:
                assert data.TRAVEL[0] <= length <= data.TRAVEL[1] + 1e-9
                assert [v / length for v in moved] == pytest.approx(DIRECTIONS[item.direction])
        if len(truth.objects) == 2:
            assert data._apart(*truth.objects)


def test_held_out_combinations_are_never_trained_on():
    train, held_out = set(data.combinations("train")), set(data.combinations("held_out"))
    assert not train & held_out
    assert len(train | held_out) == len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    assert 0.1 <= len(held_out) / len(train | held_out) <= 0.2
    # every value on its own is trained on
    for position, values in enumerate((COLOURS, SHAPES, DIRECTIONS)):
        assert {item[position] for item in train} == set(values)
    for index, (split, wanted) in itertools.product(
        range(100), (("train", train), ("held_out", held_out))
    ):
        item = MovingShapes(2, split=split).truth(index).objects[0]
        assert (item.colour, item.shape, item.direction) in wanted


def test_a_caption_asks_for_what_the_clip_shows():
    dataset = MovingShapes(5, split="all")
    silent = 0
    for index in range(300):
        truth, prompt = dataset.truth(index), dataset.prompt(index)
        item, wanted = truth.objects[0], prompt.objects[0]
        assert (wanted.shape, wanted.colour, wanted.direction) == (
            item.shape,
            item.colour,
            item.direction,
        )
        assert wanted.size in (None, item.size) and prompt.background == truth.background
        grounds = [
            name
            for name in data.BACKGROUNDS
            for w in data.SYNONYMS.get(name, (name,))
            if any(words in prompt.text for words in (f"on {w}", f"over {w}", f"a {w} background"))
        ]
        assert grounds == [truth.background] or (not grounds and truth.background == "black")
        assert item.colour in prompt.text and any(
            w in prompt.text for w in data.SYNONYMS[item.shape]
        )
        assert (wanted.size is None) == (
            not any(w in prompt.text.split() for s in SIZES for w in data.SYNONYMS[s])
        )
        silent += wanted.size is None and not grounds
        image = dataset.prompt(index, image=True)
        assert image.objects[0].direction is None and "mov" not in image.text
    assert 15 <= silent <= 60


def test_the_plainest_caption_is_among_the_wordings():
    texts = {
        data.caption(_clip("red", "circle", "right"), random.Random(seed)).text
        for seed in range(60)
    }
    assert "a red circle moving right" in texts and len(texts) > 15


def test_backwards_is_the_opposite_direction():
    dataset = MovingShapes(6, num_frames=4)
    truth = dataset.truth(1)
    back = truth.reversed()
    assert back.reversed() == truth
    assert torch.equal(render([back], 32)[0], render([truth], 32)[0].flip(0))
    assert dataset.prompt(1, backwards=True).objects[0].direction == back.objects[0].direction
    assert all(data.OPPOSITE[data.OPPOSITE[name]] == name for name in DIRECTIONS)
    assert data.OPPOSITE["still"] == "still" and data.OPPOSITE["up-left"] == "down-right"


def test_rendering_chosen_frames_and_mixed_object_counts():
    dataset = MovingShapes(7, two_object_share=0.5, num_frames=6)
    truths = [dataset.truth(index) for index in range(8)]
    assert {len(truth.objects) for truth in truths} == {1, 2}
    every = render(truths, 24)
    assert (
        every.shape == (8, 6, 3, 24, 24) and float(every.min()) >= 0.0 and float(every.max()) <= 1.0
    )
    assert torch.equal(render(truths, 24, frames=[4, 1]), every[:, [4, 1]])
    assert torch.allclose(torch.cat([render([truth], 24) for truth in truths]), every, atol=1e-6)


def test_vocabulary_covers_captions():
    words = set(data.vocabulary())
    for index in range(100):
        assert set(MovingShapes(99).prompt(index).text.replace(",", " ,").split()) <= words
    assert 40 <= len(words) <= 80


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="split"):
        MovingShapes(split="test")
    with pytest.raises(ValueError, match="num_frames"):
        MovingShapes(num_frames=0)
    with pytest.raises(ValueError, match="two_object_share"):
        MovingShapes(two_object_share=2.0)
    with pytest.raises(ValueError, match="shape must be"):
        data.signed_distance("star", torch.zeros(1), torch.zeros(1), 0.1)


def _clip(colour, shape, direction):
    dataset = MovingShapes(0, split="all")
    truth = dataset.truth(0)
    item = dataclasses.replace(truth.objects[0], colour=colour, shape=shape, direction=direction)
    return dataclasses.replace(truth, objects=(item,), background="black")
