"""Sources of documents.

To add a source, write a function that makes a `Source` from a `DataConfig`, and add it to `SOURCES` with the fields of
`DataConfig` that select it.
"""

from collections.abc import Callable

from gpt2.config import DataConfig
from gpt2.data.documents import Source
from gpt2.data.hub_datasets import open_dataset
from gpt2.data.text_files import open_files

# Sources by the fields of DataConfig that name them. The first source whose first field is set is used.
SOURCES: dict[tuple[str, ...], Callable[[DataConfig], Source]] = {
    ("files",): open_files,
    ("dataset_name", "dataset_config"): open_dataset,
}


def open_source(config: DataConfig) -> Source:
    """Open the source that a configuration names.

    Raises:
        UserError: The source cannot be reached or read.
    """
    return SOURCES[_names(config)](config)


def describe_source(config: DataConfig) -> str:
    """The name of the source, such as `wikitext, wikitext-2-raw-v1`."""
    values = (getattr(config, name) for name in _names(config))
    return ", ".join(", ".join(value) if isinstance(value, list) else value for value in values if value is not None)


def _names(config: DataConfig) -> tuple[str, ...]:
    return next(names for names in SOURCES if getattr(config, names[0]) is not None)
