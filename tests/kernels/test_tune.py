"""Which kernel is preferred: what forces it, what was measured, where that is kept."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from latent_shift_kernels import __main__ as command
from latent_shift_kernels import backends, choices, dispatch, ops, reference, tune

CPU = torch.device("cpu")
CALL = "temporal_shift float32 2x8x3x3"
SHAPE = (2, 8, 3, 3)

native = pytest.mark.skipif(
    dispatch.serving("cpu")["temporal_shift"] != "cpu", reason="the CPU library is not what serves"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choices._lookup.cache_clear()
    yield tmp_path
    choices._lookup.cache_clear()


def row(kernel: str) -> dict:
    return {"choice": kernel, "ms": {kernel: 1.0}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("auto", None)),
        ("native", ("native", None)),
        ("composed", ("auto", "composed")),
        ("triton, fused", ("triton", "fused")),
    ],
)
def test_one_variable_forces_a_backend(monkeypatch, text, expected):
    monkeypatch.setenv("LATENT_SHIFT_BACKEND", text)
    assert backends.asked() == expected


@pytest.mark.parametrize("text", ["cuda", "auto,fast", "fused,auto", "auto,fused,fused"])
def test_an_unknown_backend_is_named(monkeypatch, text):
    monkeypatch.setenv("LATENT_SHIFT_BACKEND", text)
    with pytest.raises(ValueError, match=f"one of auto, native.*got {text!r}"):
        backends.asked()


def test_choices_are_found_again():
    assert choices.lookup(CPU, CALL) is None
    path = choices.store(CPU, {CALL: row("reference")})
    assert choices.lookup(CPU, CALL) == ("reference", "measured on this machine")
    assert choices.lookup(CPU, CALL.replace("2x8", "4x8")) is None
    assert list(choices.chosen("cpu")) == [(CALL, "reference")]
    assert not list(choices.chosen("cuda"))
    assert list(path.parent.iterdir()) == [path], "a part was left behind"


def test_the_machine_goes_before_the_shipped_table(monkeypatch):
    monkeypatch.setitem(choices.SHIPPED, "cpu", {CALL: "reference"})
    assert choices.lookup(CPU, CALL) == ("reference", "the shipped table")
    choices.store(CPU, {CALL: row("cpu")})
    assert choices.lookup(CPU, CALL) == ("cpu", "measured on this machine")


def test_a_write_that_fails_leaves_the_old_choices():
    path = choices.store(CPU, {CALL: row("reference")})
    with pytest.raises(TypeError):
        choices.store(CPU, {CALL: {"choice": "cpu", "ms": {"cpu": object()}}})
    assert choices.lookup(CPU, CALL) == ("reference", "measured on this machine")
    assert list(path.parent.iterdir()) == [path]


def test_choices_of_another_version_are_not_used():
    path = choices.store(CPU, {CALL: row("reference")})
    record = json.loads(path.read_text())
    record["device"]["torch"] = "0.4.1"
    path.write_text(json.dumps(record))
    assert choices._read.__wrapped__(path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"device": {}}'])
def test_a_damaged_file_is_named_and_ignored(text):
    path = choices.store(CPU, {CALL: row("reference")})
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="is damaged.*delete it"):
        assert choices.lookup(CPU, CALL) is None


@native
def test_the_faster_kernel_is_chosen_beyond_the_margin():
    asked = []

    def time(runs):
        asked.append(list(runs))
        return {"cpu": 1.0, "reference": 0.5 if len(asked) == 1 else 0.97}

    told = []
    path = tune.tune(CPU, [SHAPE], [torch.float32], say=told.append, time=time)
    assert choices.lookup(CPU, CALL) == ("reference", "measured on this machine")
    assert choices.lookup(CPU, "shift_add float32 2x8x3x3") == ("cpu", "measured on this machine")
    assert asked == [["cpu", "reference"]] * 5, "the kernel of the rule is not the first"
    assert told[0].startswith(f"{CALL}: reference (cpu 1.000 ms") and path.exists()


@native
def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    implementations = tune._implementations

    def planted(op, device):
        found = implementations(op, device)
        if op == "shift_add":
            found["reference"] = lambda *args: reference.shift_add(*args) * 1.5
        return found

    monkeypatch.setattr(tune, "_implementations", planted)
    keys = []
    tune.tune(
        CPU, [SHAPE], [torch.float32], say=keys.append, time=lambda runs: dict.fromkeys(runs, 1.0)
    )
    assert len(keys) == 4 and not any(key.startswith("shift_add float32") for key in keys)


def test_nothing_to_choose_is_said(monkeypatch):
    monkeypatch.setattr(tune, "_implementations", lambda op, device: {})
    with pytest.raises(ValueError, match="one kernel, so there is nothing to measure"):
        tune.tune(CPU, [SHAPE], [torch.float32])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
@pytest.mark.parametrize("op", [backends.CONV2D, "shift_add"])
def test_every_tile_of_triton_is_tried_and_right(op, monkeypatch):
    pytest.importorskip("triton")
    from latent_shift_kernels.backends import triton as kernels
    from latent_shift_kernels.backends.triton import _common
    from latent_shift_kernels.backends.triton import shift_group_norm_silu_conv2d as conv2d

    arguments = dict(tune._calls(CPU, (2, 32, 4, 4), torch.float32))[op]
    name, module = (f"{op}_fused", conv2d) if op == backends.CONV2D else (op, _common)
    launch, seen = module.launch, []

    def recorded(kernel, programs, x, num_warps, **told):
        seen.append((told.get("BLOCK_P"), num_warps))
        return launch(kernel, programs, x, num_warps, **told)

    monkeypatch.setattr(module, "launch", recorded)
    run = functools.partial(kernels.IMPLEMENTATIONS[name], *arguments)
    ((key, tried),) = tune._tiles(op, arguments, run)
    expected = (ops.COMPOSED.get(op) or getattr(reference, op))(*arguments)
    assert len(tried) > 1
    for choice, run_it in tried.items():
        seen.clear()
        assert tune._agrees(run_it(), expected, torch.float32)
        sizes = [int(size) for size in choice.split("x")]
        warps = sizes[-2] if op == backends.CONV2D else sizes[-1]
        assert (sizes[0], warps) in seen, choice
    assert choices.lookup(CPU, key) is None, "a trial has left something behind"


@pytest.mark.parametrize("preferred", ["cuda", "triton"])
def test_each_call_of_the_convolution_gets_the_kernel_it_was_given(preferred, monkeypatch):
    """Where CUDA C++ stands and Triton beside it; on no device."""
    served, attached = [], {}
    name = f"{backends.CONV2D}_fused"
    monkeypatch.setitem(backends.SERVING, "cuda", {"shift_add_group_norm_silu": "cuda"})
    monkeypatch.setattr(backends, "_stands", lambda device, op: True)
    monkeypatch.setattr(backends, "_register", lambda device, kernels: attached.update(kernels))
    monkeypatch.setattr(backends, "_prefers", lambda device, kernel, op: kernel == preferred)
    monkeypatch.setattr(torch.ops.latent_shift, name, lambda *_: served.append("cuda"))
    monkeypatch.setitem(ops.COMPOSED, backends.CONV2D, lambda *_: served.append("composed"))
    triton = {name: lambda *_: served.append("triton")}
    backends._attach_fused_conv2d("cuda", lambda op, arguments: arguments[0], triton)
    for kernel in ("triton", "composed", "cuda"):
        attached[backends.CONV2D](kernel)
    assert served == ["triton", "composed", "cuda"]
    assert backends.SERVING["cuda"][backends.CONV2D] == preferred


@native
def test_what_was_chosen_serves():
    """In a process of its own: what serves is settled at import."""
    choices.store(CPU, {CALL: row("reference")})
    script = """
