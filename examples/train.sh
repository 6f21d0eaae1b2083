#!/usr/bin/env bash
# Make every example adapter anew: examples/train.sh DATA [EXAMPLE…]
# DATA is a folder with the data sets' original files: e2e-devset.csv, text2sql-geography.json,
# gsm8k-train.jsonl and sst2-train.tsv, in it or in folders of it.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: examples/train.sh DATA [EXAMPLE…]}
shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

original() { find -L "$data" -name "$1" -print -quit; }

for name in "${@:-e2e-lora text2sql-ia3 gsm8k-prefix sst2-prompt}"; do
    for example in $name; do
        case $example in
            e2e-lora) rows=$(original e2e-devset.csv) ;;
            text2sql-ia3) kind=text2sql; file=text2sql-geography.json; rows= ;;
            gsm8k-prefix) kind=gsm8k; file=gsm8k-train.jsonl; rows= ;;
            sst2-prompt) kind=sst2; file=sst2-train.tsv; rows= ;;
            *) echo "no example $example" >&2; exit 1 ;;
        esac
        if [ -z "$rows" ]; then
            rows=$scratch/$example.jsonl
            .venv/bin/python examples/prepare.py "$kind" "$(original "$file")" "$rows"
        fi
        .venv/bin/polypeft-train "examples/$example/recipe.yaml" \
            --data "$rows" --output "$scratch/$example"
        for made in adapter_config.json adapter_model.safetensors training_summary.json loss.png; do
            cp "$scratch/$example/$made" "examples/$example/"
        done
    done
done
