#!/usr/bin/env bash
# Train as several processes on this host, as several hosts would:
#
#   launch/local.sh --processes=2 --gpus=8 [--flags] [-- the program's flags]          # four GPUs each
#   launch/local.sh --processes=2 --simulated-devices=4 [--flags] [-- the program's flags]   # no GPU at all
#
# Ctrl-C or SIGTERM let all processes save and stop; the same command continues.
#
# Parameters are flags (--port=x) or environment variables (PORT=x):
set -euo pipefail
: "${PROCESSES:=2}"                  # how many
: "${GPUS:=}"                        # of this host, to be shared out evenly; empty: every process sees what there is
: "${SIMULATED_DEVICES:=}"           # in each process, on the CPU; empty: real ones
: "${CONFIG:=configs/miniature.py}"  # the experiment
: "${WORKDIR:=runs/local}"           # the run's folder
: "${PORT:=}"                        # of the coordinator, process 0; empty: any
: "${PYTHON:=python}"                # of the environment that the package is installed in
: "${LOGS:=}"                        # folder for the output of each process; empty: all of it here
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$REPOSITORY/launch/common.sh"

# The variables that give process $1 its devices, one a line.
devices_of() {
  if [[ $SIMULATED_DEVICES ]]; then
    echo JAX_PLATFORMS=cpu
    echo "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$SIMULATED_DEVICES"
  elif [[ $GPUS ]]; then
    local share=$((GPUS / PROCESSES))
    seq -s , $(($1 * share)) $((($1 + 1) * share - 1)) | sed 's/^/JAX_LOCAL_DEVICE_IDS=/'
  fi
}

start() { # number of the process
  local variables command
  mapfile -t variables < <(devices_of "$1")
  command=(env "${variables[@]}" "$PYTHON" -m fopd_jax.main --config="$CONFIG" --workdir="$WORKDIR"
    --coordinator="localhost:$PORT" --num-processes="$PROCESSES" --process-id="$1" "${PROGRAM_ARGS[@]}")
  if [[ $DRY_RUN ]]; then
    run "${command[@]}"
    return
  fi
  if [[ $LOGS ]]; then # not through `run`: signals are for the program itself
    "${command[@]}" >>"$LOGS/process_$1.log" 2>&1 &
  else
    "${command[@]}" &
  fi
  STARTED+=("$!")
}

# shellcheck disable=SC2329 # the trap calls it
stop() {
  kill -TERM "${STARTED[@]}" 2>/dev/null || true
}

wait_for() { # a child; `wait` alone also ends when a signal is trapped
  local status=0
  wait "$1" || status=$?
  while kill -0 "$1" 2>/dev/null; do
    status=0
    wait "$1" || status=$?
  done
  return "$status"
}

parse_flags "$@"
check_counts PROCESSES GPUS SIMULATED_DEVICES
((PROCESSES <= 1024)) || die "--processes: found $PROCESSES, expected at most 1024"
[[ ! $GPUS || ! $SIMULATED_DEVICES ]] || die "--gpus, --simulated-devices: found both, expected one of them"
check PORT '[1-9][0-9]{1,4}' 'a port'
((${PORT:-0} <= 65535)) || die "--port: found $PORT, expected a port, at most 65535"
check WORKDIR '[^[:cntrl:]]+' 'a folder'
PORT=${PORT:-$((20000 + RANDOM % 20000))}
[[ -f ${CONFIG%%:*} && -r ${CONFIG%%:*} ]] || die "--config: cannot read '${CONFIG%%:*}'"
[[ ! $GPUS ]] || ((GPUS % PROCESSES == 0)) || die "--gpus: found $GPUS, expected a multiple of --processes ($PROCESSES)"
[[ $DRY_RUN ]] || command -v "$PYTHON" >/dev/null || die "--python: found '$PYTHON', expected a program"
[[ ! -e $LOGS || -d $LOGS ]] || die "--logs: $LOGS is no folder"
[[ ! $LOGS ]] || run mkdir -p "$LOGS"
STARTED=()
trap stop TERM INT
for ((process = 0; process < PROCESSES; process++)); do start "$process"; done
status=0
for child in "${STARTED[@]}"; do wait_for "$child" || status=$?; done # when one dies, JAX ends the others
exit "$status"
