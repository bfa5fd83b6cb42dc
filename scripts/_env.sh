# shellcheck shell=bash
# Python environments of this repository; to be sourced. Offers
#     deadpool_uv ARGS...   runs uv: the one on PATH, else one of our own in .venv-uv
#     deadpool_env          makes .venv from requirements.lock where it is missing or out of date, and activates it
#     deadpool_env_bridge   .venv-bridge, with Megatron-Bridge, from requirements-bridge.lock too
# All return 1 after one line on stderr that says what is wrong. An environment that is up to date costs no time: a
# stamp in it holds the hash of what it was made from.

DEADPOOL_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
DEADPOOL_EMULATION="$DEADPOOL_ROOT/requirements-emulation.lock" # what only the emulation of CUDA sees
DEADPOOL_FREE_GB=8 # one environment is 5 GB, which it shares with uv's cache where both are on one file system
_deadpool_uv_version=0.13.9

deadpool_env() {
    _deadpool_environment .venv requirements.lock
}

deadpool_env_bridge() {
    _deadpool_environment .venv-bridge requirements.lock requirements-bridge.lock
}

_deadpool_trouble() {
    echo "deadpool: $*" >&2
    return 1
}

# Prints the first Python that really runs as 3.12 or later, 3.12 preferred. A name on PATH proves nothing: pyenv puts
# names there that only print an error. Of a virtual environment, the Python it was made with.
_deadpool_python() {
    local candidate version best=""
    for candidate in python3.12 python3.13 python3 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3; do
        version="$("$candidate" -c 'import sys; print("%d.%02d" % sys.version_info[:2], sys._base_executable)' \
            2>/dev/null)" || continue
        if [[ "$version" == "3.12 "* ]]; then
            best="$version"
            break
        fi
        # Upper bound: the locked versions have no wheels for later ones.
        if [[ -z "$best" && "$version" == 3.1[34]" "* ]]; then
            best="$version"
        fi
    done
    [[ -n "$best" ]] || { _deadpool_trouble "no Python 3.12 or later on PATH or under" \
        "${PYENV_ROOT:-~/.pyenv}/versions: install one (for example: pyenv install 3.12)" || return; }
    echo "${best#* }"
}

# In a subshell: what it sets is uv's alone.
deadpool_uv() (
    local python uv tools="$DEADPOOL_ROOT/.venv-uv"
    python="$(_deadpool_python)" || return
    if uv --version >/dev/null 2>&1; then
        uv=uv
    else
        uv="$tools/bin/uv"
        _deadpool_locked "$tools" _deadpool_make_uv "$tools" "$python" || return
    fi
    # What pip is told of an index, a certificate or a proxy counts for uv too. The first line is the strongest.
    while IFS= read -r line; do
        value="${line#*=\'}"
        value="${value%\'}"
        case "${line%%=*}" in
            global.index-url | install.index-url | :env:.index-url) : "${UV_DEFAULT_INDEX:=$value}" ;;
            global.cert | install.cert | :env:.cert) : "${SSL_CERT_FILE:=$value}" ;;
            global.proxy | install.proxy | :env:.proxy) : "${ALL_PROXY:=$value}" ;;
        esac
    done < <("$python" -m pip config list 2>/dev/null)
    for name in UV_DEFAULT_INDEX SSL_CERT_FILE ALL_PROXY; do
        [[ -z "${!name:-}" ]] || export "${name?}"
    done
    # Without this, uv warns when it cannot link from its cache.
    cache="$("$uv" cache dir)"
    if ! { mkdir -p "$cache" 2>/dev/null && [[ -w "$cache" ]]; }; then # HOME may be read-only
        cache="$tools-cache"
        mkdir -p "$cache" && export UV_CACHE_DIR="$cache"
    fi
    # An index that stumbles for a minute costs a minute.
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" UV_HTTP_RETRIES="${UV_HTTP_RETRIES:-8}"
    [[ "$(stat -c %d "$cache")" == "$(stat -c %d "$DEADPOOL_ROOT")" ]] || export UV_LINK_MODE="${UV_LINK_MODE:-copy}"
    exec "$uv" "$@"
)

