#!/usr/bin/env bash
# A small cluster on this machine, without containers: workers, and a gateway that is the coordinator, too.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=${LOCAL_DEV_DIR:-$root/.local_dev}
gateway_port=${GATEWAY_PORT:-8080}
coordinator_port=${COORDINATOR_PORT:-8081}
worker_port=${WORKER_PORT:-8082}

usage() {
    cat <<EOF
usage: scripts/local_dev.sh COMMAND

  start              set up what is missing, start the cluster in the background, print its URLs
  stop               stop all processes; running answers finish first
  restart            stop, then start
  status             what runs, where, and whether it is healthy
  logs [SERVICE]     follow the logs of coordinator, worker, gateway or, say, worker-1; without a service, all
  scale-workers N    start or stop workers until there are N
  clean              stop, and remove logs, caches and the secret
  rebuild            stop, set the environment up from scratch, then start
  shell SERVICE      a shell with the URL, LOG and PID of gateway, coordinator or, say, worker-0
  help               this text

From the environment: MODEL (a folder or hub id; default: the demonstration model), WORKERS (2), GATEWAY_PORT (8080),
COORDINATOR_PORT (8081), WORKER_PORT (8082, of the first worker; the others follow), KV_MAX_ENTRIES (50000),
CACHE_RAM (of each worker, such as 1GiB), LOCAL_DEV_DIR ($run), and LOCAL_DEV_EMBERKV (an emberkv command to run;
default: the one in .venv, which is set up first).
EOF
}

fail() {
    echo "$1" >&2
    exit "${2:-1}"
}

emberkv() { # sets the array command
    if [[ -n ${LOCAL_DEV_EMBERKV:-} ]]; then
        read -ra command <<<"$LOCAL_DEV_EMBERKV"
    else
        command=("$root/.venv/bin/emberkv")
    fi
}

build() {
    [[ -n ${LOCAL_DEV_EMBERKV:-} ]] || (source "$root/scripts/setup" torch,cluster)
}

pid_of() { # the process id of a service that runs
    local pid
    pid=$(cat "$run/$1.pid" 2>/dev/null) || return 1
    grep -qzx -- "LOCAL_DEV_SERVICE=$1" "/proc/$pid/environ" 2>/dev/null && echo "$pid"
}

launch() { # NAME ARGUMENTS...
    local name=$1
    shift
    pid_of "$name" >/dev/null && return
    emberkv
    LOCAL_DEV_SERVICE=$name nohup "${command[@]}" "$@" >>"$run/$name.log" 2>&1 </dev/null &
    echo $! >"$run/$name.pid"
}

launch_gateway() {
    launch gateway gateway --port "$gateway_port" --coordinator-port "$coordinator_port" --kv-routes \
        --cluster-secret-file "$run/secret"
}

launch_worker() { # NUMBER
    local arguments=(--port $((worker_port + $1)) --worker-id "worker-$1" --kv-routes
        --kv-max-entries "${KV_MAX_ENTRIES:-50000}" --cluster-secret-file "$run/secret"
        --gateway "http://127.0.0.1:$gateway_port")
    [[ -z ${CACHE_RAM:-} ]] || arguments+=(--cache-ram "$CACHE_RAM")
    [[ -z ${MODEL:-} ]] || arguments+=("$MODEL")
    launch "worker-$1" serve "${arguments[@]}"
}

