"""`maskwright sample`: text from a masked or causal language model, by any sampler of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from maskwright.backbones import TokenBackbone, adapt
from maskwright.backbones.folders import read_config, read_model
from maskwright.backbones.transformers import denoiser
from maskwright.errors import BadModel, BadParameter, UsageError, reason
from maskwright.jobs import models
from maskwright.jobs.pretrain import embedded_language_model
from maskwright.jobs.run import Result, Run
from maskwright.protocols import Sampler, SampleRequest, Samples
from maskwright.sources.text import load_text

LENGTH = 128
"""Tokens of a text where nothing is said, or as many as the model takes."""

LOGITS = 2**25
"""Logits that one network call may return (128 MiB in float32): more texts than that are sampled in turn."""

OBJECTIVES = {True: "next-token", False: "masked-diffusion"}
"""What the embedded model is trained with, for samplers that go from left to right and for all others."""


@attrs.frozen(eq=False)
class Speaker:
    """A language model with its tokenizer (of transformers); `mask_token` is None where there is none."""

    backbone: TokenBackbone
    tokenizer: Any
    mask_token: int | None
    most: int | None
    """Tokens that it takes at most, where it says so."""
    name: str


def sample(run: Run) -> Result:
    """Sample texts and leave samples.jsonl (tokens, order and text of each) and a report with the order of their reveal."""
    request = run.settings.require("request")
    sampler: Sampler = run.settings.require("sampler").create(run.registry)
    _check_domain(sampler, run)
    speaker = _speaker(run, sampler)
    length = _length(request.length, speaker.most, speaker.name)
    begin = prompt_tokens(request.prompt, speaker, length)
    # Where only what lies to the left is read, a wanted token needs no embedding: an id that no prompt can have stands for it.
    mask_token = speaker.mask_token if speaker.mask_token is not None else speaker.backbone.vocabulary
    tokens = torch.full((request.count, length), mask_token)
    tokens[:, : len(begin)] = torch.tensor(begin, dtype=torch.int64)

    run.say(f"Sampling {request.count} × {length} tokens with {sampler.name}")
    started = time.monotonic()
    predict = _within(denoiser(speaker.backbone), speaker.backbone.vocabulary)
    rows = max(1, LOGITS // (length * speaker.backbone.vocabulary))
    generator = run.generator()
    drawn = [
        sampler.sample(
            predict, SampleRequest(part.to(run.device), mask_token, generator, steps=request.steps)
        )
        for part in tokens.split(rows)
    ]
    seconds = time.monotonic() - started
    lines = _lines(drawn, speaker.tokenizer)
    summary = {
        "sampler": sampler.name,
        "model": speaker.name,
        "samples": request.count,
        "length": length,
        "prompt_tokens": len(begin),
        "evaluations": sum(one.evaluations for one in drawn),
        **_facts(drawn),
        "sampling_seconds": round(seconds, 3),
    }
    return run.finish(summary, samples=lines)


def _check_domain(sampler: Sampler, run: Run) -> None:
    if sampler.domain in ("discrete", "autoregressive"):
        return
    every = run.registry.find(kind="sampler")
    fitting = sorted(info.name for info in every if info.domain in ("discrete", "autoregressive"))
    raise UsageError(
        f"The sampler {sampler.name!r} fills in {sampler.domain} values; this job samples tokens: {', '.join(fitting)}."
    )


# -- the model -----------------------------------------------------------------------------------------------


def _speaker(run: Run, sampler: Sampler) -> Speaker:
    """The user's model folder, or the embedded model trained in `base/`. What cannot be done is said before training."""
    section = run.settings.model
    forward = bool(getattr(sampler, "left_to_right", False))
    if section.source == models.DEFAULT:
        return _embedded(run, forward)
    models.tokenizer_of(section)
    folder = Path(section.source)
    config = read_config(folder)
    kind = "AutoModelForCausalLM" if models.is_causal(config) else "AutoModelForMaskedLM"
    tokenizer = _tokenizer(folder)
    model = read_model(folder, kind).eval().requires_grad_(False).to(run.device)
    backbone = adapt(model, "token")
    mask_token = tokenizer.mask_token_id if backbone.mask_token is None else backbone.mask_token
    if mask_token is not None and mask_token >= backbone.vocabulary:
        raise BadModel(
            f"The mask token {mask_token} of {folder} is outside its model's vocabulary of {backbone.vocabulary}; "
            "call resize_token_embeddings and save the model again."
        )
    if mask_token is None and not (forward and backbone.shift):
        raise BadModel(
            f"The model in {folder} has no mask token, which the sampler {sampler.name!r} needs: neither config.mask_token_id "
            "nor the tokenizer names one. Train one with `maskwright pretrain --objective masked-diffusion`, or sample a causal "
            "model from left to right, with top-p or greedy and order=left-to-right."
        )
    most = config.get("max_position_embeddings", config.get("n_positions"))
    return Speaker(backbone, tokenizer, mask_token, most if isinstance(most, int) else None, str(folder))


