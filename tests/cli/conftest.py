"""The command line against the tests' cluster."""

import pytest

from support.cli.run import finetune, no_traceback


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """A cache of the tests' own, in the place of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def ctl(cluster, namespace):
    """Run `finetune` in the test's namespace; it never ends with a traceback."""

    def run(*arguments, env=None, **options):
        env = {"KUBECONFIG": str(cluster.kubeconfig), "AWS_EC2_METADATA_DISABLED": "true"} | (env or {})
        return no_traceback(finetune(*arguments, "-n", namespace, env=env, **options))

    return run


@pytest.fixture
def put(kube):
    """Create a FineTuneJob and give it a status, as the operator would."""

    def create(job, status=None):
        kube.create(job)
        if status:
            kube.patch("FineTuneJob", job["metadata"]["name"], {"status": status}, subresource="status")

    return create
