# shellcheck shell=bash
# What the launchers share. A launcher starts with one line for each parameter,
#     : "${SOME_NAME:=default}" # what it is
# and `parse_flags` makes a flag of each (--some-name=value); --help prints these lines. It sets REPOSITORY first.

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
        return
        ;;
      --dry-run) DRY_RUN=1 ;;
      --help) sed -n '2,/^REPOSITORY=/{s/^# \{0,1\}//p;t;/^#$/p;/^: /p}' "$0" && exit ;;
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

# Stop unless all these parameters have a value.
require() {
  local name
  for name; do
    [[ ${!name} ]] || die "--$(tr '[:upper:]_' '[:lower:]-' <<<"$name") is needed (--help says what it is)"
  done
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
