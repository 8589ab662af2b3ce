"""`python -m finesight`, the same as the installed command."""

from finesight.cli.app import main

if __name__ == "__main__":
    main()
