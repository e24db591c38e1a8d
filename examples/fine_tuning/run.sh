#!/usr/bin/env bash
# Fine-tunes the demo model on one language, nothing frozen, and runs the result in both front ends.
#
#     examples/fine_tuning/run.sh LANGUAGE OUT [PAIRS [TEST]]
#
# PAIRS is a table of target language, English and translation; without it, two thirds of the demo's own sentences.
# TEST is such a table to score with; without it, every third of PAIRS is kept apart.
# UPDATES (default 60) and LEARNING_RATE (default 3e-4) are taken from the environment.
#
# Steps: Transformers folder -> fairseq checkpoint; fairseq-train; the result through fairseq-generate; back to a
# Transformers folder; the result through hf_integration. chrF and BLEU before and after are printed.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
demo=$here/../demo
model=$demo/model
language=$1 out=$2 pairs=${3:-$demo/demo.tsv.gz} test=${4:-}
languages=eng_Latn,fra_Latn,deu_Latn,spa_Latn # in the order of their ids
updates=${UPDATES:-60}
plugin=$(moe-opt user-dir)
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 # see examples/demo/train.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$out"
moe-opt convert "$model" "$out/start/checkpoint.pt" --to fairseq
python "$here/prepare.py" "$pairs" "$model" "$language" "$out/text" ${test:+--test "$test"}
fairseq-preprocess --source-lang eng_Latn --target-lang "$language" --srcdict "$out/start/dict.txt" --joined-dictionary \
    --trainpref "$out/text/train" --validpref "$out/text/valid" --testpref "$out/text/test" --destdir "$out/data" > "$out/preprocess.log" 2>&1

echo "fine-tuning, $updates updates (log: $out/train.log)"
multilingual=(--task translation_multi_simple_epoch --langs "$languages" --lang-pairs "eng_Latn-$language"
    --encoder-langtok src --decoder-langtok)
# The learning rate falls to 0 at the last update.
fairseq-train "$out/data" --user-dir "$plugin" "${multilingual[@]}" $(< "$demo/architecture.args") \
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 \
    --moe-gate-loss-wt 0.01 --moe-gate-loss-combine-method sum --dropout 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --bf16 --cpu \
    --lr "${LEARNING_RATE:-3e-4}" --lr-scheduler polynomial_decay --warmup-updates $((updates / 10)) \
    --total-num-update "$updates" --max-update "$updates" --max-tokens 2048 \
    --finetune-from-model "$out/start/checkpoint.pt" --save-dir "$out/checkpoints" --no-epoch-checkpoints \
    --seed 1 --log-format simple --no-progress-bar --log-interval 20 --num-workers 0 > "$out/train.log" 2>&1

echo "the result in fairseq:"
fairseq-generate "$out/data" --user-dir "$plugin" "${multilingual[@]}" --source-lang eng_Latn --target-lang "$language" \
    --path "$out/checkpoints/checkpoint_last.pt" --gen-subset test --beam 4 --batch-size 32 --cpu \
    --remove-bpe sentencepiece > "$out/generate.log" 2> "$out/generate.err"
grep -E '^[SHD]-[012]	' "$out/generate.log" | sort -t- -k2n

echo "the result in Transformers, after the model it began with:"
moe-opt convert "$out/checkpoints/checkpoint_last.pt" "$out/model" --to hf --dtype float16
# The symbols are the same, so the tokenizer is.
cp "$model"/tokenizer*.json "$out/model/"
for folder in "$model" "$out/model"; do
    python "$demo/score.py" "$folder" "$out/text/test.tsv" --languages "$language"
done
