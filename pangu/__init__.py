"""PanGu-α: the model, its tokenizer and data, training, generation, and the formats of its weights."""
