"""Configuration of PanGu-α for HuggingFace transformers 5."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, __version__

# Earlier ones make other masks and positions while generating, some of them wrong without a word.
MINIMUM = (5, 4)
if tuple(int(part) for part in __version__.split(".")[:2]) < MINIMUM:
    raise ImportError(f"transformers {__version__} found, {'.'.join(map(str, MINIMUM))} or newer expected: pip install -U transformers.")

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "quick_gelu")
FINAL_NORMS = ("before_query", "after_query")


class GPTPanguConfig(PretrainedConfig):
    """What the network is. Defaults are those of the released 2.6B model.

    Args:
        vocab_size: number of token ids.
        max_position_embeddings: rows of the position and query embeddings: the longest sequence the model can see.
        hidden_size: width of the residual stream.
        num_layers: Transformer layers, the query layer included, as the paper counts.
        num_heads: attention heads; divides `hidden_size`.
        intermediate_size: width inside the MLP; None = 4 x hidden_size.
        activation_function: `gelu_new` is the tanh approximation that trained the released weights; `gelu` (erf) and `quick_gelu`
            (x·sigmoid(1.702x)) are what other ports run.
        final_norm: where the final LayerNorm sits: `before_query` in the released 2.6B and 13B, `after_query` in the 200B code.
        layer_norm_epsilon: inside the square root.
        embd_pdrop: dropout of the embedding sum.
        resid_pdrop: dropout of both sublayer outputs.
        attn_pdrop: dropout of the attention weights.
        initializer_range: standard deviation of fresh weights.
        use_cache: keep keys and values while generating.
        bos_token_id: `<eot>`, the separator of documents, begins a text too.
        eos_token_id: `<eot>` ends it.
        pad_token_id: `<pad>`.
        tie_word_embeddings: the output layer is the word embedding. Every released model is so.
        kwargs: see `PretrainedConfig`.

    Raises:
        ValueError: naming the value that makes no model.
    """

    model_type = "gpt_pangu"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    attribute_map = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012 (declared so by the base class)

    def __init__(
        self,
        vocab_size: int = 40000,
        max_position_embeddings: int = 1024,
        hidden_size: int = 2560,
        num_layers: int = 32,
        num_heads: int = 32,
        intermediate_size: int | None = None,
        activation_function: str = "gelu_new",
        final_norm: str = "before_query",
        layer_norm_epsilon: float = 1e-5,
        embd_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 9,
        eos_token_id: int | list[int] | None = 9,
        pad_token_id: int | None = 6,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value, known in (
            ("activation_function", activation_function, ACTIVATIONS),
            ("final_norm", final_norm, FINAL_NORMS),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r}; expected one of {', '.join(known)}.")
        if num_layers < 2 or hidden_size % num_heads:
            raise ValueError(
                f"num_layers = {num_layers}, hidden_size = {hidden_size}, num_heads = {num_heads}; expected 2 layers or more, the query "
                "layer being one of them, and a number of heads that divides the hidden size."
            )
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.activation_function = activation_function
        self.final_norm = final_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        self.embd_pdrop = embd_pdrop
        self.resid_pdrop = resid_pdrop
        self.attn_pdrop = attn_pdrop
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**{**kwargs, **special, "tie_word_embeddings": tie_word_embeddings})
