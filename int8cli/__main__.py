"""`python -m int8cli`."""

from int8cli.cli import main

if __name__ == "__main__":
    main()
