#!/usr/bin/env bash
# SD3.5-Medium's true size on one H200 or H100, random weights: every figure of the update, part by part. There is no
# estimate to set beside them: compilers for GPUs report no cycles (for TPUs see tpu.sh).
#
#     benchmarks/h200.sh [step phases peer variants flags sweep startup]
#
# Without arguments all parts run, for BUDGET seconds together: a part that does not end in time is cut off, one that
# cannot begin is named and left out, and either can be asked for alone in another call. Each part's JSON stands in OUT
# and holds what was measured until then. In the environment: OUT (folder), BUDGET (seconds), BATCH, ATTENTION, REMAT,
# GPU (its name; asked of the driver by default), PYTHON.
# shellcheck disable=SC2329 # the parts are called by their names
set -u
[[ ${1:-} != --help ]] || { sed -n '2,/^# GPU/s/^# \{0,1\}//p' "$0"; exit; }
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-benchmarks/results}
BUDGET=${BUDGET:-480}
GPU=${GPU:-$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0)}
case $GPU in
  *H100*) NAME=h100 FITS=8 ;; # about 45 GiB under REMAT=dots, going by the TPU compiler; 16 need about 85
  *) NAME=h200 FITS=16 ;;
esac
BATCH=${BATCH:-$FITS}
ATTENTION=${ATTENTION:-cudnn}
REMAT=${REMAT:-dots}
PYTHON=${PYTHON:-python3}

CONFIG=(--config=configs/sd35m_opd.py --teachers=4)
CHOSEN=("--config.run.attention=$ATTENTION" "--config.run.remat=$REMAT")
SHORT=(--config.sampler.num_steps=3)  # two trained timesteps: the same program and memory, in less time
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
GIVEN=${XLA_FLAGS:-}
LAUNCHED=$(grep -h '^--' launch/xla_flags/gpu.txt | tr '\n' ' ')
export XLA_FLAGS="$GIVEN $LAUNCHED"
mkdir -p "$OUT"
failed=0

run() { # NAME COMMAND...: within what is left of the budget
  local name=$1 left=$((BUDGET - SECONDS)) status
  shift
  if ((left < 30)); then
    echo "== $name: left out, the budget of $BUDGET s is spent"
    failed=1
    return
  fi
  echo "== $name (at $SECONDS s): $*"
  timeout --kill-after=10 "$left" "$@"
  status=$?
  if ((status != 0)); then
    echo "== $name: ended with status $status at $SECONDS s"
    failed=1
  fi
}

bench() { # NAME FLAGS...
  local name=$1
  shift
  run "$name" "$PYTHON" -m fopd_jax.benchmark "${CONFIG[@]}" "--json=$OUT/${NAME}_$name.json" "$@"
}

step() { bench step "--batch=$BATCH" "${CHOSEN[@]}"; }

phases() { bench phases "--batch=$BATCH" --phases "${SHORT[@]}" "${CHOSEN[@]}"; }

variants() {
  local attention remat
  for remat in full attention dots none; do
    for attention in cudnn xla; do
      bench "variant_${attention}_$remat" "--batch=$BATCH" --steps=5 --warmup=1 "${SHORT[@]}" \
        "--config.run.attention=$attention" "--config.run.remat=$remat"
    done
  done
}

flags() { # none of the launchers' flags, each of them alone, and one that is often proposed
  local flag name
  for flag in --none $LAUNCHED --xla_gpu_enable_triton_gemm=false; do
    name=${flag#--} name=${name%%=*}
    XLA_FLAGS="$GIVEN ${flag#--none}" bench "flag_$name" \
      "--batch=$BATCH" --steps=5 --warmup=1 "${SHORT[@]}" "${CHOSEN[@]}"
  done
}

sweep() { # to the largest batch, so that as little as possible is kept
  bench sweep "--batch=$((4 * BATCH))" --steps=3 --warmup=1 --sweep "${SHORT[@]}" \
    "--config.run.attention=$ATTENTION" --config.run.remat=full
}

peer() { # neither side recomputes anything at this batch
  run peer "$PYTHON" benchmarks/compare.py "${CONFIG[@]}" --config.batch_size=4 \
    "--config.run.attention=$ATTENTION" --config.run.remat=none \
    --compile none blocks --steps=4 --warmup=1 --rounds=1 "--json=$OUT/${NAME}_compare.json"
}

startup() {
  run startup "$PYTHON" benchmarks/startup.py --config=configs/sd35m_opd.py --config.model.path= \
    "--config.batch_size=$BATCH" "${CHOSEN[@]}" "--json=$OUT/${NAME}_startup.json"
}

for part in "${@:-all}"; do
  case $part in
    step | phases | peer | variants | flags | sweep | startup) "$part" ;;
    all) for each in step phases peer variants flags sweep startup; do "$each"; done ;;
    *) echo "error: part: found $part, expected step, phases, peer, variants, flags, sweep, startup" >&2; exit 2 ;;
  esac
done
exit "$failed"
