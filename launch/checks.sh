# What local.sh, slurm.sh and ladder.sh share: where commands are, how to refuse, the words of a command line. Sourced.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# One line: what is wrong, what was given, what to do.
refuse() {
  local said="$*"
  echo "${0##*/}: ${said//$'\n'/ }" >&2
  exit 2
}

# The path of torchrun or atlas-train: in ATLAS_BIN where that is set, else in the .venv of `make setup`, else on PATH.
command_of() {
  local found="${ATLAS_BIN:-$ROOT/.venv/bin}/$1"
  if [[ ! -x "$found" && -z "${ATLAS_BIN:-}" ]]; then
    found="$(command -v "$1" || true)"
  fi
  [[ -x "$found" ]] ||
    refuse "$1 is not in ${ATLAS_BIN:-$ROOT/.venv/bin, nor on PATH}; run make setup, or set ATLAS_BIN to its folder"
  echo "$found"
}

# Prints the versions, as every command does, and leaves.
say_versions() {
  local command
  command="$(command_of atlas-train)" || exit 2
  exec "$command" --version
}

# $1 is section.key=value, and no path with an equals sign in it.
is_override() {
  [[ "$1" =~ ^[a-z_0-9]+\.[a-z_0-9]+= ]]
}

# GPUs that a process started here would see.
count_gpus() {
  local entry count=0
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    # CUDA sees nothing behind an entry that is negative.
    for entry in ${CUDA_VISIBLE_DEVICES//,/ }; do
      [[ "$entry" != -* ]] || break
      count=$((count + 1))
    done
    echo "$count"
  elif command -v nvidia-smi >/dev/null; then
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  else
    echo 0
  fi
}

# The option $1 came with a value: of so many words ($2) the next is not empty ($3), as that of an unset variable is.
has_value() {
  (($2 >= 2)) && [[ -n "$3" ]] || refuse "$1 came without a value; see ${0##*/} --help"
}

# The value $2 of the option $1 is a whole number of at least $3.
is_number() {
  [[ "$2" =~ ^[0-9]{1,9}$ ]] && ((10#$2 >= $3)) || refuse "$1 $2 is no whole number of at least $3; for example $1 $4"
}

# $1 is a config that can be read.
is_config() {
  [[ -n "$1" ]] || refuse "no config was given; for example ${0##*/} configs/quickstart.toml"
  [[ -f "$1" && -r "$1" ]] || refuse "config '$1' cannot be read; give a TOML file, for example configs/quickstart.toml"
}

# A command as it can be typed.
typed() {
  local words
  words="$(printf '%q ' "$@")"
  echo "${words% }"
}

# The directory of a sweep's element: that of the run $1, with the key $2 and the value $3 behind it.
element_directory() {
  echo "$1-$2=${3//\//_}"
}
