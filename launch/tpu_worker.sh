#!/usr/bin/env bash
# One host of a Cloud TPU pod; launch/tpu_pod.sh copies the repository there and calls this on every host.
#
#   launch/tpu_worker.sh install|start|follow|state|logs|stop [--flags] [-- the program's flags]
#
# The program runs as a systemd unit: it outlives the connection that started it, gets SIGTERM when the machine is
# taken away or `stop` is called, and starts again after a crash.
set -euo pipefail
: "${SHARED:=}"                      # gs://BUCKET (gcsfuse) or HOST:/EXPORT (NFS) to mount; empty: nothing
: "${MOUNT:=/mnt/shared}"            # where; also the working directory of the program
: "${WORKDIR:=runs/sd35m_opd}"       # the run's folder, as --workdir; relative to the mount
: "${CONFIG:=configs/sd35m_opd.py}"  # in the repository
: "${PYTHON_VERSION:=3.12}"          # of the virtual environment
: "${MAX_RESTARTS:=20}"              # of the program on one machine, after crashes
: "${GRACE_SECONDS:=60}"             # between SIGTERM and SIGKILL; the save at SIGTERM needs up to 30
: "${XLA_FLAGS_FILE:=launch/xla_flags/tpu.txt}"  # in the repository; empty: none
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$REPOSITORY/launch/common.sh"
UNIT=fopd
VENV=$HOME/fopd-venv

install_program() {
  run python3 -m pip install --quiet --user uv
  run "$HOME/.local/bin/uv" venv --quiet --allow-existing --python="$PYTHON_VERSION" "$VENV"
  run "$HOME/.local/bin/uv" pip install --quiet --python="$VENV" --editable="${REPOSITORY}[tpu]"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc host=https://packages.cloud.google.com/apt
  run sudo curl --silent --fail --output "$key" "$host/doc/apt-key.gpg"
  echo "deb [signed-by=$key] $host gcsfuse-$(source /etc/os-release && echo "$VERSION_CODENAME") main" |
    run sudo tee /etc/apt/sources.list.d/gcsfuse.list
  run sudo apt-get --quiet update
  run sudo apt-get --quiet --yes install gcsfuse
}

is_mounted() {
  [[ ! $DRY_RUN ]] && mountpoint --quiet "$MOUNT"
}

mount_shared() {
  ! is_mounted || return 0
  run sudo install --directory --owner="$(id -un)" "$MOUNT"
  case $SHARED in
    "") ;;
    gs://*)
      command -v gcsfuse >/dev/null || install_gcsfuse
      # No cached metadata: a file that one host has written must be there for all at once.
      run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "${SHARED#gs://}" "$MOUNT"
      ;;
    *:/*)
      run sudo apt-get --quiet --yes install nfs-common
      # A file that was not there a moment ago is looked for again.
      run sudo mount --types=nfs --options=hard,lookupcache=positive "$SHARED" "$MOUNT"
      ;;
    *) die "--shared: found '$SHARED', expected gs://BUCKET or HOST:/EXPORT" ;;
  esac
}

start() {
  local xla
  xla=$(xla_flags "$XLA_FLAGS_FILE")
  stop
  run sudo systemd-run --unit="$UNIT" --uid="$(id -un)" --working-directory="$MOUNT" --remain-after-exit \
    --setenv=PYTHONUNBUFFERED=1 --setenv="FOPD_JAX_CACHE=$MOUNT/cache" --setenv="LIBTPU_INIT_ARGS=$xla" \
    --property=KillMode=mixed --property=TimeoutStopSec="$GRACE_SECONDS" \
    --property=Restart=on-failure --property=RestartForceExitStatus=SIGTERM --property=RestartSec=15 \
    --property=RestartPreventExitStatus=2 \
    --property=StartLimitIntervalSec=infinity --property=StartLimitBurst=$((MAX_RESTARTS + 1)) \
    "$VENV/bin/python" -m fopd_jax.main --config="$REPOSITORY/$CONFIG" --workdir="$WORKDIR" --distributed=auto \
    --config.run.watchdog_abort=true "${PROGRAM_ARGS[@]}"
}

stop() {
  run sudo systemctl stop "$UNIT" || true          # there is none the first time
  run sudo systemctl reset-failed "$UNIT" || true
}

# running, auto-restart, exited (finished), refused (bad input), failed (given up), or dead (never started, or the machine
# was restarted)
state() {
  local state
  state=$(query exited run systemctl show --property=SubState --value "$UNIT")
  if [[ $state == failed && $(query 1 run systemctl show --property=ExecMainStatus --value "$UNIT") == 2 ]]; then
    state=refused
  fi
  echo "$state"
}

# Show the log while the program runs or restarts.
follow() {
  run journalctl --unit="$UNIT" --output=cat --lines=100 --follow &
  [[ ! $DRY_RUN ]] || wait $!
  while [[ $(state) =~ ^(running|auto-restart|start.*)$ ]]; do sleep 10; done
  kill $! 2>/dev/null || true
}

verb=${1:---help}
[[ $verb != --help ]] || parse_flags --help
parse_flags "${@:2}"
check SHARED 'gs://.+|.+:/.*' 'gs://BUCKET or HOST:/EXPORT'
case $verb in
  install)
    install_program
    mount_shared
    ;;
  start | follow | state | stop) "$verb" ;;
  logs) run journalctl --unit="$UNIT" --output=cat --lines=1000 --no-pager ;;
  *) die "found '$verb', expected install, start, follow, state, logs or stop" ;;
esac
