# Sourced by train.sh and test.sh: makes .venv hold what a requirements file asks for and points $PYTHON at it.
#   setup_env requirements.txt
# Takes a second when nothing has changed: .venv/.installed-<file> keeps the hash of the files last installed.

setup_env() {
    local file="$1" root wanted stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
    PYTHON="$root/.venv/bin/python"
    stamp="$root/.venv/.installed-$file"
    wanted="$(cat "$root/requirements.txt" "$root/$file" | sha256sum | cut -d' ' -f1)"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    [ -x "$PYTHON" ] || python3 -m venv "$root/.venv"
    echo "Installing $file into .venv ..."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$root/$file"
    echo "$wanted" > "$stamp.tmp" && mv "$stamp.tmp" "$stamp"
}
