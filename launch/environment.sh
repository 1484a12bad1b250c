#!/usr/bin/env bash
# Makes the environment in $VENV (.venv) that the other scripts, and the image of
# launch/Dockerfile, run in: this project with its experiments, and JAX for a platform.
#
#   launch/environment.sh cpu|gpu|tpu
#
# One that it has made is left as it is, and one that it could not finish is begun anew.
# One that somebody else has made is used as it is.
set -euo pipefail

platform=${1:-none}
case $platform in
  cpu) requirement='jax' ;;
  gpu) requirement='jax[cuda12]' ;;
  tpu) requirement='jax[tpu]' ;;
  *)
    echo "usage: $0 cpu|gpu|tpu" >&2
    exit 2
    ;;
esac

cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
ours=$venv/.made-by-launch
ready=$venv/.ready-for-$platform
if [ -e "$ready" ] || { [ -x "$venv/bin/python" ] && [ ! -e "$ours" ]; }; then
  exit 0
fi

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' || true)
case $version in
  3.1[1-9] | 3.[2-9][0-9]) ;;
  *)
    echo "error: $python is ${version:-no Python that runs}: expected Python 3.11 or" \
      "newer; name one with PYTHON=..." >&2
    exit 1
    ;;
esac

# Before anything else is there: what stops now leaves an environment that is not ready.
mkdir -p "$venv"
touch "$ours"
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[imagenet]' "$requirement"
touch "$ready"
