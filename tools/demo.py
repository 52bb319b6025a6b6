"""`python tools/demo.py`: the program pangu.demo, under the name that scripts rely on."""

from pangu.demo import main

if __name__ == "__main__":
    main()
