"""Frozen teachers: what they show of themselves, of every architecture, and what keeps them out of the training."""

import copy

import pytest
import torch
import transformers
from torch import nn

from maskwright.backbones import adapt
from maskwright.backbones.defaults import vision_transformer
from maskwright.backbones.teachers import VisionTeacher, make_watchable, watch
from maskwright.errors import BackboneMismatch, BadModel, BadParameter, CheckpointError

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 28, "patch_size": 7}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def student(grid_of=16, patch_size=4, channels=3):
    return adapt(
        vision_transformer(
            image_size=grid_of, patch_size=patch_size, channels=channels, width=16, depth=2, heads=2
        ),
        "patch",
    )


def made(name, **settings):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{name}Model")(config).eval()


def swin(window=4):
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2]}
    return transformers.SwinModel(transformers.SwinConfig(image_size=32, window_size=window, **sizes)).eval()


def mae():
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, **DECODER)).eval()


def clip():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SIZES, text_config=text)).eval()


WITH_CLASS_TOKEN = {
    "ViT": (1, lambda: made("ViT")),
    "ViT with a head": (1, lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))),
    "DeiT": (2, lambda: made("DeiT")),
    "BEiT": (1, lambda: made("Beit", use_relative_position_bias=True)),
    "DINOv2": (1, lambda: made("Dinov2")),
    "DINOv2 with registers": (5, lambda: made("Dinov2WithRegisters")),
    "DINOv3": (1, lambda: made("DINOv3ViT")),
    "CLIP's vision tower": (1, lambda: made("CLIPVision")),
    "CLIP": (1, clip),
    "MAE": (1, mae),
}
WITHOUT = {"I-JEPA": lambda: made("IJepa"), "SigLIP": lambda: made("SiglipVision"), "Swin": swin}


def pixels(count=2, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def as_seen(teacher, images):
    """The teacher's own model, asked in the way transformers documents."""
    model = copy.deepcopy(teacher.model)
    model.set_attn_implementation("eager")
    own = nn.functional.interpolate(images, size=teacher.size, mode="bicubic", antialias=True)
    outputs = []
    for block in teacher.blocks:
        name = next(name for name, module in teacher.model.named_modules() if module is block)
        model.get_submodule(name).register_forward_hook(lambda module, given, output: outputs.append(output))
    told = {k: v.expand(len(own), -1) if isinstance(v, torch.Tensor) else v for k, v in teacher.told.items()}
    seen = model(pixel_values=own, output_attentions=True, **told)
    return seen, [output[0] if isinstance(output, tuple) else output for output in outputs]


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
def test_it_shows_what_transformers_shows(name):
    prefix, make = WITH_CLASS_TOKEN[name]
    teacher = VisionTeacher(make(), student())
    assert (teacher.depth, teacher.width, teacher.prefix) == (3, 16, prefix)
    seen = teacher(pixels(), levels=(0, -1), projections=(1, 2), attention=True)
    expected, outputs = as_seen(teacher, pixels())
    assert list(seen.levels) == [0, 2]
    for index, level in seen.levels.items():
        assert torch.allclose(level, outputs[index], atol=1e-5)
    assert torch.allclose(seen.final, expected.last_hidden_state, atol=1e-5)
    class_row = expected.attentions[-1].mean(1)[:, 0, prefix:]
    assert seen.class_attention.shape == (2, 16)
    assert torch.allclose(seen.class_attention, class_row, atol=1e-5)
    for index, one in seen.projections.items():
        assert one.query.shape == one.key.shape == one.value.shape == (2, 2, prefix + 16, 8)
        scores = one.query @ one.key.transpose(2, 3) * one.scale + (0 if one.bias is None else one.bias)
        assert torch.allclose(scores.softmax(-1), expected.attentions[index], atol=1e-5)


@pytest.mark.parametrize("name", WITHOUT)
def test_one_without_a_class_token_shows_all_but_its_attention(name):
    teacher = VisionTeacher(WITHOUT[name](), student())
    assert not teacher.has_class_token
    seen = teacher(pixels(), levels=range(teacher.depth), projections=(-1,))
    expected, outputs = as_seen(teacher, pixels())
    assert torch.allclose(seen.final, expected.last_hidden_state, atol=1e-5)
    assert all(torch.allclose(seen.levels[i], outputs[i], atol=1e-5) for i in range(teacher.depth))
    assert seen.class_attention is None
    with pytest.raises(BackboneMismatch, match="no class token"):
        teacher(pixels(), attention=True)


def test_windows_are_no_relations():
    teacher = VisionTeacher(swin(window=2), student())
    assert teacher(pixels(), levels=(-1,)).final.shape == (2, 16, 16)
    with pytest.raises(BackboneMismatch, match="within windows"):
        teacher(pixels(), projections=(-1,))


def test_positions_are_in_the_order_of_the_student():
    # The mean over a patch is what a linear embedding of it sees: a patch of light is found at the same place.
    teacher = VisionTeacher(mae(), student())
    dark = torch.zeros(1, 3, 16, 16)
    light = dark.clone()
    light[:, :, 4:8, 8:12] = 3.0
    change = (teacher(light, levels=(0,)).levels[0] - teacher(dark, levels=(0,)).levels[0]).norm(dim=-1)
    assert change[0, 1:].argmax() == 6


# -- it stays out of the training --------------------------------------------------------------------------------


class Learner(nn.Module):
    """A student beside its teacher."""

    def __init__(self, model):
        super().__init__()
        self.student = nn.Linear(2, 2)
        self.teacher = VisionTeacher(model, student())


def test_nothing_of_it_is_trained_saved_or_switched():
    learner = Learner(made("ViT", attention_probs_dropout_prob=0.5))
    assert {name.partition(".")[0] for name, _ in learner.named_parameters()} == {"student"}
    assert [name for name in learner.state_dict() if "teacher" in name] == ["teacher._extra_state"]
    learner.train()
    assert torch.equal(learner.teacher(pixels()).final, learner.teacher(pixels()).final)
    assert not learner.teacher(pixels().requires_grad_()).final.requires_grad


def test_the_users_module_is_left_as_it_was():
    model = made("ViT").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    teacher = VisionTeacher(model, student())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        model.layernorm.weight.add_(1)
    assert torch.equal(teacher.model.layernorm.weight, before["layernorm.weight"])


def test_it_moves_with_the_student_and_is_copied_with_it():
    learner = Learner(made("ViT")).double()
    assert learner.teacher(pixels().double()).final.dtype == torch.float64
    other = copy.deepcopy(learner)
    assert other.teacher.model is not learner.teacher.model
    assert torch.equal(other.teacher(pixels().double()).final, learner.teacher(pixels().double()).final)


def test_a_checkpoint_of_another_teacher_is_refused():
    one, same, other = Learner(model := made("ViT")), Learner(model), Learner(made("ViT"))
    same.load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match="not the one that this checkpoint was trained with"):
        other.load_state_dict(one.state_dict())


