#!/usr/bin/env bash
# Everything that is measured on one NVIDIA GPU, in at most 8 minutes; the last line is one JSON object.
#
#   bash benchmarks/gpu.sh [--output=DIR] [--budget_s=480] [--tiny]     see python -m benchmarks.gpu --help
#   bash benchmarks/gpu.sh wheels DIR [3.12]                            on a machine with a network: what to take along
#
# The GPU machine needs jax with CUDA, flax, optax, orbax-checkpoint, transformers, torch, opencv and jaxtyping. What
# else the way needs are small wheels (8 MB); with WHEELS=DIR they are used from there, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

packages="array-record beartype cloudpickle clu grain iniconfig loky ml-collections pluggy portpicker psutil pytest simplejpeg wrapt"

if [ "${1:-}" = wheels ]; then
  pins=$(for package in $packages; do grep -E "^$package==" requirements.txt; done)
  # shellcheck disable=SC2086
  exec python -m pip download --no-deps --only-binary=:all: --python-version "${3:-3.12}" -d "${2:?DIR}" $pins
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python -m pip install --quiet --no-deps --no-index --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi
python -m benchmarks.gpu "$@"
