# Sourced by train.sh and test.sh: makes .venv hold what a requirements file asks for and points $PYTHON at it.
#   setup_env requirements.txt
# Takes a second when nothing has changed: .venv/.installed-<file> keeps the hash of all requirements files as they were.

setup_env() {
    local file="$1" root wanted stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
    PYTHON="$root/.venv/bin/python"
    stamp="$root/.venv/.installed-$file"
    wanted="$(cat "$root"/requirements*.txt | sha256sum | cut -d' ' -f1)"  # the files include each other
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed as python3, found: $(python3 --version 2>&1)" >&2
        return 1
    fi
    # A venv whose making was interrupted has a python but no pip.
    "$PYTHON" -m pip --version &> /dev/null || python3 -m venv "$root/.venv"
    echo "Installing $file into .venv (several GB the first time, a few minutes) ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$root/$file"
    echo "$wanted" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}
