#!/bin/bash
# Prints a Python that has what dev/hf needs. PYTHON names one; else python3 when it has torch and
# transformers already; else a virtual environment .venv is made in the repository and
# dev/hf/requirements.txt is installed into it (about 1.5 GB; torch's CPU build where pip is told of
# its index by PIP_EXTRA_INDEX_URL).
cd "$(dirname "$0")/../.." || exit 1
works() { "$1" -c 'import torch, transformers, safetensors, numpy, matplotlib' 2> /dev/null; }
if [ -n "$PYTHON" ]; then
    works "$PYTHON" || {
        echo "error: PYTHON=$PYTHON lacks torch, transformers, safetensors, numpy or matplotlib," \
            "hint: $PYTHON -m pip install -r dev/hf/requirements.txt" >&2
        exit 1
    }
    echo "$PYTHON"
    exit
fi
for python in .venv/bin/python python3; do
    works $python || continue
    echo $python
    exit
done
command -v python3 > /dev/null || {
    echo "error: no python3, hint: apt-get install python3-venv" >&2
    exit 1
}
echo "python: making .venv and installing dev/hf/requirements.txt into it, this takes minutes" >&2
python3 -m venv .venv >&2 || {
    echo "error: python3 -m venv did not succeed, hint: apt-get install python3-venv" >&2
    exit 1
}
.venv/bin/python -m pip install --quiet -r dev/hf/requirements.txt >&2 || {
    echo "error: pip did not succeed, hint: see above; it needs a network" >&2
    exit 1
}
echo .venv/bin/python
