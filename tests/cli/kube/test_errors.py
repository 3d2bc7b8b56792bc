"""What the API server refuses, as a sentence and what to do about it."""

import pytest

from finetune_cli.errors import CliError, Exit
from finetune_cli.kube.errors import OwnConflict, refusal


def _denied(message):
    found = refusal(403, {"message": message}, "https://server", "team", "nli", "FineTuneJob")
    assert (found.code, found.is_denied, found.message) == (Exit.UNREACHABLE, True, f"access denied: {message}")
    return found.hint


@pytest.mark.parametrize(
    ("refused", "hint"),
    [
        (
            'cannot list resource "finetunejobs" in API group "finetune.dev" in the namespace "team"',
            "ask an administrator for the right to list finetunejobs in namespace team. The ClusterRole view holds it"
            " (by rbac.aggregateToUserRoles of the operator's chart):"
            " kubectl create rolebinding finetune-view --clusterrole=view --user=ann -n team",
        ),
        (
            'cannot patch resource "finetunejobs" in API group "finetune.dev" in the namespace "team"',
            "kubectl create rolebinding finetune-edit --clusterrole=edit --user=ann -n team",
        ),
        (
            'cannot list resource "finetunesweeps" in API group "finetune.dev" at the cluster scope',
            "kubectl create clusterrolebinding finetune-view --clusterrole=view --user=ann",
        ),
        (
            'cannot get resource "pods/log" in API group "" in the namespace "team"',
            "the right to get pods/log in namespace team. The ClusterRole view holds it: kubectl create rolebinding",
        ),
    ],
)
def test_a_right_that_is_missing_is_named_with_the_role_that_holds_it(refused, hint):
    said = _denied(f'finetunejobs.finetune.dev is forbidden: User "ann" {refused}')
    assert hint in said
    assert said.endswith(hint[-20:]) or hint.endswith("rolebinding")


def test_a_user_whose_name_a_shell_would_split_is_quoted():
    said = 'User "ann lee" cannot list resource "finetunejobs" in API group "finetune.dev" in the namespace "team"'
    assert "--user='ann lee' -n team" in _denied(said)


def test_nobody_is_asked_to_let_strangers_in():
    said = 'User "system:anonymous" cannot list resource "finetunejobs" in API group "finetune.dev"'
    assert _denied(said) == "the cluster was not told who you are: log in again, or choose another user with --context"


def test_what_no_role_would_allow_is_not_said_to_need_one():
    quota = 'finetunejobs.finetune.dev "nli" is forbidden: exceeded quota: jobs, requested: 1, used: 5, limited: 5'
    assert "ClusterRole" not in _denied(quota)


def test_only_a_conflict_with_nobody_else_is_our_own():
    def kind_of(*managers: str) -> type[CliError]:
        causes = [{"field": ".spec.suspend", "message": f'conflict with "{each}" using v1'} for each in managers]
        return type(refusal(409, {"details": {"causes": causes}}, "https://k", "team", "nli", "FineTuneJob"))

    assert kind_of("finetune-cli") is OwnConflict
    assert kind_of("finetune-cli", "kubectl-edit") is CliError
    assert kind_of("finetune-cli-of-others") is CliError
    assert kind_of() is CliError
