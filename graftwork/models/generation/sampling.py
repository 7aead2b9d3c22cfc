"""The choice of the next token: the likeliest one, or drawn by temperature and top-p."""

import secrets

import torch
from torch import Tensor

from graftwork import parallel
from graftwork.errors import ConfigError
from graftwork.parallel.collective import all_gather_objects


class Sampler:
    """Chooses tokens; each prompt draws from a random stream of its own, so its answer does not depend on the others.

    ``seed`` None draws one, the same on every rank. The default generator is left alone: sampling during training
    does not change the training. Raises ConfigError for a negative temperature or a top_p outside (0, 1].
    """

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        if not temperature >= 0:
            raise ConfigError(f"temperature is {temperature}, but it must be 0 (greedy) or positive.")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p is {top_p}, but it must be above 0 and at most 1 (1 = all tokens).")
        self.temperature, self.top_p = temperature, top_p
        self._seed = seed or 0
        self._streams: dict[int, torch.Generator] = {}
        if temperature > 0 and seed is None:
            self._seed = _common(secrets.randbits(32))

    def choose(self, logits: Tensor, prompts: list[int]) -> list[int]:
        """Return a token id per row of fp32 logits [b, vocab_size]; ``prompts`` are the rows' prompt numbers."""
        if self.temperature == 0:
            return _listed(logits.argmax(-1))
        probabilities, order = torch.softmax(logits.double() / self.temperature, -1).sort(-1, descending=True)
        below = probabilities.cumsum(-1) - probabilities
        kept = probabilities.masked_fill(below >= self.top_p, 0.0).cumsum(-1)
        drawn = torch.stack([torch.rand(1, generator=self._stream(p), dtype=torch.float64) for p in prompts])
        # A draw is below 1, so it falls on a token of positive weight.
        place = torch.searchsorted(kept, drawn.to(kept.device) * kept[:, -1:], right=True)
        return _listed(order.gather(1, place.clamp(max=kept.shape[1] - 1)).squeeze(1))

    def _stream(self, prompt: int) -> torch.Generator:
        if prompt not in self._streams:
            self._streams[prompt] = torch.Generator().manual_seed(self._seed * 1_000_003 + prompt)
        return self._streams[prompt]


def _listed(tokens: Tensor) -> list[int]:
    return [int(token) for token in tokens.tolist()]


def _common(value: int) -> int:
    """Return one rank's value on all ranks that hold parts of one model and one batch."""
    value = all_gather_objects(value, parallel.model_parallel_group())[0]
    return int(all_gather_objects(value, parallel.cp_group())[0])
