"""Every image strategy with every image objective of the catalogue, on every kind of backbone that it works on.

Nothing here names a component: what fits is decided by what the classes declare (`needs`, `provides`, `counts`, `backbone`), and
a plugin is covered by being in the catalogue. Sizes are the kit's: `example_parameters`, `example_batch` and its tiny backbones.
"""

import itertools

import pytest
import torch

from maskwright import MaskedTraining, adapt
from maskwright.errors import BackboneMismatch, CountsMismatch, MissingSignal, UsageError
from maskwright.registry import Registry, check_fit, keeps_equal_counts, needs_equal_counts
from maskwright.testing.backbones import NAMES, backbone, seeded
from maskwright.testing.objectives import OWN, example_batch
from maskwright.testing.rules import made

CATALOGUE = Registry(third_party=False)
STRATEGIES = [info.name for info in CATALOGUE.find(kind="mask-strategy", modality="image")]
OBJECTIVES = {info.name: info.backbone for info in CATALOGUE.find(kind="objective", modality="image")}
PAIRS = list(itertools.product(STRATEGIES, OBJECTIVES))
ROWS = 4


def networks(kind):
    """The kit's backbones of a kind: those of transformers where it has any."""
    names = NAMES.get(kind, (OWN,))
    return [name for name in names if name.startswith("transformers")] or list(names[:1])


def strategy_of(name):
    return made(CATALOGUE.component_class("mask-strategy", name))


def objective_of(name):
    return made(CATALOGUE.component_class("objective", name))


def network_of(objective, name):
    if name == OWN:
        with seeded(0):
            return objective.example_backbone(0)
    return backbone(name, 0)


def lacking(strategy, objective):
    """The signals that nobody gives: neither the objective nor the batch."""
    return strategy.needs - objective.provides - objective.needs


def refusal(strategy, objective):
    """What `check_fit` says against a pair, or None."""
    try:
        check_fit(strategy, objective, catalogue=CATALOGUE)
    except UsageError as error:
        return error
    return None


def test_the_catalogue_has_pairs_of_both_sorts():
    refused = [pair for pair in PAIRS if refusal(strategy_of(pair[0]), objective_of(pair[1]))]
    assert 0 < len(refused) < len(PAIRS)


@pytest.mark.parametrize(("strategy", "objective"), PAIRS, ids=map("+".join, PAIRS))
def test_a_pair_takes_a_step_or_is_refused_with_the_reason(strategy, objective):
    chosen, learned = strategy_of(strategy), objective_of(objective)
    missing = lacking(chosen, learned)
    unequal = needs_equal_counts(learned) and not keeps_equal_counts(chosen)
    error = refusal(chosen, learned)
    if error is None:
        assert not missing
        assert not unequal
        for name in networks(learned.backbone):
            take_a_step(chosen, learned, network_of(learned, name))
        return
    said = str(error)
    assert error.exit_code == 2
    assert repr(chosen.name) in said
    assert repr(learned.name) in said
    if missing:
        assert isinstance(error, MissingSignal)
        providers = {info.name for info in CATALOGUE.find(kind="objective") if missing <= info.provides}
        assert all(repr(word) in said for word in missing | providers)
    elif unequal:
        assert isinstance(error, CountsMismatch)
        assert "the same number of positions" in said
        fix = getattr(chosen, "exact_with", None)
        assert all(f"{name}={value!r}" in said for name, value in fix.items()) if fix else "'random'" in said
    network = network_of(learned, networks(learned.backbone)[0])
    with pytest.raises(type(error), match="^" + said[:20]):
        MaskedTraining(network, chosen, learned)


def take_a_step(strategy, objective, network):
    """Loss and gradients are finite numbers, the gradient reaches the network, and a step changes it."""
    with seeded(0):
        model = MaskedTraining(network, strategy, objective, seed=0, total_steps=2)
    batch = example_batch(objective, model.backbone, ROWS, 0)
    trained = [one for one in model.backbone.parameters() if one.requires_grad]
    before = [one.detach().clone() for one in trained]
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    out = model(**batch)
    assert out["loss"].isfinite()
    assert len(out["mask"].keep) == ROWS
    out["loss"].backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    reached = [one for one in trained if one.grad is not None and one.grad.any()]
    assert 2 * len(reached) >= len(trained)
    optimizer.step()
    assert model.steps == 1
    assert any(not torch.equal(now, then) for now, then in zip(trained, before))


def small(family, **other):
    """A tiny model of a family of transformers for images of 16 pixels, with weights that are random everywhere."""
    import transformers

    sizes = {"image_size": 16, "patch_size": 4, "num_attention_heads": 2, "num_hidden_layers": 2}
    if family == "Swin":
        sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(**sizes, **other)
    with seeded(0):
        model = getattr(transformers, f"{family}Model")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


FAMILIES = {
    "deit": lambda: small("DeiT"),
    "beit": lambda: small("Beit", use_relative_position_bias=True, drop_path_rate=0.0),
    "dinov2": lambda: small("Dinov2WithRegisters", num_register_tokens=2),
    "swin": lambda: small("Swin", window_size=4, drop_path_rate=0.0),
}
ON_PATCHES = [name for name, kind in OBJECTIVES.items() if kind in ("patch", "grid")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ON_PATCHES)
def test_a_family_of_transformers_trains_or_is_refused_before_the_first_step(objective, family):
    """With a strategy that fits. Swin is refused wherever hidden patches are left out."""
    learned, network = objective_of(objective), FAMILIES[family]()
    fitting = next(one for one in map(strategy_of, STRATEGIES) if refusal(one, learned) is None)
    error = refused(network, fitting, learned)
    if error is None:
        assert family != "swin" or learned.backbone == "grid"
        take_a_step(fitting, learned, network)
        return
    assert family == "swin" or "encode" in str(error)
    names = {type(network).__name__, type(adapt(network, "grid")).__name__}
    assert any(name in str(error) for name in names)


def refused(network, strategy, objective):
    """What is said against a network when the objective is bound to it, or None."""
    try:
        with seeded(0):
            MaskedTraining(network, strategy, objective)
    except BackboneMismatch as error:
        return error
    return None


MATCHES = [
    (objective, name)
    for objective, kind in OBJECTIVES.items()
    for name in sorted({names[0] for names in NAMES.values()} | {"transformers-swin", "transformers-resnet"})
    if name not in NAMES.get(kind, (name,))
]


@pytest.mark.parametrize(("objective", "network"), MATCHES, ids=map("-on-".join, MATCHES))
def test_a_network_of_another_kind_is_refused_by_its_name(objective, network):
    module, learned = backbone(network, 0), objective_of(objective)
    fitting = next(one for one in map(strategy_of, STRATEGIES) if refusal(one, learned) is None)
    with pytest.raises(BackboneMismatch, match=type(module).__name__):
        MaskedTraining(module, fitting, learned)
