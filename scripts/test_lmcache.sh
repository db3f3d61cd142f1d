#!/usr/bin/env bash
# Tests the LMCache plugin on LMCache itself, without a GPU, in an environment of its own, .venv-lmcache, which it makes.
# Options for pytest may follow. Takes a minute; the first time some more, to install.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
TQCOMPRESS_TEST_MODEL=$(python -c 'from tqcompress.models import find_model; print(find_model("llama").path)')
export TQCOMPRESS_TEST_MODEL

stamp=$({ cat pyproject.toml constraints.txt scripts/test_lmcache.sh; .venv/bin/python -V; pwd; } | cksum)
if [ "$stamp" != "$(cat .venv-lmcache/stamp 2>/dev/null)" ]; then
  echo "Installing into .venv-lmcache; this takes about five minutes, once." >&2
  [ -x .venv-lmcache/bin/pip ] || .venv/bin/python -m venv .venv-lmcache
  grep -v '^numpy' constraints.txt >.venv-lmcache/constraints.txt  # LMCache wants an older one
  .venv-lmcache/bin/python -m pip install -q -c .venv-lmcache/constraints.txt pytest -e '.[lmcache]'
  echo "$stamp" >.venv-lmcache/stamp
fi

export PATH="$PWD/.venv-lmcache/bin:$PATH"
export OMP_NUM_THREADS=1 LMCACHE_DISABLE_BANNER=1 LMCACHE_TRACK_USAGE=false
exec python -m pytest -p no:cacheprovider plugins/lmcache/tests "$@"
