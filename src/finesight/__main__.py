"""Run `python -m finesight`, equivalent to the installed command."""

from finesight.cli.app import main

if __name__ == "__main__":
    main()
