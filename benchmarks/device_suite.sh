#!/bin/bash
# Everything that needs a GPU, in parts that are stopped after nine minutes. Run again, tests and
# benchmarks go on where they stopped, and parts that passed are left out, as long as the sources
# are the same:
#
#   benchmarks/device_suite.sh                 # every part that has not passed yet
#   benchmarks/device_suite.sh build matrix    # these parts
#
# build      the extension for this GPU, and which kernels serve; without it nothing else runs
# aims       bench_shift.py, what docs/kernels.md aims at: 320 channels at 64x64, and 8x8 and 4x4,
#            call by call and in CUDA graphs, warm and cold L2
# conv       bench_shift.py, norm and convolution against cuDNN's convolution
# matrix     the operator matrix on CUDA C++, and what only a device shows
# triton     the operator matrix on Triton
# memcheck, racecheck, synccheck, initcheck
#            compute-sanitizer on small calls of every operator: every way of launching the norm,
#            and every tile of the convolution that the planning takes on this GPU
# profile    what bounds the kernels (ncu)
# bench256   bench_shift.py, every site at 256x256 pixels, 16, 32 and 64 frames, warm and cold L2
# bench512   the same at 512x512, the widths' commonest sites
# blocks     bench_unet.py, one ResNet block per width, 256x256 and 512x512
# unet256    bench_unet.py, whole U-Nets at 256x256 with and without guidance, eager
# unet512    the same at 512x512, forward
# compiled   the whole U-Net at 256x256 against torch.compile
#
# SUITE_OUT (default benchmarks/results/<device>) receives a log, a stamp and JSON for every part.
# PYTHON (default python3) needs torch, triton, setuptools, ninja, pytest, rich and matplotlib, and
# diffusers for the U-Nets. PEERS (default benchmarks/peers.py) is a Python file of further
# providers for bench_shift.py: other projects' kernels, where they are installed.
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS=(build aims conv matrix triton memcheck racecheck synccheck initcheck profile bench256 bench512
  blocks unet256 unet512 compiled)
LIMIT=530 # seconds a part

device=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name(0))') || {
  echo "device_suite: no CUDA device" >&2
  exit 1
}
slug=$(tr -cs 'A-Za-z0-9\n' '-' <<<"${device,,}")
export SUITE_OUT=${SUITE_OUT:-benchmarks/results/$slug}
export PEERS=${PEERS:-benchmarks/peers.py}
export LATENT_SHIFT_TEST_DEVICE=cuda PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$SUITE_OUT"
sources=$(find benchmarks csrc latent_shift latent_shift_kernels tests setup.py -name '*.py' \
  -o -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | LC_ALL=C sort | xargs -d '\n' cat | sha256sum)
