"""Config of InternLM-XComposer2-4KHD and -2.5 <-> a checked transformers configuration.

Their official config.json names the same architecture as XComposer2's and says nothing of tiles, ranks or LoRAs, which
the official code hard-codes. The weights' shapes do: `facts.completed` reads them. It knows nothing of modules.
"""

from __future__ import annotations

from dataclasses import field

from vlm.configuration import not_multiple, not_positive
from vlm.internlm_xcomposer2.configuration import InternLMXComposer2Config
from vlm.internlm_xcomposer2_hd.tiling import Tiling

TASK_LORAS = {"sft": 256, "dpo": 256, "web": 512}
"""Ranks of XComposer2.5's further LoRAs. Source: lmdeploy:lmdeploy/vl/tools/merge_xcomposer2d5_task.py."""


class InternLMXComposer2HDConfig(InternLMXComposer2Config):
    """Sizes and constants of a model for tiled images; the defaults are XComposer2.5-7B's.

    `img_size` is the side of a tile. `hd_num` is how many tiles an image may have, `hd_num_several` where a prompt has
    several; `hd_upscale` lets small images fill them too, and `hd_padding` says where white rows go. `task_loras` are
    the ranks of the further LoRAs by name; `video_mem_width`, where not 0, adds 2.5-OL's projector of video memory.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    img_size: int = 560
    plora_wqkv_rank: int = 256
    plora_wqkv_alpha: int = 256
    task_loras: dict[str, int] = field(default_factory=lambda: dict(TASK_LORAS))
    video_mem_width: int = 0
    hd_num: int = 24
    hd_num_several: int = 6
    hd_upscale: bool = False
    hd_padding: str = "bottom"

    @property
    def tiling(self) -> Tiling:
        """How images are cut."""
        return Tiling(
            tile_px=self.img_size,
            positions_per_side=self.img_size // self.vision_config["patch_size"] // 2,
            max_tiles=self.hd_num,
            max_tiles_of_several=self.hd_num_several,
            upscales=self.hd_upscale,
            centred=self.hd_padding == "both",
        )

    @property
    def image_tokens(self) -> int:
        """Positions that the smallest image takes, of one tile."""
        return self.tiling.num_positions(1, 1)

    @property
    def merged_width(self) -> int:
        """Width of four patches in one position."""
        return 4 * self.vision_config["hidden_size"]

    def _malformed(self) -> list[str]:
        own = not_positive(vars(self), ("plora_wqkv_rank", "plora_wqkv_alpha", "hd_num", "hd_num_several"))
        ranks = not_positive(self.task_loras, self.task_loras)
        if not isinstance(self.video_mem_width, int) or self.video_mem_width < 0:
            own.append(f"video_mem_width is {self.video_mem_width!r}; it must be a whole number of at least 0")
        return super()._malformed() + own + [f"task_loras: {problem}" for problem in ranks]

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        unknown = sorted(self.task_loras.keys() - TASK_LORAS.keys())
        if unknown:
            problems.append(f"task_loras has {', '.join(unknown)}; known are {', '.join(TASK_LORAS)}")
        if self.hd_padding not in ("bottom", "both"):
            problems.append(f"hd_padding is {self.hd_padding!r}; white rows go to the 'bottom' or to 'both' sides")
        patch = self.vision_config["patch_size"]
        sides = {"img_size": self.img_size, "two patches": 2 * patch}
        return problems + not_multiple(sides, "img_size", "two patches")
