#!/usr/bin/env bash
# SD3.5-Medium's true size on the TPU chips at hand, random weights: what an update takes, and beside it what the TPU
# compiler estimates that one such chip would take. The estimate knows no waits for DMA, so a chip is slower; by how much
# nobody has measured yet: please report what this prints.
#
#     benchmarks/tpu.sh [step phases estimate compare]
#
# Without arguments step, estimate and compare run, which take about 20 minutes, most of it compiling; `phases` times the
# update's parts, too, and takes as long again. Each part's JSON stands in OUT. In the environment: OUT (folder), KIND and
# CHIPS (v5e, v5p or v6e, and how many are here; asked of JAX by default), BATCH (images a chip), REMAT, PYTHON.
# shellcheck disable=SC2329 # the parts are called by their names
set -u
[[ ${1:-} != --help ]] || { sed -n '2,/^# CHIPS/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-benchmarks/results}
BATCH=${BATCH:-4}
REMAT=${REMAT:-attention}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [[ -z ${KIND:-} ]]; then
  read -r KIND CHIPS < <("$PYTHON" -c "
import jax
from fopd_jax.performance.topology import find_chip
chip = find_chip(jax.devices()[0].device_kind)
print(chip.kind if chip else jax.devices()[0].device_kind, jax.device_count())
")
fi
case ${KIND:-} in
  v5e | v6e) TOPOLOGY=$KIND:2x2 ;;
  v5p) TOPOLOGY=v5p:2x2x1 ;;
  *) echo "error: KIND: found ${KIND:-nothing}, expected a v5e, v5p or v6e here" >&2; exit 2 ;;
esac
CHIPS=${CHIPS:-1}
CONFIG=(--config=configs/sd35m_opd.py --teachers=4 "--config.run.remat=$REMAT")
LAUNCHED=$(grep -h '^--' launch/xla_flags/tpu.txt | tr '\n' ' ')
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} $LAUNCHED"
mkdir -p "$OUT"
failed=0

run() { # NAME COMMAND...
  local name=$1 status
  shift
  echo "== $name (at $SECONDS s): $*"
  "$@"
  status=$?
  if ((status != 0)); then
    echo "== $name: ended with status $status at $SECONDS s"
    failed=1
  fi
}

measured() { # NAME FLAGS...
  local name=$1
  shift
  run "$name" "$PYTHON" -m fopd_jax.benchmark "${CONFIG[@]}" "--batch=$((BATCH * CHIPS))" "$@" \
    "--json=$OUT/tpu_${KIND}_$name.json"
}

step() { measured step; }

phases() { measured phases --phases; }

estimate() { # in a process that sees no chip: one that is in use cannot be opened twice
  JAX_PLATFORMS=cpu run estimate "$PYTHON" -m fopd_jax.benchmark "${CONFIG[@]}" "--batch=$BATCH" --estimate \
    "--topology=$TOPOLOGY" "--json=$OUT/tpu_${KIND}_estimate.json"
}

compare() { # with the phases, where they were timed
  local name file
  for name in step phases; do
    file=$OUT/tpu_${KIND}_$name.json
    [[ ! -e $file ]] || run "compare $name" "$PYTHON" benchmarks/beside_estimate.py "$file" "$OUT/tpu_${KIND}_estimate.json"
  done
}

for part in "${@:-all}"; do
  case $part in
    step | phases | estimate | compare) "$part" ;;
    all) for each in step estimate compare; do "$each"; done ;;
    *) echo "error: part: found $part, expected step, phases, estimate, compare" >&2; exit 2 ;;
  esac
done
exit "$failed"
