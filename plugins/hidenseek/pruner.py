"""Sign supermasks learned by clients: θ0 are the frozen weights, m the kept ones, σ their signs, s the scores of a client.

Everything that is learned or sent is about the k kept weights alone, in the order of the layers and of their entries: scores and signs
are vectors [k], and a message is k bits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from maskwright import Batch, Mask, PruneResult, PruneTask, setting
from maskwright.errors import BadData, NumericalError
from maskwright.plugins.hidenseek.saliency import densities, survivors
from maskwright.toolkit.calibration import evaluating, on_device
from maskwright.toolkit.patterns import check_budget
from maskwright.toolkit.prunable import Weight, finish, prunable_weights

# -- the equations ---------------------------------------------------------------------------------------------------


def signs_of(scores: Tensor) -> Tensor:
    """σ as bool: True (+1) where s ≥ 0, also at zero."""
    return scores >= 0


def valued(signs: Tensor, values: str) -> Tensor:
    """What a bit stands for: ±1 for "sign", 1 or 0 for "zero-one"."""
    return signs.to(torch.float32) * 2 - 1 if values == "sign" else signs.to(torch.float32)


def aggregate(signs: Tensor, counts: Tensor, previous: Tensor) -> Tensor:
    """The server's signs bool [k]: those of Σ n_c·σ_c over clients, bool [C, k] with int64 [C] samples; a tie keeps the previous."""
    balance = (counts[:, None] * (signs.long() * 2 - 1)).sum(0)
    return torch.where(balance == 0, previous, balance > 0)


def adopted(scores: Tensor, signs: Tensor, restart: str, initial: float) -> Tensor:
    """A client's scores when it has received the global signs.

    "project": the nearest scores that have these signs, so that progress towards a flip is kept from round to round. "signs": the
    initial score under these signs.
    """
    if restart == "signs":
        return initial * valued(signs, "sign")
    below = -torch.finfo(scores.dtype).tiny
    return torch.where(signs, scores.clamp(min=0), scores.clamp(max=below))


def packed(signs: Tensor) -> Tensor:
    """The message: uint8 [⌈k/8⌉], one bit for each sign, the first in the highest bit."""
    return torch.from_numpy(np.packbits(signs.cpu().numpy()))


def unpacked(message: Tensor, k: int) -> Tensor:
    """The inverse of `packed`: bool [k]."""
    return torch.from_numpy(np.unpackbits(message.cpu().numpy(), count=k).astype(bool))


@torch.no_grad()
def personalise(
    model: nn.Module,
    masks: Mapping[str, Mask],
    message: Tensor,
    start: Mapping[str, Tensor],
    values: str = "sign",
) -> None:
    """Give a model the signs of a message: W = m ⊙ σ ⊙ θ0, where `start` holds θ0 (of "signs", every client's message is kept)."""
    keep = {name: mask.keep for name, mask in masks.items()}
    count = sum(int(one.sum()) for one in keep.values())
    seed = torch.cat([start[name][one] for name, one in keep.items()])
    parameters = {name: model.get_parameter(name) for name in keep}
    Kept(parameters, keep, seed).put(unpacked(message, count), values)


@attrs.frozen(eq=False)
class Kept:
    """The kept entries of some parameters as one vector: `seed` [k] is θ0 there."""

    parameters: Mapping[str, nn.Parameter]
    keep: Mapping[str, Tensor]
    seed: Tensor
    places: tuple[Tensor, ...] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(
            self, "places", tuple(keep.flatten().nonzero()[:, 0] for keep in self.keep.values())
        )

    @torch.no_grad()
    def put(self, signs: Tensor, values: str) -> None:
        """W = m ⊙ σ ⊙ θ0."""
        every = valued(signs.to(self.seed.device), values).to(self.seed.dtype) * self.seed
        pieces = every.split([len(place) for place in self.places])
        for name, place, piece in zip(self.keep, self.places, pieces):
            parameter = self.parameters[name]
            flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            parameter.copy_(flat.index_copy_(0, place, piece.to(parameter)).view(parameter.shape))

    def gradient(self) -> Tensor:
        """dL/ds [k] = dL/dσ = dL/dW ⊙ θ0: straight through the step from scores to signs."""
        found = []
        for name, place in zip(self.keep, self.places):
            slope = self.parameters[name].grad
            found.append(self.seed.new_zeros(len(place)) if slope is None else slope.flatten()[place])
        return torch.cat(found).float() * self.seed.float()


# -- the pruner ------------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that were sent, and messages that clients sent."""

    up: int
    down: int
    messages: int


