#!/bin/bash
# Everything that needs a GPU, in parts that are stopped after nine minutes; run again, a benchmark
# goes on with the cases that it has no rows of:
#
#   benchmarks/device_suite.sh                 # every part that has not passed yet
#   benchmarks/device_suite.sh build matrix    # these parts
#
# build      the extension, and which kernels serve
# matrix     the operator matrix on CUDA C++, and what only a device shows
# triton     the operator matrix on Triton
# sanitize   memcheck, racecheck, synccheck and initcheck on small cases
# bench256   bench_shift.py, 256x256 pixels, 16 and 32 frames, warm and cold L2
# bench512   the same at 512x512, and 64 frames
# blocks     bench_unet.py, one ResNet block per width, 256x256 and 512x512
# unet256    bench_unet.py, whole U-Nets at 256x256 with and without guidance, eager
# unet512    the same at 512x512, forward
# compiled   the whole U-Net at 256x256 against torch.compile
# profile    what bounds the kernels (ncu), for the commonest site
#
# OUT (default benchmarks/results/<device>) receives a log, a stamp and JSON for every part; PYTHON
# (default python3) needs torch, triton and pytest. PEERS may name a Python file of further
# providers for bench_shift.py, such as other projects' kernels: they are measured and not kept.
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PARTS=(build matrix triton sanitize bench256 bench512 blocks unet256 unet512 compiled profile)
LIMIT=530 # seconds a part

device=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name(0))') || {
  echo "device_suite: no CUDA device" >&2
  exit 1
}
slug=$(tr -cs 'A-Za-z0-9\n' '-' <<<"${device,,}")
export OUT=${OUT:-benchmarks/results/$slug}
export LATENT_SHIFT_TEST_DEVICE=cuda PYTHONPATH=$PWD PYTHONUNBUFFERED=1
mkdir -p "$OUT"

build() {
  LATENT_SHIFT_FORCE_BUILD=1 MAX_JOBS=$(nproc) $PYTHON setup.py build_ext --inplace &&
    $PYTHON -m latent_shift_kernels info
}

matrix() {
  $PYTHON -m pytest -q -p no:cacheprovider -k "not triton" tests/kernels/test_device.py \
    tests/kernels/test_operators.py
}

triton() {
  $PYTHON -m pytest -q -p no:cacheprovider -k triton tests/kernels/test_operators.py
}

sanitize() {
  # two dozen cases at odd shapes under four tools
  local failed=0 tool
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 60 \
      $PYTHON -m pytest -q -x -p no:cacheprovider tests/kernels/test_operators.py \
      -k "native and straddling and bf16 and (everything or circular)" || failed=1
  done
  return $failed
}

bench() { # resolution, name, further options
  local resolution=$1 name=$2
  shift 2
  $PYTHON benchmarks/bench_shift.py --device cuda --resolution "$resolution" --cache both \
    ${PEERS:+--peers "$PEERS"} --resume --json "$OUT/$name.json" --plot "$OUT/$name.png" "$@"
}

bench256() { bench 256 bench_shift_256 --frames 16 32; }

bench512() { bench 512 bench_shift_512 --frames 32 64 --site down0.res down1.res down2.res down3.res; }

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
  export -f build matrix triton sanitize bench bench256 bench512 unets blocks unet256 unet512 compiled profile
  export PYTHON EAGER
  if timeout "$LIMIT" bash -c "$part" 2>&1 | tee "$OUT/$part.log"; then
    touch "$OUT/$part.passed"
  else
    echo "device_suite: $part failed, see $OUT/$part.log" >&2
    status=1
  fi
done
exit $status
