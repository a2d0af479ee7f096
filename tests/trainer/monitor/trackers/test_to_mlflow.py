"""MLflow: a real server's values read back by its client, and what a run does when the server is killed or silent."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("mlflow", reason="needs mlflow-skinny: pip install -r requirements-dev.txt")
pytest.importorskip("flask_cors", reason="needs what mlflow's server needs: pip install -r requirements-dev.txt")

from tests.trainer.monitor.trackers.mlflow_server import Server
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.monitor.metrics import Metrics
from trainer.monitor.trackers import all as trackers
from trainer.monitor.trackers import sender
from trainer.monitor.trackers.interface import Opening, UnreachableError
from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("mlflow"))
    yield made
    made.kill()


@pytest.fixture
def to_mlflow(tiny: dict[str, Any]) -> dict[str, Any]:
    """The tiny run with MLflow beside TensorBoard."""
    tiny["train"]["log"] |= {"trackers": ["tensorboard", "mlflow"], "project": "hops"}
    return tiny


def test_a_run_and_its_resume_are_one_run_of_the_server(
    to_mlflow: dict[str, Any], train_here: Callable[..., int], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    to_mlflow["train"]["log"]["images"] = True
    run = Path(to_mlflow["train"]["run_dir"])
    assert train_here(to_mlflow, "train.stop_at_step=2") == 0
    assert train_here(to_mlflow, "train.checkpoint.resume=required", "train.clip_norm=2") == 0
    client = MlflowClient()
    experiment = client.get_experiment_by_name("hops")
    (found,) = client.search_runs([experiment.experiment_id])
    own = found.info.run_id
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert own == json.loads((run / "trackers.json").read_text())["mlflow"]
    assert found.data.tags["mlflow.source.name"] == str(run) and found.data.tags["mlflow.user"]
    # The config as it began, and what the resume changed of it.
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert found.data.params["train.optimizer.lr"] == str(resolved["train"]["optimizer"]["lr"])
    assert (found.data.params["train.clip_norm"], found.data.tags["train.clip_norm"]) == ("1.0", "2.0")
    # Every finite figure of every line.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in {name for line in lines for name in line} - {"step"}:
        there = {metric.step: metric.value for metric in client.get_metric_history(own, name)}
        assert there == {line["step"]: line[name] for line in lines if line.get(name) is not None}, name
    files = {file.path for file in client.list_artifacts(own)}
    assert {"config.yaml", "config.original.yaml", "metrics.jsonl", "logs", "images"} <= files
    assert any("routing" in file.path for file in client.list_artifacts(own, "images"))
    content = Path(client.download_artifacts(own, "metrics.jsonl", str(run))).read_text()
    assert [json.loads(line)["step"] for line in content.splitlines()] == [line["step"] for line in lines]


def test_a_server_that_is_not_there_ends_no_run_and_holds_it_up_for_a_moment(
    to_mlflow: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        assert train_here(to_mlflow) == 0
    out = capsys.readouterr().out
    assert out.count("tracker mlflow does not answer") == 1
    assert out.count("reports did not reach tracker mlflow; metrics.jsonl and the run folder have them all") == 1
    assert len((Path(to_mlflow["train"]["run_dir"]) / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_server_that_accepts_and_never_answers_holds_up_the_end_alone_and_not_for_long(
    to_mlflow: dict[str, Any], train_here: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert train_here(to_mlflow) == 0
        out = capsys.readouterr().out
    assert "reports did not reach tracker mlflow" in out
    lines = [json.loads(line) for line in (Path(to_mlflow["train"]["run_dir"]) / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert sum(line["speed/step_s"] for line in lines[1:]) < 10  # the first request alone takes 20 s


def test_a_server_that_is_killed_and_comes_back_has_every_figure(
    to_mlflow: dict[str, Any], configure: Callable[..., PretrainConfig], write_config: Callable[..., str],
    world: World, server: Server, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As long as they find room in the queue."""
    from mlflow import MlflowClient

    monkeypatch.setattr(sender, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(sender, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    folder, said = RunFolder(to_mlflow["train"]["run_dir"], 0), list[str]()
    folder.create(configure(), write_config(to_mlflow))
    made = Metrics(configure(), folder, world, None, 1e12)
    assert made._trackers is not None
    made._trackers._senders[1].tell = said.append
    made.log_scalars(1, {"train/loss": 5.0})
    client = MlflowClient()
    own = _soon(lambda: json.loads((folder.path / "trackers.json").read_text())["mlflow"])
    _soon(lambda: client.get_run(own).data.metrics["train/loss"])
    server.kill()
    began_s = time.monotonic()
    for step in range(2, 30):
        made.log_scalars(step, {"train/loss": 5.0 / step})
    assert time.monotonic() - began_s < 10  # one that waited would never come back: the server stays away until then
    _soon(lambda: said[0])
    server.start()
    _soon(lambda: said[1])
    made.close()
    there = {metric.step: metric.value for metric in client.get_metric_history(own, "train/loss")}
    assert there == {step: 5.0 / step for step in range(1, 30)}
    assert said == [
        f"tracker mlflow does not answer ({server.address}); reports are queued, and the run goes on",
        "tracker mlflow answers again",
    ]


def test_a_run_that_is_made_as_the_server_goes_away_is_made_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender opens a tracker again until it is open."""
    from mlflow import MlflowClient
    from requests import ConnectionError as NoConnectionError

    from trainer.monitor.trackers.to_mlflow import ToMLflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    describe, failures = ToMLflow._describe, iter([NoConnectionError("gone")])

    def fail_once(tracker: ToMLflow, opening: Opening) -> None:
        for failure in failures:
            raise failure
        describe(tracker, opening)

    monkeypatch.setattr(ToMLflow, "_describe", fail_once)
    tracker, opening = ToMLflow(), Opening(tmp_path, "once", {"train": {"seed": 5}}, None, None)
    with pytest.raises(UnreachableError):
        tracker.open(opening)
    tracker.open(opening)
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("once").experiment_id])
    assert found.info.run_id == json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert found.data.params == {"train.seed": "5"}


def _soon(look: Callable[[], Any], patience_s: float = 60.0) -> Any:
    """What ``look`` finds, as soon as it is there."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return look()
        except (OSError, LookupError, ValueError):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
