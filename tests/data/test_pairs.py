"""Readers of image-text pairs: what they give, from which position they go on, and what they say of bad input."""

import csv
import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_har_jax.data.pair_sources import PairSources, has_pairs, make_pair_sources
from clip_har_jax.data.pairs import END, BadPair, Pair
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from tests.support.pair_shards import pair_members, write_parquet, write_shards, write_tar
from tests.support.sources import encoded


def read(spec: str) -> list[Pair | BadPair]:
    return list(make_pair_sources(spec).each_once())


def captions(found: list[Pair | BadPair]) -> list[str]:
    return [pair.caption for pair in found if isinstance(pair, Pair)]


def reasons(found: list[Pair | BadPair]) -> list[str]:
    return [pair.reason for pair in found if isinstance(pair, BadPair)]


def read_again(sources: PairSources) -> None:
    """Check that a shard continued at each of its positions gives the rest."""
    reader = pickle.loads(pickle.dumps(sources.readers[0]))
    for shard in range(len(reader.names)):
        whole = list(reader.read(shard, 0))
        for place, (_, position) in enumerate(whole, 1):
            assert list(reader.read(shard, position)) == whole[place:]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), (5, 3, 4))


def test_shards_of_the_webdataset_package_are_read_as_it_reads_them(tmp_path: Path) -> None:
    import webdataset
    from webdataset import tariterators

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(3):
                text = f"große {'lange ' * 40}Bilder {shard} {i}"
                writer.write({"__key__": f"deep/{'name' * 30}{i}", "png": encoded(i), "txt": text, "cls": i})
    pattern = str(tmp_path / "{0..1}.tar")
    theirs = []
    for shard in range(2):
        with (tmp_path / f"{shard}.tar").open("rb") as file:  # WebDataset itself leaves its files open
            members = tariterators.tar_file_expander([{"url": file.name, "stream": file}])
            theirs += [(one["__key__"], one["png"], one["txt"]) for one in tariterators.group_by_keys(members)]
    ours = [pair for pair in read(f"webdataset:{pattern}") if isinstance(pair, Pair)]
    assert [(pair.name.split(": ")[1], pair.image, pair.caption.encode()) for pair in ours] == theirs
    read_again(make_pair_sources(f"webdataset:{pattern}"))


def test_a_shard_goes_on_at_each_position(shards: str, tmp_path: Path) -> None:
    read_again(make_pair_sources(shards))
    write_tar(tmp_path / "000.tar.gz", pair_members(range(4)))
    assert captions(read(f"webdataset:{tmp_path}/000.tar.gz")) == [f"picture {i}" for i in range(4)]
    read_again(make_pair_sources(f"webdataset:{tmp_path}/000.tar.gz"))


def test_patterns_mean_files_in_their_order(shards: str) -> None:
    folder = shards.removeprefix("webdataset:").rpartition("/")[0]
    everything = [f"picture {i}" for i in range(12)]
    for pattern in (f"{folder}/{{000..002}}.tar", f"{folder}/*.tar", folder, f"{folder}/{{000,001,002,000}}.tar"):
        assert captions(read(f"webdataset:{pattern}")) == everything
    assert captions(read(f"webdataset:{folder}/002.tar")) == everything[8:]


