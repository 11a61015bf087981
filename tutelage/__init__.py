"""Tutelage raises a language model: from an organisation's text to an assistant that keeps learning."""

__version__ = "0.1.0"
