#!/usr/bin/env bash
# Starts Tempo on loopback with tempo.yaml: the binary named by $TEMPO, or `tempo` on the PATH, or a container.
# Ctrl-C stops it. Data goes to ./tempo-data below the current folder; remove that folder to start afresh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
image=grafana/tempo:3.0.3

run() { # Tempo's own graceful stop can hang after a query, so it gets three seconds.
    "$@" &
    local pid=$!
    trap 'kill -TERM $pid 2>/dev/null; for _ in 1 2 3; do sleep 1; kill -0 $pid 2>/dev/null || exit 0; done; kill -KILL $pid' INT TERM
    wait $pid
}

mkdir -p tempo-data
if [ -n "${TEMPO:-}" ] || command -v tempo >/dev/null; then
    run "${TEMPO:-tempo}" -config.expand-env=true -config.file="$here/tempo.yaml"
elif command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    run docker run --rm --network host --user "$(id -u)" -v "$here/tempo.yaml:/etc/tempo.yaml:ro" \
        -v "$PWD/tempo-data:/tempo-data" -w / "$image" -config.expand-env=true -config.file=/etc/tempo.yaml
else
    echo "error: neither a tempo binary (set TEMPO=/path/to/tempo) nor a running docker was found." >&2
    echo "help: Tempo's releases page has binaries for version 3.0.3; any OTLP backend works as well (docs/tempo.md)." >&2
    exit 3
fi
