"""An interactive session on a terminal: a line in, its continuation out, and the sampling changed on the way."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from gpt2.config import WHEN_LOADED, InferenceConfig
from gpt2.errors import UserError
from gpt2.validation import replace_checked

WELCOME = "Type the beginning of a text; /help tells the rest. Ctrl-D leaves."
HELP = """\
Each line is continued. Ctrl-C ends the text that is being written, Ctrl-D leaves.
  /set KEY VALUE   change the sampling: /set temperature 0.5, /set top_k null, /set stop ["\\n", "end"]
  /config          show it
  /reset           take it back to what it was at first
  /help            this
A text that begins with a slash is told from a command by a space before it."""


def value_of(text: str) -> Any:
    """What a value is that was typed as YAML has it: null, true, 0.5, a text, or a list [a, "b"]."""
    with suppress(yaml.YAMLError):
        return yaml.safe_load(f"value: {text}")["value"]
    return text


class Session:
    """Reads lines from the terminal until Ctrl-D."""

    def __init__(self, write: Callable[[str, InferenceConfig], None], config: InferenceConfig, history: Path | None):
        """
        Args:
            write: Prints a text and its continuation.
            history: A file that keeps the lines for the next session; they are forgotten if None.
        """
        self.write, self.first, self.config, self.history = write, config, replace(config), history

    def run(self) -> None:
        with suppress(ImportError):  # Windows has none: lines are then read without editing
            import readline  # from here on, `input` edits its line and remembers those before

            if self.history and self.history.is_file():
                with suppress(OSError):
                    readline.read_history_file(self.history)
        print(WELCOME)
        while True:
            try:
                line = input("> ")
                self.answer(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            self.remember()

    def answer(self, line: str) -> None:
        """Do what a command says, or continue a text. A mistake is told in a line, and nothing has changed."""
        command, *words = line.split(maxsplit=2) if line.startswith("/") else [""]
        if not line.strip():
            return
        if not command:
            self.write(line.removeprefix(" ") if line.startswith(" /") else line, self.config)
        elif command == "/set" and len(words) == 2:
            if words[0] in WHEN_LOADED:
                print(f"error: {words[0]} is settled when a model is loaded: leave, and say inference.{words[0]}=...")
                return
            value = value_of(words[1])
            if isinstance(getattr(self.config, words[0], None), list) and not isinstance(value, list):
                value = [value]
            try:
                self.config = replace_checked(self.config, {words[0]: value})
            except UserError as error:
                print("\n".join(f"error: {fault}" for fault in error.problems))
        elif line.strip() == "/config":
            for key, value in vars(self.config).items():
                print(key, json.dumps(value, ensure_ascii=False))
        elif line.strip() == "/reset":
            self.config = replace(self.first)
        elif line.strip() == "/help":
            print(HELP)
        else:
            print(f"error: {line.strip()} is none of /set KEY VALUE, /config, /reset, /help; Ctrl-D leaves")

    def remember(self) -> None:
        with suppress(ImportError, OSError):  # a history is a convenience
            import readline

            if self.history:
                self.history.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(self.history)
