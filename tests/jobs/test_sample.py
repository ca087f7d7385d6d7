"""The sample job: masked and causal models, their own tokenizers, every sampler of tokens, and what cannot be sampled."""

import json
from collections.abc import Callable

import attrs
import pytest
import torch

from maskwright.backbones.defaults import causal_language_model, masked_language_model
from maskwright.errors import BadModel, BadParameter, UsageError
from maskwright.jobs import execute, pretrain
from maskwright.jobs import sample as job
from maskwright.jobs.settings import resolve
from maskwright.registry import Registry
from maskwright.sources.text import load_text

TINY = {"width": 16, "depth": 1, "heads": 2}
WORDS = "the cat sat on the mat and the dog ran to the door of the house, naïve café; "


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 60, encoding="utf-8")
    return load_text(path, length=24, vocabulary=300)


@pytest.fixture(scope="module")
def masked(source, tmp_path_factory):
    """A model folder of a BERT that knows nothing, with its tokenizer and its mask token."""
    folder = tmp_path_factory.mktemp("models") / "masked"
    model = masked_language_model(
        vocabulary=source.vocabulary, length=24, mask_token=source.mask_token, **TINY
    )
    model.save_pretrained(folder)
    source.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def causal(source, tmp_path_factory):
    """A Llama whose tokenizer has no mask token."""
    folder = tmp_path_factory.mktemp("models") / "causal"
    causal_language_model(
        vocabulary=source.vocabulary, length=24, eos_token=source.eos_token, **TINY
    ).save_pretrained(folder)
    source.save_pretrained(folder)
    forget(folder, "mask_token")
    return folder


