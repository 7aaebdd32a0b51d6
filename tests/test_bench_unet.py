"""The benchmark of blocks and U-Nets as a command: its rows, its comparison, its errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAST = ["--device", "cpu", "--threads", "1", "--seconds", "0.01"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    module = importlib.import_module("bench_unet")
    small = {**module._TINY, "block_out_channels": (8, 16, 16), "cross_attention_dim": 8}
    monkeypatch.setitem(module.SIZES, "tiny", (small, 2, 4, 8, 5))
    monkeypatch.setitem(module.BLOCKS, "down3.res", (64, 64, 8))
    yield module
    torch.set_num_threads(threads)


def rows_of(path: Path) -> dict[str, dict]:
    return {row["provider"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("direction", ["forward", "train"])
def test_every_provider_has_a_row(bench, tmp_path, capsys, direction):
    path = tmp_path / "rows.json"
    arguments = ["--model", "unet", "--pass", direction, "--json", str(path)]
    assert bench.main([*FAST, *arguments]) == 0
    rows = rows_of(path)
    providers = list(bench.PROVIDERS["unet"])
    if direction == "forward":
        providers.remove("latent-shift+recompute")
    assert list(rows) == providers
    for row in rows.values():
        assert row["status"] == "ok", row["note"]
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["peak_mib"] > 0 and 0 < row["share_beside_products"] < 1
    for name in ("latent-shift", "tsm", "image+fuse", "unet3d+fuse", "motion+fuse"):
        assert rows[name]["error"] < bench.TOLERANCES["fp32"]
    ours, roll = rows["latent-shift"], rows["roll"]
    if direction == "train":
        assert rows["latent-shift+recompute"]["kept_mib"] < ours["kept_mib"] < roll["kept_mib"]
    else:
        assert ours["kept_mib"] is None
    assert ours["parameters"] == roll["parameters"] == rows["image"]["parameters"]
    assert ours["speedup_vs_roll"] == pytest.approx(roll["ms"] / ours["ms"])
    pair = rows["unet3d"], rows["unet3d+fuse"]
    assert pair[1]["speedup_vs_unfused"] == pytest.approx(pair[0]["ms"] / pair[1]["ms"])
    assert "latent-shift" in capsys.readouterr().out


def test_training_holds_more_memory_than_inference(bench, tmp_path):
    peaks = {}
    for direction in bench.PASSES:
        path = tmp_path / f"{direction}.json"
        arguments = ["--quick", "--model", "block", "--provider", "roll", "--json", str(path)]
        assert bench.main([*FAST, *arguments, "--pass", direction]) == 0
        peaks[direction] = rows_of(path)["roll"]["peak_mib"]
    assert peaks["train"] > peaks["forward"]


def test_compiled_providers_run(bench, monkeypatch, tmp_path):
    compile = torch.compile

    def quickly(module, *, mode, **options):
        return compile(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", quickly)
    path, names = tmp_path / "rows.json", ["latent-shift", "latent-shift+compile", "roll+compile"]
    arguments = ["--quick", "--model", "block", "--pass", "train", "--provider", *names]
    assert bench.main([*FAST, *arguments, "--json", str(path)]) == 0
    rows = rows_of(path)
    assert list(rows) == names
    assert all(row["status"] == "ok" for row in rows.values()), rows


def test_a_wrong_provider_is_shown_and_not_timed(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "tsm_shift", lambda frames, spec: frames)
    path = tmp_path / "rows.json"
    arguments = ["--quick", "--model", "block", "--pass", "forward", "--json", str(path)]
    assert bench.main([*FAST, *arguments]) == 1
    rows = rows_of(path)
    assert (rows["tsm"]["status"], rows["tsm"]["ms"]) == ("failed", None)
    assert rows["latent-shift"]["status"] == "ok"


@pytest.mark.parametrize(
    ("option", "choice"),
    [
        ("model", "unet"),
        ("block", "down1.res"),
        ("size", "sd15"),
        ("resolution", "512"),
        ("guidance", "without"),
        ("pass", "train"),
        ("dtype", "bf16"),
        ("provider", "vdm"),
        ("device", "cpu"),
    ],
)
def test_an_unknown_name_lists_the_choices(bench, capsys, option, choice):
    assert bench.main([f"--{option}", "nonsense"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"--{option} nonsense" in message
    assert choice in message
