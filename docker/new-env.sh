#!/usr/bin/env bash
# Writes .env beside this script from .env.example, with new secrets, readable by you alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [[ -e .env ]]; then
    echo ".env must not be there yet: its secrets are those of the volumes; remove both, or keep both" >&2
    exit 2
fi
umask 077
while IFS= read -r line; do
    if [[ $line == *=random ]]; then
        line="${line%random}$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
    fi
    printf '%s\n' "$line"
done <.env.example >.env
echo "wrote $(pwd)/.env"
