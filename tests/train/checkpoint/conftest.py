"""Short validations, and a server of the S3 protocol."""

import os
import uuid
from collections.abc import Iterator

import pytest

from train.checkpoint import resume


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume looks twice at a checkpoint that seems damaged, here without a pause."""
    monkeypatch.setattr(resume, "_PAUSE_S", 0.0)


@pytest.fixture
def overrides(overrides: list[str]) -> list[str]:
    """Those of all tests, with a validation of four sequences instead of 16."""
    return [*overrides, "--validation.sequences=4"]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """A bucket on a server in this process; its address is in the environment."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    set_here = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {key: os.environ.get(key) for key in set_here}
    os.environ.update(set_here)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # clients of an earlier server
    bucket = f"bucket-{uuid.uuid4().hex}"  # a server keeps those of earlier ones
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}"
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    server.stop()
