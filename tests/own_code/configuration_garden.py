"""The configuration of a model that transformers does not know: what a checkpoint with code of its own brings."""

from transformers import LlamaConfig, PreTrainedConfig


class GardenVisionConfig(PreTrainedConfig):
    model_type = "garden_vision"

    def __init__(self, hidden_size=32, num_layers=3, image_size=28, patch_size=7, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.image_size, self.patch_size = image_size, patch_size


class GardenConfig(PreTrainedConfig):
    model_type = "garden"
    sub_configs = {"text_config": LlamaConfig, "vision_config": GardenVisionConfig}

    def __init__(self, text_config=None, vision_config=None, image_token_id=7, **kwargs):
        self.text_config = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**(text_config or {}))
        if not isinstance(vision_config, GardenVisionConfig):
            vision_config = GardenVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        self.image_token_id = image_token_id
        super().__init__(**kwargs)
