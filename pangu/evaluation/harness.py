"""PanGu-α as a model of EleutherAI's lm-evaluation-harness (`pip install 'pangu-alpha-pytorch[eval]'`, tested with 0.4.13).

    import lm_eval
    from pangu.evaluation.harness import PanguLM

    lm_eval.simple_evaluate(model=PanguLM.from_directory("runs/quickstart/weights"), tasks=["ceval-valid"])

Started by torchrun, the model is split over the processes, and each of them must make the same call.

The harness puts `target_delimiter` between question and answer, a space by default, which PanGu-α's tokenizer turns into two tokens: set
it to "" in Chinese tasks. Context and continuation are encoded separately (pangu.evaluation.scoring says why).
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'pangu-alpha-pytorch[eval]'") from error

from pangu.evaluation.answering import PROMPTS_A_BATCH
from pangu.evaluation.prompts import most_that_fits
from pangu.evaluation.scoring import Scorer
from pangu.inference.generation import TextGenerator

DEFAULT_NEW_TOKENS = 256  # what the harness' own models generate where a task says nothing


class PanguLM(LM):
    """An lm-evaluation-harness model: answers its three kinds of requests.

    Args:
        generator: a model and its tokenizer.
    """

    def __init__(self, generator: TextGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.scorer = Scorer(generator.model, generator.tokenizer)

    @classmethod
    def from_directory(cls, path: Path | str) -> PanguLM:
        """Load a model from a directory of weights; see `TextGenerator.from_directory`."""
        return cls(TextGenerator.from_directory(path))

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness' caches distinguish models."""
        return f"pangu-{self.generator.tokenizer.sha256[:12]}"

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-likelihood of the continuation in nats, and whether greedy decoding would generate it."""
        scores = self.scorer.score([self.scorer.span(*request.args) for request in requests])
        answers = [(score.log_likelihood, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """For each (text,): log-likelihood of the whole text as a document of its own, in nats, for any length."""
        scores = self.scorer.score([self.scorer.span("", request.args[0]) for request in requests])
        answers = [score.log_likelihood for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        """For each (context, settings): a continuation of the context, up to the first of the texts in `until` or the end of the document.

        Greedy unless `do_sample`; then `temperature`, `top_k` and `top_p` are used. The beginning of a context that is too long is dropped.
        """
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts = [""] * len(requests)
        for key, indices in alike.items():
            settings = json.loads(key)
            indices.sort(key=lambda index: len(requests[index].args[0]))
            for begin in range(0, len(indices), PROMPTS_A_BATCH):
                batch = indices[begin : begin + PROMPTS_A_BATCH]
                for index, text in zip(batch, self._generate([requests[index].args[0] for index in batch], settings), strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        tokenizer, config = self.generator.tokenizer, self.generator.model.config
        new_tokens = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), config.max_positions // 2)
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        sampled = settings.get("do_sample", False)
        generations = self.generator.generate(
            [self._end(context, config.max_positions - new_tokens) for context in contexts],
            max_new_tokens=new_tokens,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(settings.get("top_k", 0)) if sampled else 0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
            stop_ids={config.separator_id, *(tokenizer.encode("\n")[-1:] if "\n" in until else ())},
        )
        # As the task writes them, and as the tokenizer gives them back (：becomes :).
        stops = {stop for text in until for stop in (text, tokenizer.decode(tokenizer.encode(text))) if stop}
        return [
            generation.text[: min((at for stop in stops if (at := generation.text.find(stop)) >= 0), default=None)]
            for generation in generations
        ]

    def _end(self, text: str, budget: int) -> str:
        """The text, or the longest end of it that fits into `budget` tokens."""
        encode = self.generator.tokenizer.encode
        if len(encode(text)) <= budget:
            return text
        return text[len(text) - most_that_fits(len(text), lambda length: len(encode(text[len(text) - length :])) <= budget) :]
