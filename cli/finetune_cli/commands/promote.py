"""`finetune promote` and `finetune rollback`: move the pointer of a prefix to an adapter, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.errors import CliError
from finetune_cli.options import AdapterSource, Context, Kubeconfig, Namespace, Output, OutputFormat
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_api.latest import Latest

Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="PREFIX",
        help="Prefix whose pointer moves. Default: the folder above the adapter.",
        show_default=False,
    ),
]


def promote(
    source: AdapterSource,
    prefix: Prefix = None,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Make an adapter the one that readers of its prefix get.

    PREFIX/latest.json names one adapter below the prefix by its path and the SHA-256 of its manifest. Where an
    adapter's URI is taken (download, chat, publish.onlyIf of a job), the prefix can be given in its place. First all
    files of the adapter are compared with its manifest, and its signature with FINETUNE_PUBLIC_KEY if that is set. The
    pointer moves in one step, and not at all if somebody else moved it meanwhile. An adapter that was kept below
    candidates/ can be promoted too.

    Examples:
        finetune promote s3://adapters/nli/run-7
        finetune promote nli-run-7
        finetune promote s3://adapters/nli/run-7/candidates/nli-0f3c9a77 --prefix s3://adapters/nli

    Exit codes:
        0    the pointer names the adapter
        1    the input is wrong, or somebody else moved the pointer
        3    the store is out of reach, or access is denied
        5    a file does not match its digest, or the signature does not fit
    """
    from finetune_api.latest import Latest
    from finetune_cli import promotion, storage
    from finetune_cli.published import address_of, locate

    address = locate(source, namespace, context, kubeconfig, "finetune promote {}", adapters_only=True).address
    where = address_of(prefix) if prefix else promotion.default_prefix(address)
    path = promotion.path_below(where, address)
    store = storage.open_store(where, subject="prefix")
    before = promotion.read(store)
    with console.err().status(f"Comparing {address} with its manifest"):
        new = promotion.checked(store, path)
    remark = ""
    if before and (before[0].current.path, before[0].current.manifest_digest) == (new.path, new.manifest_digest):
        pointer = before[0]
    else:
        pointer = before[0].promoted(new) if before else Latest(current=new)
        remark = promotion.move(store, pointer, before[1] if before else None)
    _show(where, pointer, output, remark)


def rollback(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix with a latest.json.", show_default=False)],
    list_only: Annotated[bool, typer.Option("--list", help="Show the history, and move nothing.")] = False,
    output: Output = None,
) -> None:
    """Make the adapter before the present one what readers of a prefix get.

    It is compared with its manifest first, and must be the one that was promoted. Each call goes back one more; the
    history holds the latest 50.

    Examples:
        finetune rollback s3://adapters/nli
        finetune rollback s3://adapters/nli --list

    Exit codes:
        0    the pointer names the adapter before
        1    there is none before, or somebody else moved the pointer
        3    the store is out of reach, or access is denied
        5    the adapter before is no longer what was promoted
    """
    from finetune_cli import promotion, storage
    from finetune_cli.published import address_of

    where = address_of(prefix).rstrip("/")
    store = storage.open_store(where, subject="prefix")
    before = promotion.read(store)
    if before is None and where.startswith("file://") and not Path(where.removeprefix("file://")).is_dir():
        hint = "PREFIX is the folder above adapters: a URI, or a path of this machine"
        raise CliError(f"nothing was promoted at {where}: there is no such folder", hint=hint)
    if before is None:
        raise CliError(
            f"nothing was promoted at {where}: it has no latest.json",
            hint=f"the folder above the adapter is meant; finetune promote {where}/ADAPTER makes it",
        )
    pointer, data = before
    remark = ""
    if not list_only:
        earlier = pointer.rolled_back()
        if earlier is None:
            raise CliError(
                f"there is nothing to roll {where} back to: {pointer.current.path} is the first in its history",
                hint=f"finetune promote {where}/ADAPTER moves the pointer to any other adapter",
            )
        with console.err().status(f"Comparing {where}/{earlier.current.path} with its manifest"):
            promotion.checked(store, earlier.current.path, earlier.current.manifest_digest)
        remark = promotion.move(store, earlier, data)
        pointer = earlier
    _show(where, pointer, output, remark)


def _show(where: str, pointer: Latest, output: OutputFormat | None, remark: str) -> None:
    if remark:
        console.note(remark)
    if output:
        console.structured({"prefix": where, **pointer.manifest()}, output)
        return
    console.done(f"{where}/latest.json names {pointer.current.path} ({pointer.current.manifest_digest})")
    for each in pointer.history:
        console.note(f"before {each.promoted_at:%Y-%m-%d %H:%M}  {each.path} ({each.manifest_digest[:19]})")
