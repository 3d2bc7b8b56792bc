"""From the Kubernetes client's exceptions to one sentence a user can act on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from finetune_api import constants
from finetune_cli.errors import CliError, Exit

#: How the API server says that no Role of the user's grants something.
_NOT_GRANTED = re.compile(
    r'User "(?P<user>[^"]+)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]+)")?'
)
_READING = ("get", "list", "watch")
#: The API server remembers under this name what the command line has set.
FIELD_MANAGER = "finetune-cli"


class NoNamespace(CliError):
    """The namespace that a command acts in does not exist."""

    def __init__(self, name: str) -> None:
        hint = "kubectl get namespaces lists those that do; -n chooses one"
        super().__init__(f"namespace {name!r} does not exist", hint=hint)


class OwnConflict(CliError):
    """Server-side apply meets fields that `suspend` or `resume` has set: their patches count as another owner's."""


@contextmanager
def explained(
    server: str, namespace: str, name: str = "", what: str = constants.KIND, selector: str | None = None
) -> Iterator[None]:
    """Turn whatever the client raises inside the block into a CliError.

    Args:
        server: Where the API is.
        namespace: What was asked for is there; empty for all.
        name: Of the object.
        what: Its kind.
        selector: The user's, where objects are listed.
    """
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        if error.status == HTTPStatus.BAD_REQUEST and selector:
            raise _bad_selector(_status(error), selector) from None
        raise refusal(error.status or 0, _status(error), server, namespace, name, what) from None
    except (RecursionError, ValueError) as error:
        why = "an object in it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise CliError(
            f"the answer of the cluster at {server} cannot be read: {why}",
            hint="finetune list shows which job cannot be read; is a proxy in between?",
            code=Exit.UNREACHABLE,
        ) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise CliError(
            f"the cluster at {server} is out of reach: {reason(error)}",
            hint="kubectl cluster-info tells whether it is up; --context chooses another",
            code=Exit.UNREACHABLE,
            may_pass=True,
        ) from None


def _status(error: Any) -> dict[str, Any]:
    """Return the Status object in an answer; only a message where it holds something else."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body
    try:
        parsed = json.loads(body)
    except (TypeError, ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        return {"message": (body or str(error.reason or "")).strip()}
    details = parsed.get("details")
    details = details if isinstance(details, dict) else {}
    causes = details.get("causes")
    causes = [cause for cause in causes if isinstance(cause, dict)] if isinstance(causes, list) else []
    return {**parsed, "details": {**details, "causes": causes}}


def refusal(code: int, status: dict[str, Any], server: str, namespace: str, name: str, what: str) -> CliError:
    """Return the sentence for an HTTP error. Pure."""
    message = str(status.get("message") or f"HTTP {code}")
    where = f" in namespace {namespace!r}" if namespace else ""
    if code == 401:
        return CliError(
            f"unauthorized: the credentials for {server} are missing, wrong or expired",
            hint="log in again, or choose another user with --context",
            code=Exit.UNREACHABLE,
        )
    if code == 403:
        return CliError(f"access denied: {message}", hint=_grant(message), code=Exit.UNREACHABLE, is_denied=True)
    if code == 404:
        return _not_found(status, server, where, name, what)
    if code == 409:
        return _conflict(status, name, message)
    if code in (400, 422):
        return CliError(_causes(status) or message)
    return CliError(
        f"the cluster at {server} answered {code}: {message}",
        code=Exit.UNREACHABLE,
        may_pass=code in (410, 429) or code >= 500,
    )


def _bad_selector(status: dict[str, Any], selector: str) -> CliError:
    return CliError(
        f"selector {selector!r} cannot be read: {status.get('message')}",
        hint="--selector takes KEY=VALUE, KEY!=VALUE, KEY, '!KEY' or 'KEY in (ONE, OTHER)', several joined by commas",
    )


def _grant(message: str) -> str:
    """Return how an administrator grants what RBAC has denied; what else denies, such as a quota, says so itself."""
    if not (found := _NOT_GRANTED.search(message)):
        return "ask the cluster's administrator"
    if found["user"] == "system:anonymous":
        return "the cluster was not told who you are: log in again, or choose another user with --context"
    role = "view" if found["verb"] in _READING else "edit"
    where = f" in namespace {found['namespace']}" if found["namespace"] else " in all namespaces"
    by = " (by rbac.aggregateToUserRoles of the operator's chart)" if found["group"] == constants.GROUP else ""
    kind, place = ("rolebinding", f" -n {found['namespace']}") if found["namespace"] else ("clusterrolebinding", "")
    user = shlex.quote(found["user"])
    return (
        f"ask an administrator for the right to {found['verb']} {found['resource']}{where}. The ClusterRole {role}"
        f" holds it{by}: kubectl create {kind} finetune-{role} --clusterrole={role} --user={user}{place}"
    )


def _not_found(status: dict[str, Any], server: str, where: str, name: str, what: str) -> CliError:
    missing = status.get("details") or {}
    if missing.get("kind") == "namespaces":
        return NoNamespace(str(missing.get("name")))
    if name and missing.get("name") == name:
        hint = "finetune list -A shows all jobs, finetune list --sweeps -A all sweeps"
        return CliError(f"there is no {what} {name!r}{where}", hint=hint, is_missing=True)
    return CliError(
        f"{what if what == constants.SWEEP_KIND else constants.KIND}s are not installed in the cluster at {server}",
        hint="install the operator's chart, or at least: kubectl apply --server-side -f crds/",
        code=Exit.UNREACHABLE,
    )


def _conflict(status: dict[str, Any], name: str, message: str) -> CliError:
    causes = (status.get("details") or {}).get("causes") or []
    fields = [f"{str(cause.get('field', '')).lstrip('.')} ({cause.get('message')})" for cause in causes]
    if fields:
        ours = f'conflict with "{FIELD_MANAGER}"'
        kind = OwnConflict if all(str(cause.get("message")).startswith(ours) for cause in causes) else CliError
        return kind(
            f"{name} has fields that something else has set: {'; '.join(fields)}",
            hint="add --force to take them over",
        )
    return CliError(f"{name}: {message}")


def _causes(status: dict[str, Any]) -> str:
    """One line for each field the server refuses, in the words of `finetune validate`."""
    causes = (status.get("details") or {}).get("causes") or []
    return "\n".join(f"{cause.get('field')}: {cause.get('message')}" for cause in causes if cause.get("field"))


def reason(error: BaseException) -> str:
    """Why a connection failed, in a few words. urllib3's own texts name objects and memory addresses."""
    seen: BaseException | None = error
    chain: list[BaseException] = []
    while seen is not None and len(chain) < 8:
        chain.append(seen)
        seen = getattr(seen, "reason", None) if isinstance(getattr(seen, "reason", None), BaseException) else None
        seen = seen or chain[-1].__cause__ or chain[-1].__context__
    text = " ".join(f"{type(each).__name__} {each}" for each in chain).lower()
    for sign, words in (
        ("refused", "connection refused"),
        ("nameresolution", "its name does not resolve"),
        ("name or service not known", "its name does not resolve"),
        ("certificate", "its certificate is not trusted"),
        ("ssl", "the TLS connection failed"),
        ("timed out", "no answer in time"),
        ("timeout", "no answer in time"),
        ("unreachable", "no route to it"),
        ("reset", "the connection was cut"),
        ("aborted", "the connection was cut"),
    ):
        if sign in text:
            return words
    return type(chain[-1]).__name__
