#!/usr/bin/env bash
# Start every rung of a ladder: a job each by launch/slurm.sh, or one after the other on this machine by launch/local.sh.
set -euo pipefail
# shellcheck source=launch/checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

usage() {
  cat <<'HELP'
usage: launch/ladder.sh LIST [--local] [--rungs A,B] [--runs DIR] [--dry-run] [options of slurm.sh or local.sh]
                        [section.key=value ...]

A line of the LIST is a config beside it and its nodes, as tools/ladder.py writes them; # begins a comment. Every rung
is checked before the first one starts. Without --local each becomes a job of its own nodes, with the same options.

  --local      train them here, one after the other, the first in the list first; stops where one fails
  --rungs A,B  only these of the list, by their configs' names
  --runs DIR   run.directory=DIR/RUNG of each (default: as the configs say); one DIR for each preset that is compared
  --dry-run    check, and print what would be started
  --version    print the versions and leave

examples:
  launch/ladder.sh configs/scale/gpu.list --partition gpu --time 24:00:00 --dry-run
  launch/ladder.sh configs/scale/gpu.list --partition gpu --rungs 20m,40m,85m --runs runs/omeganet memory.preset=omeganet
  launch/ladder.sh configs/scale/cpu.list --local --rungs 0.15m,0.3m
HELP
}

list="" here="" only="" runs="" dry=""
passed=() overrides=() rungs=() nodes=()

read_words() {
  local word
  while (($#)); do
    word="$1"
    if [[ "$word" == --*=* ]]; then
      set -- "${word%%=*}" "${word#*=}" "${@:2}"
      word="$1"
    fi
    case "$word" in
      -h | --help) usage; exit 0 ;;
      --version) say_versions ;;
      --local) here=1 ;;
      --dry-run) dry=1 ;;
      --rungs) has_value "$1" $# "${2-}" && only="$2" && shift ;;
      --runs) has_value "$1" $# "${2-}" && runs="${2%/}" && shift ;;
      --nodes) refuse "--nodes came with a list, which has each rung's own; change them there" ;;
      --job-name | --array) refuse "$word is of one job; a ladder has one a rung: leave it out" ;;
      # What else there is of options, slurm.sh and local.sh know, each with a value.
      --*) has_value "$1" $# "${2-}" && passed+=("$1" "$2") && shift ;;
      run.directory=*) refuse "'$word' would be the directory of every rung; write --runs DIR" ;;
      *)
        if is_override "$word"; then
          overrides+=("$word")
          shift
          continue
        fi
        [[ -z "$list" ]] || refuse "'$word' came after the list '$list'; write section.key=value"
        list="$word"
        ;;
    esac
    shift
  done
}

