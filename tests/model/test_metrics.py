"""Scores on data with known answers, and how they are gathered, cached, refused and told."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("torchmetrics")

from latent_shift.data.base import ClipError, ClipFormat, ClipSource
from latent_shift.data.moving_shapes import MovingShapes
from latent_shift.evaluation import measure as measuring
from latent_shift.evaluation import networks as networks_module
from latent_shift.evaluation import scores, shape_networks
from latent_shift.evaluation.measure import METRICS, measure, parse_metrics
from latent_shift.evaluation.networks import NETWORKS, EvaluationError, locate
from latent_shift.evaluation.sets import ClipSet, Drawn, GeneratedClips, StoredClips
from tests.model import tiny

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = Path(measuring.__file__).parents[1] / "assets" / "metrics"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_folder_of_networks(monkeypatch):
    monkeypatch.delenv(networks_module.VARIABLE, raising=False)


def shapes(number: int, seed: int = 1, frames: int = 16) -> StoredClips:
    from latent_shift.data.sources import open_source

    source = open_source(f"moving-shapes:seed={seed},clips={number},split=all,frames={frames}")
    return StoredClips(source, ClipFormat(frames, 64, 64), seed=seed)


class Given(ClipSet):
    """Clips as they are."""

    def __init__(self, clips: torch.Tensor, captions: list[str] | None = None) -> None:
        self.clips, self.captions = clips, captions or [""] * len(clips)
        self.count, self.num_frames = clips.shape[:2]

    def draw(self, indices: range, captions: bool) -> Drawn:
        rows = list(indices)
        return Drawn(rows, self.clips[rows], [self.captions[row] for row in rows])

    def protocol(self) -> dict:
        return {"clips": hashlib.sha256(self.clips.numpy().tobytes()).hexdigest()}


def pixels(clips: StoredClips) -> torch.Tensor:
    return torch.cat([drawn.clips for drawn in clips.batches(16)])


# the mathematics


def whitened(number: int, width: int, seed: int) -> torch.Tensor:
    """(number, width) with mean 0 and covariance 1, to rounding."""
    noise = torch.randn(number, width, generator=torch.Generator().manual_seed(seed)).double()
    noise = noise - noise.mean(0)
    return noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T.cov())).T


def test_frechet_distance_of_independent_gaussians():
    x, y = whitened(60, 5, 0), whitened(80, 5, 1)
    mean, scale = torch.arange(5.0).double(), torch.tensor([0.5, 1, 2, 3, 0.1], dtype=torch.float64)
    expected = mean.square().sum() + (1 - scale).square().sum()
    found = scores.frechet_distance(x[:, None], (y * scale + mean)[:, None])
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_gaussians_that_are_turned_against_each_other():
    x, y = whitened(50, 2, 0), whitened(50, 2, 1)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    first, second = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, 0.5]).double()
    product = first.square().diag() @ (turn @ second.square().diag() @ turn.T)
    # of a 2 x 2 matrix, tr(M^1/2)^2 = tr M + 2 (det M)^1/2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = first.square().sum() + second.square().sum() - 2 * root
    found = scores.frechet_distance((x * first)[:, None], (y * second @ turn.T)[:, None])
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert float(product[0, 1].abs()) > 0.1  # they do not commute


def test_frames_of_a_clip_count_as_samples():
    x = whitened(60, 3, 0)
    found = scores.frechet_distance(x.view(20, 3, 3), 2 * x[:, None])
    assert found == pytest.approx(3.0, rel=1e-9)


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    same, apart = [], []
    for _ in range(400):
        signs = torch.randint(2, (2, 6, 1, 1), generator=generator).double() * 2 - 1
        same.append(scores.kernel_distance(signs[0], signs[1]))
        apart.append(scores.kernel_distance(signs[0], torch.zeros(6, 1, 1)))
    same, apart = torch.tensor(same), torch.tensor(apart)
    assert abs(float(same.mean())) < 4 * float(same.std()) / 20
    assert float(same.min()) < 0
    # +1 and -1 alike against 0: E k(x, x') = (2^3 + 0) / 2, k(y, y') = k(x, y) = 1
    assert float(apart.mean()) == pytest.approx(4 + 1 - 2, abs=4 * float(apart.std()) / 20)


def test_kernel_distance_of_many_clips_is_the_mean_over_blocks(monkeypatch):
    x, y = torch.randn(9, 1, 3), torch.randn(8, 1, 3)
    whole = [scores.kernel_distance(x[:4], y[:4]), scores.kernel_distance(x[4:8], y[4:8])]
    monkeypatch.setattr(scores, "BLOCK", 4)
    assert scores.kernel_distance(x, y) == pytest.approx(sum(whole) / 2)


def test_inception_score_is_the_number_of_classes_for_sure_and_balanced_predictions():
    sure = 60.0 * torch.eye(7).repeat(3, 1)[:, None]
    assert scores.inception_score(sure, splits=1) == pytest.approx(7.0, rel=1e-6)
    assert scores.inception_score(torch.zeros(20, 1, 7)) == pytest.approx(1.0, rel=1e-6)
    # half of the clips sure of one of two classes, half undecided: exp of log 2 / 2
    half = torch.tensor([[60.0, 0.0], [0.0, 60.0], [0.0, 0.0], [0.0, 0.0]])[:, None]
    assert scores.inception_score(half, splits=1) == pytest.approx(math.sqrt(2.0), rel=1e-6)


def test_similarity():
    texts = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    clips = torch.stack((texts, 5 * texts), dim=1)
    assert scores.similarity(clips, texts).tolist() == pytest.approx([1.0] * 3)
    assert scores.similarity(-clips, texts).tolist() == pytest.approx([-1.0] * 3)
    half = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert scores.similarity(half, texts[:1]).tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("score", "draw"),
    [
        (measuring._mean, lambda generator: [torch.rand(40, generator=generator) ** 2]),
        (
            scores.frechet_distance,
            lambda generator: [
                torch.randn(30, 1, 2, generator=generator),
                torch.randn(30, 1, 2, generator=generator) * 2 + 1,
            ],
        ),
    ],
    ids=["mean", "frechet"],
)
def test_interval_covers_the_mean_over_sets_of_that_size(score, draw):
    generator = torch.Generator().manual_seed(0)
    truth = sum(score(*draw(generator)) for _ in range(80)) / 80
    covered, mean = 0, score is measuring._mean
    call = {"resamples": 100 if mean else 20, "percentile": mean}
    for seed in range(20):
        low, high = scores.interval(score, *draw(generator), seed=seed, **call)
        covered += low <= truth <= high
    assert covered >= 15  # 19 expected; fewer than 15 come up once in 3000 times
    assert scores.interval(score, *draw(generator), resamples=0) is None


# the way from clips to scores


def test_streaming_is_all_at_once():
    real, made = pixels(shapes(10)), pixels(shapes(12, seed=2))
    alive: list[weakref.ref] = []
    most = 0

    class Watched(Given):
        def draw(self, indices: range, captions: bool) -> Drawn:
            nonlocal most
            drawn = super().draw(indices, captions)
            alive.append(weakref.ref(drawn.clips))
            most = max(most, sum(clip() is not None for clip in alive))
            return drawn

    call = {"force": True, "resamples": 0}
    whole = measure("fvd[shapes]", Given(made), Given(real), batch=12, **call)
    streamed = measure("fvd[shapes]", Watched(made), Watched(real), batch=2, **call)
    assert len(alive) == 11
    assert most <= 2  # the batch at work and the one before it
    expected = whole["fvd[shapes]"].value
    assert streamed["fvd[shapes]"].value == pytest.approx(expected, rel=1e-3)
    assert whole["fvd[shapes]"].protocol["count"] == {"generated": 12, "real": 10}


_SEVEN = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from latent_shift.data.base import ClipFormat
from latent_shift.data.sources import open_source
from latent_shift.evaluation.measure import measure
from latent_shift.evaluation.sets import StoredClips
made, real = (
    StoredClips(open_source(f"moving-shapes:seed={n},clips={n},frames=4"), ClipFormat(4, 64, 64))
    for n in (7, 5)
)
options = {"cache": sys.argv[1], "force": True, "batch": 2, "resamples": 5}
found = measure("fvd[shapes]", made, real, **options)
if found:
    print(json.dumps({name: score.as_json() for name, score in found.items()}))
"""


