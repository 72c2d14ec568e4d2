"""What the scripts print at their ends."""

from pathlib import Path

from gpt2.checkpoint.run_folder import checkpoint_folder_of, newest_first, step_of
from gpt2.config import TrainRun
from gpt2.errors import DivergenceError, LostRankError, ResourceError, UserError, is_out_of_memory, machine_error


def explain_failure(error: Exception, config: TrainRun, run: Path, command: str) -> UserError | None:
    """What ended the training of a run, and how to go on; None for a bug.

    Args:
        run: Its folder.
        command: What goes on with it, as typed.
    """
    train, problem = config.train, machine_error(error)
    if isinstance(error, DivergenceError):
        slower = f"train.learning_rate={train.learning_rate / 2:g} resume_changes=true"
        return DivergenceError(f"{error}{saved(run, f'{command} {slower}')}")
    if isinstance(error, LostRankError):
        return LostRankError(f"{error}{saved(run, command)}")
    if problem is None:
        return None
    if not is_out_of_memory(error):
        return ResourceError(f"{problem}; make room{saved(run, command)}")
    smaller, also = "train.gradient_checkpointing=true", ""
    if train.batch_size == 1 and train.gradient_checkpointing:
        return ResourceError(
            f"{problem}, with the smallest passes there are; a smaller model or data.max_length would do"
        )
    if train.batch_size > 1:
        parts = next(n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0)
        batch_size, passes = train.batch_size // parts, train.accumulation_steps * parts
        also = "" if train.gradient_checkpointing else f", and so does {smaller}"
        smaller = f"train.batch_size={batch_size} train.accumulation_steps={passes}"
    return ResourceError(
        f"{problem}. A pass was train.batch_size={train.batch_size} blocks of data.max_length={config.data.max_length} "
        f"tokens, a step train.accumulation_steps={train.accumulation_steps} of them; {smaller} makes the same steps "
        f"in less memory{also}{saved(run, f'{command} {smaller} resume_changes=true')}"
    )


def saved(run: Path, command: str) -> str:
    """What is saved of a run, and the command that goes on with it, as the end of a sentence."""
    folder = checkpoint_folder_of(run)
    steps = [step for path in newest_first(folder) if (step := step_of(path)) is not None] if folder else []
    return f". Step {steps[0]:,} is saved, go on with: {command}" if steps else ""
