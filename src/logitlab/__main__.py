"""``python -m logitlab`` is the command ``logitlab``."""

from logitlab.cli import run

if __name__ == "__main__":
    run()
