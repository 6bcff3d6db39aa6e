#!/usr/bin/env bash
# Regenerates the committed stubs in framewire/*/v1 and docs/api.md from proto/. Run it through `make proto`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

include=$("$python" -c 'import grpc_tools, pathlib; print(pathlib.Path(grpc_tools.__file__).parent / "_proto")')
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -Iproto -I"$include" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  --include_imports --include_source_info --descriptor_set_out="$out/contracts.binpb" \
  $(find proto -name '*.proto' | sort)

# buf.validate is vendored beneath our own package, so that no other distribution's copy can clash with it.
find "$out" -name '*.py*' -print0 | xargs -0 sed -i -E \
  -e 's/^from buf\.validate import/from framewire.buf.validate import/' \
  -e 's/^import buf\.validate\./import framewire.buf.validate./' \
  -e 's/\bbuf\.validate\.validate_pb2\b/framewire.buf.validate.validate_pb2/g' \
  -e 's/framewire\.framewire\./framewire./g'
# Files without a service leave empty gRPC stubs behind.
find "$out" -name '*_pb2_grpc.py' | while read -r stub; do
  grep -q '^class .*Stub' "$stub" || rm -f "$stub" "${stub}i"
done
mkdir -p framewire/buf
rm -rf framewire/*/v1 framewire/buf/validate
cp -r "$out/buf/validate" framewire/buf/validate
for package in "$out"/framewire/*; do
  mkdir -p "framewire/$(basename "$package")"
  cp -r "$package/v1" "framewire/$(basename "$package")/v1"
done
PYTHONPATH=. "$python" proto/document.py "$out/contracts.binpb" docs/api.md
