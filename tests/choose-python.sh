#!/usr/bin/env bash
# Prints the Python that virtual environments are made of: 3.11 or later, and where there is one, built with
# profile-guided optimisation, as distributions build theirs. Those that version managers compile often are not, and
# then every fault takes up to a fifth longer. None that will do: python3, whose complaint says what is missing.
set -u
cd "$(dirname "$0")/.." || exit

can_make_environments='import sys, ensurepip; sys.exit(sys.version_info < (3, 11))'
is_optimised='import sys; from farfault_cli.python_build import python_build
sys.exit(not python_build().is_optimised)'

fallback=
for name in python3 /usr/bin/python3 python3.11 /usr/bin/python3.11; do
    python=$(command -v "$name") && "$python" -c "$can_make_environments" 2>/dev/null || continue
    if PYTHONPATH=client "$python" -B -c "$is_optimised"; then
        echo "$python"
        exit
    fi
    fallback=${fallback:-$python}
done
echo "${fallback:-python3}"
