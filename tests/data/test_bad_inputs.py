"""Inputs that can't be read: rows without weight, logged once, and the end of the run when there are too many."""

import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_har_jax.config import DataConfig
from clip_har_jax.data.bad_inputs import BadInputs
from clip_har_jax.data.sources import make_source
from clip_har_jax.errors import UserError
from tests.support.batches import (
    ArraySource,
    evaluation,
    jpeg,
    smooth,
    train,
)


def test_bad_images_are_rows_without_weight_logged_once(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[2], missing=[5]), tmp_path / "bad_inputs.jsonl"
    bad_inputs = BadInputs(source, 0.25, log)
    for batch in train(source, 8, bad_inputs=bad_inputs):
        bad = np.isin(batch.index, [2, 5])
        np.testing.assert_array_equal(batch.mask, 1.0 - bad)
        np.testing.assert_array_equal(batch.label, source.label_ids[batch.index])
        assert not batch.image[bad].any()
        assert batch.image[~bad].any(axis=(1, 2, 3)).all()
    assert len(bad_inputs) == 2
    lines = {line["input"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert sorted(lines) == ["image-2", "image-5"]
    assert lines["image-5"] == {"input": "image-5", "index": 5, "error": "can't be read (No such file or directory)"}
    assert lines["image-2"]["error"].startswith("not an image")


def test_too_many_bad_images_end_the_run(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4, 6]), tmp_path / "bad_inputs.jsonl"
    assert len(evaluation(source, 2, bad_inputs=BadInputs(source, 3 / 8))) == 4
    with pytest.raises(UserError) as info:
        evaluation(source, 2, bad_inputs=BadInputs(source, 2 / 8, log))
    message = str(info.value)
    assert message.startswith("3 of 8 images can't be read, the first is image-1: not an image")
    assert f"all so far in {log}" in message
    assert "config.data.max_bad_fraction" in message
    assert len(log.read_text().splitlines()) == 3
    with pytest.raises(UserError, match="1 of 8 images"):
        evaluation(source, 2, bad_inputs=BadInputs(source, 0.0))
    with pytest.raises(UserError, match=r"or raise --max_bad_fraction$"):  # a command without a config
        evaluation(source, 2, bad_inputs=BadInputs(source, 0.0, setting="--max_bad_fraction"))


def test_continued_run_logs_no_input_again(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4]), tmp_path / "bad_inputs.jsonl"
    first = BadInputs(source, 1.0, log)
    first.record([(1, "image-1", "damaged"), (1, "image-1", "damaged")])
    with log.open("a") as file:
        file.write('{"input": "image-4", "ind')  # what a killed run leaves
    second = BadInputs(source, 1.0, log)
    evaluation(source, 4, bad_inputs=second)
    assert len(second) == 2, "what was logged before counts nevertheless"
    assert [json.loads(line)["input"] for line in log.read_text().splitlines()] == ["image-1", "image-4"]


def test_sources_of_a_run_share_a_log(tmp_path: Path) -> None:
    source, log = ArraySource(8, damaged=[1, 4]), tmp_path / "bad_inputs.jsonl"
    both = [BadInputs(source, 1.0, log), BadInputs(source, 1.0, log)]
    for bad_inputs in both:
        evaluation(source, 4, bad_inputs=bad_inputs)
        assert len(bad_inputs) == 2
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.slow
def test_ten_thousand_images_of_which_one_in_a_hundred_is_damaged(tmp_path: Path) -> None:
    source = ArraySource(10_000, damaged=range(0, 10_000, 100))
    for limit, ends in ((0.01, False), (0.0099, True)):
        log = tmp_path / f"bad-{limit}.jsonl"
        bad_inputs = BadInputs(source, limit, log)
        if ends:
            with pytest.raises(UserError, match="100 of 10000 images can't be read"):
                evaluation(source, 500, DataConfig(num_workers=2), bad_inputs=bad_inputs)
        else:
            batches = evaluation(source, 500, DataConfig(num_workers=0), bad_inputs=bad_inputs)
            assert sum(float(batch.mask.sum()) for batch in batches) == 9900
        assert len(log.read_text().splitlines()) == 100
    assert multiprocessing.active_children() == []


def test_what_a_file_holds_counts_not_its_name(tmp_path: Path) -> None:
    for label in ("run", "sit"):
        (tmp_path / label).mkdir()
    Image.fromarray(smooth(20, 30)).save(buffer := io.BytesIO(), "PNG")
    (tmp_path / "run" / "a-png.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "run" / "text.png").write_text("not an image")
    (tmp_path / "sit" / "empty.jpg").write_bytes(b"")
    (tmp_path / "sit" / "jpeg.png").write_bytes(jpeg(smooth(20, 30)))
    source = make_source(f"folder:{tmp_path}", "train")
    for batches in (train(source, 1, seed=0), evaluation(source, 4)):
        found = {
            Path(source[int(i)].name).name: mask for i, mask in zip(batches[0].index, batches[0].mask, strict=True)
        }
        assert found == {"a-png.jpg": 1.0, "text.png": 0.0, "empty.jpg": 0.0, "jpeg.png": 1.0}
