#!/usr/bin/env bash
# Trains on one machine with all its devices: a laptop, a GPU machine, a TPU VM.
#
#   launch/machine.sh cpu experiments.mnist --workdir=runs/mnist
#   launch/machine.sh gpu experiments.inception --config=VARIANT --workdir=...
#   launch/machine.sh tpu ... --config.dry_run=True
#
# The environment in $VENV (.venv) is made where it is missing.
set -euo pipefail

declare -A requirements=([cpu]='jax' [gpu]='jax[cuda12]' [tpu]='jax[tpu]')
platform=${1:-none}
if [ -z "${requirements[$platform]:-}" ] || [ $# -lt 2 ]; then
  echo "usage: $0 cpu|gpu|tpu MODULE [ARGUMENTS ...]" >&2
  exit 2
fi
shift

cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --editable . "${requirements[$platform]}"
fi
if [ "$platform" = cpu ]; then
  export JAX_PLATFORMS=cpu
fi
exec "$venv/bin/python" -m "$@"
