"""The parts of Hydra's private API that are used here. Checked with hydra-core 1.4.0rc3.

`tests/cli/test_hydra_private.py` names the part that has moved.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NoReturn

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper as BasicSweeper  # for -m without a study
from hydra._internal.utils import get_args_parser
from hydra.core.utils import run_job  # Hydra's launchers call it
from hydra.types import HydraContext
from omegaconf import DictConfig

from gpt2.errors import UserError

EXECUTION_WHITELIST = ["gpt2.*"]  # patterns of classes that a configuration may instantiate


def parse_arguments(arguments: list[str]) -> Namespace:
    """Split a command line into overrides and Hydra's own flags, without composing anything.

    Raises:
        UserError: There is no such flag, or it has no such value.
    """

    def refuse(message: str) -> NoReturn:
        if message.startswith("unrecognized arguments") and "=" in message:
            message += "; settings have no dashes, such as train.seed=1"
        raise UserError(f"{message}; --help lists all keys, --hydra-help all flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]  # the default prints the usage in several lines
    return parser.parse_intermixed_args(arguments)


COMPLETE_MODULE = r"""    words=($COMP_LINE)
    if [ "${words[1]} ${words[2]}" == "-m gpt2.main" ]; then
        if (( COMP_CWORD < 4 )); then
            choices="%s"
        else
            choices=$( COMP_LINE="python ${COMP_LINE#*gpt2.main }" "${words[@]:0:4}" -sc query=bash 2> /dev/null)
        fi
        COMPREPLY=($( compgen -o nospace -o default -W "$choices" -- "${words[$COMP_CWORD]}" ))
        return
    fi
"""


def bash_completion(commands: Iterable[str]) -> str:
    """The completion function for bash that `-sc install=bash` prints.

    It is Hydra's, which completes after `python FILE`, changed to complete also after `python3`, after a path to
    Python, and after `python -m gpt2.main`.

    Args:
        commands: The commands of `gpt2.main`.
    """
    with redirect_stdout(StringIO()) as printed:
        BashCompletion(config_loader=None).install()  # type: ignore[arg-type]  # only queries use it
    text = printed.getvalue().strip()
    text = text.replace("    words=($COMP_LINE)\n", COMPLETE_MODULE % " ".join(commands))
    text = text.replace('[ "${words[0]}" == "python" ]', '[[ "${words[0]##*/}" == python* ]]')
    return text.replace("COMP_LINE=$COMP_LINE $helper", 'COMP_LINE="python ${COMP_LINE#* }" $helper') + " python3"


def run_composed(composed: DictConfig, task: Callable[[DictConfig], Any]) -> Any:
    """Run a task as `hydra.main` does a single run, on a configuration that is composed already.

    Makes the output folder, configures logging and writes `.hydra/`. `hydra.main` would compose a second time.

    Args:
        composed: The configuration with its `hydra` node.
    """
    context = HydraContext(
        config_loader=None,  # type: ignore[arg-type]  # only sweepers use it
        callbacks=Callbacks(composed),
        execution_whitelist=EXECUTION_WHITELIST,
    )
    done = run_job(
        task_function=task, config=composed, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context
    )
    return done.return_value  # raises the exception that the task ended with
