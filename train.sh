#!/usr/bin/env bash
# Installs what is missing into .venv and trains.
#   bash train.sh --config configs/qwen7b_siglip.yaml train.max_steps=1000     one experiment; the same line continues it
#   NPROC=2 bash train.sh --config ...                                         data-parallel on two GPUs (torchrun)
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
setup_env requirements.txt

if [ $# -gt 0 ]; then
    if [ "${NPROC:-1}" -gt 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" train.py "$@"
    fi
    exec "$PYTHON" train.py "$@"
fi

# The default run: without arguments.
echo "train.sh: the default run is not part of this checkout; pass --config" >&2
exit 2
