#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice, a process on each.
#
#   launch/tpu_slice.sh NAME ZONE experiments.inception --config=VARIANT \
#       --workdir=/mnt/shared/runs/bn_x30 --data_dir=/mnt/data
#
# The project is copied to every worker first, as it is here: with what is not committed,
# without what git ignores. The workdir must be on a file system that all workers share;
# docs/launch.md says which will do.
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 NAME ZONE MODULE [ARGUMENTS ...]" >&2
  exit 2
fi
name=$1
zone=$2
shift 2

cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
archive=$folder/bn_jax.tar.gz
if [ -e .git ] && git rev-parse --git-dir >/dev/null 2>&1; then
  # Of the files that git knows of, those that were not deleted.
  git ls-files --cached --others --exclude-standard -z |
    while IFS= read -r -d '' file; do
      if [ -e "$file" ]; then printf '%s\0' "$file"; fi
    done >"$folder/files"
  changed=$(git status --porcelain --untracked-files=all | wc -l)
  echo "Copying the project as it is here: commit $(git rev-parse --short HEAD)," \
    "and $((changed)) files that differ from it." >&2
else
  # An unpacked archive: all but what .gitignore names.
  find . -type d \( -name '.venv*' -o -name __pycache__ -o -name runs -o -name '.*_cache' \
    -o -name build -o -name dist \) -prune -o -type f -print0 >"$folder/files"
  echo "Copying the project as it is here, which is no clone." >&2
fi
tar --create --gzip --file="$archive" --null --files-from="$folder/files"

on_all=("$name" "--zone=$zone" --worker=all)
gcloud compute tpus tpu-vm scp "$archive" "$name:bn_jax.tar.gz" "--zone=$zone" --worker=all
gcloud compute tpus tpu-vm ssh "${on_all[@]}" --command \
  "mkdir -p bn_jax && tar -xzf bn_jax.tar.gz -C bn_jax && bn_jax/launch/machine.sh tpu $(printf '%q ' "$@" --distributed=on)"
