"""The bench's command lines: what is wrong with one is said in one line."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn


class Options(argparse.ArgumentParser):
    """An argument parser whose help is the script's docstring, and whose complaint is one line, with exit code 2."""

    def __init__(self, prog: str, text: str | None) -> None:
        super().__init__(
            prog=f"python -m {prog}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        print(f"{self.prog}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)

    def read(self) -> argparse.Namespace:
        """Return the arguments; the folder of the JSON file must be there before anything is measured.

        From here on a SIGTERM leaves like Ctrl-C, so that no contender is left behind.
        """
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        asked = self.parse_args()
        if asked.json and not asked.json.parent.is_dir():
            self.error(f"--json: there is no folder {asked.json.parent}")
        return asked


def natural(text: str) -> int:
    """Return a number of at least 1, for `type=`."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1 (got {value})")
    return value
