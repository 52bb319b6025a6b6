"""`python tools/preprocess_data.py`: the program pangu.preprocess, under the name that scripts rely on."""

from pangu.preprocess import main

if __name__ == "__main__":
    main()
