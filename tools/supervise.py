"""`python tools/supervise.py`: the program pangu.supervise, under the name that scripts rely on."""

from pangu.supervise import main

if __name__ == "__main__":
    main()
