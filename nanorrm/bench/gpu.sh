#!/usr/bin/env bash
# All that there is to run on a GPU, one stage after another, each under its own time limit. No
# network is needed. `make gpu`, or some stages by name: nanorrm/bench/gpu.sh tests kernels
#
# A failed stage does not stop the next ones. What they print and find comes into $OUT at once, at
# the end a line for each. The exit status is 1 if any failed, or could not be run.
#
#   PYTHON         the interpreter; default: .venv's if there is one, else python3
#   OUT            where results go; default: runs/gpu-<time>
#   LIMIT_<STAGE>  seconds; 24.5 minutes in all by default
#
# `check` compiles the kernels for other GPUs too, and is run only if named.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$(ls .venv/bin/python 2>/dev/null || echo python3)}
OUT=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
KERNELS=${LIMIT_KERNELS:-420}
wanted=" ${*:-environment tests kernels engine step whole} "
export PYTHONUNBUFFERED=1 # what was printed before a stage was cut off is kept
mkdir -p "$OUT" || exit 2
failed=0 ran=0

stage() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS status=1 note=""
    shift 2
    [[ $wanted == *" $name "* ]] || return
    echo "== $name, at most $limit s"
    if [[ $name != environment && $name != check && $cuda != True ]]; then
        note="no CUDA device" && echo "$note: not run" | tee "$OUT/$name.txt"
    else
        timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"
        status=${PIPESTATUS[0]}
        [[ $status == 124 ]] && note="out of time"
    fi
    ran=1
    [[ $status == 0 ]] || failed=1
    printf '%-12s status %3d %5d s  %s\n' "$name" "$status" $((SECONDS - began)) "$note" \
        >>"$OUT/summary.txt"
}

versions='
import platform, shutil, subprocess, sys
from importlib.metadata import PackageNotFoundError, version
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi"])
print("python", platform.python_version())
names = "torch triton numpy safetensors tokenizers jinja2 tqdm tyro matplotlib"
for name in f"{names} pytest hypothesis transformers trl vllm flash-attn".split():
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
import torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device")
print(torch.cuda.get_device_name(), "with CUDA", torch.version.cuda)
'
cuda=$(timeout 60 "$PYTHON" -c "import torch; print(torch.cuda.is_available())" 2>/dev/null)

stage environment "${LIMIT_ENVIRONMENT:-60}" "$PYTHON" -c "$versions"
stage check "${LIMIT_CHECK:-600}" "$PYTHON" -m kernels.check
stage tests "${LIMIT_TESTS:-270}" "$PYTHON" -m pytest -m gpu --continue-on-collection-errors \
    $(grep -rl "mark\.gpu" tests --include="*.py")
stage kernels "$KERNELS" "$PYTHON" -m kernels.bench --json "$OUT/kernels.json" \
    --minutes $((KERNELS / 75)) # it starts nothing new after these
stage engine "${LIMIT_ENGINE:-360}" "$PYTHON" -m nanorrm.bench engine --batches 128,384 \
    --json "$OUT/engine.json"
stage step "${LIMIT_STEP:-120}" "$PYTHON" -m nanorrm.bench train --whole - --json "$OUT/step.json"
stage whole "${LIMIT_WHOLE:-240}" "$PYTHON" -m nanorrm.bench train --shapes - --recompute \
    --repeats 3 --json "$OUT/whole.json"

[[ $ran == 1 ]] || { echo "no such stage:$wanted" >&2; exit 2; }
echo "== summary, in $OUT"
cat "$OUT/summary.txt"
exit $failed
