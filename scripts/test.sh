#!/usr/bin/env bash
# Runs the tests; options and files for pytest may follow. Enough on a fresh machine with Python 3.11.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m pytest "$@"
