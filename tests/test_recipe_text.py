"""The text that T5 learns from: spans, streams, and GLUE's files."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torchdata.stateful_dataloader import StatefulDataLoader

from support import corpus, glue, ranks
from support.spans import corrupt, lengths_for

END = 1
SENTINELS = torch.arange(100, 200)


@given(
    inputs=st.integers(8, 120),
    density=st.floats(0.05, 0.5),
    mean_span=st.floats(1.0, 6.0),
    seed=st.integers(0, 99),
)
def test_targets_put_back_into_the_inputs_are_the_text(
    inputs: int, density: float, mean_span: float, seed: int
) -> None:
    lengths = lengths_for(inputs, density, mean_span)
    text = torch.arange(1000, 1000 + lengths.text)
    generator = torch.Generator().manual_seed(seed)
    left, taken = corrupt(text, lengths, SENTINELS, END, generator)
    assert len(left) == lengths.inputs <= inputs
    assert len(taken) == lengths.targets
    spans: dict[int, list[int]] = {}
    for token in taken[:-1].tolist():
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    assert all(spans.values())
    assert list(spans) == SENTINELS[: lengths.spans].tolist()
    rebuilt = [piece for t in left[:-1].tolist() for piece in spans.get(t, [t])]
    assert rebuilt == text.tolist()
    assert left[-1] == taken[-1] == END


@given(inputs=st.integers(8, 600))
def test_texts_are_as_long_as_fits(inputs: int) -> None:
    lengths = lengths_for(inputs)
    assert inputs - 1 <= lengths.inputs <= inputs
    assert lengths.noise / lengths.text == pytest.approx(0.15, abs=0.6 / lengths.text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(f"word{i} and word{i * 7 % 50}" for i in range(400)))
    return corpus.train_tokenizer([path], 200)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files of JSON lines and one of plain text, whose documents are numbered."""
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"a{i} " * 8}) + "\n" for i in range(60))
    lines = (json.dumps({"text": f"b{i} " * 8}) for i in range(60))
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    lines = (f"c{i // corpus.PASSAGE}" for i in range(60 * corpus.PASSAGE))
    (tmp_path / "c.txt").write_text("\n".join(lines))
    (tmp_path / "notes.md").write_text("not text")
    return corpus.files_in(tmp_path)


def stream(texts: list[Path], tokenizer: Tokenizer, held_out: bool = False) -> Any:
    return corpus.CorruptedSpans(texts, tokenizer, lengths_for(24), seed=3, held_out=held_out)


def names(documents: Iterator[str]) -> list[str]:
    return [text.split()[0] for text in documents]


def test_training_and_held_out_documents_are_all_and_share_none(
    texts: list[Path], tokenizer: Tokenizer
) -> None:
    assert [path.name for path in texts] == ["a.json.gz", "b.jsonl", "c.txt"]
    seen = names(stream(texts, tokenizer)._documents(0, after=0))
    unseen = names(stream(texts, tokenizer, held_out=True)._documents(0, after=0))
    everything = {f"{name}{i}" for name in "abc" for i in range(60)}
    assert set(seen) | set(unseen) == everything
    assert len(seen) + len(unseen) == len(everything)
    assert len(unseen) == 9
    again = names(stream(texts, tokenizer)._documents(1, after=0))
    assert set(again) == set(seen)
    assert again != seen


def test_another_fold_holds_out_others(texts: list[Path], tokenizer: Tokenizer) -> None:
    def of(fold: int) -> set[str]:
        data = corpus.CorruptedSpans(
            texts, tokenizer, lengths_for(24), seed=3, held_out=True, fold=fold
        )
        return set(names(data._documents(0, after=0)))

    assert of(0) == set(names(stream(texts, tokenizer, held_out=True)._documents(0, after=0)))
    assert set().union(*map(of, range(20))) == {f"{n}{i}" for n in "abc" for i in range(60)}
    assert not of(0) & of(1)
    with pytest.raises(SystemExit, match="no fold 20: they go from 0 to 19"):
        of(20)


def test_ranks_read_parts_that_make_up_the_whole(
    texts: list[Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = names(stream(texts, tokenizer)._documents(0, after=0))
    parts: list[str] = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "place", lambda rank=rank: (rank, 3))
        parts += names(stream(texts, tokenizer)._documents(0, after=0))
    assert Counter(parts) == Counter(whole)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continues_where_its_checkpoint_was(
    texts: list[Path], tokenizer: Tokenizer, workers: int
) -> None:
    def loader() -> StatefulDataLoader:
        data = stream(texts, tokenizer)
        return StatefulDataLoader(data, 4, num_workers=workers, generator=torch.Generator())

    whole = [batch[0] for batch in islice(loader(), 60)]  # more than one pass
    first = loader()
    batches = iter(first)
    for _ in range(47):
        next(batches)
    second = loader()
    second.load_state_dict(first.state_dict())
    rest = [batch[0] for batch in islice(second, 13)]
    torch.testing.assert_close(rest, whole[47:], rtol=0, atol=0)


def test_held_out_texts_are_the_same_each_time(texts: list[Path], tokenizer: Tokenizer) -> None:
    data = stream(texts, tokenizer, held_out=True)
    first = [inputs for inputs, _ in islice(data, 2)]
    torch.testing.assert_close([inputs for inputs, _ in data][:2], first, rtol=0, atol=0)


def test_a_tokenizer_gives_back_the_text_and_has_t5s_tokens(tokenizer: Tokenizer) -> None:
    text = "word3 and word21"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = [tokenizer.token_to_id(token) for token in (corpus.PADDING, corpus.END)]
    assert ids == [0, 1]
    assert None not in [tokenizer.token_to_id(token) for token in corpus.SENTINELS]


def test_folders_without_text_and_too_many_readers_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"holds no \.txt, \.json or \.jsonl"):
        corpus.files_in(tmp_path)
    (tmp_path / "a.txt").write_text("a few words")
    monkeypatch.setattr(ranks, "place", lambda: (3, 4))
    with pytest.raises(SystemExit, match="too few documents for 4 readers"):
        next(iter(stream([tmp_path / "a.txt"], tokenizer)))


FILES = {
    "sst2": ("sentence\tlabel\ngood\t1\n", [("good", None, 1)]),
    "mrpc": (
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said "no.\tHe said no.\n',
        [('He said "no.', "He said no.", 1)],
    ),
    "qqp": (
        "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t0\n",
        [("a", "b", 0)],
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tgold_label\n"
        "0\tA\tB\tneutral\n1\tA\tC\t-\n2\tD\tE\tentailment\n",
        [("A", "B", 1), ("D", "E", 0)],
    ),
    "qnli": (
        '{"question": "q", "sentence": "s", "label": 1}\n'
        '{"question": "q", "sentence": "s", "label": -1}\n',
        [("q", "s", 1)],
    ),
}


@pytest.mark.parametrize("task", FILES)
def test_files_of_glue_are_read_as_they_are_distributed(task: str, tmp_path: Path) -> None:
    text, triples = FILES[task]
    tests = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
    for split in ("train", *tests):
        (tmp_path / f"{split}{'.jsonl' if task == 'qnli' else '.tsv'}").write_text(text)
    train, found = glue.load(task, tmp_path)
    assert [(e["text"], e.get("text_pair"), e["label"]) for e in train] == triples
    assert found == dict.fromkeys(tests, train)


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no train and dev or validation"):
        glue.load("sst2", tmp_path)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\ngood\t1\n")
    with pytest.raises(SystemExit, match=r"without sentence, among \['text', 'label'\]"):
        glue.load("sst2", tmp_path)
