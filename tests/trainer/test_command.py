"""What a stage sets and refuses before torch is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.command import grow_segments, run_stage


@pytest.mark.parametrize(
    ("module", "block", "sentence"),
    [
        (
            "pretrain.train",
            "base",
            "is a config of stage two, as it has a block 'base'; start it with: python -m",
        ),
        (
            "tune.train",
            "model",
            "is a config of stage one, as it has a block 'model'; start it with: python -m",
        ),
    ],
)
def test_a_config_of_the_other_stage_is_refused(
    module: str,
    block: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "c.yaml").write_text(f"{block}: {{}}\n")
    monkeypatch.setattr("sys.argv", [module, str(tmp_path / "c.yaml")])
    with pytest.raises(SystemExit) as ended:
        run_stage(module, "", "", lambda path, overrides: 1 / 0, lambda config, path, world: 1 // 0)
    assert ended.value.code == 78 and sentence in capsys.readouterr().err


def test_segments_grow_unless_the_user_says_how_to_allocate() -> None:
    environment: dict[str, str] = {}
    grow_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        users = {name: "max_split_size_mb:512"}
        grow_segments(users)
        assert users == {name: "max_split_size_mb:512"}
