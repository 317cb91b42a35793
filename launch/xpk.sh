#!/usr/bin/env bash
# Train on a GKE cluster of TPUs that XPK made, with `xpk workload create` (flags as of xpk 1.16).
#
#   launch/xpk.sh run --cluster=CLUSTER --zone=us-east5-b --docker-image=IMAGE --storage=NAME [--flags] [-- the program's]
#
# run      create the workload; `launch/gke.sh image` makes the image
# list     the cluster's workloads
# stop     delete the workload: every host saves and stops; `run` continues
#
# Parameters are flags (--tpu-type=x) or environment variables (TPU_TYPE=x):
set -euo pipefail
: "${CLUSTER:=}"                     # XPK's cluster
: "${WORKLOAD:=fopd}"                # the run's name on the cluster
: "${ZONE:=}"                        # the cluster's zone
: "${PROJECT:=}"                     # empty: gcloud's own
: "${DOCKER_IMAGE:=}"                # built from launch/Dockerfile with EXTRA=tpu
: "${TPU_TYPE:=v6e-256}"             # as XPK names it
: "${NUM_SLICES:=1}"                 # joined by the data centre's network; config.mesh.data spans them
: "${STORAGE:=}"                     # what `xpk storage attach` named the folder that all hosts share
: "${MOUNT:=/mnt/shared}"            # its mount point there; also the working directory of the program
: "${WORKDIR:=runs/sd35m_opd}"       # the run's folder, relative to the mount
: "${CONFIG:=configs/sd35m_opd.py}"  # in the image
: "${XLA_FLAGS_FILE:=launch/xla_flags/tpu.txt}"  # empty: none
: "${PRIORITY:=medium}"              # XPK's queue: very-low, low, medium, high or very-high
: "${MAX_RESTARTS:=20}"              # after preemptions and crashes together
: "${GRACE_SECONDS:=60}"             # between SIGTERM and SIGKILL; the save at SIGTERM needs up to 30
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$REPOSITORY/launch/common.sh"

xpk_workload() { # verb, then its flags
  run xpk workload "$@" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

create() {
  local program=(python -m fopd_jax.main --config="/fopd/$CONFIG" --workdir="$WORKDIR" --distributed=auto
    --config.run.watchdog_abort=true "${PROGRAM_ARGS[@]}")
  local xla
  require DOCKER_IMAGE STORAGE
  xla=$(xla_flags "$XLA_FLAGS_FILE")
  # XPK restarts after signals, but not after status 1 or 75, with which the program ends where another host's death
  # stops it, or where it hangs. It shall not after status 2, which is bad input.
  # `exec`: XPK sends SIGTERM to the shell that it starts.
  xpk_workload create --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
    --docker-image="$DOCKER_IMAGE" --storage="$STORAGE" --priority="$PRIORITY" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1,75 --termination-grace-period-seconds="$GRACE_SECONDS" \
    --env=PYTHONUNBUFFERED=1 --env="FOPD_JAX_CACHE=$MOUNT/cache" --env="LIBTPU_INIT_ARGS=$xla" \
    --command="cd $(quoted "$MOUNT") && exec $(quoted "${program[@]}")"
}

verb=${1:---help}
[[ $verb != --help ]] || parse_flags --help
parse_flags "${@:2}"
require CLUSTER ZONE
check_names WORKLOAD
check_counts NUM_SLICES GRACE_SECONDS
check_numbers MAX_RESTARTS
check TPU_TYPE '[a-z0-9]+-[1-9][0-9]*' 'a kind and a number, as v6e-256'
check PRIORITY 'very-low|low|medium|high|very-high' 'very-low, low, medium, high or very-high'
check_program
case $verb in
  run) create ;;
  list) xpk_workload list ;;
  stop) xpk_workload delete --workload="$WORKLOAD" ;;
  *) die "found '$verb', expected run, list or stop" ;;
esac
