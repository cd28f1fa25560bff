#!/usr/bin/env bash
# Starts and stops runs on TPUs of GKE, with xpk: --help says how.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

SUBCOMMANDS=(create install copy run watch stop delete)

usage() {
  cat << 'END'
Starts and stops runs on TPUs of GKE, with xpk. Each command is printed before it is run.

  scripts/xpk.sh [--dry-run] SUBCOMMAND ...

  create                   the cluster
  install                  the image with what is here and what it needs (Dockerfile): built, and pushed to IMAGE
  copy FILE...             models and data from here to gs://BUCKET
  run NAME ARGUMENT...     dppo-train on every host; when a host is lost it goes on, up to RESTARTS times
  watch NAME               how the run stands, and what it says, as it says it
  stop NAME                the run writes a checkpoint and ends
  delete                   the cluster

  --dry-run                prints the commands and runs none

Variables:

  CLUSTER      its name                                           ZONE      such as us-east5-b
  PROJECT      of Google Cloud                                    TPU_TYPE  such as v5litepod-32
  IMAGE        such as europe-docker.pkg.dev/my-project/my-repository/dppo_jax
  BUCKET       for runs, models and data: my-bucket of gs://my-bucket
  SPOT         set to 1: cheaper, and preemptible                 RESTARTS  (50)

  scripts/xpk.sh run run-a --config configs/paper/dense_base.py --config.checkpoint.every=10
END
}

on_cluster() { # GROUP SUBCOMMAND ARGUMENT...
  installed xpk "in an environment of its own: pip install xpk==1.16.0"
  run xpk "$@" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
}

names() {
  need CLUSTER my-cluster
  need PROJECT my-project
  need ZONE us-east5-b
}

do_create() {
  no_more create "$@"
  names
  check_spot
  need TPU_TYPE v5litepod-32
  on_cluster cluster create --tpu-type="$TPU_TYPE" --num-slices=1 ${SPOT:+--spot}
}

do_install() {
  no_more install "$@"
  need IMAGE europe-docker.pkg.dev/my-project/my-repository/dppo_jax
  installed docker "https://docs.docker.com/engine/install says how"
  cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
  run docker build --platform=linux/amd64 --tag="$IMAGE" .
  run docker push "$IMAGE"
}

do_copy() { copy "$@"; }

do_run() {
  local RESTARTS=${RESTARTS:-50} arguments
  names
  need TPU_TYPE v5litepod-32
  need IMAGE europe-docker.pkg.dev/my-project/my-repository/dppo_jax
  need BUCKET my-bucket
  [[ $RESTARTS =~ ^[0-9]{1,4}$ ]] || fail "RESTARTS must be a whole number from 0 to 9999, not '$RESTARTS'"
  arguments=$(train_arguments "$@")
  # exec: the signal that comes before a preemption is for dppo-train. It ends with 2 then, and with 3 where another host
  # is lost, which xpk takes for a failure of the run unless it is told.
  on_cluster workload create --workload="$1" --tpu-type="$TPU_TYPE" --num-slices=1 --docker-image="$IMAGE" \
    --max-restarts="$RESTARTS" --restart-on-exit-codes=2,3,75 --termination-grace-period-seconds=300 \
    --command="exec dppo-train $arguments"
}

do_watch() {
  one_name watch "$@"
  names
  installed kubectl "gcloud components install kubectl"
  on_cluster workload list --filter-by-job="$1"
  run kubectl logs --follow --tail=-1 \
    --selector="xpk.google.com/workload=$1,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

do_stop() {
  one_name stop "$@"
  names
  on_cluster workload delete --workload="$1"
}

do_delete() {
  no_more delete "$@"
  names
  on_cluster cluster delete
}

start "$@"
