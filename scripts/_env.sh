# shellcheck shell=bash
# Python environments of this repository; to be sourced. Offers
#     deadpool_env          makes .venv from requirements.lock where it is missing or out of date, and activates it
# Both return 1 after one line on stderr that says what is wrong. An environment that is up to date costs no time: a
# stamp in it holds the hash of what it was made from.

DEADPOOL_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
DEADPOOL_FREE_GB=8 # one environment is 5 GB, its downloads 3 GB

deadpool_env() {
    _deadpool_environment .venv requirements.lock
}

_deadpool_trouble() {
    echo "deadpool: $*" >&2
    return 1
}

# Prints the first Python that really runs as 3.12 or later, 3.12 preferred. A name on PATH proves nothing: pyenv puts
# names there that only print an error.
_deadpool_python() {
    local candidate version best=""
    for candidate in python3.12 python3.13 python3 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3; do
        version="$("$candidate" -c 'import sys; print("%d.%02d" % sys.version_info[:2])' 2>/dev/null)" || continue
        if [[ "$version" == 3.12 ]]; then
            echo "$candidate"
            return 0
        fi
        # Upper bound: the locked versions have no wheels for later ones.
        if [[ -z "$best" && "$version" == 3.1[34] ]]; then
            best="$candidate"
        fi
    done
    [[ -n "$best" ]] && echo "$best"
}

_deadpool_environment() {
    local venv="$DEADPOOL_ROOT/$1" lock="$DEADPOOL_ROOT/$2" stamp
    [[ -f "$lock" ]] || { _deadpool_trouble "$lock is missing: check the repository out again" || return; }
    # The place counts too: a virtual environment does not survive being moved.
    stamp="$({ echo "$DEADPOOL_ROOT"; cat "$lock" "$DEADPOOL_ROOT/setup.py"; } | sha256sum)"
    if ! _deadpool_fresh "$venv" "$stamp"; then
        # Two scripts at the same time: the second waits for the first, then finds everything there.
        (
            if command -v flock >/dev/null; then
                exec 9>"$venv.lock"
                flock 9
                _deadpool_fresh "$venv" "$stamp" && exit 0
            fi
            _deadpool_make "$venv" "$lock" "$stamp"
        ) || return 1
    fi
    export VIRTUAL_ENV="$venv"
    export PATH="$venv/bin:$PATH"
    unset PYTHONHOME
    hash -r
}

_deadpool_fresh() {
    [[ -x "$1/bin/python" && -f "$1/.stamp" && "$(<"$1/.stamp")" == "$2" ]]
}

_deadpool_make() {
    local venv="$1" lock="$2" stamp="$3" name="${1##*/}" log="$1.log" python free_kb
    python="$(_deadpool_python)" || { _deadpool_trouble "no Python 3.12 or later on PATH or under" \
        "${PYENV_ROOT:-~/.pyenv}/versions: install one (for example: pyenv install 3.12)" || return; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || { _deadpool_trouble "$python has no venv module:" \
        "install it (on Debian and Ubuntu: apt install python3-venv)" || return; }
    free_kb="$(df -Pk "$DEADPOOL_ROOT" | awk 'NR == 2 {print $4}')"
    if (( free_kb < DEADPOOL_FREE_GB * 1024 * 1024 )); then
        _deadpool_trouble "$DEADPOOL_ROOT: $(( free_kb / 1024 / 1024 )) GB of disk free, $name needs" \
            "$DEADPOOL_FREE_GB GB: make room" || return
    fi
    echo "deadpool: making $name with $("$python" --version) from ${lock##*/} (once, some minutes)" >&2
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-deps)
    {
        "$python" -m venv --clear "$venv" &&
            "${pip[@]}" -r "$lock" &&
            "${pip[@]}" --no-build-isolation -e "$DEADPOOL_ROOT"
    } >"$log" 2>&1 || {
        local error
        error="$(grep -E -i 'error' "$log" | tail -n 1)"
        [[ -n "$error" ]] || error="$(tail -n 1 "$log")"
        _deadpool_trouble "$name could not be made: $error (all of it: $log)" || return
    }
    echo "$stamp" >"$venv/.stamp"
}
