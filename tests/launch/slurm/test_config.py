"""The site file: its times are SLURM's, and every field is described, shown and used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.slurm.config import SHIPPED_FILE, SlurmConfig, load_site, seconds
from settings import load


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86_400), ("1-12:30", 131_400), ("1-12:30:15", 131_415),
        ("24h", None), ("1:2:3:4", None), ("", None), ("-1", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(time: str, expected: int | None) -> None:
    assert seconds(time) == expected


def test_an_unquoted_time_is_not_taken_for_minutes(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("tasks_per_node: 1\ntime: 24:00:00\n")  # a number to the base of sixty in YAML 1.1
    assert load_site(site, {}).time == "24:00:00"
    site.write_text("tasks_per_node: 1\ntime: 90\n")
    with pytest.raises(ValueError, match="time: must be in quotes"):
        load_site(site, {})


def test_every_field_is_described_shown_and_used(tmp_path: Path) -> None:
    text = SHIPPED_FILE.read_text()
    sources = "".join(path.read_text() for path in SHIPPED_FILE.parent.iterdir() if path.suffix in (".py", ".sbatch"))
    for name, field in SlurmConfig.model_fields.items():
        assert field.description and field.description.rstrip().endswith("."), name
        assert re.search(rf"^(# )?{name}:", text, re.MULTILINE), name
        assert re.search(rf"\b(site|self)\.{name}\b", sources), name
    for line in re.findall(r"^# (\w+:.*)", text, re.MULTILINE):  # each example is valid
        site = tmp_path / "site.yaml"
        needed = "" if "per_node" in line else "tasks_per_node: 1\n"
        site.write_text(needed + line)
        assert load(site, [], SlurmConfig)