def test_links_and_paths_with_signs_of_patterns_are_read(shards: str, tmp_path: Path) -> None:
    folder = Path(shards.removeprefix("webdataset:")).parent
    (tmp_path / "{a}").mkdir()
    (tmp_path / "{a}" / "000.tar").symlink_to(folder / "000.tar")
    (tmp_path / "link").symlink_to(tmp_path / "{a}")
    for pattern in ("{a}/000.tar", "{a}", "link/000.tar", "link/*.tar", "link/{000,000}.tar"):
        assert captions(read(f"webdataset:{tmp_path}/{pattern}")) == [f"picture {i}" for i in range(5)]
    moved, same = (make_pair_sources(f"webdataset:{place}/000.tar") for place in (tmp_path / "link", folder))
    assert (moved.order_digest, moved.fingerprint) == (same.order_digest, same.fingerprint)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{000..004}.tar", "2 of 5 files are missing: FOLDER/003.tar, FOLDER/004.tar; copy"),
        ("{000.tar", "braces of the pattern don't match"),
        ("x*.tar", "no files match"),
    ],
)
def test_a_wrong_pattern_is_refused_in_one_line(shards: str, pattern: str, reason: str) -> None:
    folder = shards.removeprefix("webdataset:").rpartition("/")[0]
    with pytest.raises(UserError) as error:
        make_pair_sources(f"webdataset:{folder}/{pattern}")
    assert reason.replace("FOLDER", folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_store_and_other_data_are_refused(tmp_path: Path) -> None:
    for spec, reason in (
        ("webdataset:gopher://x/a.tar", "no such kind of store"),
        ("synthetic", "not image-text pairs"),
        ("parquet:a.parquet?label=action", "labelled images, not image-text pairs; name the column of captions"),
        ("webdataset:a.tar?weight=-1", "weight must be a number above 0, not '-1'"),
    ):
        with pytest.raises(UserError, match=reason):
            make_pair_sources(spec)
    with pytest.raises(UserError, match="image-text pairs have no classes"):
        make_source(f"webdataset:{tmp_path}/a.tar", "train")


CAPTION = "caf\u00e9"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.png", b"image"), ("a.txt", CAPTION.encode("utf-8"))], CAPTION),
        ([("a.png", b"image"), ("a.txt", CAPTION.encode("utf-8-sig"))], CAPTION),
        ([("a.png", b"image"), ("a.txt", CAPTION.encode("utf-16"))], CAPTION),
        ([("a.png", b"image"), ("a.json", json.dumps({"caption": CAPTION}).encode())], CAPTION),
        ([("a.png", b"image"), ("a.txt", b"one"), ("a.json", b'{"caption": "other"}'), ("a.cls", b"1")], "one"),
        ([("a.PNG", b"image"), ("a.txt", b" one\n"), ("a.pyd", b"skipped")], "one"),
    ],
)
def test_captions_in_several_forms(tmp_path: Path, members: list[tuple[str, bytes]], expected: str) -> None:
    write_tar(tmp_path / "0.tar", members)
    assert read(f"webdataset:{tmp_path}/0.tar") == [Pair(f"{tmp_path}/0.tar: a", b"image", expected)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"image")], "no caption; add one"),
        ([("a.txt", b"text")], "no image; add one"),
        ([("a.png", b"image"), ("a.txt", CAPTION.encode("latin-1"))], "isn't UTF-8 (byte 3); convert it"),
        ([("a.png", b"image"), ("a.txt", b" \n")], "caption is empty; write one"),
        ([("a.png", b""), ("a.txt", b"text")], "no image"),
        ([("a.png", b"image"), ("a.jpg", b"image"), ("a.txt", b"text")], "2 images (png, jpg); keep one"),
        ([("a.png", b"image"), ("a.json", b"{")], ".json can't be read"),
        ([("a.png", b"image"), ("a.json", b"[]")], "no caption"),
        ([("a.pyd", b"pickle"), ("a.txt", b"text")], "no image, only .pyd, which may be a pickle"),
        ([("a.png", b"image"), ("a.pickle", b"pickle")], "no caption, only .pickle, which may be a pickle"),
    ],
)
def test_a_bad_pair_is_one_line_and_the_others_are_read(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    write_tar(tmp_path / "0.tar", [*pair_members([1]), *members, *pair_members([2])])
    found = read(f"webdataset:{tmp_path}/0.tar")
    assert captions(found) == ["picture 1", "picture 2"]
    (bad,) = (pair for pair in found if isinstance(pair, BadPair))
    assert bad.name == f"{tmp_path}/0.tar: a"
    assert reason in bad.reason
    assert "\n" not in bad.reason
    read_again(make_pair_sources(f"webdataset:{tmp_path}/0.tar"))


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickles_in_a_shard_are_never_loaded(tmp_path: Path) -> None:
    sprung, content = tmp_path / "sprung", pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(content)
    assert sprung.exists()  # the trap works
    sprung.unlink()
    members = [(f"{name}.{suffix}", content) for name in "ab" for suffix in ("pyd", "pickle", "pkl", "pth", "npy")]
    write_tar(tmp_path / "0.tar", [*members, *pair_members([1]), ("000001.pyd", content)])
    found = read(f"webdataset:{tmp_path}/0.tar")
    assert captions(found) == ["picture 1"]
    assert len(reasons(found)) == 2
    assert not sprung.exists()


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.77])
def test_a_truncated_shard_gives_what_it_holds_and_one_line(tmp_path: Path, kept: float) -> None:
    spec = write_shards(tmp_path, (6, 2))
    first = tmp_path / "000.tar"
    data = first.read_bytes()[:9216]  # without the padding at the end
    first.write_bytes(data[: int(kept * len(data))])
    found = read(spec)
    (bad,) = (pair for pair in found if isinstance(pair, BadPair))
    assert bad.name == str(first)
    assert "can't be read after byte" in bad.reason and "copy the shard again" in bad.reason
    assert captions(found)[-2:] == ["picture 6", "picture 7"]
    assert 0 < len(captions(found)) < 8
    *_, (last, position) = make_pair_sources(spec).readers[0].read(0, 0)
    assert (last, position) == (bad, END)
    read_again(make_pair_sources(spec))


