"""`python tools/make_quickstart_corpus.py`: the program pangu.quickstart.corpus, under the name that scripts rely on."""

from pangu.quickstart.corpus import main

if __name__ == "__main__":
    main()
