"""Run the command line with `python -m finesight`, like the installed command `finesight`."""

from finesight.cli.app import main

if __name__ == "__main__":
    main()
