"""Shards in an object store are read through Energon's own storage client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.energon.conftest import TOKENIZER

energon = pytest.importorskip("megatron.energon", reason="the extra energon is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
moto = pytest.importorskip("moto.server", reason="the server of moto is not installed")

from step37_energon import Step37TaskEncoder

KEYS = {"access_key": "nobody", "secret_key": "nothing"}


@pytest.fixture
def store(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in a bucket of a server on loopback; its URL for Energon."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id=KEYS["access_key"],
        aws_secret_access_key=KEYS["secret_key"],
    )
    client.create_bucket(Bucket="pictures")
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "pictures", f"flickr/{path.relative_to(shards)}")
    options = {"base_path": "pictures", "region_name": "us-east-1"}
    profile = {
        "storage_provider": {
            "type": "s3",
            "options": {**options, "endpoint_url": f"http://{host}:{port}"},
        },
        "credentials_provider": {"type": "S3Credentials", "options": KEYS},
    }
    config = tmp_path / "msc.json"
    config.write_text(json.dumps({"profiles": {"loopback": profile}}))
    monkeypatch.setenv("MSC_CONFIG", str(config))
    yield "msc://loopback/flickr"
    server.stop()


def test_an_object_store_gives_the_packs_of_the_folder_of_shards(
    shards: Path, store: str, in_order: Callable[..., Any]
) -> None:
    def packs(path: Path | str) -> list[dict[str, Any]]:
        encoder = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=700, packing="best_fit")
        return list(energon.get_loader(in_order(path, encoder)))

    local, remote = packs(shards), packs(store)
    assert len(local) == len(remote) > 5
    for left, right in zip(local, remote, strict=True):
        assert left["__key__"] == right["__key__"]
        assert left["image_paths"] == right["image_paths"]
        assert torch.equal(left["tokens"], right["tokens"])
