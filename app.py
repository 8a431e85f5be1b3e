"""The app's launcher: `python app.py [RUN]` is `mlxdpo app [RUN]`."""

import sys

from mlxdpo.cli import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
