"""Text as sequences of tokens: the standard library's own documentation, or the user's files."""

from __future__ import annotations

import ast
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from maskwright.errors import BadData, BadParameter

STANDARD_LIBRARY = "standard-library"
PAD, EOS, MASK = "<pad>", "<eos>", "<mask>"
SMALLEST_VOCABULARY = 256 + 3
"""Every byte and the three special tokens: below this not every text could be written."""

_HELD_OUT = 10
"""One document in ten, or the last tenth of a text that has few documents, is kept from training."""

_ORDER = 0x6F72646572
"""Added to the seed for the order of an epoch, which must not follow the moves of its sequences."""

_NO_PROSE = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
)


@attrs.frozen(eq=False, slots=False)
class TextSource:
    """Sequences of `length` tokens cut from one stream of ids; what `load_text` returns.

    `len(source)` is the number of sequences that do not overlap. `batch` is a pure function of (seed, epoch, index): where
    `jitter` is set, each epoch moves each sequence's start by its own pseudo-random amount below `length`.
    """

    ids: np.ndarray = attrs.field(repr=False)
    length: int
    codec: Any = attrs.field(repr=False)
    """A `tokenizers.Tokenizer` that has the special tokens."""
    name: str
    seed: int = 0
    jitter: bool = True
    rest: TextSource | None = attrs.field(default=None, repr=False)

    labelled = False
    columns = frozenset({"tokens"})

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def order(self, epoch: int) -> Tensor:
        """The sequences of an epoch in training order, int64 [len(source)]: a pure function of (seed, epoch)."""
        mixed = _hash(self.seed + _ORDER, epoch, np.arange(len(self)))
        return torch.from_numpy(np.argsort(mixed, kind="stable"))

    def batch(self, indices: Sequence[int] | Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """{"tokens": int64 [B, L]}. Indices outside [0, len) raise IndexError."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"{self.name} has sequences 0 to {len(self) - 1}, asked for {index.tolist()}.")
        start = index * self.length
        if self.jitter:
            moved = _hash(self.seed, epoch, index) % np.uint64(self.length)
            start = (start + moved.astype(np.int64)) % (len(self.ids) - self.length + 1)
        window = start[:, None] + np.arange(self.length)
        return {"tokens": torch.from_numpy(self.ids[window].astype(np.int64))}

    @property
    def held_out(self) -> TextSource:
        """Sequences of text that training never sees; itself where it is the held-out text."""
        return self.rest or self

    @cached_property
    def vocabulary(self) -> int:
        """V: ids are in [0, V), the special tokens included."""
        return max(self.codec.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def mask_token(self) -> int:
        """The id of `<mask>`."""
        return self._special(MASK)

    @property
    def eos_token(self) -> int:
        """The id of `<eos>`, which ends every document."""
        return self._special(EOS)

    @property
    def pad_token(self) -> int:
        """The id of `<pad>`."""
        return self._special(PAD)

    def _special(self, token: str) -> int:
        return int(self.codec.token_to_id(token))

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens written in it count as plain text."""
        return _encode(self.codec, [text])[0]

    def decode(self, ids: Sequence[int] | Tensor) -> Any:
        """The text of ids [L], or the list of texts of ids [B, L]; special tokens are written out."""
        rows: list[Any] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if rows and isinstance(rows[0], list):
            return [self.decode(row) for row in rows]
        return str(self.codec.decode(rows, skip_special_tokens=False))

    @cached_property
    def tokenizer(self) -> Any:
        """The same as a `PreTrainedTokenizerFast` of transformers."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.codec,
            pad_token=PAD,
            eos_token=EOS,
            mask_token=MASK,
            clean_up_tokenization_spaces=False,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads, into a model folder."""
        self.tokenizer.save_pretrained(os.fspath(folder))

    @property
    def summary(self) -> str:
        """One line for people."""
        held = f", {len(self.rest)} held out" if self.rest else ""
        return (
            f"{self.name}: {len(self.ids):,} tokens, {len(self)} sequences of {self.length}{held}, "
            f"vocabulary {self.vocabulary}"
        )


def load_text(
    source: str | os.PathLike[str] = STANDARD_LIBRARY,
    *,
    length: int,
    vocabulary: int = 1024,
    tokenizer: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> TextSource:
    """Sequences of `length` tokens from a text, with a tenth of it held out.

    `source` is "standard-library", a text file, a .jsonl file whose lines have a "text", or a folder with .txt and .md files.
    Without `tokenizer` (a tokenizer.json) a byte-level BPE of `vocabulary` ids is trained on the training part, always the
    same for the same text. Raises `BadData` for text that cannot be read or is too short, `BadParameter` for `vocabulary`.
    """
    if length < 1:
        raise BadParameter(f"length={length} must be at least 1 token.")
    if tokenizer is None and vocabulary < SMALLEST_VOCABULARY:
        raise BadParameter(
            f"vocabulary={vocabulary} must be at least {SMALLEST_VOCABULARY}: every byte and three special tokens."
        )
    own = os.fspath(source) != STANDARD_LIBRARY
    name = str(source)
    chosen = None if tokenizer is None else os.fspath(tokenizer)
    if own:
        codec, train, rest = _tokenized(tuple(_documents(Path(source))), name, vocabulary, chosen)
    else:
        codec, train, rest = _standard_library_tokens(vocabulary, chosen)
    if len(rest) < length:
        train, rest = train[: max(0, len(train) - length)], train[max(0, len(train) - length) :]
    if len(train) < length or len(rest) < length:
        raise BadData(
            f"{name} is too short: training and held-out text need one sequence of {length} tokens each, it has "
            f"{len(train) + len(rest)} tokens in all; give more text or a smaller length."
        )
    held = TextSource(rest, length, codec, f"{name} (held out)", seed, jitter=False)
    return TextSource(train, length, codec, name, seed, rest=held)


# -- tokens ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _standard_library_tokens(vocabulary: int, tokenizer: str | None) -> tuple[Any, np.ndarray, np.ndarray]:
    return _tokenized(standard_library_text(), STANDARD_LIBRARY, vocabulary, tokenizer)


def _tokenized(
    documents: tuple[str, ...], name: str, vocabulary: int, tokenizer: str | None
) -> tuple[Any, np.ndarray, np.ndarray]:
    """Tokenizer, training ids and held-out ids; each document ends with `<eos>`."""
    documents = tuple(dict.fromkeys(text for text in documents if text.strip()))
    if not documents:
        raise BadData(f"{name} is empty: there is no text in it.")
    train, rest = _split(documents)
    codec = _trained(train, vocabulary) if tokenizer is None else _read_tokenizer(Path(tokenizer))
    end = codec.token_to_id(EOS)

    def stream(texts: Sequence[str]) -> np.ndarray:
        pieces = [[*ids, end] for ids in _encode(codec, texts)]
        return np.fromiter((token for piece in pieces for token in piece), dtype=np.int32)

    return codec, stream(train), stream(rest)


def _split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every tenth document is held out; where there are fewer than twenty, the last tenth of each."""
    if len(documents) >= 2 * _HELD_OUT:
        held = documents[_HELD_OUT - 1 :: _HELD_OUT]
        return [text for i, text in enumerate(documents) if i % _HELD_OUT != _HELD_OUT - 1], list(held)
    cuts = [len(text) - len(text) // _HELD_OUT for text in documents]
    ends = [text[cut:] for text, cut in zip(documents, cuts)]
    return [text[:cut] for text, cut in zip(documents, cuts)], [text for text in ends if text]


def _trained(texts: Sequence[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    codec = Tokenizer(models.BPE())
    codec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    codec.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, MASK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    codec.train_from_iterator(texts, trainer)
    return codec


def _read_tokenizer(path: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer

    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise BadData(f"{path} does not exist; give a tokenizer.json.")
    try:
        codec = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise BadData(f"{path} is no tokenizer.json that `tokenizers` can read: {error}.") from None
    codec.no_padding()
    codec.no_truncation()
    codec.add_special_tokens(
        [AddedToken(token, special=True) for token in (PAD, EOS, MASK) if codec.token_to_id(token) is None]
    )
    return codec


def _encode(codec: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts in which `<mask>` and its like are plain text: a document about them must not hide its own tokens."""
    codec.encode_special_tokens = True
    try:
        return [encoded.ids for encoded in codec.encode_batch(list(texts), add_special_tokens=False)]
    finally:
        codec.encode_special_tokens = False


def _hash(seed: int, epoch: int, index: np.ndarray) -> np.ndarray:
    """64 mixed bits for each index (splitmix64), without a generator's state."""
    state: Any = np.uint64(seed % 2**64)
    with np.errstate(over="ignore"):
        for word in (np.uint64(epoch), index.astype(np.uint64)):
            state = (state + word + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


# -- texts -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def standard_library_text() -> tuple[str, ...]:
    """The language reference (`pydoc_data.topics`), then the docstrings of the public standard modules, in a fixed order.

    Read from the source files with `ast`: nothing is executed. Raises `BadData` where Python has no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = [*_literals(root / "pydoc_data" / "topics.py")]
    for name in sorted(sys.stdlib_module_names - _NO_PROSE):
        if not name.startswith("_"):
            for path in _source_files(root, name):
                texts.extend(_docstrings(path))
    if not texts:
        raise BadData(
            f"This Python has no source files in {root}; name a text file or a folder of them instead."
        )
    return tuple(dict.fromkeys(texts))


def _source_files(root: Path, name: str) -> list[Path]:
    single = root / f"{name}.py"
    if single.is_file():
        return [single]
    files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else []
    return [path for path in files if not _NO_PROSE & set(path.relative_to(root).parts)]


def _parsed(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _literals(path: Path) -> Iterator[str]:
    """The values of the dictionary that the module assigns, in its order."""
    tree = _parsed(path)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (str(text) for text in ast.literal_eval(node.value).values())


def _docstrings(path: Path) -> Iterator[str]:
    tree = _parsed(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text


def _documents(path: Path) -> Iterator[str]:
    """The user's texts, in sorted order of their paths."""
    if path.is_dir():
        inside = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in (".txt", ".md")
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not inside:
            raise BadData(f"{path} has no .txt or .md files; give a folder that has, or one text file.")
        for file in inside:
            yield _read(file)
    elif not path.exists():
        raise BadData(
            f'{path} does not exist; give "{STANDARD_LIBRARY}", a text file, a .jsonl file or a folder of .txt and .md files.'
        )
    elif path.suffix.lower() == ".jsonl":
        yield from _lines(path)
    else:
        yield _read(path)


def _lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode("utf-8")  # an escaped lone surrogate is valid JSON, but no text
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BadData(
                f'{path}, line {number}: expected a JSON object with a "text" that is a string.'
            ) from None
        yield text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadData(
            f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
            "convert the file to UTF-8 first."
        ) from None
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error.strerror}.") from None
