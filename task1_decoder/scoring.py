"""Likelihoods and greedy text from one reading of each prompt: what the dev loss, 02, 04 and lm-eval share.

The keys and values of a prompt are computed once and serve the likelihood of the reference, every choice of
a multiple-choice question, and the generation. The tokens that all prompts start with are computed once per
call. The head, 49,152 wide, is applied only where an answer stands. On two CPU cores this is what makes 200
items and five benchmarks affordable; the numbers are those of a plain forward pass up to rounding
(tests/test_decoders.py, tests/test_harness.py).
"""

from __future__ import annotations

import copy
import inspect

import torch
from transformers import DynamicCache

from common import models

HEAD_CHUNK = 512  # answer tokens per application of the head: 512 x 49,152 float32 logits are 100 MB


@torch.inference_mode()
def score_answers(model, tokenizer, examples: list[dict], batch_size: int,
                  max_new_tokens: int = 0, sample: bool = False) -> list[dict]:
    """Scores of encoded examples (see task.Prompt.encode), in their order.

    Each is {"id", "nats", "tokens", "correct"}: the negative log-likelihood of the answer, its number of
    tokens, and how many of them are the most probable one; logits in float32. With `max_new_tokens` also a
    greedy continuation of the prompt, {"text", "stopped", "new_tokens"}: `stopped` says that the model
    ended it itself. With `sample` it is drawn from the model's probabilities instead.
    """
    stops = models.stop_ids(model, tokenizer, examples)
    prompts = [example["prompt"] for example in examples]
    columns = max(map(len, prompts)) + max(max_new_tokens, *(len(example["answer"]) for example in examples))
    shared = shared_prefix(prompts) if padding_is_ignored(model, columns) else 0
    reader = Reader(model, tokenizer.pad_token_id, prompts[0][:shared])
    # similar lengths together: little padding
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    items: list[dict] = [{}] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start:start + batch_size]
        reader.prefill([prompts[i] for i in batch])
        logprobs, matches = reader.logprobs(range(len(batch)), [examples[i]["answer"] for i in batch])
        for i, row, match in zip(batch, logprobs, matches):
            items[i] = {"id": examples[i]["id"], "nats": -sum(row), "tokens": len(row), "correct": sum(match)}
        if max_new_tokens:
            for i, new in zip(batch, reader.generate(max_new_tokens, stops, sample)):
                length = next((k for k, token in enumerate(new) if token in stops), None)
                text = tokenizer.decode(new[:length], skip_special_tokens=True).strip()
                items[i] |= {"text": text, "stopped": length is not None, "new_tokens": len(new[:length])}
    return items


def shared_prefix(sequences: list[list[int]]) -> int:
    """Number of leading tokens common to all sequences, at least one token short of the shortest."""
    first, last = min(sequences), max(sequences)
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return max(0, min(same, min(map(len, sequences)) - 1))


def padding_is_ignored(model, columns: int) -> bool:
    """Whether padding may stand between the shared tokens and the rest of a prompt of `columns` tokens.

    A sliding window shorter than that would count it, and so does a model that takes no positions (MPT).
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    arguments = inspect.signature(models.causal_of(model).get_decoder().forward).parameters
    return "position_ids" in arguments and not (window and window < columns)


class Reader:
    """Runs a causal model over batches of prompts, whose `shared` leading tokens it computes only once."""

    def __init__(self, model, pad_token_id: int, shared=()):
        self.model, self.pad, self.shared, self.device = model, pad_token_id, list(shared), model.device
        self.decoder = models.causal_of(model).get_decoder()
        # A cache made without the model's config keeps every key, also those that a sliding window has
        # passed. Only such a cache can be rewound, and the attention mask still hides them.
        self.prefix = DynamicCache()
        if shared:
            ids = torch.tensor([shared], device=self.device)
            self.decoder(input_ids=ids, past_key_values=self.prefix, use_cache=True)

    def prefill(self, prompts: list[list[int]]):
        """Compute the cache of some prompts, left-padded, from which logprobs() and generate() continue.

        Keeps ids and mask (rows, columns), the cache, and the last hidden state (rows, hidden).
        """
        rows, skip = [prompt[len(self.shared):] for prompt in prompts], len(self.shared)
        width = max(map(len, rows))
        ids = [self.shared + [self.pad] * (width - len(row)) + row for row in rows]
        mask = [[1] * skip + [0] * (width - len(row)) + [1] * len(row) for row in rows]
        self.ids, self.mask = (torch.tensor(part, device=self.device) for part in (ids, mask))
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        cache = copy.deepcopy(self.prefix)
        if skip:
            cache.batch_repeat_interleave(len(rows))
        output = self.decoder(input_ids=self.ids[:, skip:], attention_mask=self.mask, use_cache=True,
                              position_ids=positions[:, skip:], past_key_values=cache)
        self.cache, self.last = output.past_key_values, output.last_hidden_state[:, -1]

    def logprobs(self, owners, continuations: list[list[int]]):
        """Log-probability and greedy match of every token of continuation i after prompt `owners[i]`.

        Returns two lists of lists. The cache grows by the continuations; generate() drops them again.
        """
        owner, longest = torch.tensor(owners, device=self.device), max(map(len, continuations))
        sizes = [len(continuation) for continuation in continuations]
        padded = torch.tensor([continuation + [self.pad] * (longest - len(continuation))
                               for continuation in continuations], device=self.device)
        real = torch.tensor([[1] * n + [0] * (longest - n) for n in sizes], device=self.device)
        hidden = self.last[owner][:, None]
        if longest > 1:
            if list(owners) != list(range(len(self.last))):
                self.cache.batch_select_indices(owner)
            mask = torch.cat([self.mask[owner], real[:, :-1]], 1)
            positions = self.mask[owner].sum(1, keepdim=True) + torch.arange(longest - 1, device=self.device)
            output = self.decoder(input_ids=padded[:, :-1], attention_mask=mask, position_ids=positions,
                                  past_key_values=self.cache, use_cache=True)
            hidden = torch.cat([hidden, output.last_hidden_state], 1)
        hidden, labels = hidden[real.bool()], padded[real.bool()]
        logprobs, greedy_match = [], []
        for states, label in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK)):
            logits = models.logits_of(self.model, states)
            logprobs.append(logits.gather(1, label[:, None])[:, 0] - logits.logsumexp(1))
            greedy_match.append(logits.argmax(1) == label)
        return [[part.tolist() for part in torch.cat(chunks).split(sizes)]
                for chunks in (logprobs, greedy_match)]

    def generate(self, max_new_tokens: int, stops: list[int], sample: bool = False) -> list[list[int]]:
        """Greedy (or sampled) continuation of each prompt of the last prefill(), up to and with the first of
        `stops`."""
        columns = self.ids.shape[1]
        # drops the continuations; the last prompt token is computed again
        self.cache.crop(columns - 1 - self.cache.get_seq_length())
        with models.greedy(self.model, self.pad, stops):
            ids = self.model.generate(input_ids=self.ids, attention_mask=self.mask, do_sample=sample,
                                      past_key_values=self.cache, max_new_tokens=max_new_tokens,
                                      **{"top_k": 0} if sample else {})
        return ids[:, columns:].tolist()
