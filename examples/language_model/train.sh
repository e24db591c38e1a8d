#!/usr/bin/env bash
# Trains a small sparse language model with the project's own fairseq-train.
#
#     examples/language_model/train.sh CORPUS OUT [fairseq-train options, which come last and win]
#
# CORPUS  folder with train.txt.xz and valid.txt.xz (examples/language_model/prepare.py says what is in them)
# OUT     text, vocabulary, binarised data and checkpoints go here
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; fi
corpus=$1 out=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# glibc gives large blocks back to the system at once, and touching fresh pages is a fifth of a step's time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -f "$out/data/train.idx" ]; then
    python "$here/prepare.py" "$corpus" "$out/text"
    fairseq-preprocess --only-source --trainpref "$out/text/train.txt" --validpref "$out/text/valid.txt" \
        --destdir "$out/data"
fi

# In training an expert takes what it is given (capacity factor 2, the default of the branches); architecture.args has
# the capacity of evaluation.
fairseq-train "$out/data" --user-dir "$(moe-opt user-dir)" --task language_modeling --sample-break-mode none \
    $(< "$here/architecture.args") \
    --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --dropout 0.0 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --bf16 --cpu \
    --lr 3e-3 --lr-scheduler polynomial_decay --warmup-updates 250 --total-num-update 3000 --max-update 3000 \
    --batch-size 16 --save-dir "$out/checkpoints" --validate-interval-updates 500 --save-interval-updates 500 \
    --keep-interval-updates 2 --no-epoch-checkpoints \
    --seed 1 --log-format simple --no-progress-bar --log-interval 50 --num-workers 0 "$@"
