#!/usr/bin/env bash
# What a card has to say about this repository in nine minutes, without a network: first whether it works, then how fast.
#
#     bash benchmarks/gpu.sh                      # PYTHON=... names another interpreter
#     bash benchmarks/gpu.sh --peers              # a second call: beside the peers
#     GPU_SH_DEVICE=cpu bash benchmarks/gpu.sh    # a rehearsal at tiny size, limits four times as long; no figures
#
# Each part has a limit in seconds, and all of them GPU_SH_SECONDS together (default 540). Everything that is said goes to
# CARD.log, how each part ended and what it measured to CARD.json, both line by line, in ${OUT:-benchmarks/results}.
# Exits 1 if a part failed, was cut off or was not begun.
set -uo pipefail
peers=
if [ "${1:-}" = --peers ]; then
  peers=-peers
  shift
fi
if [ $# -gt 0 ]; then
  echo "gpu.sh: unknown argument $1 (the only one is --peers)" >&2
  exit 2
fi
OUT=$(realpath -m "${OUT:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
device=${GPU_SH_DEVICE:-cuda}
budget=${GPU_SH_SECONDS:-540}
if [ "$device" = cpu ]; then
  card=cpu shape=tiny patience=4 # times the limit of each part
else
  shape=0.5b patience=1
  card=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>&1) || {
    echo "gpu.sh: $python sees no CUDA device: ${card##*$'\n'}" >&2
    exit 2
  }
  card=${card##*$'\n'} # behind any warning
  card=$(tr -cs 'a-z0-9\n' - <<<"${card,,}")
fi
mkdir -p "$OUT"
rm -f "$OUT/$card$peers".{log,json}
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * patience)) left=$((budget - SECONDS))
  shift 2
  "$python" benchmarks/record.py "$OUT/$card$peers" "$name" $((limit < left ? limit : left)) "$python" "$@" || failed=1
}

bench() { # NAME SECONDS SCRIPT ARGUMENTS...
  part "$1" "$2" "benchmarks/$3.py" --device "$device" "${@:4}"
}

tests() { # NAME SECONDS ARGUMENTS...
  local several=() # processes, where pytest-xdist is installed: they wait for the compiler more than for the card
  "$python" -c 'import xdist' 2>/dev/null && several=(-n 6)
  part "$1" "$2" -m pytest -o addopts= -m gpu -p benchmarks.pytest_rows -q --continue-on-collection-errors "${several[@]}" "${@:3}"
}

if [ "$peers" ]; then
  bench kernels 90 kernels
  bench step 90 step --shapes "$shape" --steps 3
  bench memory 130 memory --shapes "$shape"
  bench rollout "$budget" rollout --shapes "$shape" --repeats 1
else
  # Does it work?
  bench attention 30 smoke versions attention
  tests tests-first 40 tests/test_rollout.py tests/test_kernels.py -k "graphs or recording or bf16_model or default or autocast or waits or bits"
  bench decoding 15 smoke decoding
  bench graphs 15 smoke graphs
  bench chunks 15 smoke chunks
  bench gradients 30 smoke gradients
  bench deterministic 20 smoke deterministic
  bench run 90 smoke run
  # How fast is it?
  bench step 60 step --shapes "$shape" --steps 3 --no-peers --profile
  bench rollout 80 rollout --shapes "$shape" --repeats 1 --no-peers --profile
  bench kernels 50 kernels --no-peers
  # All that is there to test.
  mapfile -t files < <(grep -l 'mark[s=]*.*\.gpu' tests/test_*.py)
  tests tests 100 "${files[@]}"
  bench tune "$budget" kernels --tune
fi
exit $failed
