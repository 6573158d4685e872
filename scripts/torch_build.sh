# Installs the build of torch that fits the machine. Sourced by scripts/make_env and scripts/canary.py, not run.
# Setting: TORCH_CPU_INDEX, the index where a CPU build is looked for when pip's own sources have none.

TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

# PyPI's torch for Linux brings several GB of CUDA, which are wasted without a GPU. On macOS there is only one build.
wanted_torch_build() {
    if [ "$(uname)" = Darwin ] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then
        echo default
    else
        echo cpu
    fi
}

# install_torch VENV BUILD REQUIREMENTS: installs the torch that a requirements file pins, and sets torch_build to the
# build that was installed. Messages for the user go to file descriptor 3. The environment must have uv.
install_torch() {
    local venv=$1 pip=("$1/bin/python" -m pip install --disable-pip-version-check --progress-bar off) torch
    torch=$(grep '^torch==' "$3")
    torch_build=$2
    if [ "$torch_build" = cpu ]; then
        # "+cpu" is never on PyPI: with it, a CUDA build can't be taken by mistake.
        "${pip[@]}" "$torch+cpu" && return
        "${pip[@]}" --retries 2 --timeout 30 "$torch+cpu" --extra-index-url "$TORCH_CPU_INDEX" && return
        torch_build=default
        printf 'no CPU build of %s for this Python in pip'\''s sources or at %s: the default build, which is several GB ... ' \
            "$torch" "$TORCH_CPU_INDEX" >&3
    fi
    "$venv/bin/uv" pip install --python "$venv/bin/python" "$torch"
}

# install_newest_torch VENV REQUIREMENTS [PIP OPTIONS]: installs the newest CPU build at $TORCH_CPU_INDEX. With a GPU, or
# where that index can't be reached, installs the pinned version as install_torch does.
install_newest_torch() {
    local venv=$1 requirements=$2
    shift 2
    torch_build=$(wanted_torch_build)
    if [ "$torch_build" = cpu ]; then
        "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off --retries 2 --timeout 30 "$@" torch \
            --index-url "$TORCH_CPU_INDEX" && return
        printf 'no CPU builds at %s: torch as it is pinned ... ' "$TORCH_CPU_INDEX" >&3
    fi
    install_torch "$venv" "$torch_build" "$requirements"
}
