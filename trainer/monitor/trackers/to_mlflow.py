"""MLflow: a tracking server, or whatever else ``MLFLOW_TRACKING_URI`` names.

The library's other variables work too: ``MLFLOW_TRACKING_TOKEN``, ``MLFLOW_EXPERIMENT_NAME`` (instead of
``train.log.project``). Only the client is needed (``mlflow-skinny``).
"""

from __future__ import annotations

import getpass
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

# Of the library: a request that is not answered is tried again by the sender, which counts; no reports to its makers,
# and no lines of its own, because the log has the address.
for _name, _value in (
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
):
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException, RestException  # noqa: E402
from requests import RequestException  # noqa: E402

from trainer.log import logger_of_run  # noqa: E402
from trainer.monitor.trackers.interface import Opening, UnreachableError  # noqa: E402

_AT_ONCE = 100
"""Most metrics, parameters or tags in one request: the server's limit for the last two."""
_LONGEST_VALUE = 6000
"""Most characters in a parameter's value."""
_STATUS = {"ended": "FINISHED", "stopped": "KILLED"}
_BUSY = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
Item = TypeVar("Item")


class ToMLflow:
    """A tracker, see :class:`trainer.monitor.trackers.interface.Tracker`."""

    name = "mlflow"

    def __init__(self) -> None:
        self._id = ""

    def open(self, opening: Opening) -> None:
        with _reached():
            self._client = MlflowClient()
            if not self._id:  # all of this is called again where the server did not answer to a part of it
                self._id = self._goes_on(opening.kept_id(self.name)) or self._new_run(opening)
                opening.keep_id(self.name, self._id)
            self._describe(opening)
            experiment = self._client.get_run(self._id).info.experiment_id
            address = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
            logger_of_run().info(f"tracker mlflow: {address}/#/experiments/{experiment}/runs/{self._id}")

    def scalars(self, step: int, at_s: float, scalars: dict[str, float]) -> None:
        metrics = [Metric(name, value, int(1000 * at_s), step) for name, value in scalars.items()]
        with _reached():
            for part in _parts(metrics):
                self._client.log_batch(self._id, metrics=part)

    def text(self, step: int, name: str, text: str) -> None:
        with _reached():
            self._client.log_text(self._id, text, f"{name}/step-{step:08d}.txt")

    def image(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        with _reached():
            image = Image.open(io.BytesIO(png)).convert("RGB")
            self._client.log_image(self._id, image, key=name, step=step, synchronous=True)

    def files(self, folder: Path, paths: Sequence[Path]) -> None:
        with _reached():
            for path in paths:
                place = path.parent.relative_to(folder).as_posix()
                self._client.log_artifact(self._id, str(path), None if place == "." else place)

    def close(self, phase: str) -> None:
        with _reached():
            self._client.set_terminated(self._id, _STATUS.get(phase, "FAILED"))

    def _goes_on(self, kept: str | None) -> str | None:
        """``kept`` if the server has such a run, which is then marked as running again."""
        if kept is None:
            return None
        try:
            self._client.update_run(kept, status="RUNNING")
        except RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return kept

    def _new_run(self, opening: Opening) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", opening.project)
        found = self._client.get_experiment_by_name(name)
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the page of a training, not of a chat
        experiment = self._client.create_experiment(name, tags=kind) if found is None else found.experiment_id
        tags = {"mlflow.source.name": str(opening.folder), "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
        if opening.commit is not None:
            tags["mlflow.source.git.commit"] = opening.commit
        run = self._client.create_run(experiment, run_name=opening.folder.name, tags=tags)
        return str(run.info.run_id)

    def _describe(self, opening: Opening) -> None:
        """Log the config as parameters. These cannot be changed later, so what a resume changed becomes a tag."""
        before = self._client.get_run(self._id).data.params
        now = {name: str(value)[:_LONGEST_VALUE] for name, value in opening.flat_config.items()}
        params = [Param(name, value) for name, value in now.items() if name not in before]
        tags = [RunTag(name, value) for name, value in now.items() if before.get(name, value) != value]
        for part in _parts(params):
            self._client.log_batch(self._id, params=part)
        for changed in _parts(tags):
            self._client.log_batch(self._id, tags=changed)


def _user() -> str:
    """Name of the user, or the id where there is no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), _AT_ONCE):
        yield items[first : first + _AT_ONCE]


@contextmanager
def _reached() -> Iterator[None]:
    """Turn the errors of a server that is gone or busy into UnreachableError; others pass."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "no address")
    try:
        yield
    except RestException as error:
        if error.error_code in _BUSY:
            raise UnreachableError(f"{address}: {error.error_code}") from error
        raise
    except MlflowException as error:
        # What did not come from the server itself: no connection, or the words of a proxy.
        if "API request" in str(error) and error.error_code in (*_BUSY, "INTERNAL_ERROR"):
            raise UnreachableError(address) from error
        raise
    except RequestException as error:
        raise UnreachableError(address) from error