# -- folders, and what is refused --------------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_was_saved_and_draws_nothing(tmp_path):
    model = made("ViT")
    model.save_pretrained(tmp_path / "vit")
    mae().save_pretrained(tmp_path / "mae")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    teacher = VisionTeacher(str(tmp_path / "vit"), student())
    VisionTeacher(tmp_path / "mae", student())
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(teacher(pixels()).final, VisionTeacher(model, student())(pixels()).final)


def test_what_cannot_teach_is_refused(tmp_path):
    with pytest.raises(BadModel, match="does not exist"):
        VisionTeacher(tmp_path / "nothing", student())
    with pytest.raises(BadModel, match=r"no config\.json"):
        VisionTeacher(tmp_path, student())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for model in (nn.Linear(2, 2), transformers.BertModel(transformers.BertConfig(**sizes))):
        with pytest.raises(BackboneMismatch, match="cannot be a teacher"):
            VisionTeacher(model, student())
    convolutions = transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)
    with pytest.raises(BackboneMismatch, match="4 × 4 patches"):
        VisionTeacher(transformers.ConvNextModel(convolutions), student())
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    own_attention = transformers.Swinv2Model(transformers.Swinv2Config(image_size=32, **sizes))
    with pytest.raises(BackboneMismatch, match="computes attention on its own"):
        VisionTeacher(own_attention, student())
    with pytest.raises(BackboneMismatch, match="3 channels, the student of 1"):
        VisionTeacher(made("ViT"), student(channels=1))
    with pytest.raises(BadParameter, match="'clip'"):
        VisionTeacher(made("ViT"), student(), normalization="openai")
    with pytest.raises(BadParameter, match="three colours, the images have 1"):
        VisionTeacher(made("ViT", num_channels=1), student(channels=1), normalization="clip")


def test_a_grid_that_the_teacher_cannot_see_gives_one_error():
    class Fixed(transformers.ViTModel):
        def forward(self, pixel_values, **told):
            if pixel_values.shape[-1] != 28:
                raise ValueError("28 pixels, please")
            return super().forward(pixel_values, **told)

    fixed = Fixed(transformers.ViTConfig(**SIZES))
    assert VisionTeacher(fixed, student())(pixels()).final.shape == (2, 17, 16)
    with pytest.raises(
        BackboneMismatch, match=r"student's 8 × 8 patches: at 56 × 56 pixels it says: 28 pixels"
    ):
        VisionTeacher(fixed, student(grid_of=32))


@pytest.mark.parametrize("name", ["ViT", "BEiT", "DINOv2", "CLIP", "MAE", "DeiT"])
def test_another_grid_is_seen_by_interpolating_positions(name):
    one = student(grid_of=24)
    seen = VisionTeacher(WITH_CLASS_TOKEN[name][1](), one)(torch.randn(1, 3, 24, 24), attention=True)
    assert seen.class_attention.shape == (1, 36)


# -- watching a student -------------------------------------------------------------------------------------------


def test_a_students_projections_have_gradients():
    one = student()
    make_watchable(one.model)
    tokens = one.patches(pixels()) + one.positions
    expected = one.encode(tokens)
    with watch(blocks=(1,)) as seen:
        assert torch.equal(one.encode(tokens), expected)
    assert list(seen) == [1]
    (seen[1].query @ seen[1].key.transpose(2, 3)).square().mean().backward()
    assert one.model.layers[1].attention.q_proj.weight.grad.abs().sum() > 0
    with watch() as every:
        one.encode(tokens)
    assert list(every) == [0, 1]
