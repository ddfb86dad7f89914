"""The order in which the files of tests run."""

# The files that take longest, longest first: a long one that begins last keeps the others waiting.
LONGEST = (
    "trainer/test_train.py",
    "export/test_run.py",
    "trainer/test_methods.py",
    "training/test_steps.py",
    "training/test_temporal_steps.py",
    "export/test_clips.py",
    "app/test_app.py",
    "mlops/test_tracking.py",
    "trainer/test_memory.py",
    "mlops/test_remote.py",
    "serving/test_service.py",
    "serving/test_contract.py",
    "models/test_temporal.py",
    "models/test_open_clip.py",
    "data/test_clips.py",
    "app/test_browser.py",
    "test_processes.py",
    "parallel/test_distributed.py",
    "pipelines/test_prepare_data.py",
    "planning/test_plan.py",
)
