#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them:  bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
setup_env requirements-dev.txt
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -q --durations=15 "$@"
