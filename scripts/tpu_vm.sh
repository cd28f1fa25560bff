#!/usr/bin/env bash
# Starts and stops runs on a Cloud TPU VM of one or more hosts: --help says how.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

SUBCOMMANDS=(create install copy run watch stop delete)

usage() {
  cat << 'END'
Starts and stops runs on a Cloud TPU VM of one or more hosts. Each command is printed before it is run.

  scripts/tpu_vm.sh [--dry-run] SUBCOMMAND ...

  create                   the TPU VM
  install                  what is committed here, and what it needs, on every host
  copy FILE...             models and data from here to gs://BUCKET
  run NAME ARGUMENT...     dppo-train on every host, in the background; again: it goes on
  watch NAME               what the run says, as it says it
  stop NAME                the run writes a checkpoint and ends
  delete                   the TPU VM

  --dry-run                prints the commands and runs none

Variables:

  TPU          its name                                           ZONE      such as europe-west4-b
  BUCKET       for runs, models and data: my-bucket of gs://my-bucket
  ACCELERATOR  what `create` makes, such as v5litepod-32          VERSION   of its software, such as v2-alpha-tpuv5-lite
  SPOT         set to 1: cheaper, and preemptible                 PROJECT   unless it is gcloud's own

  scripts/tpu_vm.sh run run-a --config configs/paper/dense_base.py --config.checkpoint.every=10
END
}

PYTHON=3.12 # which uv brings, where the host has none

tpu_vm() { # SUBCOMMAND ARGUMENT...
  installed gcloud "https://cloud.google.com/sdk/docs/install says how"
  run gcloud compute tpus tpu-vm "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

on() { # WORKER COMMAND
  tpu_vm ssh "$TPU" --worker="$1" --command="$2"
}

names() {
  need TPU my-tpu
  need ZONE europe-west4-b
}

do_create() {
  no_more create "$@"
  names
  check_spot
  need ACCELERATOR v5litepod-32
  need VERSION v2-alpha-tpuv5-lite
  # The scope is what lets the hosts read and write the bucket.
  tpu_vm create "$TPU" --accelerator-type="$ACCELERATOR" --version="$VERSION" \
    --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
}

do_install() {
  local changed
  no_more install "$@"
  names
  cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
  if [[ ! $DRY_RUN ]]; then
    installed gcloud "https://cloud.google.com/sdk/docs/install says how"
    installed git "it is needed to copy what is committed"
    changed=$(git status --porcelain 2> /dev/null | wc -l) || fail "install copies what is committed, and this is no git repository"
    ((changed == 0)) || printf 'note: %d files are changed or new, and not committed: not copied\n' "$changed" >&2
  fi
  run mkdir -p build
  run git archive --output=build/dppo_jax.tar.gz --prefix=dppo_jax/ HEAD
  tpu_vm scp build/dppo_jax.tar.gz "$TPU:" --worker=all
  # shellcheck disable=SC2016 # for the host's shell
  on all 'tar -xzf dppo_jax.tar.gz && { test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; }'
  on all "cd dppo_jax && ~/.local/bin/uv venv --quiet --allow-existing --python $PYTHON .venv"
  on all "cd dppo_jax && ~/.local/bin/uv pip install --quiet --python .venv/bin/python \
--constraint requirements/$PYTHON.lock --editable '.[tpu,gcs,wandb]'"
}

do_copy() { copy "$@"; }

do_run() {
  local arguments log command alone
  names
  need BUCKET my-bucket
  arguments=$(train_arguments "$@")
  log=runs/$1.log
  command="PYTHONUNBUFFERED=1 nohup .venv/bin/dppo-train $arguments"
  alone="! kill -0 \$(cat runs/$1.pid 2> /dev/null) 2> /dev/null || { echo $1 runs already: stop it first >&2; exit 1; }"
  on all "cd dppo_jax && mkdir -p runs && { $alone; } && { $command >> $log 2>&1 < /dev/null & echo \$! > runs/$1.pid; }"
}

do_watch() {
  one_name watch "$@"
  names
  on 0 "tail -n +1 -F dppo_jax/runs/$1.log"
}

do_stop() {
  one_name stop "$@"
  names
  on all "kill -TERM \$(cat dppo_jax/runs/$1.pid)"
}

do_delete() {
  no_more delete "$@"
  names
  tpu_vm delete "$TPU"
}

start "$@"
