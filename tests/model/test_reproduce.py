"""The reproduction: every arm from one image model, resumed, measured and reported."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from latent_shift.temporal import LatentVDMUNet
from latent_shift.training import reproduce
from latent_shift.training.export import load_run

from .test_training import TINY

ARMS = tuple(arm for arm in reproduce.ARMS if arm.name in ("shift", "none", "vdm", "eighths"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY.replace("[video]\nsteps = 6", "[video]\nsteps = 11"))
    return path


@pytest.fixture(scope="module")
def root(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    assert not reproduce.reproduce(recipe, output_dir=root, max_seconds=0.0)
    assert reproduce.reproduce(recipe, output_dir=root, arms=ARMS, seeds=(0, 1))
    return root


def test_every_arm_is_its_own(root, recipe):
    unets = {
        (arm.name, seed): load_run(
            root, f"video-{arm.name}-{seed}", reproduce.recipe_of(arm, seed, recipe)
        ).unet
        for arm in ARMS
        for seed in (0, 1)
    }
    assert isinstance(unets["vdm", 0], LatentVDMUNet)
    assert unets["eighths", 0].shift_config.fold_div == 8
    assert unets["none", 1].shift_config.preset == "none"
    weights = [torch.cat([p.flatten() for p in unet.parameters()]) for unet in unets.values()]
    plain = [w for w, name in zip(weights, unets, strict=True) if name[0] != "vdm"]
    for index, one in enumerate(plain):
        for other in plain[index + 1 :]:
            assert not torch.equal(one, other)


def test_the_report_holds_what_ran_and_names_what_did_not(root, recipe, tmp_path):
    report = tmp_path / "report"
    call = ["--output", str(root), "--recipe", str(recipe), "--report", str(report)]
    assert reproduce.main(call) == 0
    text = report.with_suffix(".md").read_text()
    found = reproduce.results(root)
    image = found.pop("image")
    assert set(found) == {arm.name for arm in ARMS} and 0.0 <= image[0]["image/colour"] <= 1.0
    assert all(len(rows) == 2 for rows in found.values())
    kept = {name: rows[0]["megabytes_for_backward"] for name, rows in found.items()}
    assert kept["vdm"] > kept["shift"] >= kept["none"] > 0
    for row in (row for rows in found.values() for row in rows):
        assert row["seconds_per_step"] > 0 and row["seconds_per_clip"] > 0
        assert 0.0 <= row["image/colour"] <= 1.0
    assert found["vdm"][0]["million_parameters"] > found["shift"][0]["million_parameters"]
    assert found["shift"][0]["million_parameters"] == found["none"][0]["million_parameters"]
    rows = [line for line in text.splitlines() if line.startswith("| quarters")]
    assert len(rows) == 4 and all("not run" in row for row in rows)
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    sheet = Image.open(tmp_path / "report-clips.png")
    assert sheet.height > 3 * len(ARMS) * 64  # frames of 32 pixels, twice as large


def test_the_report_of_nothing_says_so(recipe, tmp_path):
    call = ["--output", str(tmp_path / "none"), "--recipe", str(recipe)]
    assert reproduce.main([*call, "--report", str(tmp_path / "report")]) == 0
    assert "not run" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report-clips.png").exists()


def test_an_interval_is_students():
    assert reproduce.interval([0.5]) == reproduce.interval([0.5, float("nan")]) == "0.5"
    assert reproduce.interval([]) == "–"
    # mean 2, standard deviation 1, t(2) = 4.303: 4.303 / sqrt(3)
    assert reproduce.interval([1.0, 2.0, 3.0]) == "2 ± 2.5"


def test_a_second_run_does_nothing(root, recipe):
    files = root / "scores.json", root / "costs.json"
    before = [path.read_text() for path in files]
    assert reproduce.reproduce(recipe, output_dir=root, arms=ARMS, seeds=(0, 1))
    assert [path.read_text() for path in files] == before


def test_measuring_leaves_the_weights_alone(root, recipe):
    settings = reproduce.recipe_of(ARMS[0], 0, recipe)
    pipe = load_run(root, "video-shift-0", settings)
    before = [parameter.clone() for parameter in pipe.unet.parameters()]
    step = reproduce.training_step(pipe, settings)
    step()
    step()
    assert all(map(torch.equal, before, pipe.unet.parameters()))
