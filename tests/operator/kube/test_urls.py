"""The resource and verb under which a request is counted."""

import pytest

from finetune_operator.kube.urls import resource_of, verb_of


@pytest.mark.parametrize(
    ("method", "path", "verb", "resource"),
    [
        ("GET", "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs", "list", "finetunejobs"),
        ("GET", "/apis/finetune.dev/v1alpha1/finetunejobs", "list", "finetunejobs"),
        ("GET", "/api/v1/namespaces/a/configmaps/x", "get", "configmaps"),
        ("PATCH", "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/x/status", "patch", "finetunejobs/status"),
        ("POST", "/apis/batch/v1/namespaces/a/jobs", "create", "jobs"),
        ("GET", "/apis/batch/v1", "list", "discovery"),
    ],
)
def test_api_calls_are_counted_under_their_names(method: str, path: str, verb: str, resource: str):
    assert (verb_of(method, path, False), resource_of(path)) == (verb, resource)