services() { # the names of all that were started
    local file
    for file in "$run"/*.pid; do
        [[ -e $file ]] && basename "$file" .pid
    done | sort -V
}

halt() { # NAMES...
    local name deadline=$((SECONDS + 60))
    for name in "$@"; do
        pid_of "$name" >/dev/null && kill "$(pid_of "$name")"
    done
    for name in "$@"; do
        while pid_of "$name" >/dev/null; do
            ((SECONDS < deadline)) || kill -9 "$(pid_of "$name")"
            sleep 0.2
        done
        rm -f "$run/$name.pid"
    done
}

url_of() { # SERVICE
    case $1 in
        gateway) echo "http://127.0.0.1:$gateway_port" ;;
        coordinator) echo "http://127.0.0.1:$coordinator_port" ;;
        worker-*) echo "http://127.0.0.1:$((worker_port + ${1#worker-}))" ;;
    esac
}

workers_up() { # how many workers take requests
    local name count=0
    for name in $(services); do
        if [[ $name == worker-* ]] && curl -fs -m 5 "$(url_of "$name")/ready" >/dev/null; then
            count=$((count + 1))
        fi
    done
    echo "$count"
}

wait_for_workers() { # NUMBER
    local name deadline=$((SECONDS + 300))
    until (($(workers_up) >= $1)) && curl -fs -m 5 "$(url_of gateway)/ready" >/dev/null; do
        for name in $(services); do
            pid_of "$name" >/dev/null || fail "$name has stopped; the end of $run/$name.log: $(tail -n 5 "$run/$name.log")"
        done
        ((SECONDS < deadline)) || fail "the cluster is not ready after 300 s; see the logs in $run"
        sleep 0.5
    done
}

start() {
    build
    mkdir -p "$run"
    chmod 700 "$run"
    [[ -s $run/secret ]] || (umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$run/secret")
    launch_gateway
    local number count=${WORKERS:-2}
    for ((number = 0; number < count; number++)); do
        launch_worker "$number"
    done
    echo "starting a gateway and $count workers; their logs are in $run"
    wait_for_workers "$count"
    status
}

stop() {
    local names
    mapfile -t names < <(services | sort -r) # workers leave before the gateway
    halt "${names[@]}"
    echo "stopped"
}

status() {
    local name pid health
    printf '%-12s %-8s %-24s %s\n' SERVICE PID URL HEALTH
    for name in coordinator gateway $(services | grep -v '^gateway$'); do
        pid=$(pid_of "${name/coordinator/gateway}") || pid=-
        health=$(curl -fs -m 5 "$(url_of "$name")/health") || health=unreachable
        printf '%-12s %-8s %-24s %s\n' "$name" "$pid" "$(url_of "$name")" "$health"
    done
}

logs() { # SERVICE
    local files
    case ${1:-} in
        "") files=("$run"/*.log) ;;
        coordinator) files=("$run/gateway.log") ;; # the coordinator is a part of the gateway
        worker) files=("$run"/worker-*.log) ;;
        *) files=("$run/$1.log") ;;
    esac
    [[ -e ${files[0]} ]] || fail "there is no log of ${1:-any service} in $run"
    exec tail -n 100 -F "${files[@]}"
}

scale_workers() { # NUMBER
    [[ ${1:-} =~ ^[0-9]+$ ]] || fail "Please name the number of workers: scripts/local_dev.sh scale-workers N"
    pid_of gateway >/dev/null || fail "the cluster does not run; start it first: scripts/local_dev.sh start"
    local number name surplus=()
    for name in $(services); do
        [[ $name == worker-* && ${name#worker-} -ge $1 ]] && surplus+=("$name")
    done
    halt "${surplus[@]}"
    for ((number = 0; number < $1; number++)); do
        launch_worker "$number"
    done
    echo "there will be $1 workers; their logs are in $run"
    (($1 == 0)) || wait_for_workers "$1"
    status
}

clean() {
    stop
    rm -rf "$run"
}

rebuild() {
    stop
    [[ -n ${LOCAL_DEV_EMBERKV:-} ]] || rm -rf "$root/.venv"
    start
}

open_shell() { # SERVICE
    [[ -n ${1:-} ]] || fail "Please name a service: scripts/local_dev.sh shell SERVICE"
    local pid
    pid=$(pid_of "${1/coordinator/gateway}") || fail "$1 does not run; see scripts/local_dev.sh status"
    cd "$run"
    URL=$(url_of "$1") LOG=$run/${1/coordinator/gateway}.log PID=$pid exec "${SHELL:-bash}"
}

case ${1:-help} in
    start) start ;;
    stop) stop ;;
    restart) stop && start ;;
    status) status ;;
    logs) logs "${2:-}" ;;
    scale-workers) scale_workers "${2:-}" ;;
    clean) clean ;;
    rebuild) rebuild ;;
    shell) open_shell "${2:-}" ;;
    help | --help | -h) usage ;;
    *)
        echo "Unknown command: $1" >&2
        usage
        exit 1
        ;;
esac
