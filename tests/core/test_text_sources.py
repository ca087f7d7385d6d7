"""Text sources: deterministic windows, disjoint held-out text, and one clear sentence for each bad file."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from maskwright.errors import BadData, BadParameter
from maskwright.sources.text import load_text, standard_library_text

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def library():
    return load_text(length=32, seed=3)


def words(count, start=0):
    """Text without repetition, so that a window says where it came from."""
    return " ".join(f"{ALPHABET[i % 26]}{i}" for i in range(start, start + count))


def test_the_standard_library_gives_enough_text_without_any_file(library):
    assert len(library) > 5000
    assert library.columns == {"tokens"}
    assert not library.labelled
    assert library.vocabulary == 1024
    assert "held out" in library.summary


def test_batches_are_int64_windows_of_the_length(library):
    tokens = library.batch([0, 7, 9], epoch=2)["tokens"]
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 32)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < library.vocabulary


def test_a_sequence_depends_on_seed_epoch_and_index_alone(library):
    together = library.batch([4, 11, 8], epoch=5)["tokens"]
    alone = library.batch(torch.tensor([11]), epoch=5)["tokens"]
    assert torch.equal(together[1:2], alone)
    assert torch.equal(load_text(length=32, seed=3).batch([11], epoch=5)["tokens"], alone)
    assert not torch.equal(library.batch([11], epoch=6)["tokens"], alone)
    assert not torch.equal(load_text(length=32, seed=4).batch([11], epoch=5)["tokens"], alone)


def test_windows_move_by_every_amount_below_the_length(tmp_path):
    (tmp_path / "a.txt").write_text(words(3000))
    source = load_text(tmp_path / "a.txt", length=8, vocabulary=300)
    starts = set()
    for epoch in range(120):
        window = source.batch([5], epoch)["tokens"][0]
        match = [s for s in range(40, 48) if torch.equal(torch.tensor(source.ids[s : s + 8]).long(), window)]
        assert match
        starts.update(match)
    assert starts == set(range(40, 48))


def test_held_out_sequences_do_not_move_and_share_no_text_with_training(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(words(100, number * 100))
    source = load_text(tmp_path, length=16, vocabulary=300)
    held = source.held_out
    assert torch.equal(held.batch([0, 1], 0)["tokens"], held.batch([0, 1], 9)["tokens"])
    text, kept = source.decode(source.ids), held.decode(held.ids)
    assert words(100, 900) in kept
    assert words(100, 900) not in text
    assert words(100, 800) in text
    assert len(text) > 5 * len(kept)
    assert held.held_out is held


def test_one_file_gives_its_last_tenth_to_the_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text(words(1000))
    source = load_text(tmp_path / "a.txt", length=16, vocabulary=300)
    both = source.decode(source.ids) + source.held_out.decode(source.held_out.ids)
    assert both.replace("<eos>", "") == words(1000)
    assert words(1, 999) not in source.decode(source.ids)
    assert source.decode(source.held_out.ids).endswith(words(1, 999) + "<eos>")


def test_any_text_survives_encoding_and_decoding(library):
    text = "naïve – 漢字\n\ttabs, <mask> and <eos> as words 🙂"
    ids = library.encode(text)
    assert library.decode(ids) == text
    assert library.mask_token not in ids
    assert library.eos_token not in ids
    assert library.decode(torch.tensor([ids, ids])) == [text, text]


def test_a_document_about_masks_hides_none_of_its_own_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("the <mask> token " * 400)
    source = load_text(tmp_path / "a.txt", length=8, vocabulary=300)
    assert not (source.ids == source.mask_token).any()


def test_the_tokenizer_is_the_same_in_another_process():
    program = (
        "from maskwright.sources.text import load_text; import hashlib;"
        "print(hashlib.sha256(load_text(length=32).ids.tobytes()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == hashlib.sha256(load_text(length=32).ids.tobytes()).hexdigest()


def test_the_standard_library_is_read_without_importing_its_modules():
    program = (
        "import sys, sysconfig; sysconfig.get_path('stdlib');"
        "from maskwright.sources.text import standard_library_text as text; before = set(sys.modules);"
        "text(); new = set(sys.modules) - before; print(sorted(new & sys.stdlib_module_names))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert len(set(standard_library_text())) == len(standard_library_text())
    assert any("antigravity" not in text and "turtle" in text for text in standard_library_text())


def test_transformers_reads_the_saved_tokenizer(library, tmp_path):
    from transformers import AutoTokenizer

    library.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.mask_token_id == library.mask_token
    assert theirs("def f(x):")["input_ids"] == library.encode("def f(x):")


def test_a_saved_tokenizer_is_used_again_with_its_own_ids(library, tmp_path):
    library.save_pretrained(tmp_path)
    (tmp_path / "a.txt").write_text(words(600))
    again = load_text(tmp_path / "a.txt", length=16, tokenizer=tmp_path / "tokenizer.json")
    assert again.vocabulary == library.vocabulary
    assert again.mask_token == library.mask_token
    assert again.encode("class A") == library.encode("class A")


def test_a_tokenizer_without_special_tokens_gets_them(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("one two " * 200)
    source = load_text(tmp_path / "a.txt", length=8, tokenizer=tmp_path / "tokenizer.json")
    assert {source.pad_token, source.eos_token, source.mask_token} == {3, 4, 5}
    assert source.vocabulary == 6
    assert source.batch([0])["tokens"].max() < 3 + 2


def test_a_jsonl_file_gives_the_text_of_each_line(tmp_path):
    lines = [json.dumps({"text": words(50, 50 * i), "other": 1}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    source = load_text(tmp_path / "a.jsonl", length=8, vocabulary=300)
    assert words(50, 0) in source.decode(source.ids)


@pytest.mark.parametrize(
    "line", ['{"txt": "a"}', '{"text": 3}', "[1]", "{broken", '{"text": "\\ud800"}', "null"]
)
def test_a_wrong_jsonl_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(BadData, match=r"a\.jsonl, line 2: expected a JSON object with a \"text\""):
        load_text(tmp_path / "a.jsonl", length=8)


def test_a_file_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf" + bytes([0xE9]) + b" noir")
    with pytest.raises(BadData, match=r"latin\.txt is not UTF-8: byte 3 is 0xe9"):
        load_text(tmp_path, length=8)


@pytest.mark.parametrize(
    ("content", "message"), [("", "is empty"), (" \n\t", "is empty"), ("few words", "is too short")]
)
def test_too_little_text_says_so(tmp_path, content, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(BadData, match=message):
        load_text(tmp_path / "a.txt", length=64)


def test_missing_text_says_what_is_legal(tmp_path):
    with pytest.raises(BadData, match='does not exist; give "standard-library"'):
        load_text(tmp_path / "none.txt", length=8)
    with pytest.raises(BadData, match=r"has no \.txt or \.md files"):
        load_text(tmp_path, length=8)
    (tmp_path / "a.txt").write_text(words(500))
    with pytest.raises(BadData, match=r"tokenizer\.json does not exist"):
        load_text(tmp_path / "a.txt", length=8, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadData, match=r"is no tokenizer\.json that `tokenizers` can read"):
        load_text(tmp_path / "a.txt", length=8, tokenizer=tmp_path)


def test_a_vocabulary_that_cannot_spell_every_byte_is_refused():
    with pytest.raises(BadParameter, match="must be at least 259"):
        load_text(length=8, vocabulary=100)


def test_an_index_outside_the_source_is_refused(library):
    with pytest.raises(IndexError, match="has sequences 0 to"):
        library.batch([len(library)])


def test_hidden_files_are_not_read_and_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / ".secret.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + words(500).encode())
    source = load_text(tmp_path, length=8, vocabulary=300)
    assert source.decode(source.ids).startswith("a0 b1")
