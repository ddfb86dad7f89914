"""configs/motion.py as a whole: what it promises of held-out clips, and of reversed ones."""

from pathlib import Path

import pytest

from clip_har_jax.config import load_config
from clip_har_jax.pipelines.evaluate import evaluate_model
from clip_har_jax.trainer.train import train

CONFIG = Path(__file__).parents[2] / "configs" / "motion.py"


@pytest.mark.slow
def test_a_video_model_learns_what_only_the_order_tells(tmp_path):
    result = train(load_config(str(CONFIG), []), tmp_path / "run", quiet=True)
    assert result.model is not None
    for spec in ("motion?split=test", "motion?split=test&reversed"):
        found = evaluate_model(str(result.model), spec, tmp_path / "evaluation" / spec[-8:])
        assert found.metrics["top1"] >= 0.9, spec
