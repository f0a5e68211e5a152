#!/usr/bin/env bash
# Compiles the locks that the Makefile and the Dockerfile install.
# Names, versions and hashes only: where packages come from is each machine's own setting.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  local target=$1
  shift
  "${UV:-uv}" pip compile -q --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-annotate --no-header "$@" pyproject.toml -o "requirements/$target.txt"
}
compile all --all-extras
compile api --extra server --extra fleet --extra s3 --extra cli -c requirements/all.txt
compile worker --extra worker --extra fleet --extra s3 --extra server --extra cli -c requirements/all.txt
