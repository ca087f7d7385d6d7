"""Samplers that keep every rule, and for each rule one that breaks it and no other."""

import os
from typing import ClassVar

import attrs
import torch

from maskwright import Samples
from maskwright.toolkit.selection import keep_largest


@attrs.frozen
class Right:
    """Reveals one position of each row after the other, at random places."""

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "right"
    modalities: ClassVar[frozenset[str]] = frozenset({"text"})
    domain: ClassVar[str] = "discrete"

    def sample(self, denoiser, request):
        tokens = self.copied(request.tokens)
        order = torch.full_like(tokens, -1)
        evaluations = 0
        total = int((tokens == request.mask_token).sum(1).max())
        for event in range(total):
            time = torch.full((len(tokens),), 1 - event / total)
            logits = self.asked(denoiser, tokens, time, request)
            evaluations += 1
            hidden = tokens == request.mask_token
            place = self.place(hidden, logits, request)
            chosen = torch.where(place, self.chosen(logits, request), tokens)
            order = torch.where(place, event, order)
            tokens.copy_(chosen)
        return self.samples(tokens, evaluations, order, request)

    def copied(self, tokens):
        return tokens.clone()

    def asked(self, denoiser, tokens, time, request):
        return denoiser(tokens, time=time) if request.time_conditioned else denoiser(tokens)

    def place(self, hidden, logits, request):
        scores = hidden + torch.rand(hidden.shape, generator=request.generator, dtype=torch.float64)
        return keep_largest(scores, 1) & hidden

    def chosen(self, logits, request):
        logits = logits.double()
        if request.mask_token < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor(request.mask_token), -torch.inf)
        return (logits + self.noise(logits.shape, request)).argmax(-1)

    def noise(self, shape, request):
        u = torch.rand(shape, generator=request.generator, dtype=torch.float64)
        return -(-u.clamp(1e-300).log()).log()

    def samples(self, tokens, evaluations, order, request):
        return Samples(tokens, evaluations, order)


class LeftToRight(Right):
    """Greedy and autoregressive."""

    domain = "autoregressive"

    def place(self, hidden, logits, request):
        return hidden & (hidden.cumsum(1) == 1)

    def noise(self, shape, request):
        return torch.zeros(shape)


class Points(Right):
    """The best position of those that exist, one after the other, and nothing after the end."""

    domain = "pointer"

    def sample(self, denoiser, request):
        tokens = self.copied(request.tokens)
        hidden = tokens == request.mask_token
        evaluations = 0
        for place in range(tokens.shape[1]):
            if hidden[:, place].any():
                scores = denoiser(tokens[:, None, :place])[:, 0]
                evaluations += 1
                chosen = self.chosen(scores, tokens[:, :place])
                tokens[:, place] = torch.where(hidden[:, place], chosen, tokens[:, place])
        return Samples(tokens, evaluations, torch.where(hidden, hidden.cumsum(1) - 1, -1))

    def chosen(self, scores, before):
        end = scores.shape[-1] - 1
        return torch.where((before == end).any(1), end, scores.argmax(-1))


@attrs.frozen(eq=False)
class Wave:
    x: torch.Tensor
    generator: torch.Generator


@attrs.frozen
class Continuous:
    """Values that are no tokens: denoiser and request are the class's own."""

    kind: ClassVar[str] = "sampler"
    name: ClassVar[str] = "waves"
    modalities: ClassVar[frozenset[str]] = frozenset({"audio"})
    domain: ClassVar[str] = "continuous"

    @staticmethod
    def example_denoiser(seed):
        return lambda x, t: 0.5 * x * t

    @staticmethod
    def example_request(rows, seed):
        return Wave(torch.zeros(rows, 5), torch.Generator().manual_seed(seed))

    def sample(self, denoiser, request):
        x = request.x + torch.randn(request.x.shape, generator=request.generator)
        for t in (1.0, 0.5):
            x = denoiser(x, t)
        return Samples(x, 2)


# -- one rule broken -------------------------------------------------------------------------------------------


class Raises(Right):
    def sample(self, denoiser, request):
        raise RuntimeError("The size of tensor a (8) must match the size of tensor b (7)")


class ReturnsFloats(Right):
    def samples(self, tokens, evaluations, order, request):
        hidden = request.tokens == request.mask_token
        return Samples(tokens.double() if hidden.any() else tokens, evaluations, order)


class Bad(Continuous):
    """Not a number."""

    def sample(self, denoiser, request):
        samples = super().sample(denoiser, request)
        return Samples(torch.full_like(samples.values, torch.inf), samples.evaluations)


class CountsOneLess(Right):
    def samples(self, tokens, evaluations, order, request):
        return Samples(tokens, max(0, evaluations - 1), order)


