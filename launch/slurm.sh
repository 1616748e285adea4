#!/usr/bin/env bash
# Submit a run to SLURM, after checking what can be checked: launch/job.sbatch, with launch/node.sh on every node.
set -euo pipefail
# shellcheck source=launch/checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

usage() {
  cat <<'HELP'
usage: launch/slurm.sh CONFIG.toml --nodes N (--gpus-per-node G | --gpus-per-node 0 --processes-per-node P) [options]
                       [section.key=value ...]

Checks the config for that many processes, then submits one job. The job saves before its time limit, requeues itself
and goes on; after preemption, a lost node or a crash too, from the newest whole checkpoint.

  --nodes N               nodes
  --gpus-per-node G       GPUs of a node, a process each (default 8); 0: a cluster of CPUs
  --processes-per-node P  CPU processes of a node (with --gpus-per-node 0; default 1)
  --time HH:MM:SS         time limit of each start (default: the partition's)
  --partition NAME        must exist (default: the cluster's)
  --account NAME
  --job-name NAME         default: the config's name
  --memory-per-gpu SIZE   for example 80GiB: refuses a run that would not fit, and says what would change that
  --container IMAGE       run in it, by pyxis
  --apptainer IMAGE       run in it, by apptainer
  --array KEY=A,B,C       a sweep: one run for each value, each with a run.directory of its own
  --requeue-limit N       restarts in a row that bring no new checkpoint before the job gives up (default 3)
  --save-before SECONDS   how long before the time limit the run saves and requeues (default 300)
  --cpus-per-node N       share nodes, and take this many cores (default: whole nodes)
  --logs DIR              default runs/logs
  --sbatch OPTION         any other option of sbatch, for example --sbatch=--qos=high
  --dry-run               check the config and print what would be submitted
  --version               print the versions and leave

Logs: DIR/NAME-JOB.out is the job's own, DIR/NAME-JOB/node-NODE.log all that a node says, and below
DIR/NAME-JOB/start-K/NODE every rank's stdout and stderr by themselves.

examples:
  launch/slurm.sh configs/atlas-340m.toml --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu
  launch/slurm.sh configs/atlas-340m.toml --nodes 2 --partition gpu --dry-run parallel.tensor=2 parallel.sequence=true
  launch/slurm.sh configs/atlas-170m.toml --nodes 1 --partition gpu --array train.lr=1e-3,3e-3,6e-3
  launch/slurm.sh configs/quickstart.toml --nodes 2 --gpus-per-node 0 --processes-per-node 2 --partition cpu \
    train.micro_batch=1
HELP
}

config="" nodes="" gpus=8 processes="" time="" partition="" account="" name="" memory="" container="" array="" dry=""
limit=3 before=300 cpus="" logs=runs/logs
overrides=() others=()

read_words() {
  local word
  while (($#)); do
    word="$1"
    # --option=value is --option value.
    if [[ "$word" == --*=* ]]; then
      set -- "${word%%=*}" "${word#*=}" "${@:2}"
      word="$1"
    fi
    case "$word" in
      -h | --help) usage; exit 0 ;;
      --version) say_versions ;;
      --dry-run) dry=1 ;;
      --*) has_value "$word" $# "${2-}" && read_option "$word" "$2" && shift ;;
      -*) refuse "option '$word' is unknown; see slurm.sh --help" ;;
      *)
        if is_override "$word"; then
          overrides+=("$word")
          shift
          continue
        fi
        [[ -z "$config" ]] || refuse "'$word' came after the config '$config'; write section.key=value"
        config="$word"
        ;;
    esac
    shift
  done
}

read_option() {
  case "$1" in
    --nodes) nodes="$2" ;;
    --gpus-per-node) gpus="$2" ;;
    --processes-per-node) processes="$2" ;;
    --time) time="$2" ;;
    --partition) partition="$2" ;;
    --account) account="$2" ;;
    --job-name) name="$2" ;;
    --memory-per-gpu) memory="$2" ;;
    --container) container="pyxis:$2" ;;
    --apptainer) container="apptainer:$2" ;;
    --array) array="$2" ;;
    --requeue-limit) limit="$2" ;;
    --save-before) before="$2" ;;
    --cpus-per-node) cpus="$2" ;;
    --logs) logs="$2" ;;
    --sbatch) others+=("$2") ;;
    *) refuse "option '$1' is unknown; see slurm.sh --help" ;;
  esac
}

