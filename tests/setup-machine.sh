#!/usr/bin/env bash
# Brings what the real VMs of `make demo` and `make test` need onto a Debian or Ubuntu machine, if it may.
# With the argument `tests` also what only tests need: Prometheus, and a browser for the reports.
# Without root or apt it says what is missing and goes on: what cannot run is skipped with its reason.
set -u

packages=()
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || packages+=("$2")
}
# The distribution's Python, the fastest there is (choose-python.sh), makes virtual environments only with this package.
if [ -x /usr/bin/python3 ] || ! command -v python3 >/dev/null 2>&1; then
    /usr/bin/python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
fi
need cc gcc
need as binutils
[ -e /usr/include/xxhash.h ] || packages+=(libxxhash-dev)
if [ "$(uname -m)" = x86_64 ]; then
    need qemu-system-x86_64 qemu-system-x86
    need busybox busybox-static
    need ip iproute2
fi
if [ "${1:-}" = tests ]; then
    need prometheus prometheus
    need chromium chromium
fi

if [ "${#packages[@]}" -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "==> apt-get install ${packages[*]}"
        export DEBIAN_FRONTEND=noninteractive
        log=$(mktemp)
        if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
            tail -5 "$log"
            echo "==> could not install ${packages[*]}: tests and demos that need them are skipped"
        fi
        rm -f "$log"
        # The tests start a Prometheus of their own; the package's service is not needed.
        case " ${packages[*]} " in *" prometheus "*) systemctl disable --now prometheus >/dev/null 2>&1 ;; esac
    else
        echo "==> missing: ${packages[*]} (as root: apt-get install ${packages[*]})"
    fi
fi

# Annotated exits need KVM's tracepoints.
if [ "$(id -u)" = 0 ] && [ -d /sys/kernel/tracing ] && [ ! -d /sys/kernel/tracing/events ]; then
    mount -t tracefs tracefs /sys/kernel/tracing || echo "==> tracefs cannot be mounted: exits are not annotated"
fi
exit 0
