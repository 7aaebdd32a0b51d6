#!/bin/bash
# Everything that needs a GPU, in parts that are stopped after nine minutes. Run again, tests and
# benchmarks go on where they stopped, and parts that passed are left out, as long as the sources
# are the same:
#
#   benchmarks/device_suite.sh                 # every part that has not passed yet
#   benchmarks/device_suite.sh build matrix    # these parts
#
# build      the extension, and which kernels serve
# matrix     the operator matrix on CUDA C++, and what only a device shows
# triton     the operator matrix on Triton
# sanitize   memcheck, racecheck, synccheck and initcheck on small calls of every kernel
# aims       bench_shift.py, what docs/kernels.md aims at: 320 channels at 64x64, and 8x8 and 4x4,
#            call by call and in CUDA graphs, warm and cold L2
# conv       bench_shift.py, norm and convolution against cuDNN's convolution
# bench256   bench_shift.py, every site at 256x256 pixels, 16, 32 and 64 frames, warm and cold L2
# bench512   the same at 512x512, the widths' commonest sites
# blocks     bench_unet.py, one ResNet block per width, 256x256 and 512x512
# unet256    bench_unet.py, whole U-Nets at 256x256 with and without guidance, eager
# unet512    the same at 512x512, forward
# compiled   the whole U-Net at 256x256 against torch.compile
# profile    what bounds the kernels (ncu), for the commonest site
#
# OUT (default benchmarks/results/<device>) receives a log, a stamp and JSON for every part; PYTHON
# (default python3) needs torch, triton and pytest. PEERS (default benchmarks/peers.py) is a Python
# file of further providers for bench_shift.py: other projects' kernels, where they are installed.
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS=(build matrix triton sanitize aims conv bench256 bench512 blocks unet256 unet512 compiled profile)
LIMIT=530 # seconds a part

device=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name(0))') || {
  echo "device_suite: no CUDA device" >&2
  exit 1
}
slug=$(tr -cs 'A-Za-z0-9\n' '-' <<<"${device,,}")
export OUT=${OUT:-benchmarks/results/$slug}
export PEERS=${PEERS:-benchmarks/peers.py}
export LATENT_SHIFT_TEST_DEVICE=cuda PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"
sources=$(find benchmarks csrc latent_shift latent_shift_kernels tests setup.py -name '*.py' \
  -o -name '*.h' -o -name '*.cpp' -o -name '*.cu*' | LC_ALL=C sort | xargs -d '\n' cat | sha256sum)
if [[ $(cat "$OUT/sources" 2>/dev/null) != "$sources" ]]; then
  rm -f "$OUT"/*.passed "$OUT"/*.tests
  echo "$sources" >"$OUT/sources"
fi

build() {
  LATENT_SHIFT_FORCE_BUILD=1 MAX_JOBS=$(nproc) $PYTHON setup.py build_ext --inplace &&
    $PYTHON -m latent_shift_kernels info
}

tests() { # name, pytest's arguments
  local name=$1
  shift
  $PYTHON -m pytest -q -p no:cacheprovider --resume "$OUT/$name.tests" "$@"
}

matrix() {
  tests matrix -k "not triton" tests/kernels/test_device.py tests/kernels/test_operators.py
}

triton() { tests triton -k triton tests/kernels/test_operators.py; }

sanitize() {
  set -o pipefail
  # PyTorch's pool of memory would hide what lies outside a tensor, and what was never written
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  local failed=0 tool
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --launch-timeout 60 $PYTHON -m pytest -q \
      -p no:cacheprovider --resume "$OUT/$tool.tests" tests/kernels/test_device.py -k sanitized \
      2>&1 | tee "$OUT/$tool.log" || failed=1
    # the tools see PyTorch's kernels too: what they say of ours counts
    if grep -q "latent_shift::" "$OUT/$tool.log"; then
      rm -f "$OUT/$tool.tests"
      failed=1
    fi
  done
  return $failed
}

bench() { # name, further options
  local name=$1
  shift
  $PYTHON benchmarks/bench_shift.py --device cuda --cache both \
    --peers "$PEERS" --resume --json "$OUT/$name.json" --plot "$OUT/$name.png" "$@"
}

NORMS="temporal_shift shift_add shift+group_norm_silu group_norm_silu+shift shift_add_group_norm_silu"
TRAIN="forward backward forward+backward"

aims() {
  local failed=0
  bench bench_shift_320x64x64 --resolution 512 --frames 32 --site down0.res --op $NORMS \
    --pass $TRAIN --launch calls graph || failed=1
  bench bench_shift_small --resolution 256 --frames 32 --site down2.res down3.res --op $NORMS \
    --pass $TRAIN --launch calls graph --layout channels_last || failed=1
  return $failed
}

conv() {
  bench bench_shift_conv --op shift_group_norm_silu_conv2d --resolution 256 512 --frames 32 \
    --site down0.res up3.res1 down1.res down2.res --layout channels_last --launch graph \
    --pass forward forward+backward
}

SOME="temporal_shift shift+group_norm_silu shift_add_group_norm_silu"

bench256() {
  bench bench_shift_256 --resolution 256 --frames 16 32 64 --op $SOME --layout channels_last \
    --pass forward forward+backward
}

bench512() {
  bench bench_shift_512 --resolution 512 --frames 16 32 64 --op $SOME --layout channels_last \
    --pass forward forward+backward --site down0.res down1.res down2.res down3.res
}

unets() { # name, further options
  local name=$1
  shift
  $PYTHON benchmarks/bench_unet.py --device cuda --resume --json "$OUT/$name.json" "$@"
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
  ncu --clock-control none --set full --launch-skip 20 --launch-count 24 --csv \
    $PYTHON benchmarks/bench_shift.py --quick --site down0.res --provider latent-shift \
    >"$OUT/ncu.csv"
}

status=0
for part in "${@:-${PARTS[@]}}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || {
    echo "device_suite: unknown part $part, choose from ${PARTS[*]}" >&2
    exit 2
  }
  [[ $# -eq 0 && -e $OUT/$part.passed ]] && continue
  echo "== $part on $device"
  export -f "${PARTS[@]}" tests bench unets
  export PYTHON EAGER NORMS SOME TRAIN
  if timeout "$LIMIT" bash -c "$part" 2>&1 | tee "$OUT/$part.log"; then
    touch "$OUT/$part.passed"
  else
    echo "device_suite: $part failed, see $OUT/$part.log" >&2
    status=1
  fi
done
exit $status
