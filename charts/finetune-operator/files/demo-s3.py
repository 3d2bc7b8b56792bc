"""A throw-away S3 server for a trial: `python3 serve.py HOST:PORT BUCKET...`. Nothing survives its end."""

import signal
import sys

import boto3
from moto.server import ThreadedMotoServer

STOP = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # before any thread, which inherits it

host, _, port = sys.argv[1].rpartition(":")
server = ThreadedMotoServer(ip_address=host, port=int(port))
server.start()
client = boto3.client(
    "s3",
    endpoint_url=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
    region_name="us-east-1",
    aws_access_key_id="demo",
    aws_secret_access_key="demo",
)
for bucket in sys.argv[2:]:
    client.create_bucket(Bucket=bucket)
print(f"Serving S3 on {sys.argv[1]}, buckets: {' '.join(sys.argv[2:])}", flush=True)
signal.sigwait(STOP)
server.stop()
