"""An MLflow tracking server for tests, in a process of its own: python -m tests.tracking_server FOLDER [ADDRESS]

It takes any user and password. FOLDER gets its database and artifacts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.processes import start


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """Run a server during the block; yields its HOST:PORT. One that ran over the same folder before goes on so."""
    folder.mkdir(exist_ok=True)
    with start("-m", "tests.tracking_server", folder, stdin=subprocess.PIPE, stderr=None) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        host = server.stdout.readline().strip()
        assert host, "the server did not start"
        try:
            yield host
        finally:
            server.terminate()


def serve(folder: str, host: str = "127.0.0.1") -> None:
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{folder}/artifacts",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    from mlflow.server import app
    from werkzeug.serving import make_server

    server = make_server(host, 0, app, threaded=True)
    print(f"{host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
