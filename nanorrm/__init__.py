"""nanorrm: a reward model that reasons, small enough to read in a day."""

from nanorrm.config import EngineConfig, JudgeSettings, UserError
from nanorrm.data.read import read_pairs, read_rankings
from nanorrm.engine.engine import Completion, Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge.backends import EngineBackend, ReplayBackend
from nanorrm.judge.endpoint import EndpointBackend
from nanorrm.judge.judge import Judge
from nanorrm.judge.open import open_judge
from nanorrm.judge.verdict import Verdict
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.tokenizer import Tokenizer
from nanorrm.model.transformer import Transformer
from nanorrm.rank.play import JudgedPlay
from nanorrm.rank.rating import bradley_terry, elo, win_rate
from nanorrm.rank.tournament import knockout, random_opponents, round_robin, run_tournaments, swiss
from nanorrm.records import Pair, Ranking

__all__ = [
    "Completion", "EndpointBackend", "Engine", "EngineBackend", "EngineConfig", "Judge",
    "JudgeSettings", "JudgedPlay", "ModelConfig", "Pair", "Ranking", "ReplayBackend",
    "SamplingParams", "Tokenizer", "Transformer", "UserError", "Verdict", "bradley_terry",
    "elo", "knockout", "open_judge", "random_opponents", "read_pairs", "read_rankings",
    "round_robin", "run_tournaments", "swiss", "win_rate",
]  # fmt: skip