def test_two_processes_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(folder: str, rank: int = 0, world: int = 1) -> subprocess.Popen:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if world > 1:  # what torchrun sets
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        return subprocess.Popen(
            [sys.executable, "-c", _SEVEN, str(tmp_path / folder)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    ranks = [start("shared", rank, 2) for rank in range(2)]
    told = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert told[1] == ""
    alone = start("alone").communicate()[0]
    assert json.loads(told[0]) == json.loads(alone)
    # what two processes stored is what one stores
    stored = [(tmp_path / name / "shapes-classifier.safetensors") for name in ("shared", "alone")]
    features = [load_file(path)["features"] for path in stored]
    assert torch.equal(*features) and features[0].shape == (5, 1, shape_networks.WIDTH)


def test_real_features_are_cached_with_their_protocol(tmp_path, monkeypatch):
    call = {"cache": tmp_path, "force": True, "resamples": 0}
    made = shapes(6, seed=3, frames=4)
    first = measure("fvd[shapes]", made, shapes(5, frames=4), **call)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(StoredClips, "draw", _draw_only(made))
    assert measure("fvd[shapes]", made, shapes(5, frames=4), **call) == first
    with pytest.raises(EvaluationError, match=r"another protocol \(set.count 5, wanted 4"):
        measure("fvd[shapes]", made, shapes(4, frames=4), **call)
    with pytest.raises(EvaluationError, match=r"set.num_frames 4, wanted 8"):
        measure("fvd[shapes]", made, shapes(5, frames=8), **call)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one number
    with pytest.raises(EvaluationError, match="damaged, delete it: its hash"):
        measure("fvd[shapes]", made, shapes(5, frames=4), **call)
    path.write_bytes(whole)
    monkeypatch.setattr(measuring, "version", lambda library: "0")
    with pytest.raises(EvaluationError, match=r"versions.torch \S+, wanted 0"):
        measure("fvd[shapes]", made, shapes(5, frames=4), **call)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(EvaluationError, match="damaged, delete it"):
        measure("fvd[shapes]", made, shapes(5, frames=4), **call)


def _draw_only(allowed: StoredClips):
    draw = StoredClips.draw

    def only(self: StoredClips, indices: range, captions: bool) -> Drawn:
        assert self is allowed, "the real set is read again"
        return draw(self, indices, captions)

    return only


def test_fvd_shapes_puts_clips_in_order():
    real, again = pixels(shapes(80)), pixels(shapes(80, seed=2))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    noise = torch.randint(
        256, real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    call = {"force": True, "resamples": 0, "batch": 32}

    def distance(clips: torch.Tensor) -> float:
        return measure("fvd[shapes]", Given(clips), Given(real), **call)["fvd[shapes]"].value

    near, shuffled, far = distance(again), distance(again[:, order]), distance(noise)
    assert 1.3 * near < shuffled
    assert 1.3 * shuffled < far


def test_clipsim_shapes_tells_captions_apart():
    data = MovingShapes(5, split="all")
    clips = [data.sample(index) for index in range(32)]
    frames = torch.stack([clip.frames for clip in clips])
    texts = [clip.prompt.text for clip in clips]
    call = {"resamples": 100, "batch": 32}
    own = measure("clipsim[shapes]", Given(frames, texts), **call)["clipsim[shapes]"]
    other = measure("clipsim[shapes]", Given(frames, texts[1:] + texts[:1]), **call)
    low, high = own.interval
    assert other["clipsim[shapes]"].interval[1] < low <= own.value <= high <= 1.0


def test_readings_are_those_of_the_scorer_with_intervals():
    from latent_shift.evaluation import moving_shapes as scorer

    data = MovingShapes(7, num_frames=6, split="all")
    clips = [data.sample(index) for index in range(6)]
    clips[0].frames[2:] = 0.5  # one that changes its colour and loses its object
    frames = torch.stack([clip.frames for clip in clips])

    def perfect(texts, *, num_frames, generator, output_type):
        rows = [prompts.index(text) for text in texts]
        return frames[rows]

    prompts = [clip.prompt.text for clip in clips]
    made = GeneratedClips(perfect, [clip.prompt for clip in clips], 6)
    found = measure("shapes", made, batch=4, resamples=50)
    expected = scorer.score_prompts(list(frames), [clip.prompt for clip in clips])
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected)
    assert found["everything"].interval[0] < found["everything"].value < 1.0


def test_clips_that_cannot_be_read_are_left_out_and_counted(tmp_path, caplog):
    from latent_shift.data.sources import open_source
    from latent_shift.video import write_clip

    data = MovingShapes(0, num_frames=5)
    for index in range(3):
        frames = (data.sample(index).frames.permute(0, 2, 3, 1) * 255).byte().numpy()
        write_clip(frames[: 5 - 2 * (index == 2)], tmp_path / f"{index}")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    stored = StoredClips(open_source(tmp_path), ClipFormat(5, 32, 32))
    found = measure("fvd[shapes]", stored, shapes(3, frames=5), force=True, resamples=0)
    # they have no captions, which the Fréchet distance does not ask for
    assert found["fvd[shapes]"].protocol["count"]["generated"] == 2
    assert sum(stored.skipped.values()) == 2 and "broken.mp4" in caplog.text
    with pytest.raises(EvaluationError, match="none of the generated clips can be used"):
        measure("clipsim[shapes]", StoredClips(open_source(tmp_path), ClipFormat(5, 32, 32)))


# networks that users bring


@pytest.fixture
def i3d(tmp_path, monkeypatch) -> Path:
    """A stand-in with I3D's signature: the mean colour, ten times where it is to rescale."""

    class Fake(torch.nn.Module):
        def forward(self, x, rescale: bool, resize: bool, return_features: bool):
            mean = x.float().mean((2, 3, 4)) / 255.0
            mean = torch.cat((mean, x[:, :, 0].float().std((2, 3)) / 255.0), 1)
            return 10.0 * mean if rescale and resize and return_features else mean

    path = tmp_path / "weights" / "i3d_torchscript.pt"
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is no longer developed
        torch.jit.script(Fake()).save(str(path))
    fake = replace(NETWORKS["i3d"], files={path.name: networks_module.sha256(path)}, min_frames=4)
    monkeypatch.setitem(NETWORKS, "i3d", fake)
    return path


def test_fvd_and_kvd_ask_the_network_for_features(i3d):
    made, real = pixels(shapes(8, frames=4)), pixels(shapes(9, seed=2, frames=4))
    call = {"force": True, "resamples": 10, "weights": i3d.parent}
    found = measure(["fvd", "kvd"], Given(made), Given(real), **call)

    def features(clips: torch.Tensor) -> torch.Tensor:
        clips = clips.float() / 255.0
        return 10.0 * torch.cat((clips.mean((1, 3, 4)), clips[:, 0].std((2, 3))), 1)[:, None]

    expected = scores.frechet_distance(features(real), features(made))
    assert found["fvd"].value == pytest.approx(expected, rel=1e-3)
    protocol = found["fvd"].protocol
    assert protocol["weights_sha256"] == networks_module.sha256(i3d)
    assert protocol["count"] == {"generated": 8, "real": 9} and protocol["num_frames"] == 4
    assert protocol["forced"] == "fewer than 2048 clips"
    assert {"torch", "torchmetrics", "scipy", "latent_shift"} <= set(protocol["versions"])
    assert protocol["bootstrap"]["draws"] == 10
    assert found["kvd"].interval[0] < found["kvd"].value < found["kvd"].interval[1]


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("weights")
    words = tiny.tokenizer()
    common = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {
        **common, "num_hidden_layers": 1, "vocab_size": len(words), "eos_token_id": len(words) - 1,
        "max_position_embeddings": tiny.MAX_LENGTH,
    }  # fmt: skip
    vision = {**common, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    path = folder / "clip-vit-base-patch32"
    model.save_pretrained(path)
    words.save_pretrained(path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)
    return folder


def test_clipsim_is_the_mean_cosine_over_frames(clip_weights):
    from transformers import CLIPModel

    clips = pixels(shapes(3, frames=4))
    texts = ["a red circle", "the blue square on", "green"]
    found = measure("clipsim", Given(clips, texts), weights=clip_weights, batch=2)["clipsim"]
    folder = clip_weights / "clip-vit-base-patch32"
    model, words = CLIPModel.from_pretrained(folder), tiny.tokenizer()
    images = torch.nn.functional.interpolate(
        clips.flatten(0, 1).float(), (32, 32), mode="bicubic", antialias=True, align_corners=False
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=(images / 255 - mean) / std).pooler_output
        read = model.get_text_features(**tokens).pooler_output
    expected = torch.cosine_similarity(seen.view(3, 4, -1), read[:, None], dim=-1).mean()
    # Pillow rounds to whole levels between its two passes
    assert found.value == pytest.approx(float(expected), abs=2e-3)
    assert found.interval[0] < found.value < found.interval[1]


def test_fid_on_clip_features_takes_every_frame(clip_weights):
    real, made = Given(pixels(shapes(5, frames=4))), Given(pixels(shapes(5, seed=2, frames=4)))
    call = {"weights": clip_weights, "force": True, "resamples": 0}
    assert measure("fid[clip]", real, real, **call)["fid[clip]"].value == pytest.approx(0, abs=1e-6)
    assert measure("fid[clip]", made, real, **call)["fid[clip]"].value > 1e-3


def test_incomplete_clip_folder(clip_weights, tmp_path):
    folder = tmp_path / "clip-vit-base-patch32"
    folder.mkdir()
    source = clip_weights / folder.name
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    with pytest.raises(EvaluationError, match="no complete CLIP folder.*preprocessor_config.json"):
        measure("clipsim", Given(torch.zeros(1, 1, 3, 8, 8), ["a"]), weights=tmp_path)


def test_is_runs_on_torch_fidelitys_inception(tmp_path, monkeypatch):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter of a torchvision for another torch
        # not in the test environment, as pyproject.toml says
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    path = tmp_path / next(iter(NETWORKS["inception"].files))
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        blank = FeatureExtractorInceptionV3("a", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(blank.state_dict(), path)
    for name in ("inception", "inception-logits"):
        files = {path.name: networks_module.sha256(path)}
        monkeypatch.setitem(NETWORKS, name, replace(NETWORKS[name], files=files))
    clips = Given(pixels(shapes(2, frames=1)))
    found = measure(["is"], clips, weights=tmp_path, force=True, resamples=0)
    assert found["is"].value >= 1.0


# refusals


@pytest.mark.parametrize("name", ["i3d", "inception", "clip", "c3d-ucf101"])
def test_missing_weights_say_what_to_put_where(name, tmp_path, monkeypatch):
    network = NETWORKS[name]
    with pytest.raises(EvaluationError) as told:
        locate(network, tmp_path)
    for file, digest in network.files.items():
        assert file in str(told.value) and (digest or "not published") in str(told.value)
    assert str(tmp_path) in str(told.value) and "https://" in str(told.value)
    with pytest.raises(EvaluationError, match=r"--weights DIR or LATENT_SHIFT_WEIGHTS"):
        locate(network)
    monkeypatch.setenv("LATENT_SHIFT_WEIGHTS", str(tmp_path / "elsewhere"))
    with pytest.raises(EvaluationError, match="elsewhere"):
        locate(network)


def test_wrong_weights_are_refused(tmp_path):
    path = tmp_path / "i3d_torchscript.pt"
    path.write_bytes(b"not this one")
    with pytest.raises(EvaluationError, match=r"its sha256 is [0-9a-f]{64}, expected bec6519f"):
        locate(NETWORKS["i3d"], tmp_path)
    # no hash of this one is published: the file counts, and fails where it is none
    (tmp_path / "c3d_ucf101.pt").write_bytes(b"not this one")
    located = locate(NETWORKS["c3d-ucf101"], tmp_path)
    assert located.sha256 == hashlib.sha256(b"not this one").hexdigest()
    with pytest.raises(EvaluationError, match="no TorchScript file"):
        located.network.load(located.path, torch.device("cpu"))


def test_damaged_shape_networks_are_refused(tmp_path):
    clips = Given(torch.zeros(2, 4, 3, 8, 8))
    call = {"weights": tmp_path, "force": True}
    path = tmp_path / "classifier.safetensors"
    path.write_bytes((SHIPPED / path.name).read_bytes()[:-100])
    with pytest.raises(EvaluationError, match="damaged"):
        measure("fvd[shapes]", clips, clips, **call)
    path.write_bytes((SHIPPED / "two_tower.safetensors").read_bytes())
    with pytest.raises(EvaluationError, match="holds a ShapeTwoTower, not a ShapeClassifier"):
        measure("fvd[shapes]", clips, clips, **call)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(EvaluationError, match="damaged"):
        measure("fvd[shapes]", clips, clips, **call)


def test_too_few_clips_are_refused_unless_forced(i3d):
    few = Given(torch.zeros(3, 16, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(EvaluationError, match="at least 2048 generated clips, there are 3"):
        measure("fvd", few, few, weights=i3d.parent)
    with pytest.raises(EvaluationError, match="at least 256 generated clips"):
        measure("fvd[shapes]", few, few)
    with pytest.raises(EvaluationError, match="with one generated clip, whatever is forced"):
        measure("fvd[shapes]", Given(few.clips[:1]), few, force=True)
    many = Given(torch.zeros(256, 4, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(EvaluationError, match="at least 256 real clips, there are 3"):
        measure("fvd[shapes]", many, few)


def test_what_cannot_be_measured_is_said_before_anything_is_drawn():
    class Never(Given):
        def draw(self, indices: range, captions: bool) -> Drawn:
            raise AssertionError("drawn in vain")

    short = Never(torch.zeros(2, 2, 3, 8, 8))
    with pytest.raises(EvaluationError, match="at least 4 frames, the generated ones have 2"):
        measure("clipsim[shapes]", short)
    with pytest.raises(EvaluationError, match=r"fvd\[shapes\] compares with real clips"):
        measure("fvd[shapes]", Never(torch.zeros(2, 4, 3, 8, 8)), force=True)
    with pytest.raises(EvaluationError, match="not stored clips"):
        measure("shapes", short)


def test_unknown_metrics_are_told_the_nearest():
    with pytest.raises(EvaluationError, match="did you mean fvd"):
        parse_metrics("fvdd")
    with pytest.raises(EvaluationError, match="no metric is named"):
        parse_metrics(" , ")
    assert parse_metrics("fvd,FVD[shapes], fvd") == [METRICS["fvd"], METRICS["fvd[shapes]"]]


def test_an_unusable_library_is_named(monkeypatch):
    missing = networks_module.library_advice("x", ModuleNotFoundError("no", name="torchmetrics"))
    assert "pip install 'latent-shift-video[eval]'" in missing
    broken = RuntimeError("operator torchvision::nms does not exist")
    assert "torchvision built for this torch" in networks_module.library_advice("x", broken)


# the networks that are shipped


def test_shipped_networks_are_small_and_do_what_they_say(monkeypatch):
    classifier, tower = SHIPPED / "classifier.safetensors", SHIPPED / "two_tower.safetensors"
    assert classifier.stat().st_size < 2**20 and tower.stat().st_size < 2**20
    monkeypatch.setattr(shape_networks, "_CHECK", 64)
    for path, report in (
        (classifier, shape_networks.classifier_report),
        (tower, shape_networks.two_tower_report),
    ):
        again = report(shape_networks.load(path), seed=99)
        assert again == pytest.approx(shape_networks.read_report(path), abs=0.1)
        assert min(value for name, value in again.items() if name != "other") > 0.8


def test_shape_networks_resume_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(shape_networks, "vocabulary", lambda: ["a", "red", "circle"])
    for name in ("classifier_report", "two_tower_report"):
        monkeypatch.setattr(shape_networks, name, lambda network, seed: {"seed": seed})
    call = {"frames_steps": 2, "classifier_steps": 2, "two_tower_steps": 2, "batch": 4}
    runs = 0
    while not shape_networks.train(tmp_path / "parts", max_seconds=0.0, **call):
        runs += 1
        assert list((tmp_path / "parts").glob("*.ckpt"))
    assert runs == 3
    assert shape_networks.train(tmp_path / "whole", **call)
    for name in ("classifier.safetensors", "two_tower.safetensors"):
        parts, whole = tmp_path / "parts" / name, tmp_path / "whole" / name
        assert shape_networks.read_report(parts) == shape_networks.read_report(whole) == {"seed": 1}
        states = [load_file(path) for path in (parts, whole)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not list((tmp_path / "parts").glob("*.ckpt"))


def test_altered_truths_no_longer_fit_their_captions():
    data = MovingShapes(3, split="all", two_object_share=0.5)
    rng = random.Random(0)
    for index in range(40):
        truth, prompt = data.truth(index), data.prompt(index)
        assert shape_networks.describes(prompt, truth)
        for name in ("colour", "shape", "direction"):
            assert not shape_networks.describes(prompt, shape_networks.altered(truth, rng, name))


def test_clip_source_of_another_kind_needs_captions():
    """Sources that are no list of items are read as they are."""

    class Odd(ClipSource):
        kind, where = "odd", "odd"

        def __len__(self) -> int:
            return 2

        def read(self, index, form, generator):
            raise ClipError("odd", "no caption")

        name = caption = facts = read

        def digest(self, index: int) -> bytes:
            return b""

    odd = StoredClips(Odd(), ClipFormat(4, 8, 8))
    with pytest.raises(EvaluationError, match="none of the generated clips can be used"):
        measure("fvd[shapes]", odd, shapes(2, frames=4), force=True)
