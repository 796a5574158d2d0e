#!/usr/bin/env bash
# Installs what is missing into .venv and trains.
#   bash train.sh                                        the built-in run: from nothing to a model that sees, offline
#   bash train.sh --config configs/qwen7b_siglip.yaml    one experiment; more arguments as for train.py
#   NPROC=2 bash train.sh --config ...                   the same, data-parallel on two GPUs (torchrun)
#   ACCELERATE=configs/accelerate/fsdp2.yaml NPROC=8 bash train.sh --config ...      the model divided among eight
#   bash train.sh --config ... lora_lr=1e-4,3e-4         a run for each value, one after the other (sweep.py)
# The same line continues an interrupted run.
set -euo pipefail
cd "$(dirname "$0")"
source setup_env.sh
setup_env requirements.txt

if [ $# -gt 0 ]; then
    if [[ "$*" == *,* ]] && "$PYTHON" sweep.py --is_sweep "$@"; then
        exec "$PYTHON" sweep.py "$@"
    fi
    if [ -n "${ACCELERATE:-}" ]; then
        exec "$PYTHON" -m accelerate.commands.launch \
            --config_file "$ACCELERATE" --num_processes "${NPROC:-1}" train.py "$@"
    fi
    if [ "${NPROC:-1}" -gt 1 ]; then
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" train.py "$@"
    fi
    exec "$PYTHON" train.py "$@"
fi

SCENES=data/scenes
RUN=outputs/scenes
BEGIN=$SECONDS
mkdir -p "$RUN"
# The whole run is offline, and so small that a GPU would idle: it takes two CPU cores.
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

stage() {  # stage NAME COMMAND...: runs it unless it is done, and notes its seconds
    local name="$1" begin=$SECONDS
    shift
    if grep -qs "^$name " "$RUN/stages.txt"; then
        echo "== $name: done already"
        return
    fi
    echo "== $name"
    "$@"
    echo "$name $((SECONDS - begin))" >> "$RUN/stages.txt"
}

tower_and_decoder() {  # neither needs the other: one core each
    "$PYTHON" -m pretrain.tower tokenizer="$RUN/tokenizer" output="$RUN/tower" &
    local tower=$!
    # shellcheck disable=SC2064  # expanded now: the variable is gone when the trap runs
    trap "kill $tower 2>/dev/null || true" EXIT
    "$PYTHON" -m pretrain.decoder \
        scenes="$SCENES" tokenizer="$RUN/tokenizer" output="$RUN/decoder"
    wait "$tower"
    trap - EXIT
}

projector_and_lora() {  # two processes of one thread do more than one of two: the matrices are small
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 train.py --config configs/scenes.yaml
}

if [ -e "$RUN/report.json" ]; then
    echo "$RUN holds a finished run (see $RUN/report.md). To make it anew: rm -r $RUN"
    exit 0
fi
[ -d "$SCENES" ] || sed -i '/^scenes /d' "$RUN/stages.txt" 2>/dev/null || true
stage scenes "$PYTHON" -m dataprocess.scenes --output "$SCENES"
stage tokenizer "$PYTHON" -m pretrain.tokenizer scenes="$SCENES" output="$RUN/tokenizer"
stage tower_and_decoder tower_and_decoder
stage projector_and_lora projector_and_lora
echo "== report"
OMP_NUM_THREADS=2 "$PYTHON" report.py --run "$RUN" --scenes "$SCENES"
echo "The whole run took $((SECONDS - BEGIN)) seconds. Talk to the model:"
echo "  .venv/bin/python inference.py --checkpoint_path $RUN --image $SCENES/images/test/00003.png --text 'How many objects?'"
echo "  .venv/bin/python inference.py --checkpoint_path $RUN"
