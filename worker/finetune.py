"""Fine-tunes: the HF Trainer over a dataset's rows, a checkpoint with Adam's moments at the end of each epoch.

A whole model and its moments take 10 to 12 bytes a parameter, so a full fine-tune leaves those of the last epoch only.

What is ours is what the gradients need and a Trainer does not keep: moments by parameter name, the mean learning rate
of an epoch as its optimizer steps saw it, and a training that any other worker goes on with.

* Recipe: LESS's by default (specs of the request): AdamW(0.9, 0.999, 1e-8), gradients clipped at norm 1, loss averaged
  over the supervised tokens of all examples of a step.
* Rows of a fraction are drawn by `random.Random(seed).sample` and put in the dataset's order; the same seed shuffles
  them anew for each epoch. Rows without a supervised token are left out and counted.
* LoRA matrices are float32 whatever the base model's precision is (PEFT's `autocast_adapter_dtype`), so that small
  steps are not lost in bfloat16's 8 bits; the base model's weights are in that precision, and no autocast is used
  (float16 apart, for its scaled losses). A full fine-tune keeps float32 weights and computes in the precision asked.
* On one device and one thread count the same request gives the same bytes, interrupted or not.

A training lives in `<work>/<attempt>/`: `epochs/<n>/` are finished checkpoints in the layout of
datastore/checkpoints.py, `trainer/checkpoint-<step>/` what the Trainer needs to go on, whole once it has the file
`complete`. A later attempt takes over an earlier one's files as hard links and writes into a folder of its own, so a
stalled attempt that wakes up writes into files that nobody reads.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from gradstore.types import FinetuneRequest, LossPoint, MixtureSettings, Precision, TrainingRecipe
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from datastore.checkpoints import MOMENTS, NO_MIXTURE_MOMENTS, Description, link
from datastore.durable import sync_folder, write_file
from datastore.errors import InvalidInput, first_line
from datastore.rows import Example
from datastore.selection.top import count
from worker import moments
from worker.batches import Encoded, Unsupervised, collate, encode
from worker.mixtures.folders import save_mixture
from worker.mixtures.model import has_mixture, make_mixture
from worker.mixtures.training import BalancedTrainer
from worker.models import DTYPES, load_model, load_tokenizer, use_gradient_checkpointing

log = logging.getLogger(__name__)

CURVE_POINTS = 500
"""Points of the loss curve at most; longer ones are thinned, each point the mean of the steps that it stands for."""
SAVE_SECONDS = 300.0
"""Seconds between two savings within an epoch: what a killed worker loses at most."""

_COMPLETE = "complete"


class Diverged(InvalidInput):
    """The loss, or what has been trained, is not a number any more."""

    def __init__(self, what: str, *, rate: float, precision: Precision) -> None:
        super().__init__(
            f"{what}: lower learning_rate (it is {rate:g}), or use a precision with more range than {precision}"
        )


@dataclass(frozen=True)
class Epoch:
    """A checkpoint that a fine-tune has left."""

    folder: Path
    description: Description


@dataclass(frozen=True)
class Finetuned:
    """What a fine-tune has done."""

    epochs: list[Epoch]
    rows: int
    skipped_rows: int
    steps: int
    tokens: int
    """Tokens of one epoch, padding apart."""
    precision: Precision
    loss_curve: list[LossPoint]


def draw(rows: int, *, fraction: float | None = None, number: int | None = None, seed: int = 0) -> list[int]:
    """The rows to train on, in order: all of them, a random fraction, or a random number.

    >>> draw(10, fraction=0.3)
    [0, 6, 9]
    """
    if fraction is None and number is None:
        return list(range(rows))
    wanted = count(rows, pct=fraction, k=number) if rows else 0
    return sorted(random.Random(seed).sample(range(rows), wanted))  # noqa: S311 - a draw of rows, no secret


def chosen_precision(asked: str, device: torch.device) -> Precision:
    """What `auto` means: bfloat16 on a GPU, float32 on a CPU."""
    precision: Precision = "bfloat16" if device.type == "cuda" else "float32"
    if asked != "auto":
        precision = asked  # type: ignore[assignment]  # the request's type has checked it
    if precision == "float16" and device.type != "cuda":
        raise InvalidInput("float16 is trained with scaled losses, which need a GPU: ask for bfloat16 or float32")
    return precision


def finetune(
    examples: Iterable[Example],
    request: FinetuneRequest,
    *,
    work: Path,
    device: torch.device,
    experts: Sequence[Path] = (),
    attempt: str = "1",
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
    save_seconds: float = SAVE_SECONDS,
) -> Finetuned:
    """Train on `examples` and leave a checkpoint per epoch (of a full fine-tune only the last) in `work`.

    `experts` are the folders of the adapters that the experts of a mixture begin as; without any they are fresh.
    `on_step(done, total)` is called after every forward and backward pass; an exception of its own ends the training,
    and another attempt goes on from what was saved last. Raises `InvalidInput` where nothing can be trained on, the
    model cannot be trained so, or the loss diverges.
    """
    mixture = None if request.mixture is None else _Beginning(request.mixture, experts)
    setup = _Setup.of(examples, request, device, mixture)
    home = work / attempt
    started = _take_over(work, home)
    keeper = _Keeper(home, request, setup.precision, setup.tokenizer, on_step=on_step, save_seconds=save_seconds)
    trainer = setup.trainer(home / "trainer", keeper)
    trainer.train(resume_from_checkpoint=None if started is None else str(started))
    return Finetuned(
        epochs=_epochs(home),
        rows=len(setup.rows),
        skipped_rows=setup.rows.skipped,
        steps=trainer.state.global_step,
        tokens=setup.rows.tokens,
        precision=setup.precision,
        loss_curve=loss_curve(trainer.state.log_history),
    )


@dataclass(frozen=True)
class Trained:
    """A model that is trained, and nowhere but in memory."""

    model: PreTrainedModel
    """An adapter is inside its layers."""
    tokenizer: PreTrainedTokenizerBase
    rows: int
    tokens: int
    """Tokens of one epoch, padding apart."""


def train(
    examples: Iterable[Example],
    recipe: TrainingRecipe,
    *,
    device: torch.device,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> Trained:
    """Train on `examples` as `finetune` does, to the very same model, and leave nothing on the disk.

    `on_step(done, total)` is called as there; an exception of its own ends the training, which then begins anew.
    Raises `InvalidInput` as there.
    """
    setup = _Setup.of(examples, recipe, device)
    with TemporaryDirectory(prefix="gradstore-training-") as folder:  # the Trainer wants one, and writes nothing there
        trainer = setup.trainer(Path(folder), _Watch(recipe, setup.precision, on_step=on_step))
        trainer.train()
    model = cast("PreTrainedModel | PeftModel", trainer.model)
    bare = cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model
    return Trained(bare, setup.tokenizer, len(setup.rows), setup.rows.tokens)


@dataclass(frozen=True)
class _Beginning:
    """A mixture before its training."""

    settings: MixtureSettings
    experts: Sequence[Path]
    """Folders of the adapters that its experts are; none where they are fresh."""


@dataclass(frozen=True)
class _Setup:
    """What a training begins with."""

    request: TrainingRecipe
    device: torch.device
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    rows: _Rows
    mixture: _Beginning | None

    @classmethod
    def of(
        cls,
        examples: Iterable[Example],
        request: TrainingRecipe,
        device: torch.device,
        mixture: _Beginning | None = None,
    ) -> _Setup:
        precision = chosen_precision(request.precision, device)
        tokenizer = load_tokenizer(request.model, request.revision)
        rows = _Rows.of(examples, request, tokenizer)
        if not len(rows):
            raise InvalidInput(
                f"none of the {rows.skipped:,} rows leaves a token to learn from; "
                f"the first one: {rows.first_reason or 'there are no rows'}"
            )
        return cls(request, device, precision, tokenizer, rows, mixture)

    def trainer(self, folder: Path, watch: _Watch) -> _Trainer:
        """A Trainer of a new model, with nothing done yet."""
        trainer = (_Trainer if self.mixture is None else _MixtureTrainer)(
            model=_trainable_model(self.request, self.precision, self.device, self.mixture),
            args=_arguments(self.request, self.precision, folder, self.device),
            train_dataset=self.rows,
            data_collator=_collator(self.tokenizer),
        )
        if isinstance(trainer, _MixtureTrainer) and self.mixture is not None:
            trainer.mixture = self.mixture.settings
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        return trainer


# Rows -----------------------------------------------------------------------------------------------------------------


class _Rows(Dataset[dict[str, Any]]):
    """Encoded examples, four bytes a token: (tokens, labels) of each."""

    def __init__(self) -> None:
        self.rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self.skipped = 0
        self.first_reason: str | None = None
        self.tokens = 0

    @classmethod
    def of(cls, examples: Iterable[Example], request: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> _Rows:
        rows = cls()
        for example in examples:
            try:
                row = encode(example, tokenizer=tokenizer, template=request.template, max_length=request.max_length)
            except Unsupervised as error:
                rows.skipped += 1
                rows.first_reason = rows.first_reason or error.reason
                continue
            rows.rows.append((np.asarray(row.input_ids, np.int32), np.asarray(row.labels, np.int32)))
            rows.tokens += len(row.input_ids)
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        input_ids, labels = self.rows[index]
        return {"input_ids": input_ids, "labels": labels}


def _collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]:
    pad_id = int(tokenizer.pad_token_id)

    def pad(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        encoded = [Encoded(tuple(row["input_ids"].tolist()), tuple(row["labels"].tolist())) for row in rows]
        batch = collate(encoded, pad_id=pad_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    return pad


# Model ----------------------------------------------------------------------------------------------------------------


def _trainable_model(
    request: TrainingRecipe, precision: Precision, device: torch.device, mixture: _Beginning | None
) -> PreTrainedModel | PeftModel:
    full = request.method == "full"
    base = load_model(
        request.model,
        revision=request.revision,
        precision="float32" if full else precision,
        quantisation=request.quantisation,
        device=device,
    )
    base.config.use_cache = False
    if request.gradient_checkpointing:
        use_gradient_checkpointing(base)
    if full:
        return base.requires_grad_(True)
    if mixture is not None:
        return make_mixture(base, mixture.settings, experts=mixture.experts, seed=request.seed)
    alpha = float(request.lora.alpha)
    lora = LoraConfig(
        r=request.lora.r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=request.lora.dropout,
        target_modules=request.lora.targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(request.seed)  # the matrices A are drawn here
    try:
        with _quiet():
            model: PeftModel = get_peft_model(base, lora, revision=request.revision)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, nn.Linear)})
        raise InvalidInput(
            f"LoRA cannot be put on {request.lora.targets}: {first_line(error)} "
            f"(linear layers of this model: {', '.join(names)})"
        ) from error
    # peft lets gradients go down to the embeddings where checkpointing is on: work for nothing here
    base.disable_input_require_grads()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PEFT is told about its use of a name that transformers 5.2x has replaced."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _arguments(request: TrainingRecipe, precision: Precision, folder: Path, device: torch.device) -> TrainingArguments:
    on_device = min(request.device_batch_size, request.batch_size)
    full = request.method == "full"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=request.epochs,
        per_device_train_batch_size=on_device,
        gradient_accumulation_steps=request.batch_size // on_device,
        learning_rate=request.learning_rate,
        lr_scheduler_type=request.scheduler if request.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=request.warmup_ratio,  # below 1 it is a ratio
        weight_decay=request.weight_decay,
        optim="adamw_torch",
        bf16=full and precision == "bfloat16",
        fp16=precision == "float16",
        seed=request.seed,
        data_seed=request.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number is to be seen
        save_strategy="no",  # _Keeper says when
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one worker, one device: without this the Trainer splits every batch over all GPUs
    return arguments


def _save_weights(model: PreTrainedModel | PeftModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write an adapter, a mixture with its manifest, or a whole model in `dtype`, as safetensors."""
    if isinstance(model, PeftModel) and has_mixture(model):
        save_mixture(model, folder)
        return
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the vocabulary has grown; it has not
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    if dtype is None:
        model.save_pretrained(str(folder))
        return
    state = model.state_dict()
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    model.save_pretrained(str(folder), state_dict=state)
    config = json.loads((folder / "config.json").read_bytes())
    config["dtype"] = str(dtype).removeprefix("torch.")  # transformers has written that of the model in memory
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# Training -------------------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """A Trainer that writes weights as they are written here, and no pickle of its arguments beside them."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights to `output_dir`."""
        _save_weights(cast("PreTrainedModel | PeftModel", self.model), Path(output_dir or str(self.args.output_dir)))


