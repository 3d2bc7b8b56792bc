"""A cluster that cannot be reached or refuses is a sentence and exit code 3; what is configured wrongly is 1."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from threading import Thread

import pytest
import yaml

from support.cli.run import finetune, finetune_process, no_traceback
from support.server.client import Access
from support.server.server import CRD_FILE


@pytest.fixture
def ask(tmp_path):
    """`finetune list` with a kubeconfig of the test's own."""

    def run(config, *arguments, **env):
        path = tmp_path / "kubeconfig"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return no_traceback(finetune("list", *arguments, env={"KUBECONFIG": str(path), **env}))

    return run


def test_a_cluster_that_is_down(ask):
    result = ask(Access("http://127.0.0.1:9").kubeconfig())
    assert result.returncode == 3
    assert "error: the cluster at http://127.0.0.1:9 is out of reach: connection refused" in result.stderr


def test_the_audit_log_tells_the_cli_by_its_name(ask):
    agents = set()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            agents.add(self.headers["User-Agent"])
            self.send_error(503)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            assert ask(Access(f"http://127.0.0.1:{server.server_port}").kubeconfig()).returncode == 3
        finally:
            server.shutdown()
            thread.join()
    assert agents == {f"finetune/{version('finetune-operator')}"}


def test_a_name_that_does_not_resolve(ask):
    result = ask(Access("https://cluster.invalid").kubeconfig())
    assert result.returncode == 3
    assert "https://cluster.invalid is out of reach: its name does not resolve" in result.stderr


def test_a_certificate_that_is_not_trusted(ask, cluster):
    if not cluster.is_real:
        pytest.skip("the stand-in speaks plain HTTP")
    result = ask(Access(cluster.access.server, cluster.access.token).kubeconfig())
    assert result.returncode == 3
    assert "its certificate is not trusted" in result.stderr


def test_credentials_that_are_wrong(ask, cluster):
    if not cluster.is_real:
        pytest.skip("the stand-in lets everyone in")
    result = ask(Access(cluster.access.server, "wrong-token", cluster.access.ca_file).kubeconfig())
    assert result.returncode == 3
    assert "unauthorized: the credentials for " in result.stderr
    assert " are missing, wrong or expired" in result.stderr
    assert "wrong-token" not in result.stderr


def test_a_user_without_the_rights(ask, cluster, kube, namespace):
    if not cluster.is_real:
        pytest.skip("the stand-in has no RBAC")
    kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "guest"}})
    result = ask(cluster.access_of_service_account(namespace, "guest").kubeconfig(), "-n", namespace)
    assert result.returncode == 3
    assert "error: access denied: finetunejobs.finetune.dev is forbidden" in result.stderr
    assert f"--clusterrole=view --user=system:serviceaccount:{namespace}:guest -n {namespace}" in result.stderr


def test_a_cluster_without_the_crd_says_what_to_install(ask, cluster, kube):
    """As on a cluster that never had it: no version of the CRD is served."""
    if not cluster.is_real:
        pytest.skip("the stand-in serves what is not served")
    crd = yaml.safe_load(CRD_FILE.read_text())
    kube.patch(crd["kind"], crd["metadata"]["name"], {"spec": {"versions": [_unserved(crd)]}})
    try:
        result = _until_gone(lambda: ask(cluster.access.kubeconfig()))
    finally:
        cluster.apply_crds()
    assert result.returncode == 3
    assert "FineTuneJobs are not installed in the cluster" in result.stderr


def _unserved(crd):
    return crd["spec"]["versions"][0] | {"served": False}


def _until_gone(look):
    for _ in range(20):
        result = look()
        if result.returncode:
            break
    return result


def test_the_contexts_namespace_is_used_and_named_contexts_are_found(ask, cluster, namespace):
    config = cluster.access.kubeconfig()
    context = {"cluster": "test", "user": "test", "namespace": namespace}
    config["contexts"].append({"name": "team", "context": context})
    assert f"No FineTuneJobs in namespace {namespace}." in ask(config, "--context", "team").stderr
    assert "No FineTuneJobs in namespace default." in ask(config).stderr
    result = ask(config, "--context", "typo")
    assert result.returncode == 1
    assert "has no context 'typo'" in result.stderr
    assert "it has: test, team" in result.stderr


@pytest.mark.parametrize(
    ("config", "code", "sentence"),
    [
        ("", 3, ": it is empty\nhint:  --kubeconfig FILE"),
        ("a: [", 1, "not YAML"),
        ("clusters: []\n", 3, "it is no kubeconfig, which has clusters, users and contexts"),
        (
            "contexts: [{name: a}, {name: b}]\n",
            3,
            "chooses no context (current-context)\nhint:  --context chooses one of a, b",
        ),
        ("just text", 1, "is no kubeconfig"),
    ],
    ids=["empty", "broken", "without contexts", "without a current one", "text"],
)
def test_a_kubeconfig_that_is_none(ask, config, code, sentence):
    result = ask(config)
    assert sentence in result.stderr
    assert result.returncode == code


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("cluster", "certificate-authority"),
        ("user", "client-certificate"),
        ("user", "client-key"),
        ("user", "tokenFile"),
    ],
)
def test_a_file_that_a_kubeconfig_names_and_is_not_there_is_told_with_its_setting(ask, tmp_path, kind, key):
    config = Access("https://127.0.0.1:9").kubeconfig()
    (tmp_path / "cert.pem").write_text("")
    if key == "client-key":
        config["users"][0]["user"]["client-certificate"] = "cert.pem"
    config[f"{kind}s"][0][kind][key] = "missing.pem"
    result = ask(config)
    assert result.returncode == 3
    assert f": {key} of {kind} 'test' is {tmp_path}/missing.pem, which does not exist\n" in result.stderr


def test_a_pod_without_its_service_accounts_token_is_told(tmp_path):
    env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "9", "KUBECONFIG": "/nowhere"}
    result = no_traceback(finetune("list", env=env))
    assert result.returncode == 3
    assert "neither a kubeconfig nor this pod's service account: Service token file does not exist" in result.stderr


def test_no_kubeconfig_at_all(tmp_path):
    result = no_traceback(finetune("list", env={"HOME": str(tmp_path), "KUBECONFIG": ""}))
    assert result.returncode == 3
    assert "no cluster to talk to: ~/.kube/config" in result.stderr
    result = no_traceback(finetune("list", "--kubeconfig", "missing", cwd=tmp_path))
    assert result.returncode == 1
    assert "--kubeconfig: missing: no such file" in result.stderr
    assert "--kubeconfig: .: is a folder" in finetune("list", "--kubeconfig", ".", cwd=tmp_path).stderr


def test_the_shell_completes_names_of_jobs_and_stays_silent_without_a_cluster(cluster, namespace, kube):
    from support.simulation import job_states as states

    kube.create(states.job("nli-small"))
    words = f"finetune status -n {namespace} nli"
    asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert finetune_process(env=asked | {"KUBECONFIG": str(cluster.kubeconfig)}).stdout.split() == ["nli-small"]
    nothing = finetune_process(env=asked | {"KUBECONFIG": "/nowhere"})
    assert (nothing.stdout.strip(), nothing.stderr) == ("", "")
