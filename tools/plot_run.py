"""`python tools/plot_run.py`: the program pangu.plot, under the name that scripts rely on."""

from pangu.plot import main

if __name__ == "__main__":
    main()
