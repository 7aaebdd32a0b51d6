"""The operator benchmark as a command: its rows, its comparison with fp64, its errors."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = [
    "--quick", "--device", "cpu", "--threads", "1", "--site", "down3.res",
    "--layout", "channels_last",
]  # fmt: skip
COLUMNS = {
    "op", "pass", "site", "shape", "dtype", "layout", "device", "provider", "ms", "ms_low",
    "ms_high", "gbps", "share_of_copy", "speedup_vs_roll",
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield importlib.import_module("bench_shift")
    torch.set_num_threads(threads)


def test_rows_and_plot(bench, tmp_path, capsys):
    path, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    arguments = [*TINY, "--op", "shift+group_norm_silu", "--json", str(path), "--plot", str(plot)]
    assert bench.main(arguments) == 0
    written = json.loads(path.read_text())
    assert {"device", "threads", "torch", "python", "commit", "date"} <= set(written["environment"])
    rows = written["rows"]
    named = [(row["pass"], row["provider"]) for row in rows]
    providers = ("clone", "latent-shift", "roll", "tsm", "group_norm")
    assert named == [(p, name) for p in ("forward", "backward") for name in providers]
    assert {row["note"] for row in rows if row["provider"] == "group_norm"} == {"without the shift"}
    tensors = {"forward": 2, "backward": 3}
    for row in rows:
        assert set(row) >= COLUMNS
        assert (row["op"], row["site"]) == ("shift+group_norm_silu", "down3.res 1280x4x4")
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        count = 2 if row["provider"] == "clone" else tensors[row["pass"]]
        floor_bytes = count * 16 * 1280 * 4 * 4 * 4
        assert row["gbps"] == pytest.approx(floor_bytes / row["ms"] / 1e6)
    by_name = dict(zip(named, rows, strict=True))
    for direction in ("forward", "backward"):
        ours, roll = by_name[direction, "latent-shift"], by_name[direction, "roll"]
        assert ours["speedup_vs_roll"] == pytest.approx(roll["ms"] / ours["ms"])
        assert roll["speedup_vs_roll"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "down3.res 1280x4x4" in capsys.readouterr().out


def test_the_convolution_and_the_parts_of_it(bench, monkeypatch, tmp_path):
    """A peer may compute a part; everybody is held to what it computes."""
    peers = tmp_path / "peers.py"
    peers.write_text("""
