"""`helm test`: does the operator answer, is it healthy, and does it count its work? The argument is its address."""

import sys
import time
import urllib.error
import urllib.request

address, patience_seconds = sys.argv[1], 60


def get(path):
    with urllib.request.urlopen(address + path, timeout=5) as answer:
        return answer.read().decode()


def check():
    get("/healthz")  # any status but 200 raises
    metrics = get("/metrics")
    if "finetune_operator_build_info" not in metrics:
        raise OSError(f"{address}/metrics has no finetune_operator_build_info: is this the operator?")


deadline = time.monotonic() + patience_seconds
while True:
    try:
        check()
    except OSError as error:  # URLError and timeouts are OSErrors
        if time.monotonic() > deadline:
            sys.exit(f"The operator is not well: {error}")
        time.sleep(2)
    else:
        print("The operator is healthy and serves metrics")
        break