class _MixtureTrainer(BalancedTrainer, _Trainer):
    """The same of a mixture, with its load-balance loss."""


class _Watch(TrainerCallback):
    """Looks whether a training is still wanted, and whether it goes well."""

    def __init__(self, request: TrainingRecipe, precision: Precision, *, on_step: Callable[[int, int], None]) -> None:
        self._request = request
        self._precision = precision
        self._on_step = on_step

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002 - the Trainer's interface
        """Between two parts of a step: is the training still wanted?"""
        self._on_step(state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002 - the Trainer's interface
        """After a step: tell how far it is."""
        self._on_step(state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002 - the Trainer's interface
        """A loss that is not a number ends the training: nothing after it is one."""
        loss = state.log_history[-1].get("loss")
        if loss is not None and not math.isfinite(loss):
            what = f"the loss is {loss} at step {state.global_step} of {state.max_steps}"
            raise Diverged(what, rate=self._request.learning_rate, precision=self._precision)


class _Keeper(_Watch):
    """Keeps what a training must not lose."""

    def __init__(
        self,
        home: Path,
        request: TrainingRecipe,
        precision: Precision,
        tokenizer: PreTrainedTokenizerBase,
        *,
        on_step: Callable[[int, int], None],
        save_seconds: float,
    ) -> None:
        super().__init__(request, precision, on_step=on_step)
        self._home = home
        self._tokenizer = tokenizer
        self._save_seconds = save_seconds
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After a step: tell how far it is, and save now and then; an epoch's end saves its checkpoint first."""
        super().on_step_end(args, state, control)
        ends_epoch = float(state.epoch or 0).is_integer()
        if not ends_epoch and time.monotonic() - self._saved >= self._save_seconds:
            control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kept: Any) -> None:  # noqa: ARG002 - the Trainer's interface
        """Leave a checkpoint, and save, so that the next epoch is not begun twice from further back."""
        control.should_save = True
        full = self._request.method == "full"
        if full and state.global_step < state.max_steps:
            return  # a whole model with its moments per epoch fills disks
        mixture = isinstance(kept["model"], PeftModel) and has_mixture(kept["model"])
        epoch = round(state.epoch or 0)
        description = Description(
            model=self._request.model,
            revision=self._request.revision,
            method="mixture" if mixture else self._request.method,
            precision=self._precision,
            epoch=epoch,
            step=state.global_step,
            learning_rate=_mean_rate(state.log_history, epoch),
            template=self._request.template,
            max_length=self._request.max_length,
            moments_note=NO_MIXTURE_MOMENTS if mixture else None,
        )
        target = self._home / "epochs" / str(epoch)
        partial = target.with_name(f"{epoch}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if full:
            _save_weights(kept["model"], partial / "files" / "model", dtype=DTYPES[self._precision])
            self._tokenizer.save_pretrained(str(partial / "files" / "model"))
        else:
            _save_weights(kept["model"], partial / "files" / "adapter")
        if not mixture:
            moments.write(partial / "files" / MOMENTS, moments.of_optimizer(_bare(kept["optimizer"]), kept["model"]))
        write_file(partial / "description.json", json.dumps(asdict(description)).encode())
        _sync(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002 - the Trainer's interface
        """Mark what the Trainer has saved as whole."""
        folder = self._home / "trainer" / f"checkpoint-{state.global_step}"
        _sync(folder)
        (folder / _COMPLETE).touch()
        self._saved = time.monotonic()


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate has wrapped."""
    bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _mean_rate(history: Sequence[dict[str, float]], epoch: int) -> float:
    """Mean learning rate of the epoch's steps, each as its step has used it."""
    rates = [
        entry["learning_rate"]
        for entry in history
        if "learning_rate" in entry and epoch - 1 < entry["epoch"] - 1e-9 <= epoch
    ]
    return math.fsum(rates) / len(rates)


def loss_curve(history: Sequence[dict[str, float]]) -> list[LossPoint]:
    """The losses in a Trainer's log, thinned to at most `CURVE_POINTS` means."""
    entries = [entry for entry in history if "loss" in entry]

    def mean(group: Sequence[dict[str, float]], of: str) -> float:
        return math.fsum(entry[of] for entry in group) / len(group)

    width = -(-len(entries) // CURVE_POINTS) if entries else 1
    return [
        LossPoint(
            step=int(group[-1]["step"]),
            epoch=group[-1]["epoch"],
            loss=mean(group, "loss"),
            balance=mean(group, "balance") if "balance" in group[-1] else None,
            learning_rate=group[-1]["learning_rate"],
        )
        for group in (entries[start : start + width] for start in range(0, len(entries), width))
    ]


# Files ----------------------------------------------------------------------------------------------------------------


def _take_over(work: Path, home: Path) -> Path | None:
    """Start this attempt's folder with what the furthest earlier one has saved; returns where the Trainer goes on."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "epochs").mkdir(parents=True)
    saved = list(_saved(work, but=home))
    if not saved:
        return None
    step, found = max(saved)
    earlier = found.parent.parent / "epochs"
    for epoch in (path for path in earlier.iterdir() if path.name.isdigit()):
        if json.loads((epoch / "description.json").read_bytes())["step"] <= step:
            for path in (path for path in epoch.rglob("*") if path.is_file()):
                link(path, home / "epochs" / epoch.name / path.relative_to(epoch))
    target = home / "trainer" / found.name
    for path in sorted(found.iterdir(), key=lambda path: path.name == _COMPLETE):  # the marker last
        link(path, target / path.name)
    log.info("fine-tune goes on", extra={"step": step, "attempt": home.name, "earlier": found.parent.parent.name})
    return target


def _saved(work: Path, *, but: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every checkpoint of the Trainer that other attempts have finished writing."""
    for marker in work.glob(f"*/trainer/checkpoint-*/{_COMPLETE}"):
        folder = marker.parent
        if folder.parent.parent != but:
            yield int(folder.name.rpartition("-")[2]), folder


def _epochs(home: Path) -> list[Epoch]:
    folders = sorted((path for path in (home / "epochs").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    return [
        Epoch(folder / "files", Description(**json.loads((folder / "description.json").read_bytes())))
        for folder in folders
    ]


def _sync(folder: Path) -> None:
    """Flush all that is in a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
