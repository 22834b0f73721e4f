#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Print a Python of at least 3.12, preferring 3.12 itself, or say what to install.
set -u

is_new_enough() {
  "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

for candidate in "${PYTHON:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3 \
  "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3 /opt/*/bin/python3.12 \
  python3.13 python3.14 python3 python; do
  path=$(command -v "$candidate" 2>/dev/null) || continue
  if is_new_enough "$path"; then
    echo "$path"
    exit 0
  fi
done

echo "error: megatron_cream needs Python 3.12 or newer with its venv module, and none was found:" \
  "install it (Debian and Ubuntu: python3.12 and python3.12-venv; pyenv install 3.12;" \
  "uv python install 3.12) or name one with PYTHON=/path/to/python3.12" >&2
exit 1
