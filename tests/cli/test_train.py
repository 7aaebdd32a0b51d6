"""``latent-shift train`` of a finetuning recipe: what it prints, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_shift import training
from latent_shift.cli import main
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny.save_image_pipeline(folder / "sd")
    path = folder / "mine.toml"
    path.write_text(
        f"""
        kind = "finetune"
        trackers = []
        model = {{ source = "{folder / "sd"}" }}
        data = {{ clips = "moving-shapes:clips=2", num_frames = 2, height = 16, width = 16 }}
        train = {{ steps = 2 }}
        optimizer = {{ warmup = 0 }}
        checkpoints = {{ every = 1 }}
        validation = {{ every = 0, steps = 1, clips = 1 }}
        """
    )
    return path


def fails(capsys, *arguments: object) -> tuple[int, str]:
    """Runs a command that has to fail; returns its exit status and the last line on stderr."""
    status = main([str(argument) for argument in arguments])
    told = capsys.readouterr().err
    assert status != 0 and "Traceback" not in told
    line = told.splitlines()[-1]
    assert line.startswith("latent-shift: ")
    return status, line


def test_train_resumes_and_says_how_a_damaged_checkpoint_is_left_out(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(recipe), "-o", str(run)]) == 0
    assert (run / "model" / "model_index.json").is_file()
    # longer than before: it goes on from the last checkpoint, which is damaged
    (run / "finetune" / "checkpoints" / "step-00000002" / "state.json").unlink()
    longer = ["train", recipe, "train.steps=3", "-o", run]
    status, line = fails(capsys, *longer)
    assert status == 1 and "--resume-from previous to go on from step-00000001" in line
    assert main([*map(str, longer), "--resume-from", "previous"]) == 0


def test_dry_run_prints_its_findings(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for word in ("trained", "gradients", "peak", "step", "backward", "optimizer"):
        assert word in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train.step=3"], 2, "did you mean train.steps"),
        (["data.images=p"], 2, "set data.image_every"),
        (["--resume-from", "first"], 2, "--resume-from"),
        (["--stage", "video"], 2, "no stages"),
        (["model.source=./nothing"], 1, "no model folder"),
        (["data.clips=./nothing"], 1, "there is no data set"),
        (["train.what=parts", "train.patterns=['x']"], 1, "matches no parameter"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(recipe, tmp_path, capsys, arguments, status, message):
    found, line = fails(capsys, "train", recipe, *arguments, "-o", tmp_path / "run")
    assert found == status and message in line


def test_only_finetuning_can_be_tried(capsys):
    assert "--dry-run" in fails(capsys, "train", "embedded", "--dry-run")[1]


def test_a_stopped_run_has_its_own_exit_status(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *arguments, **named: False)
    assert main(["train", str(recipe), "-o", str(tmp_path / "run")]) == 3
