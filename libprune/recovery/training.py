"""Training by transformers' Trainer: the loss, the held-out checks, checkpoints that are continued, and progress."""

import importlib.util
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.random import default_rng
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from libprune.engine.errors import LibpruneError, ParamsError
from libprune.engine.heads import Pooling
from libprune.models.embeddings import distances, pooled
from libprune.models.parallel import World
from libprune.models.sequences import Sequences
from libprune.pipeline.atomic import remove
from libprune.pipeline.sections import Recover
from libprune.pipeline.terminal import CONTINUES, Bar, say
from libprune.recovery.losses import Taught, hidden_loss, prediction_loss
from libprune.recovery.predictions import Teacher, attention_mask, model_inputs
from libprune.recovery.student import WEIGHTS, read_weights, trained_parameters

STATE = "trainer_state.json"
"""The file of a checkpoint that the Trainer writes last."""
_BETAS = (0.9, 0.95)
"""Decay of the moments of the optimizer."""
_CURVE = 200
"""About so many points of the training loss are kept."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a training, and how the sequences of a step are worked through.

    Attributes:
        steps: steps of the optimizer.
        sequences: sequences of one step, in all processes together.
        at_once: sequences of one pass of one process.
        passes: passes of one process in a step.
        checks: the steps after which the held-out loss is measured and a checkpoint written.
    """

    steps: int
    sequences: int
    at_once: int
    passes: int
    checks: tuple[int, ...]

    @property
    def kept(self) -> int:
        """Steps between two points of the training loss that are kept."""
        return max(1, self.steps // _CURVE)


def make_schedule(params: Recover, batch_tokens: int, length: int, processes: int) -> Schedule:
    """Divide the tokens to train on into steps, and each step into passes.

    Args:
        params: tokens in all, tokens of a step, and the number of checks.
        batch_tokens: the most tokens in a pass.
        length: tokens of a sequence.
        processes: number of processes that share each step.

    Raises:
        ParamsError: if the sequences of a step cannot be shared out evenly.
    """
    sequences = max(1, params.batch_tokens // length)
    if sequences % processes:
        raise ParamsError(
            f"recover.batch_tokens: {params.batch_tokens} makes steps of {sequences} sequences of {length} tokens, "
            f"which {processes} processes cannot share evenly; take a multiple of {processes * length}"
        )
    share = sequences // processes
    most = max(1, batch_tokens // length)
    at_once = max(number for number in range(1, min(most, share) + 1) if share % number == 0)
    steps = max(1, round(params.tokens / (sequences * length)))
    number = min(params.checks, steps)
    checks = tuple(round(steps * check / number) for check in range(1, number + 1))
    return Schedule(steps, sequences, at_once, share // at_once, checks)


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences in the order in which they are trained on.

    Args:
        sequences: all sequences.
        order: the number of each sequence that is given out; a number may come several times.
    """

    def __init__(self, sequences: Sequences, order: list[int]) -> None:
        self._sequences, self._order = sequences, order
        self._targets, self._mask = sequences.predicted, attention_mask(sequences)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self._order[number]
        mask = {} if self._mask is None else {"attention_mask": self._mask[row]}
        return {
            "index": torch.tensor(row),
            "input_ids": self._sequences.ids[row],
            "targets": self._targets[row],
            **mask,
        }


def training_order(available: int, wanted: int, seed: int) -> list[int]:
    """The numbers of `wanted` sequences: all of them once in a random order, then all again in another, and so on."""
    random, order = default_rng(seed), list[int]()
    while len(order) < wanted:
        order += random.permutation(available).tolist()
    return order[:wanted]


class _Distiller(Trainer):
    """The Trainer with a teacher: its loss, and checkpoints that hold what is trained by the parameters' own names."""

    def __init__(
        self, teacher: Teacher | None, params: Recover, layers: Sequence[int], pooling: Pooling | None, **given: Any
    ) -> None:
        super().__init__(**given)
        self._pooling = pooling
        self.model_accepts_loss_kwargs = False  # the loss of each pass is a mean, to be divided by their number
        self._teacher, self._recover, self._layers, self._began, self._spent = teacher, params, layers, 0.0, 0.0

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        params = self._recover
        given = model_inputs(inputs["input_ids"], inputs.get("attention_mask"))
        said = model(**given, output_hidden_states=bool(params.hidden_states), use_cache=False)
        taught = self._teacher.predict(inputs["index"], given) if self._teacher else Taught(said[0].detach())
        if self._pooling is not None:
            assert isinstance(taught.predictions, Tensor), "hidden states are never stored"
            loss = distances(pooled(said[0], self._pooling), pooled(taught.predictions, self._pooling)).mean()
        else:
            loss = prediction_loss(said[0], inputs["targets"], taught, params.temperature, params.cross_entropy)
        if params.hidden_states:
            mask = given.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            distance = hidden_loss(said.hidden_states, taught.hidden, self._layers, mask)
            loss = loss + params.hidden_states * distance
        if not torch.isfinite(loss):
            raise LibpruneError(
                f"the loss is not finite after {self.state.global_step} steps; lower recover.learning_rate, "
                "or set compute.dtype: float32"
            )
        return (loss, said) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *given: Any, **more: Any) -> None:
        """Log figures with the seconds that were spent, those before an interruption included."""
        if not self._began:
            earlier = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
            self._began, self._spent = time.monotonic(), max(earlier, default=0.0)
        super().log({**logs, "seconds": self._spent + time.monotonic() - self._began}, *given, **more)

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        assert output_dir is not None
        model = self.accelerator.unwrap_model(self.model)
        names = trained_parameters(model)
        tensors = state_dict or names
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            stored = {name: tensors[name].detach().cpu().contiguous() for name in names}
            save_file(stored, Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_weights(model or self.model, Path(resume_from_checkpoint))


class _Checks(TrainerCallback):
    """Asks for a held-out check and a checkpoint at the steps of the schedule, and ends where checks do not improve."""

    def __init__(self, schedule: Schedule, patience: int) -> None:
        self._schedule, self._patience = schedule, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = control.should_save = state.global_step in self._schedule.checks

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if gave_up(state.log_history, self._patience):
            control.should_training_stop = True


def held_out_losses(history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The held-out loss by the step that it was measured after, nats."""
    return {int(entry["step"]): entry["eval_loss"] for entry in history if "eval_loss" in entry}


def best_step(checked: Mapping[int, float]) -> int:
    """The first step with the lowest held-out loss."""
    return min(checked, key=lambda step: (checked[step], step))


def gave_up(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether so many checks in a row, up to the last one, were without a lower held-out loss."""
    checked = held_out_losses(history)
    steps = sorted(checked)
    return len(steps) - 1 - steps.index(best_step(checked)) >= patience


class _Progress(TrainerCallback):
    """Shows the loss, tokens a second and the time that is left."""

    def __init__(self, schedule: Schedule, length: int, shown: bool) -> None:
        self._tokens, self._steps, self._shown = schedule.sequences * length, schedule.steps, shown
        self._figures: dict[str, str] = {}
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = Bar(
            total=self._steps * self._tokens,
            initial=state.global_step * self._tokens,
            desc="recover",
            unit="tok",
            unit_scale=True,
            disable=not self._shown,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        for name, shown in (("loss", "loss"), ("eval_loss", "held out")):
            if name in logs:
                self._figures[shown] = f"{logs[name]:.4f}"
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        steps: steps that were run.
        kept: the step with the lowest held-out loss; 0 if none was lower than before training.
        checkpoint: the folder of its weights; None for step 0.
        history: what was logged: `step` and `seconds`, with `loss` (training) or `eval_loss` (held out).
    """

    steps: int
    kept: int
    checkpoint: Path | None
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """A training of a pruned model on what the dense model says.

    Attributes:
        teacher: the dense model, or its stored predictions; None where the loss compares with neither.
        sequences: those to train on, and behind them the held-out ones.
        held_out: number of held-out sequences.
        layers: index in the dense model of each layer of the trained one.
        params: the loss and the optimizer.
        schedule: the steps, as `make_schedule` divides the tokens.
        device: where the model is trained.
        dtype: the type that passes are computed in.
        world: the processes; each takes its share of every step.
    """

    teacher: Teacher | None
    sequences: Sequences
    held_out: int
    layers: Sequence[int]
    params: Recover
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    world: World

    def run(self, model: nn.Module, home: Path) -> Outcome:
        """Train, going on from the last checkpoint of an earlier run that was stopped.

        Args:
            model: the model, on the CPU, with the parameters that are to be trained.
            home: the folder of checkpoints, of this training alone.

        Raises:
            LibpruneError: if the loss is not finite, or the optimizer needs a package that is not installed.
        """
        if self.params.optimizer == "adamw_bnb_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise LibpruneError("recover.optimizer: adamw_bnb_8bit needs bitsandbytes; run `pip install bitsandbytes`")
        last = _last_checkpoint(home, self.world)
        state = None if last is None else TrainerState.load_from_json(str(last / STATE))
        if state is not None and self.world.first:
            say(f"{CONTINUES}: {state.global_step} of {self.schedule.steps} steps are done")
        if state is None or not self._ended(state):
            state = self._train(model, home, last)
        history = [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]
        kept = best_step(held_out_losses(history))
        checkpoint = home / f"checkpoint-{kept}" if kept else None
        return Outcome(int(state.global_step), kept, checkpoint, history)

    def _ended(self, state: TrainerState) -> bool:
        """Whether a training that was saved in this state had come to its end; the Trainer itself would go on."""
        return state.global_step >= self.schedule.steps or gave_up(state.log_history, self.params.patience)

    def _train(self, model: nn.Module, home: Path, last: Path | None) -> TrainerState:
        number, schedule = len(self.sequences) - self.held_out, self.schedule
        order = training_order(number, schedule.steps * schedule.sequences, self.params.seed)
        trainer = _Distiller(
            self.teacher,
            self.params,
            self.layers,
            self.sequences.pooling,
            model=model,
            args=self._on_own_device(self._arguments(home, fresh=last is None)),
            train_dataset=Rows(self.sequences, order),
            eval_dataset=Rows(self.sequences, list(range(number, len(self.sequences)))),
            callbacks=[
                _Checks(schedule, self.params.patience),
                _Progress(schedule, self.sequences.length, self.world.first),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        return trainer.state

    def _arguments(self, home: Path, fresh: bool) -> TrainingArguments:
        params, schedule = self.params, self.schedule
        never = 10**9  # the callback names the steps
        return TrainingArguments(
            output_dir=str(home),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.at_once,
            per_device_eval_batch_size=schedule.at_once,
            gradient_accumulation_steps=schedule.passes,
            optim=params.optimizer,
            learning_rate=params.rate,
            lr_scheduler_type=params.schedule,
            warmup_steps=math.ceil(params.warmup * schedule.steps),
            weight_decay=params.weight_decay,
            adam_beta1=_BETAS[0],
            adam_beta2=_BETAS[1],
            max_grad_norm=params.clip,
            bf16=self.dtype == torch.bfloat16,
            fp16=self.dtype == torch.float16,
            use_cpu=self.device.type == "cpu",
            seed=params.seed,
            eval_strategy="steps",
            eval_steps=never,
            eval_on_start=fresh,
            save_strategy="steps",
            save_steps=never,
            save_total_limit=2,
            metric_for_best_model="loss",
            greater_is_better=False,
            logging_steps=schedule.kept,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            ddp_backend="gloo" if self.world.size > 1 and self.device.type == "cpu" else None,
            **self._sharding(),
        )

    def _on_own_device(self, arguments: TrainingArguments) -> TrainingArguments:
        """The arguments for a process that is alone: it trains on its own GPU, whatever others the machine has.

        transformers would take the first one, and give every other GPU a pass of its own.
        """
        if self.world.size == 1 and self.device.type == "cuda":
            arguments._n_gpu, arguments._setup_devices = 1, self.device
            torch.cuda.set_device(self.device)
        return arguments

    def _sharding(self) -> dict[str, Any]:
        """The arguments that share weights, gradients and optimizer states out over the processes (FSDP2).

        Raises:
            LibpruneError: on CPUs, for which accelerate has no FSDP.
        """
        if not self.world.sharded:
            return {}
        if self.device.type == "cpu":
            raise LibpruneError("LIBPRUNE_SHARD shares a model that is trained over GPUs only; unset it for this stage")
        return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def _last_checkpoint(home: Path, world: World) -> Path | None:
    """The newest checkpoint that is whole; what a killed process left half written is deleted."""
    whole: dict[int, Path] = {}
    for path in home.glob("checkpoint-*"):
        try:
            state = json.loads((path / STATE).read_text())
            whole[int(state["global_step"])] = path
        except (OSError, ValueError):
            if world.first:
                remove(path)
    world.barrier()
    return whole[max(whole)] if whole else None
