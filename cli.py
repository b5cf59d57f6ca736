"""Launcher for a checkout: `python cli.py …` is `surgery …`."""

from surgery.cli.app import entry

if __name__ == "__main__":
    entry()
