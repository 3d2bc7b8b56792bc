"""From kubeconfig, context and namespace to a connection, as kubectl goes about it."""

from __future__ import annotations

import importlib.util
import itertools
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_cli.errors import CliError, Exit, install_hint, same_place
from finetune_cli.kube.client import Cluster

#: Settings of a kubeconfig that name a file.
_FILES = {"cluster": ("certificate-authority",), "user": ("client-certificate", "client-key", "tokenFile")}
_CORRECT = "correct the path there, or choose another context with --context"
_IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(namespace: str | None, context: str | None, kubeconfig: Path | None, seconds: float = 30) -> Cluster:
    """Connect as kubectl would: --kubeconfig, else $KUBECONFIG, else ~/.kube/config, else the pod's service account."""
    if importlib.util.find_spec("kubernetes") is None:
        raise CliError("the Kubernetes client is not installed here", hint=install_hint("cli"))
    _require_kubeconfig(kubeconfig)
    from kubernetes import client, config  # takes seconds

    settings = client.Configuration()
    settings.retries = 1
    if kubeconfig is None and not _has_kubeconfig() and "KUBERNETES_SERVICE_HOST" in os.environ:
        try:
            config.load_incluster_config(settings)
        except config.ConfigException as error:
            raise CliError(
                f"no cluster to talk to: neither a kubeconfig nor this pod's service account: {str(error).rstrip('.')}",
                hint="mount the account's token (automountServiceAccountToken), or give --kubeconfig",
                code=Exit.UNREACHABLE,
            ) from None
        default = _IN_CLUSTER_NAMESPACE.read_text().strip() if _IN_CLUSTER_NAMESPACE.exists() else "default"
    else:
        default = _load(settings, context, kubeconfig)
    api = client.ApiClient(settings)
    api.user_agent = f"finetune/{version('finetune-operator')}"
    options = same_place(namespace, context, kubeconfig)
    return Cluster(api, namespace or default, settings.host, (min(5, seconds), seconds), options)


def _default_kubeconfig() -> str:
    """Return the user's files, joined by os.pathsep. The client reads $KUBECONFIG only once, when it is imported."""
    return os.environ.get("KUBECONFIG") or "~/.kube/config"


def _has_kubeconfig() -> bool:
    return any(Path(path).expanduser().is_file() for path in _default_kubeconfig().split(os.pathsep) if path)


def _require_kubeconfig(kubeconfig: Path | None) -> None:
    """Raise CliError where there is nothing to connect with."""
    if kubeconfig is not None and not kubeconfig.is_file():
        what = "is a folder" if kubeconfig.is_dir() else "no such file"
        raise CliError(f"--kubeconfig: {kubeconfig}: {what}")
    if kubeconfig is None and not _has_kubeconfig() and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise CliError(
            f"no cluster to talk to: {_default_kubeconfig()} is not there",
            hint="--kubeconfig FILE or $KUBECONFIG names another kubeconfig",
            code=Exit.UNREACHABLE,
        )


def _named(file: Path, kind: str) -> list[dict[str, Any]]:
    """Return the contexts, the clusters or the users in a kubeconfig; none if it is another file."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))[kind]
        return [{**each, "name": str(each["name"])} for each in found]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return []


def _missing_file(files: str, chosen: dict[str, Any] | None) -> str:
    """Return which setting of a context names a file that is not there; '' if none does."""
    context = (chosen or {}).get("context") or {}
    for file in (Path(each).expanduser() for each in files.split(os.pathsep) if each):
        for kind, keys in _FILES.items():
            entries = (each for each in _named(file, f"{kind}s") if each["name"] == context.get(kind))
            for entry, key in itertools.product(entries, keys):
                found = entry.get(kind)
                path = found.get(key) if isinstance(found, dict) else None
                if path and not (file.parent / str(path)).is_file():
                    return f"{key} of {kind} {entry['name']!r} is {file.parent / str(path)}, which does not exist"
    return ""


def _load(settings: Any, context: str | None, kubeconfig: Path | None) -> str:
    """Fill `settings` from a kubeconfig; returns the context's namespace."""
    import yaml
    from kubernetes import config

    file = str(kubeconfig) if kubeconfig else _default_kubeconfig()
    chosen: dict[str, Any] | None = None
    try:
        contexts, current = config.list_kube_config_contexts(file)
        chosen = next((each for each in contexts if each["name"] == context), None) if context else current
        if chosen is None:
            known = ", ".join(each["name"] for each in contexts) or "none"
            raise CliError(f"{file} has no context {context!r}", hint=f"it has: {known}")
        config.load_kube_config(file, context, settings, persist_config=False)
    except config.ConfigException as error:
        why, hint = str(error).splitlines()[0].rstrip("."), "--kubeconfig FILE or $KUBECONFIG names another"
        if missing := _missing_file(file, chosen):
            why, hint = missing, _CORRECT
        elif "current-context" in why and (found := _named(Path(file).expanduser(), "contexts")):
            names = ", ".join(each["name"] for each in found)
            why, hint = "it chooses no context (current-context)", f"--context chooses one of {names}"
        elif "current-context" in why:
            why = "it is no kubeconfig, which has clusters, users and contexts"
        elif why.endswith("is empty"):
            why = "it is empty"
        raise CliError(f"no cluster to talk to: {file}: {why}", hint=hint, code=Exit.UNREACHABLE) from None
    except UnicodeDecodeError:
        raise CliError(f"{file}: is no kubeconfig: it is no text") from None
    except yaml.YAMLError as error:
        raise CliError(f"{file}: not YAML: {str(error).splitlines()[0]}") from None
    except (TypeError, AttributeError, KeyError, ValueError, OSError) as error:
        # What the client's loader meets when the file is YAML and something else, or cannot be read.
        if isinstance(error, OSError) and (missing := _missing_file(file, chosen)):
            raise CliError(f"no cluster to talk to: {file}: {missing}", hint=_CORRECT, code=Exit.UNREACHABLE) from None
        raise CliError(f"{file}: is no kubeconfig: {error}") from None
    return str((chosen.get("context") or {}).get("namespace") or "default")
