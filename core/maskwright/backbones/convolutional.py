"""Adapters for the convolutional networks of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from maskwright.backbones import ConvBackbone, adapter


class TransformersConvNet(nn.Module):
    """A ResNet or ConvNeXt of transformers as a ConvBackbone. `model` is the wrapped model, for saving."""

    def __init__(self, model: Any, *, stem: nn.Module, stem_stride: int, stage_strides: list[int]) -> None:
        super().__init__()
        self.model = model
        config = model.config
        # Held in a list and a tuple: registering them again would name their parameters twice.
        self._stem = [stem]
        self._stages = tuple(model.encoder.stages)
        strides = [stem_stride]
        for stride in stage_strides:
            strides.append(strides[-1] * stride)
        self.strides = tuple(strides)
        stem_width = getattr(config, "embedding_size", config.hidden_sizes[0])
        self.widths = (stem_width, *config.hidden_sizes)
        self.channels = config.num_channels

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        return self._stages

    def stem(self, pixels: Tensor) -> Tensor:
        return self._stem[0](pixels)


@adapter(ConvBackbone, "ResNetModel", "ConvNextModel", "ConvNextV2Model")
def _conv_backbone(module: Any) -> nn.Module | None:
    for name in ("resnet", "convnext", "convnextv2"):
        module = getattr(module, name, module)
    config: Any = getattr(module, "config", None)
    kind = getattr(config, "model_type", "")
    if kind == "resnet":
        first = 2 if config.downsample_in_first_stage else 1
        return TransformersConvNet(
            module,
            stem=module.embedder,
            stem_stride=4,
            stage_strides=[first] + [2] * (len(config.depths) - 1),
        )
    if kind in ("convnext", "convnextv2"):
        return TransformersConvNet(
            module,
            stem=module.embeddings,
            stem_stride=config.patch_size,
            stage_strides=[1] + [2] * (len(config.depths) - 1),
        )
    return None
