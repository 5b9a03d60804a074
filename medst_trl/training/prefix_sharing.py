# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""One pass over image and prompt for both answers of a preference pair.

Stock DPO encodes prompt and image with the chosen answer and again with the rejected one. Here a pair is one
sequence, `[prompt | chosen | last prompt token, rejected]`, in which the rejected answer does not see the chosen one
and the positions of both continue those of the prompt (https://huggingface.co/papers/2410.20305). The last prompt
token appears twice because the first token of each answer is predicted from it.

The trainer's loss does not know about this: [`PrefixSharing`] takes the rows of the stock layout, runs the model on
the shared one, and returns log-probabilities in the stock layout.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from medst_trl.policy.families import family_of

from .encoding import TOKEN_INPUTS


logger = get_logger(__name__)

PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FULL_PRECISION = (torch.float32, torch.float64)
# Nats by which a token's log-probability may differ between the two layouts. A wrong mask or wrong positions make a
# larger difference.
LARGEST_DIFFERENCE = 1e-3
MEAN_IN_HALF_PRECISION = 0.05

_FULL, _SLIDING = "full_attention", "sliding_attention"


class SharedLayout(NamedTuple):
    """
    Where the tokens of the stock layout (2 x batch, length) are in the shared one (batch, shared length).

    Args:
        source (`torch.Tensor` of shape (batch, shared length)): Flat index into the stock layout; 0 in padding.
        column (`torch.Tensor` of shape (batch, shared length)): Column of each token in its row of the stock layout.
        branch (`torch.Tensor` of shape (batch, shared length)): 0 prompt, 1 chosen, 2 rejected, -1 padding. The last
            prompt token is the first of each branch.
        scored (`torch.Tensor` of shape (2 x batch, length - 1)): Flat index, into (batch, shared length - 1), of the
            score of each token but the first of a row. Correct for the tokens of both answers.
    """

    source: torch.Tensor
    column: torch.Tensor
    branch: torch.Tensor
    scored: torch.Tensor

    @classmethod
    def of(cls, attention_mask: torch.Tensor, prefix_length: torch.Tensor, shared_length: int) -> "SharedLayout":
        """
        Args:
            attention_mask (`torch.Tensor` of shape (2 x batch, length)): Of the stock layout, padded on the right.
            prefix_length (`torch.Tensor` of shape (batch,)): Tokens that both rows of a pair begin with, at least 1.
            shared_length (`int`): Of the longest pair: prefix + chosen + 1 + rejected tokens.
        """
        device, (rows, length) = attention_mask.device, attention_mask.shape
        pair = torch.arange(rows // 2, device=device)[:, None]
        chosen_end, rejected_end = attention_mask.sum(1, keepdim=True).chunk(2)
        branch_start = prefix_length[:, None] - 1

        place = torch.arange(shared_length, device=device)[None]
        in_rejected = place >= chosen_end
        column = torch.where(in_rejected, place - chosen_end + branch_start, place)
        branch = torch.where(in_rejected, 2, (place >= branch_start).long())
        branch = torch.where(in_rejected & (column >= rejected_end), -1, branch)
        source = ((pair + in_rejected * (rows // 2)) * length + column).masked_fill(branch < 0, 0)

        token = torch.arange(1, length, device=device)[None]
        rejected_token = (token - branch_start + chosen_end).clamp(max=shared_length - 1)
        predicted_at = torch.cat([token.expand(rows // 2, -1), rejected_token]) - 1
        scored = pair.repeat(2, 1) * (shared_length - 1) + predicted_at.clamp(max=shared_length - 2)
        return cls(source, column.masked_fill(branch < 0, 0), branch, scored)


class PrefixSharing:
    """
    Make a model with TRL's fused LM head accept batches of [`DataCollatorForMultimodalPreference`] with
    `share_prefix=True`: rows of the stock layout, the images of each pair once. Other batches work as before.

    The first batch with images and the first without are computed in both layouts. If the two do not agree, such
    batches are computed in the stock layout from then on (with the images preprocessed once), with a warning.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model whose `forward` TRL has given a fused LM head; it is patched in place.
        is_sharded (`bool`, *optional*, defaults to `False`):
            Whether ranks hold parts of the weights (ZeRO-3, FSDP), so that all must run the model equally often.
            Then only the first batch is compared, and batches of another kind stay in the stock layout.
    """

    def __init__(self, model: PreTrainedModel, is_sharded: bool = False):
        PartialState()  # the logger asks it for the rank; with a trainer it exists already
        self.config = model.config.get_text_config()
        self.is_causal = family_of(model.config.model_type).causal
        self.is_sharded = is_sharded
        self.agrees: dict[bool, bool] = {}  # by whether there are images
        # The function, not the method of this model: a copy of the model must run its own weights.
        self.forward = model.forward.__func__

        @functools.wraps(self.forward)
        def forward(model, *args, prefix_length=None, shared_length=None, **inputs):
            if prefix_length is None:
                return self.forward(model, *args, **inputs)
            if not inputs.get("fused_lm_head"):
                return self.forward(model, *args, **with_images_twice(inputs))
            has_images = any(torch.is_tensor(value) and name not in TOKEN_INPUTS for name, value in inputs.items())
            share = functools.partial(self._shared, model, inputs, prefix_length, shared_length)
            if has_images not in self.agrees:
                # Sharded: ranks may meet the second kind of batch in different steps, so it is not compared.
                is_comparable = not (self.is_sharded and self.agrees)
                self.agrees[has_images] = is_comparable and self._compare(model, inputs, share)
            return share() if self.agrees[has_images] else self.forward(model, **with_images_twice(inputs))

        # On the instance, as TRL does, so that PEFT and DDP wrap it like any other.
        model.forward = types.MethodType(forward, model)

    def _shared(self, model: Any, inputs: dict[str, Any], prefix_length: torch.Tensor, shared_length: int) -> Any:
        labels = inputs["labels"]
        layout = SharedLayout.of(inputs["attention_mask"], prefix_length, shared_length)
        positions = _positions(model, inputs, layout, prefix_length)
        tokens = {}
        for name in inputs.keys() & set(TOKEN_INPUTS) - {"attention_mask"}:
            fill = -100 if name == "labels" else 0
            tokens[name] = inputs[name].reshape(-1)[layout.source].masked_fill(layout.branch < 0, fill)
        blocks = None
        if not self.is_causal and "token_type_ids" in tokens:
            blocks = get_block_sequence_ids_for_mask(tokens["token_type_ids"])
        mask = branch_masks(self.config, layout.branch, layout.column, blocks)
        output = self.forward(model, **{**inputs, **tokens, "attention_mask": mask, "position_ids": positions})
        return _in_stock_layout(output, layout, labels)

    def _compare(self, model: PreTrainedModel, inputs: dict[str, Any], share: Callable[[], Any]) -> bool:
        """Whether both layouts give the same log-probabilities. Warns if not."""
        training, scored = model.training, inputs["labels"][:, 1:] != -100
        model.eval()  # dropout would differ
        try:
            with torch.no_grad():
                stock = self.forward(model, **with_images_twice(inputs)).log_probs[scored]
                problem = _disagreement(stock, share().log_probs[scored], _is_exact(model))
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if should_reduce_batch_size(error):
                raise
            problem = f"it raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            model.train(training)
        if problem is not None:
            logger.warning(
                f"share_prefix: {type(model).__name__} continues with a sequence for each answer, because with a "
                f"shared prompt {problem}. Training is correct, but a step takes longer."
            )
        return problem is None


def share_prefix(model: PreTrainedModel, is_sharded: bool = False) -> None:
    """Make a model compute each pair as one sequence, in place. See [`PrefixSharing`]."""
    PrefixSharing(model, is_sharded)


def _positions(
    model: PreTrainedModel, inputs: dict[str, Any], layout: SharedLayout, prefix_length: torch.Tensor
) -> torch.Tensor:
    """
    Position ids in the shared layout, of shape (batch, shared length), or (3, batch, shared length) for m-RoPE: those
    of the prompt as the model counts them, and from its last token on one more for each token.
    """
    backbone = model.base_model
    last = prefix_length[:, None] - 1
    behind = (layout.column - last).clamp(min=0)
    column = torch.minimum(layout.column, last)
    if inputs.get("image_grid_thw") is None or not hasattr(backbone, "get_rope_index"):
        return column + behind
    pairs = len(prefix_length)
    rows = {name: inputs[name][:pairs] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    positions, _ = backbone.get_rope_index(**rows, image_grid_thw=inputs["image_grid_thw"])
    return positions.gather(2, column.expand(3, -1, -1)) + behind


def _is_exact(model: PreTrainedModel) -> bool:
    """Whether the model computes in full precision."""
    parameter = next(model.parameters())
    device = parameter.device.type
    rounds = device == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return parameter.dtype in FULL_PRECISION and not rounds and not torch.is_autocast_enabled(device)


def _disagreement(stock: torch.Tensor, shared: torch.Tensor, exact: bool) -> str | None:
    """How log-probabilities of the two layouts differ too much; `None` if they agree."""
    difference = (stock - shared).float().abs()
    # Half precision rounds so much that only the mean is informative.
    found, allowed = (difference.max(), LARGEST_DIFFERENCE) if exact else (difference.mean(), MEAN_IN_HALF_PRECISION)
    if found <= allowed:  # false for NaN
        logger.info(f"share_prefix: both layouts give the same log-probabilities (difference: {found:.2g} nats).")
        return None
    return f"log-probabilities differ by {found:.2g} nats per token (allowed: {allowed:g})"


def cannot_share(model: PreTrainedModel) -> str | None:
    """
    Why a model cannot read two answers after one prompt; `None` if it may be able to.

    Args:
        model ([`~transformers.PreTrainedModel`]): Policy without adapter.
    """
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} is not known to accept a mask that separates them (sdpa and eager do)"
    if unknown := layer_types(config) - {_FULL, _SLIDING}:
        return f"its layers of type {', '.join(sorted(unknown))} would mix the two answers"
    if getattr(config, "cross_attention_layers", None):
        return "its images are read by cross-attention"
    return None


def with_images_twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the stock layout with the images of the chosen rows repeated for the rejected rows."""
    return {
        name: torch.cat([value, value]) if torch.is_tensor(value) and name not in TOKEN_INPUTS else value
        for name, value in inputs.items()
    }


def _in_stock_layout(output: Any, layout: SharedLayout, labels: torch.Tensor) -> Any:
    """The fused LM head's output with its scores in the stock layout, 0 without a label."""
    is_scored = labels[:, 1:] != -100
    for name in PER_TOKEN_OUTPUTS:
        score = getattr(output, name)
        if score is not None:
            setattr(output, name, score.reshape(-1)[layout.scored].masked_fill(~is_scored, 0))
    output.label_mask = is_scored
    return output


# The attention mask: a four-dimensional mask, or a dict of them by layer type, passes through a model's forward
# unchanged.


def layer_types(config: PreTrainedConfig) -> set[str]:
    """
    The types of attention in a language model's layers.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Configuration of the text model.

    Returns:
        `set[str]`: `full_attention`, `sliding_attention`, or another type of transformers.
    """
    if getattr(config, "layer_types", None):
        return set(config.layer_types)
    return {_FULL if getattr(config, "sliding_window", None) is None else _SLIDING}


def branch_masks(
    config: PreTrainedConfig, branch: torch.Tensor, column: torch.Tensor, blocks: torch.Tensor | None = None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """
    Attention mask in which every branch sees the prompt and itself, and no other branch.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the text model: its layer types, sliding window and attention implementation.
        branch (`torch.Tensor` of shape (batch, length)):
            0 for the prompt, another number for each branch (padding is one).
        column (`torch.Tensor` of shape (batch, length)):
            Position of each token in its own sequence, which a sliding window counts by.
        blocks (`torch.Tensor` of shape (batch, length), *optional*):
            Tokens with the same number, 0 or more, see each other in both directions (Gemma 3's images); -1 elsewhere.

    Returns:
        A mask of shape (batch, 1, length, length), boolean for SDPA and additive for eager attention; if layers differ
        in type, a dict of them by type.
    """

    def allowed(batch, head, query, key):
        sees = (query >= key) & ((branch[batch, key] == 0) | (branch[batch, key] == branch[batch, query]))
        if blocks is not None:
            sees = sees | ((blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0))
        return sees

    def in_window(batch, head, query, key):
        near = column[batch, query] - column[batch, key] < config.sliding_window
        return allowed(batch, head, query, key) & near

    rules = {_FULL: allowed, _SLIDING: in_window}
    make_mask = eager_mask if config._attn_implementation == "eager" else sdpa_mask
    (batch, length), settings = branch.shape, {"allow_is_causal_skip": False, "device": branch.device}
    masks = {
        kind: make_mask(batch, length, length, mask_function=rules[kind], **settings) for kind in layer_types(config)
    }
    return next(iter(masks.values())) if len(masks) == 1 else masks
