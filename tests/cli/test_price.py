"""The price of a GPU: the user's, or the one that the operator's chart has for exactly that kind of GPU."""

import json

import pytest

from finetune_cli.errors import CliError
from finetune_cli.kube.operators import Operator
from finetune_cli.price import price_of
from support.cli.run import finetune
from support.docs import chart

PRICES = {
    "NVIDIA-H100-80GB-HBM3": 2.5,
    "NVIDIA-H100-PCIe": 2.0,
    "NVIDIA-A100-SXM4-40GB": 1.0,
    "NVIDIA-A100-SXM4-80GB": 1.5,
    "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb": 0.2,
    "NVIDIA-L4-SHARED": 0.1,
}
JOB = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: nli}
spec:
  model: {source: hf://mistralai/Mistral-7B-v0.3}
  dataset: {train: s3://data/x.jsonl}
  output: {uri: s3://adapters/nli}
  training: {maxSteps: 1000}
"""


@pytest.mark.parametrize(
    ("label", "gpu", "price"),
    [
        ("NVIDIA-H100-PCIe", None, 2.0),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", "A100", 0.2),
        (None, "h100", 2.5),
        (None, "H100 PCIe", 2.0),
        ("NVIDIA-H200", "H100", "no price for NVIDIA-H200; it has: NVIDIA-A100"),
        (None, "L4", "no price for L4"),
        (None, "A100", "may be A100: NVIDIA-A100-SXM4-40GB 1, NVIDIA-A100-SXM4-80GB 1.5"),
        (None, None, "which GPU?"),
    ],
)
def test_a_gpu_has_the_price_of_its_own_type_alone(label, gpu, price):
    if isinstance(price, float):
        assert price_of(PRICES, label, gpu) == price
    else:
        with pytest.raises(CliError, match=price):
            price_of(PRICES, label, gpu)


@pytest.mark.parametrize("text", ["-1", "nan", "2e6", "clusters"])
def test_what_is_no_price_is_said_to_be_none(text, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    result = finetune("plan", str(tmp_path / "job.yaml"), "--gpu", "h100", f"--price={text}")
    assert (result.returncode, "is neither a number from 0 to 1,000,000 nor 'cluster'" in result.stderr) == (1, True)


def test_a_plan_takes_the_prices_of_the_clusters_operator(ctl, kube, namespace, tmp_path):
    (tmp_path / "job.yaml").write_text(JOB)
    asked = ("plan", str(tmp_path / "job.yaml"), "--gpu", "h100", "--price", "cluster")
    none = ctl(*asked)
    assert (none.returncode, "--price: " in none.stderr) == (1, True)
    values = {"watch": {"namespaces": [namespace]}, "costs": {"gpuPrices": PRICES, "currency": "EUR"}}
    deployment = chart.find(chart.objects(values | {"nameOverride": "ours"}, namespace), "Deployment")
    assert Operator.of(deployment | {"status": {}}).prices == PRICES
    kube.create(deployment | {"status": {}})
    data = json.loads(ctl(*asked, "-o", "json").stdout)
    assert data["cost"] == pytest.approx(2.5 * data["gpuHours"]) and data["currency"] == "EUR"
    assert f"{data['cost']:,.2f} EUR at 2.50 each" in ctl(*asked).stdout
