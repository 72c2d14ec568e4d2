"""All of a training under way that a checkpoint holds, and taking it up again."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpt2.checkpoint import format as checkpoint
from gpt2.errors import DivergenceError, UserError
from gpt2.ops.linear import name_of
from gpt2.runtime.device import precision_asked
from gpt2.runtime.rng import RandomState, seed_of_rank, versions
from gpt2.training.nonfinite import ADVICE, broken
from gpt2.training.optimizer import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from gpt2.train import Trainer

log = logging.getLogger(__name__)

SHAPE = ("vocab_size", "context_length", "d_model", "num_heads", "num_layers", "d_ff", "use_bias")  # fixed by weights


@dataclass
class Progress:
    """How far a run has come: all that a resumed run must know beside tensors."""

    step: int = 0  # optimizer updates made
    epoch: int = 0
    position: int = 0  # batches of this epoch that are used up
    tokens: int = 0  # predicted so far
    seconds: float = 0.0  # spent in `train`, over all resumptions
    evaluated_at: int = 0  # the step of the newest evaluation
    val_loss: float | None = None
    best_val_loss: float | None = None

    def advance(self, batches: int, of_epoch: int, tokens: int) -> None:
        """Count a step. The end of an epoch is the beginning of the next: one place has one name, whoever arrives."""
        self.step += 1
        self.tokens += tokens
        self.position += batches
        if self.position >= of_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def is_best(self) -> bool:
        """Whether no earlier evaluation was better than one that was made here."""
        return self.step == self.evaluated_at > 0 and self.val_loss == self.best_val_loss

    def is_as_in(self, other: "Progress | None") -> bool:
        """Whether nothing but time has passed."""
        return other is not None and replace(self, seconds=0.0) == replace(other, seconds=0.0)


def take(trainer: "Trainer") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a checkpoint, whole on rank 0; all ranks must call it.

    Raises:
        Divergence: A number in it is not finite.
    """
    random = RandomState.now(trainer.device)
    of_ranks = enumerate(trainer.group.gather_object(random.tensors))
    tensors = {
        **trainer.parallel.full(
            {
                **{f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()},
                **{f"optimizer/{name}": t for name, t in optimizer_tensors(trainer.optimizer, trainer.model).items()},
            }
        ),
        **{f"random/{_of_rank(rank)}{name}": t for rank, tensors in of_ranks for name, t in tensors.items()},
        "losses_since_log": trainer.losses_since_log,
    }
    if names := broken(tensors):
        raise DivergenceError(
            f"step {trainer.progress.step}: {names[0]} is no longer finite, and is not saved; {ADVICE}"
        )
    record = {
        **_circumstances(trainer),
        "run": trainer.run,
        "wandb_id": trainer.tracker.external.id,
        "tokenizer": trainer.tokenizer and trainer.tokenizer.to_json(),
        "progress": asdict(trainer.progress),
        "steps_left_out": trainer.nonfinite.state(),
        "scaler": trainer.scaler.state_dict(),
        "random": random.elsewhere,
        **{key: value for callback in trainer.callbacks for key, value in callback.state_dict().items()},
    }
    return tensors, record


def _circumstances(trainer: "Trainer") -> dict[str, Any]:
    """What decides how a training goes on, beside its state."""
    return {
        "model": asdict(trainer.model.config),
        "train": asdict(trainer.config),
        "data": getattr(trainer.train_loader.dataset, "fingerprint", None),
        "machine": {
            "device": trainer.device.type,
            "precision": trainer.precision.name,
            "linear": name_of(trainer.model.linear),
            "compiled": trainer.is_compiled,
            "threads": torch.get_num_threads(),
            "ranks": trainer.group.size,
            "strategy": trainer.strategy if trainer.group.size > 1 else None,
        },
        "versions": versions(),
    }


def restore(trainer: "Trainer", path: Path, accept_other_data: bool) -> None:
    """Have a trainer go on from a checkpoint, and log what is not as it was then.

    Raises:
        UserError: The file is missing, damaged, or of a model of another shape or of another corpus.
    """
    record, now = checkpoint.read_record(path), _circumstances(trainer)
    model = record["model"]
    if other := [f"{k}={model.get(k)}, not {now['model'][k]}" for k in SHAPE if model.get(k) != now["model"][k]]:
        raise UserError(f"checkpoint: {path} holds a model of another shape: {', '.join(other)}")
    is_same_data = record["data"] == now["data"]
    if not is_same_data and not accept_other_data:
        raise UserError(
            f"checkpoint: {path} was trained on other data (fingerprint {record['data']}, not {now['data']}); "
            f"resume_changes=true goes on with these"
        )
    _compute_as_then(trainer, record)
    now = _circumstances(trainer)
    before = _flat(record)
    for key, value in _flat(now).items():
        if before.get(key) != value:
            log.info("Changed: %s is %s, it was %s", key, value, before.get(key))

    shapes = trainer.model.state_dict()
    trainer.model.load_state_dict(trainer.parallel.parts(checkpoint.read_tensors(path, "model/"), shapes))
    if record["train"].get("optimizer", "adamw") != trainer.config.optimizer:
        log.warning("The optimizer is another one: it begins without memory")
    else:
        memory = checkpoint.read_tensors(path, "optimizer/")
        like = {name: shapes[name.split("/", 1)[1]] for name in memory}
        load_optimizer_tensors(trainer.optimizer, trainer.model, trainer.parallel.parts(memory, like))
    if trainer.scaler.is_enabled() and record["scaler"]:  # the other device may need no scaling
        trainer.scaler.load_state_dict(record["scaler"])
    trainer.nonfinite.load_state(record["steps_left_out"])
    progress = Progress(**record["progress"])
    blocks_used = progress.position * record["train"]["batch_size"]
    position = blocks_used // trainer.config.batch_size if is_same_data else 0
    trainer.progress = replace(progress, position=position)
    trainer.losses_since_log = checkpoint.read_tensors(path, "losses_since_log")[""].clone().to(trainer.device)
    rank = trainer.group.rank
    if random := checkpoint.read_tensors(path, f"random/{_of_rank(rank)}"):
        RandomState(trainer.device, random, {} if rank else record["random"]).restore()
    else:  # there were fewer ranks then
        torch.manual_seed(seed_of_rank(trainer.config.seed, rank, progress.step))


def _of_rank(rank: int) -> str:
    """What stands before the names of a rank's random states; those of rank 0 are called as if it were alone."""
    return f"rank{rank}/" if rank else ""


def _compute_as_then(trainer: "Trainer", record: dict[str, Any]) -> None:
    """Have a trainer compute in the way that the run began in, where that is left to `auto`: it may be another today.

    Runs of earlier versions computed in fp32 on a CPU, by PyTorch's products.
    """
    machine, config = record["machine"], trainer.config
    if machine["device"] != trainer.device.type:
        return
    precision = machine["precision"] if precision_asked(config) == "auto" else None
    is_same = machine["precision"] == (precision or trainer.precision.name)
    compiled = machine.get("compiled", bool(record["train"].get("compile"))) if config.compile == "auto" else None
    trainer.compute_as(precision, machine.get("linear", "PyTorch") if is_same else None, compiled)


def _flat(circumstances: dict[str, Any]) -> dict[str, Any]:
    groups = ("model", "train", "machine", "versions")
    values = {f"{group}.{key}": value for group in groups for key, value in circumstances[group].items()}
    return {**values, "data": circumstances["data"]}
