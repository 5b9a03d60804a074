# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Self-questioning and preference training for medical vision-language models, on top of TRL.

The public names are imported when they are first used, so that `import medst_trl` and `medst --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from medst_trl.policy.auto_classes import register_with_transformers


__version__ = "0.1.0"

_MODULE_OF = {
    "CandidateGenerator": "medst_trl.selftrain.candidates",
    "DataCollatorForSelfQuestioning": "medst_trl.training.collator",
    "MultimodalDPOConfig": "medst_trl.training.dpo",
    "MultimodalDPOTrainer": "medst_trl.training.dpo",
    "PairwiseJudge": "medst_trl.selftrain.judge.pairwise",
    "PrototypeExtractor": "medst_trl.policy.prototype_llava",
    "SelfQuestioningConfig": "medst_trl.training.sft",
    "SelfQuestioningTrainer": "medst_trl.training.sft",
    "adapter_config": "medst_trl.policy.adapters",
    "build_preferences": "medst_trl.selftrain.preferences",
    "load_policy": "medst_trl.policy.loading",
    "score_vqa": "medst_trl.evaluation.scoring",
}

__all__ = [*_MODULE_OF, "__version__"]

if TYPE_CHECKING:
    from medst_trl.evaluation.scoring import score_vqa as score_vqa
    from medst_trl.policy.adapters import adapter_config as adapter_config
    from medst_trl.policy.loading import load_policy as load_policy
    from medst_trl.policy.prototype_llava import PrototypeExtractor as PrototypeExtractor
    from medst_trl.selftrain.candidates import CandidateGenerator as CandidateGenerator
    from medst_trl.selftrain.judge.pairwise import PairwiseJudge as PairwiseJudge
    from medst_trl.selftrain.preferences import build_preferences as build_preferences
    from medst_trl.training.collator import DataCollatorForSelfQuestioning as DataCollatorForSelfQuestioning
    from medst_trl.training.dpo import MultimodalDPOConfig as MultimodalDPOConfig
    from medst_trl.training.dpo import MultimodalDPOTrainer as MultimodalDPOTrainer
    from medst_trl.training.sft import SelfQuestioningConfig as SelfQuestioningConfig
    from medst_trl.training.sft import SelfQuestioningTrainer as SelfQuestioningTrainer

# So that the Auto classes of transformers load the model that this package adds.
register_with_transformers()


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
