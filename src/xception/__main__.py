"""``python -m xception`` is the command ``xception``."""

from xception.cli.main import script

if __name__ == "__main__":
    script()
