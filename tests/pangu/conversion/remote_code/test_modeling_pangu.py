"""A directory that we write, loaded by transformers with the code that travels with it: the same model, and nothing silently another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden import golden_batch
from helpers.in_transformers import IMPLEMENTATIONS, TOLERANCE, export, load, tokens_of
from helpers.small_model import VOCAB, WINDOW, NumberTokenizer, small_model, write_model
from torch import Tensor

from megatron_ext.sharding import canonical_parameters
from pangu.conversion import huggingface
from pangu.conversion.weights import Overrides
from pangu.inference.generation import TextGenerator

transformers = pytest.importorskip("transformers")

# --- the same function -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("case", ["plain", "eod"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_the_originals(implementation: str, case: str, use_cache: bool, golden: Path, shared: Path) -> None:
    """In `eod` positions restart at every document, which transformers' own masks overlook where there is a cache."""
    expected = np.load(shared / f"oracle/A/case_{case}.npz")
    tokens, position_ids, labels, _ = golden_batch(expected)
    with torch.no_grad():
        outputs = load(golden, implementation)(tokens, position_ids=position_ids, use_cache=use_cache)
    assert (outputs.past_key_values is not None) == use_cache
    assert (outputs.logits - torch.from_numpy(expected["logits"])).abs().max() < TOLERANCE
    loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert (loss - torch.from_numpy(expected["per_token_loss"])).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "dialect",
    [
        {"gelu": "erf"},
        {"gelu": "sigmoid", "final_norm": "after_query"},
        {"final_norm": "after_query"},
        {"ffn_hidden_size": 48, "num_layers": 2},
    ],
    ids=str,
)
def test_dialects_are_kept(dialect: dict[str, Any], tmp_path: Path) -> None:
    ours = small_model(**dialect)
    tokens = tokens_of(1, 2, WINDOW)
    with torch.no_grad():
        expected = ours.logits(tokens, torch.arange(WINDOW).expand(2, -1))
        found = load(export(tmp_path / "weights", ours))(tokens).logits
    assert (found - expected).abs().max() < TOLERANCE
    assert huggingface.read(tmp_path / "weights", Overrides()).config == ours.config


def test_what_training_exports_is_loaded_too(shared: Path, tmp_path: Path) -> None:
    """Training gathers and writes its weights itself, with everything else beside them."""
    write_model(tmp_path / "weights", shared / "tokenizer")
    tokens = tokens_of(1, 1, 8)
    with torch.no_grad():
        expected = small_model().logits(tokens, torch.arange(8).unsqueeze(0))
        assert (load(tmp_path / "weights")(tokens).logits - expected).abs().max() < TOLERANCE
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "weights", trust_remote_code=True)) == 40000


