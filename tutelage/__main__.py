"""`python -m tutelage` is `tutelage`."""

from tutelage.cli.main import main

if __name__ == "__main__":
    main()
