"""What to type next, by what was done and how it ended. Pure."""

from __future__ import annotations

from finetune_cli.output.job_view import View
from finetune_cli.output.run_summary import local_path


def after_job(view: View, place: str) -> list[str]:
    """Return the commands that fit a job of the cluster where it is now.

    Args:
        view: The job.
        place: Options that name its namespace and cluster.
    """
    name = f"{view.name}{place}"
    if view.is_kept_back and view.status.candidate:
        return [f"finetune chat {view.status.candidate.uri}", f"finetune promote {view.status.candidate.uri}"]
    if view.state == "succeeded":
        # A volume of the cluster is not to be read from here.
        is_near = view.status.adapter is not None and not view.status.adapter.uri.startswith("pvc://")
        return [f"finetune chat {name}", f"finetune download {view.name} ./{view.name}{place}"] if is_near else []
    return {
        "failed": [f"finetune logs {name}"],
        "running": [f"finetune watch {name}", f"finetune logs -f {name}"],
        "waiting": [f"finetune watch {name}"],
        "suspended": [],  # the page tells how to resume it
    }[view.state]


def after_export(kind: str, uri: str) -> list[str]:
    """Return the commands that use what was made of an adapter."""
    if uri.startswith("file://"):
        folder = local_path(uri)
        used = {"merged": f"vllm serve {folder}", "gguf": f"ollama create my-model -f {folder}/Modelfile"}
        return [used[kind]] if kind in used else []
    return [f"finetune download {uri} ./{kind}"] if uri.startswith("s3://") else []