def test_the_base_model_and_its_states(small: Path, model: Any) -> None:
    base = transformers.AutoModel.from_pretrained(small, trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        outputs = base(tokens_of(1, 2, 7), output_hidden_states=True, output_attentions=True)
        logits = model(tokens_of(1, 2, 7)).logits
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert all(weights.shape == (2, 4, 7, 7) and torch.allclose(weights.sum(-1), torch.ones(())) for weights in outputs.attentions)
    assert (outputs.last_hidden_state @ base.wte.weight.T - logits).abs().max() < TOLERANCE
    as_tuple = model(tokens_of(1, 2, 7), return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and (as_tuple[0] - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_that_was_written_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    path = export(tmp_path / "weights", small_model(), dtype=dtype)
    found = {name: parameter.detach() for name, parameter in load(path).named_parameters()}
    for spec, parameter in canonical_parameters(small_model()):
        assert torch.equal(found[spec.name], parameter.detach().to(dtype)), spec.name


def test_the_loss_is_that_of_the_next_token(model: Any) -> None:
    tokens = tokens_of(2, 2, 9)
    labels = tokens.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.3, -100)
    outputs = model(tokens, labels=labels)
    expected = F.cross_entropy(outputs.logits.detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    kept = int((labels[:, 1:] != -100).sum())
    assert outputs.loss.item() == pytest.approx(float(expected) / kept, rel=1e-5)
    assert model(tokens, labels=labels, num_items_in_batch=100).loss.item() == pytest.approx(float(expected) / 100, rel=1e-5)


# --- the cache, and generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(5,), (1, 2), (3, 10, 11)])
def test_a_text_read_in_chunks_has_the_logits_of_the_whole(cuts: tuple[int, ...], model: Any) -> None:
    """Documents too: what a token may see hangs on its position, and not on what was in the same chunk."""
    tokens = tokens_of(3, 2, 16)
    position_ids = torch.stack([torch.arange(16), torch.tensor([*range(4), *range(7), *range(5)])])
    with torch.no_grad():
        whole = model(tokens, position_ids=position_ids, use_cache=False).logits
        assert (whole[1, 4:11] - model(tokens[1:, 4:11]).logits[0]).abs().max() < TOLERANCE
        cache, parts = None, []
        for begin, end in zip((0, *cuts), (*cuts, 16), strict=True):
            outputs = model(tokens[:, begin:end], position_ids=position_ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            parts.append(outputs.logits)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < TOLERANCE


def test_the_cache_is_taken_under_either_name_and_no_other(model: Any) -> None:
    """transformers 5.24 renamed it. A name that passes unread leaves every new token without the ones before it."""
    tokens = tokens_of(4, 1, 8)
    with torch.no_grad():
        whole = model(tokens).logits[:, -1]
        for name in ("past_key_values", "cache"):
            cache = transformers.DynamicCache(config=model.config)
            model(tokens[:, :7], **{name: cache})
            outputs = model(tokens[:, 7:], **{name: cache})
            assert outputs.past_key_values is cache and cache.get_seq_length() == 8
            assert (outputs.logits[:, -1] - whole).abs().max() < TOLERANCE
        for arguments in ({"past": cache}, {"cache": cache, "past_key_values": cache}):
            for one in (model, model.transformer):
                with pytest.raises(ValueError, match="give it once, as cache or as past_key_values"):
                    one(tokens[:, :1], **arguments)


class AllNumbers(NumberTokenizer):
    vocab_size = VOCAB


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generated_ids_are_ours(how: dict[str, Any], model: Any) -> None:
    ours = TextGenerator(small_model(), AllNumbers())  # type: ignore[arg-type]
    for seed in range(4):
        prompt = tokens_of(seed, 1, 1 + 3 * seed)
        [expected] = ours.generate([ours.tokenizer.decode(prompt[0].tolist())], max_new_tokens=12, temperature=0)
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, **how)[
            0, prompt.shape[1] :
        ]
        new = found.tolist()
        assert (new[:-1] if expected.finish_reason == "stop" else new) == expected.ids
        assert expected.finish_reason == "length" or new[-1] == 9
        assert len(set(expected.ids)) > 2  # no repetition that would be right by chance


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
def test_a_left_padded_batch_generates_what_each_row_does(how: dict[str, Any], model: Any) -> None:
    rows = [tokens_of(seed, 2 + 4 * seed) for seed in range(3)]
    longest = max(map(len, rows))
    batch = torch.stack([F.pad(row, (longest - len(row), 0), value=6) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **how}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, found in zip(rows, together, strict=True):
        expected = model.generate(row.unsqueeze(0), attention_mask=torch.ones(1, len(row)), **options)[0]
        assert found[longest - len(row) :].tolist() == expected.tolist()


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_of_two_documents_continues_the_second(how: dict[str, Any], model: Any) -> None:
    prompt = tokens_of(5, 1, 9)
    position_ids = torch.tensor([[*range(5), *range(4)]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **how}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), position_ids=position_ids, **options)
    expected = model.generate(prompt[:, 5:], attention_mask=torch.ones(1, 4), **options)
    assert found[0, 5:].tolist() == expected[0].tolist()


def test_padding_needs_no_positions(model: Any) -> None:
    row = tokens_of(6, 1, 8)
    left = F.pad(row, (3, 0), value=6)
    inside = torch.cat([row[:, :5], torch.full((1, 2), 6), row[:, 5:]], dim=1)
    with torch.no_grad():
        expected = model(row).logits
        assert (model(left, attention_mask=(left != 6).long()).logits[:, 3:] - expected).abs().max() < TOLERANCE
        assert (model(inside, attention_mask=(inside != 6).long()).logits[:, 7:] - expected[:, 5:]).abs().max() < TOLERANCE
        cached = model(inside[:, :6], attention_mask=(inside[:, :6] != 6).long(), use_cache=True).past_key_values
        rest = model(inside[:, 6:], attention_mask=(inside != 6).long(), past_key_values=cached).logits
        assert (rest[:, 1:] - expected[:, 5:]).abs().max() < TOLERANCE


@pytest.mark.slow
def test_a_forward_pass_with_a_fixed_cache_is_one_graph(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile finds nothing that it must leave the graph for, and reads the same numbers."""
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # the tests' environment switches it off
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = load(small)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    tokens = tokens_of(7, 1, 6)
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]
        model(tokens[:, :5], past_key_values=cache)
        inputs = {"position_ids": torch.tensor([[5]]), "past_key_values": cache}
        mask = model.create_masks_for_generate(torch.empty(1, 1, 0), None, cache, position_ids=inputs["position_ids"])
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        found = compiled(tokens[:, 5:], attention_mask=mask, **inputs).logits[:, -1]
    assert len(graphs) == 1
    assert (found - expected).abs().max() < TOLERANCE


# --- training ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, model: Any) -> None:
    tokens = tokens_of(8, 2, 12)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    expected = gradients()
    assert len(expected) == 53 and all(gradient.abs().max() > 0 for name, gradient in expected.items() if "k_proj.bias" not in name)
    calls = []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.transformer.h[2].attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-7), name


def test_training_keeps_no_cache(model: Any) -> None:
    assert model(tokens_of(1, 1, 4)).past_key_values is not None
    assert model.train()(tokens_of(1, 1, 4)).past_key_values is None


def test_saved_and_loaded_again_bit_for_bit(golden: Path, tmp_path: Path) -> None:
    first = load(golden)
    first.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    transformers.AutoTokenizer.from_pretrained(golden, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"modeling_pangu.py", "configuration_pangu.py", "tokenization_pangu.py", "vocab.model"} <= names
    second = load(tmp_path / "saved")
    expected = dict(first.named_parameters())
    assert len(expected) == 53
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert second.lm_head.weight is second.transformer.wte.weight
    ours = huggingface.read(tmp_path / "saved", Overrides())
    assert ours.config == huggingface.read(golden, Overrides()).config
    assert all(torch.equal(ours.tensors[name].read(), parameter) for name, parameter in expected.items())
    assert "published by others" not in ours.source


def test_lora_trains_and_merges(small: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = load(small)
    tokens = tokens_of(9, 2, 12)
    before = model(tokens).logits.detach()
    targets = ["q_proj", "k_proj", "v_proj", "attn.c_proj", "c_fc"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4))
    assert sum("lora_A" in name for name, _ in tuned.named_parameters()) == 3 * 5
    assert torch.allclose(tuned(tokens).logits, before, atol=TOLERANCE)
    optimizer = torch.optim.AdamW([parameter for parameter in tuned.parameters() if parameter.requires_grad], lr=3e-2)
    losses = []
    tuned.train()
    tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    for _ in range(8):
        loss = tuned(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    tuned.eval()
    expected = tuned(tokens).logits.detach()
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(small), tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, expected)
    merged = tuned.merge_and_unload()
    assert (merged(tokens).logits - expected).abs().max() < 1e-3 < (expected - before).abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(tokens).logits, merged(tokens).logits)


def test_fresh_weights_are_drawn_as_the_original_drew_them(small: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(small, trust_remote_code=True)
    config.hidden_size, config.intermediate_size = 256, 1024
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    layer = model.transformer.h[1]
    deviations = {
        "wqe": model.transformer.wqe,
        "q": layer.attn.q_proj,
        "o": layer.attn.c_proj,
        "fc": layer.mlp.c_fc,
        "out": layer.mlp.c_proj,
    }
    expected = {"wqe": 0.02, "q": 0.01, "o": 0.02 / 6**0.5, "fc": 0.02, "out": 0.02 / 6**0.5}
    for name, module in deviations.items():
        assert module.weight.std().item() == pytest.approx(expected[name], rel=0.05), name
    assert (layer.attn.q_proj.bias == 0).all() and (layer.ln_1.weight == 1).all()
