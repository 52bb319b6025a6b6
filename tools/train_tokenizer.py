"""`python tools/train_tokenizer.py`: the program pangu.train_tokenizer, under the name that scripts rely on."""

from pangu.train_tokenizer import main

if __name__ == "__main__":
    main()
