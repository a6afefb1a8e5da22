"""The version, as in pyproject.toml: read from here because asking the installed metadata takes 40 ms."""

__version__ = "0.1.0"
