"""`finetune export`: make something of an adapter that was published before, on this machine."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.errors import CliError
from finetune_cli.local_trainer import explained, published_adapter, quiet, require_trainer
from finetune_cli.options import AdapterSource, Context, Kubeconfig, Namespace, OtherBase
from finetune_cli.output import console, formatting
from finetune_cli.published import locate


class Kind(StrEnum):
    """What an adapter can be made into."""

    MERGED = "merged"
    GGUF = "gguf"
    OCI = "oci"
    HF = "hf"


class Quantization(StrEnum):
    """How the weights of a GGUF file are stored."""

    Q8_0 = "q8_0"
    F16 = "f16"
    Q4_0 = "q4_0"


#: The credentials' role, of what goes to a place of its own.
_ROLES = {Kind.OCI: "oci", Kind.HF: "hf"}


def export(
    source: AdapterSource,
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|URI", help="Where it goes: a folder, s3://, oci:// or hf://.", show_default=False),
    ],
    kind: Annotated[Kind, typer.Option("--to", metavar="merged|gguf|oci|hf", help="What to make.")] = Kind.MERGED,
    quantization: Annotated[
        Quantization,
        typer.Option("--quantization", metavar="q8_0|f16|q4_0", help="How a GGUF file stores the weights."),
    ] = Quantization.Q8_0,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            metavar="FILE",
            help="Rows to compare on, in the format of the training data. Default: the job's held-out rows.",
            show_default=False,
        ),
    ] = None,
    base: OtherBase = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Make something of a published adapter, as output.artifacts does in a job.

    merged is the whole model in 16-bit safetensors; gguf is one file for llama.cpp, with a Modelfile for Ollama; oci is
    the adapter itself as an image in a registry, with the login of ~/.docker/config.json; hf is the adapter in a model
    repository of the hub, with HF_TOKEN. The adapter is fetched and
    verified as by finetune download. The base model is loaded as it was trained, weights are merged tensor by tensor,
    and the result is loaded back: nothing is published unless its loss on held-out rows is the adapter's. Temporary
    files, as large as the model in 16 bits, go to $TMPDIR.

    Examples:
        finetune export nli ./nli-merged --to merged
        finetune export s3://adapters/nli s3://adapters/nli/merged
        finetune export nli ./nli-gguf --to gguf --quantization q4_0
        finetune export nli oci://registry.example.com/team/nli:v1 --to oci
        finetune export nli hf://my-org/nli --to hf
        finetune export ./nli ./nli-merged --base ./models/Mistral-7B-v0.3 --rows test.jsonl

    Exit codes:
        0    it is published, and computes what the adapter does
        1    the input is wrong, or the base model or the rows are not here
        3    the store or the hub is out of reach, or access is denied
        5    a file does not match its digest, or the result computes something else
    """
    if rows is not None and not rows.is_file():
        raise CliError(f"{rows}: no such file")
    if kind in _ROLES and not target.startswith(f"{kind.value}://"):
        raise CliError(f"{target} is no {kind.value}:// URI, which --to {kind.value} needs")
    from finetune_cli.output.next_steps import after_export

    require_trainer("exporting")
    published = locate(source, namespace, context, kubeconfig, f"finetune export {{}} {target}", adapters_only=True)
    address = target if "://" in target else f"file://{Path(target).absolute()}"
    changes = [f"dataset.eval=file://{rows.absolute()}", "dataset.evalFraction=null"] if rows else []
    changes += [f"dataset.train=file://{rows.absolute()}", "dataset.sources=null"] if rows else []
    changes += [f"output.gguf.quantization={quantization.value}"]
    with explained(), tempfile.TemporaryDirectory(prefix="finetune-export-") as work:
        adapter = published_adapter(published, Path(work), base, changes)
        with quiet(), console.err().status(f"Exporting {published.address} to {kind.value}"):
            from finetune_cli import storage
            from finetune_trainer.publishing.artifact import VerificationFailed
            from finetune_trainer.publishing.later import export_published

            store = storage.open_store(address, role=_ROLES.get(kind, "output"), subject=kind.value)
            try:
                made = export_published(adapter.folder, adapter.settings, Path(work), kind.value, store)
            except VerificationFailed as error:
                raise CliError(str(error), code=5) from None
    console.done(
        f"{kind.value} published at {made.uri} ({formatting.size(made.size_bytes or 0)}), all checksums verified"
    )
    console.note(f"Loss {formatting.loss(made.loss or 0)}; the adapter's is {formatting.loss(made.adapter_loss or 0)}")
    if (commands := after_export(kind.value, made.uri or address)) and console.out().is_terminal:
        console.next_commands(*commands)
