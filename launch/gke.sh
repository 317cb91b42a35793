#!/usr/bin/env bash
# Train on GKE, on TPU slices or GPU nodes, as one JobSet (launch/gke_jobset.yaml).
#
#   launch/gke.sh run --image=IMAGE --shared=gs://BUCKET [--flags] [-- the program's flags]
#   launch/gke.sh run --image=IMAGE --shared=pvc:CLAIM --accelerator=gpu --hosts=4 [--flags] [-- the program's flags]
#
# image    build the container (docker) and push it
# render   print the JobSet
# run      create it
# status   the JobSet's and its pods' state
# logs     follow the first host's log (--host=3: the fourth's)
# stop     delete the JobSet: every host saves and stops; `run` continues
#
# Parameters are flags (--name=x) or environment variables (NAME=x):
# shellcheck disable=SC2034 # the template reads many of them
set -euo pipefail
: "${NAME:=fopd}"                    # the run's name on the cluster
: "${NAMESPACE:=default}"            # its namespace
: "${IMAGE:=}"                       # the container
: "${ACCELERATOR:=tpu}"              # tpu or gpu
: "${NODE_TYPE:=}"                   # GKE's label of the nodes; empty: tpu-v6e-slice or nvidia-h100-80gb
: "${TOPOLOGY:=16x16}"               # tpu: chips of a slice
: "${SLICES:=1}"                     # tpu: slices, joined by the data centre's network; config.mesh.data spans them
: "${HOSTS:=}"                       # hosts (a slice); tpu: empty is chips / chips a host
: "${CHIPS_PER_HOST:=}"              # accelerators of a host; empty: 4 (tpu) or 8 (gpu)
: "${SPOT:=}"                        # 1: run on Spot nodes
: "${SHARED:=}"                      # gs://BUCKET (Cloud Storage FUSE) or pvc:CLAIM (ReadWriteMany), shared by all hosts
: "${MOUNT:=/mnt/shared}"            # where; also the working directory of the program
: "${SERVICE_ACCOUNT:=default}"      # Kubernetes' account that may use the bucket
: "${WORKDIR:=runs/sd35m_opd}"       # the run's folder, relative to the mount
: "${CONFIG:=configs/sd35m_opd.py}"  # in the image
: "${XLA_FLAGS_FILE:=auto}"          # auto: launch/xla_flags/<accelerator>.txt; empty: none
: "${MEMORY_FRACTION:=0.92}"         # gpu: of the memory that JAX takes
: "${COORDINATOR_PORT:=8476}"        # gpu: of the first host
: "${MAX_RESTARTS:=20}"              # after crashes
: "${GRACE_SECONDS:=60}"             # between SIGTERM and SIGKILL; the save at SIGTERM needs up to 30
: "${HOST:=0}"                       # whose log
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/common.sh
source "$REPOSITORY/launch/common.sh"

json() { # a string, with nothing in it that the template's names could be found in
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$\{/\\u0024\{}"
}

json_list() { # strings
  local items=() item
  for item; do items+=("$(json "$item")"); done
  local IFS=,
  echo "[${items[*]}]"
}

toleration() { # a node's taint
  echo "{\"key\":\"$1\",\"operator\":\"Exists\",\"effect\":\"NoSchedule\"}"
}

# What differs between the two kinds of accelerator; what is given stays.
set_accelerator() {
  local defaults
  case $ACCELERATOR in
    tpu) defaults=(tpu-v6e-slice 4 google.com/tpu LIBTPU_INIT_ARGS) ;;
    gpu) defaults=(nvidia-h100-80gb 8 nvidia.com/gpu XLA_FLAGS) ;;
    *) die "--accelerator: found '$ACCELERATOR', expected tpu or gpu" ;;
  esac
  NODE_TYPE=${NODE_TYPE:-${defaults[0]}}
  CHIPS_PER_HOST=${CHIPS_PER_HOST:-${defaults[1]}}
  RESOURCE=${defaults[2]}
  FLAGS_VARIABLE=${defaults[3]}
  FLAGS=$(xla_flags "${XLA_FLAGS_FILE/#auto/launch/xla_flags/$ACCELERATOR.txt}")
  FLAGS=$(json "$FLAGS")
  "set_$ACCELERATOR"
}

