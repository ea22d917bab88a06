"""Text to learn from: plain text, or JSON lines such as C4's, read as a stream of tokens."""

import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from support import ranks
from support.spans import Lengths, corrupt

EMBEDDED = Path(__file__).parents[1] / "data" / "shakespeare"
"""Plays of Shakespeare that come with the repository."""

PIECES = 2048  # of a tokenizer that runs share
PASSAGE = 20  # lines of plain text that are a document
HELD_OUT = 20  # one of so many documents is
END, PADDING, UNKNOWN = "</s>", "<pad>", "<unk>"
SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
START: dict[str, Any] = {"epoch": 0, "read": 0, "left": [], "drawn": 0}
OPEN: dict[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}


def files_in(folder: Path) -> list[Path]:
    """The text and JSON-lines files of a folder, compressed or not, or the file itself.

    Raises:
        SystemExit: there is none.
    """
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found = [path for path in paths if {".txt", ".json", ".jsonl"} & set(path.suffixes)]
    if not found:
        raise SystemExit(f"{folder} holds no .txt, .json or .jsonl, plain, .gz or .xz.")
    return found


def documents(path: Path) -> Iterator[str]:
    """The texts of one file: the entry "text" of each line of JSON, or passages of plain text."""
    with OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as lines:
        if ".txt" not in path.suffixes:
            for line in lines:
                yield json.loads(line)["text"]
            return
        passage: list[str] = []
        for line in lines:
            passage.append(line)
            if len(passage) == PASSAGE:
                yield "".join(passage)
                passage = []
        if passage:
            yield "".join(passage)


def train_tokenizer(files: list[Path], size: int) -> Tokenizer:
    """A tokenizer of word pieces by SentencePiece's unigram model, with T5's special tokens.

    Two of the same text may differ in a few pieces: give runs that are compared the same one.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [PADDING, END, UNKNOWN, *SENTINELS]
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator((text for path in files for text in documents(path)), trainer)
    return tokenizer


def tokenizer_in(folder: Path, data: Path | None) -> Path:
    """A tokenizer that runs share, as two trainings of one may differ in a few pieces."""
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(files_in(data or EMBEDDED), PIECES).save(str(path))
    return path


class CorruptedSpans(IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of corrupted texts, each rank and worker reads its own part.

    Files, and documents of plain text, are shuffled again in each pass; lines of JSON keep their
    order, as C4 is shuffled already. The state is where the stream stands: the pass, how many
    documents of it were read, and the tokens that were left over.

    Args:
        files: of text.
        tokenizer: with T5's special tokens.
        lengths: of texts, inputs and targets.
        seed: of the order and the spans.
        held_out: read one of 20 documents, once and without shuffling; otherwise all others.
        fold: which of 20, from 0.

    Raises:
        SystemExit: there is no such fold.
    """

    def __init__(
        self,
        files: list[Path],
        tokenizer: Tokenizer,
        lengths: Lengths,
        seed: int,
        held_out: bool = False,
        fold: int = 0,
    ) -> None:
        if fold not in range(HELD_OUT):
            raise SystemExit(f"There is no fold {fold}: they go from 0 to {HELD_OUT - 1}.")
        self.files, self.tokenizer, self.lengths = files, tokenizer, lengths
        self.seed, self.held_out, self.fold = seed, held_out, fold
        self.sentinels = torch.tensor([tokenizer.token_to_id(name) for name in SENTINELS])
        self.end: Any = tokenizer.token_to_id(END)
        self.state = dict(START)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there."""
        self.state = dict(state)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.held_out:
            self.state = dict(START)
        state, size = self.state, self.lengths.text
        while True:
            for text in self._documents(state["epoch"], after=state["read"]):
                state["read"] += 1
                state["left"] = state["left"] + self.tokenizer.encode(text).ids + [self.end]
                while len(state["left"]) >= size:
                    ids, state["left"] = state["left"][:size], state["left"][size:]
                    state["drawn"] += 1
                    yield self._corrupted(ids, state["drawn"])
            if self.held_out:
                return
            state["epoch"], state["read"] = state["epoch"] + 1, 0

    def _corrupted(self, ids: list[int], number: int) -> tuple[Tensor, Tensor]:
        part, _ = self._part()
        generator = torch.Generator().manual_seed(hash((self.seed, self.held_out, part, number)))
        text = torch.tensor(ids)
        return corrupt(text, self.lengths, self.sentinels, self.end, generator)

    def _part(self) -> tuple[int, int]:
        """Which part of the documents this worker of this rank reads, and of how many."""
        info, (rank, world) = get_worker_info(), ranks.place()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return rank * workers + worker, world * workers

    def _documents(self, epoch: int, after: int) -> Iterator[str]:
        """This worker's documents of one pass, but for the first ones."""
        part, parts = self._part()
        mine = (text for i, text in enumerate(self._pass(epoch)) if i % parts == part)
        number = -1
        for number, text in enumerate(mine):
            if number >= after:
                yield text
        if number < 0:
            raise SystemExit(f"The text has too few documents for {parts} readers.")

    def _pass(self, epoch: int) -> Iterator[str]:
        """All documents of one pass, without or with nothing but those held out."""
        order = random.Random(hash((self.seed, epoch)))
        for path in self.files if self.held_out else order.sample(self.files, len(self.files)):
            numbered = enumerate(documents(path))
            kept = (text for i, text in numbered if (i % HELD_OUT == self.fold) == self.held_out)
            if ".txt" in path.suffixes and not self.held_out:
                texts = list(kept)
                yield from order.sample(texts, len(texts))
            yield from kept
