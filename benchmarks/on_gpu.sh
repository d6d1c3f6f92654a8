#!/usr/bin/env bash
# Everything to run on a borrowed GPU, in under 8 minutes: what is most wanted first.
# Each part has its own limit, and a part that fails doesn't stop the next. Results go to
# benchmarks/results/*-gpu.json, and to the folder given as the first argument, if any.
#
#   benchmarks/on_gpu.sh [OUT]
set -u
cd "$(dirname "$0")/.."
out=${1:-}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-python}

run() { # limit in seconds, name, command
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"/tmp/on_gpu_$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - start)) s"
  tail -n 3 "/tmp/on_gpu_$name.log"
  if [ -n "$out" ]; then
    mkdir -p "$out"
    cp "/tmp/on_gpu_$name.log" benchmarks/results/*-gpu*.json "$out" 2>/dev/null
  fi
}

"$python" -c 'import jax; assert jax.default_backend() == "gpu", jax.devices()' || {
  echo "on_gpu.sh needs an NVIDIA GPU: pip install -U 'jax[cuda12]'"
  exit 1
}
run 200 contenders "$python" -m benchmarks contenders
run 90 lengths "$python" -m benchmarks lengths --quick
run 50 generation "$python" -m benchmarks generation
run 70 tests "$python" -m pytest -n 4 -q -m "not slow" tests/ops tests/nn tests/attention
run 60 round "$python" -m pytest -n 0 -q tests/test_readme.py -k bring_your_own # train, generate
