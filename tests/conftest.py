"""Fixtures every test may use; each lives in the support module named here."""

pytest_plugins = [
    "support.hub",
    "support.kube_fixtures",
    "support.s3",
]