def _embedded(run: Run, forward: bool) -> Speaker:
    data, request = run.settings.data, run.settings.require("request")
    most, name = data.length or LENGTH, "the embedded model"
    length = _length(request.length, most, name, "; set data.length as well")
    if request.prompt:
        source = load_text(data.source, length=most, vocabulary=data.vocabulary or 1024, seed=run.seed)
        _check_prompt(len(source.encode(request.prompt)), length)
    trained = embedded_language_model(run, objective=OBJECTIVES[forward])
    text: Any = trained.source
    trained.network.requires_grad_(False)
    return Speaker(
        adapt(trained.network, "token"),
        text.tokenizer,
        text.mask_token,
        most,
        f"{name} ({OBJECTIVES[forward]})",
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise BadModel(f"The tokenizer in {folder} cannot be read: {reason(error)}") from error


def _within(predict: Callable[[Tensor], Tensor], vocabulary: int) -> Callable[[Tensor], Tensor]:
    """A denoiser that takes an id without an embedding, where one stands for a wanted token."""
    return lambda tokens: predict(tokens.clamp(max=vocabulary - 1))


# -- the request ---------------------------------------------------------------------------------------------


def _length(wanted: int | None, most: int | None, name: str, advice: str = "") -> int:
    if wanted is None:
        return LENGTH if most is None else min(LENGTH, most)
    if most is not None and wanted > most:
        raise BadParameter(f"request.length={wanted}: {name} takes {most} tokens at most{advice}.")
    return wanted


def prompt_tokens(prompt: str, speaker: Speaker, length: int) -> list[int]:
    """The ids that each text begins with. A mask token written in the prompt is a place to be filled.

    A causal model predicts nothing for its first token: there the tokenizer's own beginning is kept, and an empty prompt is the
    token that begins a text (or else ends one).
    """
    tokenizer, causal = speaker.tokenizer, bool(speaker.backbone.shift)
    ids = list(tokenizer(prompt, add_special_tokens=causal)["input_ids"])
    if causal and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    if causal and not ids:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise BadParameter(
                f"{speaker.name} is a causal model whose tokenizer names no token to begin with; give request.prompt."
            )
        ids = [first]
    if ids and max(ids) >= speaker.backbone.vocabulary:
        raise BadModel(
            f"The tokenizer of {speaker.name} has the id {max(ids)}, its model a vocabulary of {speaker.backbone.vocabulary}: "
            "they do not belong together."
        )
    _check_prompt(len(ids), length)
    return ids


def _check_prompt(tokens: int, length: int) -> None:
    if tokens >= length:
        raise BadParameter(
            f"The prompt has {tokens} tokens and request.length={length} leaves no place after it; "
            f"ask for a length of at least {tokens + 1}, or shorten the prompt."
        )


# -- what is left --------------------------------------------------------------------------------------------


def _lines(drawn: Sequence[Samples], tokenizer: Any) -> list[dict[str, Any]]:
    """One object a text: its tokens as text pieces, the event at which each was revealed, and the whole."""
    lines = []
    for samples in drawn:
        orders = [None] * len(samples.values) if samples.order is None else samples.order.tolist()
        for ids, order in zip(samples.values.tolist(), orders):
            line = {"text": _decoded(tokenizer, ids), "tokens": pieces(tokenizer, ids)}
            lines.append(line if order is None else {**line, "order": order})
    return lines


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: one piece a token, which together are the text.

    A character whose bytes are spread over several tokens belongs to the last of them.
    """
    shown, parts = "", []
    for end in range(1, len(ids) + 1):
        text = _decoded(tokenizer, ids[:end])
        if end < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if not text.startswith(shown):  # a tokenizer that rewrites what came before
            return [_decoded(tokenizer, [one]) for one in ids]
        parts.append(text[len(shown) :])
        shown = text
    return parts


def _facts(drawn: Sequence[Samples]) -> dict[str, float]:
    """The samplers' facts, added up over the parts."""
    names = dict.fromkeys(name for samples in drawn for name in samples.facts)
    return {name: sum(samples.facts.get(name, 0) for samples in drawn) for name in names}
