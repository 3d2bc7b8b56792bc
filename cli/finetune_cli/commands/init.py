"""`finetune init`: a commented manifest to begin with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.errors import CliError
from finetune_cli.output import console

_TEMPLATE = """\
# What is not written here is a default: `finetune plan {file}` shows every value and what it does to memory.
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: {name}
spec:
  model:
    source: {model}
    # revision: <tag or commit>        # pins the weights
    # secretRef: {{name: hf-token}}      # a Secret with HF_TOKEN, for gated models

  dataset:
    train: {data}
{held_out}
    # secretRef: {{name: object-store}}  # a Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL

  # lora: {{rank: 16, alpha: 32}}
  # training: {{epochs: 3, learningRate: 2e-4, batchSize: 16, maxLength: 512}}
  # resources: {{gpusPerNode: 1}}        # 0 trains on the CPU

  output:
    uri: {output}
    # secretRef: {{name: object-store}}
    # overwrite: true                  # replace an adapter that is already there
"""


def init(
    file: Annotated[Path, typer.Argument(help="The manifest to write.")] = Path("job.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", help="owner/name of the hub, a URI, or a folder.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Training rows: a URI, or a file.", show_default=False)
    ] = None,
    held_out: Annotated[
        str | None, typer.Option("--eval", help="Held-out rows: a URI, or a file.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Where the adapter goes: a URI, or a folder.", show_default=False)
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The job's name.")] = "my-job",
) -> None:
    """Write a manifest with comments, by options or by questions.

    It asks for what is not given, on a terminal. Files and folders become file://, which finetune run reads; a
    cluster needs hf://, s3:// or pvc://.

    Examples:
        finetune init
        finetune init nli.yaml --model Qwen/Qwen2.5-0.5B --data rows.jsonl
        finetune init --model hf://owner/name --data s3://data/rows.jsonl --output 's3://adapters/{name}'
    """
    from finetune_api import manifest

    if file.exists():
        raise CliError(f"{file}: is already there", hint="name another file, or remove it")
    model = _given(model, "--model", "Base model (owner/name of the hub, a URI, or a folder)")
    data = _given(data, "--data", "Training rows (a URI, or a file)")
    _require_model(model)
    text = _TEMPLATE.format(
        file=file,
        name=json.dumps(name, ensure_ascii=False),
        model=_written(_hub_or_place(model), file),
        data=_written(data, file),
        held_out=f"    eval: {_written(held_out, file)}" if held_out else "    # eval: <rows to measure on>",
        output=_written(output or "file://./{name}", file),
    )
    try:
        job = manifest.load_text(text, str(file), file.parent)
    except manifest.ManifestError as error:
        raise CliError(str(error)) from None
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        why = error.strerror if file.parent.is_dir() else f"there is no folder {file.parent}"
        raise CliError(f"{file}: cannot be written: {why}") from None
    console.done(f"{file} written: {job.metadata.name}")
    for place in (data, held_out):
        if place and "://" not in place and not Path(place).expanduser().exists():
            console.note(f"{place} is not here yet; a data set of the hub is written hf://datasets/owner/name")
    is_local = any(uri.startswith("file://") for uri in job.spec.uris.values())
    console.next_commands(
        f"finetune validate {file}",
        f"finetune plan {file}",
        f"finetune run {file}" if is_local else f"finetune submit {file} --watch",
    )


def _given(value: str | None, option: str, question: str) -> str:
    """Return an option's value, asked for if it is missing."""
    if value:
        return value
    if not sys.stdin.isatty():
        raise CliError(f"{option} is missing", hint="finetune init --help")
    return str(typer.prompt(question))


def _require_model(model: str) -> None:
    """Refuse a name that is neither the hub's nor a folder's."""
    if "://" not in model and "/" not in model and not Path(model).expanduser().exists():
        raise CliError(
            f"--model: {model!r} is neither owner/name of the hub nor a folder here",
            hint="for example --model Qwen/Qwen2.5-0.5B, --model ./model or --model s3://bucket/model",
        )


def _hub_or_place(model: str) -> str:
    """Return owner/name as the hub's URI, unless a folder here has that name."""
    is_hub = "://" not in model and model.count("/") == 1 and model[:1] not in "./~" and not Path(model).exists()
    return f"hf://{model}" if is_hub else model


def _written(place: str, file: Path) -> str:
    """Return a URI, or a path of this machine as one, as YAML."""
    if "://" not in place:
        path = Path(place).expanduser().absolute()
        relative = os.path.relpath(path, file.absolute().parent)
        place = f"file://{path}" if relative.startswith("..") else f"file://./{relative}"
    return json.dumps(place, ensure_ascii=False)
