"""A `helm` for the documentation's commands: Helm's own SDK behind the words of its command line that we show."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import helm_python
import yaml


def install(folder: Path) -> None:
    """Put it into `folder` under the name helm."""
    script = folder / "helm"
    script.write_text(f"#!{sys.executable}\nimport runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n")
    script.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(prog="helm")
    action = parser.add_subparsers(required=True).add_parser("install")
    action.add_argument("name")
    action.add_argument("chart", type=Path)
    action.add_argument("--namespace", required=True)
    action.add_argument("--create-namespace", action="store_true")
    action.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    values: dict[str, Any] = {}
    for assignment in given.set:
        path, _, value = assignment.partition("=")
        *above, last = path.split(".")
        node = values
        for key in above:
            node = node.setdefault(key, {})
        node[last] = yaml.safe_load(value)
    config = helm_python.Config(
        kubeconfig_path=os.environ["KUBECONFIG"],
        namespace=given.namespace,
        storage_driver=os.environ.get("HELM_DRIVER", "secret"),
    )
    config.install(given.chart, given.name, values, namespace=given.namespace, create_namespace=given.create_namespace)
    config.close()


if __name__ == "__main__":
    main()
