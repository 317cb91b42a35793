#!/usr/bin/env bash
# Train on a Cloud TPU pod (one slice of TPU VMs) with gcloud.
#
#   launch/tpu_pod.sh run --zone=us-east5-b --shared=gs://BUCKET [--flags] [-- the program's flags]
#
# run      create the pod or use the one there is, install the committed repository on every host, start the program,
#          show its log until it ends; a pod that is preempted meanwhile is created again and the run goes on
# logs     every host's log so far
# status   the pod's state, and the program's on every host
# stop     let every host save and stop; the pod stays
# delete   the same, then give the pod back
#
# Parameters are flags (--tpu-name=x) or environment variables (TPU_NAME=x):
set -euo pipefail
: "${TPU_NAME:=fopd}"                # the pod's name
: "${ZONE:=}"                        # its zone
: "${PROJECT:=}"                     # empty: gcloud's own
: "${ACCELERATOR_TYPE:=v6e-256}"     # v5litepod-256 (v5e) and v6e-256 count chips; v5p-128 counts cores, two a chip
: "${RUNTIME_VERSION:=}"             # of the TPU VM's system; empty: the one for the accelerator
: "${SPOT:=}"                        # 1: cheaper, and may be preempted
: "${SERVICE_ACCOUNT:=}"             # that reads and writes the bucket; empty: the project's default
: "${SHARED:=}"                      # gs://BUCKET (gcsfuse) or HOST:/EXPORT (NFS), mounted on every host
: "${MOUNT:=/mnt/shared}"            # where; also the working directory of the program
: "${WORKDIR:=runs/sd35m_opd}"       # the run's folder, relative to the mount
: "${CONFIG:=configs/sd35m_opd.py}"  # in the repository
: "${XLA_FLAGS_FILE:=launch/xla_flags/tpu.txt}"  # in the repository; empty: none
: "${PYTHON_VERSION:=3.12}"          # on the hosts
: "${GRACE_SECONDS:=60}"             # between SIGTERM and SIGKILL; the save at SIGTERM needs up to 30
: "${MAX_RESTARTS:=20}"              # tries to create the pod or start on it again; and of the program, after crashes
: "${POLL_SECONDS:=30}"              # between looks at the pod's state, and tries
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$REPOSITORY/launch/common.sh"

tpu_vm() { # verb, then gcloud's arguments
  run gcloud compute tpus tpu-vm "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

# Call tpu_worker.sh on some hosts (`all`, or a number); a dry run also prints what it would do there.
on_hosts() { # hosts, the worker's verb
  local worker=launch/tpu_worker.sh flags=()
  [[ $2 != install && $2 != start ]] || flags+=("${SETTINGS[@]}")
  [[ $2 != start ]] || flags+=(-- "${PROGRAM_ARGS[@]}")
  tpu_vm ssh "$TPU_NAME" --worker="$1" --command="$(quoted bash "fopd/$worker" "$2" "${flags[@]}")" || return
  [[ ! $DRY_RUN ]] || DRY_RUN_PREFIX="  host " "$REPOSITORY/$worker" "$2" --dry-run "${flags[@]}" >/dev/null
}

# READY, PREEMPTED, …; NONE where there is no such pod.
pod_state() {
  query READY tpu_vm describe "$TPU_NAME" --format='value(state)' 2>/dev/null || echo NONE
}

program_state() {
  query exited on_hosts 0 state 2>/dev/null | tail -n 1
}

check_flags() {
  require ZONE ACCELERATOR_TYPE
  check_names TPU_NAME
  [[ $RUNTIME_VERSION ]] || case $ACCELERATOR_TYPE in
    v6e-*) RUNTIME_VERSION=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME_VERSION=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME_VERSION=v2-alpha-tpuv5-lite ;;
    *) die "--runtime-version is needed for --accelerator-type=$ACCELERATOR_TYPE" ;;
  esac
  check ACCELERATOR_TYPE '[a-z0-9]+-[1-9][0-9]*' 'a kind and a number, as v6e-256'
  check SPOT 1 '1 or nothing'
  check SHARED 'gs://.+|.+:/.*' 'gs://BUCKET or HOST:/EXPORT'
  check PYTHON_VERSION '3\.[0-9]+' 'a version, as 3.12'
  check_counts GRACE_SECONDS
  check_numbers MAX_RESTARTS POLL_SECONDS
  check_program
  xla_flags "$XLA_FLAGS_FILE" >/dev/null
}

create() {
  tpu_vm create "$TPU_NAME" --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" \
    --scopes=cloud-platform ${SPOT:+--spot} ${SERVICE_ACCOUNT:+"--service-account=$SERVICE_ACCOUNT"}
}

# Have a pod that is ready: wait for one that is being made or repaired, replace one that is gone for good.
bring_up() {
  local state
  while state=$(pod_state) && [[ $state != READY ]]; do
    case $state in
      NONE) create || { spend_restart && sleep "$POLL_SECONDS"; } ;; # no capacity may be there later
      PREEMPTED | TERMINATED | SUSPENDED | STOPPED) tpu_vm delete "$TPU_NAME" --quiet ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
  [[ ! $DRY_RUN ]] || create
}

install_everywhere() {
  local archive=${TMPDIR:-/tmp}/$TPU_NAME.tar.gz
  run git -C "$REPOSITORY" archive --format=tar.gz --prefix=fopd/ --output="$archive" HEAD &&
    tpu_vm scp "$archive" "$TPU_NAME:fopd.tar.gz" --worker=all &&
    tpu_vm ssh "$TPU_NAME" --worker=all --command='rm -rf fopd && tar xzf fopd.tar.gz' &&
    on_hosts all install
}

# Stay with the program: restart it where a host came back without it, until it ends or the pod is gone.
stay() {
  while [[ $(pod_state) == READY ]]; do
    on_hosts 0 follow || true  # ends with the program, and also when the connection breaks
    case $(program_state) in
      exited) return 0 ;;
      refused) die "the program found bad input, which no restart can mend; \`$0 logs\` shows which" ;;
      failed) die "the program failed $((MAX_RESTARTS + 1)) times; \`$0 logs\` shows why" ;;
      dead) spend_restart && on_hosts all start ;;
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
  return 1
}

spend_restart() {
  ((restarts++ < MAX_RESTARTS)) || die "gave up after $MAX_RESTARTS restarts on pod $TPU_NAME"
}

train() {
  local restarts=0
  while :; do
    bring_up
    # A pod can go at any moment, then these fail: start over with the next one.
    if install_everywhere && on_hosts all start && stay; then return 0; fi
    spend_restart
    sleep "$POLL_SECONDS"
  done
}

status() {
  echo "pod: $(pod_state)"
  on_hosts all state
}

verb=${1:---help}
[[ $verb != --help ]] || parse_flags --help
parse_flags "${@:2}"
check_flags
SETTINGS=()
for name in SHARED MOUNT WORKDIR CONFIG XLA_FLAGS_FILE PYTHON_VERSION GRACE_SECONDS MAX_RESTARTS; do
  flag=${name,,}
  SETTINGS+=("--${flag//_/-}=${!name}")
done
case $verb in
  run) train ;;
  logs | stop) on_hosts all "$verb" ;;
  status) status ;;
  delete)
    on_hosts all stop
    tpu_vm delete "$TPU_NAME" --quiet
    ;;
  *) die "found '$verb', expected run, logs, status, stop or delete" ;;
esac
