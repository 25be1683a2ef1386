"""nanorrm: a reward model that reasons, small enough to read in a day."""

from nanorrm.config import EngineConfig, ModelConfig, UserError
from nanorrm.data import Pair, read_pairs
from nanorrm.engine import Completion, Engine
from nanorrm.judge import Judge, Verdict
from nanorrm.model import Transformer
from nanorrm.sampling import SamplingParams
from nanorrm.tokenizer import Tokenizer

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Judge",
    "ModelConfig",
    "Pair",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
    "UserError",
    "Verdict",
    "read_pairs",
]
