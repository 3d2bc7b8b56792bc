"""A real S3 server (moto) that checks keys and policies, as a process of its own.

Prints its port, then serves until its standard input closes: it cannot outlive the process that started it.
"""

import os
import sys
import threading

# IAM's first three calls are free, so that an administrator can be made: CreateUser, PutUserPolicy, CreateAccessKey.
os.environ.setdefault("INITIAL_NO_AUTH_ACTION_COUNT", "3")


def exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
