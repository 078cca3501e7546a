#!/usr/bin/env bash
# Run the tests on other versions, in an environment of their own that is removed afterwards
# (5 GB while it lasts):
#
#   tools/try_versions.sh PYTHON "REQUIREMENTS" [arguments of pytest]
#   tools/try_versions.sh python3.10 "torch==2.6.0 torchvision==0.21.0 numpy==1.26.4" tests -n 2
#
# The last line says which versions they were, and what pytest said.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
python=$1
read -ra requirements <<< "$2"
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
bin=$folder/venv/bin
# The pins of constraints.txt, but for the versions that are tried.
grep -vE '^(torch|torchvision)==' constraints.txt > "$folder/constraints.txt"
pip() { "$bin/python" -m pip install -q --no-cache-dir -c "$folder/constraints.txt" "$@"; }
pip setuptools wheel
pip "${requirements[@]}" -e ".[dev,convert,export,publish,report,study,video]"
"$bin/python" tools/install_detectron2.py

status=0
# The checkout's own package, and not another that the environment around may name.
env -u PYTHONPATH "$bin/python" -m pytest "$@" 2>&1 | tee "$folder/log" || status=$?
versions=$("$bin/python" - <<'PY'
import platform
from importlib.metadata import version

names = ("torch", "torchvision", "numpy", "scipy", "Pillow")
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names), sep=", ")
PY
)
echo "$versions: $(grep -E ' (passed|failed|error)' "$folder/log" | tail -n 1)"
exit "$status"
