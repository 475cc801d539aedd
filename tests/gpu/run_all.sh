#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: tests, then the loss on the device.
# With packed shards (SHARDS), folders of images (IMAGES) and a MobileNetV2's weights (TEACHER) in
# the environment it measures views and the training loop too. PYTHON overrides the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}

"$python" -m pytest tests/gpu -m gpu
"$python" tests/benchmarks/bench_loss.py --device cuda
"$python" tests/benchmarks/bench_loss.py --device cuda --pixels 6272 # 128 images at 224 px
if [ -n "${SHARDS:-}" ]; then
	"$python" tests/benchmarks/bench_views.py "$SHARDS" --processes "$(nproc)"
fi
if [ -n "${IMAGES:-}" ] && [ -n "${TEACHER:-}" ]; then
	# shellcheck disable=SC2086 # several folders
	"$python" tests/benchmarks/bench_loop.py $IMAGES --teacher "$TEACHER"
fi
