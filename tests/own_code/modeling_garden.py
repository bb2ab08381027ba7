"""The model of a checkpoint with code of its own: a picture's patches join the text where its tokens stand."""

import torch
from torch import nn
from transformers import GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_garden import GardenConfig


class GardenBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.narrow(torch.relu(self.wide(self.norm(hidden))))


class GardenTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, side = config.hidden_size, config.image_size // config.patch_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.positions = nn.Parameter(torch.randn(side * side, width))
        self.blocks = nn.ModuleList(GardenBlock(width) for _ in range(config.num_layers))

    def forward(self, pixel_values):
        hidden = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class GardenPreTrained(PreTrainedModel):
    config_class = GardenConfig
    base_model_prefix = "model"
    _supports_sdpa = True


class GardenModel(GardenPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = GardenTower(config.vision_config)
        self.projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def get_image_features(self, pixel_values, return_dict=True):
        features = self.projector(self.vision_tower(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=features)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, past_key_values=None, **kwargs):
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).pooler_output.to(embeddings.dtype)
            at_image = (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(at_image, features)
        return self.language_model(
            inputs_embeds=embeddings, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )


class GardenForConditionalGeneration(GardenPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = GardenModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        return inputs | ({"pixel_values": pixel_values} if is_first_iteration else {})
