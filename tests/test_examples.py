"""The examples in the docstrings of the functions that users call first give what they show."""

import doctest
import inspect

import pytest

from clip_har_jax import Predictor, load_config, load_model, make_config, text, train
from clip_har_jax.data.sources import make_source
from clip_har_jax.models.clip import FlaxCLIPModel
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.specs import parse_spec
from export.run import export_model
from tests.support.model_folders import write_image, write_images, write_model
from tests.support.videos import write_video

LABELS = ("dancing", "running")
DOCUMENTED = [
    train,
    load_config,
    make_config,
    Predictor,
    Predictor.predict,
    Predictor.segments,
    load_model,
    FlaxCLIPModel.__call__,
    FlaxCLIPModel.encode_text,
    FlaxCLIPModel.encode_image,
    make_source,
    parse_spec,
    evaluate_model,
    export_model,
    text.phrase,
    text.make_prompts,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    write_model(folder / "model", LABELS)
    write_images(folder / "images", LABELS)
    write_image(folder / "photo.jpg", seed=0)
    write_video(str(folder / "clip.mp4"))
    (folder / "configs").mkdir()
    (folder / "configs" / "demo.py").write_text("def get_config():\n    return {}\n")
    return folder


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__qualname__)
def test_the_example_gives_what_it_shows(folder, documented, monkeypatch):
    monkeypatch.chdir(folder)
    names = dict(vars(inspect.getmodule(inspect.unwrap(documented))))
    docstring = inspect.getdoc(documented) or ""
    example = doctest.DocTestParser().get_doctest(docstring, names, documented.__qualname__, None, None)
    assert example.examples, "no example"
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.failed == 0, "".join(said)
