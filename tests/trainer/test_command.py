"""What a stage sets before torch is imported."""

from __future__ import annotations

from trainer.command import grow_segments


def test_segments_grow_unless_the_user_says_how_to_allocate() -> None:
    environment: dict[str, str] = {}
    grow_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        users = {name: "max_split_size_mb:512"}
        grow_segments(users)
        assert users == {name: "max_split_size_mb:512"}
