#!/bin/sh
# The throw-away environment of the packages that deer_jax is compared with: make_env.sh FOLDER
set -eu
folder=${1:?usage: make_env.sh FOLDER}
python3 -m venv "$folder"
# torch first, by its number: the CPU build, where pip has one at hand; the other packages then leave it as it is.
"$folder/bin/python" -m pip install --quiet torch==2.13.0
"$folder/bin/python" -m pip install --quiet "dflash[local]==0.1.0"
"$folder/bin/python" -c 'import torch, transformers, dflash; print("torch", torch.__version__, "transformers", transformers.__version__)'
