"""Contract tests: what every part and recipe of the zoo must do, for the built-in ones and for plugins alike.

    from zoo.testing import check_plugin
    from zoo_example import PLUGIN

    def test_contracts() -> None:
        check_plugin(PLUGIN)

Each function raises ``AssertionError`` with one line that names the part and the broken promise. They need no network
and no weights: parts are built at ``scale`` with weights drawn at random, large enough that a forgotten norm or mask
shows.
"""

from __future__ import annotations

from zoo.testing.codecs import check_patch_codec
from zoo.testing.config import check_config
from zoo.testing.data_tokenizers import check_data_tokenizer
from zoo.testing.denoisers import check_denoiser
from zoo.testing.imports import check_imports
from zoo.testing.mask_decoders import check_mask_decoder
from zoo.testing.output_connectors import check_output_connector
from zoo.testing.parts import check_connector, check_decoder, check_encoder, check_text_encoder
from zoo.testing.plugins import check_component, check_light, check_plugin
from zoo.testing.recipes import check_objective, check_published, check_recipe
from zoo.testing.trunks import check_trunk

__all__ = [
    "check_component",
    "check_config",
    "check_connector",
    "check_data_tokenizer",
    "check_decoder",
    "check_denoiser",
    "check_encoder",
    "check_imports",
    "check_light",
    "check_mask_decoder",
    "check_objective",
    "check_output_connector",
    "check_patch_codec",
    "check_plugin",
    "check_published",
    "check_recipe",
    "check_text_encoder",
    "check_trunk",
]
