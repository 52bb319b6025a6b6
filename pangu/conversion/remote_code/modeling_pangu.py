"""PanGu-α (arXiv 2104.12369) for HuggingFace transformers 5: the code that travels with a directory of weights.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

A stack of pre-LN blocks, and on top a query layer: a block whose queries come from an embedding of the position. The output layer is the
word embedding, without a bias. Shapes: B batch, S new tokens, K keys (those in the cache first), H hidden, N heads, D head dimension,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_pangu import GPTPanguConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the keys and values of earlier tokens: `cache` since 5.24. Either name is taken, and its own given back."""


def one_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache under whichever name it came.

    Raises:
        ValueError: if it came under both names, or under another: text generated without it would be wrong in silence.
    """
    unknown = [name for name, value in others.items() if isinstance(value, Cache)]
    if unknown or (past_key_values is not None and cache is not None):
        found = ", ".join(unknown) or "cache and past_key_values"
        raise ValueError(f"the cache came as {found}; give it once, as cache or as past_key_values.")
    return cache if past_key_values is None else past_key_values


def visible_keys(position_ids_BS: Tensor, attention_mask_BK: Tensor | None, past: int | Tensor, num_keys: int) -> Tensor:
    """Which key each new token sees: the tokens of its own document up to itself, padding apart.

    A document begins where positions restart at 0, so a token at position p sees itself and the p tokens before it, however the documents
    lie in the batch and whatever of them is in the cache already. Tokens that are masked are not counted.

    Args:
        position_ids_BS: of the new tokens.
        attention_mask_BK: 1 for a token, 0 for padding, tokens in the cache included; None: no padding.
        past: how many tokens are in the cache.
        num_keys: K; a cache of fixed size has more than there are tokens.

    Returns:
        bool [B, 1, S, K], True where visible. Every token sees itself, padding too, so that no row is empty.
    """
    device = position_ids_BS.device
    key_K = torch.arange(num_keys, device=device)
    column_S = torch.arange(position_ids_BS.shape[-1], device=device) + past
    causal_SK = key_K <= column_S.unsqueeze(-1)
    if attention_mask_BK is None:
        first_BS = column_S - position_ids_BS
        visible_BSK = causal_SK & (key_K >= first_BS.unsqueeze(-1))
    else:
        real_BK = F.pad(attention_mask_BK.to(device=device, dtype=torch.bool), (0, num_keys - attention_mask_BK.shape[-1]))
        rank_BK = real_BK.long().cumsum(-1) - 1
        first_BS = rank_BK[:, column_S] - position_ids_BS
        visible_BSK = causal_SK & real_BK.unsqueeze(-2) & (rank_BK.unsqueeze(-2) >= first_BS.unsqueeze(-1))
    return (visible_BSK | (key_K == column_S.unsqueeze(-1))).unsqueeze(1)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds to its scores: 0 where visible, the lowest number elsewhere."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def make_mask(
    position_ids_BS: Tensor, attention_mask_BK: Tensor | None, past: int | Tensor, cache: Cache | None, *, eager: bool, dtype: torch.dtype
) -> Tensor:
    """`visible_keys` as the attention in use takes it, with as many keys as the cache will give."""
    fixed = cache is not None and cache.is_compileable
    num_keys = cache.layers[0].max_cache_len if fixed else int(past) + position_ids_BS.shape[-1]  # type: ignore[union-attr]
    visible = visible_keys(position_ids_BS, attention_mask_BK, past, num_keys)
    return additive(visible, dtype) if eager else visible


def eager_attention(
    module: nn.Module, q_BNSD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor | None, *, scaling: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, softmax in fp32: ([B, S, N, D], the attention weights [B, N, S, K])."""
    # Scaled before the product, which could overflow in fp16.
    scores_BNSK = (q_BNSD * scaling) @ k_BNKD.transpose(-1, -2)
    assert mask is not None  # only sdpa is ever left to make its own
    weights_BNSK = (scores_BNSK.float() + mask).softmax(dim=-1).to(q_BNSD.dtype)
    out_BNSD = F.dropout(weights_BNSK, dropout, training=module.training) @ v_BNKD
    return out_BNSD.transpose(1, 2), weights_BNSK


