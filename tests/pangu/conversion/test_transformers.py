"""A directory that we write, loaded by transformers with the code that travels with it: the same model, and nothing silently another."""

from __future__ import annotations

import copy
import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden import golden_batch, golden_model
from helpers.small_model import VOCAB, WINDOW, NumberTokenizer, small_model, write_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ext.sharding import canonical_parameters
from pangu.conversion import huggingface
from pangu.conversion.weights import Overrides, Weights, WriteOptions
from pangu.inference.generation import TextGenerator
from pangu.model.model import PanguModel
from pangu.tensor_files.lazy_tensor import LazyTensor

transformers = pytest.importorskip("transformers")

IMPLEMENTATIONS = ["sdpa", "eager"]
TOLERANCE = 5e-5


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers offline, its copies of our modules in a temporary directory, and this project out of their reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", [*sys.path])
        for name in ("pangu", "megatron_ext"):  # `import pangu` fails from here on
            patch.setitem(sys.modules, name, None)
        yield


def export(path: Path, model: PanguModel, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None) -> Path:
    tensors = {
        spec.name: LazyTensor(spec.shape, torch.float32, lambda parameter=parameter: parameter.detach())
        for spec, parameter in canonical_parameters(model)
    }
    huggingface.write(Weights(model.config, tensors, "a test", tokenizer=tokenizer), path, WriteOptions(dtype))
    return path


def load(path: Path, implementation: str = "sdpa", **arguments: Any) -> Any:
    arguments = {"trust_remote_code": True, "attn_implementation": implementation, **arguments}
    return transformers.AutoModelForCausalLM.from_pretrained(path, **arguments).eval()


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's tiny model, in a directory with a dot in its name, as a size has."""
    return export(tmp_path_factory.mktemp("golden") / "golden-0.2M", golden_model(shared), tokenizer=shared / "tokenizer" / "vocab.model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose next token depends on every parameter."""
    return export(tmp_path_factory.mktemp("small") / "small", small_model())


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request: pytest.FixtureRequest, small: Path) -> Any:
    return load(small, request.param)


def tokens_of(seed: int, *shape: int) -> Tensor:
    """Ids without separator and padding."""
    return torch.randint(10, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


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


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(huggingface.REMOTE_CODE / "configuration_pangu.py"))
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")  # it replaces its own module while it loads a model
    with pytest.raises(ImportError, match=r"transformers 5\.3\.0 found, 5\.4 or newer expected"):
        runpy.run_path(str(huggingface.REMOTE_CODE / "configuration_pangu.py"))


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


# --- what others compute in silence ------------------------------------------------------------------------------------------------------


def test_a_full_mask_means_the_same_under_both_attentions(model: Any) -> None:
    """True is visible: eager attention would add it to the scores as 1."""
    tokens = tokens_of(10, 1, 12)
    position_ids = torch.tensor([[*range(5), *range(7)]])
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = ((document.unsqueeze(1) == document) & torch.ones(12, 12, dtype=torch.bool).tril())[None, None]
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(tokens, position_ids=position_ids).logits
        for given in (mask, numbers, numbers.double()):
            found = model(tokens, position_ids=position_ids, attention_mask=given).logits
            assert (found - expected).abs().max() < TOLERANCE


SQUARE = torch.ones(1, 1, 6, 6).tril()
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a full mask of 0 and 1": ({"attention_mask": SQUARE, "position_ids": torch.arange(6).unsqueeze(0)}, "numbers above 0"),
    "a full mask of integers": ({"attention_mask": SQUARE.long(), "position_ids": torch.arange(6).unsqueeze(0)}, "expected bool"),
    "a full mask without positions": ({"attention_mask": SQUARE.bool()}, "Give position_ids too"),
    "a mask of three dimensions": ({"attention_mask": SQUARE[0]}, r"shape \[1, 6, 6\], expected \[1, 6\]"),
    "a mask of another length": ({"attention_mask": torch.ones(1, 5)}, r"shape \[1, 5\], expected \[1, 6\]"),
    "a position past the window": (
        {"position_ids": torch.arange(6).unsqueeze(0) + WINDOW - 5},
        rf"from 19 to {WINDOW}, .* 0 to {WINDOW - 1}",
    ),
    "a position below 0": ({"position_ids": torch.arange(6).unsqueeze(0) - 1}, "from -1 to 4"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(1, 6, 32)}, "either input_ids or inputs_embeds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused(what: str, model: Any) -> None:
    arguments, told = REFUSED[what]
    with pytest.raises(ValueError, match=told):
        model(tokens_of(1, 1, 6), **arguments)


