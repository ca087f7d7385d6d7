"""Learned N:M masks: G are logits over the candidates S of each block of M weights, W the frozen weights.

Candidates come first in every tensor (G and p are [|S|, blocks]), so that the softmax runs over whole rows of memory.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

import maskwright
from maskwright import Pruner, PruneResult, PruneTask, setting
from maskwright.errors import BadData, BadParameter
from maskwright.toolkit.masked import replaced, require_finite_loss
from maskwright.toolkit.patterns import candidates, check_budget
from maskwright.toolkit.prunable import Weight, finish, prunable_weights
from maskwright.toolkit.schedules import cosine

INITIAL_DEVIATION = 0.01
"""Standard deviation of the logits at the start."""


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """g = -log E with E ~ Exp(1), in float32: E = -log U costs a fraction of what `exponential_` does."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.log_().neg_().log_().neg_()


def probabilities(logits: Tensor, noise: Tensor, scale: float, temperature: float) -> Tensor:
    """p = softmax((G·κ + g) / τ) over the candidates, the first axis."""
    return torch.softmax(torch.add(noise, logits, alpha=scale) / temperature, 0)


def mixed(p: Tensor, patterns: Tensor) -> Tensor:
    """m̃ [blocks, M]: the candidates [|S|, M] weighed by p [|S|, blocks]; each block sums to N."""
    return p.T @ patterns


def chosen(logits: Tensor, patterns: Tensor) -> Tensor:
    """m [blocks, M]: the candidate with the largest logit, the first of equal ones."""
    return patterns[logits.argmax(0)]


def straight_through(p: Tensor, patterns: Tensor) -> Tensor:
    """[blocks, M]: exactly binary forward, with the gradient of `mixed`."""
    soft = mixed(p, patterns)
    return chosen(p, patterns) + (soft - soft.detach())


def with_prior(logits: Tensor, prior: Tensor, patterns: Tensor, strength: float) -> Tensor:
    """G + (overlap - N²/M) · std(G) · α, where overlap counts what a candidate and the prior [blocks, M] both keep.

    N²/M is the mean overlap of the candidates: 1 for 2:4.
    """
    n, m = patterns[0].sum(), patterns.shape[1]
    return logits + (patterns @ prior.T - n * n / m) * logits.std() * strength


def linear(start: float, end: float, fraction: float) -> float:
    """A schedule's value when `fraction` of the steps is behind."""
    return start + (end - start) * fraction


def _check_prior(instance: object, attribute: attrs.Attribute, value: Any) -> None:
    if not isinstance(value, str | Pruner):
        raise BadParameter(
            f'maskllm: prior={value!r} must be a pruner, the name of one, or "none" to start without.'
        )


