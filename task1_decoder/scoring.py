"""Log-likelihoods and greedy text from one reading of each prompt: what nll(), generate() and the lm-eval harness share.

A prompt's keys and values are computed once and serve the reference's likelihood, every choice of a multiple-choice question and
the generation; the tokens that all prompts start with are computed once per call; the head, 49,152 wide, is applied only where a
label stands. On two CPU cores this is what makes 200 items and five benchmarks affordable; the numbers are those of a
plain forward pass up to rounding (tests/test_task1.py, tests/test_harness.py).
"""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache

from common import models

HEAD_CHUNK = 512  # label positions per application of the head: 512 x 49,152 float32 logits are 100 MB


def shared_prefix(sequences: list[list[int]]) -> int:
    """Number of leading tokens common to all sequences, at least one token short of the shortest."""
    first, last = min(sequences), max(sequences)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return max(0, min(same, min(map(len, sequences)) - 1))


class Reader:
    """Reads batches of prompts with a causal model; `shared` leading tokens (given to the constructor) are read only once."""

    def __init__(self, model, pad_token_id: int, shared=()):
        self.model, self.pad, self.shared, self.device = model, pad_token_id, list(shared), model.device
        self.decoder = models.causal_of(model).get_decoder()
        # a cache made without the model's config keeps every key, also those that a sliding window has passed: only such a cache
        # can be rewound, and the attention mask still hides them
        self.prefix = DynamicCache()
        if shared:
            self.decoder(input_ids=torch.tensor([shared], device=self.device), past_key_values=self.prefix, use_cache=True)

    def read(self, prompts: list[list[int]]):
        """Read prompts, left-padded, and keep what logprobs() and generate() continue from: ids and mask (rows, columns), cache, and
        the last hidden state (rows, hidden)."""
        rows, skip = [p[len(self.shared):] for p in prompts], len(self.shared)
        width = max(map(len, rows))
        self.ids = torch.tensor([self.shared + [self.pad] * (width - len(r)) + r for r in rows], device=self.device)
        self.mask = torch.tensor([[1] * skip + [0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        cache = copy.deepcopy(self.prefix)
        if skip:
            cache.batch_repeat_interleave(len(rows))
        read = self.decoder(input_ids=self.ids[:, skip:], attention_mask=self.mask, position_ids=positions[:, skip:],
                            past_key_values=cache, use_cache=True)
        self.cache, self.last = read.past_key_values, read.last_hidden_state[:, -1]

    def logprobs(self, owners: list[int], continuations: list[list[int]]):
        """Log-probability and greedy hit of every token of continuation i after prompt `owners[i]` of the last read().

        Returns two lists of lists. The cache grows by the continuations; generate() drops them again.
        """
        owner, longest = torch.tensor(owners, device=self.device), max(map(len, continuations))
        padded = torch.tensor([c + [self.pad] * (longest - len(c)) for c in continuations], device=self.device)
        real = torch.tensor([[1] * len(c) + [0] * (longest - len(c)) for c in continuations], device=self.device)
        hidden = self.last[owner][:, None]
        if longest > 1:
            if owners != list(range(len(self.last))):
                self.cache.batch_select_indices(owner)
            start = self.mask[owner].sum(1, keepdim=True)
            more = self.decoder(input_ids=padded[:, :-1], attention_mask=torch.cat([self.mask[owner], real[:, :-1]], 1),
                                position_ids=start + torch.arange(longest - 1, device=self.device), past_key_values=self.cache,
                                use_cache=True)
            hidden = torch.cat([hidden, more.last_hidden_state], 1)
        hidden, labels = hidden[real.bool()], padded[real.bool()]
        logprobs, hits = [], []
        for h, label in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK)):
            logits = models.logits_of(self.model, h)
            logprobs += (logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1)).tolist()
            hits += (logits.argmax(1) == label).tolist()
        sizes, flat = [len(c) for c in continuations], iter(zip(logprobs, hits))
        pairs = [[next(flat) for _ in range(size)] for size in sizes]
        return [[p for p, _ in row] for row in pairs], [[h for _, h in row] for row in pairs]

    def generate(self, max_new_tokens: int, stops: list[int]) -> list[list[int]]:
        """Greedy continuation of each prompt of the last read(), up to and with the first of `stops`."""
        columns = self.ids.shape[1]
        self.cache.crop(columns - 1 - self.cache.get_seq_length())  # drops the continuations; the last prompt token is read again
        with models.greedy(self.model, self.pad, stops):
            ids = self.model.generate(input_ids=self.ids, attention_mask=self.mask, past_key_values=self.cache, do_sample=False,
                                      max_new_tokens=max_new_tokens)
        return ids[:, columns:].tolist()
