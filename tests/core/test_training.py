"""`MaskedTraining`: what it counts, when its teachers follow, and whose masks it draws."""

import copy
import gc
import pickle
from typing import ClassVar

import attrs
import pytest
import torch
from plain_vit import PlainViT, stripes
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import maskwright
from maskwright import BoundObjective, Loss, Mask, MaskedTraining
from maskwright.errors import BadParameter, MissingColumn, MissingSignal

SMALL = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


class Watched(BoundObjective):
    """Regresses visible pixels' mean; records what it is told."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, 1)
        self.asked = self.followed = ()
        self.drawn = ()

    def signals(self, batch):
        self.asked += (self.training,)
        return {"patch_loss": batch["pixels"].flatten(2).mean(1)[:, :16]}

    def forward(self, batch, mask, *, signals=None, progress=1.0, generator=None):
        self.drawn += (torch.rand((), generator=generator).item(),)
        self.seen = (signals, progress)
        total = self.head(self.backbone.patches(batch["pixels"]))[mask.flatten().keep].square().mean()
        return Loss(total, {"all": total})

    def after_step(self, progress):
        self.followed += (progress,)


@attrs.frozen
class Watch:
    kind: ClassVar[str] = "objective"
    name: ClassVar[str] = "watch"
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    provides: ClassVar[frozenset[str]] = frozenset({"patch_loss"})
    backbone: ClassVar[str] = "patch"

    def bind(self, backbone):
        return Watched(backbone)


def strategy(name="random", **parameters):
    return maskwright.create("mask-strategy", name, **parameters)


def watched(**arguments):
    torch.manual_seed(0)
    return MaskedTraining(PlainViT(depth=1), arguments.pop("strategy", strategy()), Watch(), **arguments)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def step(model, *optimizers, forwards=1):
    for _ in range(forwards):
        model(pixels=stripes(4))["loss"].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


# -- steps, draws and progress -----------------------------------------------------------------------------------


def test_steps_become_progress_and_teachers_follow_after_each():
    model = watched(total_steps=4)
    optimizer = sgd(model)
    seen = []
    for _ in range(6):
        step(model, optimizer)
        seen.append(model.bound.seen[1])
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert model.bound.followed == (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)


def test_without_total_steps_progress_is_the_callers():
    model = watched()
    optimizer = sgd(model)
    model.progress = 0.3
    step(model, optimizer)
    assert model.bound.seen[1] == 0.3
    assert model.bound.followed == (0.3,)


def test_accumulated_batches_are_draws_of_one_step():
    model = watched(total_steps=10)
    step(model, sgd(model), forwards=3)
    assert (model.draws, model.steps) == (3, 1)


def test_signals_are_asked_for_once_a_step_and_handed_on():
    model = watched(strategy=strategy("hard-patches"))
    step(model, sgd(model))
    assert len(model.bound.asked) == 1
    assert torch.equal(
        model.bound.seen[0]["patch_loss"], model.bound.signals({"pixels": stripes(4)})["patch_loss"]
    )


def test_optimizers_of_other_models_do_not_count():
    model, other = watched(), nn.Linear(2, 2)
    optimizer = sgd(other)
    model(pixels=stripes(4))["loss"].backward()
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert (model.steps, model.bound.followed) == (0, ())


def test_an_optimizer_counts_wherever_its_parameters_of_the_model_stand():
    model, other = watched(), nn.Linear(2, 2)
    step(
        model, torch.optim.SGD([{"params": other.parameters()}, {"params": [model.bound.head.bias]}], lr=0.1)
    )
    assert model.steps == 1


def test_two_optimizers_after_one_forward_are_one_step():
    model = watched()
    both = (
        torch.optim.SGD(model.bound.backbone.parameters(), lr=0.1),
        torch.optim.Adam(model.bound.head.parameters()),
    )
    for _ in range(3):
        step(model, *both)
    assert (model.steps, len(model.bound.followed)) == (3, 3)


def test_steps_without_a_forward_do_not_count():
    model = watched()
    optimizer = sgd(model)
    step(model, optimizer)
    optimizer.step()
    assert model.steps == 1
    model.eval()
    model(pixels=stripes(4))["loss"].backward()
    optimizer.step()
    assert (model.steps, model.draws) == (1, 1)


def test_accelerates_optimizer_and_its_wrapped_model_count_once():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # a test before this one may have set another precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = watched(total_steps=10)
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    for _ in range(4):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(pixels=stripes(4))["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert (model.steps, model.draws) == (2, 4)
    assert model.bound.followed == (0.1, 0.2)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model = watched()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    for poison in (1.0, float("inf"), 1.0):
        loss = model(pixels=stripes(4))["loss"] * poison
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (model.steps, model.draws) == (2, 3)


def test_a_scheduler_does_not_make_steps_count_twice():
    model = watched()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(2):
        step(model, optimizer)
        schedule.step()
    assert model.steps == 2


def test_models_that_are_gone_leave_other_optimizers_alone():
    other, models = watched(), [watched() for _ in range(5)]
    optimizer = sgd(other)
    step(other, optimizer)
    del models
    gc.collect()
    for _ in range(2):
        step(other, optimizer)
    assert other.steps == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_follows_its_own_optimizer_only(copied):
    torch.manual_seed(0)
    objective = maskwright.create("objective", "hpm", **SMALL)
    model = MaskedTraining(PlainViT(depth=1), strategy("hard-patches"), objective, total_steps=9)
    model.mask_drawn = lambda mask: None
    optimizer = sgd(model)
    step(model, optimizer)
    twin = copied(model)
    assert (twin.steps, twin.draws, twin.mask_drawn) == (1, 1, None)
    assert twin.bound.teacher.train() is twin.bound.teacher
    before = copy.deepcopy(twin.state_dict())
    step(model, optimizer)
    assert (model.steps, twin.steps) == (2, 1)
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    step(twin, sgd(twin))
    assert (model.steps, twin.steps) == (2, 2)
    assert all(
        torch.allclose(a, b)
        for a, b in zip(model.bound.teacher.parameters(), twin.bound.teacher.parameters())
    )


@pytest.mark.parametrize("arguments", [{"seed": -1}, {"total_steps": 0}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(BadParameter, match=r"seed=-1|total_steps=0"):
        watched(**arguments)


# -- masks -------------------------------------------------------------------------------------------------------


def masks_of(model, count):
    return [model(pixels=stripes(4))["mask"].keep for _ in range(count)]


def test_a_seed_gives_its_masks_and_each_draw_another():
    one, same, other = (masks_of(watched(seed=seed), 5) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert len({str(keep.tolist()) for keep in one + other}) == 10


def test_a_checkpoint_goes_on_with_the_masks_that_would_have_come():
    model = watched(total_steps=10)
    optimizer = sgd(model)
    step(model, optimizer)
    step(model, optimizer, forwards=2)
    state = copy.deepcopy(model.state_dict())
    later = masks_of(model, 3)
    resumed = watched(total_steps=10)
    resumed.load_state_dict(state)
    assert (resumed.steps, resumed.draws) == (2, 3)
    assert all(torch.equal(a, b) for a, b in zip(later, masks_of(resumed, 3)))


def test_the_state_is_tensors_only_and_survives_safetensors(tmp_path):
    model = watched(seed=1)
    step(model, sgd(model))
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
    save_model(model, str(tmp_path / "model.safetensors"))
    other = watched(seed=1)
    missing, unexpected = load_model(other, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert (other.steps, other.draws) == (1, 1)


def test_accelerate_saves_and_loads_the_counts(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = watched()
    wrapped, optimizer = accelerator.prepare(model, sgd(model))
    step(wrapped, optimizer)
    accelerator.save_state(str(tmp_path), safe_serialization=True)
    later = masks_of(model, 2)
    step(wrapped, optimizer)
    accelerator.load_state(str(tmp_path))
    assert (model.steps, model.draws) == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip(later, masks_of(model, 2)))


def test_evaluation_draws_the_same_masks_again_and_counts_nothing():
    model = watched()
    step(model, sgd(model))
    model.eval()
    first, second = masks_of(model, 2)
    assert torch.equal(first, second)
    assert (model.draws, model.steps) == (1, 1)
    assert model.bound.drawn[-1] == model.bound.drawn[-2]


def test_the_objectives_numbers_are_not_the_masks_and_are_never_the_same_twice():
    model = watched()
    masks_of(model, 6)
    assert len(set(model.bound.drawn)) == 6
    mask_numbers = torch.rand((), generator=model._generator(torch.device("cpu"), 0)).item()
    own_numbers = torch.rand((), generator=model._generator(torch.device("cpu"), 1)).item()
    assert mask_numbers != own_numbers


def test_the_global_generator_is_left_alone():
    model = watched()
    before = torch.random.get_rng_state()
    masks_of(model, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_observer_sees_the_mask_that_is_used():
    model, seen = watched(), []
    model.mask_drawn = seen.append
    used = model(pixels=stripes(4))["mask"]
    assert seen == [used]
    assert isinstance(used, Mask)


# -- fit ---------------------------------------------------------------------------------------------------------


def test_a_strategy_without_its_signal_is_refused_when_the_model_is_made():
    mae = maskwright.create("objective", "mae", **SMALL)
    with pytest.raises(
        MissingSignal, match=r"'hard-patches' needs the signal 'patch_loss'.*'mae'.*'hpm'"
    ) as caught:
        MaskedTraining(PlainViT(), strategy("hard-patches"), mae)
    assert caught.value.exit_code == 2


def test_a_batch_column_can_be_the_signal():
    mae = maskwright.create("objective", "mae", **SMALL)
    model = MaskedTraining(PlainViT(), strategy("hard-patches", alpha_start=1.0), mae, columns={"patch_loss"})
    patch_loss = torch.arange(16.0).repeat(4, 1)
    mask = model(pixels=stripes(4), patch_loss=patch_loss)["mask"]
    assert mask.flatten().visible_indices().tolist() == [[0, 1, 2, 3]] * 4
    with pytest.raises(MissingColumn, match=r"'hard-patches' needs the batch column 'patch_loss'"):
        model(pixels=stripes(4))


# -- several processes -------------------------------------------------------------------------------------------


def trained_rank(rank, world, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model, masks = trained(rank, world, lambda model: nn.parallel.DistributedDataParallel(model))
    save_file({**model.state_dict(), "masks": torch.stack(masks)}, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def trained(rank, world, wrap):
    torch.manual_seed(0)
    objective = maskwright.create("objective", "hpm", **SMALL)
    model = MaskedTraining(PlainViT(depth=1), strategy("hard-patches"), objective, total_steps=4, seed=2)
    wrapped, masks = wrap(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for index in range(4):
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        output = wrapped(pixels=stripes(8, seed=index)[rows])
        masks.append(output["mask"].keep)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
    return model, masks


def test_two_processes_train_as_one_does_on_the_global_batch(tmp_path):
    alone, masks = trained(0, 1, lambda model: model)
    torch.multiprocessing.spawn(trained_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert torch.equal(torch.stack(masks), torch.cat([state.pop("masks") for state in ranks], dim=1))
    for name, value in alone.state_dict().items():
        for state in ranks:
            assert torch.allclose(value, state[name], atol=1e-5), name
