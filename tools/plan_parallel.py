"""`python tools/plan_parallel.py`: the program pangu.plan, under the name that scripts rely on."""

from pangu.plan import main

if __name__ == "__main__":
    main()
