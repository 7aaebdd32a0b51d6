"""The host executor runs correct kernels correctly and reports every planted fault."""

import pytest
import torch

from .device import HostDevice

pytestmark = pytest.mark.filterwarnings("error")
SEEDS = [0, 1, 2]
INT, FLOAT = torch.int32, torch.float32
DTYPES = ["bfloat16", "float16"]


def ramp(*shape, dtype=FLOAT):
    """Distinct values."""
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def small(*shape, dtype):
    """Values whose products and sums are exact in every type."""
    return torch.randint(-4, 5, shape).to(dtype)


def run(host, kernel, out, *, a=None, b=None, device=None, **launch):
    """Launches a trial kernel, and returns its poisoned output of the given shape and type."""
    shape, dtype = out
    with HostDevice(host, **(device or {})) as d:
        result = d.output(shape, dtype, name="out")
        for name, tensor in (("a", a), ("b", b)):
            if tensor is not None:
                launch[name] = d.input(tensor, name).data_ptr()
        getattr(host, kernel)(out=result.data_ptr(), **launch)
    return result


def test_every_binding_compiles(host):
    assert host.left_out == {}


@pytest.mark.parametrize("races", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_row_sums(host, seed, races):
    a = small(5, 301, dtype=FLOAT)
    device = {"seed": seed, "races": races}
    out = run(
        host, "row_sum", ((5,), FLOAT), a=a, blocks=5, threads=96, shared=12, n=301, device=device
    )
    assert torch.equal(out, a.sum(1))


def test_launches_are_recorded(host):
    with HostDevice(host) as device:
        a, out = device.input(ramp(2, 64)), device.output((2,), FLOAT)
        host.row_sum(a=a.data_ptr(), out=out.data_ptr(), blocks=2, threads=64, shared=8, n=64)
    (launch,) = device.launches
    assert launch["kernel"].endswith("row_sum")
    assert (launch["blocks"], launch["threads"], launch["shared"]) == ((2, 1, 1), (64, 1, 1), 8)
    assert launch["accesses"] >= 2 * (64 + 2 + 1 + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles(host, seed):
    out = run(host, "shuffles", ((8, 32), INT), device={"seed": seed})
    lane = torch.arange(32)
    expected = [
        torch.full((32,), 105),
        100 + lane // 8 * 8 + (lane + 1) % 8,
        100 + torch.where(lane < 3, lane, lane - 3),
        100 + torch.where(lane % 16 + 3 > 15, lane, lane + 3),
        torch.full((32,), sum(1 << i for i in range(0, 32, 3)) - (1 << 32) * (30 % 3 == 1)),
        100 + torch.where(lane < 16, lane ^ 1, lane ^ 2),
        (lane == seed).int(),
        2 * (100 + (lane ^ 16)) + 1,
    ]
    assert torch.equal(out, torch.stack(expected).int())


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_are_those_of_torch(host, dtype):
    type_ = getattr(torch, dtype)
    bits = torch.arange(1 << 16, dtype=INT).to(torch.int16)
    exact = bits.view(type_).float()
    # between neighbours: halfway, and just to either side of it
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), dtype=torch.int64).int().view(FLOAT)
    halfway = (exact.double() + exact.roll(-1).double()).div(2).float()
    for b in (random, halfway, halfway.nextafter(torch.tensor(torch.inf)), exact):
        out = run(
            host,
            f"conversions_{dtype}",
            ((1 << 16, 2), FLOAT),
            a=bits,
            b=b.contiguous(),
            blocks=64,
            threads=1024,
            device={"races": False},
        )
        torch.testing.assert_close(out[:, 0], exact, rtol=0, atol=0, equal_nan=True)
        expected = b.to(type_).float()
        torch.testing.assert_close(out[:, 1], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_element", [False, True])
def test_mma_fragments(host, dtype, by_element):
    a, b = small(16, 16, dtype=getattr(torch, dtype)), small(8, 16, dtype=getattr(torch, dtype))
    n = int(by_element)
    out = run(host, f"mma_tile_{dtype}", ((16, 8), FLOAT), a=a, b=b, n=n, shared=768)
    assert torch.equal(out, a.float() @ b.float().t() + 1)


@pytest.mark.parametrize(
    "dtype, n",
    [
        ("float16", 16),
        ("bfloat16", 64),
        ("float16", 80),
        ("bfloat16", 128),
        ("bfloat16", 160),
        ("float16", 256),
    ],
)
@pytest.mark.parametrize("start", [0, 5])
def test_wgmma_descriptors(host, dtype, n, start):
    a, b = small(64, 32, dtype=getattr(torch, dtype)), small(n, 32, dtype=getattr(torch, dtype))
    out = run(
        host,
        f"wgmma_tile_{dtype}_{n}",
        ((64, n), FLOAT),
        a=a,
        b=b,
        n=start,
        threads=128,
        shared=4 * (8 * 160 + 16) + 256 + 64 * n,
    )
    assert torch.equal(out, a.float() @ b.float().t())


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_pipeline(host, seed):
    a = ramp(3, 64, 4)
    device = {"seed": seed, "arch": 80}
    out = run(
        host, "copy_pipeline", ((4, 64, 4), FLOAT), a=a, n=3, threads=64, shared=3072, device=device
    )
    assert torch.equal(out, torch.cat([2 * a, torch.zeros(1, 64, 4)]))


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_arrive_at_mbarriers(host, seed):
    a = ramp(7, 32, 4)
    device = {"seed": seed, "arch": 80}
    out = run(
        host, "copy_barriers", (a.shape, FLOAT), a=a, n=7, threads=96, shared=1056, device=device
    )
    assert torch.equal(out, a)


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_pipeline(host, seed):
    a = ramp(5, 96)
    out = run(
        host,
        "bulk_pipeline",
        (a.shape, FLOAT),
        a=a,
        n=5,
        threads=128,
        shared=800,
        device={"seed": seed},
    )
    assert torch.equal(out, a)


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers(host, seed):
    out = run(
        host, "named_barriers", ((6, 32), INT), n=6, threads=64, shared=128, device={"seed": seed}
    )
    assert torch.equal(out, ramp(6, 32, dtype=INT).flip(1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_distributed_shared_memory(host, cluster, seed):
    a = small(16, dtype=FLOAT)
    launch = {"blocks": 16, "threads": 64, "cluster": cluster, "shared": 4}
    out = run(host, "cluster_sum", ((16,), FLOAT), a=a, device={"seed": seed}, **launch)
    weighted = a.view(-1, cluster) * torch.arange(1, cluster + 1)
    assert torch.equal(out, weighted.sum(1).repeat_interleave(cluster))


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast(host, seed):
    a = ramp(3, 64)
    launch = {"blocks": 4, "threads": 64, "cluster": 2, "shared": 16 + 256, "n": 3}
    out = run(host, "cluster_multicast", ((4, 3, 64), FLOAT), a=a, device={"seed": seed}, **launch)
    assert torch.equal(out, a.expand(4, 3, 64))


# ---- planted faults ------------------------------------------------------------------------------

# For each kernel: how to launch it, and for each fault the words of the report.
MATRICES = {
    "a": torch.ones(64, 16, dtype=torch.bfloat16),
    "b": torch.ones(64, 16, dtype=torch.bfloat16),
}
FAULTS = {
    "neighbours": (
        {"out": ((64,), INT), "threads": 64, "shared": 256},
        {
            1: "race: (read|write) of 4 bytes at shared memory",
            2: "race: (read|write) of 4 bytes at shared memory",
            3: "race: (read|write) of 4 bytes at shared memory",
        },
    ),
    "warp_exchange": (
        {"out": ((32,), INT), "shared": 64},
        {1: "race: (read|write) of 2 bytes", 2: "race: (read|write) of 2 bytes"},
    ),
    "bounds": (
        {"out": ((32,), INT), "a": ramp(32, dtype=INT), "shared": 128},
        {
            1: r"out of bounds: read of 4 bytes at shared memory \+ 128, which has 128",
            2: r"out of bounds: write of 4 bytes at shared memory \+ 128|race: write",
            3: "out of bounds: read of 4 bytes at .*, 0 past the end of 'a' of 128 bytes",
            4: "out of bounds: write of 4 bytes at .*, 0 past the end of 'out' of 128 bytes",
            5: r"write of 4 bytes at 'a' \+ .*, which is an input",
            6: r"uninitialised: read of 4 bytes at shared memory \+ 28",
            7: "misaligned: access to .*int2.* needs an alignment of 8",
            8: "out of bounds: read of 4 bytes at .*, 0 past the end of 'a'",
        },
    ),
    "global_order": (
        {"out": ((64,), INT), "blocks": 2},
        {
            1: r"race: write of 4 bytes at 'out' \+ .*, unordered after the write by thread",
            2: r"race: write of 4 bytes at 'out' \+ .* that another block of this launch writes",
            3: r"race: (read|write) of 4 bytes at 'out' \+ .* that another block of this launch",
        },
    ),
    "barriers": (
        {"out": ((1,), INT), "threads": 64},
        {
            1: "deadlock: 32 threads .* at (__syncthreads|named barrier)",
            2: "deadlock: 63 threads .* at __syncthreads .*; 1 exited",
            3: "deadlock: 32 threads .* at named barrier 1 of 64 threads .*; 32 exited",
            4: "barrier 1: for .* threads here, for .* where others wait|deadlock: 32 threads",
            5: r"barrier 1: warp \d is divergent",
        },
    ),
    "copies": (
        {"out": ((64, 4), INT), "a": ramp(64, 4, dtype=INT), "threads": 64, "shared": 1024},
        {
            1: "that an asynchronous copy is writing",
            2: "that an asynchronous copy is writing",
            3: "race: .*unordered after|that an asynchronous copy is writing",
            4: "cp.async: misaligned",
        },
    ),
    "bulk": (
        {"out": ((64,), INT), "a": ramp(64, dtype=INT), "threads": 64, "shared": 272},
        {
            1: r"deadlock: 64 threads .* at an mbarrier at shared memory \+ 0, parity 0",
            2: r"deadlock: 64 threads .* at an mbarrier at shared memory \+ 0, parity 0",
            3: "that an asynchronous copy is writing|race: (read|write)|in flight",
            4: "no fence_mbarrier_init after the initialisation",
            5: "with no fence_proxy_async between",
            6: "which hold an mbarrier",
            7: "mbarrier.arrive: the phase has had its 1 arrivals",
            8: "no mbarrier was initialised|race: (un|.*)",
        },
    ),
    "matrices": (
        {"out": ((64, 64), FLOAT), "threads": 128, "shared": 6144, **MATRICES},
        {
            1: "asynchronous read of .* with no fence_proxy_async between",
            2: "uninitialised: read of",
            3: r"out of bounds: wgmma descriptor of b \(leading 1024, stride 8192\)",
            4: "access to wgmma accumulators before the wgmma_wait",
            5: "race: write of .*, unordered after the read by a wgmma of warp|race: read of",
            6: "no wgmma_fence",
            7: "the warps of a warpgroup have different descriptors",
            9: "warp 3 took part in 0 of 1 wgmma",
            10: "no wgmma_fence after the last access to the accumulators",
            11: "exits with wgmma in flight",
            12: "wgmma descriptor 0x4.*: a swizzle, a base offset",
        },
    ),
    "cluster": (
        {"out": ((64,), INT), "blocks": 2, "cluster": 2, "shared": 136},
        {
            1: "race: read|uninitialised: read of .* of block",
            2: "has exited|exits without waiting for the access",
            3: "cluster_map: rank 2 of a cluster of 2",
            4: "has exited|exits without waiting for the access",
        },
    ),
    "lanes": (
        {"out": ((1,), INT)},
        {
            1: "lane .* reads lane .*, which takes no part",
            2: "the mask leaves out the executing lane",
            3: "mma.sync: lanes of the warp have exited|deadlock",
        },
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", FAULTS)
def test_kernels_without_their_faults_pass(host, kernel, seed):
    launch = dict(FAULTS[kernel][0])
    run(host, kernel, launch.pop("out"), device={"seed": seed}, **launch)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "kernel, fault", [(kernel, fault) for kernel, (_, faults) in FAULTS.items() for fault in faults]
)
def test_faults_are_reported(host, kernel, fault, seed):
    launch, reports = dict(FAULTS[kernel][0]), FAULTS[kernel][1]
    with pytest.raises(host.KernelError, match=reports[fault]) as error:
        run(host, kernel, launch.pop("out"), device={"seed": seed}, fault=fault, **launch)
    assert str(error.value).startswith(f"{{anonymous}}::{kernel}: ")


def test_wrong_stride_inside_bounds_gives_wrong_products(host):
    a, b = torch.randn(2, 64, 16).bfloat16()
    launch = {"threads": 128, "shared": 6144, "a": a, "b": b}
    right = run(host, "matrices", ((64, 64), FLOAT), **launch)
    torch.testing.assert_close(right, a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)
    wrong = run(host, "matrices", ((64, 64), FLOAT), fault=8, **launch)
    assert not torch.allclose(wrong, right, atol=0.1)


def test_reports_say_where(host):
    launch = dict(FAULTS["bounds"][0])
    with pytest.raises(
        host.KernelError, match=r"block \(0, 0, 0\), thread \(31, 0, 0\): .* \[faults.cpp:\d+\]"
    ):
        run(host, "bounds", launch.pop("out"), fault=3, **launch)


def test_features_need_their_architecture(host):
    launch = dict(FAULTS["matrices"][0])
    with pytest.raises(host.KernelError, match="needs sm_90, the device is sm_80"):
        run(host, "matrices", launch.pop("out"), device={"arch": 80}, **launch)


@pytest.mark.parametrize(
    "launch, report",
    [
        ({"threads": 1056}, r"block \(1056, 1, 1\)"),
        ({"blocks": 3, "cluster": 2}, "cluster of 2 in a grid of 3"),
        ({"shared": 300_000}, "300000 bytes of shared memory, a block has 232448"),
        ({"blocks": 0}, r"grid \(0, 1, 1\)"),
    ],
)
def test_launches_that_a_device_refuses(host, launch, report):
    with pytest.raises(host.KernelError, match=report):
        run(host, "global_order", ((64,), INT), **launch)


def test_guard_zones(host):
    with HostDevice(host) as device:
        out = device.output((3,), FLOAT, offset=1)
        assert out.data_ptr() % 256 == 4 and out.isnan().all()
    device = HostDevice(host)
    with pytest.raises(host.KernelError, match="bytes around 'output' were written"), device:
        out = device.output((3,), FLOAT)
        out.as_strided((1,), (1,), out.storage_offset() + 3).fill_(0)


def test_buffers_do_not_overlap(host):
    with HostDevice(host) as device:
        x = device.input(torch.zeros(8))
        with pytest.raises(ValueError, match="overlaps"):
            device.input(x[4:])
