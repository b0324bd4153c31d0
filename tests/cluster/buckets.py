"""S3 for the hosts of a network, by moto, and what lies in it.

    python -m tests.cluster.buckets serve
    python -m tests.cluster.buckets fetch PREFIX FOLDER

Both are run where the network's bridge is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.cluster.cluster import BUCKETS
from tests.cluster.hosts import SERVER
from tests.object_servers import BUCKET, environment


def client() -> Any:
    import botocore.session

    return botocore.session.Session().create_client("s3", region_name="us-east-1")


def serve() -> None:
    from moto.server import create_backend_app
    from werkzeug.serving import make_server

    server = make_server(SERVER, 5000, create_backend_app("s3"), threaded=True)
    import threading

    threading.Thread(target=server.serve_forever, daemon=True).start()
    client().create_bucket(Bucket=BUCKET)
    print("ready", flush=True)
    threading.Event().wait()


def fetch(prefix: str, folder: Path) -> None:
    """Copy what has a prefix into a folder."""
    s3 = client()
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        for found in page.get("Contents", ()):
            path = folder / found["Key"].removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(s3.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read())


if __name__ == "__main__":
    with environment(BUCKETS):
        serve() if sys.argv[1] == "serve" else fetch(sys.argv[2], Path(sys.argv[3]))
