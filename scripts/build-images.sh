#!/usr/bin/env bash
# Build both images with the first of docker, podman, buildah that is there.
# Settings, all optional: BASE (base image), TAG, REGISTRY, BUILD_ARGS (more arguments for the build).
set -euo pipefail
cd "$(dirname "$0")/.."

for engine in ${ENGINE:-docker podman buildah}; do
  if command -v "$engine" >/dev/null && { [ "$engine" != docker ] || docker info >/dev/null 2>&1; }; then
    found=$engine
    break
  fi
done
if [ -z "${found:-}" ]; then
  echo "No docker (with a running engine), podman or buildah was found: install one, or name it with ENGINE=…" >&2
  exit 1
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
for image in operator trainer; do
  name=${REGISTRY:+$REGISTRY/}finetune-$image:${TAG:-$version}
  echo "Building $name with $found"
  arguments=(--file "images/$image/Containerfile" --tag "$name" --build-arg "VERSION=$version")
  [ -z "${BASE:-}" ] || arguments+=(--build-arg "BASE=$BASE")
  # BUILD_ARGS holds several words on purpose.
  # shellcheck disable=SC2086
  "$found" build "${arguments[@]}" ${BUILD_ARGS:-} .
done
