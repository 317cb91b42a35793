# shellcheck shell=bash
# What the launchers share. A launcher starts with one line for each parameter,
#     : "${SOME_NAME:=default}" # what it is
# and `parse_flags` makes a flag of each (--some-name=value), which --help lists. It sets REPOSITORY first, and checks
# every parameter before anything is created: what is wrong is one line and status 2.

DRY_RUN=${DRY_RUN:-} # not empty: print every command, run none
PROGRAM_ARGS=()      # what follows `--` on the command line, for the program
{ : >&3; } 2>/dev/null || exec 3>&1 # dry runs print here, even from inside $(…)

die() {
  echo "error: $*" >&2
  exit 2
}

# Set parameters from the command line: --name=value, --dry-run, --help, and after `--` the program's own arguments.
parse_flags() {
  local names name
  names=" $(sed -n 's/^: "${\([A-Z_]*\):=.*/\1/p' "$0" | tr '\n' ' ')"
  while (($#)); do
    case $1 in
      --)
        # shellcheck disable=SC2034 # the launchers read it
        PROGRAM_ARGS=("${@:2}")
        check_program_flags "${PROGRAM_ARGS[@]}"
        return
        ;;
      --dry-run) DRY_RUN=1 ;;
      --help) show_help && exit ;;
      --*=*)
        name=${1%%=*} && name=${name#--} && name=${name//-/_} && name=${name^^}
        [[ $names == *" $name "* ]] || die "no such flag: ${1%%=*} (--help lists them)"
        printf -v "$name" %s "${1#*=}"
        ;;
      *) die "found '$1', expected --name=value (--help lists them; the program's own flags follow --)" ;;
    esac
    shift
  done
}

check_program_flags() { # the words after --
  local word before=
  for word; do
    [[ $word == -* || ($before == -* && $before != *=*) ]] ||
      die "found '$word' after --, expected a flag of the program, as --config.batch_size=512"
    before=$word
  done
}

# What the launcher's first comment says, and all its flags with their defaults.
show_help() {
  local line parameter='^: "\$\{([A-Z_]+):=(.*)\}" +# (.*)$'
  while IFS= read -r line; do
    case $line in
      '#!'* | '#SBATCH'* | '# shellcheck'*) ;;
      '#'*) line=${line#'#'} && echo "${line# }" ;;
      REPOSITORY=*) break ;;
    esac
    [[ ! $line =~ $parameter ]] || show_flag "$(flag_of "${BASH_REMATCH[1]}")=${BASH_REMATCH[2]}" "${BASH_REMATCH[3]}"
  done <"$0"
  show_flag --dry-run "print every command, run none"
  show_flag --help "this"
  show_flag "-- …" "the program's own flags: python -m fopd_jax.main --help"
}

show_flag() { # and what it is
  printf '  %-36s  %s\n' "$@"
}

flag_of() { # a parameter
  local name=${1,,}
  echo "--${name//_/-}"
}

# Stop unless all these parameters have a value.
require() {
  local name
  for name; do
    [[ ${!name} ]] || die "$(flag_of "$name") is needed (--help says what it is)"
  done
}

# Stop unless a parameter is empty or matches a regular expression.
check() { # parameter, expression, in words
  local value=${!1}
  [[ ! $value || $value =~ ^($2)$ ]] || die "$(flag_of "$1"): found ${value@Q}, expected $3"
}

check_counts() {
  local name
  for name; do check "$name" '[1-9][0-9]{0,8}' 'a whole number from 1 on'; done
}

check_numbers() {
  local name
  for name; do check "$name" '[0-9]{1,9}' 'a whole number'; done
}

check_names() { # as Kubernetes and Google Cloud take them
  local name
  require "$@"
  for name; do
    check "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'at most 40 of a-z, 0-9 and -, from a letter on'
  done
}

# What the program is given: an experiment of the repository, and a folder on what all hosts share.
check_program() {
  require CONFIG WORKDIR
  (cd "$REPOSITORY" && [[ -f ${CONFIG%%:*} && -r ${CONFIG%%:*} ]]) || die "--config: cannot read '${CONFIG%%:*}' in $REPOSITORY"
  check WORKDIR '[^:[:cntrl:]]+' 'a folder that all hosts share'
  [[ ! -v MOUNT ]] || check MOUNT '/.+' 'an absolute path'
}

# The words as one line that a shell reads back as the same words.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf %s "${line# }"
}

# Run a command, or print it in a dry run.
run() {
  if [[ $DRY_RUN ]]; then
    printf '%s+ %s\n' "${DRY_RUN_PREFIX:-}" "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# Print what a command finds out, given as `run …` or a function that runs one; a dry run pretends that it is $1.
query() {
  "${@:2}" || return
  [[ ! $DRY_RUN ]] || echo "$1"
}

# The flags in a file of launch/xla_flags (a path in the repository, or a full one) on one line; none without a file.
xla_flags() {
  [[ -z $1 ]] || (cd "$REPOSITORY" && [[ -r $1 ]]) || die "--xla-flags-file: cannot read '$1'"
  [[ -z $1 ]] || (cd "$REPOSITORY" && sed -e '/^#/d' -e '/^$/d' "$1" | paste -s -d ' ' -)
}