class OtherRandomness(Right):
    def noise(self, shape, request):
        seed = int.from_bytes(os.urandom(4), "big")
        return super().noise(shape, attrs.evolve(request, generator=torch.Generator().manual_seed(seed)))


class MovesTheGlobalState(Right):
    def noise(self, shape, request):
        torch.rand(1)
        return super().noise(shape, request)


class FillsTheRequest(Right):
    def copied(self, tokens):
        return tokens


class RewritesThePrompt(Right):
    """The first token of a prompt is another when anything is sampled."""

    def samples(self, tokens, evaluations, order, request):
        given = request.prompt.keep[:, 0] & (evaluations > 0)
        other = (request.mask_token + 1 + (tokens[:, 0] == request.mask_token + 1)) % 7
        tokens[:, 0] = torch.where(given, other, tokens[:, 0])
        return Samples(tokens, evaluations, order)


class SamplesMasks(Right):
    """The mask token is as good as any other."""

    def chosen(self, logits, request):
        return (logits + self.noise(logits.shape, request)).argmax(-1)


class OneBeyond(Right):
    """The last position gets a token that has no logit."""

    def samples(self, tokens, evaluations, order, request):
        hidden = request.tokens[:, -1] == request.mask_token
        tokens[:, -1] = torch.where(hidden, 9, tokens[:, -1])
        return Samples(tokens, evaluations, order)


class BackwardOrder(Right):
    def samples(self, tokens, evaluations, order, request):
        return Samples(tokens, evaluations, torch.where(order < 0, order, order.max() - order))


class OrderOfThePrompt(Right):
    def samples(self, tokens, evaluations, order, request):
        return Samples(tokens, evaluations, order + 1)


class AllTogether(Right):
    """Where the rows are sure on average is revealed first."""

    def place(self, hidden, logits, request):
        sure = logits.softmax(-1).amax(-1).mean(0, keepdim=True)
        return keep_largest((hidden * (1 + sure)).double(), 1) & hidden


class OneRowForAll(Right):
    def place(self, hidden, logits, request):
        scores = hidden + torch.rand(hidden.shape[1:], generator=request.generator, dtype=torch.float64)
        return keep_largest(scores, 1) & hidden

    def noise(self, shape, request):
        return super().noise((1, *shape[1:]), request)


class NeverLooks(Right):
    """The denoiser is called, and its answer is not used."""

    def chosen(self, logits, request):
        return super().chosen(torch.zeros_like(logits), request)


class PointsAtNothing(Points):
    """Where inputs are missing, at the first of them, unless something is certain."""

    def chosen(self, scores, before):
        certain = scores.amax(-1, keepdim=True) > 50
        return super().chosen(torch.where(certain, scores, scores.masked_fill(scores.isinf(), 9.0)), before)


class GoesOnAfterTheEnd(Points):
    def chosen(self, scores, before):
        return scores.argmax(-1)


class NeedsSomethingToDo(Right):
    def samples(self, tokens, evaluations, order, request):
        1 / evaluations
        return Samples(tokens, evaluations, order)


class NeverTellsTheTime(Right):
    def asked(self, denoiser, tokens, time, request):
        return denoiser(tokens)


class AlwaysTellsTheTime(Right):
    def asked(self, denoiser, tokens, time, request):
        return denoiser(tokens, time=time)


class RunsBackwards(Right):
    def asked(self, denoiser, tokens, time, request):
        return super().asked(denoiser, tokens, 1 - time, request)


class Changeable(Right):
    anything = 0

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


RIGHT = (Right, LeftToRight, Points, Continuous)
BROKEN = [
    ("requests-are-answered", Raises),
    ("requests-are-answered", ReturnsFloats),
    ("requests-are-answered", Bad),
    ("evaluations-are-the-calls", CountsOneLess),
    ("same-generator-same-samples", OtherRandomness),
    ("global-random-state-is-untouched", MovesTheGlobalState),
    ("request-is-left-alone", FillsTheRequest),
    ("prompt-is-kept", RewritesThePrompt),
    ("no-mask-token-is-left", SamplesMasks),
    ("values-are-in-the-vocabulary", OneBeyond),
    ("order-is-true", BackwardOrder),
    ("order-is-true", OrderOfThePrompt),
    ("rows-are-independent", AllTogether),
    ("rows-are-independent", OneRowForAll),
    ("what-is-certain-is-sampled", NeverLooks),
    ("missing-inputs-are-not-pointed-at", PointsAtNothing),
    ("missing-inputs-are-not-pointed-at", GoesOnAfterTheEnd),
    ("full-prompts-come-back", NeedsSomethingToDo),
    ("time-is-given-when-asked-for", NeverTellsTheTime),
    ("time-is-given-when-asked-for", AlwaysTellsTheTime),
    ("time-is-given-when-asked-for", RunsBackwards),
    ("component-is-frozen", Changeable),
]
