# What the shell tests of whole runs share: `. dev/tests/shell.sh` from the root of the repository.
# `T` is the caller's temporary folder.

# losses RUN: a line "step loss" for each update in a run's log
losses() { sed -n 's/.*"step":\([0-9]*\),"loss":\([^,]*\),.*/\1 \2/p' "$1/log.jsonl"; }
# apart RUN RUN: the largest relative difference of their losses; inf where their steps differ
apart() {
    losses "$1" > "$T/a"
    losses "$2" > "$T/b"
    awk 'NR == FNR {
             a[$1] = $2
             n++
             next
         }
         { m++ }
         !($1 in a) {
             bad = 1
             next
         }
         {
             d = (a[$1] - $2) / a[$1]
             if (d < 0) d = -d
             if (d > w) w = d
         }
         END { print bad || n != m || !n ? "inf" : w + 0 }' "$T/a" "$T/b"
}
# least A B: whether A, of apart, is at most B
least() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a != "inf" && a + 0 <= b) }'; }
# micro_model: writes a model of some ten thousand parameters, $T/micro.json, and text for it; the
# options of a run are in $micro
micro_model() {
    head -c 20000 README.md > "$T/text.txt"
    cat > "$T/micro.json" << 'J'
{"model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
 "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 256,
 "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 16,
 "max_position_embeddings": 64}
J
    micro="--init $T/micro.json --train $T/text.txt --seq-len 16 --batch 4 --threads 1"
}