def test_cut_between_two_members_or_with_a_damaged_header_a_shard_isn_t_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pair_members(range(3)))
    data = path.read_bytes()
    whole = (len(data.rstrip(b"\0")) + 511) // 512 * 512
    path.write_bytes(data[:whole])  # as if the copy had ended there
    assert captions(read(f"webdataset:{path}")) == ["picture 0", "picture 1", "picture 2"]
    assert "unexpected end" in reasons(read(f"webdataset:{path}"))[0]
    broken = data.index(b"000001.png")
    path.write_bytes(data[:broken] + b"?" * 512 + data[broken + 512 :])
    assert captions(read(f"webdataset:{path}")) == ["picture 0"]
    assert "damaged header" in reasons(read(f"webdataset:{path}"))[0]
    path.write_bytes(b"no tar at all" * 100)
    assert len(reasons(read(f"webdataset:{path}"))) == 1


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (pa.binary(), lambda i, folder: encoded(i)),
        (
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            lambda i, folder: {"bytes": encoded(i), "path": None},
        ),
        (pa.string(), lambda i, folder: f"{i}.png"),
    ],
)
def test_parquet_holds_bytes_or_paths(tmp_path: Path, kind: pa.DataType, make) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    spec = write_parquet(tmp_path / "a.parquet", [(make(i, tmp_path), f"picture {i}") for i in range(5)], kind)
    sources = make_pair_sources(spec)
    assert (sources.num_examples, sources.num_shards) == (5, 3)  # three row groups
    assert [(pair.image, pair.caption) for pair in read(spec) if isinstance(pair, Pair)] == [
        (encoded(i), f"picture {i}") for i in range(5)
    ]
    read_again(sources)


def test_bad_rows_and_files_of_parquet(tmp_path: Path) -> None:
    rows = [(encoded(0), "a"), (None, "b"), (encoded(1), None), (encoded(2), "")]
    spec = write_parquet(tmp_path / "a.parquet", list(rows), pa.binary())
    found = read(spec)
    assert captions(found) == ["a"]
    assert [reason.split(";")[0] for reason in reasons(found)] == [
        "it has no image", "it has no caption", "its caption is empty",
    ]  # fmt: skip
    missing = read(write_parquet(tmp_path / "b.parquet", [("none.png", "a")], pa.string()))
    assert f"{tmp_path}/none.png can't be read (No such file" in reasons(missing)[0]
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text', which \?caption=COLUMN changes; accepted"):
        make_pair_sources(f"{spec}?caption=text")
    pq.write_table(pa.table({"number": [1], "text": ["a"]}), tmp_path / "c.parquet")
    for options, reason in (
        ("image=number&caption=text", "the column 'number' holds int64; bytes, paths"),
        ("image=text&caption=number", "the column 'number' holds int64, not text"),
    ):
        with pytest.raises(UserError, match=reason):
            make_pair_sources(f"parquet:{tmp_path}/c.parquet?{options}")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file .* copy it again"):
        make_pair_sources(spec)


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    path.write_text(buffer.getvalue())
    return f"csv:{path}"


def test_a_csv_with_captions(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    spec = write_csv(tmp_path / "a.csv", [("filename", "caption"), ("0.png", "a, b"), ("0.png", "c"), ("1.png", "")])
    sources, found = make_pair_sources(spec), read(spec)
    assert (sources.num_examples, sources.num_shards) == (3, 3)
    assert [(pair.image, pair.caption) for pair in found if isinstance(pair, Pair)] == [
        (encoded(0), "a, b"), (encoded(0), "c"),
    ]  # fmt: skip
    (bad,) = (pair for pair in found if isinstance(pair, BadPair))
    assert "line 4" in bad.name and "empty" in bad.reason
    read_again(sources)
    with pytest.raises(UserError, match=r"1 of 1 files are missing, the first is 'x\.png' \(line 2\)"):
        make_pair_sources(write_csv(tmp_path / "b.csv", [("filename", "caption"), ("x.png", "a")]))
    with pytest.raises(UserError, match=r"x\.png: can't be read \(File name too long\)"):
        make_pair_sources(write_csv(tmp_path / "c.csv", [("filename", "caption"), ("x" * 300 + ".png", "a")]))


def test_a_csv_is_of_pairs_if_it_has_captions_and_no_labels(tmp_path: Path) -> None:
    pairs = write_csv(tmp_path / "a.csv", [("filename", "Caption"), ("0.png", "a")])
    both = write_csv(tmp_path / "b.csv", [("filename", "caption", "label"), ("0.png", "a", "run")])
    labels = write_csv(tmp_path / "c.csv", [("filename", "label"), ("0.png", "run")])
    assert [has_pairs(spec) for spec in (pairs, both, f"{both}?caption=caption", labels)] == [True, False, True, False]
    assert has_pairs("webdataset:a.tar") and has_pairs("parquet:a.parquet") and not has_pairs("synthetic")


def test_several_specs_are_joined_and_weighed(shards: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    other = write_csv(tmp_path / "a.csv", [("filename", "caption"), ("0.png", "a")])
    sources = make_pair_sources(f"{shards}?weight=3::{other}")
    assert sources.weights == (0.75, 0.25)
    assert sources.num_examples is None
    assert captions(list(sources.each_once())) == [*(f"picture {i}" for i in range(12)), "a"]
    assert sources.fingerprint != make_pair_sources(f"{shards}::{other}").fingerprint
