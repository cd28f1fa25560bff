#!/usr/bin/env bash
# Kills and faults, wrong inputs and a long run, at length and side by side: what docs/checkpoints.md and docs/logs.md
# promise, tried on this machine. The exit status is 1 where a trial failed.
#
#   scripts/trials.sh runs/trials              # reports: OUT/chaos/chaos.md, OUT/inputs/inputs.md, OUT/endurance.txt
#   KILLS=20 INPUTS=1000 JOBS=2 scripts/trials.sh runs/trials     # fewer, on two cores
#
# BUCKET=gs://mine/trials kills runs in a bucket, too. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

KILLS=${KILLS:-100} INPUTS=${INPUTS:-10000} JOBS=${JOBS:-8} STEPS=${STEPS:-2000} BUCKET=${BUCKET:-}
PYTHON=${PYTHON:-.venv/bin/python}
[[ $# -eq 1 && $1 != -* ]] || fail "usage: scripts/trials.sh OUT"
[[ ! -e $1 ]] || fail "$1 is there already; name a new folder"
out=$1
mkdir -p "$out"

chaos() {
  "$PYTHON" -m experiments.chaos --config configs/quickstart.py --workdir "$out/chaos" --kills "$KILLS" --jobs "$JOBS" \
    --config.steps=20 --config.rollout.prompts=16 --config.checkpoint.every=2 --config.eval.every=0 \
    ${BUCKET:+--bucket "$BUCKET"}
}

inputs() {
  "$PYTHON" -m experiments.chaos.inputs --inputs "$INPUTS" --out "$out/inputs" --jobs "$(((JOBS + 1) / 2))"
}

endurance() { # small batches, and all that a run may write
  "$PYTHON" -m experiments.train --config configs/quickstart.py --workdir "$out/long" --config.steps="$STEPS" \
    --config.rollout.prompts=4 --config.rollout.group_size=4 --config.train.minibatches=2 --config.checkpoint.every=20 \
    --config.log.samples=5 --config.log.histograms=5 &&
    "$PYTHON" -m experiments.endurance "$out/long" --since "$((STEPS / 4))"
}

declare -A running
chaos >"$out/chaos.txt" 2>"$out/chaos.log" & running[chaos]=$!
inputs >"$out/inputs.txt" 2>"$out/inputs.log" & running[inputs]=$!
endurance >"$out/endurance.txt" 2>"$out/endurance.log" & running[endurance]=$!
status=0
for trial in chaos inputs endurance; do
  if wait "${running[$trial]}"; then said=passed; else said="failed: see $out/$trial.txt and $out/$trial.log" status=1; fi
  printf '%s %s\n' "$trial" "$said"
done
exit "$status"
