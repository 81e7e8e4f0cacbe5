#!/bin/sh
# `docker run IMAGE train smoke` is `frpo train smoke`. What begins with a program of this list is run as it stands.
set -eu
case "${1:-}" in
    frpo | ray | deepspeed | python | python3 | sh | bash) exec "$@" ;;
    *) exec frpo "$@" ;;
esac