@attrs.frozen
class MaskLlm:
    """N of every M weights, chosen by training a distribution over the legal patterns while the weights stay frozen.

    Fang et al., arXiv:2409.17481; the defaults are those of the official recipe for Llama-2 7B. The logits follow the task's
    loss, one batch and one sample of all masks a step, and start near the masks of another pruner.
    """

    kind: ClassVar[str] = "pruner"
    name: ClassVar[str] = "maskllm"
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"batches", "loss"})
    budgets: ClassVar[frozenset[str]] = frozenset({"pattern"})
    changes_weights: ClassVar[bool] = False
    example_parameters: ClassVar[dict[str, Any]] = {"steps": 4}

    steps: int = setting(2000, "training steps", ge=1)
    lr: float = setting(5e-4, "learning rate of the logits at the start", gt=0)
    final_lr: float = setting(5e-5, "learning rate at the end of the cosine", ge=0)
    betas: tuple[float, ...] = setting((0.9, 0.95), "AdamW's betas")
    epsilon: float = setting(1e-5, "AdamW's epsilon", gt=0)
    weight_decay: float = setting(0.1, "AdamW's weight decay, on the logits", ge=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 clips nothing", ge=0)
    temperature: float = setting(4.0, "temperature τ at the start", gt=0)
    final_temperature: float = setting(0.05, "temperature τ towards which it falls", gt=0)
    scale: float = setting(100.0, "factor κ of the logits at the start", gt=0)
    final_scale: float = setting(500.0, "factor κ towards which it grows", gt=0)
    prior: Any = attrs.field(
        default="sparsegpt",
        validator=_check_prior,
        metadata={"help": 'pruner (or its name) whose masks the logits start near, or "none"', "range": ""},
    )
    prior_strength: float = setting(3.0, "how many deviations the prior is ahead, α", ge=0)
    regularization: float = setting(
        1e-5, "factor λ at the start of the term that favours large kept weights", ge=0
    )
    hard: bool = setting(False, "sample binary masks with straight-through gradients instead of mixtures")

    def prune(self, model: nn.Module, task: PruneTask) -> PruneResult:
        """Raises `BadBudget` for what is no N:M pattern or does not fit a layer, `BadData` without batches and loss."""
        weights = prunable_weights(model, task.prunable)
        budget = check_budget(self, weights, task.budget)
        if task.loss is None or not task.batches:
            raise BadData("maskllm trains on batches and a loss; give the task both.")
        patterns = candidates(*budget.n_of_m).float()
        prior = self.prior_masks(model, weights, task)
        logits = nn.ParameterList(self.start(weight, patterns, prior, task.generator) for weight in weights)
        history = self.train(model, weights, logits, patterns, task)
        keep = {
            weight.name: chosen(one.detach(), patterns.to(one.device)).view(weight.shape).bool()
            for weight, one in zip(weights, logits)
        }
        return finish(model, weights, keep, history)

    def prior_masks(
        self, model: nn.Module, weights: list[Weight], task: PruneTask
    ) -> dict[str, Tensor] | None:
        """bool [out, in] by name: what another pruner would keep. The model's weights are put back afterwards."""
        if self.prior == "none" or self.prior_strength == 0:
            return None
        pruner = maskwright.create("pruner", self.prior) if isinstance(self.prior, str) else self.prior
        # Masks for these very weights: a pruner that moves the surviving ones is asked not to.
        if isinstance(self.prior, str) and hasattr(pruner, "update"):
            pruner = attrs.evolve(pruner, update=False)
        dense = [weight.parameter.detach().clone() for weight in weights]
        masks = pruner.prune(model, task).masks
        with torch.no_grad():
            for weight, values in zip(weights, dense):
                weight.parameter.copy_(values)
        return {weight.name: weight.as_matrix(masks[weight.name].keep) for weight in weights}

    def start(
        self, weight: Weight, patterns: Tensor, prior: dict[str, Tensor] | None, generator: torch.Generator
    ) -> nn.Parameter:
        """The logits of one weight, [|S|, blocks] in float32, where the weight is."""
        blocks = weight.parameter.numel() // patterns.shape[1]
        logits = INITIAL_DEVIATION * torch.randn(
            len(patterns), blocks, generator=generator, device=generator.device
        )
        if prior is not None:
            kept = prior[weight.name].reshape(blocks, -1).to(logits)
            logits = with_prior(logits, kept, patterns.to(logits.device), self.prior_strength)
        return nn.Parameter(logits.to(weight.parameter.device))

    def train(
        self,
        model: nn.Module,
        weights: list[Weight],
        logits: nn.ParameterList,
        patterns: Tensor,
        task: PruneTask,
    ) -> list[dict[str, float]]:
        """Minimise loss - λ·Σ(W ⊙ m̃)² over the logits; returns numbers by step."""
        history = []
        optimizer = torch.optim.AdamW(
            logits, lr=self.lr, betas=self.betas, eps=self.epsilon, weight_decay=self.weight_decay
        )
        state = {"logits": logits, "optimizer": optimizer, "generator": task.generator}
        with replaced(model, weights) as replace:
            for step in task.steps(self.steps, state):
                scale = linear(self.scale, self.final_scale, step.fraction)
                temperature = linear(self.temperature, self.final_temperature, step.fraction)
                masked, certainty = self.sampled(weights, logits, patterns, scale, temperature, task)
                replace(masked)
                loss = task.loss(model, task.batch(step))
                kept_squares = sum(weight.float().square().sum() for weight in masked.values())
                strength = linear(self.regularization, 0.0, step.fraction)
                optimizer.param_groups[0]["lr"] = cosine(self.lr, self.final_lr, step.fraction)
                optimizer.zero_grad()
                (loss - strength * kept_squares).backward()
                if self.clip:
                    nn.utils.clip_grad_norm_(logits, self.clip)
                optimizer.step()
                numbers = {
                    "loss": require_finite_loss(self, loss, step),
                    "kept_squares": float(kept_squares.detach()),
                    "certainty": certainty,
                    "temperature": temperature,
                    "scale": scale,
                }
                task.log(step, **numbers)
                history.append({"step": float(step.index + 1), **numbers})
        return history

    def sampled(
        self,
        weights: list[Weight],
        logits: nn.ParameterList,
        patterns: Tensor,
        scale: float,
        temperature: float,
        task: PruneTask,
    ) -> tuple[dict[str, Tensor], float]:
        """W ⊙ m̃ by name, in the weights' shapes and dtypes, and the mean probability of the likeliest candidate."""
        masked, likeliest, blocks = {}, 0.0, 0
        for weight, one in zip(weights, logits):
            noise = gumbel(tuple(one.shape), task.generator).to(one.device)
            p = probabilities(one, noise, scale, temperature)
            options = patterns.to(one.device)
            mask = straight_through(p, options) if self.hard else mixed(p, options)
            matrix = weight.matrix * mask.view(weight.shape).to(weight.parameter.dtype)
            masked[weight.name] = weight.as_parameter(matrix)
            likeliest += float(p.detach().amax(0).sum())
            blocks += p.shape[1]
        return masked, likeliest / blocks


COMPONENTS = (MaskLlm,)
