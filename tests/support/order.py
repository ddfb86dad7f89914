"""The order in which the files of tests run."""

# The files that take longest, longest first: with two processes, a long one that begins last keeps one of them waiting.
LONGEST = (
    "trainer/test_methods.py",
    "trainer/test_train.py",
    "training/test_steps.py",
    "serving/test_service.py",
    "export/test_run.py",
    "planning/test_plan.py",
    "mlops/test_tracking.py",
    "data/test_clips.py",
    "app/test_app.py",
    "app/test_browser.py",
    "serving/test_contract.py",
    "parallel/test_distributed.py",
    "pipelines/test_prepare_data.py",
)
