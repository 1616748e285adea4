#!/usr/bin/env bash
# Train on this machine: on all of its GPUs, or in one process on its CPU.
set -euo pipefail
# shellcheck source=launch/checks.sh
source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh CONFIG.toml [--processes N] [--dry-run] [section.key=value ...]

Prints the command, torchrun's, then becomes it. One process a GPU; without a GPU, one on the CPU. The exit status is
the run's: 0 done or saved, 1 NaN, 2 a user's error, 3 a lost process, 4 a hung step.

  --processes N  that many processes; on a machine without a GPU they share its cores
  --dry-run      print the command only
  --version      print the versions and leave

examples:
  launch/local.sh configs/quickstart.toml
  launch/local.sh configs/quickstart.toml --processes 2 train.micro_batch=2 run.directory=runs/two
  launch/local.sh configs/atlas-340m.toml parallel.tensor=2 parallel.sequence=true
  launch/local.sh configs/atlas-340m.toml --dry-run
HELP
}

main() {
  local config="" processes="" dry="" gpus torchrun
  local -a overrides=()
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --version) say_versions ;;
      --processes) has_value "$1" $# "${2-}" && processes="$2" && shift ;;
      --dry-run) dry=1 ;;
      -*) refuse "option '$1' is unknown; see local.sh --help" ;;
      *)
        if is_override "$1"; then
          overrides+=("$1")
          shift
          continue
        fi
        [[ -z "$config" ]] || refuse "'$1' came after the config '$config'; write section.key=value"
        config="$1"
        ;;
    esac
    shift
  done
  is_config "$config"
  gpus="$(count_gpus)"
  processes="${processes:-$((gpus > 0 ? gpus : 1))}"
  is_number --processes "$processes" 1 2
  ((gpus == 0 || processes <= gpus)) || refuse "--processes $processes, but $gpus GPUs are visible; give at most $gpus"
  torchrun="$(command_of torchrun)"
  local -a launcher=("$torchrun")
  # With the python beside it: torchrun without its own trace, and with the run's status.
  [[ ! -x "${torchrun%/*}/python" ]] || launcher=("${torchrun%/*}/python" -m atlas_megatron.cli.torchrun)
  local -a command=("${launcher[@]}" --standalone --nproc-per-node "$processes" -m atlas_megatron.train
    "$config" ${overrides[@]+"${overrides[@]}"})
  typed "${command[@]}"
  [[ -z "$dry" ]] || exit 0
  # shellcheck source=launch/environment.sh
  source "$ROOT/launch/environment.sh" "$processes" "$gpus"
  exec "${command[@]}"
}

main "$@"
