#!/usr/bin/env bash
# plain-proxy.sh nginx|haproxy PORT ENGINE_URL...: a plain reverse proxy on loopback, round robin over the engines, one worker,
# connections kept open on both sides, answers passed on unbuffered, no log. For `igsim overhead outside proxies.yaml`.
set -euo pipefail
kind=$1 port=$2
shift 2
dir=$(mktemp -d)

case $kind in
nginx)
    {
        echo "daemon off; pid $dir/pid; error_log stderr error; worker_processes 1;"
        echo "events { worker_connections 4096; }"
        echo "http {"
        echo "  access_log off; client_body_temp_path $dir; proxy_temp_path $dir; fastcgi_temp_path $dir; uwsgi_temp_path $dir; scgi_temp_path $dir;"
        echo "  keepalive_requests 1000000000; client_max_body_size 64m; client_body_buffer_size 1m;"
        echo "  upstream engines { keepalive 256; keepalive_requests 1000000000;"
        for url in "$@"; do echo "    server ${url#http://};"; done
        echo "  }"
        echo "  server { listen 127.0.0.1:$port; location / { proxy_pass http://engines; proxy_http_version 1.1;"
        echo "    proxy_set_header Connection \"\"; proxy_buffering off; } }"
        echo "}"
    } >"$dir/nginx.conf"
    exec nginx -c "$dir/nginx.conf" -e stderr
    ;;
haproxy)
    {
        echo "global"
        echo "  nbthread 1"
        echo "defaults"
        echo "  mode http"
        echo "  timeout connect 5s"
        echo "  timeout client 60s"
        echo "  timeout server 60s"
        echo "  http-reuse always"
        echo "frontend caller"
        echo "  bind 127.0.0.1:$port"
        echo "  default_backend engines"
        echo "backend engines"
        echo "  balance roundrobin"
        n=0
        for url in "$@"; do
            echo "  server engine$n ${url#http://}"
            n=$((n + 1))
        done
    } >"$dir/haproxy.cfg"
    exec haproxy -q -db -f "$dir/haproxy.cfg"
    ;;
*)
    echo "error: found \`$kind\`, expected nginx or haproxy" >&2
    exit 2
    ;;
esac
