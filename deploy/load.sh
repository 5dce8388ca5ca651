#!/bin/sh
# Keeps a gateway busy: load.sh URL [CALLERS]. Each caller asks for a stream of 48 tokens, waits for its end, and asks again.
set -eu
url=$1
model=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
prompt=$(printf 'A sentence that all of them begin with, long enough for a block of the cache. %.0s' 1 2 3 4 5 6 7 8)

caller() {
    n=0
    while :; do
        n=$((n + 1))
        body="{\"model\":\"$model\",\"stream\":true,\"max_tokens\":48,\"messages\":[{\"role\":\"user\",\"content\":\"$prompt caller $1, question $n\"}]}"
        curl -sN -o /dev/null "$url/v1/chat/completions" -H 'content-type: application/json' \
            -H "x-llm-d-inference-fairness-id: caller-$1" -d "$body" || sleep 1
    done
}

callers=
trap 'kill $callers 2>/dev/null; exit 0' INT TERM
for i in $(seq "${2:-8}"); do
    caller "$i" &
    callers="$callers $!"
done
wait
