"""LoRA adapters as PEFT saves them, against the adapted model's outputs in tests/golden."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from clip_har_jax.errors import UserError
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"base_model_name_or_path": "/no/where"}, "/no/where: no such folder"),
        ({"r": 0}, "r is 0"),
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