_deadpool_make_uv() {
    local tools="$1" python="$2" log="$1.log"
    [[ "$("$tools/bin/uv" --version 2>/dev/null)" == "uv $_deadpool_uv_version "* ]] && return
    "$python" -c 'import ensurepip, venv' 2>/dev/null || { _deadpool_trouble "$python has no venv module:" \
        "install it (on Debian and Ubuntu: apt install python3-venv), or uv" || return; }
    echo "deadpool: no uv on PATH: installing uv $_deadpool_uv_version into ${tools##*/}" >&2
    {
        "$python" -m venv --clear "$tools" &&
            "$tools/bin/python" -m pip --disable-pip-version-check --no-input --retries 8 --timeout 60 \
                install "uv==$_deadpool_uv_version"
    } >"$log" 2>&1 || _deadpool_trouble "uv could not be installed: $(tail -n 1 "$log") (all of it: $log)"
}

# What a log says went wrong, as one line, and where the log is.
_deadpool_error() {
    local error
    error="$(grep -E -i '^ *(error|cause|caused by)\b' "$1" | tr -s ' \n' ' ')"
    [[ -n "$error" ]] || error="$(tail -n 1 "$1") "
    echo "$error(all of it: $1)"
}

# Two scripts at the same time: the second waits for the first, then finds everything there.
_deadpool_locked() (
    if command -v flock >/dev/null; then
        exec 9>"$1.lock"
        flock 9
    fi
    shift
    "$@"
)

_deadpool_environment() {
    local venv="$DEADPOOL_ROOT/$1" locks=("${@:2}") lock stamp
    locks=("${locks[@]/#/$DEADPOOL_ROOT/}")
    for lock in "${locks[@]}"; do
        [[ -f "$lock" ]] || { _deadpool_trouble "$lock is missing: check the repository out again" || return; }
    done
    # The place counts too: a virtual environment does not survive being moved.
    stamp="$({ echo "$DEADPOOL_ROOT"; cat "${locks[@]}" "$DEADPOOL_EMULATION" "$DEADPOOL_ROOT/setup.py"; } | sha256sum)"
    if ! _deadpool_fresh "$venv" "$stamp"; then
        _deadpool_locked "$venv" _deadpool_make "$venv" "$stamp" "${locks[@]}" || return 1
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
    local venv="$1" stamp="$2" locks=("${@:3}") name="${1##*/}" log="$1.log" python free_kb
    _deadpool_fresh "$venv" "$stamp" && return
    python="$(_deadpool_python)" || return
    free_kb="$(df -Pk "$DEADPOOL_ROOT" | awk 'NR == 2 {print $4}')"
    if (( free_kb < DEADPOOL_FREE_GB * 1024 * 1024 )); then
        _deadpool_trouble "$DEADPOOL_ROOT: $(( free_kb / 1024 / 1024 )) GB of disk free, $name needs" \
            "$DEADPOOL_FREE_GB GB: make room" || return
    fi
    echo "deadpool: making $name with $("$python" --version) from ${locks[*]##*/}, once: 3 GB to download, 5 GB on" \
        disk >&2
    deadpool_uv --version >/dev/null || return
    rm -rf "$venv"
    # On a terminal uv shows its progress there. Elsewhere its lines go into the log, progress to stderr too.
    if [[ -t 2 ]]; then
        _deadpool_install "$venv" "$python" "${locks[@]}" ||
            { _deadpool_trouble "$name could not be made: uv says why, above" || return; }
    else
        (set -o pipefail && _deadpool_install "$venv" "$python" "${locks[@]}" 2>&1 | tee "$log" |
            { grep --line-buffered -E '^ *(Resolved|Download|Prepared|Installed|Bytecode)' >&2 || :; }) ||
            { _deadpool_trouble "$name could not be made: $(_deadpool_error "$log")" || return; }
    fi
    echo "$stamp" >"$venv/.stamp"
}

# Further locks. Some of what is only imported there is built for this glibc, and runs with older ones too.
_deadpool_more() {
    local venv="$1"
    shift
    (( $# == 0 )) || deadpool_uv pip install --python "$venv/bin/python" --no-deps --compile-bytecode \
        --python-platform "$(uname -m)-manylinux_2_39" "${@/#/-r}"
}

_deadpool_install() {
    local into=(pip install --python "$1/bin/python" --no-deps)
    # Compiled here, or ten processes of a run would compile the same files at the same time.
    deadpool_uv venv --quiet --no-python-downloads --python "$2" "$1" &&
        deadpool_uv "${into[@]}" --compile-bytecode -r "$3" && _deadpool_more "$1" "${@:4}" &&
        deadpool_uv "${into[@]}" --quiet --compile-bytecode --target "$1/emulation" -r "$DEADPOOL_EMULATION" &&
        deadpool_uv "${into[@]}" --quiet --no-build-isolation -e "$DEADPOOL_ROOT"
}
