# Sourced by compare and test. `ready NAME ARGUMENT...` makes .venv hold what `pip install ARGUMENT...`
# gives under constraints.txt. It does so once: .venv/ready-NAME is written last and says for which
# pyproject.toml and constraints.txt. What an interrupted run left half-way is made anew, and so is a
# copy of the package in .venv: the scripts run the files of this clone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$root/.venv/bin

ready() {
    local stamp=$root/.venv/ready-$1 busy=$root/.venv/installing want python=${PYTHON:-python3}
    shift
    want=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if compgen -G "$root/.venv/lib/python*/site-packages/torchnnfs" >/dev/null; then
        echo "$root/.venv holds a copy of torchnnfs; it gives way to the files of this clone." >&2
        rm -f "$root"/.venv/ready-*
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$python is missing or older than Python 3.11; name another one: PYTHON=python3.12 $0" >&2
        exit 2
    fi
    # Two first runs at a time take turns, where the system can make them.
    exec 9>"$root/.venv.lock"
    if command -v flock >/dev/null; then flock 9; fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exec 9>&-; return; fi
    echo "Installing what scripts/${0##*/} needs into $root/.venv; later runs skip this." >&2
    if [ -e "$busy" ] || ! "$bin/python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear "$root/.venv"
    fi
    touch "$busy"
    "$bin/python" -m pip install -qq --constraint "$root/constraints.txt" pip
    "$bin/python" -m pip install -qq --constraint "$root/constraints.txt" "$@"
    echo "$want" >"$stamp"
    rm "$busy"
    exec 9>&-
}
