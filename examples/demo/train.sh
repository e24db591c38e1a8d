#!/usr/bin/env bash
# Trains the demo model on, with the project's own fairseq-train.
#
#     examples/demo/train.sh CORPUS CHECKPOINT SPM DICT OUT [fairseq-train options, which come last and win]
#
# CORPUS      folder with train.tsv.gz, valid.tsv.gz and multilingual/ (examples/demo/prepare.py says what is in them)
# CHECKPOINT  x.pt, or x.pt of x-shared.pt and x-rank-*.pt: where to begin
# SPM, DICT   its SentencePiece model and its dictionary
# OUT         text, binarised data and checkpoints go here
#
# examples/demo/README.md says what came of it, and examples/demo/training.log is the log of that run.
set -euo pipefail
if [ $# -lt 5 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; fi
corpus=$1 checkpoint=$2 spm=$3 dict=$4 out=$5
shift 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# glibc gives large blocks back to the system at once, and touching fresh pages is a fifth of a step's time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ ! -f "$out/data/train.src-tgt.src.idx" ]; then
    # German was the weakest language: its sentences twice.
    python "$here/prepare.py" "$corpus" "$out/text" --spm "$spm" --weight deu_Latn=2
    fairseq-preprocess -s src -t tgt --trainpref "$out/text/train" --validpref "$out/text/valid" \
        --srcdict "$dict" --joined-dictionary --destdir "$out/data"
fi

# architecture.args is the checkpoint's. The first target token is the language, which is given, not learned.
fairseq-train "$out/data" --user-dir "$(moe-opt user-dir)" --task translation -s src -t tgt \
    $(< "$here/architecture.args") \
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --ignore-prefix-size 1 \
    --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --dropout 0.0 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --bf16 --cpu \
    --lr 2e-3 --lr-scheduler polynomial_decay --warmup-updates 250 --total-num-update 4500 --max-update 4500 \
    --max-tokens 4096 --finetune-from-model "$checkpoint" --save-dir "$out/checkpoints" \
    --validate-interval-updates 500 --save-interval-updates 500 --keep-interval-updates 6 --no-epoch-checkpoints \
    --seed 1 --log-format simple --no-progress-bar --log-interval 100 --num-workers 0 "$@"
