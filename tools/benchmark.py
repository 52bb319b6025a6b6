"""`python tools/benchmark.py`: the program pangu.benchmark, under the name that scripts rely on."""

from pangu.benchmark import main

if __name__ == "__main__":
    main()
