"""All commands under one name: `python -m gpt2.main COMMAND [OVERRIDES]`."""

import json
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from gpt2.cli.arguments import COMMANDS, split_arguments, take_subcommand
from gpt2.cli.error_lines import errors_as_lines
from gpt2.cli.help import study_help
from gpt2.cli.script import script
from gpt2.config import ExportRun
from gpt2.errors import ResourceError, UserError, few
from gpt2.runtime.console import protect_output
from gpt2.runtime.files import writable_file
from gpt2.runtime.repository import ROOT
from gpt2.runtime.signals import exit_on_signals

PACKAGES = {"benchmark": "gpt2.benchmarks", "doctor": "gpt2.doctor"}  # commands that are in a layer above this module


def run_script(name: str, *arguments: str) -> None:
    """Run a script of the repository with these arguments, followed by those of this process."""
    sys.argv = [f"{name}.py", *arguments, *sys.argv[1:]]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


@script("export")
def export(config: ExportRun) -> None:
    from gpt2.checkpoint import pretrained
    from gpt2.runtime.hub import create_repository, upload

    trained = pretrained.open_model(config.checkpoint)
    if config.push is not None:
        create_repository(config.push, config.private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.to or Path(temporary) / "exported")
        pretrained.export(trained, folder, config)
        if config.to is not None:
            files = ", ".join(sorted(path.name for path in folder.iterdir()))
            print(f"{trained.describe()} is now in {os.path.relpath(folder)}: {files}")
        if config.push is not None:
            print(f"{trained.describe()} is now on the Hugging Face Hub: {upload(folder, config.push)}")
    if config.license == "unknown" or config.language is None:
        print("To state licence and language in the model card, add them: license=mit language=en, for example.")
    use = "pipeline('text-generation', " if trained.tokenizer else "AutoModelForCausalLM.from_pretrained("
    print(f"\nIn Python:  transformers.{use}{config.push or config.to!r})")


def compare() -> None:
    """usage: python -m gpt2.main compare [RUN ...] [OPTIONS]

    Compare runs: run folders, folders that contain runs, or patterns; default: outputs/runs.

      sort=KEY          a column, such as loss (the default) or tokens_per_second, or a setting: learning_rate
      html=FILE         write everything into this one HTML file
      picture=FILE      write the plot into this file; default: outputs/comparison.png
      columns=KEY,...   the settings and columns to show, such as steps, instead of the six most informative settings
      --json            for programs, instead of the table
      --markdown        for documents, instead of the table
    """
    paths, options = split_arguments(compare)
    picture_file = options.get("picture") or "outputs/comparison.png"
    kind = Path(picture_file).suffix.removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"picture: {picture_file} is none of .png, .svg and .pdf")
    places = {"html": options["html"] or "outputs/comparison.html"} if "html" in options else {}
    if "picture" in options or not {"json", "markdown", "html"} & options.keys():
        places["picture"] = picture_file
    for key, name in places.items():
        with writable_file(Path(name), key):
            pass  # checked before the runs are read
    from gpt2.analysis.compare import Comparison
    from gpt2.analysis.runs import find_runs
    from gpt2.analysis.tables import as_markdown, as_text

    columns = list(filter(None, options.get("columns", "").split(",")))
    comparison = Comparison(find_runs(paths or ["outputs/runs"]), options.get("sort", ""), columns)
    others = [f"{comparison.rest}. columns=KEY,... shows others, html=FILE all of them."] if comparison.rest else []
    notes = [*comparison.notes, *others]
    if "picture" in places and not any(run.values("val/loss") for run in comparison.runs):
        del places["picture"]
        notes.append("No run has a validation loss yet, so no picture is drawn.")
    if "json" in options:
        finite = json.loads(json.dumps(comparison.records()), parse_constant=lambda _: None)  # JSON has no infinity
        print(json.dumps(finite, indent=2))
    elif "markdown" in options:
        print("\n\n".join([as_markdown(comparison.rows()), *notes]))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(f"{comparison.headline}\n\n{as_text(comparison.rows(), width)}\n")
        print("".join(f"{note}\n" for note in notes), end="")
    for key, name in places.items():
        if key == "html":
            from gpt2.analysis.compare_html import page

            content = page(comparison).encode(errors="replace")
        else:
            from gpt2.analysis.compare_plot import curves
            from gpt2.analysis.plotting import picture

            content = picture(curves(comparison), kind)
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content)
        except OSError as error:
            raise ResourceError(f"{key}: cannot write {name}: {error.strerror}") from error
        print(f"written to {name}", file=sys.stderr if {"json", "markdown"} & options.keys() else sys.stdout)


def study() -> None:
    """usage: python -m gpt2.main study experiments/STUDY [OPTIONS]

    Run the missing runs of a recorded study, and write its table and picture. After Ctrl-C the same command resumes.

      variants=NAME,...  run only these variants, without writing the table and the picture
      jobs=N             runs at a time; default: one per core on a CPU, one on a GPU; 0: only write the results
      threads=N          threads of each run; default: the cores divided by the runs at a time
      --plan             only print the missing runs and their cost here: tokens, FLOPs, time, disk
      --redraw           only write table and picture again, from results.csv
    """
    paths, options = split_arguments(study)
    numbers = {key: int(value) for key, value in options.items() if value.isdecimal()}
    problems = []
    if len(paths) != 1:
        problems.append(f"study: one folder is needed, such as experiments/learning_rate, not {few(paths) or 'none'}")
    problems += [
        f"{key}: {options[key]!r} is not a whole number from {least}"
        for key, least in (("jobs", 0), ("threads", 1))
        if key in options and numbers.get(key, -1) < least
    ]
    if "redraw" in options and (others := few([key for key in options if key != "redraw"])):
        problems.append(f"--redraw: it runs nothing, so leave out {others}")
    if problems:
        raise UserError(*problems)
    if "redraw" in options:
        from gpt2.experiments.results import redraw

        redraw(Path(paths[0]))
    else:
        from gpt2.experiments.runner import print_plan, run_study

        act = print_plan if "plan" in options else run_study
        variants = options["variants"].split(",") if "variants" in options else None
        act(Path(paths[0]), numbers.get("jobs"), numbers.get("threads"), variants)


def main() -> None:
    protect_output()
    name = take_subcommand("command", "python -m gpt2.main COMMAND [OVERRIDES]", COMMANDS)
    if name == "export":
        export()
    elif name in PACKAGES:
        runpy.run_module(PACKAGES[name], run_name="__main__")
    elif name in ("compare", "study"):
        exit_on_signals(also_by_ctrl_c=True)
        with errors_as_lines():
            {"compare": compare, "study": study}[name]()
    elif name == "optimize" and {"-h", "--help"} & {*sys.argv[1:]}:
        print(study_help())
    elif name == "optimize":
        run_script("train", "-m", "hparams_search=optuna")
    else:
        run_script(name)


if __name__ == "__main__":
    main()