if [[ $(cat "$SUITE_OUT/sources" 2>/dev/null) != "$sources" ]]; then
  rm -f "$SUITE_OUT"/*.passed "$SUITE_OUT"/*.tests
  echo "$sources" >"$SUITE_OUT/sources"
fi

built() { # whether CUDA C++ serves
  $PYTHON -c 'import sys, latent_shift_kernels as k
sys.exit(k.serving("cuda")["temporal_shift"] != "cuda")'
}

build() {
  local arch
  arch=$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} LATENT_SHIFT_FORCE_BUILD=1 \
    MAX_JOBS=$(nproc) $PYTHON setup.py build_ext --inplace &&
    built && $PYTHON -m latent_shift_kernels info
}

tests() { # name, pytest's arguments
  local name=$1
  shift
  $PYTHON -m pytest -q -p no:cacheprovider --resume "$SUITE_OUT/$name.tests" "$@"
}

matrix() {
  tests matrix -k "not triton" tests/kernels/test_device.py tests/kernels/test_operators.py
}

triton() { tests triton -k triton tests/kernels/test_operators.py; }

sanitize() { # tool; all at once, for what a tool finds fails no test
  set -o pipefail
  # PyTorch's pool of memory would hide what lies outside a tensor, and what was never written
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --launch-timeout 60 \
    $PYTHON -m pytest -q -p no:cacheprovider tests/kernels/test_device.py -k sanitized 2>&1 |
    tee "$SUITE_OUT/$1.found" &&
    # the tools see PyTorch's kernels too: what they say of ours counts
    ! grep -q "latent_shift::" "$SUITE_OUT/$1.found"
}

memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }
synccheck() { sanitize synccheck; }
initcheck() { sanitize initcheck; }

bench() { # name, further options
  local name=$1
  shift
  $PYTHON benchmarks/bench_shift.py --device cuda --cache both --peers "$PEERS" --resume \
    --json "$SUITE_OUT/$name.json" --plot "$SUITE_OUT/$name.png" "$@"
}

aims() {
  local failed=0 providers="latent-shift roll tsm roll+compile group_norm"
  $PYTHON -c 'import apex' 2>/dev/null && providers+=" apex"
  bench bench_shift_320x64x64 --resolution 512 --frames 32 --site down0.res \
    --op temporal_shift shift+group_norm_silu --launch calls graph --provider $providers || failed=1
  bench bench_shift_small --resolution 256 --frames 32 --site down2.res down3.res \
    --op shift+group_norm_silu --launch graph --layout channels_last --provider $providers || failed=1
  return $failed
}

conv() {
  bench bench_shift_conv --op shift_group_norm_silu_conv2d --resolution 256 512 --frames 32 \
    --site down0.res up3.res1 down1.res down2.res --layout channels_last --launch graph \
    --pass forward forward+backward
}

SOME="temporal_shift shift+group_norm_silu shift_add_group_norm_silu"
TRAIN="forward forward+backward"

bench256() {
  bench bench_shift_256 --resolution 256 --frames 16 32 64 --op $SOME --pass $TRAIN \
    --layout channels_last
}

bench512() {
  bench bench_shift_512 --resolution 512 --frames 16 32 64 --op $SOME --pass $TRAIN \
    --layout channels_last --site down0.res down1.res down2.res down3.res
}

unets() { # name, further options
  local name=$1
  shift
  $PYTHON benchmarks/bench_unet.py --device cuda --resume --json "$SUITE_OUT/$name.json" "$@"
}

EAGER="latent-shift latent-shift+recompute roll tsm image image+fuse vdm unet3d unet3d+fuse motion motion+fuse"

blocks() {
  unets bench_unet_blocks --model block --resolution 256 512 --guidance with \
    --provider latent-shift latent-shift+recompute roll tsm image image+fuse \
    latent-shift+compile roll+compile
}

unet256() { unets bench_unet_256 --model unet --resolution 256 --provider $EAGER; }

unet512() { unets bench_unet_512 --model unet --resolution 512 --pass forward --provider $EAGER; }

compiled() {
  unets bench_unet_compiled --model unet --resolution 256 --guidance with --pass forward \
    --provider latent-shift roll image latent-shift+compile roll+compile
}

profile() {
  ncu --clock-control none --set full --kernel-name-base demangled --kernel-name regex:latent_shift \
    --csv --log-file "$SUITE_OUT/ncu.csv" $PYTHON benchmarks/profile_kernels.py
}

export -f "${PARTS[@]}" built tests sanitize bench unets
export PYTHON EAGER SOME TRAIN
status=0
for part in "${@:-${PARTS[@]}}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || {
    echo "device_suite: unknown part $part, choose from ${PARTS[*]}" >&2
    exit 2
  }
  [[ $# -eq 0 && $part != build && -e $SUITE_OUT/$part.passed ]] && continue
  if [[ $part != build ]] && ! built; then
    echo "device_suite: CUDA C++ does not serve, and $part would test something else: run build" >&2
    exit 1
  fi
  echo "== $part on $device"
  rm -f "$SUITE_OUT/$part.passed"
  if timeout "$LIMIT" bash -c "$part" 2>&1 | tee "$SUITE_OUT/$part.log"; then
    touch "$SUITE_OUT/$part.passed"
  else
    echo "device_suite: $part failed, see $SUITE_OUT/$part.log" >&2
    status=1
    [[ $part == build ]] && exit 1
  fi
done
exit $status
