#!/usr/bin/env bash
# Your own items and clicks, from files to metrics.
#
#   bash runs/your-data.sh DATA OUTPUT [NAME=VALUE...]
#
# DATA is a folder with
#   items.tsv           columns id, text                       one line per item
#   interactions.tsv    columns item_id, timestamp, and query and/or history (ids separated by spaces, oldest first)
# or the same as .jsonl or .parquet; `dgi train --help` lists all forms. The last fifth by time is the test set. A bad
# line (unknown id, empty text, duplicate) is reported with file, line and how to fix it before training starts.
#
# OUTPUT receives the model, the index, the metrics and two pictures. NAME=VALUE are settings over those below.
# A run that was interrupted continues from its last checkpoint, with the settings that it began with; for other settings
# choose a new OUTPUT.
#
# Cost: proportional to interactions x epochs. runs/movielens.sh (79,000 training interactions, 4 epochs, dim 64) takes
# five minutes and 0.6 GB on two CPU cores. On a GPU the commands are the same; `torchrun --nproc-per-node 8 -m dgi
# train ...` uses eight.
#
# Expect: the evaluation prints DGI beside popularity and beside exact cosine of the model's own vectors. If DGI is not
# well above popularity, train longer first (more epochs, a new OUTPUT): the next-token loss, `ntp` in each line of
# metrics.jsonl, is then still falling. With few interactions lower warmup_steps too: it should be a tenth of all steps
# at most. If many items share a semantic ID, use larger or more codebooks.
set -euo pipefail

if [[ $# -lt 2 ]]; then sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; fi
data=$1 output=$2
shift 2
python=${PYTHON:-python}

settings=(
    --set dim=64                       # width of items, requests and codebooks; 128 to 256 for a large catalog
    --set codebook_sizes=256,128,64    # their product should exceed the number of items by a factor of 10 or more
    --set text_layers=1                # 0: item texts are bags of words, faster; 1 or 2: word order counts
    --set epochs=10
    --set warmup_steps=100             # at most a tenth of all steps: epochs * interactions / batch_size
    --set batch_size=256
    --set backbone_lr=1e-3             # encoder and decoder; 5e-5 for a pretrained T5 (encoder=t5 pretrained=...)
    --set quantizer_lr=1e-3            # codebooks and logit scale
)
for setting in "$@"; do settings+=(--set "$setting"); done

# What to search for in step 3: words (QUERY="…" bash runs/your-data.sh …), ids of items chosen before, or both:
# request=(--query "red shoes" --history ID ID).
request=(--query "${QUERY:-red shoes}")

if [[ -d $output/checkpoints ]]; then settings+=(--resume); fi  # refused where the settings are others

# 1. Train: model.safetensors, config.json, metrics.jsonl, training_curve.png.
#    The first line says which stages it has chosen and why. --hold-out leaves a validation set out for step 2.
"$python" -m dgi train --data "$data" --output "$output" --hold-out "${settings[@]}" --no-progress

# 2. Index: a semantic ID for every item, as a trie, with the items' vectors. Only the items are read: run this step
#    again when the catalog changes; the model stays. --tune chooses on the validation set how searches rank.
"$python" -m dgi index --data "$data" --model "$output" --output "$output/index.safetensors" --tune --no-progress

# 3. Search: rank, log-probability of the semantic ID, cosine, id and text.
"$python" -m dgi search --data "$data" --model "$output" --index "$output/index.safetensors" "${request[@]}" \
    --k 5 --no-progress

# 4. Evaluate on the interactions that come later: metrics.json, buckets.png.
"$python" -m dgi eval --data "$data" --model "$output" --index "$output/index.safetensors" \
    --output "$output/evaluation" --max-queries 10000 --no-progress
