"""A dataset on the Hub, or a local folder that the ``datasets`` library reads, streaming, file by file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.discovery import fingerprint
from data.hub_cache import ensure_hub_cache
from settings import one_line

ROWS_AT_ONCE = 64


class HubDataset:
    """One split of a dataset, pinned to a commit."""

    def __init__(self, config: SourceConfig, revision: str | None) -> None:
        """Use the commit ``revision``, or ask for the newest one; a local folder has none.

        Raises:
            ValueError: the Hub does not provide the dataset.
        """
        assert config.hub is not None
        self.name, self.split = config.hub, config.split
        self._config = config.hub_config
        self._revision = revision or _newest_revision(config)

    def identity(self) -> dict[str, Any]:
        """Which dataset this is, in which state: its commit, or the fingerprints of a local folder's files."""
        folder = Path(self.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        hub = {"name": self.name, "config": self._config, "split": self.split, "revision": self._revision}
        return {"hub": hub, **({"files": [fingerprint(path, folder) for path in files]} if files else {})}

    def file_sizes(self) -> list[int]:
        """Bytes of every file of the split, in the order in which they are read.

        A single entry where the library does not read the split file by file.
        """
        import fsspec.core

        builder = _builder(self.name, self._config, self._revision)
        sizes = []
        for path in map(str, (builder.config.data_files or {}).get(self.split, [])):
            system, place = fsspec.core.url_to_fs(path.rpartition("::")[2])
            sizes.append(int(system.info(place)["size"] or 0))
        return sizes if len(sizes) == self._rows().num_shards else [sum(sizes)]

    def batches(self, number: int, files: int, first: int) -> Iterator[dict[str, list[Any]]]:
        """Columns of a few rows each, from row ``first`` of file ``number`` of ``files`` on."""
        rows = self._rows()
        if files > 1:
            rows = rows.shard(num_shards=files, index=number)
        yield from rows.skip(first).iter(batch_size=ROWS_AT_ONCE)

    def _rows(self) -> Any:
        return _builder(self.name, self._config, self._revision).as_streaming_dataset(split=self.split)


@functools.cache
def _builder(name: str, config: str | None, revision: str | None) -> Any:
    """The builder, which knows the dataset's files; one per process, because listing them queries the Hub."""
    ensure_hub_cache()
    import datasets  # imported here: it takes seconds, which every tokenizing process would pay

    return datasets.load_dataset_builder(name, config, revision=revision)


def _newest_revision(config: SourceConfig) -> str | None:
    """The dataset's current commit; None for a local folder."""
    assert config.hub is not None
    if Path(config.hub).is_dir():
        return None
    ensure_hub_cache()
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(config.hub).sha
    except Exception as error:  # network, name, permission: in any case the dataset is unavailable
        raise ValueError(
            f"source '{config.name}': dataset '{config.hub}' cannot be read from the Hub: {one_line(error)}"
        ) from error
