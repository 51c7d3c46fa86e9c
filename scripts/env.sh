# Sourced by the other scripts: finds or makes the Python environment and leaves it active.
#
#   VENV=PATH     use or make the environment there          (default: .venv in the repository)
#   PYTHON=PATH   make it with this Python, 3.11 to 3.13     (default: the first one found)
#
# The environment counts as complete when the stamp inside it names the current requirements.txt.

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.13 python3.11 python3 python}; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found (${PYTHON:-python3 is $(python3 --version 2>&1)}). Install one (apt install python3.12 python3.12-venv, or uv python install 3.12) or name one: PYTHON=/path/to/python bash $0"
}

make_environment() {
  local python stamp="$VENV/requirements.sha256" wanted
  wanted=$(sha256sum requirements.txt | cut -c1-16)
  if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  python=$(find_python) || exit 1
  if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "Making the environment $VENV with $($python --version)"
    "$python" -m venv --clear "$VENV" || fail "could not make $VENV with $python -m venv. On Debian and Ubuntu: apt install python3-venv. Then run this again."
  fi
  say "Installing requirements.txt into $VENV (about 6 GB with the CUDA libraries; 3 to 10 minutes, once)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt \
    || fail "pip could not install requirements.txt (its message is above: no network, or less than 8 GB free in $(dirname "$VENV")?). Run this again; what was downloaded is kept."
  echo "$wanted" > "$stamp"
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}
make_environment
# Absolute, so that scripts may change folders afterwards.
export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