@attrs.frozen
class HideNSeek:
    """Random weights survive by synaptic saliency, without data; clients then learn only the sign of each, one bit on the wire.

    arXiv:2206.04385. The model that is given is θ0: initialise it at random. Of the paper only the abstract could be read; the plugin's
    README lists what was decided here.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "hidenseek"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"clients", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    changes_weights: ClassVar[bool] = True
    compare: ClassVar[str] = "global"
    example_parameters: ClassVar[dict[str, Any]] = {"communications": 2, "epochs": 1, "lr": 0.2}

    rounds: int = setting(1, "rounds of pruning; 1 is the paper's one shot, 100 are Synaptic Flow's", ge=1)
    communications: int = setting(15, "times that clients train and send their signs", ge=1)
    epochs: int = setting(3, "passes over a client's batches in each communication", ge=1)
    lr: float = setting(0.02, "Adam's learning rate of the scores", gt=0)
    initial: float = setting(0.1, "score of every kept weight at the start", gt=0)
    participation: float = setting(1.0, "share of the clients in each communication", gt=0, le=1)
    restart: str = setting(
        "project", "what a client's scores become under the global signs", choices=("project", "signs")
    )
    rescale: bool = setting(False, "divide the weights of a layer by the root of the share it keeps")
    values: str = setting(
        "sign", "what a bit stands for: ±1, or 1 and 0 to compare with", choices=("sign", "zero-one")
    )

    @staticmethod
    def example_extras(model: nn.Module, seed: int) -> dict[str, Any]:
        """Three clients with unequal shares, for the conformance kit's models."""
        generator = torch.Generator().manual_seed(seed)
        first = next(module for module in model.modules() if hasattr(module, "weight"))
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

        def batch(size: int) -> Batch:
            if isinstance(first, nn.Embedding):
                return {"tokens": torch.randint(0, first.num_embeddings, (size, 12), generator=generator)}
            shape = (first.in_channels, 4, 4) if isinstance(first, nn.Conv2d) else (first.in_features,)
            inputs = torch.randn(size, *shape, generator=generator).to(first.weight.dtype)
            return {
                "inputs": inputs,
                "labels": torch.randint(0, last.out_features, (size,), generator=generator),
            }

        return {"clients": [[batch(4), batch(2)], [batch(3)], [batch(5), batch(5)]]}

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for what is no sparsity, `BadData` without a loss or where a client has no batches."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        clients: Sequence[Sequence[Batch]] | None = task.extras.get("clients")
        if task.loss is None or not clients or not all(len(one) for one in clients):
            raise BadData(
                "hidenseek trains on clients and a loss; give the task both, with at least one batch for each client."
            )
        assert budget.sparsity is not None
        # Only the shape of a batch is looked at.
        keep = survivors(model, weights, clients[0][0], budget.sparsity, self.rounds)
        self.warn(weights, keep)
        kept = Kept({weight.name: weight.parameter for weight in weights}, keep, self.seed(weights, keep))
        dense = [weight.parameter.detach().clone() for weight in weights]
        try:
            server, scores, history, traffic = self.fit(model, kept, clients, task)
        except BaseException:
            # What was given is random and cannot be found again from its kept part.
            with torch.no_grad():
                for weight, values in zip(weights, dense):
                    weight.parameter.copy_(values)
            raise
        kept.put(server, self.values)
        matrices = {weight.name: weight.as_matrix(keep[weight.name]) for weight in weights}
        result = finish(model, weights, matrices, history)
        own = {f"client-{number}": packed(one) for number, one in enumerate(signs_of(scores).unbind())}
        return attrs.evolve(
            result,
            artifacts={"signs": {"global": packed(server), **own}},
            facts=self.facts(weights, kept, len(clients), traffic),
        )

    def seed(self, weights: Sequence[Weight], keep: Mapping[str, Tensor]) -> Tensor:
        """θ0 at the kept entries, [k]."""
        pieces = []
        for weight in weights:
            chosen = keep[weight.name]
            values = weight.parameter.detach()[chosen]
            share = len(values) / chosen.numel()
            pieces.append(values / math.sqrt(share) if self.rescale and share else values)
        return torch.cat(pieces)

    def warn(self, weights: Sequence[Weight], keep: Mapping[str, Tensor]) -> None:
        """Say so when pruning leaves a layer fewer weights than it has outputs."""
        for weight in weights:
            left = int(keep[weight.name].sum())
            if left < weight.shape[0]:
                warnings.warn(
                    f"hidenseek keeps {left} of {weight.parameter.numel()} weights of {weight.name}, fewer than its {weight.shape[0]} "
                    f"outputs, after {self.rounds} round(s) of pruning; more rounds share the weights out more evenly.",
                    stacklevel=3,
                )

    def fit(
        self, model: nn.Module, kept: Kept, clients: Sequence[Sequence[Batch]], task: PruneTask
    ) -> tuple[Tensor, Tensor, list[dict[str, float]], Traffic]:
        """The communications: (global signs bool [k], the clients' scores [C, k], numbers by communication, bytes)."""
        k = len(kept.seed)
        counts = torch.tensor([sum(len(next(iter(batch.values()))) for batch in one) for one in clients])
        memory = nn.Module()
        memory.register_buffer("server", torch.ones(k, dtype=torch.bool))
        memory.register_buffer("scores", torch.full((len(clients), k), self.initial))
        memory.register_buffer("traffic", torch.zeros(3, dtype=torch.int64))
        server, scores, traffic = memory.server, memory.scores, memory.traffic
        asked = max(1, round(self.participation * len(clients)))
        history = []
        with frozen(model, kept.parameters.values()):
            for step in task.steps(self.communications, {"memory": memory, "generator": task.generator}):
                drawn = torch.randperm(len(clients), generator=task.generator, device=task.generator.device)
                chosen = drawn[:asked].sort().values.cpu()
                download, uploads, losses = packed(server), [], []
                for number in chosen.tolist():
                    received = unpacked(download, k)
                    scores[number], loss = self.local(
                        model, kept, clients[number], scores[number], received, task
                    )
                    uploads.append(packed(signs_of(scores[number])))
                    losses.append(loss)
                arrived = torch.stack([unpacked(message, k) for message in uploads])
                news = aggregate(arrived, counts[chosen], server)
                numbers = {
                    "loss": sum(losses) / len(losses),
                    "flipped": float((news != server).double().mean()) if k else 0.0,
                    "agreement": float((arrived == news).double().mean()) if k else 1.0,
                    "negative": float((~news).double().mean()) if k else 0.0,
                }
                server.copy_(news)
                sent = (
                    sum(message.nbytes for message in uploads),
                    download.nbytes * len(uploads),
                    len(uploads),
                )
                traffic += torch.tensor(sent)
                if not math.isfinite(numbers["loss"]):
                    raise NumericalError(
                        f"hidenseek: the loss is {numbers['loss']} at communication {step.index + 1} of {step.total}; look at "
                        "the model's loss on this data before pruning."
                    )
                task.log(step, **numbers)
                history.append({"step": float(step.index + 1), **numbers})
        return server, scores, history, Traffic(*traffic.tolist())

    def local(
        self,
        model: nn.Module,
        kept: Kept,
        batches: Sequence[Batch],
        scores: Tensor,
        received: Tensor,
        task: PruneTask,
    ) -> tuple[Tensor, float]:
        """A client's training: (its scores [k], its mean loss in the last pass)."""
        assert task.loss is not None
        latent = nn.Parameter(adopted(scores, received, self.restart, self.initial))
        optimizer = torch.optim.Adam([latent], lr=self.lr)
        for _ in range(self.epochs):
            losses = []
            order = torch.randperm(len(batches), generator=task.generator, device=task.generator.device)
            for index in order.tolist():
                kept.put(signs_of(latent.detach()), self.values)
                loss = task.loss(model, on_device(model, batches[index]))
                model.zero_grad(set_to_none=True)
                loss.backward()
                latent.grad = kept.gradient().to(latent.device)
                optimizer.step()
                losses.append(loss.detach())
        return latent.detach(), float(torch.stack(losses).mean())

    def facts(
        self, weights: Sequence[Weight], kept: Kept, clients: int, traffic: Traffic
    ) -> dict[str, float]:
        """Bytes of the messages that were sent, beside those of 32-bit weights, and how the layers fared."""
        total = sum(weight.parameter.numel() for weight in weights)
        return {
            "clients": float(clients),
            "kept_weights": float(len(kept.seed)),
            "upload_bytes_of_a_message": traffic.up / traffic.messages,
            "upload_bytes": float(traffic.up),
            "download_bytes": float(traffic.down),
            "mask_bytes_once": float(math.ceil(total / 8)),
            "upload_bytes_as_32_bit_weights": 4.0 * total * traffic.messages,
            "least_share_kept_of_a_layer": min(densities(kept.keep).values()),
        }


@contextmanager
def frozen(model: nn.Module, asked: Any) -> Iterator[None]:
    """Evaluation mode, in which these parameters alone are given gradients; all is put back afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in asked}
    with evaluating(model):
        try:
            for parameter, _ in required:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, flag in required:
                parameter.requires_grad_(flag)
                if id(parameter) in chosen:
                    parameter.grad = None


COMPONENTS = (HideNSeek,)
