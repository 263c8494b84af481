# SPDX-License-Identifier: Apache-2.0
"""One tree of errors. Each message says what is wrong, where, what was expected, and what to do."""


class NMSparseError(Exception):
    """Base of every error that hf_nmsparse raises on purpose."""


class PatternError(NMSparseError, ValueError):
    """An n:m pattern is malformed, or a tensor does not follow it."""


class ConfigError(NMSparseError, ValueError):
    """An argument or a config field has a value that cannot be used."""


class FormatError(NMSparseError, ValueError):
    """A file or tensor on disk is not what its format promises: truncated, altered, or of another version."""


class BaseModelMismatchError(NMSparseError, ValueError):
    """A mask was made for other base weights than the ones it is being applied to."""


class UnsupportedError(NMSparseError, TypeError):
    """The operation has no meaning for, or no implementation on, this kind of module, dtype or device."""


class ScheduleError(NMSparseError, RuntimeError):
    """Mask training was run without being told the optimizer step."""


class HubError(NMSparseError, OSError):
    """A repo on the Hub cannot be read or written: absent, forbidden, changed meanwhile, or out of reach."""


class JudgeError(NMSparseError, OSError):
    """The judge of texts cannot be reached, refuses, or sends what is no answer."""


class UnratedError(JudgeError):
    """The judge answered without a rating that can be used."""