# SLURM's time $1 in seconds: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]].
seconds_of() {
  local days=0 rest="$1"
  local -a parts
  [[ "$rest" != *-* ]] || { days="${rest%%-*}" && rest="${rest#*-}:0:0"; }
  IFS=: read -ra parts <<<"$rest"
  # Without days one or two numbers are minutes and seconds.
  [[ "$1" == *-* || ${#parts[@]} -gt 2 ]] || parts=(0 "${parts[@]}")
  echo $((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]:-0} * 60 + 10#${parts[2]:-0}))
}

check_words() {
  is_config "$config"
  [[ -n "$nodes" ]] || refuse "--nodes is missing; for example --nodes 16"
  is_number --nodes "$nodes" 1 16
  is_number --gpus-per-node "$gpus" 0 8
  is_number --requeue-limit "$limit" 0 3
  is_number --save-before "$before" 1 300
  [[ -z "$cpus" ]] || is_number --cpus-per-node "$cpus" 1 32
  if ((gpus > 0)); then
    [[ -z "$processes" ]] ||
      refuse "--processes-per-node $processes with --gpus-per-node $gpus; a GPU has one process: leave it out"
    processes="$gpus"
  fi
  processes="${processes:-1}"
  is_number --processes-per-node "$processes" 1 2
  [[ -z "$time" || "$time" =~ ^([0-9]{1,6}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}$ ]] ||
    refuse "--time $time is no time; write minutes, HH:MM:SS or D-HH:MM:SS, for example --time 24:00:00"
  # Asked to save as soon as it starts, a job would take a step and requeue, for ever.
  [[ -z "$time" ]] || (($(seconds_of "$time") > 10#$before)) ||
    refuse "--time $time is no longer than --save-before $before (seconds); give more time, or a shorter --save-before"
  [[ -z "$array" || ("$array" =~ ^[a-z_0-9]+\.[a-z_0-9]+=.*[^,]$ && "$array" != *$'\n'*) ]] ||
    refuse "--array $array is no sweep; write section.key=A,B,C, for example --array train.lr=1e-3,3e-3"
  name="${name:-$(basename "$config" .toml)}"
  [[ "$name" =~ ^[A-Za-z0-9._-]+$ ]] || refuse "--job-name '$name' becomes a folder's name; use letters, digits, . _ -"
}

# Sets `words`, the overrides of the sweep's value $1 with its directory $2.
element() {
  local word
  words=()
  for word in ${overrides[@]+"${overrides[@]}"}; do
    [[ "$word" == run.directory=* ]] || words+=("$word")
  done
  words+=("${array%%=*}=$1" "run.directory=$2")
}

# What a dry run of the config with the overrides $@ says; refuses where it does. The shape of a node is the job's.
dry_run() {
  local said
  said="$(COLUMNS=120 LOCAL_WORLD_SIZE="$processes" "$atlas_train" "$config" --dry-run "world=$((nodes * processes))" \
    ${memory:+"memory=$memory"} "$@" 2>&1)" ||
    refuse "$nodes nodes of $processes: $(grep '^atlas-train: ' <<<"$said" || tail -n 1 <<<"$said")"
  if [[ -n "$memory" ]] && grep -q '^does not fit' <<<"$said"; then
    sed -n '/^does not fit/,$p' <<<"$said" >&2
    refuse "--memory-per-gpu $memory is too little for $nodes nodes of $processes; make one of these changes"
  fi
  echo "$said"
}

# Sets `directory`, the run.directory of a dry run's report $1, where it stands as a TOML string.
read_directory() {
  local rest character
  rest="$(sed -n '/^\[run\]/,/^\[/s/^directory = "\(.*\)"$/\1/p' <<<"$1")"
  directory=""
  while [[ "$rest" == *\\* ]]; do
    directory+="${rest%%\\*}"
    rest="${rest#*\\}"
    case "$rest" in
      u*) printf -v character '%b' "\\${rest:0:5}" && rest="${rest:4}" ;;
      [bfnrt]*) printf -v character '%b' "\\${rest:0:1}" ;;
      *) character="${rest:0:1}" ;;
    esac
    directory+="$character"
    rest="${rest:1}"
  done
  directory+="$rest"
}

# Refuses a run that would end before its first step by a dry run's report $1; only says so where all is a dry run.
can_train() {
  local missing
  missing="$(sed -n 's/^cannot train yet: //p' <<<"$1")"
  [[ -z "$missing" || -n "$dry" ]] || refuse "${missing%%$'\n'*}"
  [[ -z "$missing" ]] || sed -n 's/^cannot train yet: /slurm.sh: &/p' <<<"$1" >&2
}

# Sets `directory`; with a sweep, of the run without it.
check_config() {
  local said value element
  local -a values words
  local -A known=()
  atlas_train="$(command_of atlas-train)"
  said="$(dry_run ${overrides[@]+"${overrides[@]}"})"
  read_directory "$said"
  grep -E '^(fits|does not fit):' <<<"$said" || true
  # A sweep's own values may be what is missing.
  [[ -n "$array" ]] || can_train "$said"
  [[ -n "$array" ]] || return 0
  IFS=, read -ra values <<<"${array#*=}"
  for value in "${values[@]}"; do
    element="$(element_directory "$directory" "${array%%=*}" "$value")"
    [[ -z "${known[$element]-}" ]] || refuse "--array $array makes two runs of $element; give each value once"
    known["$element"]=1
    element "$value" "$element"
    said="$(dry_run "${words[@]}")"
    can_train "$said"
  done
}

check_cluster() {
  command -v sbatch >/dev/null ||
    refuse "sbatch is not on PATH; start this on a login node, or add --dry-run to see what it would submit"
  [[ -z "$partition" || -n "$(sinfo --noheader --partition "$partition" --format %R)" ]] ||
    refuse "--partition $partition does not exist; choose one of $(sinfo --noheader --format %R | sort -u | paste -sd ' ')"
}

# Sets `submission`.
compose() {
  local id="%j" torchrun=torchrun
  [[ "$logs" == /* ]] || logs="$PWD/$logs"
  # A container brings its own.
  [[ -n "$container" ]] || torchrun="$(command_of torchrun)"
  submission=(sbatch --parsable --job-name "$name" --nodes "$nodes" --ntasks-per-node 1 --chdir "$PWD"
    --signal "B:USR1@$before")
  ((gpus == 0)) || submission+=(--gpus-per-node "$gpus")
  if [[ -n "$cpus" ]]; then
    submission+=(--cpus-per-task "$cpus")
  else
    submission+=(--exclusive --mem 0)
  fi
  [[ -z "$time" ]] || submission+=(--time "$time")
  [[ -z "$partition" ]] || submission+=(--partition "$partition")
  [[ -z "$account" ]] || submission+=(--account "$account")
  if [[ -n "$array" ]]; then
    local commas="${array//[^,]/}"
    submission+=(--array "0-${#commas}")
    id="%A_%a"
  fi
  submission+=(${others[@]+"${others[@]}"} --output "$logs/%x-$id.out" "$ROOT/launch/job.sbatch"
    launch="$ROOT/launch" processes="$processes" gpus="$gpus" limit="$limit" logs="$logs" directory="$directory"
    torchrun="$torchrun" container="$container" sweep="$array" -- "$config")
  local word
  for word in ${overrides[@]+"${overrides[@]}"}; do
    [[ -n "$array" && "$word" == run.directory=* ]] || submission+=("$word")
  done
}

main() {
  read_words "$@"
  check_words
  # Before the dry runs, which take seconds each.
  [[ -n "$dry" ]] || check_cluster
  check_config
  compose
  typed "${submission[@]}"
  [[ -z "$dry" ]] || exit 0
  mkdir -p "$logs" 2>/dev/null || refuse "--logs $logs cannot be made; give a folder of yours"
  local job
  job="$("${submission[@]}")" || refuse "sbatch did not take the job; it says why above"
  echo "job ${job%%;*}; its logs: $logs/$name-${job%%;*}*"
}

main "$@"
