"""The ways in: pieces in one's own loop, and one module for any trainer, on a network that knows nothing of maskwright."""

import copy

import pytest
import torch
from plain_vit import PlainViT, stripes
from torch import nn

import maskwright
from maskwright import Layout, MaskedTraining
from maskwright.backbones import PatchBackbone, adapt
from maskwright.errors import BackboneMismatch, MissingColumn

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def plain(seed=0):
    torch.manual_seed(seed)
    return PlainViT()


def pieces(seed=0):
    """The strategy and the unbound objective of the examples."""
    torch.manual_seed(seed)
    return (
        maskwright.create("mask-strategy", "hard-patches", ratio=0.75),
        maskwright.create("objective", "hpm", **SMALL),
    )


# -- a network is a backbone by its methods ----------------------------------------------------------------------


def test_a_module_with_the_methods_is_a_backbone_as_it_is():
    vit = plain()
    assert adapt(vit, PatchBackbone) is vit
    assert isinstance(vit, PatchBackbone)
    assert PatchBackbone not in type(vit).__mro__


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("patches", r"patches\(pixels \[B, C, H, W\]\) -> \[B, N, D\]"),
        ("prefix", r"prefix\(batch_size\) -> \[B, P, D\]"),
        ("encode", r"encode\(tokens \[B, P\+K, D\], levels=\(\)\) -> \[B, P\+K, D\]"),
    ],
)
def test_a_module_that_lacks_a_method_is_told_its_name_and_shapes(name, shapes):
    lacking = type("Lacking", (PlainViT,), {name: property(lambda self: self.no_such_thing)})
    with pytest.raises(BackboneMismatch, match=f"Lacking is no PatchBackbone: it lacks {shapes}") as caught:
        maskwright.create("objective", "mae", **SMALL).bind(lacking())
    assert "ViTModel" in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_lacking_method_is_named():
    with pytest.raises(BackboneMismatch) as caught:
        adapt(nn.Linear(2, 2), "patch")
    assert all(
        word in str(caught.value) for word in ("patches(", "prefix(", "encode(", "grid:", "patch_size:")
    )
    with pytest.raises(BackboneMismatch, match=r"Linear is no TokenBackbone.*embed\(ids.*logits\("):
        adapt(nn.Linear(2, 2), "token")


# -- 1: pieces in one's own loop ---------------------------------------------------------------------------------


def test_pieces_train_a_plain_network_in_a_plain_loop():
    vit = plain()
    before = copy.deepcopy(vit.state_dict())
    strategy, objective = pieces()
    objective = objective.bind(vit)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3)
    batch = {"pixels": stripes(64)}
    generator = torch.Generator().manual_seed(0)
    steps, losses, hidden = 60, [], []
    for step in range(steps):
        progress = (step + 1) / steps
        signals = objective.signals(batch)
        mask = strategy.draw(Layout.of(vit, batch), signals=signals, progress=progress, generator=generator)
        loss = objective(batch, mask, signals=signals, progress=progress)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        objective.after_step(progress)
        losses.append(float(loss.parts["pixels"].detach()))
        hidden.append(mask)
    assert all(mask.shape == (64, 4, 4) and (mask.counts == 4).all() for mask in hidden)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(not torch.equal(before[name], value) for name, value in vit.state_dict().items())
    # At the end half of the hidden patches are the teacher's hardest.
    hardest = signals["patch_loss"].topk(6).indices
    assert not hidden[-1].flatten().keep.gather(1, hardest).any()


# -- 2: one module for any trainer -------------------------------------------------------------------------------


def test_one_module_trains_in_a_plain_loop():
    model = MaskedTraining(plain(), *pieces(), total_steps=60, seed=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    pixels, losses = stripes(64), []
    for _ in range(60):
        output = model(pixels=pixels)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(float(output["parts"]["pixels"].detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (model.draws, model.steps, model.current_progress()) == (60, 60, 1.0)


class Stripes(torch.utils.data.Dataset):
    def __init__(self, count=48):
        self.pixels = stripes(count)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixels": self.pixels[index], "labels": torch.tensor(index % 3)}


def trainer(folder, model, masks, **arguments):
    from transformers import Trainer, TrainingArguments

    model.mask_drawn = lambda mask: masks.append(mask.keep.clone())
    settings = {
        "max_steps": 12,
        "save_steps": 6,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Stripes(),
        eval_dataset=Stripes(16),
    )


@pytest.fixture
def quiet(capsys):
    """transformers.Trainer prints its logs."""
    yield
    capsys.readouterr()


def training_model(seed=0):
    return MaskedTraining(plain(seed), *pieces(seed), total_steps=12, seed=5)


def test_transformers_trainer_trains_it_and_a_resumed_run_draws_the_same_masks(tmp_path, quiet):
    masks, again = [], []
    model = training_model()
    whole = trainer(tmp_path / "whole", model, masks)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert (model.steps, len(masks)) == (12, 12)

    resumed = training_model(seed=1)
    second = trainer(tmp_path / "again", resumed, again)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert len(again) == 6
    assert all(torch.equal(one, other) for one, other in zip(masks[6:], again))
    assert not any(torch.equal(one, other) for one, other in zip(masks, again))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, resumed.state_dict()[name], atol=1e-6), name


def test_transformers_trainer_accumulates_the_mean_and_evaluates(tmp_path, quiet):
    masks = []
    model = training_model()
    running = trainer(
        tmp_path,
        model,
        masks,
        max_steps=3,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=16,
        save_strategy="no",
    )
    running.train()
    assert (model.steps, model.draws) == (3, 9)
    # A sum over three batches would be three times as large as one batch's loss.
    with torch.no_grad():
        one = float(model(pixels=stripes(16))["loss"])
    logged = [line["loss"] for line in running.state.log_history if "loss" in line]
    assert all(0.5 * one < loss < 1.6 * one for loss in logged)
    evaluated = running.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(running.evaluate()["eval_loss"])
    assert model.draws == 10


def test_a_batch_without_the_column_is_told_what_is_missing_and_what_a_trainer_may_have_dropped():
    with pytest.raises(
        MissingColumn, match=r"'hpm' needs the batch column 'pixels'; this batch has 'labels'"
    ) as e:
        training_model()(labels=torch.zeros(4))
    assert "remove_unused_columns=False" in str(e.value)
