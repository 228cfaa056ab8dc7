"""hetmoe as a model of lm-eval. Importing this module needs lm-eval (the extra `eval`).

Coarse ADCs make answers equally likely, and lm-eval then takes the first of the best (`argmax`): with choices in a
fixed order, as mmlu's "A" to "D", ties favour "A". hetmoe's own next-word questions share the credit instead; here
lm-eval's rule stays, so that numbers compare with published ones, and ties are counted (`harness.count_ties`).
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

from hetmoe.errors import InputError
from hetmoe.evaluate.tasks.batching import Request
from hetmoe.evaluate.tasks.score import Chip, score_requests
from hetmoe.models.model import Model

# What lm-eval hands over for one request: (context, continuation) as text, and the token ids of each.
Encoded = tuple[tuple[str, str], list[int], list[int]]
TOKENS_PER_BATCH = 4096


class HetMoELM(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A model on a chip (default: digital) for `lm_eval.simple_evaluate(model=HetMoELM(model), ...)`."""

    def __init__(self, model: Model, chip: Chip | None = None, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        """A model of lm-eval.

        Args:
            model: a loaded model.
            chip: where it runs.
            tokens_per_batch: tokens run at once, padding included.

        Raises:
            InputError: for a model without a tokenizer.
        """
        super().__init__()
        if model.tokenizer is None:
            raise InputError(f"model {model.name!r} has no tokenizer.json, so text cannot be read for it")
        self._model, self._text_to_ids = model, model.tokenizer
        self._chip = Chip() if chip is None else chip
        self._tokens_per_batch = tokens_per_batch

    @property
    def eot_token_id(self) -> int:
        """What ends a text, or else what starts one."""
        return self.prefix_token_id if self._model.eos_token_id is None else self._model.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in for an empty context."""
        start = self._model.start_token_id
        if start is None:
            raise InputError(f"model {self._model.name!r} has no start token, which an empty context needs")
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, never with special tokens around them: context and continuation are cut from one encoding."""
        del add_special_tokens, kwargs
        ids = self._text_to_ids.encode(string, add_special_tokens=False).ids
        vocabulary = self._model.config.vocab_size
        if ids and max(ids) >= vocabulary:
            raise InputError(f"token id {max(ids)} is outside the model's vocabulary of {vocabulary}")
        return ids

    def _loglikelihood_tokens(self, requests: list[Encoded], **kwargs: Any) -> list[Any]:
        del kwargs
        asked = [Request(context=context, continuation=continuation) for _, context, continuation in requests]
        return [tuple(score) for score in score_requests(self._model, asked, self._chip, self._tokens_per_batch)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's positions that begin with one token of context."""
        del disable_tqdm
        totals: list[float] = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.config.max_position_embeddings,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            scores = self._loglikelihood_tokens([(("", ""), context, asked) for context, asked in pairs])
            totals.append(sum(log_prob for log_prob, _ in scores))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: hetmoe scores given answers."""
        del requests, disable_tqdm
        raise NotImplementedError(
            "hetmoe does not generate text for lm-eval: choose tasks that score given answers (multiple choice)"
        )


class Encoder(HetMoELM):
    """lm-eval's way from text to token ids alone: `loglikelihood` returns the encoded requests instead of scores."""

    def _loglikelihood_tokens(self, requests: list[Encoded], **kwargs: Any) -> list[Any]:
        del kwargs
        return requests
