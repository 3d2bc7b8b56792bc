"""Fixtures every test may use; each lives in the support module named here."""

pytest_plugins = [
    "support.common.levels",
    "support.stores.hub",
    "support.server.fixtures",
    "support.stores.s3",
]
