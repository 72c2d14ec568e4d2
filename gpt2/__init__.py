"""GPT-2, from a YAML file to a written sentence. Importing the package imports nothing heavy: see its modules."""

__version__ = "0.1.0"
