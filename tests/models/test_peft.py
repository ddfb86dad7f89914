"""LoRA adapters as PEFT saves them, against the adapted model's outputs in tests/golden."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from clip_har_jax.errors import UserError
from clip_har_jax.models.adapters import A, B
from clip_har_jax.models.hf_layout import TABLES
from clip_har_jax.models.peft_adapters import write_adapter
from clip_har_jax.models.pretrained import load_pretrained, read_config, read_params
from tests.support.make_golden import GOLDEN

INPUTS = ("input_ids", "attention_mask", "pixel_values")


def test_adapter_is_merged_into_its_base_model() -> None:
    with np.load(GOLDEN / "peft_outputs.npz") as arrays:
        golden = dict(arrays)
    inputs = {name: jnp.asarray(golden[name]) for name in INPUTS}
    output = load_pretrained(str(GOLDEN / "peft"))(**inputs)
    plain = load_pretrained(str(GOLDEN / "quick_gelu"))(**inputs)
    for name in ("logits_per_image", "text_embeds", "image_embeds"):
        largest = np.abs(golden[name]).max()
        assert np.abs(np.asarray(getattr(output, name)) - golden[name]).max() / largest < 1e-5, name
        assert np.abs(np.asarray(getattr(plain, name)) - golden[name]).max() / largest > 1e-2, name


def test_updates_are_written_as_peft_writes_them(tmp_path: Path) -> None:
    """The golden adapter under our names, written again: the same tensors, and the settings that PEFT needs."""
    theirs = load_file(GOLDEN / "peft" / "adapter_model.safetensors")
    params = {}
    for ours, weight in TABLES["clip"].items():
        layers = range(read_config(GOLDEN / "quick_gelu").text.num_layers) if "{i}" in weight.name else (0,)
        names = [f"base_model.model.{weight.name.removesuffix('.weight').format(i=i)}.lora_" for i in layers]
        if names[0] + "A.weight" in theirs:
            for end, matrix in ((A, "A"), (B, "B")):
                stacked = np.stack([theirs[f"{name}{matrix}.weight"].T for name in names])
                params[ours.removesuffix(".kernel") + end] = stacked if "{i}" in weight.name else stacked[0]
    write_adapter(tmp_path, params, TABLES["clip"], "../quick_gelu", 2, 6.0)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    settings, golden = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, GOLDEN / "peft"))
    targets, short = settings.pop("target_modules"), golden["target_modules"]
    assert settings == {key: golden[key] for key in settings}
    assert {name.rpartition(".")[2] for name in targets} == set(short)


@pytest.mark.parametrize("layer", ["vision.patch_embedding", "vision.pool.attention.query"])
def test_updates_that_peft_cannot_express_are_refused(layer: str, tmp_path: Path) -> None:
    params = {layer + A: np.ones((4, 2)), layer + B: np.ones((2, 4))}
    with pytest.raises(UserError, match=f"an update of {layer}"):
        write_adapter(tmp_path, params, TABLES["siglip"], "base", 2, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"base_model_name_or_path": "/no/where"}, "/no/where: no such folder"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"base_model_name_or_path": "."}, "its base model . is an adapter too"),
    ],
)
def test_other_adapters_are_refused_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    path = folder / "adapter_config.json"
    base = {"base_model_name_or_path": str(GOLDEN / "quick_gelu")}
    path.write_text(json.dumps(json.loads(path.read_text()) | base | change))
    with pytest.raises(UserError) as caught:
        read_params(folder, read_config(folder))
    assert message in str(caught.value) and "\n" not in str(caught.value)
