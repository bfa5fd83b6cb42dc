#!/usr/bin/env bash
# Install a wheel of DeadPool into the Python at hand, with what it needs: install.sh WHEEL. The torch that is there, a
# vendor's build, stays as it is: the index has none like it.
set -euo pipefail
python3 -c 'import torch' || { echo "deadpool: install.sh: the image has no torch" >&2; exit 1; }
held="$(mktemp)"
python3 -m pip list --format freeze | grep -iE '^(torch|triton|numpy|transformer[-_]engine)==' > "$held"
python3 -m pip install --no-cache-dir --no-deps "$1"
python3 - <<'PYTHON' | python3 -m pip install --no-cache-dir --constraint "$held" --requirement /dev/stdin
from importlib.metadata import requires

print("\n".join(line for line in requires("deadpool-megatron") if "extra ==" not in line and not line.startswith("torch")))
PYTHON
was="$(grep -i '^torch==' "$held")" now="$(python3 -m pip list --format freeze | grep -i '^torch==')"
[[ "$was" == "$now" ]] || { echo "deadpool: install.sh: $now was installed in the place of $was" >&2; exit 1; }
deadpool --version
