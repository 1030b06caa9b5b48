"""`dreamtune train` under the name that users of diffusers' examples know."""

import sys

from dreamtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
