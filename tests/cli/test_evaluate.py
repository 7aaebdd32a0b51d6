"""``latent-shift evaluate``: scores chosen by name, and one clear line for what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchmetrics")

from latent_shift import LatentShiftPipeline
from latent_shift.cli import main
from latent_shift.video import write_clip
from tests.cli.test_cli import fails, here  # noqa: F401 - a fixture
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--frames", "4", "--steps", "1", "--number", "3", "--batch", "2", "--resamples", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LatentShiftPipeline.from_t2i(tiny.image_pipeline(), default_steps=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clips(here) -> Path:  # noqa: F811
    """Three clips of four frames of 16 x 16 noise with captions."""
    noise = np.random.default_rng(0)
    folder = here / "clips"
    for index in range(3):
        frames = noise.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
        write_clip(frames, folder / f"{index}")
        (folder / f"{index}.txt").write_text(f"a red circle {index}")
    return folder


def test_scores_by_name_with_protocols(model, here, capsys):  # noqa: F811
    call = ["evaluate", "-m", model, "--metric", "shapes,fvd[shapes],clipsim[shapes]", *QUICK]
    assert main([*call, "--force", "--cache", "features", "-o", "out/scores.json"]) == 0
    printed = capsys.readouterr().out
    assert "95% interval" in printed and "wrote out/scores.json" in printed
    assert "fvd[shapes]: fewer than 256 clips, compare with nothing" in printed
    stored = json.loads(Path("out/scores.json").read_text())
    assert (stored["model"], stored["number"], stored["split"]) == ("tiny", 3, "held_out")
    assert {"colour", "everything", "fvd[shapes]", "clipsim[shapes]"} <= set(stored["scores"])
    details = stored["details"]["fvd[shapes]"]
    assert details["value"] == stored["scores"]["fvd[shapes]"]
    low, high = details["interval"]
    assert low < details["value"] < high
    protocol = details["protocol"]
    assert protocol["count"] == {"generated": 3, "real": 3}
    assert (protocol["num_frames"], protocol["real"]["height"]) == (4, 16)
    assert protocol["generated"]["num_inference_steps"] == 1
    assert len(protocol["weights_sha256"]) == 64
    assert str(here) not in json.dumps(stored)
    # the same again, from the cache
    assert main([*call, "--force", "--cache", "features", "-o", "again.json"]) == 0
    assert json.loads(Path("again.json").read_text())["details"] == stored["details"]
    capsys.readouterr()
    # another size of the real set
    status, line = fails(capsys, *call, "--force", "--cache", "features", "--size", "24x16")
    assert status == 1 and "set.width 16, wanted 24" in line


def test_stored_clips_against_stored_clips(clips, capsys):
    call = ["evaluate", "--generated", "clips", "--real", "clips", "--frames", "4"]
    call += ["--metric", "fvd[shapes],clipsim[shapes]", "--size", "16x16", "--force"]
    assert main([*call, "-o", "s.json", "--resamples", "0"]) == 0
    stored = json.loads(Path("s.json").read_text())
    assert stored["scores"]["fvd[shapes]"] == pytest.approx(0.0, abs=1e-3)
    assert stored["details"]["fvd[shapes]"]["interval"] is None
    assert stored["generated"] == "folder" and "model" not in stored


def test_captions_of_the_real_set_or_of_a_file_are_what_the_model_is_asked(
    clips, model, capsys, monkeypatch
):
    asked = []
    call = LatentShiftPipeline.__call__

    def watched(self, prompt, **options):
        asked.extend(prompt)
        return call(self, prompt, **options)

    monkeypatch.setattr(LatentShiftPipeline, "__call__", watched)
    arguments = ["evaluate", "-m", model, "--metric", "clipsim[shapes]", *QUICK, "--real", "clips"]
    assert main(arguments) == 0
    assert sorted(asked) == ["a red circle 0", "a red circle 1", "a red circle 2"]
    Path("p.txt").write_text("a blue square\n")
    assert main([*arguments, "--prompts", "p.txt"]) == 0
    assert asked[3:] == ["a blue square"]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--metric", "fvd[shape]"], 2, "did you mean fvd[shapes]"),
        (["--metric", "fvd"], 1, "i3d_torchscript.pt (sha256 bec6519f66ea"),
        (["--metric", "clipsim", "--weights", "none"], 2, "there is no folder 'none'"),
        (["--metric", "fid", "--weights", "."], 1, "weights-inception-2015-12-05-6726825d.pth"),
        (["--metric", "fvd[shapes]", "--number", "7"], 1, "at least 256 generated clips"),
        (["--metric", "fvd[shapes]", "--real", "nothing"], 2, "there is no data set 'nothing'"),
        (["--generated", "nothing"], 2, "there is no data set 'nothing'"),
        (["--generated", "moving-shapes:clips=3"], 1, "not stored clips"),
        (["--generated", "moving-shapes:clips=x"], 2, "not a setting of moving shapes"),
        (["--generated", "moving-shapes", "--prompts", "p.txt"], 2, "--prompts is for a model"),
        (["--metric", "fvd[shapes]", "--frames", "2", "--force"], 1, "at least 4 frames"),
        (["--size", "big"], 2, "WIDTHxHEIGHT"),
        (["--device", "moon"], 2, "--device cpu"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments,
    status,
    told,
    model,
    here,  # noqa: F811
    capsys,
    monkeypatch,
):
    monkeypatch.delenv("LATENT_SHIFT_WEIGHTS", raising=False)
    Path("p.txt").write_text("a\n")
    monkeypatch.setattr(
        LatentShiftPipeline, "__call__", lambda *_, **__: pytest.fail("generated in vain")
    )
    found, line = fails(capsys, "evaluate", "-m", model, *arguments)
    assert (found, told in line) == (status, True), line