from bench_shift import Provider, composed, no_shift, unshifted
build = lambda op, spec, device: composed(op, no_shift, spec)
PROVIDERS = {
    "peer": Provider(build, truth=unshifted, part="without the shift"),
    "boaster": Provider(build),
}
""")
    path = tmp_path / "rows.json"
    monkeypatch.setattr(bench, "PROVIDERS", dict(bench.PROVIDERS))
    monkeypatch.setattr(bench, "unet_sites", lambda *_: [bench.Site("small", 32, 32, 4, 1, 16)])
    arguments = [*TINY, "--site", "small", "--op", "shift_group_norm_silu_conv2d", "--pass"]
    arguments += ["forward", "backward", "forward+backward", "--provider", "latent-shift", "roll"]
    arguments += ["conv2d", "peer", "boaster", "--peers", str(peers), "--cache", "both"]
    plot = tmp_path / "rows.png"
    assert bench.main([*arguments, "--json", str(path), "--plot", str(plot)]) == 1
    rows = json.loads(path.read_text())["rows"]
    status = {(row["provider"], row["status"]) for row in rows}
    fine = ("clone", "latent-shift", "roll", "conv2d", "peer")
    assert status == {(name, "ok") for name in fine} | {("boaster", "failed")}
    moved = {"forward": 32 * 16 * 48 + 4608, "backward": 32 * 16 * 80 + 2 * 4608}
    moved["forward+backward"] = sum(moved.values())
    for row in rows:
        if row["provider"] in fine[1:]:
            assert row["gbps"] * row["ms"] * 1e6 == pytest.approx(4 * moved[row["pass"]])
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == {"rows_fp32_warm_calls.png", "rows_fp32_cold_calls.png"}


def test_peers_that_are_installed_are_timed(bench, monkeypatch, tmp_path):
    """With stand-ins that have their signatures."""

    def stand_in(x, groups, weight, bias, eps, act="silu"):
        assert act == "silu"
        return F.silu(F.group_norm(x, groups, weight, bias, eps))

    def sglang(x, weight, bias, groups, eps):
        assert not torch.is_grad_enabled()
        return stand_in(x, groups, weight, bias, eps)

    apex = {f"cuda_group_norm_nhwc_{n}_pass": stand_in for n in ("one", "two")}
    for name, functions in (
        ("apex.contrib.group_norm.group_norm", apex),
        ("sglang.jit_kernel.diffusion.triton.group_norm_silu", {"triton_group_norm_silu": sglang}),
    ):
        parent = None
        for end in [i for i, c in enumerate(name + ".") if c == "."]:
            module = types.ModuleType(name[:end])
            monkeypatch.setitem(sys.modules, name[:end], module)
            if parent:
                setattr(parent, name[:end].rpartition(".")[2], module)
            parent = module
        vars(parent).update(functions)
    monkeypatch.setattr(bench, "PROVIDERS", dict(bench.PROVIDERS))
    monkeypatch.setattr(bench, "unet_sites", lambda *_: [bench.Site("small", 32, 32, 4, 1, 16)])
    path = tmp_path / "rows.json"
    arguments = ["--quick", "--device", "cpu", "--site", "small", "--json", str(path), "--op"]
    arguments += ["shift_add", "shift_add_group_norm_silu", "--provider", "apex", "sglang"]
    assert bench.main([*arguments, "--peers", str(BENCHMARKS / "peers.py")]) == 0
    rows = json.loads(path.read_text())["rows"]
    timed = {(row["op"], row["layout"], row["pass"], row["provider"]) for row in rows}
    norm = "shift_add_group_norm_silu"
    assert {row for row in timed if row[-1] != "clone"} == {
        (norm, "nchw", "forward", "sglang"),
        (norm, "channels_last", "forward", "apex"),
        (norm, "channels_last", "backward", "apex"),
    }
    assert {row["status"] for row in rows} == {"ok"}


def test_a_graph_holds_every_set_of_buffers(bench, monkeypatch):
    """With a stand-in for CUDA, which this machine may not have."""
    timing, seen = importlib.import_module("timing"), []

    @contextlib.contextmanager
    def graph(graph, stream):
        yield seen.clear()

    fake = type("Graph", (), {"replay": lambda self: seen.append("replay")})
    monkeypatch.setattr(timing.torch.cuda, "CUDAGraph", fake)
    monkeypatch.setattr(timing.torch.cuda, "graph", graph)
    monkeypatch.setattr(timing.torch.cuda, "current_stream", lambda: None)
    rotation = [lambda i=i: seen.append(i) or i for i in range(3)]
    replay = timing.captured(rotation, 6, keep=True)
    assert seen == [0, 1, 2, 0, 1, 2]
    assert replay() == 2 and seen[-1] == "replay"
    assert timing.captured(rotation, 2, keep=False)() == 1
    cpu = torch.device("cpu")
    slow = {"one": [lambda: timing.time.sleep(0.004)]}
    whole = timing.interleave(slow, cpu, warm=False, seconds=0)["one"]
    share = timing.interleave(slow, cpu, warm=False, seconds=0, each=4)["one"]
    assert whole.ms >= 4 and share.ms < whole.ms / 2


def test_results_stay_until_their_buffers_come_again(bench):
    timing, live, counts = importlib.import_module("timing"), weakref.WeakSet(), []

    def call():
        result = torch.empty(1)
        live.add(result)
        counts.append(len(live))
        return result

    timing.interleave({"a": [call] * 3}, torch.device("cpu"), warm=False, seconds=0)
    assert counts[:3] == [1, 2, 3] and set(counts[3:]) == {3}
    counts.clear()
    timing.interleave({"a": [call]}, torch.device("cpu"), warm=True, seconds=0)
    assert set(counts) == {1}


def test_graphs_need_a_gpu(bench, capsys):
    assert bench.main(["--device", "cpu", "--launch", "graph"]) == 2
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err


def test_a_cold_cache_rotates_buffers(bench, monkeypatch):
    monkeypatch.setattr(bench, "last_level_cache", lambda device: 8 << 20)
    built = []
    prepare = bench.prepare
    monkeypatch.setattr(bench, "prepare", lambda *args: built.append(args) or prepare(*args))
    one = ["--op", "temporal_shift", "--pass", "forward", "--provider", "latent-shift"]
    assert bench.main([*TINY, *one, "--cache", "cold"]) == 0
    moved = 2 * 16 * 1280 * 4 * 4 * 4  # bytes read and written by one call
    assert (len(built) / 2 - 1) * moved >= 2 * (8 << 20)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_provider_is_shown_and_not_timed(bench, monkeypatch, direction, tmp_path):
    def wraps(x, spec):
        clips = x.unflatten(0, (-1, bench.CLIP_FRAMES))
        prev, keep, next_ = clips.split(spec.sizes, dim=2)
        moved = [prev.roll(1, dims=1), keep, next_.roll(-1, dims=1)]
        return torch.cat(moved, dim=2).flatten(0, 1)

    monkeypatch.setattr(bench, "roll_shift", wraps)
    path = tmp_path / "rows.json"
    arguments = ["--op", "shift_add", "--pass", direction, "--json", str(path)]
    assert bench.main([*TINY, *arguments]) == 1
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["roll"]["status"] == "failed"
    assert rows["roll"]["ms"] is None
    assert rows["roll"]["error"] > 0.1
    assert rows["latent-shift"]["status"] == rows["tsm"]["status"] == "ok"
    assert rows["latent-shift"]["speedup_vs_roll"] is None


def test_a_provider_that_raises_is_a_row(bench, monkeypatch, tmp_path):
    def broken(op, spec, device):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setitem(bench.PROVIDERS, "roll+compile", bench.Provider(broken))
    path = tmp_path / "rows.json"
    arguments = ["--op", "shift_add", "--pass", "forward", "--provider", "roll", "roll+compile"]
    assert bench.main([*TINY, *arguments, "--json", str(path)]) == 0
    row = json.loads(path.read_text())["rows"][-1]
    assert (row["status"], row["ms"]) == ("error", None)
    assert row["note"] == "RuntimeError: no compiler"


def test_a_run_that_is_cut_off_goes_on(bench, monkeypatch, tmp_path, capsys):
    path, measure, measured = tmp_path / "rows.json", bench.measure, []

    def cut_off(case, *others):
        if measured:
            raise KeyboardInterrupt
        measured.append(str(case))
        return measure(case, *others)

    arguments = [*TINY, "--op", "temporal_shift", "--json", str(path)]
    monkeypatch.setattr(bench, "measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    first = json.loads(path.read_text())["rows"]
    assert {row["case"] for row in first} == set(measured)

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main([*arguments, "--resume"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[: len(first)] == first
    assert [row["pass"] for row in rows[len(first) :]] == ["backward"] * len(first)
    capsys.readouterr()
    assert bench.main([*arguments, "--resume", "--dtype", "bf16"]) == 0
    (aside,) = set(tmp_path.glob("rows.*.json"))
    assert f"of another options: set aside as {aside.name}" in capsys.readouterr().out
    assert json.loads(aside.read_text())["rows"] == rows
    assert {row["dtype"] for row in json.loads(path.read_text())["rows"]} == {"bf16"}


def test_what_failed_is_tried_again(bench, monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    arguments = [*TINY, "--op", "shift_add", "--pass", "forward", "--provider", "roll"]
    with monkeypatch.context() as broken:
        broken.setattr(bench, "roll_shift", lambda x, spec: x)
        assert bench.main([*arguments, "--json", str(path), "--resume"]) == 1
    assert bench.main([*arguments, "--json", str(path), "--resume"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["provider"], row["status"]) for row in rows] == [("clone", "ok"), ("roll", "ok")]


def test_resume_needs_a_file(bench, capsys):
    assert bench.main([*TINY, "--resume"]) == 2
    assert "give --json too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "choice"),
    [
        ("op", "shift_add"),
        ("pass", "backward"),
        ("site", "down0.res 320x32x32"),
        ("dtype", "bf16"),
        ("layout", "channels_last"),
        ("provider", "roll"),
        ("device", "cpu"),
        ("cache", "cold"),
        ("launch", "graph"),
    ],
)
def test_an_unknown_name_lists_the_choices(bench, capsys, option, choice):
    assert bench.main([f"--{option}", "nonsense"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"--{option} nonsense" in message
    assert choice in message


def test_sites_are_the_norms_of_the_unet(bench):
    for resolution, side in ((256, 32), (512, 64)):
        sites = bench.unet_sites(resolution)
        assert sum(site.count for site in sites) == 44  # two a block, 22 blocks
        assert max(site.side for site in sites) == side
        assert len({site.shape for site in sites}) == len(sites)
