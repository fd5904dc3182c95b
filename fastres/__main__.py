"""``python -m fastres`` is the ``fastres`` command."""

from fastres.cli import main

if __name__ == "__main__":
    main()
