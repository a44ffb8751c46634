#!/usr/bin/env bash
# What a container of this image is: entrypoint.sh ROLE [ARGUMENTS]
#
#   head      the Ray head. It runs drivers, not trials
#   worker    a Ray node that runs trials, one per GPU; needs RAY_HEAD
#   driver    one command of sweepsvc
#   mlflow    the MLflow server, with passwords; needs MLFLOW_BACKEND_STORE_URI and two secrets
#   upgrade   bring the tables of the store that this container knows to this version
#   health    ROLE: exit 0 if the head, worker or mlflow of this container is well
#
# ARGUMENTS go to the role's own command (ray start, sweepsvc, mlflow server). Ports and secrets come from
# the environment: a command line can be read by everyone on the machine.
set -euo pipefail

needs() {
    local name
    for name in "$@"; do
        if [[ -z ${!name:-} ]]; then
            echo "$name must be set and not empty; see docker/.env.example" >&2
            exit 2
        fi
    done
}

answers() { # URL: whether an HTTP GET of it ends in 200 within 5 seconds
    python -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$1"
}

head() {
    # No CPUs of its own: a trial is placed on a worker, and only drivers, which ask for none, run here.
    exec ray start --head --block --disable-usage-stats --num-cpus=0 --num-gpus=0 \
        --port="${RAY_PORT:-6379}" \
        --ray-client-server-port="${RAY_CLIENT_PORT:-10001}" \
        --dashboard-port="${RAY_DASHBOARD_PORT:-8265}" \
        --dashboard-agent-listen-port="${RAY_AGENT_PORT:-52365}" \
        "$@"
}

worker() {
    needs RAY_HEAD
    exec ray start --block --disable-usage-stats --address="$RAY_HEAD" \
        --dashboard-agent-listen-port="${RAY_AGENT_PORT:-52365}" \
        "$@"
}

mlflow() {
    needs MLFLOW_BACKEND_STORE_URI MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
    # Hashing the password takes longer than anything else in a request: it is remembered for a minute.
    # Users and permissions lie in tables of their own beside the runs. The password of the database is not in
    # the address: libpq takes it from PGPASSWORD.
    MLFLOW_AUTH_CONFIG_PATH=$(mktemp)
    export MLFLOW_AUTH_CONFIG_PATH
    cat >"$MLFLOW_AUTH_CONFIG_PATH" <<END
[mlflow]
default_permission = READ
database_uri = $MLFLOW_BACKEND_STORE_URI
admin_username = admin
auth_cache_ttl_seconds = 60
END
    exec python -m mlflow server --app-name basic-auth --serve-artifacts "$@"
}

upgrade() {
    if [[ -n ${MLFLOW_BACKEND_STORE_URI:-} ]]; then
        python -m mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI" # users and permissions follow at the next start
    else
        needs SWEEPSVC_STUDY_URL
        OPTUNA_STORAGE=$SWEEPSVC_STUDY_URL optuna storage upgrade
    fi
}

health() {
    case ${1:-} in
        head)
            answers "http://127.0.0.1:${RAY_DASHBOARD_PORT:-8265}/api/gcs_healthz"
            answers "http://127.0.0.1:${RAY_AGENT_PORT:-52365}/api/local_raylet_healthz"
            ;;
        worker) answers "http://127.0.0.1:${RAY_AGENT_PORT:-52365}/api/local_raylet_healthz" ;;
        mlflow) answers "http://127.0.0.1:${MLFLOW_PORT:-5000}/health" ;;
        *) unknown "${1:-}" "head, worker, mlflow" ;;
    esac
}

unknown() {
    echo "the role must be one of $2, got '$1'" >&2
    exit 2
}

role=${1:-}
shift || true
case $role in
    head | worker | mlflow | upgrade | health) "$role" "$@" ;;
    driver) exec python -m sweepsvc "$@" ;;
    *) unknown "$role" "head, worker, driver, mlflow, upgrade, health" ;;
esac
