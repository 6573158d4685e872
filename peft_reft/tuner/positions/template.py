"""Finding the response template in tokens: where an answer begins, without labels.

A template of token ids is found as it stands. A template of text is found however the tokenizer cut it: the text
before and after it changes the tokens at its edges, so the search reads the bytes that the tokens stand for.

The search is the automaton of Knuth, Morris and Pratt (1977), which reads a byte at a time; its state is the number of
bytes of the template with which the bytes read so far end. A table, made once, has the state after each token of the
vocabulary for each state before it. The states in a batch are then compositions of rows of that table, computed on the
batch's own device without a loop over tokens.

Dimensions: B rows of the batch, S tokens of a row, V tokens of the vocabulary, M = L + 1 states of a search for a
template of L bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class IdTemplate:
    """A response template of token ids.

    Args:
        ids (`list[int]`): The ids, in order.
    """

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __str__(self) -> str:
        return str(self.ids)

    def matches(self, ids_BS: Tensor, start_BS: Tensor) -> Tensor:
        """Find the template. No match crosses a start.

        Args:
            ids_BS (`torch.LongTensor`): [B, S], token ids.
            start_BS (`torch.BoolTensor`): [B, S], the first token of each sequence.

        Returns:
            `torch.BoolTensor`: [B, S], the last token of each match.
        """
        found_BS = torch.ones_like(start_BS)
        for back, wanted in enumerate(reversed(self.ids)):
            found_BS &= _earlier(ids_BS == wanted, back)
            if back + 1 < len(self.ids):
                found_BS &= ~_earlier(start_BS, back)
        return found_BS


class TextTemplate:
    """A response template of text, for the tokens of one vocabulary.

    Args:
        text (`str`): The text.
        tokens (`list[bytes]`): The bytes that each token of the vocabulary stands for, by its id.
    """

    def __init__(self, text: str, tokens: list[bytes]) -> None:
        self.text = text
        state_VM, hit_VM = _search_table(text.encode(), tokens)
        self.state_VM = torch.from_numpy(state_VM)
        self.hit_VM = torch.from_numpy(hit_VM)

    def __str__(self) -> str:
        return repr(self.text)

    def occurs_in(self, ids: list[int]) -> bool:
        """Whether the template is found in the token ids of one sequence."""
        ids_1S = torch.tensor([ids], dtype=torch.long)
        return bool(ids) and bool(self.matches(ids_1S, torch.zeros_like(ids_1S, dtype=torch.bool)).any())

    def matches(self, ids_BS: Tensor, start_BS: Tensor) -> Tensor:
        """Find the template. No match crosses a start.

        Args:
            ids_BS (`torch.LongTensor`): [B, S], token ids. Ids outside the vocabulary, as of images, match nothing.
            start_BS (`torch.BoolTensor`): [B, S], the first token of each sequence.

        Returns:
            `torch.BoolTensor`: [B, S], the tokens in which a match ends.
        """
        if self.state_VM.device != ids_BS.device:
            self.state_VM, self.hit_VM = self.state_VM.to(ids_BS.device), self.hit_VM.to(ids_BS.device)
        known_BS = (ids_BS >= 0) & (ids_BS < self.state_VM.shape[0])
        row_BS = ids_BS.where(known_BS, 0)
        state_BSM = self.state_VM[row_BS].long()
        # After an id outside the vocabulary the state is 0; the first token of a sequence is read in state 0.
        state_BSM = state_BSM.where(known_BS[..., None], 0)
        state_BSM = state_BSM.where(~start_BS[..., None], state_BSM[..., :1])
        # After k rounds: the state after each token for each state before the 2^k tokens that end with it.
        span = 1
        while span < ids_BS.shape[1]:
            composed_BSM = state_BSM[:, span:].gather(2, state_BSM[:, :-span])
            state_BSM = torch.cat([state_BSM[:, :span], composed_BSM], dim=1)
            span *= 2
        before_BS = state_BSM[..., 0].roll(1, dims=1)
        before_BS = before_BS.masked_fill(start_BS, 0)
        before_BS[:, 0] = 0
        return self.hit_VM[row_BS].gather(2, before_BS[..., None])[..., 0] & known_BS


def _earlier(mask_BS: Tensor, back: int) -> Tensor:
    """For each token, the value of the token that is `back` columns before it. False where the row begins later."""
    if back == 0:
        return mask_BS
    earlier_BS = mask_BS.roll(back, dims=1)
    earlier_BS[:, :back] = False
    return earlier_BS


def _search_table(template: bytes, tokens: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The table of a search: the state after each token for each state before it, int16 [V, M], and whether a match
    ends in the token, bool [V, M]."""
    step = _automaton(template)
    state_VM = np.tile(np.arange(len(template) + 1, dtype=np.int16), (len(tokens), 1))
    hit_VM = np.zeros(state_VM.shape, dtype=bool)
    lengths = np.array([len(token) for token in tokens])
    order = np.argsort(-lengths, kind="stable")
    for position in range(lengths.max(initial=0)):
        longer = order[: int((lengths > position).sum())]
        byte = np.array([tokens[index][position] for index in longer])
        state_VM[longer] = step[state_VM[longer], byte[:, None]]
        hit_VM[longer] |= state_VM[longer] == len(template)
    return state_VM, hit_VM


def _automaton(template: bytes) -> np.ndarray:
    """The next state for each state and byte, int16 [M, 256]."""
    step = np.zeros((len(template) + 1, 256), dtype=np.int16)
    step[0, template[0]] = 1
    fallback = 0  # the state of a search that began one byte later
    for state in range(1, len(template) + 1):
        step[state] = step[fallback]
        if state < len(template):
            step[state, template[state]] = state + 1
            fallback = step[fallback, template[state]]
    return step
