"""`python tools/inspect_checkpoint.py`: the program pangu.inspect_checkpoint, under the name that scripts rely on."""

from pangu.inspect_checkpoint import main

if __name__ == "__main__":
    main()
