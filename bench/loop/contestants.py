"""The contestants of ``bench.loop``, each in its ranks: our training loop, and ``transformers.Trainer`` with DeepSpeed.

Both read the same run's config: the peer takes from it what our trainer would, so that nothing is configured twice.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.common.contestants import held_llama
from bench.common.turns import Turn
from bench.loop import WINDOWS
from data.batches import TrainingData
from data.shards import token_dtype
from model.decoder import Decoder
from model.flops import TRAINING_FACTOR, dense_flops, training_flops
from model.init import initialise
from trainer.config import PretrainConfig
from trainer.distributed import World
from trainer.loop import train_loop
from trainer.monitor.metrics import peak_bytes
from trainer.tally import StepResult
from trainer.trainer import Trainer


class OnTurn(Trainer):
    """Our trainer, which takes steps only in its turn."""

    def __init__(self, turn: Turn, *arguments: Any):
        super().__init__(*arguments)
        self._turn = turn
        self._results: list[StepResult] = []

    def begin_step(self) -> float:
        """Wait for the turn, then continue as usual."""
        with self.metrics.paused():
            self._turn.begin(self.step, self._report)
        return super().begin_step()

    def end_step(self, result: StepResult, lr: float, waited_s: float) -> None:
        """Also keep the result for the report."""
        super().end_step(result, lr, waited_s)
        self._results.append(result)

    def _report(self) -> dict[str, Any]:
        self.saver.wait()  # other contestants' turns must not pay for a save still being written
        model, every_steps = self.config.model, self.config.train.log.every_steps
        results, self._results = self._results, []
        routed = [result.tally.routed for result in results]
        shares = [share for result in results for share in result.tally.density]
        logged = results[-every_steps:]
        return {
            "loss": sum(r.tally.nll for r in logged) / max(sum(r.tally.targets for r in logged), 1),
            "grad_norm": logged[-1].grad_norm if logged else None,
            "density": sum(shares) / len(shares) if shares else 1.0,
            "executed_flops": sum(training_flops(model, counts) for counts in routed),
            "dense_flops": sum(TRAINING_FACTOR * dense_flops(model, c.tokens, c.visible_keys) for c in routed),
            "peak_bytes": peak_bytes(self.world.device),
        }


def ours(config: PretrainConfig, path: Path, world: World, turn: Turn) -> None:
    """What ``pretrain.train`` does, in turns."""
    data = TrainingData(config.data, pin_memory=world.device.type == "cuda")
    with OnTurn(turn, config, path, data.fingerprint, [], world) as trainer:
        train_loop(trainer, data)


class WindowFile(Dataset[dict[str, Tensor]]):
    """The run's windows, mapped from a flat file of tokens.

    Args:
        path: the file.
        vocab: size of the vocabulary, which decides whether ids take 2 or 4 bytes.
        tokens: of a window, T.
    """

    def __init__(self, path: Path, vocab: int, tokens: int):
        self._rows = np.memmap(path, token_dtype(vocab), mode="r").reshape(-1, tokens + 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self._rows[number].astype(np.int64))
        # Shifted here, so that all T tokens have a target, as in our windows.
        return {"input_ids": row[:-1], "labels": row[:-1], "shift_labels": row[1:]}


def write_windows(data: TrainingData, samples: int, path: Path) -> None:
    """Write the first ``samples`` windows of a run, for :class:`WindowFile`."""
    batch = data.batch(range(samples))
    rows = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1)
    rows.numpy().astype(token_dtype(data.vocab_size)).tofile(path)


def peer(config: PretrainConfig, world: World, turn: Turn) -> None:
    """The same with Hugging Face's Llama, which starts from our weights, and ``transformers.Trainer``."""
    from accelerate import PartialState
    from transformers import Trainer as HfTrainer
    from transformers import TrainerCallback

    # With a DeepSpeed config, transformers by default treats CPU ranks as unrelated processes; a state created before
    # is respected.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="nccl" if world.device.type == "cuda" else "gloo")
    decoder = Decoder(config.model)
    initialise(decoder, config.model, config.train.seed)
    llama, _ = held_llama(config.model, decoder.state_dict(), torch.device("cpu"), torch.float32)
    data = config.data
    windows = WindowFile(Path(data.dir) / WINDOWS, config.model.vocab_size, data.sequence_tokens)

    class OnTurnToo(TrainerCallback):
        def __init__(self) -> None:
            self._logged: dict[str, Any] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn.begin(state.global_step, lambda: {**self._logged, "peak_bytes": peak_bytes(world.device)})

        def on_log(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            logs = named["logs"]
            self._logged = {name: logs[name] for name in ("loss", "grad_norm") if name in logs}

    arguments = _peer_arguments(config, world)
    HfTrainer(model=llama, args=arguments, train_dataset=windows, callbacks=[OnTurnToo()]).train()


def _peer_arguments(config: PretrainConfig, world: World) -> Any:
    """Our run's settings as transformers' ``TrainingArguments``."""
    from transformers import TrainingArguments

    train, optimizer = config.train, config.train.optimizer
    assert train.schedule.kind == "constant" and not train.schedule.warmup_steps
    return TrainingArguments(
        output_dir=str(train.run_dir),
        accelerator_config={"use_configured_state": True},
        deepspeed={
            "zero_optimization": {"stage": config.deepspeed.zero_stage},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
        },
        bf16=train.precision == "bf16",
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch_samples,
        gradient_accumulation_steps=config.accumulation(world.size),
        train_sampling_strategy="sequential",  # the file is in the run's order
        dataloader_pin_memory=world.device.type == "cuda",
        remove_unused_columns=False,  # it would remove shift_labels
        optim="adamw_torch_fused",
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=train.clip_norm,
        logging_steps=train.log.every_steps,
        report_to=["tensorboard"],
        save_strategy="steps",
        save_steps=train.checkpoint.every_steps,
        save_total_limit=train.checkpoint.keep,
        disable_tqdm=True,
        seed=train.seed,
    )
