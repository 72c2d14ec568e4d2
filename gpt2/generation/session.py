"""An interactive session on a terminal: each line is continued, and commands change the sampling options."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import yaml

from gpt2.config import WHEN_LOADED, InferenceConfig
from gpt2.errors import UserError
from gpt2.validation import replace_checked

WELCOME = "Type the beginning of a text; /help lists the commands. Ctrl-D quits."
HELP = """\
Each line is continued. Ctrl-C stops the current text, Ctrl-D quits.
  /set KEY VALUE   change an option: /set temperature 0.5, /set top_k null, /set stop ["\\n", "end"]
  /config          show the options
  /reset           restore the options of the start
  /help            show this list
To begin a text with a slash, type a space before it."""


def parse_value(text: str) -> Any:
    """A value in YAML: null, true, 0.5, a string, or a list [a, "b"]. What is not YAML is a string."""
    with suppress(yaml.YAMLError):
        return yaml.safe_load(f"value: {text}")["value"]
    return text


class Session:
    """Reads lines from the terminal until Ctrl-D. `generate` prints a prompt and its continuation."""

    def __init__(self, generate: Callable[[str, InferenceConfig], None], config: InferenceConfig):
        self.generate, self.initial, self.config = generate, config, replace(config)

    def run(self) -> None:
        with suppress(ImportError):  # Windows has no readline: lines are read without editing
            import readline  # noqa: F401 (importing it gives `input` line editing and history)
        print(WELCOME)
        while True:
            try:
                self.answer(input("> "))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            except UnicodeDecodeError:  # where Python's standard input is strict
                print("error: this line is not UTF-8")

    def answer(self, line: str) -> None:
        """Continue a text, or run a command. An invalid command prints an error and changes nothing."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.generate(line.removeprefix(" ") if line.startswith(" /") else line, self.config)
            return
        command, *words = line.split(maxsplit=2)
        if command == "/set" and len(words) == 2:
            self.set_option(*words)
        elif line.strip() == "/config":
            for key, value in vars(self.config).items():
                print(key, json.dumps(value, ensure_ascii=False))
        elif line.strip() == "/reset":
            self.config = replace(self.initial)
        elif line.strip() == "/help":
            print(HELP)
        else:
            print(f"error: {line.strip()} is none of /set KEY VALUE, /config, /reset, /help; Ctrl-D quits")

    def set_option(self, key: str, text: str) -> None:
        if key in WHEN_LOADED:
            print(f"error: {key} applies when a model is loaded: quit, and start with inference.{key}=...")
            return
        value = parse_value(text)
        if isinstance(getattr(self.config, key, None), list) and not isinstance(value, list):
            value = [value]
        try:
            self.config = replace_checked(self.config, {key: value})
        except UserError as error:
            print("\n".join(f"error: {problem}" for problem in error.problems))
