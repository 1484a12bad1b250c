#!/usr/bin/env bash
# Trains on one machine with all its devices: a laptop, a GPU machine, a TPU VM.
#
#   launch/machine.sh cpu experiments.mnist --workdir=runs/mnist
#   launch/machine.sh gpu experiments.inception --config=VARIANT --workdir=...
#   launch/machine.sh tpu ... --config.dry_run=True
#
# launch/environment.sh makes the environment in $VENV (.venv) where it is missing.
set -euo pipefail

# JAX is to fail, and not to train on the processor, where it finds no accelerator.
case ${1:-none} in
  cpu) platforms=cpu ;;
  gpu) platforms=cuda,cpu ;;
  tpu) platforms=tpu,cpu ;;
  *) platforms='' ;;
esac
if [ -z "$platforms" ] || [ $# -lt 2 ]; then
  echo "usage: $0 cpu|gpu|tpu MODULE [ARGUMENTS ...]" >&2
  exit 2
fi

cd "$(dirname "$0")/.."
launch/environment.sh "$1"
shift
export JAX_PLATFORMS=$platforms
exec "${VENV:-.venv}/bin/python" -m "$@"
