#!/usr/bin/env bash
# Compresses the KV cache of a small real model with a shipped recipe, and shows what that costs and saves.
# Enough on a fresh machine with Python 3.11; more options of `tqcompress apply` may follow.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec tqcompress apply recipes/balanced.yaml --model llama --out out/ "$@"