# Sets `rungs`, their configs, and `nodes`, as far as they are asked for.
read_list() {
  local config count name rest folder known=()
  [[ -n "$list" ]] || refuse "no list was given; for example ladder.sh configs/scale/gpu.list"
  [[ -f "$list" && -r "$list" ]] || refuse "list '$list' cannot be read; give a file that tools/ladder.py wrote"
  folder="$(dirname "$list")"
  while read -r config count rest || [[ -n "$config" ]]; do
    # As another system's editor writes a file: with a byte order mark, and carriage returns.
    config="${config#$'\xef\xbb\xbf'}" config="${config%$'\r'}" count="${count%$'\r'}" rest="${rest%$'\r'}"
    [[ -n "$config" && "$config" != \#* ]] || continue
    [[ "$count" =~ ^[1-9][0-9]{0,5}$ && (-z "$rest" || "$rest" == \#*) ]] ||
      refuse "line '$config $count $rest' of $list is no rung; write a config and its nodes, for example 20m.toml 1"
    name="$(basename "$config" .toml)"
    [[ " ${known[*]-} " != *" $name "* ]] || refuse "rung '$name' is in $list twice; leave one out, or rename it"
    known+=("$name")
    [[ -z "$only" || ",$only," == *",$name,"* ]] || continue
    [[ "$config" == /* ]] || config="$folder/$config"
    is_config "$config"
    rungs+=("$config")
    nodes+=("$count")
  done <"$list"
  local -a asked
  IFS=, read -ra asked <<<"$only"
  for name in ${asked[@]+"${asked[@]}"}; do
    [[ " ${known[*]-} " == *" $name "* ]] || refuse "rung '$name' is not in $list; it has: ${known[*]-}"
  done
  ((${#rungs[@]})) || refuse "list '$list' has no rung; write lines of a config and its nodes, for example 20m.toml 1"
}

# Sets `words`, what rung number $1 is started with.
words_of() {
  words=("${rungs[$1]}")
  [[ -n "$here" ]] || words+=(--nodes "${nodes[$1]}")
  words+=(${passed[@]+"${passed[@]}"} ${overrides[@]+"${overrides[@]}"})
  [[ -z "$runs" ]] || words+=("run.directory=$runs/$(basename "${rungs[$1]}" .toml)")
}

# Runs a check $2... of the rung $1 and prints what it says; refuses with its last line.
check() {
  local said
  if ! said="$("${@:2}" 2>&1)"; then
    head -n -1 <<<"$said" >&2
    said="$(tail -n 1 <<<"$said")"
    refuse "$(basename "$1" .toml): ${said#slurm.sh: }"
  fi
  echo "$said"
}

# Checks rung number $1; prints how it would be started.
check_rung() {
  local -a words
  words_of "$1"
  if [[ -z "$here" ]]; then
    check "${rungs[$1]}" "$ROOT/launch/slurm.sh" "${words[@]}" --dry-run
    return
  fi
  ((nodes[$1] == 1)) ||
    refuse "$(basename "${rungs[$1]}" .toml) wants ${nodes[$1]} nodes, and --local is this machine; choose others: --rungs"
  local processes place said
  processes="$(count_gpus)"
  for place in "${!passed[@]}"; do
    [[ "${passed[place]}" != --processes ]] || processes="${passed[place + 1]}"
  done
  is_number --processes "$processes" 0 2
  ((processes > 0)) || processes=1
  said="$(LOCAL_WORLD_SIZE="$processes" check "${rungs[$1]}" "$(command_of atlas-train)" "${rungs[$1]}" --dry-run \
    "world=$processes" ${overrides[@]+"${overrides[@]}"})" || exit 2
  # A later rung's would be found after hours.
  said="$(sed -n 's/^cannot train yet: //p' <<<"$said")"
  [[ -z "$said" || -n "$dry" ]] || refuse "$(basename "${rungs[$1]}" .toml): ${said%%$'\n'*}"
  check "${rungs[$1]}" "$ROOT/launch/local.sh" "${words[@]}" --dry-run
}

start_rung() {
  local -a words
  words_of "$1"
  if [[ -z "$here" ]]; then
    "$ROOT/launch/slurm.sh" "${words[@]}"
  else
    "$ROOT/launch/local.sh" "${words[@]}"
  fi
}

main() {
  local number said
  read_words "$@"
  read_list
  [[ -n "$here$dry" ]] || command -v sbatch >/dev/null ||
    refuse "sbatch is not on PATH; start this on a login node, or add --dry-run or --local"
  for number in "${!rungs[@]}"; do
    # Each takes seconds.
    echo "ladder.sh: checks $((number + 1)) of ${#rungs[@]}, $(basename "${rungs[number]}")" >&2
    said="$(check_rung "$number")" || exit 2
    [[ -z "$dry" ]] || echo "$said"
  done
  [[ -z "$dry" ]] || exit 0
  for number in "${!rungs[@]}"; do
    start_rung "$number" || refuse "${rungs[number]} was not started or did not end well; the rungs after it are not started"
  done
}

main "$@"
