"""Everything `plaudit_model` raises on purpose.

ModelError
  ContractError      the checkpoint's contract is missing, broken, or does not match its weights
  CheckpointError    the directory cannot be read: a hash, a file, a format
  AdapterError       a LoRA adapter lacks its head, or does not fit its base
  ItemError          one item cannot be scored; carries a code. Its neighbours can.
"""

from __future__ import annotations


class ModelError(Exception):
    """Base of the errors of this package. `exit_code` is what the command line exits with."""

    exit_code = 78


class ContractError(ModelError):
    """`reward.json` is missing, invalid, or contradicts the weights beside it."""


class CheckpointError(ModelError):
    """A checkpoint directory is damaged or in a form that is not read (pickle, wrong hash, missing file)."""


class AdapterError(ModelError):
    """A LoRA adapter cannot be attached, lacks a trained head, or is not of the base that is there."""


class ItemError(ModelError):
    """One item cannot be scored. `code` is stable: clients and tests match on it.

    Codes: `too_long`, `invalid_unicode`, `empty_input`, `invalid_messages`, `invalid_token_ids`,
    `foreign_special_tokens`, `rendered_text_refused`, `template_error`, `non_finite_score`.
    """

    exit_code = 65

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
