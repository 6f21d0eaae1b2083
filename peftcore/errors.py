"""What peftcore raises when it cannot take an adapter.

AdapterError
├── ConfigError        a field of the adapter's config is wrong        (.field)
├── UnsupportedError   the method or option is known and not supported (.field)
├── CheckpointError    the weights do not fit the config and the base  (.key)
└── MixtureError       adapters whose parts do not add up exactly
"""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter cannot be used as it is; the message says what and where."""


class ConfigError(AdapterError):
    """A config field is missing, of the wrong type, or contradicts another."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class UnsupportedError(ConfigError):
    """A method or an option that is known by name and refused by name."""


class CheckpointError(AdapterError):
    """A tensor is missing, left over, of the wrong shape or dtype, or not finite."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key


class MixtureError(AdapterError):
    """The named adapters cannot be added up by weight."""
