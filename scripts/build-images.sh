#!/usr/bin/env bash
# Build both images with the first of docker, podman, buildah that is there, and write what each holds, as a CycloneDX
# list, to dist/. Settings, all optional:
#   REGISTRY    registry, with the folder there, to name the images after: the chart's image.registry
#   TAG         their tag; the project's version
#   PUSH=1      push them as well
#   BASE        base image, with Python 3.11 to 3.14: requirements.lock has the hashes for these
#   SOURCE      address of the source code, for the label of that name
#   ENGINE      docker, podman or buildah
#   BUILD_ARGS  more arguments for the build, such as "--build-arg FLASH_ATTN=1 --build-arg DEVEL_BASE=..."
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

# Print a file of an image.
read_from() {
  if [ "$found" = buildah ]; then
    container=$(buildah from --pull-never "$1")
    buildah run --network none "$container" -- cat "$2"
    buildah rm "$container" >/dev/null
  else
    "$found" run --rm --network none --entrypoint cat "$1" "$2"
  fi
}

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
tag=${TAG:-$version}
labels=(
  --build-arg "VERSION=$version"
  --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)"
  --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  --build-arg "SOURCE=${SOURCE:-unknown}"
)
mkdir -p dist
for image in operator trainer; do
  name=${REGISTRY:+${REGISTRY%/}/}finetune-$image:$tag
  echo "Building $name with $found"
  arguments=(--file "images/$image/Containerfile" --tag "$name" "${labels[@]}")
  [ -z "${BASE:-}" ] || arguments+=(--build-arg "BASE=$BASE")
  # BUILD_ARGS holds several words on purpose.
  # shellcheck disable=SC2086
  "$found" build "${arguments[@]}" ${BUILD_ARGS:-} .
  list=dist/finetune-$image-$tag.cdx.json
  read_from "$name" /opt/finetune/share/sbom.cdx.json >"$list"
  echo "$list lists what is in it"
  [ -z "${PUSH:-}" ] || "$found" push "$name"
done