def linear(in_features: int, out_features: int, *, init_scale: float = 1.0) -> nn.Linear:
    """A linear layer whose fresh weight has `initializer_range` times `init_scale` for its deviation, as the released code drew them."""
    layer = nn.Linear(in_features, out_features)
    layer.init_scale = init_scale  # type: ignore[assignment]
    return layer


class GPTPanguAttention(nn.Module):
    """Multi-head attention with three separate projections."""

    is_causal = True  # transformers' sdpa reads it

    def __init__(self, config: GPTPanguConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_heads
        self.q_proj = linear(config.hidden_size, config.hidden_size, init_scale=0.5)
        self.k_proj = linear(config.hidden_size, config.hidden_size, init_scale=0.5)
        self.v_proj = linear(config.hidden_size, config.hidden_size, init_scale=0.5)
        self.c_proj = linear(config.hidden_size, config.hidden_size, init_scale=(2 * config.num_layers) ** -0.5)

    def forward(
        self, x_BSH: Tensor, attention_mask: Tensor | None, query_BSH: Tensor | None, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; `query_BSH` is what the query layer asks with, None asks with `x_BSH`."""
        q_BNSD = self._heads(self.q_proj(x_BSH if query_BSH is None else query_BSH))
        k_BNKD, v_BNKD = self._heads(self.k_proj(x_BSH)), self._heads(self.v_proj(x_BSH))
        if past_key_values is not None:
            k_BNKD, v_BNKD = past_key_values.update(k_BNKD, v_BNKD, self.layer_idx)
        implementation = self.config._attn_implementation
        attend = eager_attention if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.config.attn_pdrop if self.training else 0.0
        out_BSND, weights = attend(self, q_BNSD, k_BNKD, v_BNKD, attention_mask, scaling=self.head_dim**-0.5, dropout=dropout)
        return self.c_proj(out_BSND.flatten(2)), weights

    def _heads(self, x_BSH: Tensor) -> Tensor:
        return x_BSH.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GPTPanguMLP(nn.Module):
    """The feed-forward sublayer."""

    def __init__(self, config: GPTPanguConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.activation_function]
        self.c_fc = linear(config.hidden_size, config.intermediate_size)
        self.c_proj = linear(config.intermediate_size, config.hidden_size, init_scale=(2 * config.num_layers) ** -0.5)

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Apply the sublayer."""
        return self.c_proj(self.act(self.c_fc(x_BSH)))


class GPTPanguBlock(GradientCheckpointingLayer):
    """x += attention(LN₁(x)); x += MLP(LN₂(x)). The query layer is the same with `query_BSH` for its queries."""

    def __init__(self, config: GPTPanguConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = GPTPanguAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = GPTPanguMLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x_BSH: Tensor, attention_mask: Tensor | None, query_BSH: Tensor | None, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer: its output and, under eager attention, the attention weights."""
        attended_BSH, weights = self.attn(self.ln_1(x_BSH), attention_mask, query_BSH, past_key_values)
        x_BSH = x_BSH + self.dropout(attended_BSH)
        return x_BSH + self.dropout(self.mlp(self.ln_2(x_BSH))), weights


class GPTPanguPreTrainedModel(PreTrainedModel):
    """What both models share: fresh weights, and what may be missing from a checkpoint: nothing."""

    config_class = GPTPanguConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTPanguBlock"]  # noqa: RUF012 (declared so by the base class)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"attn\.(bias|masked_bias)$"]  # noqa: RUF012 (masks that old copies saved)
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range * getattr(module, "init_scale", 1.0))

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Tie the output layer to the word embedding; while weights are being loaded, refuse what would only be warned of.

        Raises:
            ValueError: if the files lack a tensor, or hold an output layer that is not the word embedding.
        """
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        if missing_keys is None:  # no weights are being loaded
            return
        missing = missing_keys - self.all_tied_weights_keys.keys()
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"the weights lack {min(missing)}{more}, which would stay random. Copy or convert them again, every file of them."
            )
        head, words = self.get_output_embeddings(), self.get_input_embeddings()
        if head is not None and self.config.tie_word_embeddings and head.weight is not words.weight and not words.weight.is_meta:
            raise ValueError(
                "the weights hold an lm_head.weight that differs from transformer.wte.weight, but PanGu-α's output layer is the word "
                "embedding. If yours was trained apart, set tie_word_embeddings=False in config.json; otherwise copy or convert it again."
            )


class GPTPanguModel(GPTPanguPreTrainedModel):
    """PanGu-α without its output layer."""

    def __init__(self, config: GPTPanguConfig) -> None:
        super().__init__(config)
        self.wte: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.wqe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPTPanguBlock(config, layer_idx) for layer_idx in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states that the output layer reads.

        Args:
            input_ids: [B, S] new tokens; or `inputs_embeds`.
            past_key_values: keys and values of earlier tokens, the query layer's included.
            attention_mask: [B, K] with 0 for padding, tokens in the cache included. Or, in full, [B, 1, S, K]: bool with True where
                visible, or numbers that are added to the scores; then `position_ids` must be given too.
            position_ids: [B, S] place of each token in its document. Where they restart at 0 another document begins, and documents
                do not see each other, with and without a cache. None counts the tokens that are not padding.
            inputs_embeds: [B, S, H] in place of `input_ids`.
            use_cache: None: as configured, but never in training.
            output_attentions: also give each layer's attention weights; needs eager attention.
            output_hidden_states: also give the embeddings and each layer's output.
            cache: the newer name of `past_key_values`.
            kwargs: ignored; transformers passes what other models take.

        Raises:
            ValueError: naming what does not fit together, where transformers would compute something else in silence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        past_key_values = one_cache(past_key_values, cache, kwargs)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions=True: only eager attention has them. Load the model with attn_implementation="eager".')
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and past_key_values is not None:
            raise ValueError("past_key_values cannot be used in training with gradient checkpointing. Switch one of the two off.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None and not checkpointing:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if inputs_embeds is None:
            if isinstance(past, int) and past == 0:
                self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        position_ids = self._position_ids(inputs_embeds, position_ids, attention_mask, past)
        mask = self._mask(inputs_embeds, position_ids, attention_mask, past, past_key_values)

        x_BSH = self.drop(inputs_embeds + self.wpe(position_ids))
        query_BSH = self.wqe(position_ids).expand_as(x_BSH)
        hidden_states, attentions = [x_BSH], []
        for block in self.h[:-1]:
            x_BSH, weights = block(x_BSH, mask, None, past_key_values=past_key_values)
            hidden_states.append(x_BSH)
            attentions.append(weights)
        if self.config.final_norm == "before_query":
            x_BSH = self.ln_f(x_BSH)
        x_BSH, weights = self.h[-1](x_BSH, mask, query_BSH, past_key_values=past_key_values)
        if self.config.final_norm == "after_query":
            x_BSH = self.ln_f(x_BSH)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BSH,
            hidden_states=(*hidden_states, x_BSH) if output_hidden_states else None,
            attentions=(*attentions, weights) if output_attentions else None,
            **{CACHE: past_key_values if use_cache else None},
        )

    def _position_ids(self, x_BSH: Tensor, given: Tensor | None, attention_mask: Tensor | None, past: int | Tensor) -> Tensor:
        """int64 [B, S] or [1, S], inside the window."""
        length, window = x_BSH.shape[1], self.config.max_position_embeddings
        if given is not None:
            position_ids = given.to(x_BSH.device)
        elif attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("attention_mask has 4 dimensions, which do not tell the place of each token. Give position_ids too.")
        elif attention_mask is not None:
            # Left padding moves the tokens to the right, but not their positions.
            position_ids = (attention_mask.to(x_BSH.device).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        else:
            position_ids = (torch.arange(length, device=x_BSH.device) + past).unsqueeze(0)
        if not torch.compiler.is_compiling() and position_ids.numel():
            low, high = (int(bound) for bound in position_ids.aminmax())
            if low < 0 or high >= window:
                raise ValueError(
                    f"position_ids from {low} to {high}, but the model's window has the positions 0 to {window - 1}. Shorten the text, or "
                    "generate fewer tokens: prompt and max_new_tokens share the window."
                )
        return position_ids

    def _mask(
        self, x_BSH: Tensor, position_ids: Tensor, attention_mask: Tensor | None, past: int | Tensor, past_key_values: Cache | None
    ) -> Tensor | None:
        """The mask as the attention in use takes it: bool for sdpa, added numbers for eager; None where sdpa's own causal mask is it."""
        eager = self.config._attn_implementation == "eager"
        if attention_mask is not None and attention_mask.dim() == 4:
            if attention_mask.dtype == torch.bool:
                return additive(attention_mask, x_BSH.dtype) if eager else attention_mask
            if not attention_mask.is_floating_point() or (not torch.compiler.is_compiling() and bool((attention_mask > 0).any())):
                raise ValueError(
                    f"attention_mask: {attention_mask.dtype} in 4 dimensions, with numbers above 0; expected bool, True where visible, or "
                    "what is added to the scores: 0 where visible, very negative elsewhere. Give attention_mask.bool()."
                )
            return attention_mask.to(x_BSH.dtype)
        batch, length = x_BSH.shape[:2]
        if not torch.compiler.is_compiling():  # which cannot look at values
            expected = (batch, length + int(past))
            if attention_mask is not None and attention_mask.shape != expected:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, expected {list(expected)}: one number for each token, those "
                    "in the cache included. A mask in full has the shape [batch, 1, new tokens, all tokens]."
                )
            fresh = past_key_values is None or (past == 0 and not past_key_values.is_compileable)
            if attention_mask is None and fresh and not eager:
                plain_S = torch.arange(length, device=position_ids.device)
                if bool((position_ids == plain_S).all()):
                    return None
        return make_mask(position_ids.expand(batch, -1), attention_mask, past, past_key_values, eager=eager, dtype=x_BSH.dtype)


class GPTPanguForCausalLM(GPTPanguPreTrainedModel, GenerationMixin):
    """PanGu-α with its output layer, which is the word embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012 (declared so by the base class)

    def __init__(self, config: GPTPanguConfig) -> None:
        super().__init__(config)
        self.transformer = GPTPanguModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        self.lm_head = new_embeddings

    def create_masks_for_generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        *,
        position_ids: Tensor,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mask in full, which `generate` makes outside of the compiled forward pass for a cache of fixed size."""
        past_key_values = one_cache(past_key_values, cache, kwargs)
        assert past_key_values is not None
        eager = self.config._attn_implementation == "eager"
        positions_BS = position_ids.expand(inputs_embeds.shape[0], -1)
        past = past_key_values.get_seq_length()
        return make_mask(positions_BS, attention_mask, past, past_key_values, eager=eager, dtype=inputs_embeds.dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and, with labels, the loss. Arguments that are not explained here are those of `GPTPanguModel.forward`.

        Args:
            labels: [B, S] the same ids as `input_ids`, for they are shifted here; -100 carries no loss. The first token of each further
                document in a row should be -100.
            logits_to_keep: only the last so many positions, or those of an index; 0: all.
            kwargs: for the loss (`num_items_in_batch`).
        """
        outputs = self.transformer(
            input_ids,
            past_key_values=one_cache(past_key_values, cache, kwargs),
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=self.config.vocab_size, **kwargs)
        states = {CACHE: outputs.get(CACHE), "hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, **states)
