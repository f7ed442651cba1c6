#!/usr/bin/env bash
# Prints the Python that virtual environments are made of: 3.11 or later, and where there is one, built with
# profile-guided optimisation, as distributions build theirs. Those that version managers compile often are not, and
# then every fault takes a quarter longer. None that will do: python3, whose complaint says what is missing.
set -u

can_make_environments='import sys, ensurepip; sys.exit(sys.version_info < (3, 11))'
# Debian's says nothing of it: what it tells are the options of a second build, of the library.
is_optimised='import sys, sysconfig
options = sysconfig.get_config_var("CONFIG_ARGS") or ""
sys.exit("--enable-optimizations" not in options and sys.base_prefix != "/usr")'

fallback=
for name in python3 /usr/bin/python3 python3.11 /usr/bin/python3.11; do
    python=$(command -v "$name") && "$python" -c "$can_make_environments" 2>/dev/null || continue
    if "$python" -c "$is_optimised"; then
        echo "$python"
        exit
    fi
    fallback=${fallback:-$python}
done
echo "${fallback:-python3}"
