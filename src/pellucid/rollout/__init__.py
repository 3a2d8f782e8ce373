"""Where responses come from: one protocol, several engines."""

from pellucid.rollout.embedded import EmbeddedEngine
from pellucid.rollout.engine import RolloutEngine
from pellucid.rollout.fake import FakeEngine

__all__ = ["EmbeddedEngine", "FakeEngine", "RolloutEngine"]
