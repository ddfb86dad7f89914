"""How many cores may be used, told by the files of control groups."""

from pathlib import Path

import pytest

from clip_har_jax import cores


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),  # as a container with its own name space sees it
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "300000 100000"}, 3.0),
        ("0::/of/the/host\n", {"cpu.max": "100000 100000"}, 1.0),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x\n",
            {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_quota(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership)
    assert cores.cpu_quota(tmp_path / "root", tmp_path / "membership") == quota
    assert cores.cpu_quota(tmp_path / "root", tmp_path / "nowhere") is None


@pytest.mark.parametrize(("quota", "usable"), [(None, 6), (2.9, 2), (0.5, 1), (64.0, 6)])
def test_the_tighter_bound_counts(monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda root, membership: quota)
    assert cores.usable_cores() == usable
