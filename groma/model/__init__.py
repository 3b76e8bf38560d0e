"""The model: encoder → proposer → regions → splicer → language model, one thought a file.

Importing this package registers Groma with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from groma.model.configuration import GromaConfig, ProposerConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor

AutoConfig.register("groma", GromaConfig, exist_ok=True)
AutoConfig.register("groma_proposer", ProposerConfig, exist_ok=True)
AutoModelForImageTextToText.register(GromaConfig, GromaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(GromaConfig, GromaProcessor, exist_ok=True)

__all__ = ["GromaConfig", "GromaForConditionalGeneration", "ProposerConfig"]