def test_a_mask_that_forgets_the_cache_is_refused(model: Any) -> None:
    cache = model(tokens_of(1, 1, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \[1, 2\], expected \[1, 8\]"):
        model(tokens_of(2, 1, 2), past_key_values=cache, attention_mask=torch.ones(1, 2))


def test_generating_past_the_window_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt and max_new_tokens share the window"):
        model.generate(tokens_of(1, 1, 20), attention_mask=torch.ones(1, 20), max_new_tokens=10, eos_token_id=None)
    model.generate(tokens_of(1, 1, 20), attention_mask=torch.ones(1, 20), max_new_tokens=5, eos_token_id=None)


def test_attention_weights_are_not_promised_by_sdpa(small: Path) -> None:
    with pytest.raises(ValueError, match="only eager attention"):
        load(small)(tokens_of(1, 1, 4), output_attentions=True)


def test_checkpointing_does_not_drop_a_cache(model: Any) -> None:
    cache = model(tokens_of(1, 1, 6)).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens_of(2, 1, 2), past_key_values=cache)


def changed(small: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """A copy of the small model in one file with other tensors."""
    path = tmp_path / "changed"
    shutil.copytree(small, path)
    (path / huggingface.INDEX).unlink()
    [file] = path.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    change(tensors)
    save_file(tensors, path / huggingface.SINGLE, metadata={"format": "pt"})
    values = json.loads((path / huggingface.CONFIG).read_text())
    (path / huggingface.CONFIG).write_text(json.dumps({**values, **config}))
    return path


WTE, WQE, HEAD = "transformer.wte.weight", "transformer.wqe.weight", "lm_head.weight"


@pytest.mark.parametrize("missing", [WQE, WTE, "transformer.h.2.mlp.c_fc.bias"])
def test_weights_that_lack_a_tensor_are_refused(missing: str, small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.pop(missing))
    with pytest.raises(ValueError, match=f"lack {missing}"):
        load(path)
    with pytest.raises(ValueError, match=f"lack {missing.removeprefix('transformer.')}"):
        transformers.AutoModel.from_pretrained(path, trust_remote_code=True)


def test_another_output_layer_is_refused(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.update({HEAD: tensors[WTE] + 1e-3}))
    with pytest.raises(ValueError, match=r"lm_head\.weight that differs"):
        load(path)


def test_an_output_layer_trained_apart_can_be_asked_for(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path, lambda tensors: tensors.update({HEAD: -tensors[WTE]}), tie_word_embeddings=False)
    tokens = tokens_of(1, 1, 6)
    assert torch.allclose(load(path)(tokens).logits, -load(small)(tokens).logits)


def test_a_stored_copy_of_the_word_embedding_is_tied(small: Path, tmp_path: Path) -> None:
    buffers = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    model = load(changed(small, tmp_path, lambda tensors: tensors.update({HEAD: tensors[WTE].clone(), **buffers})))
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"final_norm": "nowhere"}, "final_norm = 'nowhere'"),
        ({"num_heads": 5}, "num_heads = 5"),
        ({"num_layers": 1}, "num_layers = 1"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(change: dict[str, Any], told: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load(changed(small, tmp_path, lambda tensors: None, **change))


# --- the tokenizer -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(golden: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(golden, trust_remote_code=True)


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "tokenizer" / "golden.json").read_text("utf-8"))


def test_every_golden_text_has_the_published_ids(tokenizer: Any, published: dict[str, Any]) -> None:
    assert len(published["encode_cases"]) > 100
    for case in published["encode_cases"]:
        assert tokenizer(case["text"]).input_ids == case["ids"], case["text"]
        assert tokenizer.tokenize(case["text"]) == case["pieces"] or 0 in case["ids"]  # an unknown piece keeps its text
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_every_golden_id_sequence_has_the_published_text(tokenizer: Any, published: dict[str, Any]) -> None:
    for case in published["decode_cases"]:
        if "error" in case:
            with pytest.raises(IndexError):
                tokenizer.decode(case["ids"])
        else:
            assert tokenizer.decode(case["ids"]) == case["decoded"], case["ids"]


def test_the_tokenizer_knows_its_model(tokenizer: Any, golden: Path) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 40000 and tokenizer.model_max_length == 32
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 6, 9, 9)
    config = transformers.AutoConfig.from_pretrained(golden, trust_remote_code=True)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (6, 9, 9)
    batch = tokenizer(["四川的省会是?", "你好"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[3826, 11, 21652, 16, 28], [6, 6, 6, 6, 5772]]
    assert batch.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 0, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_text_ends_no_document_unless_it_may(tokenizer: Any, golden: Path) -> None:
    assert 9 not in tokenizer("你好<eot>").input_ids
    assert tokenizer("你好<eot>", split_special_tokens=False).input_ids[-1] == 9
    opened = transformers.AutoTokenizer.from_pretrained(golden, trust_remote_code=True, split_special_tokens=False)
    opened.add_tokens(["<我的>"])
    ids = opened("你好<eot><我的>你好").input_ids
    assert ids == [*tokenizer("你好").input_ids, 9, 40000, *tokenizer("你好").input_ids]
    assert opened.decode(ids) == "你好<eot><我的>你好"
    assert opened.decode(ids, skip_special_tokens=True) == "你好<我的>你好"


def test_the_tokenizer_travels(tokenizer: Any, tmp_path: Path) -> None:
    text = "今天是一个好天气\n  1 2"
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other(text).input_ids == tokenizer(text).input_ids and len(other) == 40000
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again(text).input_ids == tokenizer(text).input_ids and again.padding_side == "left"
    assert again("<eot>").input_ids == tokenizer("<eot>").input_ids
    assert (tmp_path / "vocab.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()


def test_weights_without_a_tokenizer_say_so(small: Path) -> None:
    with pytest.raises(ValueError, match=r"Copy PanGu-α's vocab\.model"):
        transformers.AutoTokenizer.from_pretrained(small, trust_remote_code=True)
