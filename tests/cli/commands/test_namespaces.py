"""A namespace that does not exist is named, by every command that acts in one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from finetune_api.manifest import load_text
from finetune_cli import price
from finetune_cli.client import FineTune, FineTuneError
from finetune_cli.errors import CliError
from support.cli.run import MANIFEST, finetune, no_traceback
from support.server.client import Access

COMMANDS = [
    ["list"],
    ["list", "--sweeps", "-o", "json"],
    ["list", "-l", "team=nlp"],
    ["submit", "job.yaml"],
    ["submit", "job.yaml", "--dry-run"],
    ["status", "nli"],
    ["status", "nli", "--sweep"],
    ["watch", "nli"],
    ["logs", "nli"],
    ["suspend", "nli"],
    ["resume", "nli"],
    ["delete", "nli", "-y"],
    ["download", "nli", "./x"],
    ["chat", "nli"],
    ["export", "nli", "./x"],
    ["lineage", "nli"],
    ["serve-manifest", "nli"],
    ["promote", "nli"],
    ["compare", "nli", "other"],
    ["compare", "--sweep", "nli"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_namespace_that_does_not_exist_is_named(cluster, tmp_path, command):
    (tmp_path / "job.yaml").write_text(MANIFEST)
    env = {"KUBECONFIG": str(cluster.kubeconfig)}
    result = no_traceback(finetune(*command, "-n", "nope", env=env, cwd=tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: namespace 'nope' does not exist\nhint:  kubectl get namespaces" in result.stderr


def test_a_job_of_the_namespaces_own_name_is_not_taken_for_it(cluster, tmp_path):
    (tmp_path / "job.yaml").write_text(MANIFEST.replace("name: nli", "name: nope"))
    env = {"KUBECONFIG": str(cluster.kubeconfig)}
    assert "error: namespace 'nope' does not exist" in finetune("status", "nope", "-n", "nope", env=env).stderr
    result = finetune("submit", str(tmp_path / "job.yaml"), "-n", "nope", env=env)
    assert "error: namespace 'nope' does not exist" in result.stderr


def test_the_prices_of_the_cluster_are_asked_for_a_namespace_that_exists(cluster):
    paid = price.asked("cluster", "H100", "nope", None, cluster.kubeconfig)
    with pytest.raises(CliError, match="namespace 'nope' does not exist"):
        paid(load_text(MANIFEST, "job.yaml"))


def test_the_python_client_says_so_too(cluster):
    runs = FineTune("nope", kubeconfig=cluster.kubeconfig)
    with pytest.raises(FineTuneError, match="namespace 'nope' does not exist"):
        runs.list()
    with pytest.raises(FineTuneError, match="namespace 'nope' does not exist"):
        runs.get("nli")


@pytest.fixture
def jobs_alone(tmp_path):
    """The kubeconfig of a user who may see FineTuneJobs, of which there are none, and no namespaces."""

    class Api(BaseHTTPRequestHandler):
        def do_GET(self):
            code, answer = 200, {"metadata": {}, "items": []}
            if self.path.startswith("/api/v1/namespaces/"):
                code, answer = 403, {"message": 'namespaces "nope" is forbidden: User "guest" cannot get …'}
            elif "/finetunejobs/" in self.path:
                code, answer = 404, {"details": {"name": "nli", "kind": "finetunejobs"}}
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Access(f"http://127.0.0.1:{server.server_port}").write_kubeconfig(tmp_path / "kubeconfig")
        server.shutdown()
        thread.join()


def test_who_may_not_see_namespaces_is_told_what_is_known(jobs_alone):
    env = {"KUBECONFIG": str(jobs_alone)}
    result = finetune("list", "-n", "nope", env=env)
    assert (result.returncode, result.stderr) == (0, "No FineTuneJobs in namespace nope.\n")
    result = finetune("status", "nli", "-n", "nope", env=env)
    assert result.returncode == 1
    assert "error: there is no FineTuneJob 'nli' in namespace 'nope'" in result.stderr
