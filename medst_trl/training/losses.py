# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Preference losses for `loss_type`: those of TRL by name, and your own:

```python
class Margin(PreferenceLoss):
    name = "margin"
    paper = "https://huggingface.co/papers/..."

    def __call__(self, pairs, args):
        ratios = pairs.log_ratios()
        return torch.relu(1 - args.beta * (ratios.chosen - ratios.rejected))


LOSSES.register(Margin())
```

In a file, `medst dpo --plugins margin.py --loss_type sigmoid margin --loss_weights 1 0.5` adds it to TRL's sigmoid.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from medst_trl.base.registry import Registry


if TYPE_CHECKING:
    from torch import Tensor
    from trl import DPOConfig

TRUE_VIEW = "image"
COMPUTED_VIEWS = frozenset({TRUE_VIEW})  # views that the trainer computes


class Answers(NamedTuple):
    """One number for the chosen and one for the rejected answer of each pair, each of shape (pairs,)."""

    chosen: "Tensor"
    rejected: "Tensor"


@dataclass(frozen=True)
class PairLogProbs:
    """
    Log-probabilities, lengths and weights of a batch of preference pairs: the input of a [`PreferenceLoss`].

    Args:
        policy (`dict[str, Answers]`):
            By view of the image (`"image"` is the true one), log-probabilities of the answers given the prompt under
            the policy, in nats, summed over their tokens.
        reference (`dict[str, Answers]`):
            The same under the reference, without gradients.
        lengths (`Answers`):
            Tokens of the answers, with their terminators.
        weight (`torch.Tensor` of shape (pairs,), *optional*):
            Weight of each pair, if the dataset has a column `weight`. The trainer multiplies by it.
        flip_probability (`torch.Tensor` of shape (pairs,), *optional*):
            Probability that the rejected answer is the better one, if the dataset has a column `probability` (that the
            chosen one is).
    """

    policy: Mapping[str, Answers]
    reference: Mapping[str, Answers]
    lengths: Answers
    weight: "Tensor | None" = None
    flip_probability: "Tensor | None" = None

    def log_ratios(self, view: str = TRUE_VIEW) -> Answers:
        """How much more likely the answers are under the policy than under the reference, in nats."""
        pairs = zip(self.policy[view], self.reference[view], strict=True)
        return Answers(*(policy - reference for policy, reference in pairs))


class PreferenceLoss(Protocol):
    """
    A loss on preference pairs.

    Attributes:
        name (`str`): Name in `loss_type`.
        paper (`str`): Where it is described.
        views (`tuple[str, ...]`): Views of the image it compares besides the true one: `blank`, `shuffled`,
            `corrupted`. None of them is computed yet.
    """

    name: str
    paper: str
    views: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """What `--help` shows beside the name."""
        return self.paper

    @abstractmethod
    def __call__(self, pairs: PairLogProbs, args: "DPOConfig") -> "Tensor":
        """
        Args:
            pairs ([`PairLogProbs`]): Log-probabilities of a batch.
            args ([`~trl.DPOConfig`]): Settings, such as `beta` and `label_smoothing`.

        Returns:
            `torch.Tensor` of shape (pairs,): The loss of each pair, before weights.
        """
        ...


def trl_losses() -> list[str]:
    """
    Names of the losses that the installed `DPOTrainer` computes.

    They are read from its source file, because importing it would import torch.
    """
    source = Path(find_spec("trl").origin).with_name("trainer").joinpath("dpo_trainer.py").read_text("utf-8")
    return list(dict.fromkeys(re.findall(r"loss_type == ['\"](\w+)['\"]", source)))


@dataclass(frozen=True)
class TrlLoss:
    """A loss that TRL's `DPOTrainer` computes itself."""

    name: str
    paper: str = "see DPOConfig"
    summary: str = "TRL"

    def __call__(self, pairs: PairLogProbs, args: "DPOConfig") -> "Tensor":
        raise NotImplementedError(f"TRL computes the loss {self.name!r}.")


LOSSES: Registry[PreferenceLoss | TrlLoss] = Registry("loss", [], ["paper", "summary", "__call__"])
for _name in trl_losses():
    LOSSES.register(TrlLoss(_name))


def is_registered(name: str) -> bool:
    """Whether a loss is one of ours or a plugin's, and not TRL's."""
    return not isinstance(LOSSES.get(name), TrlLoss)


def check_losses(names: Sequence[str], args: Any) -> None:
    """
    Check a `loss_type` before a model is loaded.

    Args:
        names (sequence of `str`):
            Values of `loss_type`.
        args ([`~trl.DPOConfig`]):
            The other settings.

    Raises:
        UserError: for an unknown loss; the message lists the known ones.
        ValueError: for a loss that needs a view of the image that is not computed, or a setting that only TRL's losses
            support.
    """
    for name in names:
        loss = LOSSES.get(name)
        if isinstance(loss, TrlLoss):
            continue
        if missing := sorted(set(getattr(loss, "views", ())) - COMPUTED_VIEWS):
            raise ValueError(f"The loss {name!r} compares the image view {', '.join(missing)}, which is not computed.")
        for setting in ("ld_alpha", "use_weighting"):
            if getattr(args, setting):
                raise ValueError(f"{setting} works with TRL's losses only. Remove it, or the loss {name!r}.")
