"""The errors that a user sees as one or two lines, without a traceback. Importable from every floor."""

from __future__ import annotations


class PellucidError(Exception):
    """Something that the user can act on: the message says what, where and what to do. The CLI exits with code 2."""


class ConfigError(PellucidError):
    """A key or value of the configuration is wrong."""


class DataError(PellucidError):
    """A file, a row or a tokenizer is not what the stage needs."""


class RewardError(PellucidError):
    """A reward source raised, or returned something that is not a score."""


class IntegrityError(PellucidError):
    """An invariant of training broke: a ratio, a parity, a checksum, a gradient. Training on would be silent failure."""


class CheckpointError(PellucidError):
    """A run directory or a checkpoint cannot be used, or cannot be written."""


class RecordError(PellucidError):
    """A recorded step cannot be read: it is missing, damaged, foreign, or written by another version of the schema."""
