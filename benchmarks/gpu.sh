#!/usr/bin/env bash
# Every GPU test and benchmark of the repository on the card at hand, without a network. Each has a limit of seconds, and
# their sum is 9 minutes; one that is cut off counts as failed.
# Writes benchmarks/results/CARD.json (figures, versions, how the tests ended) and exits 1 if anything failed.
#
#     bash benchmarks/gpu.sh                  # PYTHON=... names another interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh: $python sees no CUDA device" >&2
  exit 2
}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=0

step() { # NAME SECONDS COMMAND...: run, show, keep the output
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$logs/$name" || {
    echo "== $name failed"
    failed=1
  }
}

step tests 110 "$python" -m pytest -o addopts= -m gpu -q
step kernels 120 "$python" benchmarks/kernels.py
step tune 50 "$python" benchmarks/kernels.py --tune --features 896
step rollout 100 "$python" benchmarks/rollout.py --shapes 0.5b --repeats 1
step step 80 "$python" benchmarks/step.py --shapes 0.5b --steps 3
step memory 80 "$python" benchmarks/memory.py --shapes 0.5b

"$python" - "$logs" <<'PYTHON' || failed=1
"""Gather the last line of each log: pytest's closing line, and the JSON line of each benchmark."""
import json, re, subprocess, sys
from pathlib import Path
import torch

card = torch.cuda.get_device_name()
driver = subprocess.run(
    ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
).stdout.strip()
result = {"card": card, "driver": driver}
for log in sorted(Path(sys.argv[1]).iterdir()):
    lines = log.read_text().strip().splitlines() or ["no output"]
    try:
        result[log.name] = json.loads(lines[-1])
    except json.JSONDecodeError:
        result[log.name] = lines[-1].strip("= ")
target = Path("benchmarks/results") / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")
target.write_text(json.dumps(result, indent=1) + "\n")
print("written:", target)
PYTHON
exit $failed
