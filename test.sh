#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them:  bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
setup_env requirements-dev.txt
"$PYTHON" -m ruff check .
# Two workers for two cores; a file stays with one worker, since its tests share what its fixtures make.
exec "$PYTHON" -m pytest -q --durations=15 --numprocesses=2 --dist=loadfile "$@"
