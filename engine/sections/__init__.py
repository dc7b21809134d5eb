"""The sections of a run's configuration, each validated as it is built.

Every attribute's docstring is what `--help` prints. A recipe is a yaml file of these fields; what it leaves
out keeps the default. Errors name the option as it is written on the command line.
"""

from engine.sections.checks import require, require_not_negative, require_positive, require_share
from engine.sections.data import Data, DataSet, Regions, Texts, Tokenizer
from engine.sections.inputs import ImageInput, TextInput
from engine.sections.model import Distances, Stack
from engine.sections.roles import (
    CoAttentionStack,
    DecoderStack,
    FusionStack,
    GeneratorStack,
    ImageStack,
    JointStack,
    Model,
    TextStack,
)
from engine.sections.system import System
from engine.sections.training import Buckets, Evaluation, Optimizer, Rule, Schedule, Train, Zero

__all__ = [
    "Buckets",
    "CoAttentionStack",
    "Data",
    "DataSet",
    "DecoderStack",
    "Distances",
    "Evaluation",
    "FusionStack",
    "GeneratorStack",
    "ImageInput",
    "ImageStack",
    "JointStack",
    "Model",
    "Optimizer",
    "Regions",
    "Rule",
    "Schedule",
    "Stack",
    "System",
    "TextInput",
    "TextStack",
    "Texts",
    "Tokenizer",
    "Train",
    "Zero",
    "require",
    "require_not_negative",
    "require_positive",
    "require_share",
]