def forget(folder, *names):
    """Take special tokens out of a folder's tokenizer."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in (*names, "added_tokens_decoder")}
    path.write_text(json.dumps(kept))


def run(folder, registry=None, resume=False, **changes):
    given = {"request.count": 3, "request.length": 12}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    settings = resolve("sample", None, given, registry=registry)
    return execute(settings, folder=folder, registry=registry, resume=resume, quiet=True)


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").splitlines()]


# -- what it leaves --------------------------------------------------------------------------------------------


def test_it_leaves_texts_their_pieces_and_the_order_of_their_reveal(masked, tmp_path):
    result = run(tmp_path / "run", model__source=str(masked))
    lines = samples(result.folder)
    assert len(lines) == 3
    for line in lines:
        assert "".join(line["tokens"]) == line["text"]
        assert sorted(line["order"]) == list(range(12))
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["sampler"] == "first-hitting"
    assert (summary["samples"], summary["length"], summary["prompt_tokens"]) == (3, 12, 0)
    assert summary["evaluations"] == 12
    assert summary["categorical_draws"] == 36
    report = (result.folder / "report.html").read_text("utf-8")
    assert report.count('title="event 0"') == 3
    assert "network calls" in report
    assert "categorical draws" in report


@pytest.mark.parametrize(
    ("sampler", "evaluations", "draws"),
    [
        ({"sampler.name": "first-hitting", "request.steps": 4}, 4, 36),
        ({"sampler.name": "greedy"}, 12, None),
        ({"sampler.name": "greedy", "sampler.order": "left-to-right"}, 12, None),
        ({"sampler.name": "top-p"}, 12, 36),
    ],
    ids=["first-hitting", "greedy", "left-to-right", "top-p"],
)
def test_every_sampler_runs_on_a_masked_model(masked, source, tmp_path, sampler, evaluations, draws):
    settings = resolve(
        "sample", None, {"request.count": 3, "request.length": 12, "model.source": str(masked), **sampler}
    )
    summary = execute(settings, folder=tmp_path / "run", quiet=True).summary
    assert summary["evaluations"] == evaluations
    assert summary.get("categorical_draws") == draws
    assert "<mask>" not in "".join(line["text"] for line in samples(tmp_path / "run"))


def test_ancestral_takes_the_steps_that_are_asked(masked, tmp_path):
    result = run(tmp_path / "run", model__source=str(masked), sampler__name="ancestral", request__steps=10)
    assert result.summary["evaluations"] <= 11
    assert result.summary["categorical_draws"] > 36
    assert max(max(line["order"]) for line in samples(result.folder)) <= 10


def test_the_seed_decides(masked, tmp_path):
    one, again, other = (
        [
            line["text"]
            for line in samples(run(tmp_path / name, model__source=str(masked), run__seed=seed).folder)
        ]
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert one == again
    assert one != other


def test_many_texts_are_sampled_in_parts(masked, source, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "LOGITS", 2 * 12 * source.vocabulary)
    result = run(tmp_path / "run", model__source=str(masked), request__count=5)
    lines = samples(result.folder)
    assert len({line["text"] for line in lines}) == 5
    assert result.summary["evaluations"] == 3 * 12
    assert result.summary["categorical_draws"] == 5 * 12


def test_a_run_file_repeats_the_texts(masked, tmp_path):
    first = run(tmp_path / "first", model__source=str(masked), request__prompt="the cat")
    settings = resolve("sample", first.folder / "run.toml")
    execute(settings, folder=tmp_path / "second", quiet=True)
    assert samples(first.folder) == samples(tmp_path / "second")


def test_nothing_global_moves(masked, tmp_path):
    before = torch.random.get_rng_state()
    run(tmp_path / "run", model__source=str(masked))
    assert torch.equal(before, torch.random.get_rng_state())


# -- prompts ---------------------------------------------------------------------------------------------------


def test_every_text_begins_with_the_prompt(masked, source, tmp_path):
    result = run(tmp_path / "run", model__source=str(masked), request__prompt="the dog ran")
    count = len(source.encode("the dog ran"))
    assert result.summary["prompt_tokens"] == count
    for line in samples(result.folder):
        assert line["text"].startswith("the dog ran")
        assert line["order"][:count] == [-1] * count
        assert sorted(line["order"][count:]) == list(range(12 - count))


def test_a_mask_in_the_prompt_is_a_place_to_be_filled(masked, source, tmp_path):
    result = run(tmp_path / "run", model__source=str(masked), request__prompt="the<mask> sat")
    head, tail = len(source.encode("the")), len(source.encode(" sat"))
    for line in samples(result.folder):
        assert line["order"][:head] == [-1] * head
        assert line["order"][head] >= 0
        assert line["order"][head + 1 : head + 1 + tail] == [-1] * tail
        assert "<mask>" not in line["text"]


def test_a_prompt_that_fills_the_length_is_refused(masked, tmp_path):
    with pytest.raises(BadParameter, match=r"prompt has \d+ tokens and request.length=4 leaves no place"):
        run(
            tmp_path / "run",
            model__source=str(masked),
            request__prompt="the cat sat on the mat",
            request__length=4,
        )


def test_a_prompt_of_another_tokenizer_is_refused(masked, source, tmp_path):
    small = tmp_path / "small"
    masked_language_model(vocabulary=40, length=24, mask_token=2, **TINY).save_pretrained(small)
    source.save_pretrained(small)
    with pytest.raises(BadModel, match="its model a vocabulary of 40: they do not belong together"):
        run(tmp_path / "run", model__source=str(small), request__prompt="the cat")


# -- causal models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [{"sampler__name": "top-p"}, {"sampler__name": "greedy", "sampler__order": "left-to-right"}],
    ids=["top-p", "greedy"],
)
def test_a_causal_model_needs_no_mask_token_from_left_to_right(causal, tmp_path, sampler):
    result = run(tmp_path / "run", model__source=str(causal), **sampler)
    for line in samples(result.folder):
        assert line["text"].startswith("<eos>")
        assert line["order"] == [-1, *range(11)]
    assert result.summary["evaluations"] == 11


def test_greedy_on_a_causal_model_is_what_generate_says(causal, source, tmp_path):
    from transformers import AutoModelForCausalLM

    result = run(
        tmp_path / "run",
        model__source=str(causal),
        sampler__name="greedy",
        sampler__order="left-to-right",
        request__prompt="the cat",
        request__count=1,
    )
    ids = torch.tensor([source.encode("the cat")])
    model = AutoModelForCausalLM.from_pretrained(causal, local_files_only=True)
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12 - ids.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert samples(result.folder)[0]["text"] == source.decode(generated[0])


def test_a_masked_sampler_needs_a_mask_token(causal, tmp_path):
    with pytest.raises(BadModel, match="has no mask token, which the sampler 'first-hitting' needs"):
        run(tmp_path / "run", model__source=str(causal))
    with pytest.raises(BadModel, match=r"'greedy' needs.*order=left-to-right"):
        run(tmp_path / "greedy", model__source=str(causal), sampler__name="greedy")


def test_a_causal_model_with_no_token_to_begin_with_asks_for_a_prompt(causal, source, tmp_path):
    import shutil

    silent = tmp_path / "silent"
    shutil.copytree(causal, silent)
    forget(silent, "eos_token", "bos_token")
    with pytest.raises(BadParameter, match=r"names no token to begin with; give request.prompt"):
        run(tmp_path / "run", model__source=str(silent), sampler__name="top-p")
    spoken = run(tmp_path / "spoken", model__source=str(silent), sampler__name="top-p", request__prompt="the")
    assert all(line["text"].startswith("the") for line in samples(spoken.folder))


# -- the user's model ------------------------------------------------------------------------------------------


def test_the_mask_token_may_be_the_tokenizers(tmp_path):
    # As in a BERT of the hub: its config says nothing of [MASK].
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s"]
    codec = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    codec.pre_tokenizer, codec.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=codec, **special)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    result = run(tmp_path / "run", model__source=str(tmp_path / "bert"), request__prompt="the cats")
    lines = samples(result.folder)
    assert all(line["text"].startswith("the cats") for line in lines)
    assert not any("[MASK]" in line["text"] for line in lines)
    assert lines[0]["tokens"][:3] == ["the", " cat", "s"]


def test_a_model_without_tokenizer_is_refused(masked, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(masked, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BadModel, match=r"has no tokenizer\.json"):
        run(tmp_path / "run", model__source=str(bare))


def test_a_damaged_tokenizer_is_refused(masked, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(masked, broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(BadModel, match=r"tokenizer in .*broken cannot be read"):
        run(tmp_path / "run", model__source=str(broken))


def test_a_mask_token_outside_the_vocabulary_is_refused(masked, tmp_path):
    import shutil

    wrong = tmp_path / "wrong"
    shutil.copytree(masked, wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "mask_token_id": 4000}))
    with pytest.raises(BadModel, match=r"mask token 4000 of .* is outside its model's vocabulary"):
        run(tmp_path / "run", model__source=str(wrong))


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(BadModel, match="does not exist"):
        run(tmp_path / "run", model__source=str(tmp_path / "nowhere"))


def test_a_length_beyond_the_model_is_refused(masked, tmp_path):
    with pytest.raises(BadParameter, match=r"request.length=25: .* takes 24 tokens at most"):
        run(tmp_path / "run", model__source=str(masked), request__length=25)


def test_the_length_is_the_models_where_none_is_said(masked, tmp_path):
    settings = resolve("sample", None, {"request.count": 1, "model.source": str(masked)})
    assert execute(settings, folder=tmp_path / "run", quiet=True).summary["length"] == 24


def test_a_sampler_of_other_values_is_refused(masked, tmp_path):
    @attrs.frozen
    class Clouds:
        """Points, by and by."""

        kind, name, modalities, domain = "sampler", "clouds", frozenset({"point-cloud"}), "continuous"

        def sample(self, denoiser: Callable, request: object) -> None: ...

    registry = Registry.from_environment()
    registry.register(Clouds)
    with pytest.raises(UsageError, match=r"'clouds' fills in continuous values.*first-hitting"):
        run(tmp_path / "run", registry=registry, model__source=str(masked), sampler__name="clouds")


# -- the embedded model ----------------------------------------------------------------------------------------

EMBEDDED = {
    "data__length": 16,
    "data__vocabulary": 300,
    "model__width": 16,
    "model__depth": 1,
    "model__heads": 2,
}


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(WORDS * 60, encoding="utf-8")
    return {"data__source": str(path), **EMBEDDED}


@pytest.mark.parametrize(
    ("sampler", "objective", "model"),
    [("first-hitting", "masked-diffusion", "ForMaskedLM"), ("top-p", "next-token", "LlamaForCausalLM")],
)
def test_without_a_model_it_trains_one_of_the_right_kind(
    words, tmp_path, monkeypatch, sampler, objective, model
):
    monkeypatch.setattr(pretrain, "EMBEDDED_STEPS", 3)
    result = run(tmp_path / "run", sampler__name=sampler, **words)
    base = json.loads((result.folder / "base" / "summary.json").read_text())
    assert base["objective"] == objective
    config = json.loads((result.folder / "base" / "model" / "config.json").read_text())
    assert config["architectures"][0].endswith(model)
    assert len(samples(result.folder)) == 3
    again = run(
        tmp_path / "again", model__source=str(result.folder / "base" / "model"), sampler__name=sampler
    )
    assert samples(again.folder) == samples(result.folder)


def test_a_resumed_run_does_not_train_again(words, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "EMBEDDED_STEPS", 3)
    first = samples(run(tmp_path / "run", **words).folder)
    (tmp_path / "run" / "samples.jsonl").unlink()
    weights = (tmp_path / "run" / "base" / "model" / "model.safetensors").stat().st_mtime_ns
    assert samples(run(tmp_path / "run", resume=True, **words).folder) == first
    assert (tmp_path / "run" / "base" / "model" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"request__length": 17}, "the embedded model takes 16 tokens at most; set data.length as well"),
        ({"request__prompt": "the cat sat on the mat " * 3}, r"prompt has \d+ tokens and request.length=12"),
    ],
)
def test_what_cannot_be_sampled_is_said_before_training(words, tmp_path, monkeypatch, request_, message):
    monkeypatch.setattr(job, "embedded_language_model", None)
    with pytest.raises(BadParameter, match=message):
        run(tmp_path / "run", **words, **request_)


# -- pieces ----------------------------------------------------------------------------------------------------


def test_pieces_are_the_text_even_where_a_character_has_several_tokens(source):
    text = "the café 漢字 naïve"
    ids = source.encode(text)
    parts = job.pieces(source.tokenizer, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
    assert any(part == "" for part in parts)  # bytes that are no character yet
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_half_a_character_at_the_end_is_shown_as_one(source):
    ids = source.encode("漢")[:2]
    assert "".join(job.pieces(source.tokenizer, ids)) == source.decode(ids)
