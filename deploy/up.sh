#!/usr/bin/env bash
# Everything of compose.yaml on loopback, without containers: whichever of tempo, prometheus, otelcol-contrib and grafana are on the
# PATH (or named by TEMPO, PROMETHEUS, OTELCOL, GRAFANA_HOME), then gateway and engines (igsim up) and a load. Ctrl-C stops all of it.
# Data goes to ./igsim-data, or the folder named by IGSIM_DATA_DIR.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${IGSIM_DATA_DIR:-$PWD/igsim-data}
mkdir -p "$data"
pids=()

stop() {
    trap - INT TERM EXIT
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for _ in 1 2 3 4 5 6 7 8; do # Spans are flushed; Tempo's own graceful stop can hang after a query.
        sleep 1
        kill -0 "${pids[@]}" 2>/dev/null || break
    done
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
}
trap stop INT TERM EXIT

start() { # NAME COMMAND...
    local name=$1
    shift
    "$@" >"$data/$name.log" 2>&1 &
    pids+=($!)
    echo "$name: $data/$name.log"
}

load() { # An hour's load after the other, until one fails or it is told to stop.
    local run=
    trap 'kill "$run" && wait "$run"; exit 0' TERM
    while
        "$igsim" run "$here/../scenarios/load.yaml" --gateway http://127.0.0.1:8080 --out "$data/load" --overwrite &
        run=$!
        wait "$run"
    do :; done
}

has() { command -v "$1" >/dev/null || { echo "$2: not found, left out"; return 1; }; }

prometheus=${PROMETHEUS:-prometheus} tempo=${TEMPO:-tempo} otelcol=${OTELCOL:-otelcol-contrib}
export PROMETHEUS_URL=http://127.0.0.1:9090 TEMPO_URL=http://127.0.0.1:3200 TEMPO_DATA=$data/tempo
if has "$prometheus" prometheus; then
    export TEMPO_PROCESSORS=span-metrics,service-graphs
    start prometheus "$prometheus" --config.file="$here/prometheus/loopback.yaml" --storage.tsdb.path="$data/prometheus" \
        --web.listen-address=127.0.0.1:9090 --web.enable-remote-write-receiver --enable-feature=exemplar-storage,native-histograms
fi
otlp=http://127.0.0.1:4317
if has "$tempo" tempo; then
    mkdir -p "$TEMPO_DATA"
    start tempo "$tempo" -config.expand-env=true -config.file="$here/tempo/tempo.yaml"
fi
if has "$otelcol" otelcol-contrib; then
    start collector "$otelcol" --config="$here/collector/collector.yaml"
    otlp=http://127.0.0.1:14317
fi
if [ -n "${GRAFANA_HOME:-}" ]; then
    provisioning=$data/grafana-provisioning
    mkdir -p "$provisioning/datasources" "$provisioning/dashboards"
    cp "$here/grafana/datasources.yaml" "$provisioning/datasources/igsim.yaml"
    cp "$here/grafana/dashboards.yaml" "$provisioning/dashboards/igsim.yaml"
    DASHBOARDS="$here/grafana/dashboards" GF_SERVER_HTTP_ADDR=127.0.0.1 GF_PATHS_DATA="$data/grafana" \
        GF_PATHS_PROVISIONING="$provisioning" GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Admin \
        start grafana "$GRAFANA_HOME/bin/grafana" server --homepath "$GRAFANA_HOME"
else
    echo "grafana: GRAFANA_HOME is not set, left out"
fi

igsim=${IGSIM:-$here/../target/release/igsim}
has "$igsim" "igsim (cargo build --release)" || exit 3
start igsim "$igsim" up "$here/../scenarios/quickstart.yaml" --port 8080 --sampling 1 --otlp "$otlp"
for _ in $(seq 50); do curl -s -o /dev/null http://127.0.0.1:8080/health && break || sleep 0.2; done
start load load
echo "gateway http://127.0.0.1:8080  tempo $TEMPO_URL  prometheus $PROMETHEUS_URL  grafana http://127.0.0.1:3000"
echo "igsim query requests-by-engine    Ctrl-C stops everything"
wait -n
echo "one of them has ended: see the logs" >&2
exit 3
