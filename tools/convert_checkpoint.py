"""`python tools/convert_checkpoint.py`: the program pangu.convert, under the name that scripts rely on."""

from pangu.convert import main

if __name__ == "__main__":
    main()
