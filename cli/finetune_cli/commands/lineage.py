"""`finetune lineage`: what a published adapter was made of, and the adapters that it continues."""

from __future__ import annotations

from typing import Any

from finetune_api import constants
from finetune_cli.errors import CliError, Exit
from finetune_cli.options import AdapterSource, Context, Kubeconfig, Namespace, Output
from finetune_cli.output import console
from finetune_cli.published import Published, locate, published_at

#: Adapters of a chain that are shown.
LONGEST = 50
_TITLES = {
    "job": "Job",
    "createdAt": "Published",
    "manifestDigest": "Digest",
    "baseModel": "Base model",
    "baseCommit": "Base commit",
    "specDigest": "Spec",
    "trainRows": "Training rows",
    "evalRows": "Held-out rows",
    "codeVersion": "Trained by",
    "evalLoss": "Held-out loss",
}


def lineage(
    source: AdapterSource,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show what an adapter was made of, and the chain of adapters that it continues (lora.initFrom).

    Of each adapter: its job, the base model and its commit, digests of the spec (training/job.yaml), of the training
    and the held-out rows, the version that trained it, and its metrics. A manifest names the digest of the one before
    it: an adapter that was replaced since is told.

    Examples:
        finetune lineage nli
        finetune lineage s3://adapters/nli -o json

    Exit codes:
        0    the chain is whole
        1    the input is wrong
        3    a store is out of reach, or access is denied
        5    an adapter of the chain was replaced since it was continued
    """
    chain, fault = _chain(locate(source, namespace, context, kubeconfig, "finetune lineage {}"))
    if output:
        console.structured(chain, output)
    else:
        _show(chain)
    if fault:
        raise fault


def _chain(first: Published) -> tuple[list[dict[str, Any]], CliError | None]:
    """Return the adapters, the newest first, and why the chain ends before its beginning."""
    chain: list[dict[str, Any]] = []
    here = first
    while True:
        chain.append(_facts(here))
        parent = here.manifest.lineage.parent if here.manifest.lineage else None
        if parent is None:
            return chain, None
        chain[-1]["continues"] = parent.uri
        if len(chain) == LONGEST:
            return chain, CliError(f"the chain goes on after {LONGEST} adapters")
        try:
            above = published_at(parent.uri)
        except CliError as error:
            return chain, CliError(f"{here.address} continues {parent.uri}: {error.message}", code=error.code)
        if parent.manifest_digest != f"sha256:{above.digest}":
            was = parent.manifest_digest or "no adapter with a manifest of ours"
            said = f"{parent.uri} is not what {here.address} continues: it was {was}, it is sha256:{above.digest}"
            return chain, CliError(said, code=Exit.CORRUPT)
        here = above


def _facts(adapter: Published) -> dict[str, Any]:
    manifest = adapter.manifest
    job, made = manifest.job, manifest.lineage
    spec = next((f.sha256 for f in manifest.files if f.path == f"{constants.TRAINING_DIR}/job.yaml"), None)
    found = {
        "uri": adapter.address,
        "job": "/".join(part for part in (job.namespace, job.name) if part) if job else None,
        "createdAt": manifest.created_at.isoformat(timespec="seconds"),
        "manifestDigest": f"sha256:{adapter.digest}",
        "baseModel": manifest.base_model,
        "baseCommit": manifest.base_commit,
        "specDigest": f"sha256:{spec}" if spec else None,
        "trainRows": made.train_rows if made else None,
        "evalRows": made.eval_rows if made else None,
        "codeVersion": made.code_version if made else None,
        "metrics": manifest.metrics or None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _show(chain: list[dict[str, Any]]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for index, facts in enumerate(chain):
        console.out().print(Text(("continues " if index else "") + facts["uri"], style="bold"), soft_wrap=True)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="dim")
        grid.add_column(overflow="fold")
        shown = facts | {"evalLoss": facts.get("metrics", {}).get("evalLoss")}
        for key, title in _TITLES.items():
            if (value := shown.get(key)) is not None:
                grid.add_row(title, f"{value:.4f}" if isinstance(value, float) else str(value))
        console.page(Padding(grid, (0, 0, 0, 2)))