import sys, torch
import latent_shift_kernels as lsk
spec = lsk.ShiftSpec.latent_shift(8)
def files(x):
    seen = set()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code.co_filename.split("/")[-1]))
    y = lsk.temporal_shift(x, spec, 2)
    sys.setprofile(None)
    assert torch.equal(y[1, :2], x[0, :2]) and torch.equal(y[0, 2:6], x[0, 2:6])
    return "reference.py" in seen
print(files(torch.randn(2, 8, 3, 3)), files(torch.randn(2, 8, 4, 4)))
print(lsk.explain("temporal_shift", torch.randn(2, 8, 3, 3)))
"""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "LATENT_SHIFT_BACKEND": "auto"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    first, second, *rest = result.stdout.splitlines()
    assert first == "True False", "the table decides by shape"
    assert second.endswith("(2, 8, 3, 3): plain PyTorch, measured on this machine")
    assert "  not C++: measured on this machine" in rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "shift_add", "--shape", "4,32,8"], "expected four sizes"),
        (["explain", "shift_add", "--dtype", "int8"], "expected one of float32"),
        (["tune", "--device", "nowhere"], "is no device of torch"),
        (["tune", "--shape", "0,32,8,8"], "expected four sizes"),
        (["tune", "--device", "meta"], "nothing to measure"),
    ],
)
def test_bad_commands_end_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last


def test_the_command_explains_a_convolution(capsys):
    command.main(
        ["explain", backends.CONV2D, "--shape", "2,8,4,4", "--skip-channels", "8",
         "--out-channels", "16", "--channels-last"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "composed of" in said and "moves" in said and "channels_last" in said
