"""Shards of pairs in object stores, read from servers of this machine: S3 by moto, Google Cloud Storage."""

import socket
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from clip_har_jax.config import DataConfig
from clip_har_jax.data.bad_inputs import BadPairs
from clip_har_jax.data.pair_batches import PairBatches
from clip_har_jax.data.pair_rows import PairTransform
from clip_har_jax.data.pair_sources import make_pair_sources
from clip_har_jax.data.pair_streams import StreamPlan
from clip_har_jax.data.pairs import BadPair, Found, Pair
from clip_har_jax.errors import UserError
from clip_har_jax.text import Tokenizer
from tests.support.batches import PREPROCESS
from tests.support.object_store import Bucket, store_server
from tests.support.pair_shards import write_parquet, write_shards
from tests.support.sources import encoded

SIZES = (5, 3, 4)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of an S3 server with the empty bucket `pairs`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        patch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="pairs")
    yield f"http://{host}:{port}"
    patch.undo()
    server.stop()


@pytest.fixture(scope="module")
def uploaded(address: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the SPEC of shards in the bucket; the last one is truncated."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SIZES)
    write_parquet(folder / "a.parquet", [(encoded(i), f"row {i}") for i in range(4)], pa.binary())
    for path in folder.iterdir():
        data = path.read_bytes()
        boto3.client("s3").put_object(
            Bucket="pairs", Key=f"train/{path.name}", Body=data[:3000] if path.name == "002.tar" else data
        )
    return "webdataset:s3://pairs/train/{000..002}.tar"


def captions(found: list[Found]) -> list[str]:
    return [pair.caption for pair in found if isinstance(pair, Pair)]


def test_shards_are_read_from_s3_and_go_on_at_a_position(uploaded: str) -> None:
    sources = make_pair_sources(uploaded)
    found = list(sources.each_once())
    assert captions(found) == [f"picture {i}" for i in (*range(8), 8)]
    (bad,) = (pair for pair in found if isinstance(pair, BadPair))
    assert bad.name == "s3://pairs/train/002.tar" and "copy the shard again" in bad.reason
    whole = list(sources.readers[0].read(0, 0))
    assert list(sources.readers[0].read(0, whole[2][1])) == whole[3:]
    assert make_pair_sources("webdataset:s3://pairs/train/*.tar").readers[0].names == sources.readers[0].names
    assert make_pair_sources("webdataset:s3://pairs/train").readers[0].names == sources.readers[0].names


def test_parquet_is_read_from_s3(uploaded: str) -> None:
    sources = make_pair_sources("parquet:s3://pairs/train/a.parquet")
    assert (sources.num_examples, captions(list(sources.each_once()))) == (4, [f"row {i}" for i in range(4)])


def test_a_missing_shard_and_a_missing_bucket_are_one_line(uploaded: str) -> None:
    with pytest.raises(UserError, match=r"2 of 5 files are missing: s3://pairs/train/003\.tar") as error:
        make_pair_sources("webdataset:s3://pairs/train/{000..004}.tar")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"missing|no files") as error:
        make_pair_sources("webdataset:s3://nothing/here/0.tar")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_worker_processes_read_from_s3(uploaded: str) -> None:
    tokenizer = Tokenizer.train(["picture"], 600)
    images = []
    for num_workers in (0, 2):
        transform = PairTransform(DataConfig(num_workers=num_workers), PREPROCESS, tokenizer, 8)
        plan = StreamPlan(make_pair_sources(uploaded), 0, 2, 4)
        with PairBatches(plan, transform, 4, BadPairs(1.0)) as batches:
            images.append([next(batches).image.tobytes() for _ in range(4)])
    assert images[0] == images[1]


@pytest.mark.slow
def test_a_store_that_doesn_t_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed.getsockname()[1]}")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(UserError, match=r"s3://pairs/0\.tar: .*check the network, the bucket's name") as error:
            make_pair_sources("webdataset:s3://pairs/0.tar")
        assert "\n" not in str(error.value)
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_shards_are_read_from_google_cloud_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_shards(tmp_path, SIZES)
    with store_server() as (_, address):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        for path in tmp_path.iterdir():
            Bucket(address).write(f"train/{path.name}", path.read_bytes())
        sources = make_pair_sources("webdataset:gs://bucket/train/{000..002}.tar")
        assert captions(list(sources.each_once())) == [f"picture {i}" for i in range(12)]
        whole = list(sources.readers[0].read(0, 0))
        assert list(sources.readers[0].read(0, whole[2][1])) == whole[3:]
        with pytest.raises(UserError, match="1 of 4 files are missing"):
            make_pair_sources("webdataset:gs://bucket/train/{000..003}.tar")