set_tpu() {
  local chips=$((${TOPOLOGY//x/*}))
  HOSTS=${HOSTS:-$((chips / CHIPS_PER_HOST))}
  ((HOSTS * CHIPS_PER_HOST == chips)) ||
    die "--topology: $TOPOLOGY has $chips chips, but --hosts=$HOSTS have --chips-per-host=$CHIPS_PER_HOST"
  NODE_SELECTOR="\"cloud.google.com/gke-tpu-accelerator\":\"$NODE_TYPE\",\"cloud.google.com/gke-tpu-topology\":\"$TOPOLOGY\""
  JOBSET_ANNOTATIONS='{"alpha.jobset.sigs.k8s.io/exclusive-topology":"cloud.google.com/gke-nodepool"}' # a slice is one
  PRIVILEGED=true
  START=(--distributed=auto) # GKE tells the processes of one another
}

set_gpu() {
  require HOSTS
  [[ $SLICES == 1 ]] || die "--slices: found $SLICES, expected 1: GPU nodes have no slices"
  NODE_SELECTOR="\"cloud.google.com/gke-accelerator\":\"$NODE_TYPE\""
  JOBSET_ANNOTATIONS={}
  PRIVILEGED=false
  # Told outright: JAX would need rights on the cluster's API to find out. Kubernetes fills in $(HOST_INDEX).
  START=("--coordinator=$NAME-slice-0-0.$NAME:$COORDINATOR_PORT" "--num-processes=$HOSTS" "--process-id=\$(HOST_INDEX)")
}

# The folder that all hosts share. A bucket's metadata is not cached: what one host has written is there for all at once.
set_volume() {
  POD_ANNOTATIONS={}
  case $SHARED in
    gs://?*)
      POD_ANNOTATIONS='{"gke-gcsfuse/volumes":"true"}'
      VOLUME="{\"name\":\"shared\",\"csi\":{\"driver\":\"gcsfuse.csi.storage.gke.io\",\"volumeAttributes\":{\"bucketName\":\
$(json "${SHARED#gs://}"),\"mountOptions\":\"implicit-dirs,metadata-cache:ttl-secs:0\"}}}"
      ;;
    pvc:?*) VOLUME="{\"name\":\"shared\",\"persistentVolumeClaim\":{\"claimName\":$(json "${SHARED#pvc:}")}}" ;;
    *) die "--shared: found '$SHARED', expected gs://BUCKET or pvc:CLAIM" ;;
  esac
}

check_flags() {
  check_names NAME NAMESPACE
  check_counts SLICES HOSTS CHIPS_PER_HOST GRACE_SECONDS
  check_numbers MAX_RESTARTS HOST
  check TOPOLOGY '[1-9][0-9]*(x[1-9][0-9]*){1,2}' 'chips a side, as 16x16 or 4x4x4'
  check SPOT 1 '1 or nothing'
  check MEMORY_FRACTION '0?\.[0-9]+|1(\.0)?' 'a share, as 0.92'
  check COORDINATOR_PORT '[1-9][0-9]{1,4}' 'a port'
  check_program
}

render() {
  local text name
  require IMAGE SHARED
  set_accelerator
  set_volume
  TOLERATIONS="[$(toleration "$RESOURCE")${SPOT:+,$(toleration cloud.google.com/gke-spot)}]"
  NODE_SELECTOR="{$NODE_SELECTOR${SPOT:+,\"cloud.google.com/gke-spot\":\"true\"}}"
  RESOURCES="{\"$RESOURCE\":\"$CHIPS_PER_HOST\"}"
  MEMORY_FRACTION="\"${MEMORY_FRACTION//\"/}\""
  COMMAND=$(json_list python -m fopd_jax.main --config="/fopd/$CONFIG" --workdir="$WORKDIR" "${START[@]}" \
    --config.run.watchdog_abort=true "${PROGRAM_ARGS[@]}")
  text=$(<"$REPOSITORY/launch/gke_jobset.yaml")
  for name in $(grep -oE '[$]\{[A-Z_]+\}' <<<"$text" | tr -cd 'A-Z_\n'); do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

kubectl_in() {
  run kubectl --namespace="$NAMESPACE" "$@"
}

create() {
  local jobset
  jobset=$(render)
  kubectl_in apply --filename=- <<<"$jobset"
  [[ ! $DRY_RUN ]] || echo "$jobset"
}

status() {
  kubectl_in get jobset "$NAME"
  kubectl_in get pods --output=wide --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
}

host_log() {
  local set=jobset.sigs.k8s.io/jobset-name=$NAME
  kubectl_in logs --follow --tail=1000 --container=train \
    --selector="$set,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=$HOST"
}

build_image() {
  require IMAGE
  run docker build --file="$REPOSITORY/launch/Dockerfile" --build-arg="EXTRA=$ACCELERATOR" --tag="$IMAGE" "$REPOSITORY"
  run docker push "$IMAGE"
}

verb=${1:---help}
[[ $verb != --help ]] || parse_flags --help
parse_flags "${@:2}"
check_flags
case $verb in
  image) build_image ;;
  render) render ;;
  run) create ;;
  status) status ;;
  logs) host_log ;;
  stop) kubectl_in delete jobset "$NAME" --cascade=foreground ;;
  *) die "found '$verb', expected image, render, run, status, logs or stop" ;;
esac
