# shellcheck shell=bash
# What tpu_vm.sh and xpk.sh share: they source this file. Bad input is one sentence on stderr and status 2.

DRY_RUN=

fail() { # SENTENCE
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# As the shell would read it again: --flag='a value', and plain words as they are.
quoted() { # WORD
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  elif [[ $1 =~ ^(--[a-z-]+=)(.*)$ ]]; then
    printf '%s%s' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]@Q}"
  else
    printf '%s' "${1@Q}"
  fi
}

line() { # WORD...
  local word text=
  for word; do text+=" $(quoted "$word")"; done
  printf '%s' "${text# }"
}

# Prints a command and, unless --dry-run is given, runs it.
run() { # COMMAND ARGUMENT...
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(line "$@")"
  else
    printf '%s\n' "$(line "$@")" >&2
    "$@"
  fi
}

# Insertions, deletions and substitutions between two words.
distance() { # A B
  local a=$1 b=$2 i j cost
  local -a above here
  for ((j = 0; j <= ${#b}; j++)); do above[j]=$j; done
  for ((i = 1; i <= ${#a}; i++)); do
    here=("$i")
    for ((j = 1; j <= ${#b}; j++)); do
      cost=$((above[j - 1] + 1))
      [[ ${a:i-1:1} == "${b:j-1:1}" ]] && cost=${above[j - 1]}
      ((above[j] + 1 < cost)) && cost=$((above[j] + 1))
      ((here[j - 1] + 1 < cost)) && cost=$((here[j - 1] + 1))
      here[j]=$cost
    done
    above=("${here[@]}")
  done
  printf '%s' "${above[${#b}]}"
}

unknown() { # KIND WORD KNOWN...
  local kind=$1 word=$2 name best='' least=99 found
  shift 2
  for name; do
    found=$(distance "${word:0:40}" "$name")
    ((found < least)) && least=$found best=$name
  done
  ((2 * least <= ${#best})) && fail "unknown $kind '$word'; the nearest is '$best'"
  fail "unknown $kind '$word'; known: $*"
}

# Refuses a variable that is not set, and one that is no name: such as gs://bucket for BUCKET.
need() { # VARIABLE EXAMPLE
  local value=${!1:-}
  [[ $value ]] || fail "$1 is not set; write, say, export $1=$2"
  [[ $value =~ ^[A-Za-z0-9][A-Za-z0-9._:/-]*$ && $value != *://* ]] || fail "$1 must be a name, such as $2, not '$value'"
  [[ $1 != BUCKET || $value != */* ]] || fail "BUCKET must be a bucket's name alone, such as $2, not '$value'"
}

# SPOT is 1, or not set.
check_spot() {
  [[ ${SPOT:-1} == 1 ]] || fail "SPOT is 1 or not set, not '$SPOT'"
}

installed() { # TOOL HOW
  [[ $DRY_RUN ]] || command -v "$1" > /dev/null || fail "$1 is not installed; $2"
}

# Of a run: what both a folder and a workload of GKE may be called.
check_name() { # NAME
  [[ $1 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "a run's name is up to 40 small letters, digits and hyphens, such as run-a, not '$1'"
}

no_more() { # SUBCOMMAND ARGUMENT...
  (($# < 2)) || fail "$1 takes no argument, and '$2' is given"
}

one_name() { # SUBCOMMAND ARGUMENT...
  (($# >= 2)) || fail "$1 needs the name of a run, such as: $1 run-a"
  (($# == 2)) || fail "$1 takes the name of a run alone, and '$3' is given"
  check_name "$2"
}

# The command line of dppo-train for `run NAME ARGUMENT...`.
train_arguments() { # NAME ARGUMENT...
  local word config='' before=''
  (($# >= 1)) || fail "run needs the name of a run, and the arguments of dppo-train, such as: run run-a --config FILE"
  check_name "$1"
  for word in "${@:2}"; do
    [[ $before != --config || ($word && $word != -*) ]] || fail "--config needs a file, not '$word'"
    before=$word
    case $word in
      --config=) fail "--config needs a file" ;;
      --config | --config=*) config=1 ;;
      --workdir | --workdir=* | --distributed) fail "${word%%=*} is given by this script; leave it out" ;;
    esac
    [[ $word != *$'\n'* ]] || fail "an argument of dppo-train may not hold a new line: ${word@Q}"
  done
  [[ $before != --config ]] || fail "--config needs a file"
  [[ $config ]] || fail "run needs --config FILE, such as: run $1 --config configs/paper/dense_base.py"
  line --workdir "gs://$BUCKET/runs/$1" --distributed "${@:2}"
}

# Models and data, to the bucket that all hosts read.
copy() { # FILE...
  (($# >= 1)) || fail "copy needs files or folders, such as: copy models/mine"
  need BUCKET my-bucket
  installed gcloud "https://cloud.google.com/sdk/docs/install says how"
  local file
  for file; do
    [[ -e $file ]] || fail "there is no file or folder '$file'"
  done
  run gcloud storage cp --recursive "$@" "gs://$BUCKET/"
}

# Takes --dry-run and --help out, and calls do_SUBCOMMAND with the rest. `usage` and SUBCOMMANDS are the script's.
start() { # ARGUMENT...
  local word subcommand
  local -a words=()
  for word; do
    if [[ $word == --dry-run ]]; then DRY_RUN=1; else words+=("$word"); fi
  done
  set -- "${words[@]}"
  if (($# == 0)); then
    fail "no subcommand is given; known: ${SUBCOMMANDS[*]} (--help says what they do)"
  fi
  if [[ $1 == --help || $1 == -h || ${2:-} == --help ]]; then
    usage
    exit
  fi
  subcommand=$1
  [[ $subcommand != -* ]] || unknown option "$subcommand" --dry-run --help
  [[ " ${SUBCOMMANDS[*]} " == *" $subcommand "* ]] || unknown subcommand "$subcommand" "${SUBCOMMANDS[@]}"
  "do_$subcommand" "${@:2}"
}
