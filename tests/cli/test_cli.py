"""The command line: what it writes, and one clear line for everything that can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_shift import LatentShiftPipeline
from latent_shift.cli import main
from latent_shift.cli.generate import SCHEDULERS
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--frames", "3", "--steps", "2"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LatentShiftPipeline.from_t2i(tiny.image_pipeline(), default_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "image"
    tiny.image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "latent_shift", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def fails(capsys, *arguments: object) -> tuple[int, str]:
    """Runs a command that has to fail; returns its exit status and its one line on stderr."""
    status = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert status != 0
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("latent-shift: ") and "Traceback" not in line
    return status, line


# generate


def test_generate_in_a_fresh_process(model, here):
    done = run("generate", "a red circle", "-m", model, "-o", "out/demo", "--seed", 4, *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.startswith("wrote")] == [
        f"wrote out/demo{suffix}" for suffix in (".gif", ".mp4", ".png")
    ]
    assert "1 clip of 3 frames, 16x16, 8 fps; 2 steps of DDIMScheduler" in done.stdout
    assert "seed 4" in done.stdout and "kernels on cpu: " in done.stdout
    assert ": cpu for" not in done.stdout  # a name for readers
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "demo.gif",
        "demo.mp4",
        "demo.png",
    ]
    words = json.loads(Image.open("out/demo.png").info["Comment"])
    assert (words["prompt"], words["seed"], words["model"]) == ("a red circle", 4, "tiny")


def test_the_embedded_model_works_without_network(here):
    done = run("generate", "a red circle moving right", "-o", "a.gif", *QUICK, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert Image.open("a.gif").n_frames == 3


def test_the_command_line_makes_what_the_pipeline_makes(model, here, capsys):
    arguments = ["generate", "a red circle", "-m", str(model), "--seed", "5", "-o", "f/"]
    assert main([*arguments, *QUICK, "--size", "16x24", "--guidance", "2", "--negative", "a"]) == 0
    pipe = LatentShiftPipeline.from_pretrained(model)
    call = {"num_frames": 3, "num_inference_steps": 2, "width": 16, "height": 24}
    (clip,) = pipe(
        "a red circle", negative_prompt="a", guidance_scale=2.0, seed=5, **call
    ).to_uint8()
    for index, frame in enumerate(clip):
        assert np.array_equal(np.asarray(Image.open(f"f/{index:05d}.png")), frame)


def test_prompt_file_several_videos_and_batches_number_the_clips(model, here, capsys):
    Path("prompts.txt").write_text("a red circle\na blue square\n\n")
    call = ["generate", "--prompts", "prompts.txt", "-m", str(model), "--num-videos", "2"]
    assert main([*call, "-o", "one.png", "--seed", "9", *QUICK]) == 0
    assert main([*call, "-o", "all.png", "--seed", "9", "--batch", "3", *QUICK]) == 0
    for index, prompt in enumerate(("a red circle",) * 2 + ("a blue square",) * 2):
        one, together = Image.open(f"one-0{index}.png"), Image.open(f"all-0{index}.png")
        words = json.loads(one.info["Comment"])
        assert (words["prompt"], words["seed"]) == (prompt, 9 + index)
        difference = np.asarray(one).astype(int) - np.asarray(together)
        assert np.abs(difference).max() <= 1
    assert "4 clips of 3 frames" in capsys.readouterr().out


def test_output_is_named_after_the_prompt_if_it_is_not_told(model, here, capsys):
    assert main(["generate", "A red, circle!", "-m", str(model), *QUICK]) == 0
    assert sorted(path.suffix for path in here.glob("a-red-circle.*")) == [".gif", ".mp4", ".png"]


def test_image_model_is_taken_with_a_note(image_model, here, capsys):
    assert main(["generate", "a", "-m", str(image_model), "-o", "a.gif", *QUICK]) == 0
    assert "never trained" in capsys.readouterr().err


def test_options_reach_the_pipeline(model, here, capsys):
    call = ["generate", "a red circle", "-m", str(model), "--seed", "1", *QUICK]
    assert main([*call, "-o", "a.png", "--scheduler", "Euler", "--boundary", "circular"]) == 0
    words = json.loads(Image.open("a.png").info["Comment"])
    assert words["scheduler"] == "EulerDiscreteScheduler"
    assert words["shift"]["boundary"] == "circular"
    assert main([*call, "-o", "b.gif", "--scale", "3", "--fps", "4"]) == 0
    image = Image.open("b.gif")
    assert image.size == (48, 48) and image.info["duration"] == 250


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_name_generates(name, model, here, capsys):
    call = ["generate", "a", "-m", str(model), "-o", "a.png", "--frames", "2", "--steps", "3"]
    assert main([*call, "--scheduler", name]) == 0


# mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scheduler", "eular"], "did you mean euler?"),
        (["--boundary", "wrap"], "zeros, replicate, circular"),
        (["--dtype", "f16"], "float16"),
        (["--frames", "0"], "--frames"),
        (["--steps", "0"], "--steps"),
        (["--num-videos", "0"], "--num-videos"),
        (["--scale", "0"], "--scale"),
        (["--seed", "x"], "--seed"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--size", "0x64"], "WIDTHxHEIGHT"),
        (["--size", "15x16"], "multiples of 2"),
        (["--fps", "0"], "--fps"),
        (["-o", "a.avi"], ".gif, .mp4, .webp, .png"),
        (["-o", "file/a.gif"], "not a folder"),
        (["-o", "folder.gif"], "is a folder"),
        (["-o", "/proc/self/a.gif"], "cannot write"),
        (["--prompts", "file"], "either a prompt or --prompts"),
        (["--device", "tpu"], "--device cpu"),
        (["--bogus"], "--bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_status_2(arguments, told, model, here, capsys):
    Path("file").write_text("a\n")
    Path("folder.gif").mkdir()
    status, line = fails(capsys, "generate", "a", "-m", model, *arguments)
    assert status == 2 and told in line
    assert sorted(path.name for path in here.iterdir()) == ["file", "folder.gif"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read"),
        (b"", "no prompt"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_wrong_prompt_files(content, told, model, here, capsys):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    status, line = fails(capsys, "generate", "--prompts", "prompts.txt", "-m", model)
    assert status == 2 and told in line


def test_no_prompt(here, capsys):
    assert fails(capsys, "generate")[0] == 2
    assert fails(capsys, "generate", "  ")[0] == 2


def damage(folder: Path, what: str) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if what == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "no header":
        weights.write_bytes(b"\0" * 5)
    elif what == "missing weights":
        weights.unlink()
    elif what == "broken config":
        (folder / "unet" / "config.json").write_text("{")
    elif what == "broken index":
        (folder / "model_index.json").write_text("{")
    elif what == "no index":
        (folder / "model_index.json").unlink()
    elif what == "missing tokenizer":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    elif what == "no unet":
        import shutil

        shutil.rmtree(folder / "unet")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("truncated weights", "damaged"),
        ("no header", "damaged"),
        ("missing weights", "safetensors"),
        ("broken config", "config"),
        ("broken index", "damaged"),
        ("no index", "model_index.json"),
        ("missing tokenizer", "tokenizer"),
        ("no unet", "unet"),
    ],
)
def test_damaged_models(what, told, model, here, capsys, tmp_path_factory):
    import shutil

    copy = shutil.copytree(model, tmp_path_factory.mktemp("damaged") / "tiny")
    damage(copy, what)
    status, line = fails(capsys, "generate", "a", "-m", copy, "-o", "a.gif")
    assert status == 1 and told in line and "tiny" in line
    assert not list(here.iterdir())


def test_models_that_are_not_there(here, capsys):
    assert "no model folder" in fails(capsys, "generate", "a", "-m", "./nowhere")[1]
    assert "cannot be reached" in fails(capsys, "generate", "a", "-m", "nobody/nothing")[1]


def test_failure_while_writing_leaves_no_file(model, here, capsys, monkeypatch):
    from latent_shift import video

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_gif", fail)
    status, line = fails(capsys, "generate", "a", "-m", model, "-o", "a.gif", *QUICK)
    assert status == 1 and "No space left on device" in line
    assert not list(here.iterdir())


def test_unexpected_errors_are_one_line_unless_asked_for(model, here, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr(LatentShiftPipeline, "__call__", fail)
    call = ["generate", "a", "-m", str(model), "-o", "a.gif"]
    status, line = fails(capsys, *call)
    assert status == 1 and "RuntimeError: something broke" in line
    monkeypatch.setenv("LATENT_SHIFT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="something"):
        main(call)


def test_interrupted(model, here, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LatentShiftPipeline, "__call__", interrupt)
    assert fails(capsys, "generate", "a", "-m", model, "-o", "a.gif")[0] == 130
    assert not list(here.iterdir())


# the other commands


def test_help_is_light():
    done = run("--help")
    assert done.returncode == 0
    for command in ("generate", "train", "evaluate", "data", "info"):
        assert command in done.stdout
    script = (
        "import sys; from latent_shift.cli import main; main(['generate', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'numpy', 'PIL')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_and_no_arguments(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("latent-shift 0.")
    assert main([]) == 0
    assert "Usage" in capsys.readouterr().out


def test_generated_clips_and_their_truth(here, capsys):
    assert main(["data", "shapes", "sample", "-o", "d/s", "--number", "2", "--frames", "4"]) == 0
    out = capsys.readouterr().out
    assert sorted(path.name for path in Path("d").iterdir()) == ["s-00.gif", "s-01.gif", "s.png"]
    assert Image.open("d/s.png").size[0] >= 4 * 64
    assert main(["data", "shapes", "truth", "1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["captions"][0] in out and len(content["truth"]["objects"]) == 1
    assert fails(capsys, "data", "shapes", "sample", "-o", "a.gif")[0] == 2
    assert fails(capsys, "data", "shapes", "truth", "--split", "test")[0] == 2


def test_evaluate_prints_and_stores_scores(model, here, capsys):
    call = ["evaluate", "-m", str(model), "--number", "2", *QUICK]
    assert main([*call, "-o", "scores.json"]) == 0
    stored = json.loads(Path("scores.json").read_text())
    assert stored["number"] == 2 and stored["num_frames"] == 3
    printed = capsys.readouterr().out
    assert all(name in printed for name in stored["scores"])
    assert str(model) not in json.dumps(stored)
    assert fails(capsys, *call, "-o", "scores.txt")[0] == 2


def test_train_passes_its_arguments_on(here, capsys, monkeypatch):
    import latent_shift.training as training

    calls = []

    def train(recipe, **call):
        calls.append((recipe, call))
        return False

    monkeypatch.setattr(training, "train", train)
    arguments = ["train", "embedded", "video.steps=7", "--max-seconds", "5", "-o", "run"]
    assert main([*arguments, "--stage", "video"]) == 3
    ((recipe, call),) = calls
    assert recipe.video.steps == 7
    assert call == {"output_dir": Path("run"), "stages": ["video"], "max_seconds": 5.0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing.toml"],
        ["embedded", "steps"],
        ["embedded", "video.speed=3"],
        ["embedded", "-o", "f"],
    ],
)
def test_wrong_recipes(arguments, here, capsys):
    Path("f").touch()
    assert fails(capsys, "train", *arguments)[0] == 2


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "latent_shift " in out and "shift_add" in out
