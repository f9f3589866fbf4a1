"""Puts what a page names into a folder: `python stand_ins.py PAGE FOLDER MADE`, in the warm process (see `warm.py`)."""

import sys
from pathlib import Path

import files  # noqa: F401
import models  # noqa: F401
import system_files  # noqa: F401
from things import place

if __name__ == "__main__":
    place(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
