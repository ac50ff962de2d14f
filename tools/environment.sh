# Sourced by tools/demo and tools/test: makes .venv in the repository's root and installs pinned packages and goslet.
# Doing it again does nothing until a pin, setup.py, pyproject.toml or a C++ source changes.

ROOT=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

say() { printf 'goslet: %s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# Prints the first Python that is 3.11 or newer.
find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed (found: $(python3 --version 2>&1 || true)); on Debian 12 or newer:" \
        "apt install python3 python3-venv python3-dev"
}

# Says at once everything that Debian keeps in packages of its own and that is not here.
check_system() {
    local python=$1 version missing=()
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        missing+=("python$version-dev")
    command -v g++ >/dev/null || missing+=("g++")
    if ((${#missing[@]})); then
        fail "something is missing; on Debian: apt install ${missing[*]}"
    fi
}

# What an installation depends on; the root too, because an editable install points to it.
fingerprint() {
    (
        cd "$ROOT"
        printf '%s\n' "$ROOT"
        "$VENV/bin/python" --version
        cat tools/requirements-*.txt setup.py pyproject.toml
        find csrc -type f -print0 | sort -z | xargs -0 cat
    ) | sha256sum | cut -d ' ' -f 1
}

make_venv() {
    local python
    [[ ! -e $VENV ]] || fail "$VENV is not a working environment; remove it and try again"
    python=$(find_python)
    check_system "$python"
    say "making $VENV"
    # Half an environment would look like a whole one the next time.
    trap 'rm -rf "$VENV"' EXIT
    "$python" -m venv "$VENV"
    trap - EXIT
}

# prepare NAME: installs tools/requirements-NAME.txt and goslet into .venv; the pins of test include those of demo.
prepare() {
    local name=$1 wanted done_before quiet=()
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    wanted=$(fingerprint)
    for done_before in "$name" test; do
        if [[ $(cat "$VENV/goslet-$done_before.stamp" 2>/dev/null) == "$wanted" ]] &&
            "$VENV/bin/python" -c 'import goslet._native' 2>/dev/null; then
            return
        fi
    done
    check_system "$VENV/bin/python"
    [[ -t 2 ]] || quiet=(--quiet)
    install() { "$VENV/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" "$@" >&2; }
    say "installing the packages that tools/requirements-$name.txt pins (the first time, some minutes)"
    install "$(grep '^pip==' "$ROOT/tools/requirements-demo.txt")"
    install -r "$ROOT/tools/requirements-$name.txt"
    say "building goslet"
    install --no-build-isolation --no-deps --editable "$ROOT"
    printf '%s\n' "$wanted" >"$VENV/goslet-$name.stamp"
}
