#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, a process on each.
#
#   launch/tpu_slice.sh NAME ZONE experiments.inception --config=VARIANT \
#       --workdir=/mnt/shared/runs/bn_x30 --data_dir=/mnt/data
#
# The project is copied to every worker first. The workdir must be on a file system
# that all workers share; docs/launch.md says which will do.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 NAME ZONE MODULE [ARGUMENTS ...]" >&2
  exit 2
fi
name=$1
zone=$2
shift 2

cd "$(dirname "$0")/.."
# What git knows: no environment, no runs.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

on_all=("$name" "--zone=$zone" --worker=all)
gcloud compute tpus tpu-vm scp "$archive" "$name:bn_jax.tar.gz" "--zone=$zone" --worker=all
gcloud compute tpus tpu-vm ssh "${on_all[@]}" --command \
  "mkdir -p bn_jax && tar -xzf bn_jax.tar.gz -C bn_jax && bn_jax/launch/machine.sh tpu $(printf '%q ' "$@" --distributed=on)"
